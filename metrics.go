package main

import (
	"context"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/VictoriaMetrics/metrics"
)

const (
	// sampleInterval is the time between two samples, and sampleTimeout what one
	// may take.
	sampleInterval = 10 * time.Second
	sampleTimeout  = 5 * time.Second
	// samplesKept is an hour of them.
	samplesKept = 360
	// settleLag keeps the samples behind the clock, so that a result which was
	// stamped before a sample's end and committed after it is still counted.
	settleLag = 2 * time.Second
)

// monitor looks at the program every sampleInterval, keeps what it saw for the
// overview, and shows the latest of it as metrics.
type monitor struct {
	store   *store
	log     *slog.Logger
	traffic traffic
	started time.Time

	mu      sync.Mutex
	samples []monitorSample // oldest first, at most samplesKept
}

// monitorSample is what happened in the time up to At, since the sample before.
type monitorSample struct {
	At       time.Time
	Workload *workload // nil while the database is away
	counts             // of this instance
}

// counts are counters of this instance, or the difference of two states of them.
type counts struct {
	Hits, Misses     uint64 // reads of a product through the cache
	Requests, Errors uint64 // requests for products, and those that ended in a 5xx
	latency          latencyCounts
}

// latencyCounts counts durations by durationBuckets; the last is for longer ones.
type latencyCounts [len(durationBuckets) + 1]uint64

func newMonitor(db *store, log *slog.Logger) *monitor {
	return &monitor{store: db, log: log, started: db.now()}
}

// Run takes samples until ctx ends, the first at once.
func (m *monitor) Run(ctx context.Context) error {
	health := healthLog{log: m.log.With("stage", "monitor")}
	tick := time.NewTicker(sampleInterval)
	defer tick.Stop()
	since, before := m.store.now().Add(-settleLag), m.counts()
	for {
		now := m.counts()
		s := monitorSample{At: m.store.now(), counts: now.since(before)}
		until := s.At.Add(-settleLag)
		work, err := m.workload(ctx, since, until)
		if err == nil {
			s.Workload, since = &work, until
		}
		health.note(ctx, err, "the workload cannot be read", "the workload can be read again")
		before = now
		m.keep(s)
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

func (m *monitor) workload(ctx context.Context, since, until time.Time) (workload, error) {
	ctx, cancel := context.WithTimeout(ctx, sampleTimeout)
	defer cancel()
	work, err := m.store.Workload(ctx, since, until)
	if err == nil {
		work.export()
	}
	return work, err
}

func (m *monitor) keep(s monitorSample) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if len(m.samples) == samplesKept {
		m.samples = slices.Delete(m.samples, 0, 1)
	}
	m.samples = append(m.samples, s)
}

// recent answers the samples, oldest first.
func (m *monitor) recent() []monitorSample {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Clone(m.samples)
}

func (m *monitor) counts() counts {
	c := m.traffic.counts()
	c.Hits, c.Misses = cacheLocalHits.Get()+cacheRedisHits.Get(), cacheMisses.Get()
	return c
}

func (c counts) since(before counts) counts {
	c.Hits -= before.Hits
	c.Misses -= before.Misses
	c.Requests -= before.Requests
	c.Errors -= before.Errors
	for n := range c.latency {
		c.latency[n] -= before.latency[n]
	}
	return c
}

// traffic counts the requests for products. It is safe for concurrent use.
type traffic struct {
	errors  atomic.Uint64
	latency [len(latencyCounts{})]atomic.Uint64
}

func (t *traffic) count(status int, duration time.Duration) {
	if status >= 500 {
		t.errors.Add(1)
	}
	seconds, n := duration.Seconds(), 0
	for n < len(durationBuckets) && seconds > durationBuckets[n] {
		n++
	}
	t.latency[n].Add(1)
}

func (t *traffic) counts() counts {
	c := counts{Errors: t.errors.Load()}
	for n := range t.latency {
		c.latency[n] = t.latency[n].Load()
		c.Requests += c.latency[n]
	}
	return c
}

// quantile estimates the duration in seconds which the share q of them does not
// exceed: by its bucket, within which they count as spread evenly.
func (l *latencyCounts) quantile(q float64) float64 {
	var all float64
	for _, n := range l {
		all += float64(n)
	}
	rank, below := q*all, 0.0
	for n, bound := range durationBuckets {
		in := float64(l[n])
		if in > 0 && below+in >= rank {
			lower := 0.0
			if n > 0 {
				lower = durationBuckets[n-1]
			}
			return lower + (bound-lower)*(rank-below)/in
		}
		below += in
	}
	if all == 0 {
		return 0
	}
	return durationBuckets[len(durationBuckets)-1]
}

// export shows the workload as gauges, which are the same on all instances: to
// be read with max, not with sum.
func (w workload) export() {
	for name, value := range map[string]float64{
		"pms_images_pending":                 float64(w.Pending),
		"pms_images_published":               float64(w.Published),
		"pms_outbox_age_seconds":             w.DueFor.Seconds(),
		"pms_dead_letters":                   float64(w.Dead),
		"pms_dead_letter_oldest_age_seconds": w.DeadFor.Seconds(),
	} {
		metrics.GetOrCreateGauge(name, nil).Set(value)
	}
}

var (
	sourceBytes = metrics.NewCounter("pms_image_source_bytes_total")
	storedBytes = metrics.NewCounter("pms_image_stored_bytes_total")
)

// countBytes counts what an image that is ready was, and what it has become.
func countBytes(i Image) {
	sourceBytes.AddInt64(i.SourceBytes)
	storedBytes.AddInt64(i.Bytes)
}
