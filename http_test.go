package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// api is the HTTP side of the program on a database of its own, without a
// pipeline behind it.
type api struct {
	*server
	handler http.Handler
	log     *bytes.Buffer
}

func newAPI(t *testing.T) *api {
	t.Helper()
	return newAPIOn(t, sqliteStore(t))
}

// newAPIOn is one of several on the same database.
func newAPIOn(t *testing.T, s *store) *api {
	enc := encoder{objectURL: func(key string) string { return "https://cdn.example/" + key }}
	log := new(bytes.Buffer)
	logger := slog.New(slog.NewJSONHandler(log, nil))
	a := &api{log: log, server: &server{
		store: s, products: newProductLoader(s, enc), encoder: enc,
		wake: func() {}, invalidate: func(int64, int64) {}, deadChanged: func() {},
		log: logger, stopping: make(chan struct{}), patience: bulkPatience,
		console: newConsole(), monitor: newMonitor(s, logger), feed: runFeed(t, s, logger),
	}}
	a.handler = a.routes()
	return a
}

// runFeed runs a feed until the test ends.
func runFeed(t *testing.T, s *store, log *slog.Logger) *eventFeed {
	feed := newEventFeed(s, log)
	ctx, stop := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() { feed.Run(ctx) })
	t.Cleanup(func() { stop(); running.Wait() })
	return feed
}

// answer is a response with its body decoded.
type answer struct {
	*httptest.ResponseRecorder
	json map[string]any
}

// do sends a request; headers are name, value, name, value…
func (a *api) do(t *testing.T, method, target, body string, headers ...string) answer {
	t.Helper()
	r := httptest.NewRequest(method, target, strings.NewReader(body))
	if body != "" {
		r.Header.Set("Content-Type", "application/json")
	}
	for n := 0; n < len(headers); n += 2 {
		r.Header.Set(headers[n], headers[n+1])
	}
	w := httptest.NewRecorder()
	a.handler.ServeHTTP(w, r)
	if err := checkExchange(r, []byte(body), w.Code, w.Result().Header, w.Body.Bytes()); err != nil {
		t.Error(err)
	}
	out := answer{ResponseRecorder: w}
	if kind := w.Header().Get("Content-Type"); strings.Contains(kind, "json") && kind != string(ndjsonRows) {
		if err := json.Unmarshal(w.Body.Bytes(), &out.json); err != nil {
			t.Fatalf("%s %s: %v in %q", method, target, err, w.Body)
		}
	}
	return out
}

// wantProblem checks that an answer is a whole problem document.
func (got answer) wantProblem(t *testing.T, status int, fields ...string) {
	t.Helper()
	if got.Code != status {
		t.Errorf("status %d, want %d: %s", got.Code, status, got.Body)
		return
	}
	if ct := got.Header().Get("Content-Type"); ct != "application/problem+json" {
		t.Errorf("Content-Type %q", ct)
	}
	id := got.Header().Get("X-Request-Id")
	if got.json["status"] != float64(status) || got.json["title"] == "" || got.json["detail"] == "" || got.json["type"] != "about:blank" || got.json["request_id"] != id || id == "" {
		t.Errorf("not a whole problem document: %s", got.Body)
	}
	var named []string
	list, _ := got.json["errors"].([]any)
	for _, e := range list {
		named = append(named, e.(map[string]any)["field"].(string))
	}
	if !slices.Equal(named, fields) {
		t.Errorf("the errors name the fields %q, want %q: %s", named, fields, got.Body)
	}
}

const shoe = `{"user_id": 1, "product_name": "Trail shoe", "product_description": "Light, grippy.", "product_price": 89.90,
	"product_images": ["https://example.com/a.jpg", "https://example.com/b.png"]}`

func TestCreateAnswersWithTheProduct(t *testing.T) {
	t.Parallel()
	a := newAPI(t)
	got := a.do(t, "POST", "/products", shoe)
	if got.Code != 201 || got.Header().Get("Location") != "/products/1" || got.Header().Get("ETag") != `"1"` {
		t.Fatalf("status %d, headers %v: %s", got.Code, got.Header(), got.Body)
	}
	created, _ := got.json["created_at"].(string)
	want := fmt.Sprintf(`{"id":1,"user_id":1,"product_name":"Trail shoe","product_description":"Light, grippy.","product_price":89.90,`+
		`"product_images":["https://example.com/a.jpg","https://example.com/b.png"],"compressed_product_images":[null,null],`+
		`"images":[{"source":"https://example.com/a.jpg","status":"pending"},{"source":"https://example.com/b.png","status":"pending"}],`+
		`"version":1,"created_at":%q,"updated_at":%q}`+"\n", created, created)
	if got.Body.String() != want {
		t.Errorf("body\n%s want\n%s", got.Body, want)
	}
	read := a.do(t, "GET", "/products/1", "")
	if read.Code != 200 || read.Body.String() != want || read.Header().Get("Cache-Status") != "pms; fwd=miss" ||
		read.Header().Get("Cache-Control") != "private, no-cache" || read.Header().Get("ETag") != `"1"` {
		t.Errorf("read: status %d, headers %v, body %s", read.Code, read.Header(), read.Body)
	}
}

func TestOptionalFieldsHaveDefaults(t *testing.T) {
	t.Parallel()
	a := newAPI(t)
	got := a.do(t, "POST", "/products", `{"user_id":1,"product_name":"x","product_price":"0"}`)
	if got.Code != 201 || !strings.Contains(got.Body.String(), `"product_description":"","product_price":0.00,"product_images":[],"compressed_product_images":[],"images":[],`) {
		t.Errorf("status %d: %s", got.Code, got.Body)
	}
}

func TestBodiesThatAreNoProduct(t *testing.T) {
	t.Parallel()
	long := strings.Repeat("é", 201)
	type wrong struct {
		body   string
		status int
		fields []string
	}
	with := func(field, value string) string {
		fields := map[string]string{"user_id": "1", "product_name": `"x"`, "product_price": "1"}
		fields[field] = value
		var parts []string
		for name, value := range fields {
			parts = append(parts, fmt.Sprintf("%q:%s", name, value))
		}
		return "{" + strings.Join(parts, ",") + "}"
	}
	one := func(field, value string) wrong { return wrong{with(field, value), 422, []string{field}} }
	image := func(value string) wrong {
		return wrong{with("product_images", "["+value+"]"), 422, []string{"product_images[0]"}}
	}
	for name, c := range map[string]wrong{
		"no JSON":                 {`hello`, 400, nil},
		"half of JSON":            {`{"user_id": 1,`, 400, nil},
		"a list":                  {`[]`, 400, nil},
		"a string":                {`"x"`, 400, nil},
		"null":                    {`null`, 400, nil},
		"two objects":             {with("user_id", "1") + `{}`, 400, nil},
		"trailing text":           {with("user_id", "1") + `x`, 400, nil},
		"no UTF-8":                {with("product_name", "\"\xff\""), 400, nil},
		"a field twice":           {`{"user_id":1,"user_id":1,"product_name":"x","product_price":1}`, 400, nil},
		"too deep":                {with("product_images", strings.Repeat("[", 1000)+strings.Repeat("]", 1000)), 400, nil},
		"an unknown field":        {with("colour", `"red"`), 400, []string{"colour"}},
		"another case":            {with("Product_Name", `"x"`), 400, []string{"Product_Name"}},
		"a read-only field":       {with("version", `1`), 400, []string{"version"}},
		"two unknown fields":      {`{"id":1,"images":[]}`, 400, []string{"id", "images"}},
		"nothing":                 {`{}`, 422, []string{"user_id", "product_name", "product_price"}},
		"all wrong":               {`{"user_id":0,"product_name":"","product_description":1,"product_price":-1,"product_images":["ftp://x",3]}`, 422, []string{"user_id", "product_name", "product_description", "product_price", "product_images[0]", "product_images[1]"}},
		"all wrong, the user too": {`{"user_id":99,"product_name":"","product_price":1}`, 422, []string{"product_name", "user_id"}},
		"user null":               one("user_id", "null"),
		"user text":               one("user_id", `"1"`),
		"user fraction":           one("user_id", "1.5"),
		"user huge":               one("user_id", "99999999999999999999"),
		"user unknown":            one("user_id", "4711"),
		"name null":               one("product_name", "null"),
		"name number":             one("product_name", "7"),
		"name empty":              one("product_name", `""`),
		"name too long":           one("product_name", `"`+long+`"`),
		"name with NUL":           one("product_name", `"a\u0000b"`),
		"description object":      one("product_description", `{}`),
		"description too long":    one("product_description", `"`+strings.Repeat("x", 10_001)+`"`),
		"price null":              one("product_price", "null"),
		"price negative":          one("product_price", "-0.01"),
		"price too large":         one("product_price", "10000000000"),
		"price too fine":          one("product_price", "1.005"),
		"price text":              one("product_price", `"cheap"`),
		"price true":              one("product_price", "true"),
		"images text":             one("product_images", `"https://example.com/a.jpg"`),
		"too many images":         one("product_images", "["+strings.Repeat(`"https://e.example/",`, 20)+`"https://e.example/"]`),
		"image null":              image("null"),
		"image number":            image("1"),
		"image empty":             image(`""`),
		"image relative":          image(`"/a.jpg"`),
		"image without host":      image(`"https:///a.jpg"`),
		"image file":              image(`"file:///etc/passwd"`),
		"image with password":     image(`"https://user:pw@example.com/a.jpg"`),
		"image too long":          image(`"https://example.com/` + strings.Repeat("a", 2048) + `"`),
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			a := newAPI(t)
			a.do(t, "POST", "/products", c.body).wantProblem(t, c.status, c.fields...)
			if n := len(a.do(t, "GET", "/products", "").json["items"].([]any)); n != 0 {
				t.Errorf("%d products were stored all the same", n)
			}
		})
	}
}

func TestLimitsAreWithin(t *testing.T) {
	t.Parallel()
	a := newAPI(t)
	images := strings.Repeat(`"https://example.com/a.jpg",`, 19) + `"https://example.com/a.jpg"`
	body := fmt.Sprintf(`{"user_id":1,"product_name":%q,"product_description":%q,"product_price":9999999999.99,"product_images":[%s]}`,
		strings.Repeat("é", 200), strings.Repeat("é", 10_000), images)
	got := a.do(t, "POST", "/products", body)
	if got.Code != 201 || !strings.Contains(got.Body.String(), `"product_price":9999999999.99,`) {
		t.Errorf("status %d: %s", got.Code, got.Body)
	}
}

func TestBodySizeAndType(t *testing.T) {
	t.Parallel()
	a := newAPI(t)
	exact := func(size int) string {
		return `{"user_id":1,"product_name":"x","product_price":1` + strings.Repeat(" ", size-len(`{"user_id":1,"product_name":"x","product_price":1}`)) + `}`
	}
	if got := a.do(t, "POST", "/products", exact(1<<20)); got.Code != 201 {
		t.Errorf("a body of the largest size: %d %s", got.Code, got.Body)
	}
	a.do(t, "POST", "/products", exact(1<<20+1)).wantProblem(t, 413)
	a.do(t, "POST", "/products", shoe, "Content-Type", "text/plain").wantProblem(t, 415)
	a.do(t, "POST", "/products", shoe, "Content-Type", "application/json; charset=latin1").wantProblem(t, 415)
	a.do(t, "PUT", "/products/1", shoe, "Content-Type", "application/merge-patch+json").wantProblem(t, 415)
	patch := a.do(t, "PATCH", "/products/1", `{}`, "Content-Type", "application/xml")
	patch.wantProblem(t, 415)
	if got := patch.Header().Get("Accept-Patch"); got != "application/merge-patch+json, application/json" {
		t.Errorf("Accept-Patch: %q", got)
	}
	if got := a.do(t, "PATCH", "/products/1", `{}`, "Content-Type", "application/merge-patch+json; charset=UTF-8"); got.Code != 200 {
		t.Errorf("a merge patch: %d %s", got.Code, got.Body)
	}
}

func TestPathsThatLeadNowhere(t *testing.T) {
	t.Parallel()
	a := newAPI(t)
	a.do(t, "POST", "/products", shoe) // product 1, which has one path only
	for _, target := range []string{"/product", "/products/", "/products/1/x", "/products/2", "/products/0", "/products/-1", "/products/+1", "/products/01", "/products/x",
		"/products/99999999999999999999", "/products/1%2F2", "/dead-letters/1", "/products/2/events", "/media/x"} {
		a.do(t, "GET", target, "").wantProblem(t, 404)
	}
	for target, allow := range map[string]string{
		"/products": "GET, HEAD, POST", "/products/1": "DELETE, GET, HEAD, PATCH, PUT", "/dead-letters/1/replay": "POST", "/healthz": "GET, HEAD",
	} {
		got := a.do(t, "OPTIONS", target, "")
		got.wantProblem(t, 405)
		if got.Header().Get("Allow") != allow {
			t.Errorf("Allow at %s: %q, want %q", target, got.Header().Get("Allow"), allow)
		}
	}
}

func TestConditionalReads(t *testing.T) {
	t.Parallel()
	a := newAPI(t)
	a.do(t, "POST", "/products", shoe)
	for header, status := range map[string]int{
		`"1"`: 304, `W/"1"`: 304, `*`: 304, `"0", "1"`: 304, `"2"`: 200, `1`: 200, `"10"`: 200, `W/*`: 200,
	} {
		got := a.do(t, "GET", "/products/1", "", "If-None-Match", header)
		if got.Code != status || got.Header().Get("ETag") != `"1"` || status == 304 && got.Body.Len() > 0 {
			t.Errorf("If-None-Match: %s: status %d, want %d; headers %v", header, got.Code, status, got.Header())
		}
	}
	if got := a.do(t, "HEAD", "/products/1", ""); got.Code != 200 || got.Header().Get("ETag") != `"1"` {
		t.Errorf("HEAD: %d %v", got.Code, got.Header())
	}
}

func TestConditionalWrites(t *testing.T) {
	t.Parallel()
	for name, write := range map[string]func(a *api, t *testing.T, tag string) answer{
		"PATCH": func(a *api, t *testing.T, tag string) answer {
			return a.do(t, "PATCH", "/products/1", `{"product_price":1}`, "If-Match", tag)
		},
		"PUT": func(a *api, t *testing.T, tag string) answer {
			return a.do(t, "PUT", "/products/1", `{"product_name":"x","product_price":1}`, "If-Match", tag)
		},
		"DELETE": func(a *api, t *testing.T, tag string) answer {
			return a.do(t, "DELETE", "/products/1", "", "If-Match", tag)
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			a := newAPI(t)
			a.do(t, "POST", "/products", shoe)
			for _, tag := range []string{`"2"`, `W/"1"`, `1`, `""`} {
				write(a, t, tag).wantProblem(t, 412)
			}
			if got := write(a, t, `"7", "1"`); got.Code >= 300 {
				t.Errorf("If-Match with the version: %d %s", got.Code, got.Body)
			}
		})
	}
}

func TestPatchMergesAndPutReplaces(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct{ method, body, want string }{
		"one field":         {"PATCH", `{"product_price":"12.5"}`, `"product_name":"Trail shoe","product_description":"Light, grippy.","product_price":12.50,"product_images":["https://example.com/a.jpg","https://example.com/b.png"]`},
		"null resets":       {"PATCH", `{"product_description":null,"product_images":null}`, `"product_name":"Trail shoe","product_description":"","product_price":89.90,"product_images":[]`},
		"a list is a whole": {"PATCH", `{"product_images":["https://example.com/b.png"]}`, `"product_description":"Light, grippy.","product_price":89.90,"product_images":["https://example.com/b.png"]`},
		"replaced":          {"PUT", `{"product_name":"Boot","product_price":1}`, `"product_name":"Boot","product_description":"","product_price":1.00,"product_images":[]`},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			a := newAPI(t)
			a.do(t, "POST", "/products", shoe)
			got := a.do(t, c.method, "/products/1", c.body)
			if got.Code != 200 || !strings.Contains(got.Body.String(), c.want) || got.Header().Get("ETag") != `"2"` {
				t.Errorf("status %d, ETag %s: %s", got.Code, got.Header().Get("ETag"), got.Body)
			}
			if read := a.do(t, "GET", "/products/1", ""); read.Body.String() != got.Body.String() {
				t.Errorf("read %s", read.Body)
			}
		})
	}
}

func TestPatchAndPutRefuse(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		method, body string
		status       int
		fields       []string
	}{
		"null for a required field":   {"PATCH", `{"product_name":null,"product_price":null}`, 422, []string{"product_name", "product_price"}},
		"the user":                    {"PATCH", `{"user_id":1}`, 400, []string{"user_id"}},
		"the user in a replacement":   {"PUT", `{"user_id":1,"product_name":"x","product_price":1}`, 400, []string{"user_id"}},
		"a replacement without price": {"PUT", `{"product_name":"x"}`, 422, []string{"product_price"}},
		"the id":                      {"PATCH", `{"id":1}`, 400, []string{"id"}},
		"no object":                   {"PATCH", `null`, 400, nil},
		"a bad image":                 {"PATCH", `{"product_images":["https://example.com/a.jpg","x"]}`, 422, []string{"product_images[1]"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			a := newAPI(t)
			before := a.do(t, "POST", "/products", shoe).Body.String()
			a.do(t, c.method, "/products/1", c.body).wantProblem(t, c.status, c.fields...)
			if after := a.do(t, "GET", "/products/1", "").Body.String(); after != before {
				t.Errorf("the product was changed: %s", after)
			}
		})
	}
}

func TestPatchThatChangesNothingKeepsTheVersion(t *testing.T) {
	t.Parallel()
	a := newAPI(t)
	a.do(t, "POST", "/products", shoe)
	if got := a.do(t, "PATCH", "/products/1", `{"product_name":"Trail shoe"}`); got.Code != 200 || got.Header().Get("ETag") != `"1"` {
		t.Errorf("status %d, ETag %s", got.Code, got.Header().Get("ETag"))
	}
}

func TestDeleteTakesTheProductAway(t *testing.T) {
	t.Parallel()
	a := newAPI(t)
	a.do(t, "POST", "/products", shoe)
	if got := a.do(t, "DELETE", "/products/1", ""); got.Code != 204 || got.Body.Len() > 0 {
		t.Errorf("status %d: %s", got.Code, got.Body)
	}
	a.do(t, "GET", "/products/1", "").wantProblem(t, 404)
	a.do(t, "DELETE", "/products/1", "").wantProblem(t, 404)
	a.do(t, "PATCH", "/products/1", `{}`).wantProblem(t, 404)
}

func TestListPagesAndLinks(t *testing.T) {
	t.Parallel()
	a := newAPI(t)
	for n := range 6 { // so that the last page is full
		a.do(t, "POST", "/products", fmt.Sprintf(`{"user_id":1,"product_name":"Shoe %d","product_price":%d}`, n, n%2))
	}
	target, names := "/products?sort=-product_price&limit=2&name=SHOE", []string(nil)
	for pages := 1; ; pages++ {
		got := a.do(t, "GET", target, "")
		if got.Code != 200 {
			t.Fatalf("status %d: %s", got.Code, got.Body)
		}
		for _, item := range got.json["items"].([]any) {
			names = append(names, item.(map[string]any)["product_name"].(string))
		}
		next, _ := got.json["next_cursor"].(string)
		link := got.Header().Get("Link")
		if next == "" {
			if link != "" || got.json["next_cursor"] != nil || pages != 3 {
				t.Errorf("page %d is the last, with Link %q and next_cursor %v", pages, link, got.json["next_cursor"])
			}
			break
		}
		target = strings.TrimSuffix(strings.TrimPrefix(link, "<"), `>; rel="next"`)
		if u, err := url.Parse(target); err != nil || u.Query().Get("cursor") != next || u.Query().Get("name") != "SHOE" {
			t.Fatalf("Link %q with next_cursor %q", link, next)
		}
	}
	if want := []string{"Shoe 5", "Shoe 3", "Shoe 1", "Shoe 4", "Shoe 2", "Shoe 0"}; !slices.Equal(names, want) {
		t.Errorf("listed %q, want %q", names, want)
	}
	if got := a.do(t, "GET", "/products?name=nothing", ""); strings.TrimSpace(got.Body.String()) != `{"items":[],"next_cursor":null}` {
		t.Errorf("an empty list: %s", got.Body)
	}
}

// A client that does not read a list holds no more than about maxPage of it: the page
// ends there, and the next one goes on.
func TestListPagesAreBoundedInBytes(t *testing.T) {
	t.Parallel()
	a := newAPI(t)
	entries := make([]batchEntry, 60)
	for n := range entries {
		entries[n] = entry(fmt.Sprint(n))
		entries[n].Description = strings.Repeat("\x01", maxDescriptionLength) // of which JSON makes six bytes
	}
	createBatch(t, a.store, entries)
	target, names := "/products?limit=200&sort=-product_price", []string(nil)
	for pages := 1; target != ""; pages++ {
		got := a.do(t, "GET", target, "")
		if size := got.Body.Len(); got.Code != 200 || size > maxPage+100_000 || pages == 1 && size < maxPage {
			t.Fatalf("page %d: status %d, %d bytes", pages, got.Code, size)
		}
		for _, item := range got.json["items"].([]any) {
			names = append(names, item.(map[string]any)["product_name"].(string))
		}
		target = strings.TrimSuffix(strings.TrimPrefix(got.Header().Get("Link"), "<"), `>; rel="next"`)
	}
	for n := range entries {
		if want := fmt.Sprint(len(entries) - 1 - n); len(names) != len(entries) || names[n] != want {
			t.Fatalf("listed %q", names)
		}
	}
}

func TestListRefuses(t *testing.T) {
	t.Parallel()
	a := newAPI(t)
	other := cursorAfter(Product{ID: 1, Price: 5}, "product_price").String()
	early := cursorAfter(Product{ID: 1, CreatedAt: time.Date(0, 12, 31, 0, 0, 0, 0, time.UTC)}, "created_at").String()
	nul := cursorAfter(Product{ID: 1, Name: "\x00"}, "product_name").String()
	late := cursorAfter(Product{ID: 1, CreatedAt: time.Date(10000, 1, 1, 0, 0, 0, 0, time.UTC)}, "-created_at").String()
	for query, fields := range map[string][]string{
		"user_id=x": {"user_id"}, "user_id=0": {"user_id"}, "user_id=": {"user_id"},
		"min_price=-1": {"min_price"}, "max_price=1.001": {"max_price"}, "min_price=NaN": {"min_price"},
		"limit=0": {"limit"}, "limit=201": {"limit"}, "limit=x": {"limit"},
		"sort=price": {"sort"}, "sort=": {"sort"}, "sort=--id": {"sort"},
		"name=%00": {"name"}, "name=%ff": {"name"},
		"cursor=x": {"cursor"}, "cursor=" + other: {"cursor"}, "cursor=": {"cursor"}, "cursor=bnVsbA": {"cursor"},
		"sort=created_at&cursor=" + early: {"cursor"}, "sort=-created_at&cursor=" + late: {"cursor"},
		"sort=product_name&cursor=" + nul: {"cursor"},
		"limit=0&sort=x&user_id=y":        {"user_id", "limit", "sort"},
	} {
		t.Run(query, func(t *testing.T) { a.do(t, "GET", "/products?"+query, "").wantProblem(t, 422, fields...) })
	}
	for _, query := range []string{"colour=red", "Limit=1", "limit=1&limit=2", "%zz", "a;b"} {
		t.Run(query, func(t *testing.T) { a.do(t, "GET", "/products?"+query, "").wantProblem(t, 400) })
	}
}

func TestIdempotencyKeyMakesOneProduct(t *testing.T) {
	t.Parallel()
	a := newAPI(t)
	first := a.do(t, "POST", "/products", shoe, "Idempotency-Key", "k1")
	a.do(t, "PATCH", "/products/1", `{"product_price":1}`)
	again := a.do(t, "POST", "/products", shoe, "Idempotency-Key", "k1")
	if again.Code != 201 || again.Body.String() != first.Body.String() || again.Header().Get("Location") != "/products/1" || again.Header().Get("ETag") != `"1"` {
		t.Errorf("again: %d %v %s", again.Code, again.Header(), again.Body)
	}
	a.do(t, "POST", "/products", `{"user_id":1,"product_name":"x","product_price":1}`, "Idempotency-Key", "k1").wantProblem(t, 422)
	a.do(t, "POST", "/products", shoe, "Idempotency-Key", "").wantProblem(t, 400)
	a.do(t, "POST", "/products", shoe, "Idempotency-Key", strings.Repeat("k", 256)).wantProblem(t, 400)

	statuses := make([]int, 16)
	var group sync.WaitGroup
	for n := range statuses {
		group.Go(func() { statuses[n] = a.do(t, "POST", "/products", shoe, "Idempotency-Key", "k2").Code })
	}
	group.Wait()
	for _, status := range statuses {
		if status != 201 && status != 409 {
			t.Errorf("statuses %v, want 201 and 409 only", statuses)
		}
	}
	if n := len(a.do(t, "GET", "/products", "").json["items"].([]any)); n != 2 {
		t.Errorf("%d products of two keys", n)
	}
}

func TestAuthentication(t *testing.T) {
	t.Parallel()
	a := newAPI(t)
	a.authOn = true
	other := addUser(t, a.store)
	owner, stranger, admin := tokenOf(t, a, caller{1, false}), tokenOf(t, a, caller{other, false}), tokenOf(t, a, caller{other, true})

	refused := a.do(t, "POST", "/products", shoe)
	refused.wantProblem(t, 401)
	if refused.Header().Get("WWW-Authenticate") != `Bearer realm="pms"` {
		t.Errorf("WWW-Authenticate: %q", refused.Header().Get("WWW-Authenticate"))
	}
	a.do(t, "GET", "/products", "", "Authorization", "Bearer pms_x").wantProblem(t, 401)
	a.do(t, "GET", "/products", "", "Authorization", "Basic eDp4").wantProblem(t, 401)
	a.do(t, "POST", "/products", shoe, "Authorization", stranger).wantProblem(t, 403)
	if got := a.do(t, "POST", "/products", shoe, "Authorization", owner); got.Code != 201 {
		t.Fatalf("the owner's POST: %d %s", got.Code, got.Body)
	}
	if got := a.do(t, "GET", "/products/1", "", "Authorization", "bearer"+strings.TrimPrefix(stranger, "Bearer")); got.Code != 200 {
		t.Errorf("a stranger's GET: %d", got.Code)
	}
	a.do(t, "PATCH", "/products/1", `{}`, "Authorization", stranger).wantProblem(t, 403)
	a.do(t, "DELETE", "/products/1", "", "Authorization", stranger).wantProblem(t, 403)
	a.do(t, "GET", "/dead-letters", "", "Authorization", owner).wantProblem(t, 403)
	a.do(t, "GET", "/metrics", "", "Authorization", owner).wantProblem(t, 403)
	for _, target := range []string{"/dead-letters", "/metrics"} {
		if got := a.do(t, "GET", target, "", "Authorization", admin); got.Code != 200 {
			t.Errorf("an admin's GET %s: %d", target, got.Code)
		}
	}
	if got := a.do(t, "DELETE", "/products/1", "", "Authorization", admin); got.Code != 204 {
		t.Errorf("an admin's DELETE: %d", got.Code)
	}
	for _, target := range []string{"/healthz", "/readyz"} {
		if got := a.do(t, "GET", target, ""); got.Code != 200 {
			t.Errorf("GET %s without a token: %d", target, got.Code)
		}
	}
	if strings.Contains(a.log.String(), tokenPrefix) {
		t.Error("a token stands in the log")
	}
}

func TestRequestIDAndTraceparent(t *testing.T) {
	t.Parallel()
	a := newAPI(t)
	const trace = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
	got := a.do(t, "POST", "/products", shoe, "X-Request-Id", "order-7.b:2", "Traceparent", trace)
	if got.Header().Get("X-Request-Id") != "order-7.b:2" || got.Header().Get("Traceparent") != trace {
		t.Errorf("headers %v", got.Header())
	}
	failing := &recorder{ResponseWriter: httptest.NewRecorder(), origin: origin{"order-7.b:2", trace}}
	a.renderError(failing, httptest.NewRequest("POST", "/products", nil), errors.New("a failure"))
	for line := range strings.Lines(a.log.String()) {
		if !strings.Contains(line, `"request_id":"order-7.b:2"`) || !strings.Contains(line, `"traceparent":"`+trace) {
			t.Errorf("log line %s", line)
		}
	}
	jobs := publishDue(t, a.store)
	if len(jobs) != 2 || jobs[0].RequestID != "order-7.b:2" || jobs[0].Traceparent != trace {
		t.Errorf("queued %+v", jobs)
	}
	for _, insane := range []string{"", "a b", "x\ny", strings.Repeat("a", 129), "<script>", "ä"} {
		id := a.do(t, "GET", "/healthz", "", "X-Request-Id", insane, "Traceparent", insane).Header().Get("X-Request-Id")
		if id == insane || !isRequestID(id) {
			t.Errorf("X-Request-Id %q was answered with %q", insane, id)
		}
	}
}

func TestTraceparentIsTakenOverIfItIsValid(t *testing.T) {
	t.Parallel()
	const trace, caller = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
	const valid = "00-" + trace + "-" + caller + "-01"
	for header, want := range map[string]string{
		valid: valid, valid + "-more": "", "ff" + valid[2:]: "", "cc" + valid[2:]: valid, "cc" + valid[2:] + "-what.comes": valid, "cc" + valid[2:] + "what": "",
		"00-" + strings.Repeat("0", 32) + "-" + caller + "-01": "", "00-" + trace + "-" + strings.Repeat("0", 16) + "-01": "", strings.ToUpper(valid): "", "": "",
	} {
		if got := readTraceparent(header); got != want {
			t.Errorf("%q is read as %q, want %q", header, got, want)
		}
	}
}

// A database error that nobody foresaw is a 500 that tells the client nothing
// and the log everything; a panic likewise.
func TestFailuresOfOurOwnStayInside(t *testing.T) {
	t.Parallel()
	a := newAPI(t)
	if _, err := a.store.Exec(t.Context(), `ALTER TABLE products RENAME COLUMN price_cents TO secrets`); err != nil {
		t.Fatal(err)
	}
	got := a.do(t, "GET", "/products/1", "")
	got.wantProblem(t, 500)
	a.products = nil
	panicked := a.do(t, "GET", "/products/1", "")
	panicked.wantProblem(t, 500)
	for _, body := range []string{got.Body.String(), panicked.Body.String()} {
		if strings.Contains(body, "price_cents") || strings.Contains(body, "nil") {
			t.Errorf("the body tells of the inside: %s", body)
		}
	}
	if log := a.log.String(); !strings.Contains(log, "no such column") || !strings.Contains(log, "nil pointer") {
		t.Errorf("the log does not say what went wrong: %s", log)
	}
}

// A panic in the middle of an answer breaks it off: no client takes a part for the whole.
func TestPanicInAnAnswerBreaksItOff(t *testing.T) {
	t.Parallel()
	a, mux := newAPI(t), http.NewServeMux()
	a.route(mux, "GET /products/{id}", noToken, func(w http.ResponseWriter, _ *http.Request) error {
		io.WriteString(w, "half")
		http.NewResponseController(w).Flush()
		panic("boom")
	})
	web := httptest.NewServer(a.observe(mux))
	response, err := http.Get(web.URL + "/products/1")
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	if body, err := io.ReadAll(response.Body); err == nil {
		t.Errorf("the answer seems whole: %d %q", response.StatusCode, body)
	}
	web.Close()
	if log := a.log.String(); !strings.Contains(log, "boom") || !strings.Contains(log, `"msg":"request"`) {
		t.Errorf("the log does not say so: %s", log)
	}
}

// A client that hangs up is no failure of ours, whatever that interrupts; what is one
// stays one.
func TestClientsThatHangUpAreNoFailures(t *testing.T) {
	t.Parallel()
	gone, cancel := context.WithCancel(t.Context())
	cancel()
	for name, c := range map[string]struct {
		client   context.Context
		draining bool
		err      error
		status   int
		level    string
	}{
		"a client that hangs up":             {gone, false, context.Canceled, 499, ""},
		"one that interrupts the database":   {gone, false, errUnavailable, 499, ""},
		"one that has asked for nothing":     {gone, false, errNotFound, 404, ""},
		"one that meets an error in our SQL": {gone, false, io.ErrUnexpectedEOF, 500, "ERROR"},
		"a deadline of ours":                 {t.Context(), false, context.DeadlineExceeded, 503, "WARN"},
		"a server that is closed":            {gone, true, context.Canceled, 503, "WARN"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			a := newAPI(t)
			a.draining.Store(c.draining)
			a.products = readerFunc(func(context.Context, int64) (document, error) { return document{}, c.err })
			a.handler.ServeHTTP(httptest.NewRecorder(), httptest.NewRequestWithContext(c.client, "GET", "/products/1", nil))
			log := a.log.String()
			if lines := strings.Count(log, "\n"); !strings.Contains(log, fmt.Sprintf(`"status":%d,`, c.status)) || !strings.Contains(log, c.level) || c.level == "" && lines != 1 {
				t.Errorf("want status %d and a line of level %q: %s", c.status, c.level, log)
			}
		})
	}
}

// That a client hung up is seen by its connection.
func TestClientThatHangsUpIsLoggedAs499(t *testing.T) {
	t.Parallel()
	a := newAPI(t)
	ctx, hangUp := context.WithCancel(t.Context())
	a.products = readerFunc(func(ctx context.Context, _ int64) (document, error) {
		hangUp()
		<-ctx.Done()
		return document{}, ctx.Err()
	})
	web := httptest.NewServer(a.handler)
	request, _ := http.NewRequestWithContext(ctx, "GET", web.URL+"/products/1", nil)
	if response, err := http.DefaultClient.Do(request); err == nil {
		response.Body.Close()
		t.Errorf("it has an answer: %d", response.StatusCode)
	}
	web.Close()
	if log := a.log.String(); !strings.Contains(log, `"status":499,`) || strings.Contains(log, "WARN") {
		t.Error(log)
	}
}

func TestDatabaseAwayIsA503(t *testing.T) {
	t.Parallel()
	a := newAPI(t)
	a.store = storeAway(t)
	a.products = newProductLoader(a.store, a.encoder)
	a.parts = []part{{"store", true, a.store.Ping}}
	for _, request := range [][2]string{{"POST", "/products"}, {"PATCH", "/products/1"}} {
		body := map[string]string{"POST": shoe, "PATCH": `{}`}[request[0]]
		got := a.do(t, request[0], request[1], body)
		got.wantProblem(t, 503)
		if got.Header().Get("Retry-After") == "" || strings.Contains(got.Body.String(), "127.0.0.1") {
			t.Errorf("headers %v, body %s", got.Header(), got.Body)
		}
	}
	a.do(t, "GET", "/products/1", "").wantProblem(t, 503)
	a.do(t, "GET", "/products", "").wantProblem(t, 503)
	if got := a.do(t, "GET", "/readyz", ""); got.Code != 503 || got.json["status"] != "unavailable" {
		t.Errorf("readyz: %d %s", got.Code, got.Body)
	}
	if got := a.do(t, "GET", "/healthz", ""); got.Code != 200 {
		t.Errorf("healthz: %d", got.Code)
	}
}

func TestEventsTellEachChangeAndEnd(t *testing.T) {
	t.Parallel()
	a := newAPI(t)
	a.do(t, "POST", "/products", shoe)
	jobs := publishDue(t, a.store)
	web := httptest.NewServer(a.handler)
	defer web.Close()
	response, err := http.Get(web.URL + "/products/1/events")
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	if ct := response.Header.Get("Content-Type"); ct != "text/event-stream" {
		t.Errorf("Content-Type %q", ct)
	}
	finish(t, a.store, jobs[1], "key")
	bury(t, a.store, jobs[0], permanent("http_404", "404 Not Found"))
	stream, err := io.ReadAll(response.Body)
	if err != nil {
		t.Fatal(err)
	}
	if err := checkExchange(response.Request, nil, response.StatusCode, response.Header, stream); err != nil {
		t.Error(err)
	}
	text := string(stream)
	if strings.Count(text, "event: image\n") != 2 || !strings.HasSuffix(text, "event: done\ndata: {\"version\":3}\n\n") ||
		!strings.Contains(text, `data: {"position":1,"source":"https://example.com/b.png","status":"ready","url":"https://cdn.example/key",`) ||
		!strings.Contains(text, `"status":"failed","attempts":1,"error":{"code":"http_404","detail":"404 Not Found"}}`) {
		t.Errorf("the stream was\n%s", text)
	}
}

func TestDeadLettersOverHTTP(t *testing.T) {
	t.Parallel()
	a := newAPI(t)
	a.do(t, "POST", "/products", shoe)
	for _, job := range publishDue(t, a.store) {
		bury(t, a.store, job, permanent("http_404", "404 Not Found"))
	}
	list := a.do(t, "GET", "/dead-letters?limit=1", "")
	first := list.json["items"].([]any)[0].(map[string]any)
	if list.Code != 200 || list.json["next_cursor"] == nil || first["product_id"] != 1.0 || first["position"] != 0.0 || first["source"] != "https://example.com/a.jpg" ||
		first["attempts"] != 1.0 || first["error"].(map[string]any)["code"] != "http_404" || first["failed_at"] == "" {
		t.Errorf("list: %d %s", list.Code, list.Body)
	}
	if next := a.do(t, "GET", "/dead-letters?limit=1&cursor="+list.json["next_cursor"].(string), ""); next.json["next_cursor"] != nil || next.json["items"].([]any)[0].(map[string]any)["position"] != 1.0 {
		t.Errorf("second page: %s", next.Body)
	}
	if one := a.do(t, "GET", "/dead-letters/1", ""); one.Code != 200 || len(one.json["history"].([]any)) != 1 {
		t.Errorf("one: %d %s", one.Code, one.Body)
	}
	a.do(t, "GET", "/dead-letters?colour=red", "").wantProblem(t, 400)
	for range 2 {
		if got := a.do(t, "POST", "/dead-letters/1/replay", ""); got.Code != 202 {
			t.Errorf("replay: %d %s", got.Code, got.Body)
		}
	}
	if got := a.do(t, "POST", "/dead-letters/replay", ""); got.Code != 202 || got.json["replayed"] != 1.0 {
		t.Errorf("replay of all: %d %s", got.Code, got.Body)
	}
	if jobs := publishDue(t, a.store); len(jobs) != 2 {
		t.Errorf("queued after the replays: %v", jobs)
	}
	a.do(t, "DELETE", "/dead-letters/1", "").wantProblem(t, 404)
	a.do(t, "POST", "/dead-letters/99/replay", "").wantProblem(t, 404)
}

// What has images made anew tells the caches, the workers and whoever keeps the
// dead-letter queue at once.
func TestReplaysAreToldOf(t *testing.T) {
	t.Parallel()
	a := newAPI(t)
	create(t, a.store, "https://a.example/1.jpg", "https://a.example/2.jpg", "https://a.example/3.jpg", "https://a.example/4.jpg")
	for n, job := range inOrderOfID(publishDue(t, a.store)) {
		if n == 3 {
			finish(t, a.store, job, "key")
		} else {
			bury(t, a.store, job, permanent("http_404", "404 Not Found"))
		}
	}
	var told []string
	a.invalidate = func(id, version int64) { told = append(told, fmt.Sprintf("version %d", version)) }
	a.wake = func() { told = append(told, "work") }
	a.deadChanged = func() { told = append(told, "dead") }
	for _, step := range []struct {
		method, path string
		want         []string
	}{
		{"DELETE", "/dead-letters/3", []string{"dead"}},
		{"POST", "/dead-letters/1/replay", []string{"version 6", "work", "dead"}},
		{"POST", "/dead-letters/replay", []string{"version 7", "work", "dead"}},
		{"POST", "/dead-letters/replay", nil},
		{"POST", "/products/1/images/reprocess", []string{"version 8", "work", "dead"}},
		{"POST", "/products/1/images/reprocess", nil},
	} {
		told = nil
		if got := a.do(t, step.method, step.path, ""); got.Code > 204 || !slices.Equal(told, step.want) {
			t.Errorf("%s %s: %d %s, told %v, want %v", step.method, step.path, got.Code, got.Body, told, step.want)
		}
	}
}

// A change whose commit got through though its answer did not is told to the
// caches all the same. One that was refused is nothing to tell of.
func TestWritesTellOfCommitsThatTheyDidNotSee(t *testing.T) {
	t.Parallel()
	eachStore(t, func(t *testing.T, s *store) {
		db := &lossyDB{database: s.database}
		a := newAPIOn(t, newStore(db))
		var told []productVersion
		a.invalidate = func(id, version int64) { told = append(told, productVersion{id, version}) }
		path := fmt.Sprintf("/products/%d", create(t, s, "a").ID)
		job := publishDue(t, s)[0]
		bury(t, s, job, permanent("http_404", "404 Not Found")) // which makes version 2
		replay := fmt.Sprintf("/dead-letters/%d/replay", job.ID)
		steps := []struct {
			method, path, body string
			header             []string
			status             int
			told               []int64
		}{
			{"POST", replay, "", nil, 503, []int64{2}}, // this one is undone
			{"PATCH", path, `{"product_name": "Boot"}`, []string{"If-Match", `"0"`}, 412, nil},
			{"DELETE", path, "", []string{"If-Match", `"0"`}, 412, nil},
			{"POST", replay, "", nil, 503, []int64{3}},
			{"PATCH", path, `{"product_name": "Boot"}`, nil, 503, []int64{4}},
			{"PUT", path, `{"product_name": "Boots", "product_price": 1}`, nil, 503, []int64{5}},
			{"POST", path + "/images/reprocess", "", nil, 503, []int64{5}},
			{"DELETE", path, "", nil, 503, []int64{tombstone}},
			{"DELETE", path, "", nil, 404, nil},
		}
		for n, step := range steps {
			told = nil
			db.undo.Store(n == 0)
			db.lose.Store(n > 0 && step.status == 503)
			got := a.do(t, step.method, step.path, step.body, step.header...)
			var versions []int64
			for _, v := range told {
				versions = append(versions, v.Version)
			}
			if got.Code != step.status || !slices.Equal(versions, step.told) {
				t.Errorf("%s %s: %d %s, told %v, want %d, %v", step.method, step.path, got.Code, got.Body, told, step.status, step.told)
			}
		}
	})
}
