package main

import (
	"context"
	"errors"
	"log/slog"
	"sync"

	"golang.org/x/sync/semaphore"
)

var errNotFilled = errors.New("the queue is not filled yet")

// embeddedQueue is the queue within the process. It holds every published job in
// memory, without a bound: a job is a few dozen bytes, and a Publish that waited
// for workers would outlive the lease of what it publishes. Its content ends with
// the process, so each start fills it anew from the rows.
type embeddedQueue struct {
	refill func(context.Context) (int64, error)
	log    *slog.Logger

	mu      sync.Mutex
	filled  bool
	jobs    []Job
	changed sync.Cond // jobs were added, or a consumer is to stop
}

// newEmbeddedQueue returns an empty queue. refill makes every published and
// unfinished job due again; the queue takes no job until Run has called it.
func newEmbeddedQueue(refill func(context.Context) (int64, error), log *slog.Logger) *embeddedQueue {
	q := &embeddedQueue{refill: refill, log: log}
	q.changed.L = &q.mu
	return q
}

// Run opens the queue and returns when ctx ends.
func (q *embeddedQueue) Run(ctx context.Context) error {
	pace := retryPace{least: reconnectLeast, most: reconnectMost}
	health := healthLog{log: q.log.With("stage", "publish")}
	for {
		n, err := q.refill(ctx)
		if err == nil {
			q.log.Info("queue is open", "republish", n)
			break
		}
		if ctx.Err() != nil {
			return nil
		}
		health.fault("refill", "queue cannot be filled, retrying", err)
		pace.wait(ctx)
	}
	q.mu.Lock()
	q.filled = true
	q.mu.Unlock()
	<-ctx.Done()
	return nil
}

// Ping says whether the queue takes jobs.
func (q *embeddedQueue) Ping(context.Context) error {
	q.mu.Lock()
	defer q.mu.Unlock()
	if !q.filled {
		return errNotFilled
	}
	return nil
}

// Waiting returns how many jobs no worker has taken.
func (q *embeddedQueue) Waiting(context.Context) (int, error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	return len(q.jobs), nil
}

// Publish takes the jobs. It never waits.
func (q *embeddedQueue) Publish(ctx context.Context, jobs []Job) (refused []Job, err error) {
	if err := q.Ping(ctx); err != nil {
		return jobs, err
	}
	q.add(jobs...)
	return nil, nil
}

func (q *embeddedQueue) add(jobs ...Job) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.jobs = append(q.jobs, jobs...)
	q.changed.Broadcast()
}

// Consume hands jobs to out, at most prefetch of them unsettled. When ctx ends
// it takes no more jobs, waits until those handed out are settled, and returns
// nil. It never closes out. A job that was in hand when its process died is handed
// out while nothing else is in hand, if it was so twice in a row.
func (q *embeddedQueue) Consume(ctx context.Context, prefetch int, out chan<- Delivery) error {
	stop := context.AfterFunc(ctx, func() {
		q.mu.Lock() // so that no consumer is between its look at ctx and its wait
		defer q.mu.Unlock()
		q.changed.Broadcast()
	})
	defer stop()
	hand := semaphore.NewWeighted(int64(prefetch))
	for hand.Acquire(ctx, 1) == nil {
		job, ok := q.take(ctx)
		if !ok {
			hand.Release(1)
			break
		}
		places := int64(1)
		if job.Starts > 1 && hand.Acquire(context.WithoutCancel(ctx), int64(prefetch-1)) == nil {
			places = int64(prefetch)
		}
		delivery := newDelivery(job, hand, places, func(v verdict) error { q.settle(job, v); return nil })
		delivery.Counted = true
		select {
		case out <- delivery:
		case <-ctx.Done():
			_ = delivery.Release() // cannot fail
		}
	}
	return hand.Acquire(context.WithoutCancel(ctx), int64(prefetch))
}

// take waits for a job; there is none when ctx has ended.
func (q *embeddedQueue) take(ctx context.Context) (Job, bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for len(q.jobs) == 0 && ctx.Err() == nil {
		q.changed.Wait()
	}
	if ctx.Err() != nil {
		return Job{}, false
	}
	job := q.jobs[0]
	q.jobs[0] = Job{} // let go of its strings
	q.jobs = q.jobs[1:]
	return job, true
}

// settle puts a released job back. A rejected one is gone: its row says that it
// is dead, and there is no dead-letter queue to agree with.
func (q *embeddedQueue) settle(job Job, v verdict) {
	if v == verdictReleased {
		q.add(job)
	}
}
