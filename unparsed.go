package main

import (
	"bytes"
	"cmp"
	"log/slog"
	"net"
	"net/http"
	"strconv"
	"sync/atomic"
)

// What is not HTTP/1.1 as it should be, net/http answers itself, in plain text,
// and no handler hears of it: a malformed line, headers that are too large, a
// transfer coding or a version that it does not know, an expectation. Here, on
// the way to the client, these answers become what all other errors are: problem
// documents, with a request id, counted and logged. The statuses 501 and 505 become
// 400, for the mistake is the client's: a stranger is not to make it look as if
// the server failed.

// unparsedListener makes its connections answer so.
type unparsedListener struct {
	net.Listener
	server *server
}

func (l unparsedListener) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if tcp, ok := conn.(*net.TCPConn); ok {
		return &unparsedConn{TCPConn: tcp, server: l.server}, nil
	}
	return conn, err
}

// unparsedConn embeds the TCP connection, so that net/http finds all its methods.
type unparsedConn struct {
	*net.TCPConn
	server *server
	begun  atomic.Bool // an answer is on its way
}

// answered is a hook of net/http: when a connection is idle, its answer has gone
// out, and what is written next begins another one.
func answered(conn net.Conn, state http.ConnState) {
	if c, ok := conn.(*unparsedConn); ok && state == http.StateIdle {
		c.begun.Store(false)
	}
}

// Write looks at the beginning of an answer alone: what follows may be a body,
// whose bytes others chose. It relies on net/http to write an answer of its own
// whole, in one call, which TestHostileRequests sees to.
func (c *unparsedConn) Write(data []byte) (int, error) {
	if c.begun.Swap(true) {
		return c.TCPConn.Write(data)
	}
	status := statusOfUnparsed(data)
	if status == 0 {
		return c.TCPConn.Write(data)
	}
	if _, err := c.TCPConn.Write(c.server.answerUnparsed(status, c.RemoteAddr())); err != nil {
		return 0, err
	}
	return len(data), nil
}

// plainErrorHeader is the whole header of net/http's own errors. None of the
// program's answers begins like that, since they have a request id.
const plainErrorHeader = "Content-Type: text/plain; charset=utf-8\r\nConnection: close\r\n\r\n"

// statusOfUnparsed is the status of data if it is an answer of net/http's own,
// else 0.
func statusOfUnparsed(data []byte) int {
	text, found := bytes.CutPrefix(data, []byte("HTTP/1.1 "))
	if !found || len(text) < 3 {
		return 0
	}
	status, err := strconv.Atoi(string(text[:3]))
	if err != nil || status < 400 {
		return 0
	}
	_, header, _ := bytes.Cut(text, []byte("\r\n"))
	if status == http.StatusExpectationFailed || bytes.HasPrefix(header, []byte(plainErrorHeader)) {
		return status
	}
	return 0
}

// unparsedDetails says what was wrong, by net/http's status.
var unparsedDetails = map[int]string{
	http.StatusExpectationFailed:           "the only expectation that is met is 100-continue",
	http.StatusRequestHeaderFieldsTooLarge: "the request line and headers must have at most " + strconv.Itoa(maxRequestHeader>>10) + " KiB",
	http.StatusNotImplemented:              "the only transfer coding that is understood is chunked",
	http.StatusHTTPVersionNotSupported:     "the only versions that are understood are HTTP/1.1 and HTTP/1.0",
}

// answerUnparsed makes the whole answer to a request that could not be read.
func (s *server) answerUnparsed(status int, remote net.Addr) []byte {
	detail := cmp.Or(unparsedDetails[status], "the request is not well-formed HTTP")
	if status >= 500 {
		status = http.StatusBadRequest
	}
	p := problemFor(&httpError{status, detail}, origin{RequestID: newRequestID()})
	unrouted.count(p.Status, 0)
	s.log.Info("request", slog.String("request_id", p.RequestID), slog.Int("status", p.Status), slog.String("remote", remote.String()))
	body := encodeJSON(p)
	var out bytes.Buffer
	out.WriteString("HTTP/1.1 " + strconv.Itoa(p.Status) + " " + p.Title + "\r\n")
	header := http.Header{
		"Connection": {"close"}, "Content-Length": {strconv.Itoa(len(body))}, "Content-Type": {"application/problem+json"},
		"Content-Security-Policy": headerNoContent, "X-Content-Type-Options": headerNosniff, "X-Request-Id": {p.RequestID},
	}
	header.Write(&out) // a buffer takes everything
	out.WriteString("\r\n")
	out.Write(body)
	return out.Bytes()
}
