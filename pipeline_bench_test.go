package main

import (
	"context"
	"fmt"
	"log/slog"
	"math"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"runtime"
	"sync"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sync/semaphore"
)

// BenchmarkPipeline takes images through all stages, from the row in the
// database (SQLite) and the download over loopback to the stored file and the settled
// row, on one core and on two. An operation is one image. Its profile tells what the stages
// themselves cost:
//
//	go test -run '^$' -bench Pipeline -benchtime 100x -cpuprofile cpu.out .
func BenchmarkPipeline(b *testing.B) {
	photo := encodedJPEG(b, photo(3000, 2000), 90)
	for _, cores := range []int{1, 2} {
		b.Run(fmt.Sprintf("cores=%d", cores), func(b *testing.B) {
			if cores > runtime.NumCPU() {
				b.Skipf("%d CPUs", runtime.NumCPU())
			}
			defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(cores))
			benchmarkPipeline(b, photo, cores)
		})
	}
}

func benchmarkPipeline(b *testing.B, photo []byte, workers int) {
	web := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.Write(photo) }))
	defer web.Close()
	s := sqliteStore(b)
	files, err := newFileBlobs(filepath.Join(b.TempDir(), "media"), "")
	if err != nil {
		b.Fatal(err)
	}
	for left := b.N; left > 0; left -= maxImages {
		sources := make([]string, min(left, maxImages))
		for i := range sources {
			sources[i] = fmt.Sprintf("%s/%d/%d.jpg", web.URL, left, i)
		}
		p := Product{UserID: 1, Name: "Trail shoe", Price: 8990, Images: sourcesOf(sources...)}
		if _, err := s.CreateProduct(b.Context(), p, origin{}, nil); err != nil {
			b.Fatal(err)
		}
	}
	log := slog.New(slog.DiscardHandler)
	queue := newEmbeddedQueue(s.RequeueAll, log)
	var settled sync.WaitGroup
	settled.Add(b.N)
	p := &pipeline{
		imageSettings: imageSettings{Workers: workers, Memory: 256 << 20, MaxPixels: testPixels, MaxSide: 2048, Quality: testQuality,
			RetryAttempts: 1, RetryBase: time.Second},
		store: s, queue: queue, blobs: files, log: log, memory: semaphore.NewWeighted(256 << 20),
		sources:    newFetcher(fetchLimits{MaxBytes: math.MaxInt32, Timeout: time.Minute, AllowPrivate: true}),
		invalidate: func(int64, int64) { settled.Done() },
	}
	ctx, cancel := context.WithCancel(b.Context())
	var group errgroup.Group
	b.ResetTimer()
	group.Go(func() error { return queue.Run(ctx) })
	group.Go(func() error { return newDispatcher(s, queue, log).Run(ctx) })
	group.Go(func() error { return p.Run(context.WithoutCancel(ctx), ctx) })
	settled.Wait()
	b.StopTimer()
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "images/s")
	cancel()
	if err := group.Wait(); err != nil {
		b.Fatal(err)
	}
	if dead, err := s.DeadLetters(b.Context(), deadFilter{}, 0, 1); err != nil || len(dead) > 0 {
		b.Fatalf("images failed: %v %v", dead, err)
	}
}
