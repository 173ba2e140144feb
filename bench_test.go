package main

import (
	"context"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/redis/rueidis"
)

// BenchmarkGet compares what reading one product costs by where it comes from,
// each through the whole handler with request id, log line and metrics, against
// a bare handler that writes the same bytes: bare-whole, or bare for plain.
//
//	make bench BENCH=Get
func BenchmarkGet(b *testing.B) {
	s, _ := postgresStore(b)
	id := benchmarkProducts(b, s)
	enc := encoder{func(key string) string { return "https://cdn.example/" + key }}
	uncached := newProductLoader(s, enc)
	doc, err := uncached.Product(b.Context(), id)
	if err != nil {
		b.Fatal(err)
	}
	redisURL := testRedis(b)
	cached := benchmarkCache(b, id, uncached, benchmarkRedis(b, redisURL))
	remote := benchmarkCache(b, id, uncached, redisOnly{benchmarkRedis(b, redisURL)})
	local := benchmarkCache(b, id, uncached, newMemoryCache(benchmarkTTL, cacheSize))
	// Nobody listens there, and it is not even run: the breaker is open.
	down := newCache(uncached, benchmarkRedis(b, "redis://127.0.0.1:1"), benchmarkTTL, slog.New(slog.DiscardHandler))
	path := fmt.Sprintf("/products/%d", id)
	etag := http.Header{"If-None-Match": {etag(doc.Version)}}

	cases := []struct {
		name    string
		handler http.Handler
		header  http.Header
		status  int
	}{
		{"bare", bareHandler(doc, nil), nil, 200},
		{"bare-whole", bareHandler(doc, observedHeader()), nil, 200},
		{"uncached", benchmarkAPI(b, uncached, enc), nil, 200},
		{"redis-down", benchmarkAPI(b, down, enc), nil, 200},
		{"redis", benchmarkAPI(b, remote, enc), nil, 200},
		{"plain", plainHandler(cached), nil, 200},
		{"no-log", silentAPI(cached, enc), nil, 200},
		{"client-side", benchmarkAPI(b, cached, enc), nil, 200},
		{"in-process", benchmarkAPI(b, local, enc), nil, 200},
		{"not-modified", benchmarkAPI(b, cached, enc), etag, 304},
	}
	for _, c := range cases {
		b.Run(c.name+"/handler", func(b *testing.B) {
			b.ReportAllocs()
			r := httptest.NewRequest("GET", path, nil)
			r.SetPathValue("id", strconv.FormatInt(id, 10)) // for the one case without a router
			r.Header = c.header.Clone()
			if r.Header == nil {
				r.Header = make(http.Header)
			}
			w := &discardResponse{header: make(http.Header)}
			for b.Loop() {
				clear(w.header)
				c.handler.ServeHTTP(w, r)
			}
			if w.status != c.status {
				b.Fatalf("status %d, want %d", w.status, c.status)
			}
		})
	}
	for _, c := range cases {
		b.Run(c.name+"/loopback", func(b *testing.B) { benchmarkLoopback(b, c.handler, c.header, c.status, loadConnections) })
		b.Run(c.name+"/few", func(b *testing.B) { benchmarkLoopback(b, c.handler, c.header, c.status, fewConnections) })
	}
	for _, c := range cases {
		b.Run(c.name+"/paced", func(b *testing.B) { benchmarkPaced(b, c.handler, c.header, c.status, pacedRate) })
	}
	// The same rate for all, so that it is half of saturation for a hit.
	half := sync.OnceValue(func() int { return saturation(b, benchmarkAPI(b, cached, enc)) / 2 })
	for _, c := range cases {
		b.Run(c.name+"/half", func(b *testing.B) {
			rate := half()
			b.ResetTimer() // the first has measured the rate
			benchmarkPaced(b, c.handler, c.header, c.status, rate)
		})
	}
}

// benchmarkTTL is longer than a benchmark: an entry that ends in its midst is a miss.
const benchmarkTTL = time.Hour

// benchmarkProducts stores a product for each connection of the load client, as
// it is in the end, with two images that are ready. The ids count from 1.
func benchmarkProducts(b *testing.B, s *store) (first int64) {
	for range loadConnections {
		benchmarkProduct(b, s)
	}
	return 1
}

func benchmarkProduct(b *testing.B, s *store) {
	p := Product{UserID: 1, Name: "Trail shoe", Description: strings.Repeat("Light, grippy. ", 10), Price: 8990,
		Images: sourcesOf("https://example.com/a.jpg", "https://example.com/b.png")}
	p, err := s.CreateProduct(b.Context(), p, origin{}, nil)
	if err != nil {
		b.Fatal(err)
	}
	for _, image := range p.Images {
		key := blobKey(p.ID, image.ID, nil, "jpg")
		if err := s.ReserveObject(b.Context(), image.ID, key); err != nil {
			b.Fatal(err)
		}
		done := Image{Key: key, Width: 2048, Height: 1365, Bytes: 181233, SourceBytes: 2410033}
		if _, err := s.SettleReady(b.Context(), Job{ID: image.ID, ProductID: p.ID}, done); err != nil {
			b.Fatal(err)
		}
	}
}

// benchmarkCache runs a cache, filled with the product, until the benchmark ends.
func benchmarkCache(b *testing.B, id int64, next productReader, backend cacheBackend) *cache {
	c := newCache(next, backend, benchmarkTTL, slog.New(slog.DiscardHandler))
	ctx, cancel := context.WithCancel(b.Context())
	var run sync.WaitGroup
	run.Go(func() {
		if err := c.Run(ctx); err != nil {
			b.Error(err)
		}
	})
	b.Cleanup(func() { cancel(); run.Wait() })
	eventually(b, "the cache is filled", func() bool {
		doc, err := c.Product(b.Context(), id)
		return err == nil && doc.Cached
	})
	return c
}

func benchmarkRedis(b *testing.B, url string) *redisCache {
	redis, err := newRedisCache(url, benchmarkTTL, cacheSize, slog.New(slog.DiscardHandler))
	if err != nil {
		b.Fatal(err)
	}
	return redis
}

// redisOnly is Redis without the client-side cache in front of it.
type redisOnly struct{ *redisCache }

func (r redisOnly) Get(id int64) (cacheEntry, error) {
	conn := r.live.Load()
	if conn == nil {
		return cacheEntry{}, errCacheAway
	}
	value, err := conn.Do(context.Background(), conn.B().Get().Key(redisKey(id)).Build()).AsBytes()
	if rueidis.IsRedisNil(err) {
		return cacheEntry{}, nil
	}
	return splitEntry(value), err
}

// benchmarkAPI is the handler with everything on that a request passes.
func benchmarkAPI(b *testing.B, products productReader, enc encoder) http.Handler {
	log, err := os.Create(filepath.Join(b.TempDir(), "log"))
	if err != nil {
		b.Fatal(err)
	}
	logs := newLogBuffer(log)
	b.Cleanup(func() { logs.Flush(); log.Close() })
	s := &server{
		products: products, encoder: enc, monitor: new(monitor), stopping: make(chan struct{}),
		log: slog.New(slog.NewJSONHandler(logs, nil)),
	}
	return s.routes()
}

// silentAPI is benchmarkAPI without the log line: the difference is what that costs.
func silentAPI(products productReader, enc encoder) http.Handler {
	s := &server{products: products, encoder: enc, monitor: new(monitor), stopping: make(chan struct{}), log: slog.New(slog.DiscardHandler)}
	return s.routes()
}

// plainHandler is the handler alone: no request id, no log line, no metrics, and
// no router where the request has its path value.
func plainHandler(products productReader) http.Handler {
	s := &server{products: products}
	get := func(w http.ResponseWriter, r *http.Request) {
		if err := s.getProduct(w, r); err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
		}
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /products/{id}", get)
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.PathValue("id") != "" {
			get(w, r)
			return
		}
		mux.ServeHTTP(w, r)
	})
}

// BenchmarkObserve is what observing a request costs, by parts, but for the log
// line, which is what client-side costs above no-log in BenchmarkGet.
func BenchmarkObserve(b *testing.B) {
	b.Run("request-id", func(b *testing.B) {
		b.ReportAllocs()
		r, header := httptest.NewRequest("GET", "/products/1", nil), make(http.Header)
		for b.Loop() {
			rec := &recorder{origin: readOrigin(r)}
			rec.setHeader(header)
		}
	})
	b.Run("metrics", func(b *testing.B) {
		b.ReportAllocs()
		stats := newRouteStats("benchmark")
		for start := time.Now(); b.Loop(); {
			stats.count(http.StatusOK, time.Since(start))
		}
	})
}

// bareHandler is the limit: it knows the bytes of the answer, the header that
// getProduct gives it and more included, and writes them.
func bareHandler(doc document, more http.Header) http.Handler {
	type field struct {
		name  string
		value []string
	}
	header := []field{
		{"Content-Type", headerJSON}, {"Etag", []string{etag(doc.Version)}}, {"Content-Length", []string{strconv.Itoa(len(doc.Body))}},
		{"Cache-Control", headerRevalidate}, {"Cache-Status", headerHit},
	}
	for name, value := range more {
		header = append(header, field{name, value})
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		to := w.Header()
		for _, field := range header {
			to[field.name] = field.value
		}
		w.Write(doc.Body)
	})
}

// observedHeader is what observe gives every answer. The request id is always the
// same one: to make it is a part of what observing costs.
func observedHeader() http.Header {
	header := make(http.Header)
	(&recorder{origin: origin{RequestID: newRequestID()}}).setHeader(header)
	return header
}

type discardResponse struct {
	header http.Header
	status int
}

func (w *discardResponse) Header() http.Header { return w.header }
func (w *discardResponse) Write(data []byte) (int, error) {
	if w.status == 0 {
		w.status = http.StatusOK
	}
	return len(data), nil
}
func (w *discardResponse) WriteHeader(status int) { w.status = status }

// benchmarkLoopback has another process send the requests, as fast as they are
// answered, so that what this one spends (cpu-µs/op) is the server's alone. What
// the other spends (client-µs/op) is not there to answer requests with.
func benchmarkLoopback(b *testing.B, h http.Handler, header http.Header, status, connections int) {
	web := httptest.NewServer(h)
	defer web.Close()
	load := loadClient{Addr: web.Listener.Addr().String(), Header: header, Status: status, Paths: productPaths(loadConnections), Requests: b.N, Connections: connections}
	before := cpuTime(b)
	client := load.run(b)
	perOp := func(d time.Duration) float64 { return float64(d.Nanoseconds()) / 1e3 / float64(b.N) }
	b.ReportMetric(perOp(cpuTime(b)-before), "cpu-µs/op")
	b.ReportMetric(perOp(client), "client-µs/op")
}

// cpuTime is what this process has used, in user and in system mode.
func cpuTime(b *testing.B) time.Duration {
	var usage syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &usage); err != nil {
		b.Fatal(err)
	}
	return time.Duration(usage.Utime.Nano() + usage.Stime.Nano())
}
