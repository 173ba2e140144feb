package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"regexp"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// carriers are the forms in which an IPv6 address carries an IPv4 address, with
// where each is written down.
func carriers(inner netip.Addr) map[string]netip.Addr {
	v4 := inner.As4()
	n := binary.BigEndian.Uint32(v4[:])
	high, low := n>>16, n&0xffff
	form := func(format string, parts ...any) netip.Addr {
		return netip.MustParseAddr(fmt.Sprintf(format, parts...))
	}
	all := map[string]netip.Addr{
		"mapped (RFC 4291, 2.5.5.2)":                  form("::ffff:%x:%x", high, low),
		"compatible (RFC 4291, 2.5.5.1)":              form("::%x:%x", high, low),
		"translated (RFC 2765)":                       form("::ffff:0:%x:%x", high, low),
		"6to4 (RFC 3056)":                             form("2002:%x:%x::1", high, low),
		"6to4, the relay's own interface":             form("2002:%x:%x::%x:%x", high, low, high, low),
		"Teredo, as server (RFC 4380)":                form("2001:0:%x:%x:8000:ffff:f7f7:f7f7", high, low),
		"Teredo, as client":                           form("2001:0:808:808:8000:ffff:%x:%x", ^high&0xffff, ^low&0xffff),
		"NAT64, well-known prefix (RFC 6052)":         form("64:ff9b::%x:%x", high, low),
		"ISATAP, global (RFC 5214)":                   form("2a00:1450:4001::5efe:%x:%x", high, low),
		"ISATAP, global, universal bit":               form("2a00:1450:4001::200:5efe:%x:%x", high, low),
		"ISATAP, link-local":                          form("fe80::5efe:%x:%x", high, low),
		"ISATAP, unique local":                        form("fd00::5efe:%x:%x", high, low),
		"ISATAP under 6to4":                           form("2002:808:808::5efe:%x:%x", high, low),
		"mapped, in the local NAT64 prefix":           form("64:ff9b:1::ffff:%x:%x", high, low),
		"NAT64, local prefix of 96 bits (RFC 8215)":   form("64:ff9b:1::%x:%x", high, low),
		"NAT64, local prefix, other subnet":           form("64:ff9b:1:fffe::%x:%x", high, low),
		"compatible, with the bits in front switched": form("0:0:0:0:0:0:%x:%x", high, low),
	}
	// RFC 6052, section 2.2: the address within prefixes of 48, 56 and 64 bits,
	// around an octet of zero.
	for _, bits := range []int{48, 56, 64} {
		b := netip.MustParseAddr("64:ff9b:1::").As16()
		at := bits / 8
		for _, octet := range v4 {
			if at == 8 {
				at++
			}
			b[at] = octet
			at++
		}
		all[fmt.Sprintf("NAT64, local prefix of %d bits", bits)] = netip.AddrFrom16(b)
	}
	return all
}

// No form of IPv6 leads to an IPv4 address that is refused itself.
func TestNoCarrierLeadsToAForbiddenAddress(t *testing.T) {
	t.Parallel()
	for _, inner := range []string{"127.0.0.1", "127.255.255.254", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "192.0.0.192", "168.63.129.16", "198.18.0.1", "224.0.0.1", "255.255.255.255"} {
		for form, addr := range carriers(netip.MustParseAddr(inner)) {
			if refuseAddress(addr, false) == "" {
				t.Errorf("%s as %s, %v, is let through", inner, form, addr)
			}
			if err := testLimits.checkDial(netip.AddrPortFrom(addr, 80).String()); errorCode(err) != "forbidden_address" {
				t.Errorf("dialling %s as %s: %v", inner, form, err)
			}
		}
	}
}

func TestPortsThatAreDialled(t *testing.T) {
	t.Parallel()
	private := testLimits
	private.AllowPrivate = true
	for address, code := range map[string]string{
		"8.8.8.8:80": "", "8.8.8.8:443": "", "[2606:4700::1111]:443": "", "8.8.8.8:0": "forbidden_port", "8.8.8.8:22": "forbidden_port", "8.8.8.8:79": "forbidden_port", "8.8.8.8:8080": "forbidden_port",
		"8.8.8.8:65535": "forbidden_port", "[2606:4700::1111]:25": "forbidden_port", "127.0.0.1:22": "forbidden_address", "": "forbidden_address", "8.8.8.8": "forbidden_address", "example.com:80": "forbidden_address",
	} {
		if err := testLimits.checkDial(address); err == nil && code != "" || err != nil && errorCode(err) != code {
			t.Errorf("%s: %v, want %q", address, err, code)
		}
	}
	if err := private.checkDial("8.8.8.8:8080"); err != nil {
		t.Errorf("with AllowPrivate: %v", err)
	}
}

// turning is a name server whose answer is another each time: public first, then
// the canary.
type turning struct{ asked atomic.Int32 }

func (d *turning) dial(ctx context.Context, network, address string) (net.Conn, error) {
	answers := names{"turning.test": {"127.0.0.1"}}
	if d.asked.Add(1) <= 2 { // one for A, one for AAAA
		answers = names{"turning.test": {"8.8.8.8"}}
	}
	return answers.dial(ctx, network, address)
}

// A name may be public when it is looked up first and the canary's at every time
// after that, within one download: what a redirect leads to is judged anew.
func TestFetchOfANameThatTurnsBetweenRedirects(t *testing.T) {
	t.Parallel()
	port := canary(t)
	f := testFetcher(t, testLimits, nil)
	dns := new(turning)
	f.dialer.Resolver = &net.Resolver{PreferGo: true, Dial: dns.dial}
	imageHost(t, f, func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, "http://turning.test:"+port+"/", http.StatusFound)
	})
	data, err := f.Fetch(t.Context(), "http://example.com/")
	wantFailure(t, data, err, "forbidden_port", true) // the first answer was public
	for range 3 {
		data, err = f.Fetch(t.Context(), "http://example.com/")
		wantFailure(t, data, err, "forbidden_address", true)
	}
	if n := dns.asked.Load(); n < 4 {
		t.Errorf("the name server was asked %d times", n)
	}
}

// needsNames tells the URLs that a name server is asked about: those are for the
// tests that have one of their own.
var needsNames = regexp.MustCompile(`(?i)\.test|localhost|[^ -~]`)

// The battery, end to end: what clients see of a forbidden address is its code,
// after one attempt, and nothing is sent.
func TestHostileOriginsEndToEnd(t *testing.T) {
	t.Parallel()
	port := canary(t)
	var targets []string
	for _, code := range []string{"forbidden_address", "forbidden_port"} {
		for _, target := range hostileURLs[code] {
			if !needsNames.MatchString(target) {
				targets = append(targets, strings.ReplaceAll(target, "PORT", port))
			}
		}
	}
	for _, inner := range []string{"127.0.0.1", "169.254.169.254"} {
		for _, addr := range carriers(netip.MustParseAddr(inner)) {
			targets = append(targets, fmt.Sprintf("http://[%v]:%s/", addr, port))
		}
	}
	if len(targets) < 60 {
		t.Errorf("%d targets", len(targets))
	}
	api := start(t, environment(map[string]string{"DATA_DIR": t.TempDir(), "IMAGE_ALLOW_PRIVATE": "false", "RETRY_BASE": "5m"}))
	for batch := range slices.Chunk(targets, maxImages) {
		p := api.settled(t, api.post(t, batch...).ID)
		for _, image := range p.Images {
			if image.Status != "failed" || image.Attempts != 1 || image.Error == nil || image.Error.Code != "forbidden_address" && image.Error.Code != "forbidden_port" {
				t.Errorf("%s: %s after %d attempts, %+v", image.Source, image.Status, image.Attempts, image.Error)
			} else if image.Error.Code == "forbidden_port" && !strings.Contains(image.Source, "8.8.8.8") && !strings.Contains(image.Source, "2606:4700") {
				t.Errorf("%s was refused by its port alone", image.Source)
			}
		}
	}
}

// h2Frame is a frame of HTTP/2 (RFC 9113, section 4.1).
func h2Frame(kind, flags byte, stream uint32, payload string) string {
	head := append([]byte{byte(len(payload) >> 16), byte(len(payload) >> 8), byte(len(payload)), kind, flags}, binary.BigEndian.AppendUint32(nil, stream)...)
	return string(head) + payload
}

const h2Data, h2Headers, h2Settings, h2Ping = 0, 1, 4, 6 // types of frames

// pingWithoutEnd begins an answer to the first request, then sends PINGs for as long
// as the client takes them, and reads none of what it says to them.
func pingWithoutEnd(conn net.Conn) {
	defer conn.Close()
	if conn.(*tls.Conn).NetConn().(*net.TCPConn).SetReadBuffer(4<<10) != nil {
		return
	}
	if _, err := io.CopyN(io.Discard, conn, int64(len("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"))); err != nil {
		return
	}
	for head := make([]byte, 9); head[3] != h2Headers; {
		if _, err := io.ReadFull(conn, head); err != nil {
			return
		}
		if _, err := io.CopyN(io.Discard, conn, int64(binary.BigEndian.Uint32(head)>>8)); err != nil {
			return
		}
	}
	const endHeaders, status200 = 4, "\x88"
	_, err := io.WriteString(conn, h2Frame(h2Settings, 0, 0, "")+h2Frame(h2Headers, endHeaders, 1, status200)+h2Frame(h2Data, 0, 1, "x"))
	for pings := strings.Repeat(h2Frame(h2Ping, 0, 0, "12345678"), 100); err == nil; {
		_, err = io.WriteString(conn, pings)
	}
}

// pinger is a host that pings without end. The client trusts its certificate.
func pinger(t *testing.T, f *fetcher) (url string) {
	t.Helper()
	certified := httptest.NewTLSServer(nil)
	certified.Close()
	f.transport.TLSClientConfig = &tls.Config{RootCAs: x509.NewCertPool()}
	f.transport.TLSClientConfig.RootCAs.AddCert(certified.Certificate())
	listener, err := tls.Listen("tcp4", "127.0.0.1:0", &tls.Config{Certificates: certified.TLS.Certificates, NextProtos: []string{"h2"}})
	if err != nil {
		t.Fatal(err)
	}
	var serving sync.WaitGroup
	serving.Go(func() {
		for conn, err := listener.Accept(); err == nil; conn, err = listener.Accept() {
			t.Cleanup(func() { conn.Close() })
			serving.Go(func() { pingWithoutEnd(conn) })
		}
	})
	t.Cleanup(serving.Wait)
	t.Cleanup(func() { listener.Close() })
	return "https://" + listener.Addr().String() + "/"
}

// A host that asks without end and reads nothing holds a download, or a webhook, no
// longer than one that is silent.
func TestHostsThatReadNothingHoldNobody(t *testing.T) {
	t.Parallel()
	for name, call := range map[string]func(f *fetcher, url string) error{
		"download": func(f *fetcher, url string) error { _, err := f.Fetch(t.Context(), url); return err },
		"webhook": func(f *fetcher, url string) error {
			return f.Post(t.Context(), url, http.Header{}, []byte("{}")) // its body waits to be written behind the answers to PINGs
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			limits := testLimits
			limits.AllowPrivate, limits.Timeout = true, time.Second
			f := testFetcher(t, limits, nil)
			f.writeTimeout = time.Second
			url := pinger(t, f)
			done := make(chan error, 1)
			go func() { done <- call(f, url) }()
			select {
			case err := <-done:
				t.Logf("it ended with %v", err)
			case <-time.After(20 * time.Second):
				t.Error("it is held")
			}
		})
	}
}
