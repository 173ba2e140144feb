package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"strings"
	"testing"
	"unicode/utf8"
)

// The fuzz targets that need more than their part: the others stand beside what
// they test. "make fuzz" runs them all.

var writableFields = []string{"user_id", "product_name", "product_description", "product_price", "product_images"}

// FuzzProductInput holds what a body is read as against the plain words of the
// contract, and against a second reading of what was understood.
func FuzzProductInput(f *testing.F) {
	f.Add([]byte(shoe))
	for _, hostile := range hostileBodies() {
		if _, body, _ := strings.Cut(hostile.raw, "\r\n\r\n"); len(body) < 4096 {
			f.Add([]byte(body))
		}
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		p, err := readWhole(body)
		if err != nil {
			var syntax *badJSON
			var invalid invalidInput
			if !errors.As(err, &syntax) && !errors.As(err, &invalid) {
				t.Fatalf("%q: an error of no known kind: %v", body, err)
			}
			if len(encodeJSON(problemOf(err))) > 4*maxBody {
				t.Fatalf("%d bytes are answered to %d", len(encodeJSON(problemOf(err))), len(body))
			}
			return
		}
		checkProduct(t, p)
		if !bytes.Contains(body, []byte("\ufffd")) && !bytes.Contains(bytes.ToLower(body), []byte(`\ufffd`)) && strings.Contains(p.Name+p.Description, "\ufffd") {
			t.Fatalf("%q: something was replaced in %q", body, p.Name+p.Description)
		}
		again, err := readWhole(productBody(p))
		if err != nil || fmt.Sprint(again) != fmt.Sprint(p) {
			t.Fatalf("%q reads as %+v, which reads as %+v, %v", body, p, again, err)
		}
	})
}

func readWhole(body []byte) (Product, error) {
	in, err := readFields(body, writableFields...)
	if err != nil {
		return Product{}, err
	}
	in.require("user_id", "product_name", "product_price")
	p := Product{UserID: in.userID()}
	in.apply(&p)
	return p, in.err()
}

// checkProduct knows the contract's limits in numbers of its own.
func checkProduct(t *testing.T, p Product) {
	t.Helper()
	name, description := utf8.RuneCountInString(p.Name), utf8.RuneCountInString(p.Description)
	if p.UserID < 1 || name < 1 || name > 200 || description > 10_000 || p.Price < 0 || p.Price > 999_999_999_999 || len(p.Images) > 20 ||
		!utf8.ValidString(p.Name+p.Description) || strings.Contains(p.Name+p.Description, "\x00") {
		t.Fatalf("accepted: %+v", p)
	}
	for n, image := range p.Images {
		if image.Position != n || len(image.Source) > 2048 || strings.ContainsAny(image.Source, "\x00\r\n ") || !strings.HasPrefix(strings.ToLower(image.Source), "http") {
			t.Fatalf("accepted: %+v", image)
		}
	}
}

func productBody(p Product) []byte {
	sources := make([]string, len(p.Images))
	for n, image := range p.Images {
		sources[n] = image.Source
	}
	body, _ := json.Marshal(map[string]any{"user_id": p.UserID, "product_name": p.Name, "product_description": p.Description,
		"product_price": p.Price.String(), "product_images": sources})
	return body
}

// FuzzMergePatch holds the patched product against RFC 7396's own pseudocode, on
// a tree of maps.
func FuzzMergePatch(f *testing.F) {
	for _, patch := range []string{`{}`, `{"product_price":1}`, `{"product_name":null}`, `{"product_description":null,"product_images":null}`, `{"product_images":["http://e.example/a"]}`, `[]`, `null`,
		`{"product_name":"é","product_price":"1.50"}`, `{"product_price":1e2}`, `{"a":{"b":null}}`} {
		f.Add([]byte(patch))
	}
	f.Fuzz(func(t *testing.T, patch []byte) {
		before := Product{UserID: 1, Name: "Trail shoe", Description: "Light.", Price: 8990, Images: []Image{{Source: "http://e.example/1"}}}
		in, err := readFields(patch, writableFields[1:]...)
		if err != nil {
			return
		}
		after := before
		if in.apply(&after); in.err() != nil {
			return
		}
		var change map[string]any
		if err := json.Unmarshal(patch, &change); err != nil {
			t.Fatalf("%q was accepted: %v", patch, err)
		}
		var tree map[string]any
		json.Unmarshal(productBody(before), &tree)
		merged := mergePatch(tree, change).(map[string]any)
		sources, _ := merged["product_images"].([]any)
		got := make([]any, len(after.Images))
		for n, image := range after.Images {
			got[n] = image.Source
		}
		description, _ := merged["product_description"].(string)
		if after.Name != merged["product_name"] || after.Description != description || fmt.Sprint(got) != fmt.Sprint(sources) {
			t.Fatalf("%q makes %+v, want %+v", patch, after, merged)
		}
		if _, patched := change["product_price"]; !patched && after.Price != before.Price {
			t.Fatalf("%q changes the price to %v", patch, after.Price)
		}
	})
}

// mergePatch is MergePatch of RFC 7396, section 2.
func mergePatch(target, patch any) any {
	change, ok := patch.(map[string]any)
	if !ok {
		return patch
	}
	tree, _ := target.(map[string]any)
	out := make(map[string]any)
	maps.Copy(out, tree)
	for name, value := range change {
		if value == nil {
			delete(out, name)
		} else {
			out[name] = mergePatch(out[name], value)
		}
	}
	return out
}

// FuzzCursor: what is taken for a cursor makes a query, and reads the same again.
func FuzzCursor(f *testing.F) {
	for sort := range sortColumns {
		f.Add(cursorAfter(Product{ID: 7, Name: "é%_", Price: 5}, sortOrder(sort)).String(), sort)
		f.Add(cursorAfter(Product{ID: 1<<63 - 1}, sortOrder("-"+sort)).String(), "-"+sort)
	}
	for _, text := range []string{"", "x", "bnVsbA", "e30", "eyJzIjoiaWQiLCJpIjoxfQ"} {
		f.Add(text, "id")
	}
	f.Fuzz(func(t *testing.T, text, sort string) {
		order := sortOrder(sort)
		if !order.valid() {
			return
		}
		c, err := parseCursor(text, order)
		if err != nil {
			if !errors.Is(err, errCursor) {
				t.Fatal(err)
			}
			return
		}
		if c.ID <= 0 || c.Sort != order {
			t.Fatalf("%q: %+v", text, c)
		}
		q, err := productFilter{Sort: order, Limit: 1, After: c}.query()
		if sql := q.page(false); err != nil || strings.Contains(sql, text) && len(text) > 3 {
			t.Fatalf("%q: %v in %s with %v", text, err, sql, q.args)
		}
		again, err := parseCursor(c.String(), order)
		if err != nil || again.ID != c.ID {
			t.Fatalf("%q: %+v reads again as %+v, %v", text, c, again, err)
		}
	})
}

// FuzzDecodeJob: what is no job is refused, and a job reads the same again.
func FuzzDecodeJob(f *testing.F) {
	for _, message := range []string{`{"job":1,"product":2}`, `{"job":1,"product":2,"request_id":"a","traceparent":"b","new":[1]}`, `{"job":0,"product":1}`, `{"job":1.5}`, `null`, `[]`, ``, `{"JOB":1,"Product":1}`} {
		f.Add([]byte(message))
	}
	f.Fuzz(func(t *testing.T, message []byte) {
		job, err := decodeJob(message)
		if err != nil {
			return
		}
		if job.ID <= 0 || job.ProductID <= 0 {
			t.Fatalf("%q is the job %+v", message, job)
		}
		text, _ := json.Marshal(job)
		if again, err := decodeJob(text); err != nil || again != job {
			t.Fatalf("%q is %+v, then %+v, %v", message, job, again, err)
		}
	})
}
