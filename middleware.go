package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"regexp"
	"runtime/debug"
	"strconv"
	"strings"
	"time"

	"github.com/VictoriaMetrics/metrics"
)

// observe surrounds every request: it gives it an id, counts and logs it, and
// answers for handlers that panic and for paths that no route has.
func (s *server) observe(mux http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		start := time.Now()
		rec := &recorder{ResponseWriter: w, origin: readOrigin(r), limits: &s.limits}
		rec.setHeader(w.Header())
		defer s.finish(rec, r, start)
		mux.ServeHTTP(rec, r)
		if rec.unrouted != 0 {
			s.renderError(rec, r, &httpError{rec.unrouted, unroutedDetail(rec.unrouted, r)})
		}
	})
}

// finish runs when a request's handler has returned or panicked.
func (s *server) finish(rec *recorder, r *http.Request, start time.Time) {
	value := recover()
	if value != nil && value != http.ErrAbortHandler {
		rec.origin.on(s.log).Error("panic in a handler", "err", value, "stack", string(debug.Stack()))
		if rec.status == 0 {
			s.renderError(rec, r, errors.New("panic"))
		} else {
			value = http.ErrAbortHandler // no client may take a part for the whole
		}
	}
	rec.leave()
	duration := time.Since(start)
	if rec.route == nil {
		rec.route = unrouted
	}
	rec.route.count(rec.status, duration)
	if rec.route.watched {
		s.monitor.traffic.count(rec.status, duration)
	}
	s.logRequest(rec, r, start, duration)
	if value == http.ErrAbortHandler {
		panic(value) // an answer that is broken off: the connection has to go
	}
}

// logRequest writes the line of a request. It makes the record itself: a Logger
// would also look up the time and the line of source, which the log does not show,
// and that is a tenth of the cost.
func (s *server) logRequest(rec *recorder, r *http.Request, start time.Time, duration time.Duration) {
	level := slog.LevelInfo
	if rec.route.quiet {
		level = slog.LevelDebug
	}
	log := s.log.Handler()
	if !log.Enabled(r.Context(), level) {
		return
	}
	line := slog.NewRecord(start.Add(duration), level, "request", 0)
	line.AddAttrs(
		slog.String("request_id", rec.origin.RequestID),
		slog.String("method", r.Method),
		slog.String("path", loggedPath(r.URL.Path)),
		slog.Int("status", rec.status),
		slog.Int64("bytes", rec.bytes),
		slog.Float64("duration", duration.Seconds()),
		slog.String("remote", r.RemoteAddr),
	)
	if rec.origin.Traceparent != "" {
		line.AddAttrs(slog.String("traceparent", rec.origin.Traceparent))
	}
	_ = log.Handle(r.Context(), line) // as a Logger does, which has nobody to tell either
}

// maxLoggedPath is longer than any path that leads somewhere.
const maxLoggedPath = 256

// loggedPath is a path as the log shows it: not longer than need be, and without
// a token that a client put there by mistake.
func loggedPath(path string) string {
	path, _, found := strings.Cut(path[:min(len(path), maxLoggedPath)], tokenPrefix)
	if found {
		return path + tokenPrefix + "..."
	}
	return path
}

// recorder is the writer that every handler gets. It knows whose request it
// answers, and notes what the handler does. Until a route has been found it keeps
// the router's own plain-text errors back, for observe to render.
type recorder struct {
	http.ResponseWriter
	origin   origin
	caller   *knownCaller // nil if authentication is off, or not asked for
	ids      [1]string    // the request id, as a header has it
	route    *routeStats
	status   int
	bytes    int64
	unrouted int // the status with which the router refused the request
	limits   *requestLimits
	place    *places // what the request has of limits
}

// setHeader sets what every response has.
func (rec *recorder) setHeader(header http.Header) {
	rec.ids[0] = rec.origin.RequestID
	header["X-Request-Id"] = rec.ids[:]
	header["X-Content-Type-Options"] = headerNosniff
	header["Content-Security-Policy"] = headerNoContent
	if rec.origin.Traceparent != "" {
		header["Traceparent"] = []string{rec.origin.Traceparent}
	}
}

func (rec *recorder) WriteHeader(status int) {
	if rec.route == nil && status >= 400 && rec.unrouted == 0 {
		rec.unrouted = status
		return
	}
	if rec.status == 0 && status >= 200 {
		rec.status = status
	}
	if rec.place == &rec.limits.working {
		rec.leave() // a client that reads slowly holds up nobody else
	}
	rec.ResponseWriter.WriteHeader(status)
}

func (rec *recorder) Write(data []byte) (int, error) {
	if rec.unrouted != 0 && rec.status == 0 {
		return len(data), nil
	}
	if rec.status == 0 {
		rec.WriteHeader(http.StatusOK)
	}
	n, err := rec.ResponseWriter.Write(data)
	rec.bytes += int64(n)
	return n, err
}

// Unwrap lets http.ResponseController reach the connection.
func (rec *recorder) Unwrap() http.ResponseWriter { return rec.ResponseWriter }

func unroutedDetail(status int, r *http.Request) string {
	if status == http.StatusMethodNotAllowed {
		return fmt.Sprintf("%s is not allowed here", r.Method)
	}
	return "there is nothing at this path"
}

// route registers one route: who may call it, and how its errors are rendered.
func (s *server) route(mux *http.ServeMux, pattern string, access access, h handler) {
	stats := newRouteStats(pattern)
	mux.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) {
		rec := w.(*recorder)
		rec.route = stats
		if err := s.admit(rec, r, access, h); err != nil {
			s.renderError(w, r, err)
		}
	})
}

// admit lets the handler answer if there is a place and the caller may.
func (s *server) admit(rec *recorder, r *http.Request, access access, h handler) error {
	if place := s.placeFor(rec.route, access); place != nil {
		if err := rec.enter(place); err != nil {
			return err
		}
	}
	if err := s.authenticate(rec, r, access); err != nil {
		return err
	}
	return h(rec, r)
}

// placeFor is the place that a request takes first. Metrics have places of their
// own, so that a busy program can be watched; probes, which everybody may send,
// cost next to nothing and need none.
func (s *server) placeFor(route *routeStats, access access) *places {
	switch {
	case !route.quiet:
		return &s.limits.working
	case access == noToken:
		return nil
	}
	return &s.limits.watching
}

// routeStats are the metrics of one route.
type routeStats struct {
	quiet    bool // asked every few seconds by machines: logged at level debug
	watched  bool // part of what the overview says of requests
	statuses [6]*metrics.Counter
	duration *metrics.PrometheusHistogram
}

// durationBuckets reach from a cached read to a request that times out.
var durationBuckets = [...]float64{.0001, .00025, .0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10}

// streams are the routes whose duration tells nothing: it is the client's choice.
var streams = regexp.MustCompile(`/(events|import|export)$`)

// unrouted counts the requests that no route took.
var unrouted = newRouteStats("none")

func newRouteStats(pattern string) *routeStats {
	stats := &routeStats{
		quiet:    pattern == "GET /healthz" || pattern == "GET /readyz" || pattern == "GET /metrics",
		watched:  strings.Contains(pattern, " /products") && !streams.MatchString(pattern),
		duration: metrics.GetOrCreatePrometheusHistogramExt(fmt.Sprintf(`http_request_duration_seconds{route=%q}`, pattern), durationBuckets[:]),
	}
	for class := 1; class <= 5; class++ {
		stats.statuses[class] = metrics.GetOrCreateCounter(fmt.Sprintf(`http_requests_total{route=%q,code="%dxx"}`, pattern, class))
	}
	return stats
}

func (rs *routeStats) count(status int, duration time.Duration) {
	if class := status / 100; class >= 1 && class <= 5 {
		rs.statuses[class].Inc()
	}
	rs.duration.Update(duration.Seconds())
}

func originOf(w http.ResponseWriter) origin { return w.(*recorder).origin }

// traceparent is the header of W3C Trace Context, section 3.2: a version, the id
// of the trace, that of the caller's part in it, and flags. A later version may
// have more behind that.
var traceparent = regexp.MustCompile(`^([0-9a-f]{2})(-([0-9a-f]{32})-([0-9a-f]{16})-[0-9a-f]{2})(-.*)?$`)

// readTraceparent answers a traceparent in version 00, or "" if it is none.
func readTraceparent(header string) string {
	parts := traceparent.FindStringSubmatch(header)
	if parts == nil || parts[1] == "ff" || parts[1] == "00" && parts[5] != "" ||
		strings.Trim(parts[3], "0") == "" || strings.Trim(parts[4], "0") == "" {
		return ""
	}
	return "00" + parts[2]
}

// readOrigin takes over the client's request id if it is sane, else makes one.
func readOrigin(r *http.Request) origin {
	var from origin
	if ids := r.Header["X-Request-Id"]; len(ids) == 1 && isRequestID(ids[0]) {
		from.RequestID = ids[0]
	} else {
		from.RequestID = newRequestID()
	}
	if parents := r.Header["Traceparent"]; len(parents) == 1 {
		from.Traceparent = readTraceparent(parents[0])
	}
	return from
}

// newRequestID makes an id of 64 random bits. It is no secret.
func newRequestID() string { return strconv.FormatUint(rand.Uint64()|1<<63, 16) }

// isRequestID says whether an id is safe to log and to pass on.
func isRequestID(id string) bool {
	for i := range len(id) {
		c := id[i]
		if !('a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9' ||
			c == '-' || c == '_' || c == '.' || c == ':' || c == '/' || c == '+' || c == '=') {
			return false
		}
	}
	return id != "" && len(id) <= 128 && !strings.Contains(id, tokenPrefix)
}

// isPrintable says whether s has 1 to max bytes of printable ASCII.
func isPrintable(s string, max int) bool {
	for i := range len(s) {
		if s[i] < ' ' || s[i] > '~' {
			return false
		}
	}
	return s != "" && len(s) <= max
}

// httpError is an error with the status and detail of its answer.
type httpError struct {
	status int
	detail string
}

func (e *httpError) Error() string { return e.detail }

// problem is an error as clients read it (RFC 9457). Its type is about:blank:
// the status says all that a program needs to know.
type problem struct {
	Type      string       `json:"type"`
	Title     string       `json:"title"`
	Status    int          `json:"status"`
	Detail    string       `json:"detail"`
	RequestID string       `json:"request_id"`
	Errors    []fieldError `json:"errors,omitempty"`
}

// problemFor is the whole problem document of an error.
func problemFor(err error, from origin) *problem {
	p := problemOf(err)
	p.Type, p.Title, p.RequestID = "about:blank", http.StatusText(p.Status), from.RequestID
	return &p
}

// renderError answers with err. This is the one place where errors become
// statuses; what has none is a 500, logged and kept from the client.
func (s *server) renderError(w http.ResponseWriter, r *http.Request, err error) {
	from := originOf(w)
	p := problemFor(err, from)
	switch p.Status {
	case http.StatusInternalServerError:
		from.on(s.log).Error("request failed", "err", err)
	case http.StatusServiceUnavailable:
		w.Header().Set("Retry-After", "1")
		if s.hungUp(r) {
			w.(*recorder).status = statusHungUp
			break
		}
		from.on(s.log).Warn("request refused", "err", err)
	case http.StatusTooManyRequests:
		w.Header().Set("Retry-After", "1")
	case http.StatusUnauthorized:
		w.Header().Set("WWW-Authenticate", challenge(err))
	}
	body := encodeJSON(p)
	header := w.Header()
	header.Set("Content-Type", "application/problem+json")
	header.Set("Content-Length", strconv.Itoa(len(body)))
	if rec := w.(*recorder); rec.unrouted != 0 {
		rec.route = unrouted
	}
	w.WriteHeader(p.Status)
	w.Write(body)
}

// statusHungUp is what a request counts as that its client has left, as in nginx: it
// may interrupt anything, and is no failure of ours. The answer goes out all the same,
// to clients that have closed their own side of the connection alone.
const statusHungUp = 499

// hungUp says whether the client has left. That the server closes the connection at
// its own end looks the same.
func (s *server) hungUp(r *http.Request) bool { return r.Context().Err() != nil && !s.draining.Load() }

// challenge says what is missing (RFC 6750, section 3).
func challenge(err error) string {
	if errors.Is(err, errBadToken) {
		return `Bearer realm="pms", error="invalid_token"`
	}
	return `Bearer realm="pms"`
}

func problemOf(err error) problem {
	var plain *httpError
	var syntax *badJSON
	var invalid invalidInput
	switch {
	case errors.As(err, &plain):
		return problem{Status: plain.status, Detail: plain.detail}
	case errors.As(err, &syntax):
		return problem{Status: http.StatusBadRequest, Detail: syntax.detail, Errors: syntax.fields}
	case errors.As(err, &invalid):
		return problem{Status: http.StatusUnprocessableEntity, Detail: "some values are invalid, see errors", Errors: invalid}
	case errors.Is(err, errUnknownUser):
		return problemOf(invalidInput{unknownUser})
	case errors.Is(err, errTooManyWebhooks):
		return problemOf(invalidInput{{"url", errTooManyWebhooks.Error()}})
	case errors.Is(err, errKeyReused):
		return problem{Status: http.StatusUnprocessableEntity, Detail: "the Idempotency-Key was used with another body"}
	case errors.Is(err, errNotFound):
		return problem{Status: http.StatusNotFound, Detail: "there is no such resource"}
	case errors.Is(err, errStale):
		return problem{Status: http.StatusPreconditionFailed, Detail: "the product has changed: its version is not the one in If-Match"}
	case errors.Is(err, errUnavailable), errors.Is(err, context.DeadlineExceeded), errors.Is(err, context.Canceled):
		return problem{Status: http.StatusServiceUnavailable, Detail: "the service cannot do this right now, try again"}
	}
	return problem{Status: http.StatusInternalServerError, Detail: "something went wrong here"}
}
