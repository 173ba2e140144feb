package main

import (
	"errors"
	"io"
	"net"
	"os"
	"strconv"
	"sync"
	"syscall"
	"testing"
	"time"
)

// tcpProxy stands between a client and a server and breaks the line on demand.
type tcpProxy struct {
	Addr   string // host:port for clients; the same through Cut and Restore
	target string

	mu       sync.Mutex
	listener net.Listener // nil when cut
	conns    map[net.Conn]bool
	flowing  chan struct{} // closed while bytes may pass
	wg       sync.WaitGroup
}

// startProxy forwards a free loopback port to target until the test ends.
func startProxy(t testing.TB, target string) *tcpProxy {
	t.Helper()
	p := &tcpProxy{target: target, conns: map[net.Conn]bool{}, flowing: make(chan struct{})}
	close(p.flowing)
	// Not port 0: Restore could find a port from the system's own range taken.
	port, err := freePort()
	if err != nil {
		t.Fatal(err)
	}
	p.Addr = net.JoinHostPort("127.0.0.1", strconv.Itoa(port))
	p.Restore(t)
	t.Cleanup(func() {
		p.Cut()
		p.wg.Wait()
	})
	return p
}

// Cut closes all connections and refuses new ones.
func (p *tcpProxy) Cut() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for conn := range p.conns {
		conn.Close()
	}
	p.release()
	if p.listener == nil {
		return
	}
	p.listener.Close()
	p.listener = nil
	// A process that another test is just starting may hold a copy of the
	// listening socket between fork and exec, and take connections with it.
	pollUntil(time.Now().Add(stopTimeout), func() bool {
		conn, err := net.Dial("tcp", p.Addr)
		if err == nil {
			conn.Close()
		}
		return err != nil
	})
}

// Reset breaks all connections off with a TCP reset, and accepts new ones.
func (p *tcpProxy) Reset() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for conn := range p.conns {
		if tcp, ok := conn.(*net.TCPConn); ok {
			tcp.SetLinger(0)
		}
		conn.Close()
	}
}

// Stall lets no byte through, either way, and keeps connections open; new ones
// are accepted and go nowhere. What was sent meanwhile arrives after Restore.
func (p *tcpProxy) Stall() {
	p.mu.Lock()
	defer p.mu.Unlock()
	select {
	case <-p.flowing:
		p.flowing = make(chan struct{})
	default: // stalled already
	}
}

// Restore undoes Cut and Stall.
func (p *tcpProxy) Restore(t testing.TB) {
	t.Helper()
	p.mu.Lock()
	defer p.mu.Unlock()
	p.release()
	if p.listener != nil {
		return
	}
	var l net.Listener
	var err error
	if !pollUntil(time.Now().Add(stopTimeout), func() bool { // see Cut
		l, err = net.Listen("tcp", p.Addr)
		return err == nil
	}) {
		t.Fatalf("restore proxy: %v", err)
	}
	p.listener = l
	p.wg.Go(func() { p.serve(l) })
}

// release lets bytes pass again; p.mu is held.
func (p *tcpProxy) release() {
	select {
	case <-p.flowing:
	default:
		close(p.flowing)
	}
}

// serve accepts connections until Cut closes the listener.
func (p *tcpProxy) serve(l net.Listener) {
	for {
		client, err := l.Accept()
		if err != nil {
			return
		}
		if p.track(l, client) {
			p.wg.Go(func() { p.forward(l, client) })
		}
	}
}

// track remembers a connection for Cut. It closes and refuses one that came
// through a listener that was cut meanwhile.
func (p *tcpProxy) track(l net.Listener, conn net.Conn) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.listener != l {
		conn.Close()
		return false
	}
	p.conns[conn] = true
	return true
}

func (p *tcpProxy) drop(conn net.Conn) {
	p.mu.Lock()
	defer p.mu.Unlock()
	conn.Close()
	delete(p.conns, conn)
}

// forward joins a client to the target until either side closes.
func (p *tcpProxy) forward(l net.Listener, client net.Conn) {
	defer p.drop(client)
	p.awaitFlow()
	server, err := net.Dial("tcp", p.target)
	if err != nil || !p.track(l, server) {
		return
	}
	defer p.drop(server)
	var pair sync.WaitGroup
	pair.Go(func() { p.pump(server, client) })
	pair.Go(func() { p.pump(client, server) })
	pair.Wait()
}

// pump copies one way while bytes may pass, and closes both ends at the end.
func (p *tcpProxy) pump(dst, src net.Conn) {
	defer dst.Close()
	defer src.Close()
	buf := make([]byte, 32<<10)
	for {
		n, err := src.Read(buf)
		p.awaitFlow()
		if n > 0 {
			if _, werr := dst.Write(buf[:n]); werr != nil {
				return
			}
		}
		if err != nil {
			return
		}
	}
}

// awaitFlow blocks while the proxy is stalled. Cut and Restore end it.
func (p *tcpProxy) awaitFlow() {
	p.mu.Lock()
	flowing := p.flowing
	p.mu.Unlock()
	<-flowing
}

// startEcho is the address of a server that sends back what it gets.
func startEcho(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer conn.Close()
				io.Copy(conn, conn) // ends with the client
			})
		}
	})
	t.Cleanup(func() {
		l.Close()
		wg.Wait()
	})
	return l.Addr().String()
}

// echo sends a word through conn and says whether it came back in time.
func echo(t *testing.T, conn net.Conn, word string, within time.Duration) bool {
	t.Helper()
	if _, err := io.WriteString(conn, word); err != nil {
		return false
	}
	return hears(t, conn, word, within)
}

func hears(t *testing.T, conn net.Conn, word string, within time.Duration) bool {
	t.Helper()
	if err := conn.SetReadDeadline(time.Now().Add(within)); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, len(word))
	_, err := io.ReadFull(conn, got)
	return err == nil && string(got) == word
}

const (
	soon   = 5 * time.Second       // by then it has come, or never will
	aWhile = 50 * time.Millisecond // by then it would have come
)

func dialProxy(t *testing.T, p *tcpProxy) net.Conn {
	t.Helper()
	conn, err := net.Dial("tcp", p.Addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

// echoing is a connection through the proxy on which there is an echo.
func echoing(t *testing.T, p *tcpProxy) net.Conn {
	t.Helper()
	conn := dialProxy(t, p)
	if !echo(t, conn, "hello", soon) {
		t.Fatal("no echo through the proxy")
	}
	return conn
}

func TestProxyForwards(t *testing.T) {
	t.Parallel()
	echoing(t, startProxy(t, startEcho(t)))
}

func TestProxyCutClosesAndRefusesUntilRestored(t *testing.T) {
	t.Parallel()
	p := startProxy(t, startEcho(t))
	conn := echoing(t, p)
	p.Cut()
	if _, err := conn.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("read after Cut: %v, want a closed connection", err)
	}
	if other, err := net.Dial("tcp", p.Addr); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("dial after Cut: %v, %v, want connection refused", other, err)
	}
	p.Restore(t)
	echoing(t, p)
}

func TestProxyResetBreaksOffAndAcceptsAnew(t *testing.T) {
	t.Parallel()
	p := startProxy(t, startEcho(t))
	conn := echoing(t, p)
	p.Reset()
	if _, err := conn.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("read after Reset: %v, want connection reset", err)
	}
	echoing(t, p)
}

func TestProxyStallHoldsBytesUntilRestored(t *testing.T) {
	t.Parallel()
	p := startProxy(t, startEcho(t))
	old := echoing(t, p)
	p.Stall()
	fresh := dialProxy(t, p)
	for name, conn := range map[string]net.Conn{"old": old, "fresh": fresh} {
		if echo(t, conn, name, aWhile) {
			t.Errorf("the %s connection got an echo while stalled", name)
		}
	}
	p.Restore(t)
	for name, conn := range map[string]net.Conn{"old": old, "fresh": fresh} {
		if !hears(t, conn, name, soon) {
			t.Errorf("the %s connection's word did not arrive after Restore", name)
		}
	}
}

func TestProxyCutEndsStall(t *testing.T) {
	t.Parallel()
	p := startProxy(t, startEcho(t))
	p.Stall()
	conn := dialProxy(t, p)
	p.Cut()
	if err := conn.SetReadDeadline(time.Now().Add(soon)); err != nil {
		t.Fatal(err)
	}
	if _, err := conn.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("read after Cut: %v, want a closed connection", err)
	}
}
