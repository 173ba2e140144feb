package main

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// script is the turn to act: a test holds it but while it lets time pass, the
// source and the sink hold it while they work.
type script struct{ *sync.Mutex }

// after lets time pass in a bubble, and then all that wants to happen happen.
func (s script) after(d time.Duration) {
	s.Unlock()
	defer s.Lock()
	<-time.After(d) // of the bubble's clock, so no waiting at all
	synctest.Wait()
}

// scriptedSource is a ledger in memory: due jobs, published jobs, and when each
// call came, to the nanosecond of the bubble's clock.
type scriptedSource struct {
	script
	start     time.Time
	due       []Job
	published []Job
	err       error // of every call while it is set
	claims    []time.Duration
	requeues  []time.Duration // the ages asked for
	requeued  int64
	cancelled bool // whether a claim's context ended while it published
}

func (s *scriptedSource) DispatchDue(ctx context.Context, limit int, publish func(context.Context, []Job) ([]Job, error)) (int, error) {
	s.Lock()
	defer s.Unlock()
	s.claims = append(s.claims, time.Since(s.start))
	if s.err != nil {
		return 0, s.err
	}
	batch := slices.Clone(s.due[:min(limit, len(s.due))])
	if len(batch) == 0 {
		return 0, nil
	}
	s.Unlock()
	refused, err := publish(ctx, batch)
	s.Lock()
	s.cancelled = ctx.Err() != nil
	s.due = append(slices.Clone(refused), s.due[len(batch):]...)
	for _, job := range batch {
		if !slices.Contains(refused, job) {
			s.published = append(s.published, job)
		}
	}
	return len(batch), err
}

func (s *scriptedSource) RequeuePublished(_ context.Context, age time.Duration) (int64, error) {
	s.Lock()
	defer s.Unlock()
	s.requeues = append(s.requeues, age)
	return s.requeued, s.err
}

// scriptedSink is a queue that does what it is told.
type scriptedSink struct {
	script
	away    error
	err     error
	refuse  func(Job) bool
	waiting int
	slow    time.Duration
	batches []int
}

func (q *scriptedSink) Ping(context.Context) error {
	q.Lock()
	defer q.Unlock()
	return q.away
}

func (q *scriptedSink) Waiting(context.Context) (int, error) {
	q.Lock()
	defer q.Unlock()
	return q.waiting, q.err
}

func (q *scriptedSink) Publish(ctx context.Context, jobs []Job) (refused []Job, err error) {
	select {
	case <-ctx.Done():
		return jobs, ctx.Err()
	case <-time.After(q.slow):
	}
	q.Lock()
	defer q.Unlock()
	q.batches = append(q.batches, len(jobs))
	if q.err != nil {
		return jobs, q.err
	}
	for _, job := range jobs {
		if q.refuse != nil && q.refuse(job) {
			refused = append(refused, job)
		}
	}
	return refused, nil
}

// dispatching runs a dispatcher in a bubble of its own, on source and sink.
func dispatching(t *testing.T, source *scriptedSource, sink *scriptedSink, check func(t *testing.T, d *dispatcher, stop func())) {
	t.Helper()
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		turn := script{new(sync.Mutex)}
		source.script, sink.script, source.start = turn, turn, time.Now()
		ctx, cancel := context.WithCancel(t.Context())
		d := newDispatcher(source, sink, testLog(t))
		ended := make(chan error, 1)
		go func() { ended <- d.Run(ctx) }()
		stop := func() {
			turn.Unlock()
			defer turn.Lock()
			cancel()
			if err := <-ended; err != nil {
				t.Errorf("Run: %v", err)
			}
			ended <- nil // stop may be called again
		}
		turn.Lock()
		defer turn.Unlock()
		defer stop()
		turn.after(0)
		check(t, d, stop)
	})
}

func TestDispatchPublishesAtOnceAndInBatches(t *testing.T) {
	source, sink := &scriptedSource{due: jobs(2*dispatchBatch + 1)}, &scriptedSink{}
	dispatching(t, source, sink, func(t *testing.T, d *dispatcher, _ func()) {
		if want := []int{dispatchBatch, dispatchBatch, 1}; !slices.Equal(sink.batches, want) {
			t.Errorf("batches %v, want %v", sink.batches, want)
		}
		if len(source.due) != 0 || time.Since(source.start) != 0 {
			t.Errorf("%d due after %v", len(source.due), time.Since(source.start))
		}
		source.due = jobs(3)
		d.Wake()
		source.after(0)
		if len(source.due) != 0 || time.Since(source.start) != 0 {
			t.Errorf("woken: %d due after %v", len(source.due), time.Since(source.start))
		}
	})
}

func TestDispatchPollsEachSecond(t *testing.T) {
	source, sink := &scriptedSource{}, &scriptedSink{}
	dispatching(t, source, sink, func(t *testing.T, _ *dispatcher, _ func()) {
		source.after(3*pollInterval + pollInterval/2)
		if want := []time.Duration{0, pollInterval, 2 * pollInterval, 3 * pollInterval}; !slices.Equal(source.claims, want) {
			t.Errorf("claims at %v, want %v", source.claims, want)
		}
	})
}

func TestDispatchWakeNeverBlocks(t *testing.T) {
	t.Parallel()
	d := newDispatcher(&scriptedSource{}, &scriptedSink{}, testLog(t))
	for range 1000 {
		d.Wake() // nobody runs
	}
}

func TestDispatchBacksOff(t *testing.T) {
	faults := map[string]func(*scriptedSource, *scriptedSink){
		"the database fails": func(s *scriptedSource, _ *scriptedSink) { s.err = errUnavailable },
		"publishing fails":   func(_ *scriptedSource, q *scriptedSink) { q.err = errBrokerFrozen },
		"a job is refused":   func(_ *scriptedSource, q *scriptedSink) { q.refuse = func(j Job) bool { return j.ID == 1 } },
	}
	for name, fault := range faults {
		t.Run(name, func(t *testing.T) {
			source, sink := &scriptedSource{due: jobs(2)}, &scriptedSink{}
			fault(source, sink)
			dispatching(t, source, sink, func(t *testing.T, d *dispatcher, _ func()) {
				for range 600 { // a busy API does not hurry it
					d.Wake()
					source.after(100 * time.Millisecond)
				}
				if n := len(source.claims); n < 60/5 || n > 40 {
					t.Errorf("%d tries in a minute", n)
				}
				for i, claim := range source.claims[1:] {
					if gap := claim - source.claims[i]; gap < dispatchRetryLeast/2 || gap > dispatchRetryMost {
						t.Errorf("tries %v apart", gap)
					}
				}
				source.err, sink.err, sink.refuse = nil, nil, nil
				source.after(dispatchRetryMost)
				if len(source.due) != 0 {
					t.Errorf("%d due after the fault", len(source.due))
				}
				source.due = jobs(1)
				d.Wake()
				source.after(0)
				if len(source.due) != 0 {
					t.Error("not woken after the fault")
				}
				fault(source, sink)
				source.due, source.claims = jobs(2), nil
				d.Wake()
				source.after(time.Second)
				if n := len(source.claims); n < 3 {
					t.Errorf("%d tries in the first second of a new fault", n)
				}
			})
		})
	}
}

func TestDispatchLeavesTheDatabaseAloneWithoutQueue(t *testing.T) {
	source, sink := &scriptedSource{due: jobs(1)}, &scriptedSink{away: errNoBroker}
	dispatching(t, source, sink, func(t *testing.T, d *dispatcher, _ func()) {
		d.Wake()
		source.after(time.Hour)
		if len(source.claims) != 0 || len(source.requeues) != 0 {
			t.Errorf("claims %d, requeues %d without a queue", len(source.claims), len(source.requeues))
		}
		sink.away = nil
		source.after(pollInterval)
		if len(source.due) != 0 {
			t.Error("not published when the queue came back")
		}
	})
}

func TestDispatchReconciles(t *testing.T) {
	twice := []time.Duration{reconcileAge, reconcileAge}
	tests := map[string]struct {
		sink *scriptedSink
		want []time.Duration
	}{
		"an empty queue": {&scriptedSink{}, twice},
		"a backlog":      {&scriptedSink{waiting: 1}, nil},
		"a fault":        {&scriptedSink{err: errBrokerFrozen}, nil},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			source := &scriptedSource{requeued: 1}
			dispatching(t, source, test.sink, func(t *testing.T, _ *dispatcher, _ func()) {
				source.after(3*reconcileInterval + pollInterval/2)
				if !slices.Equal(source.requeues, test.want) {
					t.Errorf("requeued what is older than %v, want %v", source.requeues, test.want)
				}
				// What was taken last is still in hand when nothing waits any more.
				test.sink.waiting, test.sink.err = 0, nil
				source.requeues = nil
				for _, want := range []int{len(test.want) / 2, 1} {
					source.after(reconcileInterval)
					if len(source.requeues) != want {
						t.Errorf("requeued %d times by the next look at an empty queue, want %d", len(source.requeues), want)
					}
					source.requeues = nil
				}
			})
		})
	}
}

func TestDispatchFinishesItsBatchAtShutdown(t *testing.T) {
	source, sink := &scriptedSource{due: jobs(dispatchBatch + 1)}, &scriptedSink{slow: 5 * time.Second}
	dispatching(t, source, sink, func(t *testing.T, _ *dispatcher, stop func()) {
		stop()
		if len(source.published) != dispatchBatch || source.cancelled {
			t.Errorf("%d published, cancelled %t", len(source.published), source.cancelled)
		}
		if took := time.Since(source.start); took != 5*time.Second {
			t.Errorf("stopped after %v", took)
		}
	})
}

func TestDispatchBoundsABatch(t *testing.T) {
	source, sink := &scriptedSource{due: jobs(1)}, &scriptedSink{slow: time.Hour}
	dispatching(t, source, sink, func(t *testing.T, _ *dispatcher, _ func()) {
		source.after(dispatchTimeout)
		if !source.cancelled {
			t.Error("a hung queue holds the dispatcher")
		}
	})
}

func TestRetryPace(t *testing.T) {
	t.Parallel()
	pace := retryPace{least: time.Second, most: 5 * time.Second}
	for _, want := range []time.Duration{1, 2, 4, 5, 5} {
		want *= time.Second
		if got := pace.next(); got < want/2 || got > want {
			t.Errorf("pause %v, want %v to %v", got, want/2, want)
		}
	}
	pace.reset()
	if got := pace.next(); got > time.Second {
		t.Errorf("pause %v after a reset", got)
	}
}

// TestFaultKinds guards the log of an operator whose broker is away.
func TestFaultKinds(t *testing.T) {
	t.Parallel()
	cut := errors.New("read tcp 127.0.0.1:1->127.0.0.1:2: reset")
	again := errors.New("read tcp 127.0.0.1:3->127.0.0.1:2: reset")
	if faultKind(cut) != faultKind(again) {
		t.Error("two ports are two faults")
	}
	if faultKind(cut) == faultKind(errNoQueue) || faultKind(errNoQueue) == faultKind(errBrokerFrozen) {
		t.Error("different faults are one")
	}
}

// A fault is logged once, however long it lasts, then its end. A round that failed
// because the program ends is neither.
func TestHealthLogNotesChanges(t *testing.T) {
	t.Parallel()
	var out bytes.Buffer
	h := healthLog{log: slog.New(slog.NewTextHandler(&out, nil))}
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	away := errors.New("away")
	h.note(t.Context(), nil, "fails", "works")
	h.note(ended, away, "fails", "works")
	if out.Len() > 0 {
		t.Errorf("while all is well: %s", &out)
	}
	for _, err := range []error{away, away, nil, nil} {
		h.note(t.Context(), err, "fails", "works")
	}
	if fails, works := strings.Count(out.String(), "msg=fails"), strings.Count(out.String(), "msg=works"); fails != 1 || works != 1 {
		t.Errorf("one fault is logged as %s", &out)
	}
}
