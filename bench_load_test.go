package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"
)

const (
	// loadClientVar makes TestLoadClient, in a process of its own, a client.
	loadClientVar = "PMS_LOAD_CLIENT"

	// loadConnections is how many connections the client has at most.
	loadConnections = 32

	// pacedRate is far below what one of two cores answers, in requests a second.
	pacedRate = 2000
)

// loadClient is what a client is to send, and the status that it must get.
type loadClient struct {
	Addr        string
	Method      string   // GET if it is empty
	Paths       []string // each connection asks for one; with as many of them no two share a read by chance
	Body        string
	Header      http.Header
	Status      int
	Requests    int
	Connections int
	Rate        int    // requests a second; 0: as fast as they are answered
	Result      string // the file for what it has seen
}

// productPaths are those of the first n products.
func productPaths(n int) (paths []string) {
	for id := range n {
		paths = append(paths, productPath(int64(id+1)))
	}
	return paths
}

// loadSeen is what a client has seen: how long its requests took, by percentiles,
// and all of them together.
type loadSeen struct{ P50, P99, Took time.Duration }

// run runs the client in a process of its own until it has sent everything.
func (l loadClient) run(b testing.TB) (seen loadSeen) {
	b.Helper()
	l.Result = filepath.Join(b.TempDir(), "seen")
	spec, err := json.Marshal(l)
	if err != nil {
		b.Fatal(err)
	}
	client := exec.Command(os.Args[0], "-test.run", "^TestLoadClient$")
	client.Env = append(os.Environ(), loadClientVar+"="+string(spec))
	if out, err := client.CombinedOutput(); err != nil {
		b.Fatalf("%v: %s", err, out)
	}
	data, err := os.ReadFile(l.Result)
	if err == nil {
		err = json.Unmarshal(data, &seen)
	}
	if err != nil {
		b.Fatal(err)
	}
	return seen
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
	all := make([][]time.Duration, load.Connections)
	began := time.Now()
	for n := range load.Connections {
		requests := (load.Requests + n) / load.Connections
		group.Go(func() (err error) {
			pace := load.pace(began, n)
			all[n], err = load.send(load.Paths[n%len(load.Paths)], requests, pace)
			return err
		})
	}
	if err := group.Wait(); err != nil {
		t.Fatal(err)
	}
	took := time.Since(began)
	sorted := slices.Sorted(slices.Values(slices.Concat(all...)))
	data, err := json.Marshal(loadSeen{P50: sorted[len(sorted)/2], P99: sorted[len(sorted)*99/100], Took: took})
	if err == nil {
		err = os.WriteFile(load.Result, data, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// pace is when one connection of a paced client is to send.
type pace struct {
	due   time.Time
	every time.Duration // 0: at once
}

// pace spreads the connections over the time between two requests of one.
func (l loadClient) pace(began time.Time, connection int) *pace {
	if l.Rate == 0 {
		return &pace{}
	}
	every := time.Second * time.Duration(l.Connections) / time.Duration(l.Rate)
	return &pace{began.Add(every * time.Duration(connection) / time.Duration(l.Connections)), every}
}

// next waits for the time of the next request and answers when its latency
// begins. That is the time that was due if the answer before came too late for
// it (or a server that stalls would be asked less, and look better for it), but
// not if only this client's timer was late.
func (p *pace) next() time.Time {
	due := p.due
	p.due = due.Add(p.every)
	if p.every == 0 || !time.Now().Before(due) {
		return due
	}
	<-time.After(time.Until(due))
	return time.Now()
}

// send sends n requests, one after the other, over one connection, and answers
// how long each took. It parses the first two answers, the first of which may be
// a miss, and reads as many bytes for each of the others: a client that works as
// hard as the server would keep it from being measured at load.
func (l loadClient) send(path string, n int, pace *pace) (took []time.Duration, err error) {
	conn, err := net.Dial("tcp", l.Addr)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	request, err := http.NewRequest(l.Method, "http://"+l.Addr+path, strings.NewReader(l.Body))
	if err != nil {
		return nil, err
	}
	maps.Copy(request.Header, l.Header)
	var wire bytes.Buffer
	if err := request.Write(&wire); err != nil {
		return nil, err
	}
	if err := conn.SetDeadline(time.Now().Add(2 * time.Minute)); err != nil {
		return nil, err
	}
	buf := make([]byte, 128<<10)
	size := 0
	for done := range n {
		begin := pace.next()
		if _, err := conn.Write(wire.Bytes()); err != nil {
			return nil, err
		}
		if done < 2 {
			size, err = l.parsedAnswer(conn, request, buf)
		} else {
			_, err = io.ReadFull(conn, buf[:size])
		}
		if err != nil {
			return nil, err
		}
		took = append(took, time.Since(begin))
	}
	want := fmt.Sprintf("HTTP/1.1 %d ", l.Status)
	if size > 0 && !bytes.HasPrefix(buf, []byte(want)) {
		return nil, fmt.Errorf("answer %.20q, want %q", buf, want)
	}
	return took, nil
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

func report(b *testing.B, seen loadSeen) {
	b.ReportMetric(float64(seen.P50.Nanoseconds())/1e3, "p50-µs")
	b.ReportMetric(float64(seen.P99.Nanoseconds())/1e3, "p99-µs")
}

// BenchmarkGetWhileCompressing compares what a read takes while the same process
// does nothing else with what it takes while every image worker is busy. The
// photographs come from this process, the requests from a third.
//
//	go test -run '^$' -bench WhileCompressing -benchtime 5s -count 5 .
func BenchmarkGetWhileCompressing(b *testing.B) {
	photos := newPhotoServer(b)
	shop := startBinary(b, environment(map[string]string{"DATA_DIR": b.TempDir(), "LOG_LEVEL": "info"}))
	post := func(sources ...string) error {
		_, err := shop.send("POST", "/products", map[string]any{"user_id": 1, "product_name": "Shoe", "product_price": 1, "product_images": sources}, nil)
		return err
	}
	if err := post(); err != nil {
		b.Fatal(err)
	}
	load := loadClient{Addr: shop.url[len("http://"):], Status: 200, Paths: productPaths(1), Connections: loadConnections, Rate: pacedRate}
	var idle loadSeen
	b.Run("idle", func(b *testing.B) {
		load.Requests = max(b.N, loadConnections)
		idle = load.run(b)
		report(b, idle)
	})
	b.Run("compressing", func(b *testing.B) {
		release := keepCompressing(b, photos, post)
		defer release()
		load.Requests = max(b.N, loadConnections)
		busy := load.run(b)
		report(b, busy)
		if idle.P99 > 0 {
			b.ReportMetric(float64(busy.P99)/float64(idle.P99), "p99-of-idle")
		}
	})
}

// keepCompressing keeps every image worker busy, from its return on until
// release has returned.
func keepCompressing(b *testing.B, photos *photoServer, post func(sources ...string) error) (release func()) {
	b.Helper()
	data := jpegPhoto(b, 3000, 2000)
	stop := make(chan struct{})
	var poster sync.WaitGroup
	poster.Go(func() {
		for n := 0; ; n++ {
			source := photos.serve("/"+strconv.Itoa(n), data)
			if err := post(slices.Repeat([]string{source}, maxImages)...); err != nil {
				b.Error(err)
				return
			}
			// The next when this one is half done, so that there is no gap.
			if !pollUntil(time.Now().Add(settleTime), func() bool {
				select {
				case <-stop:
					return true
				default:
					return photos.requests("/"+strconv.Itoa(n)) >= maxImages/2
				}
			}) {
				b.Error("no image is fetched")
				return
			}
			select {
			case <-stop:
				return
			default:
			}
		}
	})
	eventually(b, "images are being compressed", func() bool { return photos.requests("/0") > 0 })
	return func() { close(stop); poster.Wait() }
}
