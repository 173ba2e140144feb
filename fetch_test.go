package main

import (
	"bytes"
	"compress/gzip"
	"context"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"os"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
	"unicode/utf8"
)

// testLimits are those of the public internet, with a time and size for tests.
var testLimits = fetchLimits{MaxBytes: 1 << 20, Timeout: 20 * time.Second}

// names is a name server: what it does not hold does not exist, and a name
// without addresses makes it fail.
type names map[string][]string

// testFetcher returns a fetcher that looks names up in dns alone.
func testFetcher(t *testing.T, limits fetchLimits, dns names) *fetcher {
	t.Helper()
	f := newFetcher(limits)
	f.dialer.Resolver = &net.Resolver{PreferGo: true, Dial: dns.dial}
	t.Cleanup(f.transport.CloseIdleConnections)
	return f
}

// dial connects to the name server. It speaks DNS as over TCP, two bytes of
// length before each message, which is what the resolver does on a net.Pipe.
func (n names) dial(context.Context, string, string) (net.Conn, error) {
	client, server := net.Pipe()
	go func() { // ends when the resolver closes its side
		defer server.Close()
		for {
			var size [2]byte
			if _, err := io.ReadFull(server, size[:]); err != nil {
				return
			}
			query := make([]byte, binary.BigEndian.Uint16(size[:]))
			if _, err := io.ReadFull(server, query); err != nil {
				return
			}
			answer := n.answer(query)
			server.Write(append(binary.BigEndian.AppendUint16(nil, uint16(len(answer))), answer...))
		}
	}()
	return client, nil
}

// answer makes the reply to a query of one question (RFC 1035 section 4).
func (n names) answer(query []byte) []byte {
	const header, typeA, typeAAAA = 12, 1, 28
	end := header
	var labels []string
	for query[end] != 0 {
		size := int(query[end])
		labels = append(labels, string(query[end+1:end+1+size]))
		end += 1 + size
	}
	question := query[header : end+5]
	wanted := binary.BigEndian.Uint16(query[end+1:])
	addrs, found := n[strings.ToLower(strings.Join(labels, "."))]
	status := byte(0)
	switch {
	case !found:
		status = 3 // no such name
	case len(addrs) == 0:
		status = 2 // server failure
	}
	var count uint16
	var records []byte
	for _, text := range addrs {
		addr := netip.MustParseAddr(text)
		if addr.Is4() != (wanted == typeA) || wanted != typeA && wanted != typeAAAA {
			continue
		}
		count++
		records = append(records, 0xc0, header) // the question's name
		records = binary.BigEndian.AppendUint16(records, wanted)
		records = append(records, 0, 1, 0, 0, 0, 0) // internet, no time to live
		records = binary.BigEndian.AppendUint16(records, uint16(len(addr.AsSlice())))
		records = append(records, addr.AsSlice()...)
	}
	reply := append([]byte{query[0], query[1], 0x81, 0x80 | status, 0, 1}, byte(count>>8), byte(count), 0, 0, 0, 0)
	return append(append(reply, question...), records...)
}

// imageHost makes f reach handler at http://example.com/, whose address would be a
// public one. All else that f dials goes the guarded way.
func imageHost(t *testing.T, f *fetcher, handler http.HandlerFunc) {
	t.Helper()
	server := httptest.NewServer(handler)
	t.Cleanup(server.Close)
	divert(f, "example.com:80", server.Listener.Addr().String())
}

func divert(f *fetcher, from, to string) {
	dial := f.transport.DialContext
	f.transport.DialContext = func(ctx context.Context, network, address string) (net.Conn, error) {
		if address == from {
			return (&net.Dialer{}).DialContext(ctx, network, to)
		}
		return dial(ctx, network, address)
	}
}

// canary returns the port of a listener on 127.0.0.1 that nothing may connect to.
func canary(t *testing.T) string {
	t.Helper()
	listener, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		defer listener.Close()
		// The kernel queues connections in order, so all before our own are others'.
		own, err := net.Dial("tcp4", listener.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer own.Close()
		for {
			conn, err := listener.Accept()
			if err != nil {
				t.Fatal(err)
			}
			conn.Close()
			if conn.RemoteAddr().String() == own.LocalAddr().String() {
				return
			}
			t.Errorf("the canary was reached from %v", conn.RemoteAddr())
		}
	})
	_, port, _ := net.SplitHostPort(listener.Addr().String())
	return port
}

// raw answers with exactly these bytes and closes the connection.
func raw(answer string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		conn, _, err := w.(http.Hijacker).Hijack()
		if err != nil {
			panic(err)
		}
		io.WriteString(conn, answer)
		conn.Close()
	}
}

// wantFailure checks that err is an imageError of that code and nothing came with it.
func wantFailure(t *testing.T, data []byte, err error, code string, permanent bool) *imageError {
	t.Helper()
	var e *imageError
	if !errors.As(err, &e) || e.Code != code || e.Permanent != permanent || data != nil {
		t.Fatalf("%d bytes, error %v; want %s, permanent = %v", len(data), err, code, permanent)
	}
	if e.Detail == "" || len(e.Detail) > 200 || strings.Contains(e.Detail, "secret") {
		t.Errorf("detail is %q", e.Detail)
	}
	return e
}

// hostileURLs go to the canary where a host can: PORT is its port.
var hostileURLs = map[string][]string{
	"forbidden_address": {
		"http://127.0.0.1:PORT/a.png", "http://127.0.0.1/", "https://127.0.0.1:PORT/", "http://127.0.0.2:PORT/",
		"http://127.255.255.254/", "http://0.0.0.0:PORT/", "http://0.1.2.3/", "http://[::]:PORT/", "http://[::1]:PORT/",
		"http://[::ffff:127.0.0.1]:PORT/", "http://[::ffff:7f00:1]:PORT/", "http://[0:0:0:0:0:ffff:0a00:1]/",
		"http://[::127.0.0.1]:PORT/", "http://[::ffff:0:127.0.0.1]:PORT/", "http://[64:ff9b::127.0.0.1]:PORT/",
		"http://[64:ff9b::a9fe:a9fe]/", "http://[64:ff9b:1::127.0.0.1]/", "http://[64:ff9b:1:7f00:0:100::]/",
		"http://[2002:7f00:1::]:PORT/", "http://[2002:a9fe:a9fe::1]/", "http://[2002:808:808::1]/",
		"http://[2001:0:4136:e378:8000:63bf:80ff:fffe]/", "http://[2001:0:7f00:1::f7f7:f7f7]/",
		"http://[2a00:1450::5efe:127.0.0.1]:PORT/", "http://[2a00:1450::200:5efe:127.0.0.1]:PORT/",
		"http://[fe80::5efe:10.0.0.1]/", "http://[fe80::200:5efe:8.8.8.8]/",
		"http://10.0.0.1/", "http://10.255.255.255/", "http://172.16.0.1/", "http://172.31.255.255/",
		"http://192.168.0.1/", "http://169.254.169.254/latest/meta-data/", "http://169.254.170.2/v2/credentials",
		"http://100.64.0.1/", "http://100.100.100.200/latest/meta-data/", "http://192.0.0.192/opc/v2/",
		"http://168.63.129.16/machine", "http://192.0.2.1/", "http://198.18.0.1/", "http://198.51.100.1/",
		"http://203.0.113.1/", "http://192.88.99.1/", "http://224.0.0.1/", "http://239.255.255.250/",
		"http://240.0.0.1/", "http://255.255.255.255/", "http://[fc00::1]/", "http://[fd00:ec2::254]/",
		"http://[fe80::1]/", "http://[fe80::1%25lo]:PORT/", "http://[::1%25lo]:PORT/", "http://[fec0::1]/",
		"http://[ff02::1]/", "http://[2001:db8::1]/", "http://[100::1]/", "http://[3fff::1]/", "http://[5f00::1]/",
		"http://[4000::1]/", "http://[2001:2::1]/", "http://[2001:20::1]/",
		// spellings that some resolver takes for 127.0.0.1
		"http://127.1:PORT/", "http://2130706433:PORT/", "http://0x7f000001:PORT/", "http://0x7f.0.0.1:PORT/",
		"http://0177.0.0.1:PORT/", "http://127.0.0.1.:PORT/", "http://１２７.０.０.１:PORT/", "http://①②⑦.0.0.1:PORT/",
		// names
		"http://localhost:PORT/", "http://rebind.test:PORT/", "http://REBIND.test.:PORT/", "http://both.test:PORT/",
		"http://mapped.test:PORT/", "http://metadata.test/", "https://rebind.test:PORT/",
	},
	"forbidden_port": {
		"http://8.8.8.8:22/", "https://8.8.8.8:6379/", "http://8.8.8.8:81/", "http://[2606:4700::1111]:8080/",
		"http://public.test:25/", "http://public.test:65535/", "http://public.test:1/",
	},
	"bad_url": {
		"", "a.png", "/a.png", "//127.0.0.1:PORT/", "http:", "http://", "http:///a.png", "http://:80/", "http:127.0.0.1:PORT",
		"file:///etc/passwd", "ftp://127.0.0.1:PORT/", "gopher://127.0.0.1:PORT/_x", "data:image/png;base64,AAAA",
		"javascript:alert(1)", "unix:///run/x.sock", "http+unix://x/", "http://user@127.0.0.1:PORT/",
		"http://user:secret@127.0.0.1:PORT/", "http://@127.0.0.1:PORT/", "http://127.0.0.1:0/", "http://127.0.0.1:65536/",
		"http://127.0.0.1:-1/", "http://127.0.0.1:x/", "http://127.0.0.1:PORT:80/", "http://127.0.0.1: 80/",
		" http://127.0.0.1:PORT/", "http://127.0.0.1:PORT/a b.png", "http://127.0.0.1:PORT/\ta", "http://127.0.0.1:PORT/\r\nX: y",
		"http://127.0.0.1:PORT/\x00", "http://127.0.0.1:PORT/\x7f", "http://127.0.0.1:PORT/\u0085", "http://127.0.0.1:PORT/\u00a0",
		"http://127.0.0.1:PORT/\u2028", "http://127.0.0.1:PORT/\xff", "http://127.0.0.1%00:PORT/", "http://%31%32%37.0.0.1:PORT/",
		"http://127.0.0.1:PORT/%zz", `http:\\127.0.0.1:PORT\`, `http://example.com\@127.0.0.1:PORT/`, "http://[127.0.0.1]:PORT/",
		"http://[::1", "http://[::1]x/", "http://::1/", "http://[]/", "http://[localhost]:PORT/",
		"http://%ff.example.com/", "http://a%C2%85.example.com/", "http://a%e2%80%a8.example.com/", "http://a%c2%a0.example.com/",
		"http://127.0.0.1:PORT/" + strings.Repeat("a", maxURLBytes),
	},
}

func TestFetchSendsNothingToForbiddenPlaces(t *testing.T) {
	t.Parallel()
	port := canary(t)
	f := testFetcher(t, testLimits, names{
		"rebind.test":   {"127.0.0.1"},
		"both.test":     {"127.0.0.1", "::1", "10.0.0.1", "fd00::1"},
		"mapped.test":   {"::ffff:127.0.0.1"},
		"metadata.test": {"169.254.169.254"},
		"public.test":   {"8.8.8.8", "2606:4700::1111"},
		"localhost":     {"127.0.0.1", "::1"},
	})
	for code, urls := range hostileURLs {
		for _, hostile := range urls {
			hostile = strings.ReplaceAll(hostile, "PORT", port)
			t.Run(fmt.Sprintf("%s %.60q", code, hostile), func(t *testing.T) {
				data, err := f.Fetch(t.Context(), hostile)
				wantFailure(t, data, err, code, true)
				if _, err := parseURL(hostile); (err != nil) != (code == "bad_url") {
					t.Errorf("parseURL says %v", err)
				}
			})
		}
	}
}

// A name that was public when it was looked up first is judged by what it is
// at the time of each connection.
func TestFetchJudgesANameAnewAtEachConnection(t *testing.T) {
	t.Parallel()
	port := canary(t)
	dns := names{"turning.test": {"8.8.8.8"}}
	f := testFetcher(t, testLimits, dns)
	target := "http://turning.test:" + port + "/"
	data, err := f.Fetch(t.Context(), target)
	wantFailure(t, data, err, "forbidden_port", true) // the address itself was fine
	dns["turning.test"] = []string{"127.0.0.1"}
	data, err = f.Fetch(t.Context(), target)
	e := wantFailure(t, data, err, "forbidden_address", true)
	if strings.Contains(e.Detail, "127") {
		t.Errorf("detail %q shows what the name leads to", e.Detail)
	}
}

func TestFetchWithAllowPrivate(t *testing.T) {
	t.Parallel()
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "png") }))
	t.Cleanup(server.Close)
	port := server.URL[strings.LastIndexByte(server.URL, ':'):]
	gone := httptest.NewServer(nil)
	gone.Close()
	limits := testLimits
	limits.AllowPrivate = true
	f := testFetcher(t, limits, names{
		"home.test":  {"127.0.0.1"},
		"mixed.test": {"100.64.0.1", "127.0.0.1"}, // one of the two never is permitted
		"cgnat.test": {"100.64.0.1"},
		"fails.test": nil,
	})
	for _, host := range []string{"127.0.0.1", "home.test", "mixed.test", "[::ffff:127.0.0.1]"} {
		if data, err := f.Fetch(t.Context(), "http://"+host+port+"/"); err != nil || string(data) != "png" {
			t.Errorf("%s: %q, %v", host, data, err)
		}
	}
	closed := gone.URL[strings.LastIndexByte(gone.URL, ':'):]
	for target, code := range map[string]string{
		"http://127.0.0.1" + closed:         "connection_refused",
		"http://fails.test/":                "dns_error",
		"http://nowhere.test/":              "dns_not_found",
		"http://" + strings.Repeat("a", 80): "dns_not_found",
	} {
		data, err := f.Fetch(t.Context(), target)
		wantFailure(t, data, err, code, false)
	}
	data, err := f.Fetch(t.Context(), "http://cgnat.test"+port)
	wantFailure(t, data, err, "forbidden_address", true)
}

// Of a name's addresses the refused one is tried first and its error is the one
// that the dialler reports; the name is not forbidden all the same.
func TestFetchFromANameOfWhichOneAddressIsPermitted(t *testing.T) {
	t.Parallel()
	f := testFetcher(t, testLimits, names{"mixed.test": {"127.0.0.1", "8.8.8.8"}})
	// From a loopback address the kernel connects to nothing outside: no packet leaves.
	f.dialer.LocalAddr = &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)}
	data, err := f.Fetch(t.Context(), "http://mixed.test/")
	wantFailure(t, data, err, "unreachable", false)
}

// A process that has no file descriptor left puts the image off, be it the resolver
// that needs one or the connection.
func TestLackOfSocketsIsNotTheImagesFault(t *testing.T) {
	t.Parallel()
	for _, lack := range []error{syscall.EMFILE, syscall.ENFILE, syscall.ENOBUFS} {
		fails := func(context.Context, string, string) (net.Conn, error) {
			return nil, os.NewSyscallError("socket", lack)
		}
		resolving, connecting := testFetcher(t, testLimits, nil), testFetcher(t, testLimits, nil)
		resolving.dialer.Resolver.Dial, connecting.transport.DialContext = fails, fails
		for what, f := range map[string]*fetcher{"resolving": resolving, "connecting": connecting} {
			if _, err := f.Fetch(t.Context(), "http://a.example/"); !errors.Is(err, errNoSocket) || !errors.Is(err, errPutOff) {
				t.Errorf("%s with %v: %v", what, lack, err)
			}
		}
	}
}

func TestFetchRedirects(t *testing.T) {
	t.Parallel()
	port := canary(t)
	f := testFetcher(t, testLimits, names{"rebind.test": {"127.0.0.1"}})
	imageHost(t, f, func(w http.ResponseWriter, r *http.Request) {
		hops, _ := strconv.Atoi(strings.TrimPrefix(r.URL.Path, "/hops/"))
		switch {
		case r.URL.Path == "/to":
			w.Header()["Location"] = r.URL.Query()["url"]
			w.WriteHeader(http.StatusFound)
			io.WriteString(w, "secret")
		case r.URL.Path == "/loop":
			http.Redirect(w, r, "/loop", http.StatusMovedPermanently)
		case hops > 0:
			http.Redirect(w, r, fmt.Sprintf("/hops/%d", hops-1), http.StatusTemporaryRedirect)
		default:
			io.WriteString(w, "arrived")
		}
	})
	if data, err := f.Fetch(t.Context(), "http://example.com/hops/5"); err != nil || string(data) != "arrived" {
		t.Errorf("5 redirects: %q, %v", data, err)
	}
	to := func(target string) string { return "/to?url=" + url.QueryEscape(target) }
	for path, code := range map[string]string{
		"/hops/6": "too_many_redirects", "/loop": "too_many_redirects", "/to": "bad_redirect", to(""): "bad_redirect",
		to("file:///etc/passwd"): "bad_redirect", to("gopher://127.0.0.1:" + port): "bad_redirect",
		to("//user:secret@example.com/hops/0"): "bad_redirect", to("http://[::1"): "bad_redirect", to("http://"): "bad_redirect", to("http://%ff.example.com/"): "bad_redirect",
		to("http://example.com:0/"): "bad_redirect", to("//example.com:22/"): "dns_not_found",
		to("http://8.8.8.8:22/"): "forbidden_port", to("http://127.0.0.1:" + port + "/secret"): "forbidden_address",
		to("//[::ffff:127.0.0.1]:" + port): "forbidden_address", to("http://127.1:" + port): "forbidden_address",
		to("http://rebind.test:" + port): "forbidden_address", to("https://rebind.test:" + port): "forbidden_address",
		to("http://169.254.169.254/latest/meta-data/"):           "forbidden_address",
		to("/to?url=" + url.QueryEscape("http://0.0.0.0:"+port)): "forbidden_address",
	} {
		t.Run(path, func(t *testing.T) {
			data, err := f.Fetch(t.Context(), "http://example.com"+path)
			wantFailure(t, data, err, code, code != "dns_not_found")
		})
	}
}

func TestFetchOverTLS(t *testing.T) {
	t.Parallel()
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/down" {
			http.Redirect(w, r, "http://example.com/", http.StatusFound)
			return
		}
		io.WriteString(w, r.Proto)
	}))
	server.EnableHTTP2 = true
	server.Config.ErrorLog = log.New(io.Discard, "", 0) // of the handshakes that are to fail
	server.StartTLS()
	t.Cleanup(server.Close)

	f := testFetcher(t, testLimits, nil)
	divert(f, "example.com:443", server.Listener.Addr().String())
	divert(f, "other.test:443", server.Listener.Addr().String())
	data, err := f.Fetch(t.Context(), "https://example.com/")
	if e := wantFailure(t, data, err, "tls_error", false); !strings.Contains(e.Detail, "trusted") {
		t.Errorf("an unknown issuer: %q", e.Detail)
	}

	config := f.transport.TLSClientConfig
	config.RootCAs = x509.NewCertPool()
	config.RootCAs.AddCert(server.Certificate())
	if data, err := f.Fetch(t.Context(), "https://example.com/"); err != nil || string(data) != "HTTP/2.0" {
		t.Errorf("%q, %v", data, err)
	}
	data, err = f.Fetch(t.Context(), "https://example.com/down")
	wantFailure(t, data, err, "bad_redirect", true)
	data, err = f.Fetch(t.Context(), "https://other.test/")
	if e := wantFailure(t, data, err, "tls_error", false); !strings.Contains(e.Detail, "another host") {
		t.Errorf("another host's certificate: %q", e.Detail)
	}
	plain := httptest.NewServer(raw("secret"))
	t.Cleanup(plain.Close)
	divert(f, "plain.test:443", plain.Listener.Addr().String())
	data, err = f.Fetch(t.Context(), "https://plain.test/")
	wantFailure(t, data, err, "tls_error", false)
}

func TestFetchSizes(t *testing.T) {
	t.Parallel()
	const limit = 100_000
	chunked := func(size int) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) {
			w.(http.Flusher).Flush()
			w.Write(make([]byte, size))
		}
	}
	whole := func(size int) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Length", strconv.Itoa(size))
			w.Write(make([]byte, size))
		}
	}
	endless := func(w http.ResponseWriter, r *http.Request) {
		for junk := make([]byte, 32<<10); r.Context().Err() == nil; {
			if _, err := w.Write(junk); err != nil {
				return
			}
		}
	}
	const head = "HTTP/1.1 200 OK\r\n"
	for name, test := range map[string]struct {
		handler   http.HandlerFunc
		size      int
		code      string
		permanent bool
	}{
		"the limit":                     {whole(limit), limit, "", false},
		"the limit, chunked":            {chunked(limit), limit, "", false},
		"one byte":                      {whole(1), 1, "", false},
		"no length, ends by closing":    {raw(head + "\r\nimage"), 5, "", false},
		"more than its length":          {raw(head + "Content-Length: 3\r\n\r\nimage"), 3, "", false},
		"one over":                      {whole(limit + 1), 0, "too_large", true},
		"one over, chunked":             {chunked(limit + 1), 0, "too_large", true},
		"endless":                       {endless, 0, "too_large", true},
		"nothing but a length":          {raw(head + "Content-Length: 9000000000\r\n\r\n"), 0, "too_large", true},
		"empty":                         {whole(0), 0, "empty_body", true},
		"empty, chunked":                {chunked(0), 0, "empty_body", true},
		"shorter than its length":       {raw(head + "Content-Length: 50\r\n\r\nsecret"), 0, "truncated", false},
		"none of its length":            {raw(head + "Content-Length: 50\r\n\r\n"), 0, "truncated", false},
		"a chunk cut off":               {raw(head + "Transfer-Encoding: chunked\r\n\r\n40\r\nsecret"), 0, "truncated", false},
		"chunks that do not end":        {raw(head + "Transfer-Encoding: chunked\r\n\r\n6\r\nsecret\r\n"), 0, "truncated", false},
		"a chunk of no size":            {raw(head + "Transfer-Encoding: chunked\r\n\r\nsecret\r\n"), 0, "bad_response", false},
		"a header cut off":              {raw(head + "X-Secret: secr"), 0, "truncated", false},
		"two lengths":                   {raw(head + "Content-Length: 3\r\nContent-Length: 4\r\n\r\nabcd"), 0, "bad_response", false},
		"a negative length":             {raw(head + "Content-Length: -1\r\n\r\nabcd"), 0, "bad_response", false},
		"a header that is too long":     {raw(head + "X: " + strings.Repeat("secret", 20_000)), 0, "bad_response", false},
		"not HTTP":                      {raw("SSH-2.0-secret\r\n"), 0, "bad_response", false},
		"closed without an answer":      {raw(""), 0, "connection_reset", false},
		"an answer to another question": {raw("HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n"), 0, "http_101", true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			limits := testLimits
			limits.MaxBytes = limit
			f := testFetcher(t, limits, nil)
			imageHost(t, f, test.handler)
			data, err := f.Fetch(t.Context(), "http://example.com/")
			if test.code != "" {
				wantFailure(t, data, err, test.code, test.permanent)
			} else if err != nil || len(data) != test.size {
				t.Errorf("%d bytes, %v; want %d", len(data), err, test.size)
			}
		})
	}
}

func TestFetchConnectionReset(t *testing.T) {
	t.Parallel()
	f := testFetcher(t, testLimits, nil)
	imageHost(t, f, func(w http.ResponseWriter, _ *http.Request) {
		w.Write(make([]byte, 10))
		w.(http.Flusher).Flush()
		conn, _, _ := w.(http.Hijacker).Hijack()
		conn.(*net.TCPConn).SetLinger(0) // closing resets
		conn.Close()
	})
	data, err := f.Fetch(t.Context(), "http://example.com/")
	wantFailure(t, data, err, "connection_reset", false)
}

func TestFetchStatuses(t *testing.T) {
	t.Parallel()
	f := testFetcher(t, testLimits, nil)
	imageHost(t, f, func(w http.ResponseWriter, r *http.Request) {
		code, _ := strconv.Atoi(r.URL.Path[1:])
		w.Header().Set("Retry-After", "7")
		w.WriteHeader(code)
		if code != http.StatusNoContent && code != http.StatusNotModified {
			io.WriteString(w, "secret")
		}
	})
	for code, test := range map[int]struct {
		detail    string
		permanent bool
	}{
		201: {"201 Created", true}, 204: {"204 No Content", true}, 206: {"206 Partial Content", true},
		300: {"300 Multiple Choices", true}, 304: {"304 Not Modified", true}, 305: {"305 Use Proxy", true},
		400: {"400 Bad Request", true}, 401: {"401 Unauthorized", true}, 403: {"403 Forbidden", true},
		404: {"404 Not Found", true}, 410: {"410 Gone", true}, 451: {"451 Unavailable For Legal Reasons", true},
		408: {"408 Request Timeout", false}, 425: {"425 Too Early", false}, 429: {"429 Too Many Requests", false},
		500: {"500 Internal Server Error", false}, 502: {"502 Bad Gateway", false}, 503: {"503 Service Unavailable", false},
		504: {"504 Gateway Timeout", false}, 599: {"599", false}, 600: {"600", true}, 999: {"999", true},
	} {
		t.Run(strconv.Itoa(code), func(t *testing.T) {
			data, err := f.Fetch(t.Context(), fmt.Sprintf("http://example.com/%d", code))
			e := wantFailure(t, data, err, fmt.Sprintf("http_%d", code), test.permanent)
			wantWait := 7 * time.Second
			if test.permanent {
				wantWait = 0
			}
			if e.Detail != test.detail || e.RetryAfter != wantWait {
				t.Errorf("detail %q, retry after %v; want %q, %v", e.Detail, e.RetryAfter, test.detail, wantWait)
			}
		})
	}
}

func TestRetryAfter(t *testing.T) {
	t.Parallel()
	now := time.Date(2026, 11, 24, 12, 0, 0, 0, time.UTC)
	for header, want := range map[string]time.Duration{
		"": 0, "0": 0, "120": 2 * time.Minute, "3600": time.Hour, "3601": time.Hour,
		"99999999999999999999999": time.Hour, "-1": 0, "1.5": 0, "soon": 0, "0x10": 0,
		"Tue, 24 Nov 2026 12:05:00 GMT": 5 * time.Minute, "Tuesday, 24-Nov-26 12:05:00 GMT": 5 * time.Minute,
		"Tue Nov 24 12:05:00 2026": 5 * time.Minute, "Tue, 24 Nov 2026 11:00:00 GMT": 0,
		"Fri, 31 Dec 9999 23:59:59 GMT": time.Hour, "Tue, 24 Nov 2026 12:05:00 CET": 0,
	} {
		if got := retryAfter(header, now); got != want {
			t.Errorf("%q is %v, want %v", header, got, want)
		}
	}
}

// What is sent tells nothing but what is asked for, and nothing is unpacked.
func TestFetchRequestAndGzipBomb(t *testing.T) {
	t.Parallel()
	var bomb bytes.Buffer
	packer := gzip.NewWriter(&bomb)
	packer.Write(make([]byte, 8<<20))
	packer.Close()

	f := testFetcher(t, testLimits, nil)
	imageHost(t, f, func(w http.ResponseWriter, r *http.Request) {
		for name := range r.Header {
			if name != "Accept" && name != "User-Agent" {
				t.Errorf("the request for %s has the header %s: %s", r.URL, name, r.Header.Get(name))
			}
		}
		if r.Method != http.MethodGet || r.Header.Get("User-Agent") != fetchUserAgent || r.Header.Get("Accept") != fetchAccept {
			t.Errorf("%s with %v", r.Method, r.Header)
		}
		if r.URL.Path == "/" {
			http.SetCookie(w, &http.Cookie{Name: "id", Value: "1", Path: "/"})
			http.Redirect(w, r, "/bomb", http.StatusFound)
			return
		}
		w.Header().Set("Content-Encoding", "gzip")
		w.Write(bomb.Bytes())
	})
	if data, err := f.Fetch(t.Context(), "http://example.com/"); err != nil || !bytes.Equal(data, bomb.Bytes()) {
		t.Errorf("%d bytes, %v; want the %d that were sent", len(data), err, bomb.Len())
	}
}

func TestFetchIgnoresTheEnvironmentsProxy(t *testing.T) {
	proxy := "http://127.0.0.1:" + canary(t)
	for _, name := range []string{"HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy", "ALL_PROXY"} {
		t.Setenv(name, proxy)
	}
	f := testFetcher(t, testLimits, nil)
	imageHost(t, f, func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "direct") })
	if data, err := f.Fetch(t.Context(), "http://example.com/"); err != nil || string(data) != "direct" {
		t.Errorf("%q, %v", data, err)
	}
	if f.transport.Proxy != nil { // net/http reads the environment once a process, perhaps before this test
		t.Error("there is a Proxy function")
	}
}

func TestURLsThatAreFine(t *testing.T) {
	t.Parallel()
	for _, fine := range []string{
		"http://example.com", "https://example.com/a.jpg", "HTTPS://EXAMPLE.COM:8443/a?b=c&d=%20#e", "http://127.0.0.1:9000/x",
		"http://[::1]:8080/", "http://[fe80::1%25eth0]/", "http://localhost/", "http://münchen.example/ä.png", "http://m%C3%BCnchen.example/", "http://a_b.example/",
		"http://example.com:/", "http://example.com:65535/", "https://cdn.example/" + strings.Repeat("a", maxURLBytes-20),
	} {
		if _, err := parseURL(fine); err != nil {
			t.Errorf("%.80q: %v", fine, err)
		}
	}
}

// FuzzCheckImageURL holds what passes against the plain words of the rules.
func FuzzCheckImageURL(f *testing.F) {
	for _, urls := range hostileURLs {
		for _, hostile := range urls {
			f.Add(strings.ReplaceAll(hostile, "PORT", "8080"))
		}
	}
	for _, fine := range []string{"https://example.com/a.jpg", "http://[::1]:8080/a?b#c", "http://münchen.example/"} {
		f.Add(fine)
	}
	f.Fuzz(func(t *testing.T, raw string) {
		if _, err := parseURL(raw); err != nil {
			return
		}
		u, err := url.Parse(raw)
		if err != nil || u.Hostname() == "" || u.User != nil || len(raw) > maxURLBytes {
			t.Fatalf("%q passes: %+v, %v", raw, u, err)
		}
		if lower := strings.ToLower(raw); !strings.HasPrefix(lower, "http://") && !strings.HasPrefix(lower, "https://") {
			t.Fatalf("%q passes with another scheme", raw)
		}
		if strings.ContainsAny(raw, " \t\r\n\x00\x7f") || strings.ToValidUTF8(raw, "") != raw {
			t.Fatalf("%q passes with forbidden characters", raw)
		}
		if !utf8.ValidString(u.Host) || strings.ContainsFunc(u.Host, isSpaceOrControl) {
			t.Fatalf("%q passes with host %q", raw, u.Host)
		}
		if n, err := strconv.Atoi(u.Port()); u.Port() != "" && (err != nil || n < 1 || n > 65535) {
			t.Fatalf("%q passes with port %q", raw, u.Port())
		}
		if _, err := http.NewRequest(http.MethodGet, u.String(), nil); err != nil {
			t.Fatalf("%q passes but cannot be requested: %v", raw, err)
		}
	})
}
