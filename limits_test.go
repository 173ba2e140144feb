package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

func TestRateBucket(t *testing.T) {
	t.Parallel()
	start := time.Now()
	b := new(rateBucket)
	taken := func(after time.Duration, tries int) (n int) {
		for range tries {
			if b.take(10, start.Add(after)) {
				n++
			}
		}
		return n
	}
	for _, c := range []struct {
		what  string
		after time.Duration
		want  int
	}{
		{"a full bucket", 0, 10}, {"an empty one", 0, 0}, {"after 99 ms", 99 * time.Millisecond, 0}, {"after 100 ms", 100 * time.Millisecond, 1},
		{"half a second later", 600 * time.Millisecond, 5}, {"an hour later", time.Hour, 10}, {"with the clock set back", time.Minute, 0}, {"a second later", time.Hour + time.Second, 10},
	} {
		if got := taken(c.after, 20); got != c.want {
			t.Errorf("%s: %d requests, want %d", c.what, got, c.want)
		}
	}
	for range 1000 {
		if !b.take(0, start) {
			t.Fatal("no limit refused a request")
		}
	}
}

func TestRateLimitIsPerToken(t *testing.T) {
	t.Parallel()
	a := newAPI(t)
	a.authOn = true
	a.limits.set(limitSettings{RateLimit: 3})
	busy, other := tokenOf(t, a, caller{UserID: 1}), tokenOf(t, a, caller{UserID: 1})
	refused := 0
	for range 10 {
		got := a.do(t, "GET", "/products", "", "Authorization", busy)
		if got.Code == http.StatusTooManyRequests {
			refused++
			got.wantProblem(t, 429)
			if got.Header().Get("Retry-After") != "1" {
				t.Errorf("Retry-After %q", got.Header().Get("Retry-After"))
			}
		}
	}
	if refused < 4 {
		t.Errorf("%d of 10 requests were refused, 3 a second are allowed", refused)
	}
	if got := a.do(t, "GET", "/products", "", "Authorization", other); got.Code != 200 {
		t.Errorf("another token: %d", got.Code)
	}
}

// limitedAPI serves with one place of each kind. Reads of product 7 wait until
// they are released.
func limitedAPI(t *testing.T) (a *api, web *httptest.Server, waiting, release chan struct{}) {
	t.Helper()
	a = newAPI(t)
	a.limits.set(limitSettings{MaxRequests: 1})
	a.do(t, "POST", "/products", shoe)
	waiting, release = make(chan struct{}), make(chan struct{})
	next := a.products
	a.products = readerFunc(func(ctx context.Context, id int64) (document, error) {
		if id == 7 {
			waiting <- struct{}{}
			<-release
			id = 1
		}
		return next.Product(ctx, id)
	})
	web = httptest.NewServer(a.handler)
	t.Cleanup(web.Close)
	return a, web, waiting, release
}

func TestRequestsBeyondTheLimitAreRefused(t *testing.T) {
	t.Parallel()
	a, web, waiting, release := limitedAPI(t)
	var first sync.WaitGroup
	first.Go(func() {
		if status := statusOf(web.URL + "/products/7"); status != 200 {
			t.Errorf("the request in work: %d", status)
		}
	})
	<-waiting
	got := a.do(t, "GET", "/products/1", "")
	got.wantProblem(t, 503)
	if got.Header().Get("Retry-After") != "1" {
		t.Errorf("Retry-After %q", got.Header().Get("Retry-After"))
	}
	for _, path := range []string{"/healthz", "/readyz", "/metrics"} {
		if got := a.do(t, "GET", path, ""); got.Code != 200 {
			t.Errorf("%s with every place taken: %d", path, got.Code)
		}
	}
	close(release)
	first.Wait()
	if got := a.do(t, "GET", "/products/1", ""); got.Code != 200 {
		t.Errorf("with the place free again: %d", got.Code)
	}
}

// Whoever asks for the metrics has to be known, and until then has a place too.
func TestMetricsHavePlacesOfTheirOwn(t *testing.T) {
	t.Parallel()
	a := newAPI(t)
	a.limits.set(limitSettings{MaxRequests: 1})
	a.limits.watching.take()
	a.do(t, "GET", "/metrics", "").wantProblem(t, 503)
	for _, path := range []string{"/healthz", "/readyz", "/products"} {
		if got := a.do(t, "GET", path, ""); got.Code != 200 {
			t.Errorf("%s while the metrics have no place: %d", path, got.Code)
		}
	}
}

// Clients that read nothing of a large page keep it in memory, so only so many get
// one at once. Small pages are for everybody.
func TestFewLargePagesAreSentAtOnce(t *testing.T) {
	t.Parallel()
	a := newAPI(t)
	const most = 2
	a.limits.set(limitSettings{MaxRequests: most})
	entries := make([]batchEntry, 10)
	for n := range entries {
		entries[n] = entry(strconv.Itoa(n))
		entries[n].Description = strings.Repeat("\x01", maxDescriptionLength) // of which JSON makes six bytes
	}
	createBatch(t, a.store, entries)
	var clients []net.Conn
	for n := range most {
		client, end := servePipe(a.handler.ServeHTTP)
		defer end()
		io.WriteString(client, "GET /products HTTP/1.1\r\nHost: x\r\n\r\n")
		clients = append(clients, client)
		eventually(t, "the page is being sent", func() bool { return a.limits.sending.taken.Load() == int64(n+1) })
	}
	got := a.do(t, "GET", "/products", "")
	got.wantProblem(t, 503)
	if got.Header().Get("Retry-After") != "1" {
		t.Errorf("Retry-After %q", got.Header().Get("Retry-After"))
	}
	if got := a.do(t, "GET", "/products?limit=1", ""); got.Code != 200 {
		t.Errorf("a small page: %d", got.Code)
	}
	clients[0].Close()
	eventually(t, "a place is free", func() bool { return a.limits.sending.taken.Load() == most-1 })
	if got := a.do(t, "GET", "/products", ""); got.Code != 200 || got.Body.Len() <= smallPage {
		t.Errorf("with a free place: %d, %d bytes", got.Code, got.Body.Len())
	}
}

// What holds much memory, and what strangers may ask for, has fewer places.
func TestFewImportsAndLooksAtOnce(t *testing.T) {
	t.Parallel()
	for most, want := range map[int][4]int64{0: {0, 0, 0, 0}, 5: {5, 5, 5, 5}, 1000: {1000, maxBulk, maxWatching, maxSending}} {
		var l requestLimits
		l.set(limitSettings{MaxRequests: most})
		if got := [4]int64{l.working.most, l.bulk.most, l.watching.most, l.sending.most}; got != want {
			t.Errorf("of %d requests the places are %v, want %v", most, got, want)
		}
	}
}

// However many ask how the parts are, each part is asked once a second.
func TestReadinessIsFoundOutOnceForAll(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var c checkup
		asked := 0
		parts := []part{{"store", true, func(context.Context) error {
			asked++
			return nil
		}}}
		for second := 1; second <= 2; second++ {
			var callers sync.WaitGroup
			for range 20 {
				callers.Go(func() {
					if states := c.states(parts, testLog(t)); states["store"] != "ok" {
						t.Errorf("the parts are %v", states)
					}
				})
			}
			callers.Wait()
			if asked != second {
				t.Errorf("in second %d the store was asked %d times", second, asked)
			}
			time.Sleep(checkupTime + 1) // the bubble's clock
		}
	})
}

// Why a part is away is said once, and when it is back.
func TestPartThatIsAwayIsLoggedOnce(t *testing.T) {
	t.Parallel()
	var log bytes.Buffer
	var c checkup
	var err error
	parts := []part{{"blobs", false, func(context.Context) error { return err }}}
	for _, err = range []error{nil, errors.New("no such bucket"), errors.New("no such bucket"), nil, nil} {
		c.until = time.Time{}
		c.states(parts, slog.New(slog.NewTextHandler(&log, nil)))
	}
	if text := log.String(); strings.Count(text, "\n") != 2 || !strings.Contains(text, `msg="a part is away" part=blobs err="no such bucket"`) || !strings.Contains(text, `msg="a part is back" part=blobs`) {
		t.Errorf("logged:\n%s", text)
	}
}

// Without a part that is required the program is unavailable, whatever else is away.
func TestReadinessIsThatOfTheWorstPart(t *testing.T) {
	t.Parallel()
	ok := func(context.Context) error { return nil }
	away := func(context.Context) error { return errUnavailable }
	for want, parts := range map[string][]part{
		"ready":       {{"store", true, ok}, {"queue", false, ok}},
		"degraded":    {{"cache", false, away}, {"store", true, ok}, {"queue", false, away}},
		"unavailable": {{"cache", false, away}, {"store", true, away}, {"queue", false, away}},
	} {
		if got := (&server{parts: parts, log: testLog(t)}).readiness(); got.Status != want {
			t.Errorf("%v, want %s", got, want)
		}
	}
}

// Clients that send their bodies slowly take places from each other alone, and
// so do those that listen to events.
func TestSlowClientsTakeNoPlaceFromOthers(t *testing.T) {
	t.Parallel()
	a, web, _, _ := limitedAPI(t)
	slow, end := io.Pipe()
	var posting sync.WaitGroup
	posting.Go(func() {
		response, err := http.Post(web.URL+"/products", "application/json", slow)
		if err != nil || response.StatusCode != 201 {
			t.Errorf("the slow client: %v, %v", response, err)
			return
		}
		response.Body.Close()
	})
	io.WriteString(end, shoe[:10])
	eventually(t, "the slow body is being read", func() bool { return a.limits.reading.taken.Load() == 1 })
	if got := a.do(t, "GET", "/products/1", ""); got.Code != 200 {
		t.Errorf("a good client's read: %d", got.Code)
	}
	a.do(t, "POST", "/products", shoe).wantProblem(t, 503)

	stream, err := http.Get(web.URL + "/products/1/events")
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, "the stream has its place", func() bool { return a.limits.streaming.taken.Load() == 1 })
	a.do(t, "GET", "/products/1/events", "").wantProblem(t, 503)
	if got := a.do(t, "GET", "/products/1", ""); got.Code != 200 {
		t.Errorf("a good client's read beside a stream: %d", got.Code)
	}
	stream.Body.Close()
	io.WriteString(end, shoe[10:])
	end.Close()
	posting.Wait()
	eventually(t, "every place is free", func() bool {
		return a.limits.reading.taken.Load()+a.limits.streaming.taken.Load()+a.limits.working.taken.Load() == 0
	})
}

// A client that does not read its answer holds no place.
func TestAnswersHoldNoPlace(t *testing.T) {
	t.Parallel()
	for name, answer := range map[string]func(*recorder){
		"with a header":     func(rec *recorder) { rec.WriteHeader(http.StatusOK) },
		"by its body alone": func(rec *recorder) { rec.Write([]byte("x")) },
	} {
		var l requestLimits
		rec := &recorder{ResponseWriter: httptest.NewRecorder(), limits: &l, route: unrouted}
		if err := rec.enter(&l.working); err != nil || l.working.taken.Load() != 1 {
			t.Fatalf("%d places, %v", l.working.taken.Load(), err)
		}
		answer(rec)
		if n := l.working.taken.Load(); n != 0 {
			t.Errorf("%s: %d places are taken while an answer is sent", name, n)
		}
	}
}

// pipeListener is a listener whose connections are pipes.
type pipeListener chan net.Conn

func (l pipeListener) Accept() (net.Conn, error) {
	if conn, open := <-l; open {
		return conn, nil
	}
	return nil, net.ErrClosed
}

func (l pipeListener) Close() error   { close(l); return nil }
func (l pipeListener) Addr() net.Addr { return &net.TCPAddr{} }

// However little a client sends, its connection ends in time: 5 s for a header,
// 30 s for a request, 2 minutes of silence between two.
func TestSlowConnectionsAreClosed(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		send  string
		every time.Duration // a letter more; 0: never
		want  time.Duration
	}{
		"nothing":                  {"", 0, 5 * time.Second},
		"half a header":            {"GET / HTTP/1.1\r\nHost: x\r\nX: y", 0, 5 * time.Second},
		"a header, drop by drop":   {"GET / HTTP/1.1\r\nHost: x\r\nX: y", time.Second, 5 * time.Second},
		"half a body":              {"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nx", 0, 30 * time.Second},
		"a body, drop by drop":     {"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nx", time.Second, 30 * time.Second},
		"silence after a request":  {"GET / HTTP/1.1\r\nHost: x\r\n\r\n", 0, 2 * time.Minute},
		"half of a second request": {"GET / HTTP/1.1\r\nHost: x\r\n\r\nGET / HT", 0, 5 * time.Second},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				client, end := servePipe(func(w http.ResponseWriter, r *http.Request) { io.Copy(io.Discard, r.Body) })
				var sender sync.WaitGroup
				defer sender.Wait()
				defer end()
				sender.Go(func() { // ends with the connection
					io.WriteString(client, c.send)
					for err := error(nil); c.every > 0 && err == nil; _, err = io.WriteString(client, "x") {
						time.Sleep(c.every) // the bubble's clock
					}
				})
				start := time.Now()
				io.Copy(io.Discard, client)
				if took := time.Since(start); took < c.want || took > c.want+time.Second {
					t.Errorf("the connection ended after %v, want %v", took, c.want)
				}
			})
		})
	}
}

// A client that does not read its answer loses it after a minute.
func TestAnswersThatNobodyReadsEnd(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		took := make(chan time.Duration, 1)
		client, end := servePipe(func(w http.ResponseWriter, r *http.Request) {
			start := time.Now()
			w.Write(make([]byte, 1<<20))
			took <- time.Since(start)
		})
		defer end()
		io.WriteString(client, "GET / HTTP/1.1\r\nHost: x\r\n\r\n")
		if d := <-took; d != time.Minute {
			t.Errorf("the answer was given up after %v, want a minute", d)
		}
	})
}

// A stream and an export last for as long as their clients take them, however
// slowly; a client that takes nothing loses its stream.
func TestAnswersThatAreReadGoOn(t *testing.T) {
	t.Parallel()
	if _, err := migratedFile(); err != nil { // outside the bubbles, which share it
		t.Fatal(err)
	}
	inBubble := func(name, path string, test func(t *testing.T, a *api, client net.Conn)) {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				a := newAPI(t)
				manyProducts(t, a.store, 2000)
				client, end := servePipe(a.handler.ServeHTTP)
				defer end()
				io.WriteString(client, "GET "+path+" HTTP/1.1\r\nHost: x\r\n\r\n")
				test(t, a, client)
			})
		})
	}
	slowly := func(client net.Conn) (n int, took time.Duration, err error) {
		start := time.Now()
		response, err := http.ReadResponse(bufio.NewReader(client), nil)
		for part := make([]byte, 8<<10); err == nil && time.Since(start) < 2*writeTimeout; time.Sleep(2 * time.Second) { // the bubble's clock
			var some int
			some, err = response.Body.Read(part)
			n += bytes.Count(part[:some], []byte("\n"))
		}
		return n, time.Since(start), err
	}
	inBubble("stream", "/events", func(t *testing.T, _ *api, client net.Conn) {
		if _, took, err := slowly(client); err != nil {
			t.Errorf("it ended after %v: %v", took, err)
		}
	})
	inBubble("export", "/products/export", func(t *testing.T, _ *api, client net.Conn) {
		if n, took, err := slowly(client); err != io.EOF || n != 2000 || took < readTimeout {
			t.Errorf("it ended after %v and %d rows: %v", took, n, err)
		}
	})
	inBubble("stream that is not read", "/events", func(t *testing.T, a *api, client net.Conn) {
		io.ReadFull(client, make([]byte, 1))
		time.Sleep(eventsHeartbeat + eventsWriteTimeout + 1)
		synctest.Wait()
		if n := a.limits.streaming.taken.Load(); n != 0 {
			t.Errorf("it has %d places", n)
		}
	})
}

// servePipe serves one connection as the program does, and answers the client's
// side of it.
func servePipe(handler http.HandlerFunc) (client net.Conn, end func()) {
	client, conn := net.Pipe()
	listener := make(pipeListener, 1)
	listener <- conn
	web := newWebServer(handler, slog.New(slog.DiscardHandler))
	served := make(chan error)
	go func() { served <- web.Serve(listener) }()
	return client, func() {
		client.Close()
		web.Close() // the listener too
		<-served
	}
}
