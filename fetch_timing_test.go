package main

import (
	"context"
	"io"
	"net"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// pipes is a listener whose connections are in memory, which synctest's clock
// can wait for.
type pipes struct {
	conns  chan net.Conn
	closed chan struct{}
}

func (p pipes) Accept() (net.Conn, error) {
	select {
	case conn := <-p.conns:
		return conn, nil
	case <-p.closed:
		return nil, net.ErrClosed
	}
}

func (p pipes) Close() error   { close(p.closed); return nil }
func (p pipes) Addr() net.Addr { return &net.UnixAddr{} }

// pipedFetcher returns a fetcher all whose connections lead to handler. It
// must be called in a synctest bubble.
func pipedFetcher(t *testing.T, limits fetchLimits, handler http.HandlerFunc) *fetcher {
	t.Helper()
	listener := pipes{make(chan net.Conn), make(chan struct{})}
	server := &http.Server{Handler: handler}
	go server.Serve(listener)
	f := newFetcher(limits)
	f.transport.DialContext = func(ctx context.Context, _, _ string) (net.Conn, error) {
		client, origin := net.Pipe()
		select {
		case listener.conns <- origin:
			return client, nil
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	t.Cleanup(func() {
		f.transport.CloseIdleConnections()
		server.Close()
	})
	return f
}

// drip sends size bytes each time that a period has passed.
func drip(size int, period time.Duration) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		for {
			w.Write(make([]byte, size))
			w.(http.Flusher).Flush()
			select {
			case <-time.After(period):
			case <-r.Context().Done():
				return
			}
		}
	}
}

func silent(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }

func TestFetchDeadlines(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		timeout time.Duration
		handler http.HandlerFunc
		code    string
		after   time.Duration
	}{
		"no header":                            {time.Minute, silent, "timeout", headerTimeout},
		"no header, and less time than that":   {3 * time.Second, silent, "timeout", 3 * time.Second},
		"a body that stops":                    {time.Minute, drip(100, time.Hour), "too_slow", paceWindow},
		"a byte a second":                      {time.Minute, drip(1, time.Second), "too_slow", paceWindow},
		"just below the least rate":            {time.Minute, drip(1023, time.Second), "too_slow", paceWindow},
		"above the least rate, but not enough": {time.Minute, drip(2048, time.Second), "timeout", time.Minute},
		"fast at first, then stopped": {time.Minute, func(w http.ResponseWriter, r *http.Request) {
			w.Write(make([]byte, 500_000))
			drip(1, time.Second)(w, r)
		}, "too_slow", paceWindow},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				f := pipedFetcher(t, fetchLimits{MaxBytes: 1 << 20, Timeout: test.timeout}, test.handler)
				start := time.Now()
				data, err := f.Fetch(t.Context(), "http://example.com/")
				e := wantFailure(t, data, err, test.code, false)
				if test.after == test.timeout && !strings.Contains(e.Detail, test.timeout.String()) {
					t.Errorf("detail %q does not say %v", e.Detail, test.timeout)
				}
				if took := time.Since(start); took != test.after {
					t.Errorf("took %v, want %v", took, test.after)
				}
			})
		})
	}
}

func TestFetchSlowButFastEnough(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		const size = 30_000
		f := pipedFetcher(t, fetchLimits{MaxBytes: 1 << 20, Timeout: time.Minute}, func(w http.ResponseWriter, _ *http.Request) {
			for range size / 1500 {
				w.Write(make([]byte, 1500))
				w.(http.Flusher).Flush()
				<-time.After(time.Second)
			}
		})
		if data, err := f.Fetch(t.Context(), "http://example.com/"); err != nil || len(data) != size {
			t.Errorf("%d bytes, %v", len(data), err)
		}
	})
}

func TestFetchTakesFourAtOnceFromAHost(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var arrived atomic.Int32
		leave, done := make(chan struct{}), make(chan error)
		f := pipedFetcher(t, fetchLimits{MaxBytes: 10, Timeout: hostPatience}, func(w http.ResponseWriter, r *http.Request) {
			if r.Host != "other.test" {
				arrived.Add(1)
				<-leave
			}
			io.WriteString(w, "png")
		})
		fetch := func(ctx context.Context, url string) {
			go func() { _, err := f.Fetch(ctx, url); done <- err }()
			synctest.Wait()
		}
		finish := func(count int) {
			t.Helper()
			for range count {
				leave <- struct{}{}
				if err := <-done; err != nil {
					t.Error(err)
				}
			}
			synctest.Wait()
		}
		for range 4 {
			fetch(t.Context(), "http://example.com/")
		}
		fetch(t.Context(), "http://EXAMPLE.com.:80/other") // the same host
		if n := arrived.Load(); n != 4 {
			t.Fatalf("%d downloads at once", n)
		}
		fetch(t.Context(), "http://other.test/")
		if err := <-done; err != nil {
			t.Errorf("another host: %v", err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		fetch(ctx, "http://example.com/")
		cancel()
		if err := <-done; err != context.Canceled {
			t.Errorf("cancelled while it waited: %v", err)
		}
		<-time.After(hostPatience * 7 / 10)
		finish(1)
		if n := arrived.Load(); n != 5 {
			t.Fatalf("%d downloads begun when one had ended, want 5", n)
		}
		finish(3)
		<-time.After(hostPatience * 7 / 10) // more than Timeout since the fifth began to wait
		finish(1)
		if len(f.hosts) != 0 {
			t.Errorf("hosts remembered: %v", f.hosts)
		}
	})
}

// A host whose downloads do not end is busy: who wants another one is sent away
// rather than kept waiting, until one of them has ended.
func TestFetchFromABusyHost(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		leave, done := make(chan struct{}), make(chan error)
		f := pipedFetcher(t, fetchLimits{MaxBytes: 10, Timeout: time.Minute}, func(w http.ResponseWriter, r *http.Request) {
			if r.Host != "other.test" {
				<-leave
			}
			io.WriteString(w, "png")
		})
		fetch := func(url string) {
			go func() { _, err := f.Fetch(t.Context(), url); done <- err }()
			synctest.Wait()
		}
		for range maxHostDownloads {
			fetch("http://slow.test/")
		}
		start := time.Now()
		fetch("http://slow.test/")
		if err := <-done; err != errHostBusy || time.Since(start) != hostPatience {
			t.Errorf("the fifth: %v after %v", err, time.Since(start))
		}
		fetch("http://slow.test/")
		if err := <-done; err != errHostBusy || time.Since(start) != hostPatience {
			t.Errorf("the sixth: %v after %v", err, time.Since(start))
		}
		fetch("http://other.test/")
		if err := <-done; err != nil {
			t.Errorf("another host: %v", err)
		}
		leave <- struct{}{}
		if err := <-done; err != nil {
			t.Error(err)
		}
		fetch("http://slow.test/") // has the place that is free
		for range maxHostDownloads {
			leave <- struct{}{}
			if err := <-done; err != nil {
				t.Error(err)
			}
		}
		synctest.Wait()
		if len(f.hosts) != 0 {
			t.Errorf("hosts remembered: %v", f.hosts)
		}
	})
}

func TestFetchCancelledReturnsTheContextsError(t *testing.T) {
	t.Parallel()
	for name, handler := range map[string]http.HandlerFunc{"waiting for the header": silent, "in the body": drip(5000, time.Second)} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				f := pipedFetcher(t, fetchLimits{MaxBytes: 1 << 20, Timeout: time.Minute}, handler)
				ctx, cancel := context.WithTimeout(t.Context(), 4*time.Second)
				defer cancel()
				if _, err := f.Fetch(ctx, "http://example.com/"); err != context.DeadlineExceeded {
					t.Errorf("its deadline over: %v", err)
				}
				stopped, stop := context.WithCancel(t.Context())
				time.AfterFunc(3*time.Second, stop)
				if _, err := f.Fetch(stopped, "http://example.com/"); err != context.Canceled {
					t.Errorf("cancelled: %v", err)
				}
				if _, err := f.Fetch(stopped, "http://example.com/"); err != context.Canceled {
					t.Errorf("cancelled before: %v", err)
				}
			})
		})
	}
}

// losableConn is a connection to a machine that may vanish: nothing arrives there
// any more, and nothing comes, not even an error.
type losableConn struct {
	net.Conn
	lost *atomic.Bool
}

func (c losableConn) Write(data []byte) (int, error) {
	if c.lost.Load() {
		return len(data), nil
	}
	return c.Conn.Write(data)
}

// Who shares a connection with others must not wait on it again and again when
// the machine at its other end is gone.
func TestLostHTTP2ConnectionIsLeft(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var protocols http.Protocols
		protocols.SetUnencryptedHTTP2(true)
		listener := pipes{make(chan net.Conn), make(chan struct{})}
		server := &http.Server{Protocols: &protocols, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, r.Proto) })}
		go server.Serve(listener)
		f := newFetcher(fetchLimits{MaxBytes: 1 << 20, Timeout: time.Minute, AllowPrivate: true})
		f.transport.Protocols = &protocols
		var latest *atomic.Bool
		f.transport.DialContext = func(context.Context, string, string) (net.Conn, error) {
			client, origin := net.Pipe()
			listener.conns <- origin
			latest = new(atomic.Bool)
			return losableConn{client, latest}, nil
		}
		defer server.Close()
		defer f.transport.CloseIdleConnections()
		fetch := func() (string, error) {
			body, err := f.Fetch(t.Context(), "http://origin.example/a.jpg")
			f.Release(body)
			return string(body), err
		}
		if body, err := fetch(); body != "HTTP/2.0" || err != nil {
			t.Fatalf("answered %q, %v", body, err)
		}
		latest.Store(true)
		if body, err := fetch(); err == nil {
			t.Errorf("answered %q by a machine that is gone", body)
		}
		if body, err := fetch(); err != nil {
			t.Errorf("asked again: %q, %v", body, err)
		}
	})
}
