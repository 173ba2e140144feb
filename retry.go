package main

import (
	"context"
	"log/slog"
	"math/rand/v2"
	"time"
)

// retryPace spaces out tries: doubling from least to most, the later half of
// each pause at random, so that many instances do not come back in step.
type retryPace struct {
	least, most time.Duration
	pause       time.Duration
}

func (r *retryPace) next() time.Duration {
	r.pause = min(max(2*r.pause, r.least), r.most)
	return r.pause/2 + rand.N(r.pause/2+1)
}

func (r *retryPace) reset() { r.pause = 0 }

// wait lets the next pause pass, or ctx end.
func (r *retryPace) wait(ctx context.Context) { _ = sleep(ctx, r.next()) }

// backoff is how long to wait after the given number of failed tries: a random
// time up to base doubled with each ("full jitter", AWS Architecture Blog,
// "Exponential Backoff And Jitter").
func backoff(base time.Duration, tries int) time.Duration {
	// Doubled 20 times the shortest base reaches the limit, and the longest fits.
	return rand.N(min(base<<min(tries-1, 20), maxRetryDelay) + 1)
}

// sleep lets time pass. If ctx ends first it answers why.
func sleep(ctx context.Context, d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// poke leaves a token in a channel that has room for one. A token that is there
// already has not been looked at yet, and will do.
func poke(c chan<- struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// healthLog logs when a fault begins or becomes another, and when it is over, so
// that an hour without a broker is a few lines.
type healthLog struct {
	log  *slog.Logger
	kind string // of the present fault, "" while all is well
}

func (h *healthLog) fault(kind, message string, err error) {
	if h.kind != kind {
		h.log.Warn(message, "err", err)
	}
	h.kind = kind
}

// note logs what came of one round of work that has one kind of fault. That a round
// failed as ctx ended says nothing.
func (h *healthLog) note(ctx context.Context, err error, failing, mended string) {
	switch {
	case err != nil && ctx.Err() == nil:
		h.fault(failing, failing, err)
	case err == nil && h.kind != "":
		h.mended(mended)
	}
}

func (h *healthLog) mended(message string) {
	h.log.Info(message)
	h.kind = ""
}
