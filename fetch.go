package main

import (
	"cmp"
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
	"unicode"
	"unicode/utf8"

	"golang.org/x/sync/semaphore"
)

const (
	maxURLBytes        = 2048
	maxRedirects       = 5
	maxHostDownloads   = 4           // at once, so that a slow host cannot take all workers
	hostPatience       = time.Second // without the end of any of them, and the host is busy
	maxRetryAfter      = time.Hour
	connectTimeout     = 10 * time.Second // and as much again for the TLS handshake
	headerTimeout      = 10 * time.Second // from the request to the end of the answer's header
	maxHeaderBytes     = 64 << 10
	originWriteTimeout = 10 * time.Second // of each write; see boundedWrites
	originPingTimeout  = 4 * time.Second  // of silence on an HTTP/2 connection, and as much again for the answer to a PING
	idleTimeout        = 30 * time.Second
	maxIdle            = 64
	fetchUserAgent     = "pms/1 (product image fetcher)"
	fetchAccept        = "image/jpeg, image/png, image/webp, image/gif, */*;q=0.1"
	paceWindow         = 10 * time.Second
	minBytesPerWindow  = 10 << 10 // 1 KiB/s, slower than any link that serves shoppers
)

// fetchLimits bounds one download.
type fetchLimits struct {
	MaxBytes     int64         // of the body
	Timeout      time.Duration // from the first dial to the last byte, redirects included
	Memory       int64         // that all bodies in hand may hold, but MaxBytes at least; see freeBytes
	AllowPrivate bool          // loopback, private and link-local addresses and any port; for development
}

// fetcher downloads the images that strangers give URLs of. Nothing that a URL,
// a name server or an origin says makes it connect to an address that
// refuseAddress refuses, because the socket is checked before it connects.
type fetcher struct {
	limits       fetchLimits
	dialer       net.Dialer
	transport    *http.Transport
	writeTimeout time.Duration
	room         *semaphore.Weighted // bytes that bodies in hand hold

	mu    sync.Mutex
	hosts map[string]*hostSlots // of the hosts with a download in work or waiting
}

// errHostBusy says that a host has as many downloads in work as it may have, and
// is slow with them. It is no failure of the image, which may come again later.
var errHostBusy = fmt.Errorf("%w: the host is busy with other downloads", errPutOff)

// errNoSocket says that this process, or its machine, can open no more connections.
var errNoSocket = fmt.Errorf("%w: no socket can be opened", errPutOff)

// hostSlots counts the downloads of one host.
type hostSlots struct {
	taken chan struct{} // holds one element a download in work
	users int           // in work or waiting; guarded by fetcher.mu
	since time.Time     // the zero of moved, on a clock that nobody sets
	moved atomic.Int64  // when a download last began or ended, in nanoseconds
}

func (s *hostSlots) move() { s.moved.Store(int64(time.Since(s.since))) }

// patience is how much longer to wait for a download to end.
func (s *hostSlots) patience() time.Duration {
	return hostPatience - (time.Since(s.since) - time.Duration(s.moved.Load()))
}

// newFetcher returns a fetcher that needs no closing: its idle connections
// close by themselves.
func newFetcher(limits fetchLimits) *fetcher {
	f := &fetcher{
		limits:       limits,
		dialer:       net.Dialer{Timeout: connectTimeout},
		writeTimeout: originWriteTimeout,
		room:         semaphore.NewWeighted(max(limits.Memory, limits.MaxBytes)),
		hosts:        map[string]*hostSlots{},
	}
	f.transport = &http.Transport{
		Proxy:                  nil, // behind a proxy the check would see only the proxy's address
		DialContext:            f.dial,
		ForceAttemptHTTP2:      true, // a DialContext of our own turns it off otherwise
		TLSHandshakeTimeout:    connectTimeout,
		ResponseHeaderTimeout:  headerTimeout,
		MaxResponseHeaderBytes: maxHeaderBytes,
		DisableCompression:     true, // a small body must not grow behind the count
		MaxIdleConns:           maxIdle,
		MaxIdleConnsPerHost:    maxHostDownloads,
		IdleConnTimeout:        idleTimeout,
		// Else every try goes to a connection that died unnoticed: requests that time out
		// close none of HTTP/2.
		HTTP2: &http.HTTP2Config{SendPingTimeout: originPingTimeout, PingTimeout: originPingTimeout},
	}
	return f
}

// Fetch downloads url whole; the caller must release the body. What the origin or
// the URL is to blame for is an *imageError. When ctx ends Fetch returns ctx's error
// as it is, when the host is busy errHostBusy, when there is no memory errNoRoom, and
// when there is no file descriptor errNoSocket.
func (f *fetcher) Fetch(ctx context.Context, url string) ([]byte, error) {
	u, err := parseURL(url)
	if err != nil {
		return nil, permanent("bad_url", "the URL %v", err)
	}
	release, err := f.acquire(ctx, hostKey(u))
	if err != nil {
		return nil, err
	}
	defer release()
	timed, cancel := context.WithTimeout(ctx, f.limits.Timeout)
	defer cancel()
	data, err := f.follow(timed, u)
	if err != nil && ctx.Err() != nil {
		return nil, ctx.Err() // whatever it looked like, a shutdown is not the image's fault
	}
	return data, err
}

// acquire waits for one of the host's slots, as long as they are given back in
// time: who waits for a slow host keeps others from their work. The caller must
// call release.
func (f *fetcher) acquire(ctx context.Context, host string) (release func(), err error) {
	f.mu.Lock()
	slots := f.hosts[host]
	if slots == nil {
		slots = &hostSlots{taken: make(chan struct{}, maxHostDownloads), since: time.Now()}
		f.hosts[host] = slots
	}
	slots.users++
	f.mu.Unlock()

	if err := slots.take(ctx); err != nil {
		f.leave(host, slots)
		return nil, err
	}
	return func() { slots.move(); <-slots.taken; f.leave(host, slots) }, nil
}

// take takes a slot that is free, or becomes free before the host counts as busy.
func (s *hostSlots) take(ctx context.Context) error {
	select {
	case s.taken <- struct{}{}:
		s.move()
		return nil
	default:
	}
	timer := time.NewTimer(s.patience())
	defer timer.Stop()
	for {
		select {
		case s.taken <- struct{}{}:
			s.move()
			return nil
		case <-ctx.Done():
			return ctx.Err()
		case <-timer.C:
		}
		more := s.patience()
		if more <= 0 {
			return errHostBusy
		}
		timer.Reset(more)
	}
}

// leave forgets the host with its last user, so that the map does not grow.
func (f *fetcher) leave(host string, slots *hostSlots) {
	f.mu.Lock()
	defer f.mu.Unlock()
	slots.users--
	if slots.users == 0 {
		delete(f.hosts, host)
	}
}

// hostKey is what downloads are counted by: host:port, whatever the scheme.
func hostKey(u *url.URL) string {
	return net.JoinHostPort(hostName(u.Hostname()), portOf(u))
}

// hostName is the form of a host's name in which equal ones are equal.
func hostName(name string) string { return strings.TrimSuffix(strings.ToLower(name), ".") }

func portOf(u *url.URL) string {
	port := "80"
	if u.Scheme == "https" {
		port = "443"
	}
	return cmp.Or(u.Port(), port)
}

// sourceHost is what an image's source is found by: host and port of its URL. A
// URL that has none, which the API does not let in, is of the host "".
func sourceHost(source string) (host string, port int) {
	u, err := parseURL(source)
	if err != nil {
		return "", 0
	}
	port, _ = strconv.Atoi(portOf(u)) // checked by parseURL
	return hostName(u.Hostname()), port
}

// follow gets u and what it redirects to.
func (f *fetcher) follow(ctx context.Context, u *url.URL) ([]byte, error) {
	for range 1 + maxRedirects {
		data, next, err := f.get(ctx, u)
		if next == nil || err != nil {
			return data, err
		}
		u = next
	}
	return nil, permanent("too_many_redirects", "more than %d redirects", maxRedirects)
}

// get asks for u once. It returns the body or the URL that u redirects to. It
// uses the transport without http.Client, which would add a Referer and
// follow redirects by rules of its own.
func (f *fetcher) get(ctx context.Context, u *url.URL) (data []byte, next *url.URL, err error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil)
	if err != nil {
		return nil, nil, permanent("bad_url", "the URL cannot be requested")
	}
	req.Header.Set("User-Agent", fetchUserAgent)
	req.Header.Set("Accept", fetchAccept)
	resp, err := f.transport.RoundTrip(req)
	if err != nil {
		return nil, nil, f.downloadError(ctx, u, err)
	}
	defer resp.Body.Close()
	switch resp.StatusCode {
	case http.StatusOK:
	case http.StatusMovedPermanently, http.StatusFound, http.StatusSeeOther,
		http.StatusTemporaryRedirect, http.StatusPermanentRedirect:
		next, err = redirectTarget(u, resp.Header.Get("Location"))
		return nil, next, err
	default:
		return nil, nil, statusError(resp)
	}
	data, err = f.read(ctx, resp, cancel)
	if _, known := errors.AsType[*imageError](err); err != nil && !known && !errors.Is(err, errNoRoom) {
		err = f.downloadError(ctx, u, err)
	}
	return data, nil, err
}

// redirectTarget is where a redirect from u leads. Its address is checked, as
// any, when it is dialled.
func redirectTarget(u *url.URL, location string) (*url.URL, error) {
	if location == "" {
		return nil, permanent("bad_redirect", "a redirect without a target")
	}
	next, err := u.Parse(location)
	if err != nil {
		return nil, permanent("bad_redirect", "a redirect to what is not a URL")
	}
	if err := checkTarget(next); err != nil {
		return nil, permanent("bad_redirect", "the URL of a redirect %v", err)
	}
	if u.Scheme == "https" && next.Scheme != "https" {
		return nil, permanent("bad_redirect", "a redirect from https to http")
	}
	return next, nil
}

// statusError is the failure that an answer other than 200 is. Of the answer
// it shows nothing but the number: the rest is the origin's text.
func statusError(resp *http.Response) error {
	code := resp.StatusCode
	e := &imageError{
		Code:   fmt.Sprintf("http_%03d", code),
		Detail: strings.TrimSpace(fmt.Sprintf("%03d %s", code, http.StatusText(code))),
	}
	switch {
	case code == http.StatusRequestTimeout, code == http.StatusTooEarly,
		code == http.StatusTooManyRequests, code >= 500 && code <= 599:
		e.RetryAfter = retryAfter(resp.Header.Get("Retry-After"), time.Now())
	default:
		e.Permanent = true
	}
	return e
}

// retryAfter reads a Retry-After header (RFC 9110 section 10.2.3): seconds or a
// date. What is neither, or has passed, is 0.
func retryAfter(header string, now time.Time) time.Duration {
	const most = uint64(maxRetryAfter / time.Second)
	seconds, err := strconv.ParseUint(header, 10, 64)
	if err == nil || errors.Is(err, strconv.ErrRange) { // out of range it is the greatest uint64
		return time.Duration(min(seconds, most)) * time.Second
	}
	at, err := http.ParseTime(header)
	if err != nil {
		return 0
	}
	return min(max(at.Sub(now), 0), maxRetryAfter)
}

// read takes the body in, and calls cancel when it comes too slowly.
func (f *fetcher) read(ctx context.Context, resp *http.Response, cancel context.CancelCauseFunc) ([]byte, error) {
	limit := f.limits.MaxBytes
	if resp.ContentLength > limit {
		return nil, permanent("too_large", "%d bytes, more than the %d allowed", resp.ContentLength, limit)
	}
	pace := newPaceReader(resp.Body, cancel)
	defer pace.timer.Stop()
	most := limit
	if resp.ContentLength >= 0 {
		most = resp.ContentLength // more than that net/http does not let through
	}
	body, err := f.readBody(ctx, pace, most+1) // one more, so that its end is seen
	switch {
	case err != nil:
		return nil, fmt.Errorf("read body: %w", err)
	case int64(len(body)) > limit:
		f.Release(body)
		return nil, permanent("too_large", "more than the %d bytes allowed", limit)
	case len(body) == 0:
		return nil, permanent("empty_body", "the answer has no content")
	}
	return body, nil
}

// paceReader cancels a download when fewer than minBytesPerWindow came in a
// paceWindow. A window begins when the one before has its bytes, so a fast
// origin is never held against what it sent earlier.
type paceReader struct {
	body  io.Reader
	got   int // in this window
	timer *time.Timer
}

// newPaceReader starts the first window. The caller stops the timer.
func newPaceReader(body io.Reader, cancel context.CancelCauseFunc) *paceReader {
	return &paceReader{body: body, timer: time.AfterFunc(paceWindow, func() {
		cancel(transient("too_slow", "less than %d KiB in %v", minBytesPerWindow>>10, paceWindow))
	})}
}

func (p *paceReader) Read(b []byte) (int, error) {
	n, err := p.body.Read(b)
	p.got += n
	if p.got >= minBytesPerWindow {
		p.got = 0
		p.timer.Reset(paceWindow)
	}
	return n, err
}

// dial connects to an address that checkDial permits. It asks in Control: a
// name's addresses are known by then, and what is checked is what is
// connected to, so a name server has no second answer to give.
func (f *fetcher) dial(ctx context.Context, network, address string) (net.Conn, error) {
	host, _, err := net.SplitHostPort(address)
	if err != nil || isOddIPv4(host) {
		return nil, permanent("forbidden_address", "not an address in the usual form")
	}
	var permitted atomic.Bool
	dialer := f.dialer
	dialer.Control = func(_, address string, _ syscall.RawConn) error {
		err := f.limits.checkDial(address)
		if err == nil {
			permitted.Store(true)
		}
		return err
	}
	conn, err := dialer.DialContext(ctx, network, address)
	if _, refused := errors.AsType[*imageError](err); refused && permitted.Load() {
		// Dial reports the first of several addresses; this one was not all there was.
		return nil, transient("unreachable", "no permitted address of %s answers", host)
	}
	if err != nil {
		return nil, err
	}
	return boundedWrites{conn, f.writeTimeout}, nil
}

// boundedWrites is a connection that fails a write which the other side does not
// take in time. HTTP/2 and TLS answer what an origin sends (a PING, a KeyUpdate)
// under locks that reading, closing and the end of a context wait for too: without
// a bound an origin that asks and does not read would hold a download for ever.
type boundedWrites struct {
	net.Conn
	timeout time.Duration
}

func (c boundedWrites) Write(b []byte) (int, error) {
	if err := c.SetWriteDeadline(time.Now().Add(c.timeout)); err != nil {
		return 0, err
	}
	return c.Conn.Write(b)
}

// downloadError tells what err, met while u was asked for or read, means for
// the image. The text of err stays out of it: it may hold addresses of our
// network and lines that the origin sent.
func (f *fetcher) downloadError(ctx context.Context, u *url.URL, err error) error {
	host := u.Hostname()
	var known *imageError
	var dns *net.DNSError
	var netErr net.Error
	switch {
	case errors.As(err, &known), errors.As(context.Cause(ctx), &known):
		return known
	case ctx.Err() != nil:
		return transient("timeout", "not complete within %v", f.limits.Timeout)
	case lacksSocket(err):
		return fmt.Errorf("%w: connect to %s: %w", errNoSocket, host, err)
	case errors.As(err, &dns) && dns.IsNotFound:
		return transient("dns_not_found", "no host is named %s", host)
	case errors.As(err, &dns):
		return transient("dns_error", "the name %s could not be looked up", host)
	case errors.As(err, &netErr) && netErr.Timeout():
		return transient("timeout", "%s did not answer in time", host)
	case errors.Is(err, syscall.ECONNREFUSED):
		return transient("connection_refused", "%s refused the connection", host)
	case errors.Is(err, syscall.ECONNRESET), errors.Is(err, syscall.EPIPE), errors.Is(err, io.EOF):
		return transient("connection_reset", "%s broke the connection off", host)
	case errors.Is(err, syscall.EHOSTUNREACH), errors.Is(err, syscall.ENETUNREACH):
		return transient("unreachable", "%s cannot be reached", host)
	case errors.Is(err, io.ErrUnexpectedEOF):
		return transient("truncated", "the answer ended before it was complete")
	case strings.Contains(err.Error(), "tls: "): // as all of crypto/tls begin, most with no type
		return transient("tls_error", "%s", tlsDetail(err))
	}
	return transient("bad_response", "%s did not answer in proper HTTP", host)
}

// lacksSocket says that an error is ours. Of what the resolver met net keeps but
// the text.
func lacksSocket(err error) bool {
	var dns *net.DNSError
	isDNS := errors.As(err, &dns)
	return slices.ContainsFunc([]error{syscall.EMFILE, syscall.ENFILE, syscall.ENOBUFS}, func(lack error) bool {
		return errors.Is(err, lack) || isDNS && strings.Contains(dns.Err, lack.Error())
	})
}

// tlsDetail names the faults of a certificate that its owner can mend.
func tlsDetail(err error) string {
	var invalid x509.CertificateInvalidError
	var issuer x509.UnknownAuthorityError
	var name x509.HostnameError
	switch {
	case errors.As(err, &invalid) && invalid.Reason == x509.Expired:
		return "the certificate has expired or is not valid yet"
	case errors.As(err, &issuer):
		return "the certificate is not from a trusted issuer"
	case errors.As(err, &name):
		return "the certificate is for another host"
	}
	return "no TLS connection could be made"
}

// parseURL checks a URL that a client gives, of an image or a webhook. Where it leads
// is no matter here: that is found out when it is called.
func parseURL(raw string) (*url.URL, error) {
	switch {
	case raw == "":
		return nil, errors.New("must not be empty")
	case len(raw) > maxURLBytes:
		return nil, fmt.Errorf("must be at most %d bytes, has %d", maxURLBytes, len(raw))
	case !utf8.ValidString(raw) || strings.ContainsFunc(raw, isSpaceOrControl):
		return nil, errors.New("must not contain spaces, control characters or invalid UTF-8")
	}
	u, err := url.Parse(raw)
	if err != nil {
		return nil, errors.New("must be a valid URL")
	}
	return u, checkTarget(u)
}

func isSpaceOrControl(r rune) bool { return unicode.IsSpace(r) || unicode.IsControl(r) }

// checkTarget holds for what a client gives and for what a redirect gives.
func checkTarget(u *url.URL) error {
	switch {
	case u.Scheme != "http" && u.Scheme != "https":
		return errors.New("must begin with http:// or https://")
	case u.User != nil:
		return errors.New("must not contain a user name or password")
	case u.Hostname() == "":
		return errors.New("must have a host")
	case !utf8.ValidString(u.Host) || strings.ContainsFunc(u.Host, isSpaceOrControl): // they may have been percent-encoded
		return errors.New("must have a host without spaces, control characters or invalid UTF-8")
	case !validPort(u.Port()):
		return errors.New("must have a port from 1 to 65535")
	}
	return nil
}

func validPort(port string) bool {
	if port == "" {
		return true // the scheme's own
	}
	n, err := strconv.ParseUint(port, 10, 16)
	return err == nil && n > 0
}
