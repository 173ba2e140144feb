package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"mime"
	"net/http"
	"os"
	"strings"
	"time"
)

// bulkPatience is how long an import or an export waits for its client: for the
// whole of the next row, and for a buffer of the answer to be taken. So a client
// that sends everything before it reads anything is cut off, rather than waits
// for ever, if its results are more than the sockets hold.
const bulkPatience = 30 * time.Second

// bulkBuffer is how much of an answer is collected before it is sent, in bytes.
const bulkBuffer = 64 << 10

// importProducts creates a product of each row of the body. The results go out
// while the rows still come in.
func (s *server) importProducts(w http.ResponseWriter, r *http.Request) error {
	format, err := bodyType(w, r, string(ndjsonRows), "application/jsonl", string(csvRows))
	if err != nil {
		return err
	}
	key, release, err := s.holdKey(r, "import of "+callerName(w))
	if err != nil {
		return err
	}
	defer release()
	stream, err := s.openBulk(w, r, http.Header{"Content-Type": {string(ndjsonRows)}})
	if err != nil {
		return err
	}
	// A connection in full duplex whose body is not read to its end is no good for
	// another request: net/http panics when it looks for one.
	w.Header().Set("Connection", "close")
	if err := stream.control.EnableFullDuplex(); err != nil && !errors.Is(err, http.ErrNotSupported) { // only HTTP/1 is to be told
		return err
	}
	ctx, cancel := s.whileAllowed(context.WithoutCancel(r.Context()), w) // a client that goes away is a read that fails
	defer cancel()
	defer context.AfterFunc(ctx, stream.interrupt)()
	err = s.newImporter(stream, rowFormat(format), key).run(ctx)
	if err != nil && stream.begun {
		s.logBroken(stream, "import", err) // its last line says so
		return nil
	}
	return err
}

func (s *server) newImporter(stream *bulkStream, format rowFormat, key string) *importer {
	out := bufio.NewWriterSize(stream, bulkBuffer)
	return &importer{
		store: s.store,
		rows:  newRowReader(stream, format),
		allow: func(user int64) error { return mayWrite(stream.w, user) },
		await: stream.awaitRow,
		write: func(result any) error {
			_, err := out.Write(encodeJSON(result))
			return err
		},
		flush:  func() error { return errors.Join(out.Flush(), stream.flush()) },
		stored: func(id int64) { s.invalidate(id, 1); s.wake() },
		from:   originOf(stream.w),
		key:    key,
	}
}

// exportProducts answers with the products that the filter of the query leaves,
// in the form that an import takes.
func (s *server) exportProducts(w http.ResponseWriter, r *http.Request) error {
	filter, format, err := readExport(r)
	if err != nil {
		return err
	}
	stream, err := s.openBulk(w, r, exportHeader(format))
	if err != nil {
		return err
	}
	ctx, cancel := s.whileAllowed(r.Context(), w)
	defer cancel()
	defer context.AfterFunc(ctx, stream.interrupt)()
	if r.Method != http.MethodHead {
		err = exportProducts(ctx, s.store, filter, newRowWriter(stream, format))
	}
	if err == nil {
		err = stream.flush()
	} else if cause := context.Cause(ctx); cause != nil {
		err = cause
	}
	if err != nil && stream.begun {
		s.logBroken(stream, "export", err)
		panic(http.ErrAbortHandler) // so that no client takes a part for the whole
	}
	return err
}

func readExport(r *http.Request) (f productFilter, format rowFormat, err error) {
	query, err := readQuery(r.URL.RawQuery, "user_id", "name", "min_price", "max_price", "format")
	if err != nil {
		return f, "", err
	}
	format = acceptedFormat(r.Header.Values("Accept"))
	var wrong invalidInput
	f.readSelection(query, &wrong)
	wrong.check(query, "format", func(v string) (err error) { format, err = readRowFormat(v); return err })
	return f, format, wrong.err()
}

func readRowFormat(v string) (rowFormat, error) {
	switch v {
	case "ndjson":
		return ndjsonRows, nil
	case "csv":
		return csvRows, nil
	}
	return "", errors.New("must be ndjson or csv")
}

// acceptedFormat is the first form that the lines of an Accept header name. A
// client that accepts neither gets NDJSON, as RFC 9110, section 12.5.1, allows.
func acceptedFormat(lines []string) rowFormat {
	for part := range strings.SplitSeq(strings.Join(lines, ","), ",") {
		accepted, _, err := mime.ParseMediaType(part)
		switch {
		case err != nil:
		case accepted == string(csvRows):
			return csvRows
		case accepted == string(ndjsonRows), accepted == "application/jsonl", accepted == "*/*":
			return ndjsonRows
		}
	}
	return ndjsonRows
}

func exportHeader(format rowFormat) http.Header {
	contentType, name := string(ndjsonRows), "products.ndjson"
	if format == csvRows {
		contentType, name = "text/csv; charset=utf-8; header=present", "products.csv"
	}
	return http.Header{
		"Content-Type": {contentType}, "Content-Disposition": {`attachment; filename="` + name + `"`}, "Vary": {"Accept"},
	}
}

// bulkStream is the connection of an import or an export. It may last as long as
// it likes, if only its client keeps up.
type bulkStream struct {
	w        http.ResponseWriter
	body     io.Reader
	control  *http.ResponseController
	header   http.Header // of the answer, once there is one
	begun    bool        // there is one
	patience time.Duration
}

func (s *server) openBulk(w http.ResponseWriter, r *http.Request, header http.Header) (*bulkStream, error) {
	rec := w.(*recorder)
	if err := rec.enter(&rec.limits.bulk); err != nil {
		return nil, err
	}
	header.Set("Cache-Control", "no-store")
	return &bulkStream{w: w, body: r.Body, control: http.NewResponseController(w), header: header, patience: s.patience}, nil
}

// awaitRow gives the client time for the next row.
func (b *bulkStream) awaitRow() {
	b.control.SetReadDeadline(time.Now().Add(b.patience)) // a failure is the next read's
}

// stopPatience is how long a stream that is to end waits for the rest of a row, and
// for a client to take what it was sent. It is not nothing: after a read that
// failed net/http cannot read on, and would reset the connection of a client that
// is still sending, which then loses the end of the answer.
const stopPatience = time.Second

// interrupt ends what the stream waits for now.
func (b *bulkStream) interrupt() {
	end := time.Now().Add(stopPatience)
	b.control.SetReadDeadline(end)
	b.control.SetWriteDeadline(end)
}

func (b *bulkStream) Read(data []byte) (int, error) {
	n, err := b.body.Read(data)
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded):
		err = &httpError{http.StatusBadRequest, fmt.Sprintf("the next row was not there within %v", b.patience)}
	case err != nil && err != io.EOF:
		err = errBodyUnreadable
	}
	return n, err
}

func (b *bulkStream) Write(data []byte) (int, error) {
	b.begin()
	return b.w.Write(data)
}

func (b *bulkStream) flush() error {
	b.begin()
	return b.control.Flush()
}

// begin begins the answer, if that has not been done, and gives the client time
// for what is sent now.
func (b *bulkStream) begin() {
	if !b.begun {
		b.begun = true
		maps.Copy(b.w.Header(), b.header)
	}
	b.control.SetWriteDeadline(time.Now().Add(b.patience)) // a failure is the next write's
}

// whileAllowed is a context that ends with the server, too, and with the token of
// the caller: then errBadToken is its cause.
func (s *server) whileAllowed(ctx context.Context, w http.ResponseWriter) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancelCause(ctx)
	token := s.watchToken(ctx, w)
	go func() { cancel(s.awaitEnd(ctx, token)) }()
	return ctx, func() { cancel(nil) }
}

// awaitEnd waits for what ends an exchange before its time, and answers why if it
// is the token.
func (s *server) awaitEnd(ctx context.Context, token tokenWatch) error {
	for {
		select {
		case <-token.expired:
			if err := token.renew(); err != nil {
				return err
			}
		case <-s.stopping:
			return nil
		case <-ctx.Done():
			return nil
		}
	}
}

func (s *server) logBroken(stream *bulkStream, what string, err error) {
	originOf(stream.w).on(s.log).Warn(what+" was broken off", "err", err)
}
