package main

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// deadLetter is an image that failed for good and waits for a person.
type deadLetter struct {
	Image
	ProductID int64
	FailedAt  time.Time
	History   []attempt // oldest first; only DeadLetter fills it
}

// attempt is one failed try of an image.
type attempt struct {
	FailedAt time.Time
	Duration time.Duration
	Code     string
	Detail   string
}

const selectDeadLetters = `
SELECT ` + imageColumns + `, i.product_id, i.failed_at
FROM images i
WHERE i.status = 'failed' AND i.discarded_at IS NULL`

func deadLetterTargets(d *deadLetter) []any {
	return append(imageTargets(&d.Image), &d.ProductID, &d.FailedAt)
}

// DeadLetters reads a page of the dead letters, by id, after the given one.
func (s *store) DeadLetters(ctx context.Context, after int64, limit int) ([]deadLetter, error) {
	r, err := s.Query(ctx, selectDeadLetters+` AND i.id > $1 ORDER BY i.id LIMIT $2`, after, limit)
	letters, err := collect(r, err, func(r rows) (deadLetter, error) {
		var d deadLetter
		err := r.Scan(deadLetterTargets(&d)...)
		return d, err
	})
	return letters, wrap("list dead letters", err)
}

const selectAttempts = `SELECT failed_at, duration_ms, code, detail FROM image_attempts WHERE image_id = $1 ORDER BY id`

// DeadLetter reads one dead letter with the history of its attempts, or answers
// errNotFound.
func (s *store) DeadLetter(ctx context.Context, id int64) (deadLetter, error) {
	var d deadLetter
	if err := queryRow(ctx, s, deadLetterTargets(&d), selectDeadLetters+` AND i.id = $1`, id); err != nil {
		return d, wrap(fmt.Sprintf("read dead letter %d", id), err)
	}
	r, err := s.Query(ctx, selectAttempts, id)
	d.History, err = collect(r, err, func(r rows) (attempt, error) {
		var a attempt
		var ms int64
		err := r.Scan(&a.FailedAt, &ms, &a.Code, &a.Detail)
		a.Duration = time.Duration(ms) * time.Millisecond
		return a, err
	})
	return d, wrap(fmt.Sprintf("read attempts of image %d", id), err)
}

const replayDead = `
UPDATE images SET status = 'pending', attempts = 0, run_at = $2, failed_at = NULL, error_code = '', error_detail = ''
WHERE id = $1 AND status = 'failed' AND discarded_at IS NULL`

// ReplayDead queues a dead letter anew, with all its attempts before it, and
// answers its product and the product's new version. errNotFound if it is not
// a dead letter.
func (s *store) ReplayDead(ctx context.Context, id int64) (productID, version int64, err error) {
	d, err := s.DeadLetter(ctx, id)
	if err != nil {
		return 0, 0, err
	}
	version, err = s.settle(ctx, d.ProductID, func(tx querier) (int64, error) {
		return tx.Exec(ctx, replayDead, id, s.now())
	})
	point("replayed")
	return d.ProductID, version, wrap(fmt.Sprintf("replay dead letter %d", id), err)
}

// DiscardDead gives a dead letter up for good: its image stays failed, but waits
// for nobody. errNotFound if it is not a dead letter.
func (s *store) DiscardDead(ctx context.Context, id int64) error {
	n, err := s.Exec(ctx, `UPDATE images SET discarded_at = $2 WHERE id = $1 AND status = 'failed' AND discarded_at IS NULL`, id, s.now())
	if err == nil && n == 0 {
		err = errNotFound
	}
	return wrap(fmt.Sprintf("discard dead letter %d", id), err)
}

// IsDead says whether an image is a dead letter.
func (s *store) IsDead(ctx context.Context, id int64) (bool, error) {
	_, err := s.DeadLetter(ctx, id)
	if errors.Is(err, errNotFound) {
		return false, nil
	}
	return err == nil, err
}

const selectGivenUp = `
SELECT attempts FROM images
WHERE id = $1 AND status = 'pending' AND run_at IS NULL AND published_at <= $2`

// MarkDead makes a dead letter of an image that the broker gave up, since its
// worker died each time that it had it in hand. An image that was published
// again after the message the broker gave up, which is of the given time, is not
// meant: errNotFound.
func (s *store) MarkDead(ctx context.Context, job Job, published time.Time, why *imageError) (version int64, err error) {
	var attempts int
	// A job is marked as published after its message was made, within the lease.
	err = queryRow(ctx, s, []any{&attempts}, selectGivenUp, job.ID, published.UTC().Add(leaseTime))
	if err != nil {
		return 0, wrap(fmt.Sprintf("read image %d", job.ID), err)
	}
	return s.SettleFailed(ctx, job, failure{imageError: why, Attempt: attempts + 1})
}
