package main

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

// 500 clients that send a byte now and then, and 500 connections on which
// nothing but the beginning of a request ever comes, slow down nobody else: the
// 99th percentile of a good client's reads is that of a server without them, or
// twice that at most.
//
// In a test run 1,000 reads of each must show it once in five tries, since a machine
// that does something else meanwhile may spoil one. "make slow-clients" takes
// SLOW_CLIENTS_READS, enough of them to see connections end and come again
// many times, and has one try.
func TestSlowClientsSlowDownNobodyElse(t *testing.T) {
	// Not parallel: it measures.
	const each = 500
	reads, tries := 1000, 5
	if given := os.Getenv("SLOW_CLIENTS_READS"); given != "" {
		n, err := strconv.Atoi(given)
		if err != nil {
			t.Fatal(err)
		}
		reads, tries = n, 1
	}
	var servers [2]*instance
	for n := range servers {
		servers[n] = startBinary(t, environment(map[string]string{"DATA_DIR": t.TempDir(), "LOG_LEVEL": "info", "MAX_REQUESTS": strconv.Itoa(each / 2)}))
		servers[n].post(t)
	}
	quiet, attacked := servers[0], servers[1]
	ctx, stop := context.WithCancel(t.Context())
	var attackers sync.WaitGroup
	defer attackers.Wait()
	defer stop()
	var begun sync.WaitGroup
	for n := range each {
		begun.Add(2)
		attackers.Go(func() { attack(ctx, attacked, begun.Done, "GET /products/1 HTTP/1.1\r\nHost: x\r\nX: y", 0) })
		attackers.Go(func() {
			half := n%2 == 0 // half of them are slow with the header, half with the body
			begin := "POST /products HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n"
			if half {
				begin += "\r\n{"
			}
			attack(ctx, attacked, begun.Done, begin, time.Second)
		})
	}
	begun.Wait()
	var ratios []string
	for range tries {
		idle, busy := slowestReads(t, reads, quiet, attacked)
		ratio := float64(busy) / float64(idle)
		if ratio <= 2 {
			t.Logf("with %d slow clients and %d half-open connections the 99th percentile of GET is %v, %.2f of the %v without", each, each, busy, ratio, idle)
			return
		}
		ratios = append(ratios, fmt.Sprintf("%.2f (%v to %v)", ratio, idle, busy))
	}
	t.Errorf("the 99th percentile of GET is %s times that without slow clients", strings.Join(ratios, ", "))
}

// attack connects again and again. Each time it sends the beginning of a request,
// and a letter each pause, if that is not 0, until the server has enough of it.
func attack(ctx context.Context, on *instance, begun func(), begin string, pause time.Duration) {
	begun = sync.OnceFunc(begun)
	defer begun()
	for ctx.Err() == nil {
		conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", strings.TrimPrefix(on.url, "http://"))
		if err != nil {
			continue
		}
		closed := make(chan struct{})
		go func() { // ends with the connection
			defer close(closed)
			io.Copy(io.Discard, conn)
		}()
		io.WriteString(conn, begin)
		begun()
		dripInto(ctx, conn, closed, pause)
		conn.Close()
		<-closed
	}
}

func dripInto(ctx context.Context, conn net.Conn, closed <-chan struct{}, pause time.Duration) {
	var tick <-chan time.Time
	if pause > 0 {
		ticker := time.NewTicker(pause)
		defer ticker.Stop()
		tick = ticker.C
	}
	for {
		select {
		case <-tick:
			io.WriteString(conn, "x")
		case <-closed:
			return
		case <-ctx.Done():
			return
		}
	}
}

// slowestReads reads a product from two servers in turn, and answers the 99th
// percentile of each.
func slowestReads(t *testing.T, reads int, one, other *instance) (first, second time.Duration) {
	t.Helper()
	var times [2][]time.Duration
	for range reads {
		for n, i := range []*instance{one, other} {
			start := time.Now()
			if status := statusOf(i.url + "/products/1"); status != http.StatusOK {
				t.Fatalf("a good client got the status %d", status)
			}
			times[n] = append(times[n], time.Since(start))
		}
	}
	for n := range times {
		slices.Sort(times[n])
	}
	return times[0][reads*99/100], times[1][reads*99/100]
}
