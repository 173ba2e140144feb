package main

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"testing"

	"github.com/getkin/kin-openapi/openapi3"
)

// Every refusal that the document has for an operation is provoked from what
// the document says of it, so that a route which is new is tried as well.
func TestEveryOperationRefusesAsDocumented(t *testing.T) {
	t.Parallel()
	operations := described(t).operations
	for status, refused := range map[int]func(*testing.T, tokenAPI, *documentedOperation) answer{
		400: malformed, 401: withoutToken, 403: asStranger, 404: ofNothing, 412: ofAnotherVersion, 413: tooLarge,
		415: ofAnotherType, 422: withWrongValue, 429: tooOften, 500: withAdminsToken, 503: withAdminsToken,
	} {
		t.Run(fmt.Sprint(status), func(t *testing.T) {
			t.Parallel()
			a := newTokenAPI(t)
			switch status {
			case 500:
				breakTokens(t, a)
			case 503:
				takeDatabaseAway(t, a)
			}
			for pattern, op := range operations {
				if op.Responses.Status(status) == nil || op.isOpen() && (status == 412 || status == 500) || status == 403 && slices.Contains(strangers, pattern) {
					continue
				}
				got := refused(t, a, op)
				if got.Code != status {
					t.Errorf("%s: status %d: %s", pattern, got.Code, got.Body)
				}
				if op.path != "/readyz" && (got.json["status"] != float64(status) || got.json["request_id"] == "") {
					t.Errorf("%s: not a problem document: %v %s", pattern, got.Header(), got.Body)
				}
			}
		})
	}
}

// strangers may do this with a token, if to things of their own only.
var strangers = []string{"POST /products/import", "DELETE /webhooks/{id}", "POST /webhooks/{id}/replay"}

// Where no tokens are asked for, a page of another site gets nothing changed by
// the browser of somebody who may. Its own pages do, and programs.
func TestPagesOfOtherSitesChangeNothing(t *testing.T) {
	t.Parallel()
	a := newTokenAPI(t)
	a.authOn = false
	for pattern, op := range described(t).operations {
		for site, want := range map[string]bool{"cross-site": op.method != "GET" && op.method != "HEAD", "same-origin": false} {
			if op.path == "/events" || op.path == "/products/{id}/events" { // a stream has no end
				continue
			}
			if got := a.do(t, op.method, op.target(nil), op.body(t), "Sec-Fetch-Site", site); want != (got.Code == http.StatusForbidden) {
				t.Errorf("%s, %s: %d %s", pattern, site, got.Code, got.Body)
			}
		}
	}
}

// files are served whatever their query is: it tells their versions apart.
var files = []string{"/", "/console/{file}", "/openapi.yaml", "/media/products/{product}/{file}"}

// A parameter that is not known is refused by every operation, before anything
// is done.
func TestUnknownQueryParametersAreRefused(t *testing.T) {
	t.Parallel()
	a := newTokenAPI(t)
	for pattern, op := range described(t).operations {
		if slices.Contains(files, op.path) {
			continue
		}
		if got := a.do(t, op.method, op.target(nil)+"?colour=red", op.body(t), "Authorization", a.admin); got.Code != http.StatusBadRequest {
			t.Errorf("%s: %d %s", pattern, got.Code, got.Body)
		}
	}
}

// isOpen says whether an operation needs no token.
func (op *documentedOperation) isOpen() bool { return op.Security != nil && len(*op.Security) == 0 }

// tokenAPI is a server that asks for tokens, with product 1 of user 1.
type tokenAPI struct {
	*api
	files           *fileBlobs
	stranger, admin string // values of Authorization
}

func newTokenAPI(t *testing.T) tokenAPI {
	t.Helper()
	a := newAPI(t)
	files, err := newFileBlobs(t.TempDir(), "http://127.0.0.1")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { files.Close() })
	a.media, a.authOn = files.serve, true
	a.handler = a.routes()
	other := addUser(t, a.store)
	out := tokenAPI{a, files, tokenOf(t, a, caller{other, false}), tokenOf(t, a, caller{other, true})}
	if got := out.do(t, "POST", "/products", shoe, "Authorization", out.admin); got.Code != 201 {
		t.Fatalf("POST /products: %d %s", got.Code, got.Body)
	}
	return out
}

// target is the operation's path, with values for its parameters in place of
// the document's examples.
func (op *documentedOperation) target(values map[string]string) string {
	target := op.path
	for _, p := range op.parameters() {
		value, ok := values[p.Name]
		if !ok {
			value = exampleOf(p)
		}
		target = strings.ReplaceAll(target, "{"+p.Name+"}", value)
	}
	return target
}

// exampleOf is the document's example of a parameter.
func exampleOf(p *openapi3.Parameter) string {
	for _, example := range p.Examples {
		return fmt.Sprint(example.Value.Value)
	}
	return fmt.Sprint(p.Example)
}

// body is the document's example of a request body, or "".
func (op *documentedOperation) body(t *testing.T) string {
	t.Helper()
	if op.RequestBody == nil {
		return ""
	}
	if !op.takesJSON() {
		return fmt.Sprint(op.RequestBody.Value.Content[string(ndjsonRows)].Example)
	}
	for _, example := range op.RequestBody.Value.Content["application/json"].Examples {
		body, err := json.Marshal(example.Value.Value)
		if err != nil {
			t.Fatal(err)
		}
		return string(body)
	}
	t.Fatalf("%s has no example", op.pattern())
	return ""
}

// takesJSON says whether the operation's body is one JSON value.
func (op *documentedOperation) takesJSON() bool {
	return op.RequestBody != nil && op.RequestBody.Value.Content["application/json"] != nil
}

func malformed(t *testing.T, a tokenAPI, op *documentedOperation) answer {
	if op.takesJSON() {
		return a.do(t, op.method, op.target(nil), "{", "Authorization", a.admin)
	}
	return a.do(t, op.method, op.target(nil)+"?colour=red", "", "Authorization", a.admin)
}

func withoutToken(t *testing.T, a tokenAPI, op *documentedOperation) answer {
	return a.do(t, op.method, op.target(nil), op.body(t), "Authorization", "Bearer pms_x")
}

func asStranger(t *testing.T, a tokenAPI, op *documentedOperation) answer {
	return a.do(t, op.method, op.target(nil), op.body(t), "Authorization", a.stranger)
}

func ofNothing(t *testing.T, a tokenAPI, op *documentedOperation) answer {
	target := op.target(map[string]string{"id": "999999", "profile": "nothing", "file": "nothing.js"})
	return a.do(t, op.method, target, op.body(t), "Authorization", a.admin)
}

func ofAnotherVersion(t *testing.T, a tokenAPI, op *documentedOperation) answer {
	return a.do(t, op.method, op.target(nil), op.body(t), "Authorization", a.admin, "If-Match", `"999"`)
}

func tooLarge(t *testing.T, a tokenAPI, op *documentedOperation) answer {
	return a.do(t, op.method, op.target(nil), op.body(t)+strings.Repeat(" ", maxBody), "Authorization", a.admin)
}

func ofAnotherType(t *testing.T, a tokenAPI, op *documentedOperation) answer {
	return a.do(t, op.method, op.target(nil), op.body(t), "Authorization", a.admin, "Content-Type", "text/plain")
}

// withWrongValue sends null for a field that must not be null, or a number that
// is below the least for the first parameter that has one.
func withWrongValue(t *testing.T, a tokenAPI, op *documentedOperation) answer {
	if op.RequestBody != nil {
		field := "product_name"
		if schema := op.RequestBody.Value.Content["application/json"].Schema.Value; schema.Properties[field] == nil {
			field = schema.Required[0]
		}
		return a.do(t, op.method, op.target(nil), fmt.Sprintf(`{%q:null}`, field), "Authorization", a.admin)
	}
	for _, p := range op.parameters() {
		if p.In == "query" && p.Schema.Value.Min != nil {
			return a.do(t, op.method, op.target(nil)+"?"+p.Name+"=0", "", "Authorization", a.admin)
		}
	}
	t.Fatalf("%s has no parameter with a least value", op.pattern())
	return answer{}
}

// tooOften sends requests until the token has none left, and then the operation's;
// all over again if a slow machine has given it one back meanwhile.
func tooOften(t *testing.T, a tokenAPI, op *documentedOperation) (got answer) {
	a.limits.set(limitSettings{RateLimit: 1})
	eventually(t, "the token has sent too many requests", func() bool {
		for a.do(t, "GET", "/products", "", "Authorization", a.admin).Code != http.StatusTooManyRequests {
		}
		got = a.do(t, op.method, op.target(nil), op.body(t), "Authorization", a.admin)
		return got.Code == http.StatusTooManyRequests
	})
	return got
}

func withAdminsToken(t *testing.T, a tokenAPI, op *documentedOperation) answer {
	return a.do(t, op.method, op.target(nil), op.body(t), "Authorization", a.admin)
}

// breakTokens makes the look at a caller's token fail as nobody foresaw.
func breakTokens(t *testing.T, a tokenAPI) {
	t.Helper()
	if _, err := a.store.Exec(t.Context(), `ALTER TABLE tokens RENAME COLUMN user_id TO other`); err != nil {
		t.Fatal(err)
	}
	a.server.tokens.known.Clear()
}

func takeDatabaseAway(t *testing.T, a tokenAPI) {
	a.store = storeAway(t)
	a.parts = []part{{"store", true, a.store.Ping}}
	a.server.tokens.known.Clear()
}

// The program takes every query parameter as the document's example has it.
func TestEveryDocumentedParameterIsTaken(t *testing.T) {
	t.Parallel()
	a := newTokenAPI(t)
	for pattern, op := range described(t).operations {
		for _, p := range op.parameters() {
			if p.In != "query" || p.Example == nil || op.path == "/events" { // a cursor is opaque: it has none; a stream has no end
				continue
			}
			query := url.Values{p.Name: {exampleOf(p)}}.Encode()
			if got := a.do(t, op.method, op.target(nil)+"?"+query, "", "Authorization", a.admin); got.Code >= 400 {
				t.Errorf("%s with %s: %d %s", pattern, query, got.Code, got.Body)
			}
		}
	}
}

// A stored image is served as the document has it: whole, in part, by
// conditions, and refused as everything else is.
func TestStoredImagesAreServedAsDocumented(t *testing.T) {
	t.Parallel()
	a := newTokenAPI(t)
	const key = "products/42/7-0123456789abcdef.jpg"
	if err := a.files.Put(t.Context(), key, jpegPhoto(t, 10, 10)); err != nil {
		t.Fatal(err)
	}
	tag := `"7-0123456789abcdef.jpg"`
	for name, c := range map[string]struct {
		status int
		header []string
	}{
		"whole":                  {200, nil},
		"in part":                {206, []string{"Range", "bytes=0-9"}},
		"still the same":         {304, []string{"If-None-Match", tag}},
		"no such part":           {416, []string{"Range", "bytes=999999-"}},
		"on another's condition": {412, []string{"If-Match", `"x"`}},
	} {
		t.Run(name, func(t *testing.T) {
			got := a.do(t, "GET", mediaPrefix+key, "", c.header...)
			if got.Code != c.status || c.status >= 400 && got.json["status"] != float64(c.status) {
				t.Errorf("status %d, headers %v: %.200q", got.Code, got.Header(), got.Body)
			}
		})
	}
}

func TestProfilesOverHTTP(t *testing.T) {
	t.Parallel()
	a := newTokenAPI(t)
	if list := a.do(t, "GET", "/debug/pprof/", "", "Authorization", a.admin); list.Code != 200 || list.json["heap"] == nil {
		t.Errorf("the list of profiles: %d %s", list.Code, list.Body)
	}
	heap := a.do(t, "GET", "/debug/pprof/heap", "", "Authorization", a.admin)
	if heap.Code != 200 || !strings.HasPrefix(heap.Body.String(), "\x1f\x8b") {
		t.Errorf("the heap's profile: %d, it begins with %.10q", heap.Code, heap.Body)
	}
	// Of two traces at once the second is refused; the end of the server ends
	// the first before its time.
	first := make(chan int, 2)
	for range 2 {
		go func() {
			first <- a.do(t, "GET", "/debug/pprof/trace?seconds=50", "", "Authorization", a.admin).Code
		}()
	}
	if code := <-first; code != http.StatusConflict {
		t.Errorf("of two traces at once, one is answered with %d", code)
	}
	close(a.stopping)
	if code := <-first; code != http.StatusOK {
		t.Errorf("the other one is answered with %d", code)
	}
}
