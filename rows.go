package main

import (
	"bufio"
	"bytes"
	"encoding/csv"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"unicode/utf8"
)

// The forms in which products are imported and exported: a row has the writable
// fields of one product. What an export writes, an import reads as it was.

// rowFormat is one of them, by its media type.
type rowFormat string

const (
	ndjsonRows rowFormat = "application/x-ndjson" // a JSON object a line
	csvRows    rowFormat = "text/csv"             // RFC 4180, with a header row
)

// maxRow is the largest row, in bytes: that of a request which creates a product.
const maxRow = maxBody

// rowReader takes an import apart.
type rowReader struct {
	format rowFormat
	text   rowText
	header []string // the columns of CSV
}

func newRowReader(in io.Reader, format rowFormat) *rowReader {
	return &rowReader{format: format, text: newRowText(in, format)}
}

// begin reads what comes before the rows. What is wrong with it is wrong with
// the whole import.
func (r *rowReader) begin() error {
	if r.format != csvRows {
		return nil
	}
	_, text, err := r.nextText()
	switch {
	case errors.Is(err, io.EOF):
		return &badJSON{detail: "the header row is missing"}
	case errors.Is(err, errRowTooLong):
		return &badJSON{detail: "the header row is too long"}
	case err != nil:
		return err
	}
	header, err := splitCSV(strings.TrimPrefix(string(text), "\ufeff")) // spreadsheets begin with it
	if err != nil {
		return err
	}
	r.header = header
	return checkColumns(header)
}

// checkColumns checks a header row: columns stand in any order.
func checkColumns(header []string) error {
	var wrong []fieldError
	for n, name := range header {
		switch {
		case len(wrong) == maxUnknown:
		case !slices.Contains(newProductFields, name):
			wrong = append(wrong, fieldError{fmt.Sprintf("%.*s", maxNameLength, strings.ToValidUTF8(name, "\ufffd")), "is not a field that can be set here"})
		case slices.Contains(header[:n], name):
			wrong = append(wrong, fieldError{name, "stands twice"})
		}
	}
	for _, name := range neededProductFields {
		if !slices.Contains(header, name) {
			wrong = append(wrong, fieldError{name, "is required"})
		}
	}
	if wrong != nil {
		return &badJSON{detail: "the header row does not name the columns of a product", fields: wrong}
	}
	return nil
}

// row is one row of an import.
type row struct {
	Product
	line    int   // on which it begins
	problem error // what is wrong with this row alone
}

// next reads the next row that is not blank. An error, which is on the line of the
// row that comes with it, ends the rows; io.EOF says that none is missing.
func (r *rowReader) next() (row, error) {
	line, text, err := r.nextText()
	if errors.Is(err, errRowTooLong) {
		return row{line: line, problem: err}, nil
	}
	next := row{line: line}
	if err != nil {
		return next, err
	}
	if r.format == csvRows {
		next.Product, next.problem = r.parseCSV(text)
	} else {
		next.Product, next.problem = readNewProduct(text)
	}
	return next, nil
}

func (r *rowReader) nextText() (line int, text []byte, err error) {
	for {
		line, text, err = r.text.next()
		if err != nil || !isBlank(text) {
			return line, text, err
		}
	}
}

// parseCSV reads a record as the JSON object that it stands for, so that both
// forms have the same rules. An empty field is one that was left out, but for
// texts, where it is the empty text.
func (r *rowReader) parseCSV(text []byte) (Product, error) {
	if !utf8.Valid(text) {
		return Product{}, &badJSON{detail: "the row is not valid UTF-8"}
	}
	fields, err := splitCSV(string(text))
	if err != nil {
		return Product{}, err
	}
	if len(fields) != len(r.header) {
		return Product{}, &badJSON{detail: fmt.Sprintf("the row has %d fields, and the header row %d", len(fields), len(r.header))}
	}
	in := &bodyFields{object: make(map[string]json.RawMessage)}
	for n, name := range r.header {
		value := fields[n]
		switch {
		case name == "product_images":
			in.object[name] = encodeJSON(strings.Fields(value))
		case name == "product_name" || name == "product_description":
			in.object[name] = encodeJSON(value)
		case value != "" && name == "user_id":
			in.object[name] = json.RawMessage(value)
		case value != "":
			in.object[name] = bytes.TrimSpace(encodeJSON(value))
		}
	}
	return in.newProduct()
}

// rowText takes a body apart into the texts of its rows. It holds one row at a
// time, and of one that is too long next to nothing.
type rowText struct {
	in    *bufio.Reader
	scan  func(*quoting, []byte) int // finds the end of a row
	lines int                        // that were read
	row   []byte
}

var errRowTooLong = &httpError{http.StatusRequestEntityTooLarge, fmt.Sprintf("the row must have at most %d bytes", maxRow)}

func newRowText(in io.Reader, format rowFormat) rowText {
	t := rowText{in: bufio.NewReaderSize(in, 64<<10), scan: scanLine}
	if format == csvRows {
		t.scan = scanRecord
	}
	return t
}

// ready says that there is a next row, and that it can be had without a wait for
// more of the body.
func (t *rowText) ready() bool {
	buffered, _ := t.in.Peek(t.in.Buffered()) // which is there
	for {
		end := t.scan(new(quoting), buffered)
		if end == 0 || !isBlank(buffered[:end]) {
			return end > 0
		}
		buffered = buffered[end:]
	}
}

func isBlank(row []byte) bool { return len(bytes.Trim(row, " \t\r\n")) == 0 }

// next answers the next row without its newline, and the line on which it
// begins. The text is valid until the next call.
func (t *rowText) next() (line int, text []byte, err error) {
	line, t.row = t.lines+1, t.row[:0]
	var state quoting
	tooLong := false
	for {
		if _, err := t.in.Peek(1); err != nil {
			if errors.Is(err, io.EOF) && (len(t.row) > 0 || tooLong) { // the last row needs no newline
				return t.end(line, tooLong)
			}
			return line, nil, err
		}
		chunk, _ := t.in.Peek(t.in.Buffered())
		end := t.scan(&state, chunk)
		if end > 0 {
			chunk = chunk[:end]
		}
		t.lines += bytes.Count(chunk, newline)
		if tooLong = tooLong || len(t.row)+len(chunk) > maxRow+len("\r\n"); tooLong {
			t.row = t.row[:0]
		} else {
			t.row = append(t.row, chunk...)
		}
		t.in.Discard(len(chunk)) // which is there
		if end > 0 {
			return t.end(line, tooLong)
		}
	}
}

var newline = []byte("\n")

func (t *rowText) end(line int, tooLong bool) (int, []byte, error) {
	text := bytes.TrimSuffix(bytes.TrimSuffix(t.row, newline), []byte("\r"))
	if tooLong || len(text) > maxRow {
		return line, nil, errRowTooLong
	}
	return line, text, nil
}

// scanLine answers the length of chunk's first row with its newline, or 0 if it
// has no end there.
func scanLine(_ *quoting, chunk []byte) int { return bytes.IndexByte(chunk, '\n') + 1 }

// quoting is where in a CSV record a byte stands.
type quoting int

const (
	fieldBegins quoting = iota
	unquoted
	quoted
	quoteEnds // or the first of two quotes, which stand for one
)

// scanRecord is scanLine for CSV, where a newline between quotes belongs to the
// record. A chunk that does not end one leaves its state for the next.
func scanRecord(state *quoting, chunk []byte) int {
	for n, c := range chunk {
		switch {
		case *state == quoted:
			if c == '"' {
				*state = quoteEnds
			}
		case c == '"' && *state != unquoted:
			*state = quoted
		case c == '\n':
			return n + 1
		case c == ',':
			*state = fieldBegins
		default:
			*state = unquoted
		}
	}
	return 0
}

var errCSV = &badJSON{detail: "the row is not valid CSV: a quote belongs at the beginning and the end of a field, and is doubled within"}

// splitCSV takes a record apart. encoding/csv drops a CR before each newline, within
// quotes too, where a description would not survive it: so each gets one more.
func splitCSV(record string) ([]string, error) {
	fields, err := csv.NewReader(strings.NewReader(strings.ReplaceAll(record+"\n", "\n", "\r\n"))).Read()
	if err != nil && err != io.EOF { // of a blank one, which has no fields
		return nil, errCSV
	}
	return fields, nil
}

// productRow is a row as NDJSON has it.
type productRow struct {
	UserID      int64    `json:"user_id"`
	Name        string   `json:"product_name"`
	Description string   `json:"product_description"`
	Price       Price    `json:"product_price"`
	Sources     []string `json:"product_images"`
}

func rowOf(p Product) productRow {
	row := productRow{p.UserID, p.Name, p.Description, p.Price, make([]string, len(p.Images))}
	for n, image := range p.Images {
		row.Sources[n] = image.Source
	}
	return row
}

// rowWriter writes an export.
type rowWriter interface {
	write(p Product) error
	// flush hands over what was written; so does write, now and then.
	flush() error
}

func newRowWriter(out io.Writer, format rowFormat) rowWriter {
	buffer := bufio.NewWriterSize(out, 64<<10)
	if format == csvRows {
		w := csv.NewWriter(buffer)
		w.Write(newProductFields) // an error stays, and flush tells it
		return csvWriter{w}
	}
	return ndjsonWriter{buffer}
}

type ndjsonWriter struct{ *bufio.Writer }

func (w ndjsonWriter) write(p Product) error {
	_, err := w.Write(encodeJSON(rowOf(p)))
	return err
}

func (w ndjsonWriter) flush() error { return w.Flush() }

type csvWriter struct{ *csv.Writer }

// write joins the images by spaces: no URL has one, see parseURL.
func (w csvWriter) write(p Product) error {
	row := rowOf(p)
	return w.Write([]string{fmt.Sprint(row.UserID), row.Name, row.Description, row.Price.String(), strings.Join(row.Sources, " ")})
}

func (w csvWriter) flush() error {
	w.Flush()
	return w.Error()
}
