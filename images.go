package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"time"
)

// This file is the ledger of the image work: what is due, what the broker has,
// what has become of it, and which stored objects nothing refers to.

// leaseTime is how long a dispatcher has for publishing what it has claimed. A
// claim that outlives it, since its process died, is due again.
const leaseTime = 30 * time.Second

const claimDue = `
WITH due AS MATERIALIZED (
	SELECT id FROM images
	WHERE status = 'pending' AND run_at IS NOT NULL AND run_at <= $1
	ORDER BY run_at
	LIMIT $4 FOR UPDATE SKIP LOCKED)
UPDATE images SET run_at = $2, claim = $3 WHERE id IN (SELECT id FROM due)
RETURNING id, product_id, request_id, traceparent, lone_starts`

const refuseClaimed = `
UPDATE images SET run_at = $1, claim = 0
WHERE status = 'pending' AND run_at = $2 AND claim = $3 AND id = $4`

const lockClaimed = `
SELECT id FROM images WHERE status = 'pending' AND run_at = $1 AND claim = $2 ORDER BY id FOR UPDATE`

const finishClaim = `
UPDATE images SET run_at = NULL, published_at = $1, claim = 0
WHERE status = 'pending' AND run_at = $2 AND claim = $3`

// refusedDelay is the wait before a job that the broker refused is tried again.
const refusedDelay = time.Second

// DispatchDue claims up to limit due jobs, hands them to publish, and marks
// those that it did not refuse as published, also if it failed with the others.
// It answers how many it claimed.
//
// The claim is a lease that is committed first: no lock is held while the broker
// is waited for, and a job whose process dies in between is published again.
func (s *store) DispatchDue(ctx context.Context, limit int, publish func(context.Context, []Job) ([]Job, error)) (int, error) {
	now, claim := s.now(), rand.Int64()
	lease := now.Add(leaseTime)
	jobs, err := updateReturning(ctx, s, scanJob, claimDue, now, lease, claim, limit)
	if err != nil || len(jobs) == 0 {
		return 0, wrap(err, "claim due images")
	}
	point("claimed")
	refused, publishErr := publish(ctx, jobs)
	// Also when ctx has ended meanwhile: what was published is best known as such.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), leaseTime/6)
	defer cancel()
	err = s.InTx(ctx, func(tx querier) error {
		if _, err := queryIDs(ctx, tx, lockClaimed, lease, claim); err != nil {
			return err
		}
		retry := s.now().Add(refusedDelay)
		for _, job := range refused {
			if _, err := tx.Exec(ctx, refuseClaimed, retry, lease, claim, job.ID); err != nil {
				return err
			}
		}
		_, err := tx.Exec(ctx, finishClaim, s.now(), lease, claim)
		return err
	})
	point("marked as published")
	return len(jobs), errors.Join(publishErr, wrap(err, "mark images as published"))
}

func scanJob(r rows) (Job, error) {
	var j Job
	err := r.Scan(&j.ID, &j.ProductID, &j.RequestID, &j.Traceparent, &j.Starts)
	return j, err
}

const (
	// Each half of the condition has a partial index, images_published and images_due,
	// and SQLite uses them for a query each.
	selectPublished = `
SELECT id FROM images WHERE status = 'pending' AND run_at IS NULL
UNION ALL
SELECT id FROM images WHERE status = 'pending' AND run_at IS NOT NULL AND claim <> 0`

	requeueAll = `
UPDATE images SET run_at = $2, claim = 0
WHERE id IN (SELECT id FROM images WHERE id = ANY($1) AND status = 'pending' AND (run_at IS NULL OR claim <> 0)
	ORDER BY id FOR UPDATE)`
)

// requeueAllTime is enough for millions of rows.
const requeueAllTime = 10 * time.Minute

// RequeueAll makes every unfinished job that was published due again: for a
// queue that begins empty. That includes what is claimed right now. It may have
// gone to the queue that is no more, which RabbitMQ confirms all the same, and its
// dispatcher, whose lease this takes away, then does not mark it as published.
//
// It does so in batches: one transaction for millions of rows would keep workers
// from theirs, and events from being shown. If it ends in between it is to be called again.
func (s *store) RequeueAll(ctx context.Context) (int64, error) {
	if leftOut("refill") {
		return 0, nil
	}
	ctx, cancel := context.WithTimeout(ctx, requeueAllTime)
	defer cancel()
	ids, err := queryIDs(ctx, s, selectPublished)
	if err != nil {
		return 0, wrap(err, "read published images")
	}
	n, err := s.inChunks(ctx, requeueAll, ids, s.now())
	return n, wrap(err, "requeue all published images")
}

const requeuePublished = `
WITH batch AS MATERIALIZED (
	SELECT id FROM images WHERE status = 'pending' AND run_at IS NULL AND published_at <= $2 LIMIT $3)
UPDATE images SET run_at = $1
WHERE id IN (SELECT id FROM images WHERE id IN (SELECT id FROM batch) AND status = 'pending' AND run_at IS NULL AND published_at <= $2
	ORDER BY id FOR UPDATE)`

// RequeuePublished makes every unfinished job that was published at least age
// ago due again: for what the broker has lost from a queue that stands.
func (s *store) RequeuePublished(ctx context.Context, age time.Duration) (int64, error) {
	now := s.now()
	n, err := s.inBatches(ctx, requeuePublished, now, now.Add(-age))
	return n, wrap(err, "requeue published images")
}

const selectPending = `SELECT ` + imageColumns + ` FROM images i WHERE i.id = $1 AND i.status = 'pending'`

// PendingImage reads the image of a job, or answers errNotFound if there is
// nothing left to do: it is finished, replaced or deleted.
func (s *store) PendingImage(ctx context.Context, id int64) (Image, error) {
	var i Image
	err := queryRow(ctx, s, imageTargets(&i), selectPending, id)
	return i, wrap(err, "read image %d", id)
}

// garbageGrace is how long an uploaded object may wait for its image to be
// settled before it counts as garbage. Outages in between are part of it; one
// that lasts longer costs an upload, see SettleReady.
const garbageGrace = time.Hour

const reserveObject = `
INSERT INTO garbage (object_key, delete_at) VALUES ($1, $2)
ON CONFLICT (object_key) DO UPDATE SET delete_at = excluded.delete_at WHERE NOT garbage.deleting`

var errObjectBusy = errors.New("object is being deleted")

// ReserveObject is called before objects are uploaded for a pending image. From
// here on they are garbage until SettleReady has the image refer to them, so a
// crash in between leaves nothing behind for good. One that the image refers to
// already, since it is made again and came out the same, is none and stays so.
// errNotFound as for PendingImage.
func (s *store) ReserveObject(ctx context.Context, imageID int64, keys ...string) error {
	err := s.InTx(ctx, func(tx querier) error {
		held, err := heldKeys(ctx, tx, imageID)
		if err != nil {
			return err
		}
		if leftOut("reservation") {
			return nil
		}
		for _, key := range without(keys, held) {
			n, err := tx.Exec(ctx, reserveObject, key, s.now().Add(garbageGrace))
			if err == nil && n == 0 {
				err = errObjectBusy
			}
			if err != nil {
				return err
			}
		}
		return nil
	})
	return wrap(err, "reserve objects of image %d", imageID)
}

const lockPending = selectPending + ` FOR UPDATE`

// heldKeys locks a pending image and answers the keys that it refers to: none,
// unless it is made again.
func heldKeys(ctx context.Context, tx querier, imageID int64) ([]string, error) {
	var i Image
	err := queryRow(ctx, tx, imageTargets(&i), lockPending, imageID)
	return i.keys(), err
}

// without answers those of all that are not in some.
func without(all, some []string) []string {
	return slices.DeleteFunc(slices.Clone(all), func(key string) bool { return slices.Contains(some, key) })
}

// discardObjects has objects deleted from the given time on, also those that are
// reserved for longer.
func discardObjects(ctx context.Context, tx querier, keys []string, at time.Time) error {
	for _, key := range keys {
		if _, err := tx.Exec(ctx, insertGarbage, key, at); err != nil {
			return err
		}
	}
	return nil
}

const insertGarbage = `
INSERT INTO garbage (object_key, delete_at) VALUES ($1, $2)
ON CONFLICT (object_key) DO UPDATE SET delete_at = excluded.delete_at
WHERE NOT garbage.deleting AND garbage.delete_at > excluded.delete_at`

// errReservationLost says that the object was deleted as garbage before its
// image was settled: upload it again.
var errReservationLost = errors.New("object reservation lost")

const settleReady = `
UPDATE images SET status = 'ready', object_key = $3, width = $4, height = $5, bytes = $6, source_bytes = $7, variants = $8,
	ready_at = $9, run_at = NULL, error_code = '', error_detail = ''
WHERE id = $1 AND status = 'pending' AND product_id = $2`

// overtakenTime is how long the objects stay that an image referred to before it
// was made again. Pages that show them are still about: an instance that missed
// the news serves their URLs for CACHE_TTL, a minute if nobody has set it.
const overtakenTime = 2 * time.Minute

// SettleReady makes the image refer to its stored objects, as done carries them,
// and answers the product's new version. What it referred to before becomes
// garbage. errNotFound if the image is no longer wanted or someone else has
// finished it: then nothing changes.
func (s *store) SettleReady(ctx context.Context, job Job, done Image) (version int64, err error) {
	version, err = s.settle(ctx, job.ProductID, func(tx querier) (int64, error) {
		held, err := heldKeys(ctx, tx, job.ID)
		if err != nil {
			return 0, err
		}
		n, err := tx.Exec(ctx, settleReady, job.ID, job.ProductID,
			done.Key, done.Width, done.Height, done.Bytes, done.SourceBytes, done.Variants.text(), s.now())
		if err != nil || n == 0 {
			return n, err
		}
		if err := claimObjects(ctx, tx, without(done.keys(), held)); err != nil {
			return 0, err
		}
		return n, discardObjects(ctx, tx, without(held, done.keys()), s.now().Add(overtakenTime))
	})
	return version, wrap(err, "settle image %d", job.ID)
}

// claimObjects takes reserved objects out of the garbage.
func claimObjects(ctx context.Context, tx querier, keys []string) error {
	for _, key := range keys {
		reserved, err := tx.Exec(ctx, `DELETE FROM garbage WHERE object_key = $1 AND NOT deleting`, key)
		if err == nil && reserved == 0 && !leftOut("reservation") {
			err = errReservationLost
		}
		if err != nil {
			return err
		}
	}
	return nil
}

const lockImage = `SELECT ` + imageColumns + ` FROM images i WHERE i.id = $1 FOR UPDATE`

// DiscardUnwanted has those objects of a worker deleted that came too late and to
// which its image does not refer. They may be in the garbage no longer: another
// worker with the same result was faster, and its objects are gone already.
func (s *store) DiscardUnwanted(ctx context.Context, imageID int64, keys []string) error {
	err := s.InTx(ctx, func(tx querier) error {
		var i Image
		err := queryRow(ctx, tx, imageTargets(&i), lockImage, imageID)
		if err != nil && !errors.Is(err, errNotFound) {
			return err
		}
		return discardObjects(ctx, tx, without(keys, i.keys()), s.now())
	})
	return wrap(err, "discard objects of image %d", imageID)
}

// failure is a failed try of an image.
type failure struct {
	*imageError
	Attempt  int           // which try it was, from 1
	Duration time.Duration // of the try
	RetryAt  time.Time     // zero: the image is dead
}

// times are when it is due again and when it failed for good, one of them null.
func (f failure) times(now time.Time) (retryAt, failedAt any) {
	if f.RetryAt.IsZero() {
		return nil, now
	}
	return f.RetryAt.UTC().Truncate(time.Millisecond), nil
}

const settleFailed = `
UPDATE images SET attempts = $3, error_code = $4, error_detail = $5,
	status = $6, run_at = $7, claim = 0, failed_at = $8, lone_starts = 0
WHERE id = $1 AND product_id = $2 AND status = 'pending' AND attempts = $3 - 1`

// SettleFailed records a failed try: the image is due again at f.RetryAt, or is
// a dead letter. Results as for SettleReady; a try that was counted already, by
// a worker with a second copy of the message, changes nothing.
func (s *store) SettleFailed(ctx context.Context, job Job, f failure) (version int64, err error) {
	now := s.now()
	status := imagePending
	if f.RetryAt.IsZero() {
		status = imageFailed
	}
	retryAt, failedAt := f.times(now)
	version, err = s.settle(ctx, job.ProductID, func(tx querier) (int64, error) {
		n, err := tx.Exec(ctx, settleFailed, job.ID, job.ProductID, f.Attempt, f.Code, f.Detail, status, retryAt, failedAt)
		if err != nil || n == 0 {
			return n, err
		}
		return tx.Exec(ctx, `INSERT INTO image_attempts (image_id, failed_at, duration_ms, code, detail) VALUES ($1, $2, $3, $4, $5)`,
			job.ID, now, f.Duration.Milliseconds(), f.Code, f.Detail)
	})
	return version, wrap(err, "settle failed image %d", job.ID)
}

const selectPutOff = `SELECT put_off FROM images WHERE id = $1 AND status = 'pending' FOR UPDATE`

// putOffBase is the first wait for a host that is busy, or a storage that is away;
// it doubles, with jitter, to maxRetryDelay, so that a long queue for one host is
// not published again and again.
const putOffBase = 2 * time.Second

// PutOff makes a pending image due again after a while, with no attempt and no
// lone start counted: it is not to blame for the delay. errNotFound as for
// PendingImage.
func (s *store) PutOff(ctx context.Context, id int64) error {
	err := s.InTx(ctx, func(tx querier) error {
		var times int
		if err := queryRow(ctx, tx, []any{&times}, selectPutOff, id); err != nil {
			return err
		}
		due := s.now().Add(backoff(putOffBase, times+1)).Truncate(time.Millisecond)
		_, err := tx.Exec(ctx, `UPDATE images SET run_at = $2, claim = 0, put_off = $3, lone_starts = 0 WHERE id = $1`, id, due, times+1)
		return err
	})
	return wrap(err, "put off image %d", id)
}

// settle applies a change of one image and raises its product's version, or
// answers errNotFound if there was nothing to change.
func (s *store) settle(ctx context.Context, productID int64, apply func(tx querier) (changed int64, err error)) (version int64, err error) {
	err = s.InTx(ctx, func(tx querier) error {
		if err := queryRow(ctx, tx, []any{&version}, lockProduct, productID); err != nil {
			return err
		}
		n, err := apply(tx)
		if err != nil {
			return err
		}
		if n == 0 {
			return errNotFound
		}
		version++
		_, err = tx.Exec(ctx, `UPDATE products SET version = $2, updated_at = $3 WHERE id = $1`, productID, version, s.now())
		return err
	})
	return version, err
}

// deletingTime is how long the deletion of an object may take before another
// instance tries it.
const deletingTime = 15 * time.Second

// garbageRetry is the wait before an object that storage did not delete is tried
// again.
const garbageRetry = 10 * time.Second

const claimGarbage = `
WITH due AS MATERIALIZED (
	SELECT object_key FROM garbage
	WHERE delete_at <= $1
	ORDER BY delete_at
	LIMIT $3 FOR UPDATE SKIP LOCKED)
UPDATE garbage SET deleting = true, delete_at = $2 WHERE object_key IN (SELECT object_key FROM due)
RETURNING object_key`

// CollectGarbage deletes up to limit objects that are due, and answers how many
// there were. remove must end with its context, and may be called for an object
// twice.
//
// That context ends before the claim does, also of a process that was frozen in
// between: by then another may have deleted an object, and it may be in use anew.
func (s *store) CollectGarbage(ctx context.Context, limit int, remove func(ctx context.Context, key string) error) (int, error) {
	removing, cancel := context.WithTimeout(ctx, deletingTime)
	defer cancel()
	now := s.now()
	until := now.Add(deletingTime)
	keys, err := updateReturning(ctx, s, scanOne[string], claimGarbage, now, until, limit)
	if err != nil || len(keys) == 0 {
		return 0, wrap(err, "claim garbage")
	}
	point("garbage claimed")
	var failed error
	for _, key := range keys {
		if err := remove(removing, key); err != nil {
			failed = errors.Join(failed, fmt.Errorf("delete object %s: %w", key, err))
			continue // one that never can be deleted must not keep those beside it
		}
		point("object deleted")
		_, err := s.Exec(ctx, `DELETE FROM garbage WHERE object_key = $1 AND deleting AND delete_at = $2`, key, until)
		if err != nil {
			return len(keys), wrap(err, "forget garbage")
		}
		point("garbage forgotten")
	}
	if failed != nil {
		_, err := s.Exec(ctx, `UPDATE garbage SET delete_at = $1 WHERE deleting AND delete_at = $2`, s.now().Add(garbageRetry), until)
		failed = errors.Join(failed, wrap(err, "give garbage back"))
	}
	return len(keys), failed
}
