package main

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// An image that kills its worker, or has it killed, comes back from the broker
// each time. So do the innocent images that were in hand beside it, and each of
// those deliveries counts. What tells them apart is in the row: an image that
// came back suspectDeliveries times is started only while nothing else is in
// hand, and each such start is counted until it has any outcome. Whoever is
// started alone maxLoneStarts times without one is poison.
//
// The queue within the process ends with it and counts nothing. There every start is
// counted, and what was in hand as two processes in a row died is started alone.
//
// An image so ends after at most suspectDeliveries + maxLoneStarts + 1
// deliveries, which is within deliveryLimit. The broker's limit is behind that,
// for what does not get as far as a start.
const (
	suspectDeliveries = 5
	maxLoneStarts     = 10
)

func poisonError(starts int) *imageError {
	return permanent("poison", "its worker ended each of the last %d times that it started this image", starts)
}

const countLoneStart = `UPDATE images SET lone_starts = lone_starts + 1 WHERE id = $1 AND status = 'pending' RETURNING lone_starts`

// CountLoneStart notes that a pending image is about to be started, with nothing
// else in hand if it is a suspect, and answers how many such starts in a row that makes. errNotFound
// as for PendingImage.
func (s *store) CountLoneStart(ctx context.Context, id int64) (int, error) {
	starts, err := only(updateReturning(ctx, s, scanOne[int], countLoneStart, id))
	return starts, wrap(err, "count start of image %d", id)
}

// ForgetLoneStarts notes that an image was given back by a worker that lives.
func (s *store) ForgetLoneStarts(ctx context.Context, id int64) error {
	_, err := s.Exec(ctx, `UPDATE images SET lone_starts = 0 WHERE id = $1 AND status = 'pending'`, id)
	return wrap(err, "forget starts of image %d", id)
}

const reviveGivenUp = `
UPDATE images SET lone_starts = lone_starts + 1, run_at = $3
WHERE id = $1 AND status = 'pending' AND run_at IS NULL AND published_at <= $2
RETURNING lone_starts, attempts`

// ReviveGivenUp queues a pending image anew that the broker gave up at its
// delivery limit, which an innocent may reach too: by the company it was in, or
// by connections that broke. If that has happened too often it is a dead letter,
// and version its product's new one, else 0.
//
// published is the time of the message that was given up. An image that was
// published again since is in work, and not meant: errNotFound.
func (s *store) ReviveGivenUp(ctx context.Context, job Job, published time.Time) (version int64, err error) {
	var starts, attempts int
	// A job is marked as published after its message was made, within the lease.
	err = s.InTx(ctx, func(tx querier) error {
		return queryRow(ctx, tx, []any{&starts, &attempts}, reviveGivenUp, job.ID, published.UTC().Add(leaseTime), s.now())
	})
	if err != nil {
		return 0, fmt.Errorf("revive image %d: %w", job.ID, err)
	}
	if starts <= maxLoneStarts {
		return 0, nil
	}
	return s.SettleFailed(ctx, job, failure{imageError: poisonError(starts), Attempt: attempts + 1})
}

// countStart has an image pay for its start where that is counted; one that has none
// left is poison.
func (p *pipeline) countStart(ctx context.Context, w *work) error {
	if !w.delivery.Counted {
		return nil
	}
	var starts int
	err := p.persist(ctx, w, func() (err error) { starts, err = p.store.CountLoneStart(ctx, w.delivery.Job.ID); return err })
	if err == nil && starts > maxLoneStarts {
		return poisonError(maxLoneStarts)
	}
	return err
}

// giveBack returns an unfinished image to the queue, unharmed.
func (p *pipeline) giveBack(ctx context.Context, w *work) error {
	var err error
	if w.delivery.Counted {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second) // ctx has ended
		defer cancel()
		err = p.store.ForgetLoneStarts(ctx, w.delivery.Job.ID)
	}
	return errors.Join(err, w.delivery.Release())
}
