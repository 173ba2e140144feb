package main

import (
	"net/http"
	"time"
)

// overviewJSON is how the program is and how it has been doing, as the console
// plots it.
type overviewJSON struct {
	readinessJSON
	UptimeSeconds   float64      `json:"uptime_seconds"`
	IntervalSeconds float64      `json:"interval_seconds"` // between two samples
	Samples         []sampleJSON `json:"samples"`          // oldest first, of the last hour
}

// sampleJSON is what happened in the interval that ended at At. Images are those
// of all instances; null while the database was away. Cache and HTTP are of the
// instance that answers.
type sampleJSON struct {
	At     jsonTime        `json:"at"`
	Images *workloadJSON   `json:"images"`
	Cache  cacheSampleJSON `json:"cache"`
	HTTP   httpSampleJSON  `json:"http"`
}

type workloadJSON struct {
	Ready          int     `json:"ready"`
	Failed         int     `json:"failed"`
	Pending        int     `json:"pending"`
	Published      int     `json:"published"`
	DueSeconds     float64 `json:"oldest_due_seconds"`
	DeadLetters    int     `json:"dead_letters"`
	DeadForSeconds float64 `json:"oldest_dead_letter_seconds"`
}

type cacheSampleJSON struct {
	Hits   uint64 `json:"hits"`
	Misses uint64 `json:"misses"`
}

type httpSampleJSON struct {
	Requests uint64  `json:"requests"`
	Errors   uint64  `json:"errors"`
	P50      float64 `json:"p50_seconds"`
	P99      float64 `json:"p99_seconds"`
}

// overview answers from memory, so it works when the database does not.
func (s *server) overview(w http.ResponseWriter, r *http.Request) error {
	samples := s.monitor.recent()
	out := overviewJSON{
		readinessJSON:   s.readiness(),
		UptimeSeconds:   time.Since(s.monitor.started).Seconds(),
		IntervalSeconds: sampleInterval.Seconds(),
		Samples:         make([]sampleJSON, len(samples)),
	}
	for n, sample := range samples {
		out.Samples[n] = sample.json()
	}
	w.Header().Set("Cache-Control", "no-store")
	writeJSON(w, http.StatusOK, out)
	return nil
}

func (s monitorSample) json() sampleJSON {
	out := sampleJSON{
		At:    jsonTime(s.At),
		Cache: cacheSampleJSON{s.Hits, s.Misses},
		HTTP:  httpSampleJSON{s.Requests, s.Errors, s.latency.quantile(.5), s.latency.quantile(.99)},
	}
	if w := s.Workload; w != nil {
		out.Images = &workloadJSON{w.Ready, w.Failed, w.Pending, w.Published, w.DueFor.Seconds(), w.Dead, w.DeadFor.Seconds()}
	}
	return out
}
