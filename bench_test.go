package main

import (
	"context"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/redis/rueidis"
)

// getCase is a way to read a product.
type getCase struct {
	name    string
	handler http.Handler
	header  http.Header
	status  int
}

// BenchmarkGet compares what reading one product costs by where it comes from,
// each through the whole handler with request id, log line and metrics, and what
// a bare handler costs that writes the same bytes: bare-whole, or bare for plain.
//
//	make bench BENCH=Get
func BenchmarkGet(b *testing.B) {
	cases := getCases(b)
	for _, c := range cases {
		b.Run(c.name, func(b *testing.B) { benchmarkHandler(b, c) })
	}
	contest := newContest(b, cases)
	for _, connections := range []int{loadConnections, 8} {
		b.Run(fmt.Sprintf("loopback/%d", connections), func(b *testing.B) {
			contest.run(b, loadClient{Connections: connections, Requests: 3000}, "cpu", "time")
		})
	}
	atRate := func(b *testing.B, rate int) {
		contest.run(b, loadClient{Connections: loadConnections, Requests: rate / 4, Rate: rate}, "p50", "p99")
	}
	b.Run("paced", func(b *testing.B) { atRate(b, pacedRate) })
	b.Run("half", func(b *testing.B) { atRate(b, contest.saturation(b, "client-side")/2) })
}

func getCases(b *testing.B) []getCase {
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
	return []getCase{
		{"bare", bareHandler(doc, nil), nil, 200},
		{"bare-whole", bareHandler(doc, observedHeader()), nil, 200},
		{"uncached", benchmarkAPI(b, uncached, enc), nil, 200},
		{"redis-down", benchmarkAPI(b, down, enc), nil, 200},
		{"redis", benchmarkAPI(b, remote, enc), nil, 200},
		{"plain", plainHandler(cached), nil, 200},
		{"no-log", silentAPI(cached, enc), nil, 200},
		{"client-side", benchmarkAPI(b, cached, enc), nil, 200},
		{"in-process", benchmarkAPI(b, local, enc), nil, 200},
		{"not-modified", benchmarkAPI(b, cached, enc), http.Header{"If-None-Match": {etag(doc.Version)}}, 304},
	}
}

// benchmarkHandler calls a handler without a server around it.
func benchmarkHandler(b *testing.B, c getCase) {
	b.ReportAllocs()
	r := httptest.NewRequest("GET", "/products/1", nil)
	r.SetPathValue("id", "1") // for the one case without a router
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
}

// contest has a server for each case, in this process, while the requests come
// from another.
type contest struct {
	cases   []getCase
	servers []*httptest.Server
}

// rivals are the pairs of cases of which the first is compared with the second.
var rivals = [][2]string{
	{"plain", "bare"},
	{"no-log", "bare-whole"}, {"client-side", "bare-whole"}, {"in-process", "bare-whole"}, {"not-modified", "bare-whole"},
	{"redis", "bare-whole"}, {"uncached", "bare-whole"},
	{"redis-down", "uncached"}, {"uncached", "client-side"},
}

func newContest(b *testing.B, cases []getCase) contest {
	c := contest{cases: cases}
	for _, one := range cases {
		server := httptest.NewServer(one.handler)
		b.Cleanup(server.Close)
		c.servers = append(c.servers, server)
	}
	return c
}

// turns is how often each case answers a burst of requests. A burst is short, since
// what it is compared with is the other's just before or after it: the speed of
// a machine that others share changes from second to second, and the median of
// such ratios hardly does.
const turns = 5

// run reports, for each pair of rivals and each of the measures named, the median
// over all turns of the first's part of the second's.
func (c contest) run(b *testing.B, load loadClient, measures ...string) {
	ratios := make(map[string][]float64)
	for b.Loop() {
		for range turns {
			seen := make(map[string]map[string]float64)
			for n, one := range c.cases {
				seen[one.name] = c.burst(b, n, load)
			}
			for _, pair := range rivals {
				for _, measure := range measures {
					unit := fmt.Sprintf("%s:%s/%s", measure, pair[0], pair[1])
					ratios[unit] = append(ratios[unit], seen[pair[0]][measure]/seen[pair[1]][measure])
				}
			}
		}
	}
	b.ReportMetric(0, "ns/op") // which says nothing here
	for unit, all := range ratios {
		slices.Sort(all)
		b.ReportMetric(all[len(all)/2], unit)
	}
}

// burst answers what the requests cost this process, and what their client saw.
func (c contest) burst(b *testing.B, n int, load loadClient) map[string]float64 {
	load.Addr, load.Header, load.Status, load.Paths = c.servers[n].Listener.Addr().String(), c.cases[n].header, c.cases[n].status, productPaths(loadConnections)
	before := cpuTime(b)
	seen := load.run(b)
	return map[string]float64{
		"cpu": float64(cpuTime(b) - before), "time": float64(seen.Took),
		"p50": float64(seen.P50), "p99": float64(seen.P99),
	}
}

// saturation is how many requests a second a case answers at most, on this machine,
// of which the client takes its part.
func (c contest) saturation(b *testing.B, name string) int {
	n := slices.IndexFunc(c.cases, func(one getCase) bool { return one.name == name })
	const requests = 100_000
	took := c.burst(b, n, loadClient{Connections: loadConnections, Requests: requests})["time"]
	return int(requests / time.Duration(took).Seconds())
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

// cpuTime is what this process has used, in user and in system mode.
func cpuTime(b *testing.B) time.Duration {
	var usage syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &usage); err != nil {
		b.Fatal(err)
	}
	return time.Duration(usage.Utime.Nano() + usage.Stime.Nano())
}
