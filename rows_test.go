package main

import (
	"bytes"
	"encoding/csv"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"
	"testing/iotest"
)

// readRow is what came of one row.
type readRow struct {
	Line    int
	Name    string
	Problem string
}

func readRows(t *testing.T, in io.Reader, format rowFormat) (all []readRow) {
	t.Helper()
	r := newRowReader(in, format)
	if err := r.begin(); err != nil {
		t.Fatal(err)
	}
	for {
		next, err := r.next()
		if errors.Is(err, io.EOF) {
			return all
		}
		if err != nil {
			t.Fatal(err)
		}
		got := readRow{Line: next.line, Name: next.Name}
		if next.problem != nil {
			got = readRow{Line: next.line, Problem: next.problem.Error()}
		}
		all = append(all, got)
	}
}

// Rows are the same in whatever pieces they come.
func TestRowsAreTakenApart(t *testing.T) {
	t.Parallel()
	const columns = "product_price,product_name,user_id\n"
	row := func(name string) string {
		return fmt.Sprintf(`{"user_id":1,"product_name":%q,"product_price":1}`, name)
	}
	exact := `{"user_id":1,"product_price":1,"product_name":"x"` + strings.Repeat(" ", maxRow-50) + `}`
	tooLong := errRowTooLong.detail
	for name, c := range map[string]struct {
		format rowFormat
		text   string
		want   []readRow
	}{
		"nothing":                    {ndjsonRows, "", nil},
		"blank lines":                {ndjsonRows, "\n \t\n\r\n" + row("a") + "\n\n" + row("b") + "\n\n", []readRow{{4, "a", ""}, {6, "b", ""}}},
		"no newline at the end":      {ndjsonRows, row("a") + "\r\n" + row("b"), []readRow{{1, "a", ""}, {2, "b", ""}}},
		"a row of the largest size":  {ndjsonRows, exact + "\r\n" + exact, []readRow{{1, "x", ""}, {2, "x", ""}}},
		"a row that is too long":     {ndjsonRows, exact + " \n" + row("b") + "\n" + strings.Repeat("x", 3*maxRow), []readRow{{1, "", tooLong}, {2, "b", ""}, {3, "", tooLong}}},
		"CSV":                        {csvRows, columns + "1,a,1\r\n\n\"1\",\"b \"\"x\"\",\ny\",1\n2,c,1", []readRow{{2, "a", ""}, {4, "b \"x\",\ny", ""}, {6, "c", ""}}},
		"CSV from a spreadsheet":     {csvRows, "\ufeff" + columns + "1,é,1\r\n", []readRow{{2, "é", ""}}},
		"CSV keeps CRLF and spaces":  {csvRows, columns + "1,\" a\r\nb \",1\n1, c ,1\n", []readRow{{2, " a\r\nb ", ""}, {4, " c ", ""}}},
		"CSV with a row too long":    {csvRows, columns + "1,\"" + strings.Repeat("x\n", maxRow) + "\",1\n1,b,1\n", []readRow{{2, "", tooLong}, {maxRow + 3, "b", ""}}},
		"CSV with a quote too many":  {csvRows, columns + "1,a\"b,1\n1,\"a\"b,1\n1,c,1\n", []readRow{{2, "", errCSV.detail}, {3, "", errCSV.detail}, {4, "c", ""}}},
		"CSV with a quote left open": {csvRows, columns + "1,a,1\n1,\"b,1\n1,c,1\n", []readRow{{2, "a", ""}, {3, "", errCSV.detail}}},
		"CSV with a field too many":  {csvRows, columns + "1,a,1,\n1,b,1\n", []readRow{{2, "", "the row has 4 fields, and the header row 3"}, {3, "b", ""}}},
		"CSV that is no UTF-8":       {csvRows, columns + "1,a\xff,1\n1,b,1\n", []readRow{{2, "", "the row is not valid UTF-8"}, {3, "b", ""}}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			for how, in := range map[string]io.Reader{
				"at once": strings.NewReader(c.text), "byte by byte": iotest.OneByteReader(strings.NewReader(c.text)), "with the end": iotest.DataErrReader(strings.NewReader(c.text)),
			} {
				if got := readRows(t, in, c.format); !slices.Equal(got, c.want) {
					t.Errorf("%s: %+v, want %+v", how, got, c.want)
				}
			}
		})
	}
}

func TestHeaderRowNamesTheColumns(t *testing.T) {
	t.Parallel()
	for header, fields := range map[string][]string{
		"": nil, "\n\n": nil, `user_id,"product_name`: nil, strings.Repeat("x", maxRow+1): nil,
		"user_id,product_name": {"product_price"},
		"user_id,product_name,product_price,user_id,colour,\xff": {"user_id", "colour", "\ufffd"},
		"user_id;product_name;product_price":                     {"user_id;product_name;product_price", "user_id", "product_name", "product_price"},
	} {
		err := newRowReader(strings.NewReader(header), csvRows).begin()
		p := problemOf(err)
		var named []string
		for _, e := range p.Errors {
			named = append(named, e.Field)
		}
		if p.Status != 400 || !slices.Equal(named, fields) {
			t.Errorf("%.50q: %v, fields %q, want %q", header, err, named, fields)
		}
	}
}

// In CSV an empty field is one that was left out.
func TestFieldsOfCSVFollowTheRulesOfJSON(t *testing.T) {
	t.Parallel()
	const columns = "user_id,product_name,product_description,product_price,product_images\n"
	for row, wrong := range map[string][]string{
		"1,a,,1.5,":                             nil,
		"1,null,null,0,http://a/x  https://b/y": nil,
		",,,,":                                  {"user_id", "product_price", "product_name"},
		"null,a,,null,":                         {"user_id", "product_price"},
		`"1,2",a,,"1,5",ftp://x http://u:p@h/`:  {"user_id", "product_price", "product_images[0]", "product_images[1]"},
		`1,a,,1e2,` + strings.Repeat("http://a ", 21): {"product_price", "product_images"},
		"1,a,\x00,-1,": {"product_description", "product_price"},
	} {
		r := newRowReader(strings.NewReader(columns+row+"\n"), csvRows)
		if err := r.begin(); err != nil {
			t.Fatal(err)
		}
		next, err := r.next()
		var invalid invalidInput
		errors.As(next.problem, &invalid)
		var named []string
		for _, e := range invalid {
			named = append(named, e.Field)
		}
		if err != nil || next.problem != nil && invalid == nil || !slices.Equal(named, wrong) {
			t.Errorf("%q: %v, %v; want errors of %q", row, next.problem, err, wrong)
		}
	}
}

// What encoding/csv writes is read as it was, whatever the fields hold, and the
// end of the record is found.
func FuzzCSV(f *testing.F) {
	f.Add("a", "b,\"c\"", " \r\n\r")
	f.Add("", "", "")
	f.Add("\\.", "\"", "\n")
	f.Fuzz(func(t *testing.T, a, b, c string) {
		fields := []string{a, b, c}
		var text bytes.Buffer
		w := csv.NewWriter(&text)
		w.Write(fields)
		w.Write([]string{"next"})
		w.Flush()
		end := scanRecord(new(quoting), text.Bytes())
		if got, err := splitCSV(strings.TrimSuffix(text.String()[:end], "\n")); err != nil || !slices.Equal(got, fields) {
			t.Errorf("%q became %q and was read as %q, %v", fields, text.String(), got, err)
		}
	})
}
