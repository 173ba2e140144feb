package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"strings"
	"testing"
	"time"
)

// catalogue stores products whose texts are all that CSV and JSON may stumble on,
// of users 1 and other.
func catalogue(t *testing.T, s *store, other int64) {
	t.Helper()
	texts := []string{
		"plain", " leading and trailing ", "\"quoted\"", `back\slash \u0041 \.`, "comma, semicolon; tab\t", "two\nlines", "CR LF\r\nand CR\r", "\n", "\r\n",
		"=1+1", "+1", "@x", "-1", "null", "日本語 é 😀", "\u2028\u2029\u00a0\ufeff", "\x01\x7f", "<b>&amp;</b>", "'single'", "\ufffd", strings.Repeat("😀", maxNameLength),
	}
	var entries []batchEntry
	for n, text := range texts {
		e := batchEntry{Product: Product{UserID: 1, Name: text, Description: texts[len(texts)-1-n], Price: Price(rand.Int64N(1000)), Images: sourcesOf()}}
		if n%2 == 0 {
			e.UserID = other
			e.Images = sourcesOf("https://example.com/"+fmt.Sprint(n), "http://EXAMPLE.com:81/é,\"x\"?a=b&c=%20#f", "https://example.com/"+fmt.Sprint(n), "http://[::1]/'")
		}
		entries = append(entries, e)
	}
	entries[0].Description, entries[1].Description = "", strings.Repeat("\"\r\n", maxDescriptionLength/3)
	entries[0].Price, entries[1].Price, entries[2].Price = 0, maxPrice, 1
	for n := range exportPage { // so that there is more than one page
		entries = append(entries, entry(fmt.Sprint("more ", n)))
	}
	createBatch(t, s, entries)
}

func exported(t *testing.T, s *store, format rowFormat) []byte {
	t.Helper()
	var out bytes.Buffer
	if err := exportProducts(t.Context(), s, productFilter{}, newRowWriter(&out, format)); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

// What is exported and imported into an empty shop is exported as the same bytes,
// in either form.
func TestExportSurvivesTheRoundTrip(t *testing.T) {
	t.Parallel()
	eachStore(t, func(t *testing.T, s *store) {
		catalogue(t, s, addUser(t, s))
		form := map[rowFormat][]byte{ndjsonRows: exported(t, s, ndjsonRows), csvRows: exported(t, s, csvRows)}
		for format, rows := range form {
			if _, err := s.Exec(t.Context(), `DELETE FROM products`); err != nil {
				t.Fatal(err)
			}
			var refused bytes.Buffer
			p := &program{stdout: &refused, stderr: io.Discard}
			err := p.importFile(t.Context(), s, importOptions{format: format}, bytes.NewReader(rows), 0, &refused, func(int64, int64) {})
			if err != nil {
				t.Fatalf("%s: %v: %s", format, err, refused.Bytes())
			}
			for again, want := range form {
				if got := exported(t, s, again); !bytes.Equal(got, want) {
					t.Errorf("imported as %s, exported as %s:\n%.3000s\nand was\n%.3000s", format, again, got, want)
				}
			}
		}
	})
}

func TestExportOverHTTP(t *testing.T) {
	t.Parallel()
	a := newAPI(t)
	if got := a.do(t, "GET", "/products/export", ""); got.Code != 200 || got.Body.Len() != 0 {
		t.Errorf("an empty shop: %d %s", got.Code, got.Body)
	}
	other := addUser(t, a.store)
	a.importAll(t, ndjsonRows, rowOfUser(1, "Shoe")+rowOfUser(other, "Boot")+strings.Replace(rowOfUser(1, "shoes"), "1.50", "20", 1))
	line := func(user int64, name, price string) string {
		return fmt.Sprintf(`{"user_id":%d,"product_name":%q,"product_description":"","product_price":%s,"product_images":["https://example.com/a.jpg"]}`+"\n", user, name, price)
	}
	shoe, boot, shoes := line(1, "Shoe", "1.50"), line(other, "Boot", "1.50"), line(1, "shoes", "20.00")
	const asCSV = "user_id,product_name,product_description,product_price,product_images\n1,shoes,,20.00,https://example.com/a.jpg\n"
	for name, c := range map[string]struct{ query, accept, want string }{
		"all":                 {"", "", shoe + boot + shoes},
		"of a user":           {fmt.Sprint("?user_id=", other), "*/*", boot},
		"by name":             {"?name=SHOE", "application/jsonl", shoe + shoes},
		"by price":            {"?min_price=1.51&max_price=20&format=ndjson", "text/csv", shoes},
		"CSV":                 {"?min_price=2&format=csv", "application/x-ndjson", asCSV},
		"CSV by Accept":       {"?min_price=2", "text/html, text/csv;q=0.9, */*", asCSV},
		"nothing as CSV":      {"?min_price=21", "text/csv", asCSV[:strings.IndexByte(asCSV, '\n')+1]},
		"neither is accepted": {"?min_price=21", "text/html", ""},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			got := a.do(t, "GET", "/products/export"+c.query, "", "Accept", c.accept)
			csv := strings.HasPrefix(c.want, "user_id")
			if got.Code != 200 || got.Body.String() != c.want || csv != (got.Header().Get("Content-Type") == "text/csv; charset=utf-8; header=present") ||
				csv != strings.HasSuffix(got.Header().Get("Content-Disposition"), `.csv"`) {
				t.Errorf("status %d, headers %v:\n%s\nwant\n%s", got.Code, got.Header(), got.Body, c.want)
			}
		})
	}
	a.do(t, "GET", "/products/export?sort=id", "").wantProblem(t, 400)
	a.do(t, "GET", "/products/export?format=xml&user_id=0", "").wantProblem(t, 422, "user_id", "format")
	if head := a.do(t, "HEAD", "/products/export", ""); head.Code != 200 || head.Body.Len() != 0 || head.Header().Get("Vary") != "Accept" {
		t.Errorf("HEAD: %d %v %d bytes", head.Code, head.Header(), head.Body.Len())
	}
}

// exportTooLarge begins to read an export of more than the sockets hold, with a
// token that is looked at again soon.
func exportTooLarge(t *testing.T, a tokenAPI) (response *http.Response, revoke func()) {
	t.Helper()
	p := create(t, a.store)
	// By a statement for all: a batch takes a second for so much text.
	if _, err := a.store.Exec(t.Context(), `INSERT INTO products (user_id, product_name, name_folded, product_description, price_cents, created_at, updated_at)
		SELECT user_id, product_name, name_folded, $1, price_cents, created_at, updated_at FROM products, json_array_elements($2) WHERE products.id = $3`,
		strings.Repeat("x", maxDescriptionLength), "["+strings.Repeat("1,", 999)+"1]", p.ID); err != nil {
		t.Fatal(err)
	}
	request, err := http.NewRequestWithContext(t.Context(), "GET", served(t, a.api)+"/products/export", nil)
	if err != nil {
		t.Fatal(err)
	}
	request.Header.Set("Authorization", a.stranger)
	revoke = a.revocable(t, a.stranger)
	response, err = http.DefaultClient.Do(request)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { response.Body.Close() })
	if _, err := io.ReadFull(response.Body, make([]byte, 1000)); err != nil || response.StatusCode != 200 {
		t.Fatalf("the beginning: %v, %v", response, err)
	}
	return response, revoke
}

// An export that fails in its midst does not end like one that is whole, nor does
// that of a client which takes nothing, and both give their places back.
func TestExportThatIsNotWholeIsBrokenOff(t *testing.T) {
	t.Parallel()
	for name, fail := range map[string]func(t *testing.T, a *api, revoke func()){
		"the database fails":   func(t *testing.T, a *api, _ func()) { rename(t, a, "images", "others") },
		"the server ends":      func(_ *testing.T, a *api, _ func()) { close(a.stopping) },
		"the token is revoked": func(t *testing.T, a *api, revoke func()) { revoke(); a.awaitBulkEnd(t) },
		"the client hangs":     func(t *testing.T, a *api, _ func()) { a.awaitBulkEnd(t) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			a := newTokenAPI(t)
			if name == "the client hangs" {
				a.patience = 200 * time.Millisecond
			}
			response, revoke := exportTooLarge(t, a)
			fail(t, a.api, revoke)
			if n, err := io.Copy(io.Discard, response.Body); err == nil || errors.Is(err, io.EOF) {
				t.Errorf("after %d more bytes the answer ended as if it were whole", n)
			}
			a.awaitBulkEnd(t)
		})
	}
}
