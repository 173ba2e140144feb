package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"math"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/VictoriaMetrics/metrics"
)

func TestStoreWorkloadCountsEachImageWhereItIs(t *testing.T) {
	t.Parallel()
	eachStore(t, func(t *testing.T, s *store) {
		start := s.now()
		if w := workloadSince(t, s, start.Add(-time.Hour)); w != (workload{}) {
			t.Errorf("of nothing: %+v", w)
		}
		create(t, s, "ready", "dead", "published")
		jobs := publishDue(t, s)
		advance(s, time.Minute)
		finish(t, s, jobs[0], "object")
		if _, err := s.SettleFailed(t.Context(), jobs[1], failure{imageError: permanent("http_404", "gone"), Attempt: 1}); err != nil {
			t.Fatal(err)
		}
		create(t, s, "due")
		advance(s, 30*time.Second)

		want := workload{Pending: 2, Published: 1, DueFor: 30 * time.Second, Dead: 1, DeadFor: 30 * time.Second, Ready: 1, Failed: 1}
		got := workloadSince(t, s, start)
		for _, age := range []*time.Duration{&got.DueFor, &got.DeadFor} {
			*age = age.Truncate(10 * time.Second) // the test itself takes time
		}
		if got != want {
			t.Errorf("workload %+v, want %+v", got, want)
		}
		if later := workloadSince(t, s, s.now()); later.Ready != 0 || later.Failed != 0 || later.Dead != 1 {
			t.Errorf("what happened before the span counts: %+v", later)
		}
	})
}

// workloadMetrics are there from the first sample on.
var workloadMetrics = []string{"pms_images_pending", "pms_images_published", "pms_outbox_age_seconds", "pms_dead_letters", "pms_dead_letter_oldest_age_seconds"}

func workloadSince(t *testing.T, s *store, since time.Time) workload {
	t.Helper()
	w, err := s.Workload(t.Context(), since, s.now())
	if err != nil {
		t.Fatal(err)
	}
	return w
}

func TestLatencyQuantiles(t *testing.T) {
	t.Parallel()
	tests := map[string]struct {
		durations []time.Duration
		q, want   float64
	}{
		"nothing":                            {nil, .5, 0},
		"one, in the middle of its bucket":   {[]time.Duration{3 * time.Millisecond}, .5, .00375},
		"the slow one is the last":           {append(repeat(time.Millisecond, 99), time.Second), .99, .001},
		"and shows above":                    {append(repeat(time.Millisecond, 98), time.Second, time.Second), .99, .75},
		"longer than any bucket is its edge": {[]time.Duration{time.Minute}, .99, 10},
		"on an edge belongs below":           {[]time.Duration{10 * time.Second}, 1, 10},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var seen traffic
			for _, d := range test.durations {
				seen.count(http.StatusOK, d)
			}
			counted := seen.counts()
			if got := counted.latency.quantile(test.q); math.Abs(got-test.want) > 1e-9 {
				t.Errorf("quantile %v of %v is %v, want %v", test.q, test.durations, got, test.want)
			}
		})
	}
}

func TestSampleShowsTheUsualAndTheSlow(t *testing.T) {
	t.Parallel()
	var seen traffic
	for _, d := range append(repeat(time.Millisecond, 98), time.Second, time.Second) {
		seen.count(http.StatusOK, d)
	}
	if got := (monitorSample{counts: seen.counts()}).json().HTTP; got.P50 > .001 || got.P99 < .5 {
		t.Errorf("usually %v s, slowly %v s", got.P50, got.P99)
	}
}

func repeat(d time.Duration, n int) []time.Duration {
	all := make([]time.Duration, n)
	for i := range all {
		all[i] = d
	}
	return all
}

func TestMonitorKeepsAnHour(t *testing.T) {
	t.Parallel()
	m := &monitor{}
	for n := range samplesKept + 5 {
		m.keep(monitorSample{At: time.Unix(int64(n), 0)})
	}
	kept := m.recent()
	if len(kept) != samplesKept || kept[0].At.Unix() != 5 || kept[samplesKept-1].At.Unix() != samplesKept+4 {
		t.Errorf("%d samples from %v to %v", len(kept), kept[0].At, kept[len(kept)-1].At)
	}
}

// The first sample is taken at once, and shows in the overview and in /metrics.
func TestOverviewShowsTheWorkload(t *testing.T) {
	t.Parallel()
	a := newAPI(t)
	p := create(t, a.store, "http://example.com/a.jpg")
	for range 3 {
		a.do(t, "GET", fmt.Sprintf("/products/%d", p.ID), "")
	}
	stop := runMonitor(t, a.monitor)
	eventually(t, "there is a sample", func() bool { return len(a.monitor.recent()) > 0 })
	stop()
	var seen struct {
		Status  string
		Samples []struct {
			Images *workloadJSON
			HTTP   httpSampleJSON
		}
	}
	answer := a.do(t, "GET", "/overview", "")
	if err := json.Unmarshal(answer.Body.Bytes(), &seen); answer.Code != http.StatusOK || err != nil {
		t.Fatalf("%d, %v: %s", answer.Code, err, answer.Body)
	}
	last := seen.Samples[len(seen.Samples)-1]
	if seen.Status != "ready" || last.Images == nil || last.Images.Pending != 1 || last.HTTP.Requests != 0 {
		t.Errorf("overview %s", answer.Body)
	}
	if now := a.monitor.counts(); now.Requests != 3 { // and not the one for the overview
		t.Errorf("%d requests for products were counted, want 3", now.Requests)
	}
	var text bytes.Buffer
	metrics.WritePrometheus(&text, false)
	for _, name := range append([]string{"pms_image_source_bytes_total", "pms_image_stored_bytes_total"}, workloadMetrics...) {
		if !strings.Contains(text.String(), "\n"+name+" ") {
			t.Errorf("/metrics lacks %s", name)
		}
	}
	a.do(t, "GET", "/overview?x=1", "").wantProblem(t, http.StatusBadRequest)
}

// Without the database there are still samples, which say that it is away.
func TestMonitorOutlivesTheDatabase(t *testing.T) {
	t.Parallel()
	a := newAPI(t)
	a.store.Close()
	stop := runMonitor(t, a.monitor)
	eventually(t, "there is a sample", func() bool { return len(a.monitor.recent()) > 0 })
	stop()
	if s := a.monitor.recent()[0]; s.Workload != nil || s.json().Images != nil {
		t.Errorf("a sample without a database: %+v", s)
	}
}

// runMonitor runs m until stop is called, which waits for its end.
func runMonitor(t *testing.T, m *monitor) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- m.Run(ctx) }()
	return func() {
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("the monitor ended with %v", err)
		}
	}
}
