package main

import (
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"strconv"
	"testing"
	"testing/synctest"
)

// Bodies in hand hold no more than they may, however many are downloaded at once
// and whether their lengths are known before. Small ones need no room, and what was
// released is there for others.
func TestFetchHoldsNoMoreMemoryThanItMay(t *testing.T) {
	t.Parallel()
	const downloads, size, memory = 12, 8 << 20, 20 << 20
	for name, known := range map[string]bool{"length known": true, "length unknown": false} {
		synctest.Test(t, func(t *testing.T) {
			f := pipedFetcher(t, fetchLimits{MaxBytes: size, Memory: memory, Timeout: testLimits.Timeout}, func(w http.ResponseWriter, r *http.Request) {
				body := make([]byte, size)
				if r.Host == "small.test" {
					body = body[:freeBytes/2]
				}
				if known {
					w.Header().Set("Content-Length", strconv.Itoa(len(body)))
				}
				w.Write(body)
			})
			type result struct {
				body []byte
				err  error
			}
			done := make(chan result)
			for n := range downloads {
				go func() {
					body, err := f.Fetch(t.Context(), fmt.Sprintf("http://host%d.test/", n))
					done <- result{body, err}
				}()
			}
			var held [][]byte
			var bytes int64
			for range downloads {
				switch r := <-done; {
				case r.err == nil:
					held = append(held, r.body)
					bytes += int64(cap(r.body)) - freeBytes
				case !errors.Is(r.err, errNoRoom):
					t.Errorf("%s: %v", name, r.err)
				}
			}
			if len(held) == 0 || len(held) == downloads || bytes > memory {
				t.Errorf("%s: %d bodies hold %d bytes beside the %d of each that are free, of %d", name, len(held), bytes, freeBytes, memory)
			}
			if _, err := f.Fetch(t.Context(), "http://small.test/"); err != nil {
				t.Errorf("%s: a small body beside them: %v", name, err)
			}
			for _, body := range held {
				f.Release(body)
			}
			if !f.room.TryAcquire(memory) {
				t.Errorf("%s: memory is held that was released", name)
			}
		})
	}
}

// What was held of a body that comes to nothing is there for others.
func TestFetchHoldsNothingOfWhatFailed(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		const size = 8 << 20
		f := pipedFetcher(t, fetchLimits{MaxBytes: size, Timeout: testLimits.Timeout}, func(w http.ResponseWriter, r *http.Request) {
			w.Write(make([]byte, size))
			if r.Host == "large.test" {
				w.Write([]byte("x"))
			} else {
				w.(http.Flusher).Flush()
				panic(http.ErrAbortHandler)
			}
		})
		for host, code := range map[string]string{"large.test": "too_large", "broken.test": "truncated"} {
			_, err := f.Fetch(t.Context(), "http://"+host)
			wantFailure(t, nil, err, code, code == "too_large")
			if !f.room.TryAcquire(size) {
				t.Fatalf("%s: memory is held", code)
			}
			f.room.Release(size)
		}
	})
}

// A host that promises much and sends little takes the room of nobody.
func TestFetchCountsWhatHasArrived(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		const size = 8 << 20
		f := pipedFetcher(t, fetchLimits{MaxBytes: size, Timeout: testLimits.Timeout}, func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Length", strconv.Itoa(size))
			if r.Host == "fast.test" {
				w.Write(make([]byte, size))
				return
			}
			w.Write(make([]byte, freeBytes/2))
			w.(http.Flusher).Flush()
			<-r.Context().Done()
		})
		slow := make(chan error)
		for range maxHostDownloads {
			go func() { _, err := f.Fetch(t.Context(), "http://slow.test/"); slow <- err }()
		}
		synctest.Wait()
		if body, err := f.Fetch(t.Context(), "http://fast.test/"); err != nil || len(body) != size {
			t.Errorf("beside slow downloads: %d bytes, %v", len(body), err)
		}
		for range maxHostDownloads {
			wantFailure(t, nil, <-slow, "too_slow", false)
		}
	})
}

// A worker with many large sources in reach holds no more of them at once than
// IMAGE_MEMORY, and freeBytes each; all become ready, with no attempt counted.
func TestPipelineHoldsNoMoreSourcesThanItMay(t *testing.T) {
	t.Parallel()
	if _, err := os.Stat("/proc/self/status"); err != nil {
		t.Skip("needs /proc")
	}
	const workers, memory, size, slack = 4, 32 << 20, 15 << 20, 96 << 20 // what the collector has not taken yet
	padded := append(jpegPhoto(t, 40, 40), make([]byte, size)...)
	var sources []string
	for n := range maxImages {
		host := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.Write(padded) }))
		t.Cleanup(host.Close)
		sources = append(sources, fmt.Sprintf("%s/%d.jpg", host.URL, n))
	}
	api := startBinary(t, environment(map[string]string{"DATA_DIR": t.TempDir(), "IMAGE_MEMORY": strconv.Itoa(memory),
		"IMAGE_MAX_BYTES": "16MiB", "IMAGE_WORKERS": strconv.Itoa(workers), "GOGC": "10"}))
	idle := peakMemory(t, api.pid)
	for n, image := range api.settled(t, api.post(t, sources...).ID).Images {
		if image.Status != "ready" || image.Attempts != 0 || image.SourceBytes != len(padded) {
			t.Errorf("image %d: %+v", n, image)
		}
	}
	grown := peakMemory(t, api.pid) - idle
	t.Logf("%d sources of %d MiB: the peak is %d MiB above that at rest", maxImages, size>>20, grown>>20)
	if most := int64(memory + maxImages*freeBytes + slack); grown > most {
		t.Errorf("the peak is %d MiB above that at rest, want %d at most", grown>>20, most>>20)
	}
}
