package main

import (
	"bytes"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/getkin/kin-openapi/openapi3"
	"github.com/getkin/kin-openapi/openapi3filter"
	"github.com/getkin/kin-openapi/routers"
	"github.com/santhosh-tekuri/jsonschema/v6"
)

// documentedAPI is openapi.yaml, ready to hold exchanges against it, and what
// the tests have seen of it.
type documentedAPI struct {
	spec       *openapi3.T
	mux        *http.ServeMux // finds an operation's pattern, as "GET /products/{id}"
	operations map[string]*documentedOperation
	compiled   sync.Map // *openapi3.Schema to what compile makes of it
	mu         sync.Mutex
	seen       map[string]bool // "GET /products/{id} 200"
}

type documentedOperation struct {
	*openapi3.Operation
	method, path string
	item         *openapi3.PathItem
}

func (op *documentedOperation) pattern() string { return op.method + " " + op.path }

// parameters are those of the operation and those of its path.
func (op *documentedOperation) parameters() (all []*openapi3.Parameter) {
	for _, list := range []openapi3.Parameters{op.item.Parameters, op.Parameters} {
		for _, p := range list {
			all = append(all, p.Value)
		}
	}
	return all
}

// openDocument reads the document once.
var openDocument = sync.OnceValues(func() (*documentedAPI, error) {
	for _, rows := range []string{string(ndjsonRows), "application/jsonl", string(csvRows)} { // a row is looked at by itself
		openapi3filter.RegisterBodyDecoder(rows, openapi3filter.FileBodyDecoder)
	}
	spec, err := openapi3.NewLoader().LoadFromData(apiDocument)
	if err != nil {
		return nil, fmt.Errorf("read openapi.yaml: %w", err)
	}
	if err := spec.Validate(context.Background()); err != nil {
		return nil, fmt.Errorf("openapi.yaml: %w", err)
	}
	d := &documentedAPI{spec: spec, mux: http.NewServeMux(), operations: make(map[string]*documentedOperation), seen: make(map[string]bool)}
	for path, item := range spec.Paths.Map() {
		for method, operation := range item.Operations() {
			op := &documentedOperation{operation, method, path, item}
			d.operations[op.pattern()] = op
			pattern := op.pattern()
			if strings.HasSuffix(path, "/") {
				pattern += "{$}"
			}
			d.mux.HandleFunc(pattern, func(http.ResponseWriter, *http.Request) {})
		}
	}
	return d, nil
})

func described(t testing.TB) *documentedAPI {
	t.Helper()
	d, err := openDocument()
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// httpExchange is a request and its answer, with their bodies.
type httpExchange struct {
	request  *http.Request
	sent     []byte
	status   int
	header   http.Header
	received []byte
}

// checkExchange says what in an exchange is not as openapi.yaml has it. The
// helpers through which tests speak HTTP pass every exchange here.
func checkExchange(r *http.Request, sent []byte, status int, header http.Header, received []byte) error {
	d, err := openDocument()
	if err != nil {
		return err
	}
	x := httpExchange{r, sent, status, header, received}
	op := d.find(r)
	if op == nil {
		err = d.checkUnrouted(x)
	} else if err = d.checkAnswer(op, x); err == nil {
		err = d.checkRequest(op, x)
	}
	if err != nil {
		return fmt.Errorf("%s %s is answered with %d, and not as openapi.yaml has it: %w", r.Method, r.URL, status, err)
	}
	return nil
}

// find finds the operation of a request, or nil.
func (d *documentedAPI) find(r *http.Request) *documentedOperation {
	_, pattern := d.mux.Handler(&http.Request{Method: r.Method, URL: r.URL})
	method, path, _ := strings.Cut(strings.TrimSuffix(pattern, "{$}"), " ")
	return d.operations[method+" "+path]
}

// checkUnrouted checks the answer to a request that the document does not have.
func (d *documentedAPI) checkUnrouted(x httpExchange) error {
	var allowed []string
	for _, method := range []string{"DELETE", "GET", "HEAD", "PATCH", "POST", "PUT"} {
		if d.find(&http.Request{Method: method, URL: x.request.URL}) != nil {
			allowed = append(allowed, method)
		}
	}
	want := http.StatusNotFound
	if allowed != nil {
		want = http.StatusMethodNotAllowed
	}
	if x.status != want || x.header.Get("Allow") != strings.Join(allowed, ", ") {
		return fmt.Errorf("it has the methods %v, so the status should be %d; Allow is %q", allowed, want, x.header.Get("Allow"))
	}
	return d.matches("Problem", x.received)
}

// matches checks JSON against one of the document's schemas.
func (d *documentedAPI) matches(schema string, data []byte) error {
	var value any
	if err := json.Unmarshal(data, &value); err != nil {
		return err
	}
	return d.validate(d.spec.Components.Schemas[schema].Value, value)
}

// validate checks a value against a schema, which it compiles once: kin-openapi,
// would do so for each value.
func (d *documentedAPI) validate(schema *openapi3.Schema, value any) error {
	made, _ := d.compiled.LoadOrStore(schema, sync.OnceValues(func() (*jsonschema.Schema, error) { return d.compile(schema) }))
	compiled, err := made.(func() (*jsonschema.Schema, error))()
	if err != nil {
		return err
	}
	return compiled.Validate(value)
}

// compile makes a schema a JSON Schema of its own (OpenAPI 3.1, section 4.8.24),
// together with those that it refers to.
func (d *documentedAPI) compile(schema *openapi3.Schema) (*jsonschema.Schema, error) {
	const name = "schema.json"
	whole := map[string]any{"allOf": []any{schema}, "components": map[string]any{"schemas": d.spec.Components.Schemas}}
	data, err := json.Marshal(whole)
	if err != nil {
		return nil, err
	}
	resource, err := jsonschema.UnmarshalJSON(bytes.NewReader(data))
	if err != nil {
		return nil, err
	}
	compiler := jsonschema.NewCompiler()
	compiler.AssertFormat()
	compiler.RegisterFormat(&jsonschema.Format{Name: "uri", Validate: validURL})
	if err := compiler.AddResource(name, resource); err != nil {
		return nil, err
	}
	return compiler.Compile(name)
}

// validURL takes what net/url takes: zones of IPv6 addresses too (RFC 6874).
func validURL(value any) error {
	text, _ := value.(string)
	_, err := url.Parse(text)
	return err
}

func (d *documentedAPI) checkAnswer(op *documentedOperation, x httpExchange) error {
	documented := op.Responses.Status(x.status)
	if documented == nil {
		return fmt.Errorf("%s has no such status: %s", op.pattern(), x.received)
	}
	if err := d.checkHeaders(documented.Value.Headers, x.header); err != nil {
		return err
	}
	if err := d.checkBody(op, documented.Value.Content, x); err != nil {
		return err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.seen[fmt.Sprintf("%s %d", op.pattern(), x.status)] = true
	return nil
}

// everywhere are headers of every answer, of which the document tells in its
// description or which say nothing about the service.
var everywhere = []string{"Connection", "Content-Length", "Content-Security-Policy", "Content-Type", "Date", "Traceparent", "Transfer-Encoding", "X-Content-Type-Options"}

func (d *documentedAPI) checkHeaders(documented openapi3.Headers, got http.Header) error {
	unknown := maps.Clone(got)
	for _, name := range everywhere {
		delete(unknown, name)
	}
	for name, ref := range documented {
		values := got.Values(name)
		delete(unknown, http.CanonicalHeaderKey(name))
		switch {
		case len(values) > 1 || len(values) == 0 && ref.Value.Required:
			return fmt.Errorf("the header %s has the values %q", name, values)
		case len(values) == 0:
			continue
		}
		var value any = values[0]
		if ref.Value.Schema.Value.Type.Is("integer") {
			number, err := strconv.ParseFloat(values[0], 64)
			if err != nil {
				return fmt.Errorf("the header %s: %w", name, err)
			}
			value = number
		}
		if err := d.validate(ref.Value.Schema.Value, value); err != nil {
			return fmt.Errorf("the header %s: %w", name, err)
		}
	}
	if len(unknown) > 0 {
		return fmt.Errorf("the headers %v are not documented", unknown)
	}
	return nil
}

func (d *documentedAPI) checkBody(op *documentedOperation, documented openapi3.Content, x httpExchange) error {
	if x.request.Method == http.MethodHead { // net/http drops the body, a recorder keeps it
		return nil
	}
	if len(documented) == 0 {
		if len(x.received) > 0 {
			return fmt.Errorf("there should be no body: %q", x.received)
		}
		return nil
	}
	kind, _, _ := strings.Cut(x.header.Get("Content-Type"), ";")
	media := documented[kind]
	switch {
	case media == nil:
		return fmt.Errorf("the body is %q", kind)
	case kind == string(ndjsonRows):
		return d.checkLines(op, x.received)
	case strings.HasSuffix(kind, "json"):
		var value any
		if err := json.Unmarshal(x.received, &value); err != nil {
			return err
		}
		return d.validate(media.Schema.Value, value)
	case kind == "text/event-stream":
		return d.checkEvents(op, x.received)
	}
	return nil
}

// checkLines checks NDJSON by the schema of the operation's lines.
func (d *documentedAPI) checkLines(op *documentedOperation, body []byte) error {
	schema := "NewProduct"
	if op.OperationID == "importProducts" {
		schema = "ImportLine"
	}
	for line := range bytes.Lines(body) {
		if err := d.matches(schema, line); err != nil {
			return fmt.Errorf("the line %.500q: %w", line, err)
		}
	}
	return nil
}

// checkEvents checks a stream of server-sent events: the data of an event
// "image" is an ImageEvent, or on the stream of all products a ProductImageEvent.
func (d *documentedAPI) checkEvents(op *documentedOperation, stream []byte) error {
	for _, event := range readEvents(string(stream)) {
		schema := strings.ToUpper(event.name[:1]) + event.name[1:] + "Event"
		if op.path == "/events" && event.name == "image" {
			schema = "ProductImageEvent"
		}
		if d.spec.Components.Schemas[schema] == nil || event.id == "" {
			return fmt.Errorf("there is no such event: %+v", event)
		}
		if err := d.matches(schema, []byte(event.data)); err != nil {
			return fmt.Errorf("the event %+v: %w", event, err)
		}
	}
	return nil
}

// beyondSchema are the reasons for which a request is refused that JSON Schema
// cannot tell; the document tells them in words.
var beyondSchema = regexp.MustCompile(`there is no such user|must have at most two decimals|is not a cursor of this list|` +
	`the character NUL|must be a number or a decimal string|must not contain a user name|at most 2048 bytes|` +
	`must be the host of a URL|must be a time as in RFC 3339|the base64 of|webhooks already`)

// checkRequest checks that a request which was accepted is one that the
// document allows, and that one refused for its values is not.
func (d *documentedAPI) checkRequest(op *documentedOperation, x httpExchange) error {
	accepted, refused := x.status < 400, x.status == http.StatusUnprocessableEntity
	if !accepted && !refused {
		return nil
	}
	err := d.validRequest(op, x)
	if accepted && err != nil {
		return fmt.Errorf("the request was accepted: %w", err)
	}
	var p problem
	if refused && err == nil && json.Unmarshal(x.received, &p) == nil && len(p.Errors) > 0 &&
		!slices.ContainsFunc(p.Errors, func(e fieldError) bool { return beyondSchema.MatchString(e.Detail) }) {
		return fmt.Errorf("the request is allowed by the document: %s is refused with %v", x.sent, p.Errors)
	}
	return nil
}

func (d *documentedAPI) validRequest(op *documentedOperation, x httpExchange) error {
	r := x.request.Clone(context.Background())
	r.Body = io.NopCloser(bytes.NewReader(x.sent))
	for name := range r.URL.Query() {
		if !slices.ContainsFunc(op.parameters(), func(p *openapi3.Parameter) bool { return p.In == "query" && p.Name == name }) {
			return fmt.Errorf("the query parameter %q is not documented", name)
		}
	}
	params := make(map[string]string)
	d.mux.ServeHTTP(httptest.NewRecorder(), r) // sets the path's values
	for _, p := range op.parameters() {
		if p.In == "path" {
			params[p.Name] = r.PathValue(p.Name)
		}
	}
	return openapi3filter.ValidateRequest(r.Context(), &openapi3filter.RequestValidationInput{
		Request: r, PathParams: params,
		Route:   &routers.Route{Spec: d.spec, Path: op.path, PathItem: op.item, Method: op.method, Operation: op.Operation},
		Options: &openapi3filter.Options{AuthenticationFunc: openapi3filter.NoopAuthenticationFunc, SkipSettingDefaults: true},
	})
}

// neverSeen are answers in the document that no test provokes, with the reason.
var neverSeen = map[string]string{
	"GET /media/products/{product}/{file} 500": "needs a file that may not be read, and the tests may run as root",
}

// unseenAnswers fails a run of all tests after which some documented answer
// was never seen. code is that of the tests.
func unseenAnswers(code int) int {
	d, err := openDocument()
	if code != 0 || err != nil || !allTestsRan() {
		return code
	}
	for pattern, op := range d.operations {
		for status := range op.Responses.Map() {
			answer := pattern + " " + status
			if d.seen[answer] == (neverSeen[answer] != "") {
				fmt.Fprintf(os.Stderr, "openapi.yaml has %q; seen by a test: %t, excused: %t\n", answer, d.seen[answer], !d.seen[answer])
				code = 1
			}
		}
	}
	return code
}

// allTestsRan says whether the command line left no test out.
func allTestsRan() bool {
	for _, name := range []string{"run", "skip", "list", "fuzz", "fuzzworker"} {
		if f := flag.Lookup("test." + name); f != nil && f.Value.String() != f.DefValue {
			return false
		}
	}
	return true
}

func TestTheDocumentHasEveryRoute(t *testing.T) {
	t.Parallel()
	d, a := described(t), newTokenAPI(t)
	metrics := a.do(t, "GET", "/metrics", "", "Authorization", a.admin).Body.String()
	var routes []string
	for _, match := range regexp.MustCompile(`http_requests_total\{route="([A-Z]+ [^"]+)",code="2xx"`).FindAllStringSubmatch(metrics, -1) {
		route := strings.Replace(strings.TrimSuffix(match[1], "{$}"), "/media/{key...}", "/media/products/{product}/{file}", 1)
		routes = append(routes, route)
	}
	slices.Sort(routes)
	if documented := slices.Sorted(maps.Keys(d.operations)); !slices.Equal(routes, documented) {
		t.Errorf("the program has the routes\n%q\nthe document\n%q", routes, documented)
	}
}
