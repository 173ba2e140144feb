package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"mime"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"unicode/utf8"
	"unsafe"

	"github.com/VictoriaMetrics/metrics"
)

// maxBody is the largest request body, in bytes.
const maxBody = 1 << 20

// requestTimeout bounds the work for one request, so that a database that hangs
// ends in a 503 rather than in a client that waits.
const requestTimeout = 10 * time.Second

// server is the HTTP side of the program.
type server struct {
	store       *store
	products    productReader // the cache, or what it would ask
	encoder     encoder
	wake        func()                  // images are due
	invalidate  func(id, version int64) // a product has changed
	deadChanged func()                  // dead letters were replayed or discarded
	media       handler                 // serves stored objects; nil if S3 does
	parts       []part                  // what readiness depends on
	checkup     checkup                 // of parts
	console     console
	monitor     *monitor
	feed        *eventFeed
	authOn      bool
	tokens      tokenCache
	limits      requestLimits
	patience    time.Duration // with the clients of imports and exports
	log         *slog.Logger
	inFlight    sync.Map      // Idempotency-Keys of requests in work
	stopping    chan struct{} // closed when the server is to end
	draining    atomic.Bool
}

// handler answers a request or returns an error, which route renders.
type handler func(w http.ResponseWriter, r *http.Request) error

// routes is the table of contents of the API.
func (s *server) routes() http.Handler {
	mux := http.NewServeMux()
	s.route(mux, "POST /products", anyToken, noQuery(s.createProduct))
	s.route(mux, "GET /products/{id}", anyToken, noQuery(s.getProduct))
	s.route(mux, "GET /products", anyToken, s.listProducts)
	s.route(mux, "PATCH /products/{id}", anyToken, noQuery(s.patchProduct))
	s.route(mux, "PUT /products/{id}", anyToken, noQuery(s.putProduct))
	s.route(mux, "DELETE /products/{id}", anyToken, noQuery(withID(s.deleteProduct)))
	s.route(mux, "GET /products/{id}/events", anyToken, noQuery(s.productEvents))
	s.route(mux, "GET /events", anyToken, s.events)
	s.route(mux, "POST /webhooks", anyToken, noQuery(s.createWebhook))
	s.route(mux, "GET /webhooks", anyToken, noQuery(s.listWebhooks))
	s.route(mux, "GET /webhooks/{id}", anyToken, noQuery(withID(s.getWebhook)))
	s.route(mux, "DELETE /webhooks/{id}", anyToken, noQuery(withID(s.deleteWebhook)))
	s.route(mux, "POST /webhooks/{id}/replay", anyToken, noQuery(withID(s.replayWebhook)))
	s.route(mux, "POST /products/{id}/images/reprocess", anyToken, noQuery(withID(s.reprocessImages)))
	s.route(mux, "POST /products/import", anyToken, noQuery(s.importProducts))
	s.route(mux, "GET /products/export", anyToken, s.exportProducts)

	s.route(mux, "GET /dead-letters", adminToken, s.listDeadLetters)
	s.route(mux, "GET /dead-letters/{id}", adminToken, noQuery(withID(s.getDeadLetter)))
	s.route(mux, "POST /dead-letters/{id}/replay", adminToken, noQuery(withID(s.replayDeadLetter)))
	s.route(mux, "POST /dead-letters/replay", adminToken, s.replayDeadLetters)
	s.route(mux, "DELETE /dead-letters/{id}", adminToken, noQuery(withID(s.discardDeadLetter)))

	s.route(mux, "GET /{$}", noToken, s.console.page)
	s.route(mux, "GET /console/{file}", noToken, s.console.file)
	s.route(mux, "GET /overview", adminToken, noQuery(s.overview))
	s.route(mux, "GET /openapi.yaml", noToken, s.apiDescription)
	if s.media != nil {
		s.route(mux, "GET /media/{key...}", noToken, s.media)
	}
	s.operationRoutes(mux)
	return s.observe(mux)
}

// workerRoutes are what a worker answers.
func (s *server) workerRoutes() http.Handler {
	mux := http.NewServeMux()
	s.operationRoutes(mux)
	return s.observe(mux)
}

// operationRoutes are for the machines and people that run the program.
func (s *server) operationRoutes(mux *http.ServeMux) {
	s.route(mux, "GET /healthz", noToken, noQuery(s.healthz))
	s.route(mux, "GET /readyz", noToken, noQuery(s.readyz))
	s.route(mux, "GET /metrics", adminToken, noQuery(s.metrics))
	s.route(mux, "GET /debug/pprof/{$}", adminToken, noQuery(s.listProfiles))
	s.route(mux, "GET /debug/pprof/{profile}", adminToken, s.profile)
}

// noQuery refuses every query parameter. Routes that have some read them with
// readQuery; only those that serve files ignore a query.
func noQuery(h handler) handler {
	return func(w http.ResponseWriter, r *http.Request) error {
		if r.URL.RawQuery != "" {
			if _, err := readQuery(r.URL.RawQuery); err != nil {
				return err
			}
		}
		return h(w, r)
	}
}

// withID makes a handler of one that is about the thing whose id is in the path,
// and gives it requestTimeout.
func withID(h func(ctx context.Context, w http.ResponseWriter, r *http.Request, id int64) error) handler {
	return func(w http.ResponseWriter, r *http.Request) error {
		id, err := pathID(r)
		if err != nil {
			return err
		}
		ctx, cancel := context.WithTimeout(r.Context(), requestTimeout)
		defer cancel()
		return h(ctx, w, r, id)
	}
}

// createProduct answers as soon as the product and its queued images are
// committed. Nothing else is waited for.
func (s *server) createProduct(w http.ResponseWriter, r *http.Request) error {
	body, err := readBody(w, r, "application/json")
	if err != nil {
		return err
	}
	p, err := readNewProduct(body)
	if err != nil {
		return s.alsoUnknownUser(w, r, p.UserID, err)
	}
	if err := mayWrite(w, p.UserID); err != nil {
		return err
	}
	once, release, err := s.idempotency(r, p.UserID, body)
	if err != nil {
		return err
	}
	defer release()
	ctx, cancel := context.WithTimeout(r.Context(), requestTimeout)
	defer cancel()
	p, err = s.store.CreateProduct(ctx, p, originOf(w), once)
	if err != nil {
		return err
	}
	doc := s.encoder.product(p)
	if once != nil && once.Answer != nil {
		doc = document{ID: once.ProductID, Version: 1, Body: once.Answer}
	}
	s.invalidate(doc.ID, 1)
	s.wake()
	w.Header().Set("Location", "/products/"+strconv.FormatInt(doc.ID, 10))
	writeDocument(w, http.StatusCreated, doc)
	return nil
}

// alsoUnknownUser adds to what is wrong with a product that its user is not there,
// since a client is to read of all its mistakes at once.
func (s *server) alsoUnknownUser(w http.ResponseWriter, r *http.Request, user int64, err error) error {
	invalid, ok := errors.AsType[invalidInput](err)
	if !ok || user <= 0 || mayWrite(w, user) != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(r.Context(), requestTimeout)
	defer cancel()
	if known, err := s.store.HasUser(ctx, user); known || err != nil {
		return invalid
	}
	return append(invalid, unknownUser)
}

// maxKeyLength is that of an Idempotency-Key.
const maxKeyLength = 255

// idempotency reads the header Idempotency-Key. release is to be called when
// the request is over: until then a second one with its key gets a 409.
func (s *server) idempotency(r *http.Request, user int64, body []byte) (once *idempotency, release func(), err error) {
	key, release, err := s.holdKey(r, strconv.FormatInt(user, 10))
	if err != nil || key == "" {
		return nil, release, err
	}
	fingerprint := sha256.Sum256(body)
	return &idempotency{
		Key: key, Fingerprint: fingerprint[:],
		Render: func(p Product) []byte { return s.encoder.product(p).Body },
	}, release, nil
}

// holdKey answers the request's Idempotency-Key, if it has one, and keeps it from
// other requests of the same scope until release is called.
func (s *server) holdKey(r *http.Request, scope string) (key string, release func(), err error) {
	keys, given := r.Header["Idempotency-Key"]
	if !given {
		return "", func() {}, nil
	}
	if len(keys) != 1 || !isPrintable(keys[0], maxKeyLength) {
		return "", nil, &httpError{http.StatusBadRequest, fmt.Sprintf("Idempotency-Key must be one key of 1 to %d printable ASCII characters", maxKeyLength)}
	}
	held := scope + " " + keys[0]
	if _, busy := s.inFlight.LoadOrStore(held, true); busy {
		return "", nil, &httpError{http.StatusConflict, "a request with this Idempotency-Key is still in work"}
	}
	return keys[0], func() { s.inFlight.Delete(held) }, nil
}

func (s *server) getProduct(w http.ResponseWriter, r *http.Request) error {
	id, err := pathID(r)
	if err != nil {
		return err
	}
	doc, err := s.products.Product(r.Context(), id)
	if err != nil {
		return err
	}
	header := w.Header()
	header["Cache-Control"] = headerRevalidate
	header["Cache-Status"] = headerMiss
	if doc.Cached {
		header["Cache-Status"] = headerHit
	}
	if wanted := r.Header["If-None-Match"]; wanted != nil && etagMatches(wanted, doc.Version, true) {
		header["Etag"], _ = documentHeader(doc)
		w.WriteHeader(http.StatusNotModified)
		return nil
	}
	writeDocument(w, http.StatusOK, doc)
	return nil
}

func (s *server) listProducts(w http.ResponseWriter, r *http.Request) error {
	filter, err := readFilter(r.URL.RawQuery)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(r.Context(), requestTimeout)
	defer cancel()
	size := filter.Limit
	filter.Limit++ // one more tells whether there is a next page
	products, err := s.store.Products(ctx, filter)
	if err != nil {
		return err
	}
	return writeList(w, r, products, size, func(p Product) []byte { return s.encoder.product(p).Body }, func(p Product) *cursor { return cursorAfter(p, filter.Sort) })
}

func (s *server) patchProduct(w http.ResponseWriter, r *http.Request) error {
	return s.updateProduct(w, r, false, "application/merge-patch+json", "application/json")
}

func (s *server) putProduct(w http.ResponseWriter, r *http.Request) error {
	return s.updateProduct(w, r, true, "application/json")
}

// updateProduct sets the fields in the body; replace resets the others.
func (s *server) updateProduct(w http.ResponseWriter, r *http.Request, replace bool, types ...string) error {
	id, err := pathID(r)
	if err != nil {
		return err
	}
	body, err := readBody(w, r, types...)
	if err != nil {
		return err
	}
	in, err := readFields(body, "product_name", "product_description", "product_price", "product_images")
	if err != nil {
		return err
	}
	if replace {
		in.require("product_name", "product_price")
	}
	if in.apply(new(Product)); in.err() != nil {
		return in.err()
	}
	ctx, cancel := context.WithTimeout(r.Context(), requestTimeout)
	defer cancel()
	var begun bool
	p, err := s.store.UpdateProduct(ctx, id, originOf(w), noting(&begun, allow(w, r)), func(p *Product) {
		if replace {
			p.Description, p.Images = "", nil
		}
		in.apply(p)
	})
	if err != nil {
		return s.afterLostWrite(ctx, id, begun, err)
	}
	s.invalidate(p.ID, p.Version)
	s.wake()
	writeDocument(w, http.StatusOK, s.encoder.product(p))
	return nil
}

func (s *server) deleteProduct(ctx context.Context, w http.ResponseWriter, r *http.Request, id int64) error {
	var begun bool
	if err := s.store.DeleteProduct(ctx, id, noting(&begun, allow(w, r))); err != nil {
		return s.afterLostWrite(ctx, id, begun, err)
	}
	s.invalidate(id, tombstone)
	w.WriteHeader(http.StatusNoContent)
	return nil
}

// noting notes that a product is there and may be changed.
func noting(begun *bool, may func(Product) error) func(Product) error {
	return func(p Product) error {
		err := may(p)
		*begun = err == nil
		return err
	}
}

// afterLostWrite tells the caches what came of a write that failed, if it had
// begun: see versionsNow. It answers the write's own error.
func (s *server) afterLostWrite(ctx context.Context, id int64, begun bool, err error) error {
	if begun {
		tell(s.store.versionsNow(ctx, id), s.invalidate)
	}
	return err
}

// allow is the condition on which a request may change a product: that it is
// the caller's, and still in the version that If-Match names.
func allow(w http.ResponseWriter, r *http.Request) func(Product) error {
	return func(p Product) error {
		if err := mayWrite(w, p.UserID); err != nil {
			return err
		}
		if wanted := r.Header["If-Match"]; wanted != nil && !etagMatches(wanted, p.Version, false) {
			return errStale
		}
		return nil
	}
}

// etag is a product's version as an entity tag (RFC 9110, section 8.8.3).
func etag(version int64) string { return string(appendETag(nil, version)) }

func appendETag(text []byte, version int64) []byte {
	return append(strconv.AppendInt(append(text, '"'), version, 10), '"')
}

// etagMatches says whether the lines of an If-Match or If-None-Match header
// name the version. A weak tag matches by weak comparison only.
func etagMatches(lines []string, version int64, weak bool) bool {
	current := etag(version)
	for _, line := range lines {
		for tag := range strings.SplitSeq(line, ",") {
			tag = strings.TrimSpace(tag)
			if tag == "*" || tag == current || weak && tag == "W/"+current {
				return true
			}
		}
	}
	return false
}

// pathID reads the id in a path. What is no id is the id of nothing.
func pathID(r *http.Request) (int64, error) {
	text := r.PathValue("id")
	id, err := strconv.ParseInt(text, 10, 64)
	if err != nil || id <= 0 || text[0] == '+' || text[0] == '0' {
		return 0, errNotFound
	}
	return id, nil
}

// bodyType answers which of the given types the body has. It must be in UTF-8
// and not compressed.
func bodyType(w http.ResponseWriter, r *http.Request, types ...string) (string, error) {
	contentType, params, err := mime.ParseMediaType(r.Header.Get("Content-Type"))
	if charset, ok := params["charset"]; err != nil || !slices.Contains(types, contentType) || ok && !strings.EqualFold(charset, "utf-8") {
		if r.Method == http.MethodPatch {
			w.Header().Set("Accept-Patch", strings.Join(types, ", "))
		}
		return "", &httpError{http.StatusUnsupportedMediaType, "Content-Type must be " + strings.Join(types, " or ")}
	}
	if encoding := r.Header.Get("Content-Encoding"); encoding != "" && !strings.EqualFold(encoding, "identity") {
		w.Header().Set("Accept-Encoding", "identity") // RFC 9110, section 15.5.16
		return "", &httpError{http.StatusUnsupportedMediaType, "the body must not be compressed"}
	}
	return contentType, nil
}

// readBody reads a body of one of the given types.
func readBody(w http.ResponseWriter, r *http.Request, types ...string) ([]byte, error) {
	if _, err := bodyType(w, r, types...); err != nil {
		return nil, err
	}
	if r.ContentLength > maxBody {
		return nil, errBodyTooLarge
	}
	rec := w.(*recorder)
	if err := rec.enter(&rec.limits.reading); err != nil {
		return nil, err
	}
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxBody))
	if _, tooLarge := errors.AsType[*http.MaxBytesError](err); tooLarge {
		return nil, errBodyTooLarge
	}
	if err != nil {
		return nil, errBodyUnreadable
	}
	return body, rec.enter(&rec.limits.working)
}

var (
	errBodyTooLarge   = &httpError{http.StatusRequestEntityTooLarge, fmt.Sprintf("the body must have at most %d bytes", maxBody)}
	errBodyUnreadable = &httpError{http.StatusBadRequest, "the body could not be read"}
)

// The limits of the parameter limit.
const (
	defaultLimit = 50
	maxLimit     = 200
)

// readQuery takes a query apart. A parameter that the route does not know is an
// error, and so is one that stands twice.
func readQuery(raw string, known ...string) (url.Values, error) {
	query, err := url.ParseQuery(raw)
	if err != nil {
		return nil, &httpError{http.StatusBadRequest, "the query is malformed"}
	}
	for _, name := range slices.Sorted(maps.Keys(query)) { // so that the same mistake is named each time
		if !slices.Contains(known, name) {
			return nil, &httpError{http.StatusBadRequest, fmt.Sprintf("unknown query parameter %q", name)}
		}
		if len(query[name]) > 1 {
			return nil, &httpError{http.StatusBadRequest, fmt.Sprintf("query parameter %q stands twice", name)}
		}
	}
	return query, nil
}

// readFilter reads the query of GET /products.
func readFilter(raw string) (productFilter, error) {
	f := productFilter{Sort: defaultSort, Limit: defaultLimit}
	query, err := readQuery(raw, "user_id", "name", "min_price", "max_price", "sort", "limit", "cursor")
	if err != nil {
		return f, err
	}
	var wrong invalidInput
	f.readSelection(query, &wrong)
	wrong.check(query, "limit", func(v string) (err error) { f.Limit, err = readNumber(v, maxLimit); return err })
	wrong.check(query, "sort", func(v string) error {
		if !sortOrder(v).valid() {
			return errors.New(`must be id, product_price, created_at or product_name, with "-" before it for descending`)
		}
		f.Sort = sortOrder(v)
		return nil
	})
	wrong.check(query, "cursor", func(v string) (err error) { f.After, err = parseCursor(v, f.Sort); return err })
	return f, wrong.err()
}

// readSelection reads the parameters that say which products are meant.
func (f *productFilter) readSelection(query url.Values, wrong *invalidInput) {
	wrong.check(query, "user_id", func(v string) (err error) { f.UserID, err = readID(v); return err })
	wrong.check(query, "name", func(v string) (err error) { f.Name, err = v, checkText(v); return err })
	wrong.check(query, "min_price", func(v string) (err error) { f.MinPrice, err = readPrice(v); return err })
	wrong.check(query, "max_price", func(v string) (err error) { f.MaxPrice, err = readPrice(v); return err })
}

func readID(v string) (*int64, error) {
	id, err := strconv.ParseInt(v, 10, 64)
	if err != nil || id <= 0 {
		return nil, errors.New("must be a whole number above 0")
	}
	return &id, nil
}

func readPrice(v string) (*Price, error) {
	price, err := parsePrice(v)
	return &price, err
}

func readNumber(v string, most int) (int, error) {
	n, err := strconv.Atoi(v)
	if err != nil || n < 1 || n > most {
		return 0, fmt.Errorf("must be a whole number from 1 to %d", most)
	}
	return n, nil
}

func checkText(v string) error {
	if !utf8.ValidString(v) || strings.Contains(v, "\x00") {
		return errors.New("must be UTF-8 text without the character NUL")
	}
	return nil
}

// The header values that every answer of a kind has. The slices are shared by
// all responses, and nothing changes them.
var (
	headerJSON       = []string{"application/json"}
	headerRevalidate = []string{"private, no-cache"}
	headerHit        = []string{"pms; hit"}
	headerMiss       = []string{"pms; fwd=miss"}
	headerNosniff    = []string{"nosniff"}
	headerNoContent  = []string{"default-src 'none'; frame-ancestors 'none'"} // of an answer that is no page
)

// writeDocument answers with a product.
func writeDocument(w http.ResponseWriter, status int, doc document) {
	header := w.Header()
	header["Content-Type"] = headerJSON
	header["Etag"], header["Content-Length"] = documentHeader(doc)
	w.WriteHeader(status)
	w.Write(doc.Body)
}

// documentHeader makes the two header values that each document has of its own.
// Every read passes here, so it allocates once: the strings are views of text,
// which is not written to again.
func documentHeader(doc document) (etag, length []string) {
	const room = 2 * len("-9223372036854775808") // and the quotes, since a length has no such size
	made := new(struct {
		values [2]string
		text   [room]byte
	})
	text := appendETag(made.text[:0], doc.Version)
	end := len(text)
	text = strconv.AppendInt(text, int64(len(doc.Body)), 10)
	both := unsafe.String(unsafe.SliceData(text), len(text))
	made.values = [2]string{both[:end], both[end:]}
	return made.values[:1:1], made.values[1:]
}

func writeJSON(w http.ResponseWriter, status int, v any) { writeBody(w, status, encodeJSON(v)) }

// writeBody answers with what is JSON already.
func writeBody(w http.ResponseWriter, status int, body []byte) {
	header := w.Header()
	header["Content-Type"] = headerJSON
	header["Content-Length"] = []string{strconv.Itoa(len(body))}
	w.WriteHeader(status)
	w.Write(body)
}

// maxPage is about how many bytes a page of a list has. A client that reads none of it
// keeps it in memory until the write timeout, and so may maxSending at once.
const maxPage = 2 << 20

// smallPage is what a page may have that takes no place while it is sent.
const smallPage = 256 << 10

// writeList answers with one page of a list, and with where the next one is, after an
// item. The page has at most limit of the items; those beyond it tell that there are more.
func writeList[T any](w http.ResponseWriter, r *http.Request, items []T, limit int, encode func(T) []byte, after func(T) *cursor) error {
	n, body := 0, []byte(`{"items":[`)
	for ; n < min(limit, len(items)) && len(body) < maxPage; n++ {
		if n > 0 {
			body = append(body, ',')
		}
		body = append(body, bytes.TrimSpace(encode(items[n]))...)
	}
	if rec := w.(*recorder); len(body) > smallPage {
		if err := rec.enter(&rec.limits.sending); err != nil {
			return err
		}
	}
	next := "null"
	if n < len(items) {
		text := after(items[n-1]).String()
		next = `"` + text + `"`
		query := r.URL.Query()
		query.Set("cursor", text)
		w.Header().Set("Link", fmt.Sprintf("<%s?%s>; rel=\"next\"", r.URL.EscapedPath(), query.Encode()))
	}
	writeBody(w, http.StatusOK, append(body, `],"next_cursor":`+next+"}\n"...))
	return nil
}

func (s *server) metrics(w http.ResponseWriter, r *http.Request) error {
	w.Header().Set("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
	metrics.WritePrometheus(w, true)
	return nil
}
