package main

import (
	"context"
	"errors"
	"log/slog"
	"time"
)

const (
	garbageInterval = 15 * time.Second
	garbageBatch    = 5
	// removeTimeout is for the deletion of one object; garbageBatch of them must
	// end before another instance may try the same, see deletingTime.
	removeTimeout = deletingTime / garbageBatch
)

// janitor clears away what the rest of the program leaves behind: objects that
// nothing refers to, expired keys, old events.
type janitor struct {
	store   *store
	blobs   blobs
	log     *slog.Logger
	garbage chan struct{} // a token: there may be garbage
}

func newJanitor(db *store, blobs blobs, log *slog.Logger) *janitor {
	return &janitor{store: db, blobs: blobs, log: log, garbage: make(chan struct{}, 1)}
}

// CollectSoon has the janitor look now rather than at its next round. It never
// blocks.
func (j *janitor) CollectSoon() { poke(j.garbage) }

// Run clears up until ctx ends.
func (j *janitor) Run(ctx context.Context) error {
	collect := time.NewTicker(garbageInterval)
	defer collect.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-j.garbage:
			j.report(ctx, j.collect(ctx))
		case <-collect.C:
			j.report(ctx, errors.Join(j.collect(ctx), j.store.ForgetIdempotencyKeys(ctx), j.store.ForgetEvents(ctx), j.store.ForgetDeliveries(ctx)))
		}
	}
}

func (j *janitor) report(ctx context.Context, err error) {
	if err != nil && ctx.Err() == nil {
		j.log.Warn("clearing up failed, will be tried again", "err", err)
	}
}

// collect deletes what is due for as long as a round takes at most. If there is more
// it goes on soon: what is to be forgotten comes in between.
func (j *janitor) collect(ctx context.Context) error {
	for until := time.Now().Add(garbageInterval); time.Now().Before(until); {
		n, err := j.store.CollectGarbage(ctx, garbageBatch, func(ctx context.Context, key string) error {
			ctx, cancel := context.WithTimeout(ctx, removeTimeout)
			defer cancel()
			return j.blobs.Delete(ctx, key)
		})
		if err != nil || n < garbageBatch {
			return err
		}
	}
	j.CollectSoon()
	return nil
}
