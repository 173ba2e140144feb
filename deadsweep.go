package main

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"log/slog"
	"math/rand/v2"
	"slices"
	"time"
)

// deadQueue is the part of the queue that holds the copies of dead letters.
type deadQueue interface {
	DeadCopies(ctx context.Context) (int, error)
	SweepDead(ctx context.Context, judge func(context.Context, []deadCopy) (stay []bool, err error), dead iter.Seq2[Job, error]) error
}

const (
	// deadLookInterval is how often the copies and the rows are counted.
	deadLookInterval = 10 * time.Second
	// deadGrace is how long a copy may take to follow its row.
	deadGrace = 10 * time.Second
	// deadSweepInterval is how often the queue is read though the numbers agree:
	// one copy too many may hide one that is missing.
	deadSweepInterval = time.Hour
	// A look is followed by a rest of this many times its length, so that reading
	// a long queue takes next to nothing of the time, however often it is asked for.
	deadRestFactor = 20
	deadLeastRest  = time.Second
	deadFailedRest = time.Minute // at most: a look that failed may have waited for a server that was away
)

// deadKeeper sees to it that the dead-letter queue and the rows agree: each dead
// letter has exactly one copy in the queue, and there are no others. Whatever
// made them differ (a replay, a crash between a commit and a reject, a purged
// queue, a wiped broker, a copy too many), one sweep mends it.
type deadKeeper struct {
	store      *store
	queue      deadQueue
	invalidate func(productID, version int64)
	wake       func() // images are due
	log        *slog.Logger
	soon       chan struct{} // a token: there may be a difference
	grace      time.Duration
	nextSweep  time.Time
	health     healthLog
}

func newDeadKeeper(db *store, queue deadQueue, invalidate func(int64, int64), wake func(), log *slog.Logger) *deadKeeper {
	log = log.With("stage", "dead letters")
	return &deadKeeper{store: db, queue: queue, invalidate: invalidate, wake: wake, log: log,
		soon: make(chan struct{}, 1), grace: deadGrace, health: healthLog{log: log},
		// At random, so that instances take turns and short-lived ones come to it too.
		nextSweep: time.Now().Add(rand.N(deadSweepInterval))}
}

// LookSoon has the keeper look now rather than at its next round. It never blocks.
func (k *deadKeeper) LookSoon() { poke(k.soon) }

// Run looks until ctx ends.
func (k *deadKeeper) Run(ctx context.Context) error {
	timer := time.NewTimer(deadLookInterval)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-k.soon:
		case <-timer.C:
		}
		start := time.Now()
		err := k.look(ctx)
		k.health.note(ctx, err, "the dead-letter queue is not looked after, retrying", "the dead-letter queue is looked after again")
		rest := max(deadLeastRest, deadRestFactor*time.Since(start))
		if err != nil {
			rest = min(rest, deadFailedRest)
		}
		if sleep(ctx, rest) != nil {
			return nil
		}
		timer.Reset(deadLookInterval)
	}
}

// look compares numbers, which costs next to nothing, and sweeps if they differ
// or it is time.
func (k *deadKeeper) look(ctx context.Context) error {
	agree, err := k.numbersAgree(ctx)
	if err != nil || agree && time.Now().Before(k.nextSweep) {
		return err
	}
	err = k.sweep(ctx)
	if err == nil || errors.Is(err, errSweepTaken) {
		k.nextSweep = time.Now().Add(deadSweepInterval)
		return nil
	}
	return err
}

// numbersAgree lets copies of the latest deaths be on their way.
func (k *deadKeeper) numbersAgree(ctx context.Context) (bool, error) {
	copies, err := k.queue.DeadCopies(ctx)
	if err != nil {
		return false, err
	}
	all, settled, err := k.store.countDeadBefore(ctx, k.store.now().Add(-k.grace))
	return settled <= copies && copies <= all, err
}

func (k *deadKeeper) sweep(ctx context.Context) error {
	return k.queue.SweepDead(ctx, k.judge, k.store.deadBefore(ctx, k.store.now().Add(-k.grace)))
}

// judge says which copies belong to a dead letter. Images that the broker gave up
// are seen to first.
func (k *deadKeeper) judge(ctx context.Context, copies []deadCopy) (stay []bool, err error) {
	ids := make([]int64, len(copies))
	for n, c := range copies {
		ids[n] = c.Job.ID
		if c.GivenUp {
			if err := k.revive(ctx, c); err != nil {
				return nil, err
			}
		}
	}
	dead, err := k.store.deadAmong(ctx, ids)
	stay = make([]bool, len(copies))
	for n, id := range ids {
		stay[n] = slices.Contains(dead, id)
	}
	return stay, err
}

func (k *deadKeeper) revive(ctx context.Context, c deadCopy) error {
	log := c.Job.on(k.log.With("job_id", c.Job.ID, "product_id", c.Job.ProductID))
	version, err := k.store.ReviveGivenUp(ctx, c.Job, c.Published)
	switch {
	case errors.Is(err, errNotFound):
		return nil
	case err != nil:
		return err
	case version == 0:
		log.Warn("the broker gave an image up, queueing it anew")
		k.wake()
	default:
		log.Warn("image dead", "code", "poison")
		imagesDead.Inc()
		k.invalidate(c.Job.ProductID, version)
	}
	return nil
}

const countDeadBefore = `
SELECT count(*), count(*) FILTER (WHERE failed_at <= $1)
FROM images WHERE ` + isDead

// countDeadBefore counts the dead letters, and those of them that failed by the
// given time.
func (s *store) countDeadBefore(ctx context.Context, t time.Time) (all, before int, err error) {
	err = queryRow(ctx, s, []any{&all, &before}, countDeadBefore, t)
	return all, before, wrap(err, "count dead letters")
}

const selectDeadAmong = `SELECT id FROM images WHERE id = ANY($1) AND ` + isDead

// deadAmong says which of some images are dead letters.
func (s *store) deadAmong(ctx context.Context, ids []int64) ([]int64, error) {
	dead, err := queryIDs(ctx, s, selectDeadAmong, ids)
	return dead, wrap(err, "look up dead letters")
}

const selectDeadBefore = `
SELECT id, product_id, request_id, traceparent, lone_starts FROM images
WHERE ` + isDead + ` AND failed_at <= $1 AND id > $2
ORDER BY id LIMIT $3`

// deadBefore reads the jobs of the dead letters that failed by the given time,
// a page at a time. An error is the last that it yields.
func (s *store) deadBefore(ctx context.Context, t time.Time) iter.Seq2[Job, error] {
	const page = 1000
	return func(yield func(Job, error) bool) {
		for after := int64(0); ; {
			jobs, err := query(ctx, s, scanJob, selectDeadBefore, t, after, page)
			if err != nil {
				yield(Job{}, fmt.Errorf("read dead letters: %w", err))
				return
			}
			for _, job := range jobs {
				if !yield(job, nil) {
					return
				}
				after = job.ID
			}
			if len(jobs) < page {
				return
			}
		}
	}
}
