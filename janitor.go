package main

import (
	"context"
	"errors"
	"log/slog"
	"time"
)

// deadQueue is what of the queue holds copies of dead letters.
type deadQueue interface {
	SweepDead(ctx context.Context, keep func(Job) (bool, error), poisoned func(job Job, published time.Time) error) error
}

const (
	garbageInterval = time.Minute
	garbageBatch    = 100
	sweepInterval   = 5 * time.Minute
	// removeTimeout is for the deletion of one object; garbageBatch of them must
	// end before another instance may try the same, see deletingTime.
	removeTimeout = deletingTime / garbageBatch
)

// janitor clears away what the rest of the program leaves behind: objects that
// nothing refers to, copies of dead letters that were replayed, expired keys.
type janitor struct {
	store      *store
	blobs      blobs
	queue      deadQueue
	invalidate func(productID, version int64)
	log        *slog.Logger
	garbage    chan struct{} // there may be garbage
	dead       chan struct{} // there may be dead letters that are none any more
}

func newJanitor(db *store, blobs blobs, queue deadQueue, invalidate func(int64, int64), log *slog.Logger) *janitor {
	return &janitor{store: db, blobs: blobs, queue: queue, invalidate: invalidate, log: log,
		garbage: make(chan struct{}, 1), dead: make(chan struct{}, 1)}
}

// CollectSoon and SweepSoon have the janitor look now rather than at its next
// round. They never block.
func (j *janitor) CollectSoon() { poke(j.garbage) }
func (j *janitor) SweepSoon()   { poke(j.dead) }

// Run clears up until ctx ends.
func (j *janitor) Run(ctx context.Context) error {
	collect, sweep := time.NewTicker(garbageInterval), time.NewTicker(sweepInterval)
	defer collect.Stop()
	defer sweep.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-j.garbage:
			j.report(ctx, j.collect(ctx))
		case <-collect.C:
			j.report(ctx, errors.Join(j.collect(ctx), j.store.ForgetIdempotencyKeys(ctx)))
		case <-j.dead:
			j.report(ctx, j.sweep(ctx))
		case <-sweep.C:
			j.report(ctx, j.sweep(ctx))
		}
	}
}

func (j *janitor) report(ctx context.Context, err error) {
	if err != nil && ctx.Err() == nil {
		j.log.Warn("clearing up failed, will be tried again", "err", err)
	}
}

func (j *janitor) collect(ctx context.Context) error {
	for {
		n, err := j.store.CollectGarbage(ctx, garbageBatch, func(ctx context.Context, key string) error {
			ctx, cancel := context.WithTimeout(ctx, removeTimeout)
			defer cancel()
			return j.blobs.Delete(ctx, key)
		})
		if err != nil || n < garbageBatch {
			return err
		}
	}
}

func (j *janitor) sweep(ctx context.Context) error {
	return j.queue.SweepDead(ctx,
		func(job Job) (bool, error) { return j.store.IsDead(ctx, job.ID) },
		func(job Job, published time.Time) error {
			why := permanent("poison", "the worker ended each time that it had this image in hand")
			version, err := j.store.MarkDead(ctx, job, published, why)
			if errors.Is(err, errNotFound) {
				return nil
			}
			if err == nil {
				j.invalidate(job.ProductID, version)
				j.log.Warn("image dead", "job_id", job.ID, "product_id", job.ProductID, "request_id", job.RequestID, "code", why.Code, "err", why)
			}
			return err
		})
}
