package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/redis/rueidis"
	"golang.org/x/sync/errgroup"
)

// BenchmarkGet compares what reading one product costs by where it comes from,
// each through the whole handler with request id, log line and metrics, against
// a bare handler that writes the same bytes.
//
//	go test -run '^$' -bench Get -count 10 . | tee new.txt && benchstat new.txt
func BenchmarkGet(b *testing.B) {
	db, err := openPostgres(b.Context(), testDatabase(b))
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(db.Close)
	s := newStore(db)
	if err := s.Migrate(b.Context()); err != nil {
		b.Fatal(err)
	}
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
	local := benchmarkCache(b, id, uncached, newMemoryCache(time.Minute, cacheSize))
	path := fmt.Sprintf("/products/%d", id)
	etag := http.Header{"If-None-Match": {etag(doc.Version)}}

	cases := []struct {
		name    string
		handler http.Handler
		header  http.Header
		status  int
	}{
		{"bare", bareHandler(doc), nil, 200},
		{"uncached", benchmarkAPI(b, uncached, enc), nil, 200},
		{"redis", benchmarkAPI(b, remote, enc), nil, 200},
		{"client-side", benchmarkAPI(b, cached, enc), nil, 200},
		{"in-process", benchmarkAPI(b, local, enc), nil, 200},
		{"not-modified", benchmarkAPI(b, cached, enc), etag, 304},
	}
	for _, c := range cases {
		b.Run(c.name+"/handler", func(b *testing.B) {
			b.ReportAllocs()
			r := httptest.NewRequest("GET", path, nil)
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
		b.Run(c.name+"/loopback", func(b *testing.B) { benchmarkLoopback(b, c.handler, c.header, c.status) })
	}
}

// benchmarkProducts stores a product for each connection of the load client, as
// it is in the end, with two images that are ready. The ids count from 1.
func benchmarkProducts(b *testing.B, s *store) (first int64) {
	user, err := s.AddUser(b.Context(), "Ann", "ann@example.com")
	if err != nil {
		b.Fatal(err)
	}
	for range loadConnections {
		benchmarkProduct(b, s, user)
	}
	return 1
}

func benchmarkProduct(b *testing.B, s *store, user int64) {
	p := Product{UserID: user, Name: "Trail shoe", Description: strings.Repeat("Light, grippy. ", 10), Price: 8990,
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
	c := newCache(next, backend, time.Minute, slog.New(slog.DiscardHandler))
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
	redis, err := newRedisCache(url, time.Minute, cacheSize, slog.New(slog.DiscardHandler))
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
		products: products, encoder: enc, stopping: make(chan struct{}),
		log: slog.New(slog.NewJSONHandler(logs, nil)),
	}
	return s.routes()
}

// bareHandler is the limit: it knows the bytes and writes them.
func bareHandler(doc document) http.Handler {
	body, contentType, tag := doc.Body, []string{"application/json"}, []string{etag(doc.Version)}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header()["Content-Type"] = contentType
		w.Header()["Etag"] = tag
		w.Write(body)
	})
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

// benchmarkLoopback has another process send the requests, so that what this
// one spends (cpu-µs/op) is the server's alone.
func benchmarkLoopback(b *testing.B, h http.Handler, header http.Header, status int) {
	web := httptest.NewServer(h)
	defer web.Close()
	client := exec.Command(os.Args[0], "-test.run", "^TestLoadClient$")
	load := loadClient{Addr: web.Listener.Addr().String(), Header: header, Status: status, Requests: b.N}
	spec, err := json.Marshal(load)
	if err != nil {
		b.Fatal(err)
	}
	client.Env = append(os.Environ(), loadClientVar+"="+string(spec))
	before := cpuTime(b)
	if out, err := client.CombinedOutput(); err != nil {
		b.Fatalf("%v: %s", err, out)
	}
	b.ReportMetric(float64((cpuTime(b)-before).Nanoseconds())/1e3/float64(b.N), "cpu-µs/op")
}

// loadClientVar makes TestLoadClient, in a process of its own, a client.
const loadClientVar = "PMS_LOAD_CLIENT"

// loadConnections is how many connections the client has. Each reads a product
// of its own, so that no two share a read by chance.
const loadConnections = 32

// loadClient is what a client is to send, and the status that it must get.
type loadClient struct {
	Addr     string
	Header   http.Header
	Status   int
	Requests int
}

func TestLoadClient(t *testing.T) {
	spec := os.Getenv(loadClientVar)
	if spec == "" {
		t.Skip("is the client of the benchmarks")
	}
	var load loadClient
	if err := json.Unmarshal([]byte(spec), &load); err != nil {
		t.Fatal(err)
	}
	var group errgroup.Group
	for n := range loadConnections {
		requests := (load.Requests + n) / loadConnections
		group.Go(func() error { return load.send(fmt.Sprintf("/products/%d", n+1), requests) })
	}
	if err := group.Wait(); err != nil {
		t.Fatal(err)
	}
}

// send sends n requests, one after the other, over one connection. It parses the
// first two answers, the first of which may be a miss, and reads as many bytes
// for each of the others: a client that works as hard as the server would keep
// it from being measured at load.
func (l loadClient) send(path string, n int) error {
	conn, err := net.Dial("tcp", l.Addr)
	if err != nil {
		return err
	}
	defer conn.Close()
	request, err := http.NewRequest("GET", "http://"+l.Addr+path, nil)
	if err != nil {
		return err
	}
	maps.Copy(request.Header, l.Header)
	var wire bytes.Buffer
	if err := request.Write(&wire); err != nil {
		return err
	}
	if err := conn.SetDeadline(time.Now().Add(2 * time.Minute)); err != nil {
		return err
	}
	buf := make([]byte, 64<<10)
	size := 0
	for done := range n {
		if _, err := conn.Write(wire.Bytes()); err != nil {
			return err
		}
		if done < 2 {
			size, err = l.parsedAnswer(conn, request, buf)
		} else {
			_, err = io.ReadFull(conn, buf[:size])
		}
		if err != nil {
			return err
		}
	}
	want := fmt.Sprintf("HTTP/1.1 %d ", l.Status)
	if size > 0 && !bytes.HasPrefix(buf, []byte(want)) {
		return fmt.Errorf("answer %.20q, want %q", buf, want)
	}
	return nil
}

// parsedAnswer answers how many bytes an answer has, headers and all.
func (l loadClient) parsedAnswer(conn net.Conn, request *http.Request, buf []byte) (size int, err error) {
	var raw bytes.Buffer
	response, err := http.ReadResponse(bufio.NewReader(io.TeeReader(conn, &raw)), request)
	if err != nil {
		return 0, err
	}
	_, err = io.Copy(io.Discard, response.Body)
	return copy(buf, raw.Bytes()), err
}

// cpuTime is what this process has used, in user and in system mode.
func cpuTime(b *testing.B) time.Duration {
	var usage syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &usage); err != nil {
		b.Fatal(err)
	}
	return time.Duration(usage.Utime.Nano() + usage.Stime.Nano())
}
