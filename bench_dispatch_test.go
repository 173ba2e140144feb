package main

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// BenchmarkDispatch moves jobs from real rows through the dispatcher and RabbitMQ
// to a consumer whose work is nothing: it acks. One operation is one job, from
// due to acked; jobs/s is what a deployment can start at most. What bounds it shows
// in the rest: the CPU time of each process, and how long the dispatcher waited
// for RabbitMQ's word.
//
//	go test -run '^$' -bench Dispatch -benchtime 50000x .
func BenchmarkDispatch(b *testing.B) {
	s, _ := postgresStore(b)
	insertDueImages(b, s, b.N)
	log := slog.New(slog.DiscardHandler)
	q := newRabbitQueue(testAMQP(b), noRefill, log)
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	defer running.Wait()
	defer cancel()
	part := func(run func(context.Context) error) {
		running.Go(func() {
			if err := run(ctx); err != nil {
				b.Error(err)
			}
		})
	}
	part(q.Run)
	eventually(b, "the queue is ready", func() bool { return q.Ping(ctx) == nil })

	const prefetch = 200
	out := make(chan Delivery, prefetch)
	part(func(ctx context.Context) error { return q.Consume(ctx, prefetch, out) })
	before := benchmarkCPU(b)
	b.ResetTimer()
	sink := &timedSink{jobSink: q}
	part(newDispatcher(s, sink, log).Run)
	for range b.N {
		if err := (<-out).Ack(); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "jobs/s")
	b.ReportMetric(float64(sink.waited.Load())/1e3/float64(b.N), "confirms-µs/op")
	for process, used := range benchmarkCPU(b) {
		b.ReportMetric(float64((used-before[process]).Microseconds())/float64(b.N), process+"-µs/op")
	}
}

// timedSink measures how long the queue takes to have the jobs.
type timedSink struct {
	jobSink
	waited atomic.Int64 // ns
}

func (q *timedSink) Publish(ctx context.Context, jobs []Job) ([]Job, error) {
	start := time.Now()
	defer func() { q.waited.Add(int64(time.Since(start))) }()
	return q.jobSink.Publish(ctx, jobs)
}

// benchmarkCPU is what we and the shared servers have used so far. Servers that
// are not ours to see are left out.
func benchmarkCPU(b *testing.B) map[string]time.Duration {
	b.Helper()
	used := map[string]time.Duration{"pms": cpuTime(b)}
	for name, server := range map[string]func() (*testServer, error){"postgres": sharedPostgres, "rabbitmq": sharedRabbit} {
		if s, err := server(); err == nil {
			if cpu, err := s.proc.treeCPU(); err == nil {
				used[name] = cpu
			}
		}
	}
	return used
}

// treeCPU is what a process and its descendants have used, by Linux's /proc
// (proc(5), fields 14 and 15 of stat, in hundredths of a second).
func (p *serverProcess) treeCPU() (used time.Duration, err error) {
	table, err := processTable()
	if err != nil {
		return 0, err
	}
	tree := []int{p.pid}
	for n := 0; n < len(tree); n++ {
		for _, child := range table {
			if child.parent == tree[n] {
				tree = append(tree, child.pid)
			}
		}
	}
	for _, pid := range tree {
		stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil {
			continue // it has ended
		}
		_, fields, _ := strings.Cut(string(stat), ") ")
		var user, system time.Duration
		if _, err := fmt.Sscan(strings.Join(strings.Fields(fields)[11:13], " "), &user, &system); err != nil {
			return 0, err
		}
		used += (user + system) * 10 * time.Millisecond
	}
	return used, nil
}

// insertDueImages queues n images, in products as large as they may be.
func insertDueImages(b *testing.B, s *store, n int) {
	b.Helper()
	sources := slices.Repeat([]string{"https://example.com/a.jpg"}, maxImages)
	for ; n > 0; n -= maxImages {
		p := Product{UserID: 1, Name: "x", Images: sourcesOf(sources[:min(n, maxImages)]...)}
		if _, err := s.CreateProduct(b.Context(), p, origin{}, nil); err != nil {
			b.Fatal(err)
		}
	}
}
