package main

import (
	"context"
	"fmt"
	"slices"
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

// isDead is what makes an image a dead letter, in SQL. The partial indexes on
// images say the same.
const isDead = `status = 'failed' AND discarded_at IS NULL`

// deadFilter selects dead letters, or by host, port and user any images; its zero
// value selects all.
type deadFilter struct {
	Code   string
	Host   string // of the source, in the form of hostName
	Port   int    // of the source; 0 is any
	UserID *int64
	Since  time.Time // of the failure, which may be at that very time
}

// where is the filter over images i that meet a condition.
func (f deadFilter) where(condition string) (c conditions) {
	c.add(condition)
	if f.Code != "" {
		c.add("i.error_code = ?", f.Code)
	}
	if f.Host != "" {
		c.add("i.host = ?", f.Host)
	}
	if f.Port != 0 {
		c.add("i.port = ?", f.Port)
	}
	if f.UserID != nil {
		c.add("i.user_id = ?", *f.UserID)
	}
	if !f.Since.IsZero() {
		c.add("i.failed_at >= ?", f.Since.Add(time.Millisecond-1).UTC().Truncate(time.Millisecond)) // rounded up, as times are stored
	}
	return c
}

const selectDeadLetters = `SELECT ` + imageColumns + `, i.product_id, i.failed_at FROM images i WHERE `

func deadLetterTargets(d *deadLetter) []any {
	return append(imageTargets(&d.Image), &d.ProductID, &d.FailedAt)
}

// DeadLetters reads a page of the dead letters that f selects, by id, after the
// given one.
func (s *store) DeadLetters(ctx context.Context, f deadFilter, after int64, limit int) ([]deadLetter, error) {
	sql, args := f.pageSQL(after, limit)
	r, err := s.QueryOnce(ctx, sql, args...)
	letters, err := collect(r, err, func(r rows) (deadLetter, error) {
		var d deadLetter
		err := r.Scan(deadLetterTargets(&d)...)
		return d, err
	})
	return letters, wrap(err, "list dead letters")
}

func (f deadFilter) pageSQL(after int64, limit int) (string, []any) {
	c := f.where(isDead)
	c.add("i.id > ?", after)
	return fmt.Sprintf("%s%s ORDER BY i.id LIMIT %d", selectDeadLetters, c, limit), c.args
}

// CountDead answers how many dead letters f selects.
func (s *store) CountDead(ctx context.Context, f deadFilter) (n int, err error) {
	n, err = s.countImages(ctx, f.where(isDead))
	return n, wrap(err, "count dead letters")
}

func (s *store) countImages(ctx context.Context, c conditions) (int, error) {
	r, err := s.QueryOnce(ctx, "SELECT count(*) FROM images i WHERE "+c.String(), c.args...)
	return only(collect(r, err, scanOne[int]))
}

const selectDeadLetter = selectDeadLetters + isDead + ` AND i.id = $1`

const selectAttempts = `SELECT failed_at, duration_ms, code, detail FROM image_attempts WHERE image_id = $1 ORDER BY id`

func scanAttempt(r rows) (a attempt, err error) {
	var ms int64
	err = r.Scan(&a.FailedAt, &ms, &a.Code, &a.Detail)
	a.Duration = time.Duration(ms) * time.Millisecond
	return a, err
}

// DeadLetter reads one dead letter with the history of its attempts, or answers
// errNotFound.
func (s *store) DeadLetter(ctx context.Context, id int64) (deadLetter, error) {
	var d deadLetter
	if err := queryRow(ctx, s, deadLetterTargets(&d), selectDeadLetter, id); err != nil {
		return d, wrap(err, "read dead letter %d", id)
	}
	var err error
	d.History, err = query(ctx, s, scanAttempt, selectAttempts, id)
	return d, wrap(err, "read attempts of image %d", id)
}

const (
	selectDeadProducts = `SELECT DISTINCT product_id FROM images WHERE id = ANY($1) AND ` + isDead

	// In order, so that of two replays neither waits for the other's product.
	lockProducts = `SELECT id FROM products WHERE id = ANY($1) ORDER BY id FOR UPDATE`

	// setAnew has an image start from the beginning at $2, for the request $3, $4.
	setAnew = `
UPDATE images SET status = 'pending', attempts = 0, lone_starts = 0, put_off = 0, run_at = $2,
	failed_at = NULL, discarded_at = NULL, error_code = '', error_detail = '', request_id = $3, traceparent = $4`

	replayDead = setAnew + `
WHERE id = ANY($1) AND ` + isDead + `
RETURNING product_id`

	raiseVersions = `UPDATE products SET version = version + 1, updated_at = $2 WHERE id = ANY($1) RETURNING id, version`
)

// productVersion is a version that a product has just got.
type productVersion struct{ ID, Version int64 }

// ReplayDead queues those of the images anew that are dead letters, with all
// their attempts before them. It answers how many they were, and the new versions
// of their products, these also with an error: see versionsNow. Of two that replay
// an image at once, one finds it a dead letter.
func (s *store) ReplayDead(ctx context.Context, ids []int64, from origin) (replayed int, changed []productVersion, err error) {
	replayed, changed, err = s.queueAnew(ctx, ids, from, selectDeadProducts, replayDead)
	if err == nil {
		point("replayed")
	}
	return replayed, changed, wrap(err, "replay %d dead letters", len(ids))
}

// queueAnew runs update, which queues those of the images anew that meet its
// condition, and raises their products' versions. owners finds these products, so
// that they are locked first.
func (s *store) queueAnew(ctx context.Context, ids []int64, from origin, owners, update string) (queued int, changed []productVersion, err error) {
	var products []int64
	err = s.InTx(ctx, func(tx querier) (err error) {
		if products, err = queryIDs(ctx, tx, owners, ids); err != nil {
			return err
		}
		if _, err := queryIDs(ctx, tx, lockProducts, products); err != nil {
			return err
		}
		now := s.now()
		updated, err := queryIDs(ctx, tx, update, ids, now, from.RequestID, from.Traceparent)
		if err != nil {
			return err
		}
		queued = len(updated)
		changed, err = query(ctx, tx, scanVersion, raiseVersions, updated, now)
		return err
	})
	if err != nil && len(changed) > 0 {
		return 0, s.versionsNow(ctx, products...), err
	}
	return queued, changed, err
}

const (
	// lostWriteTime is how long a client whose write failed waits until it is known
	// what came of it. A database that can answer does so sooner.
	lostWriteTime = time.Second

	// In order, so that of two such looks neither waits for the other's product.
	lockVersions = `SELECT id, version FROM products WHERE id = ANY($1) ORDER BY id FOR UPDATE`
)

// versionsNow are the versions that products have after a write of them that
// failed, of one that is deleted the tombstone: perhaps it was committed and only
// the answer was lost, and nobody else would tell. Their locks are waited for,
// since the commit may still be under way. While the database is away nothing is
// known; then CACHE_TTL bounds how long the older version is shown.
func (s *store) versionsNow(ctx context.Context, ids ...int64) []productVersion {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), lostWriteTime)
	defer cancel()
	var now []productVersion
	err := s.InTx(ctx, func(tx querier) (err error) {
		now, err = query(ctx, tx, scanVersion, lockVersions, ids)
		return err
	})
	if err != nil {
		return nil
	}
	for _, id := range ids {
		if !slices.ContainsFunc(now, func(v productVersion) bool { return v.ID == id }) {
			now = append(now, productVersion{id, tombstone}) // it was there, and no id is used twice
		}
	}
	return now
}

func scanVersion(r rows) (v productVersion, err error) {
	err = r.Scan(&v.ID, &v.Version)
	return v, err
}

// queryIDs runs SQL whose result is a column of ids.
func queryIDs(ctx context.Context, q querier, sql string, args ...any) ([]int64, error) {
	return query(ctx, q, scanOne[int64], sql, args...)
}

// DiscardDead gives a dead letter up for good: its image stays failed, but waits
// for nobody. errNotFound if it is not a dead letter.
func (s *store) DiscardDead(ctx context.Context, id int64) error {
	n, err := s.Exec(ctx, `UPDATE images SET discarded_at = $2 WHERE id = $1 AND `+isDead, id, s.now())
	if err == nil && n == 0 {
		err = errNotFound
	}
	return wrap(err, "discard dead letter %d", id)
}

// replay queues every dead letter anew that the filter selects, each once, and
// at most rate of them a second; 0 is no limit. It may be interrupted and called
// again: what it answers is done, also with an error.
func replay(ctx context.Context, db *store, f deadFilter, from origin, rate int, invalidate func(id, version int64)) (replayed int, err error) {
	page := func(after int64, limit int) (ids []int64, err error) {
		letters, err := db.DeadLetters(ctx, f, after, limit)
		for _, letter := range letters {
			ids = append(ids, letter.ID)
		}
		return ids, err
	}
	return eachPage(ctx, rate, page, func(ids []int64) (int, error) { return replayAndTell(ctx, db, ids, from, invalidate) })
}

// queueBatch is how many images one transaction queues anew.
const queueBatch = 500

// eachPage does what page lists, by id after a given one, and answers how much
// was done, also with an error. rate bounds it, a second; 0 is no limit.
func eachPage(ctx context.Context, rate int, page func(after int64, limit int) ([]int64, error), do func(ids []int64) (int, error)) (done int, err error) {
	batch := queueBatch
	if rate > 0 {
		batch = 1
	}
	for after := int64(0); ; {
		ids, err := page(after, batch)
		if err != nil || len(ids) == 0 {
			return done, err
		}
		if after > 0 {
			if err := pauseFor(ctx, rate); err != nil {
				return done, err
			}
		}
		after = ids[len(ids)-1]
		n, err := do(ids)
		if err != nil {
			return done, err
		}
		done += n
	}
}

// replayOne queues a dead letter anew. One that is in work already is no error,
// and none is replayed; errNotFound if it is neither.
func replayOne(ctx context.Context, db *store, id int64, from origin, invalidate func(id, version int64)) (replayed int, err error) {
	replayed, err = replayAndTell(ctx, db, []int64{id}, from, invalidate)
	if err == nil && replayed == 0 {
		_, err = db.PendingImage(ctx, id)
	}
	return replayed, err
}

// replayAndTell is ReplayDead, and tells the caches.
func replayAndTell(ctx context.Context, db *store, ids []int64, from origin, invalidate func(id, version int64)) (replayed int, err error) {
	replayed, changed, err := db.ReplayDead(ctx, ids, from)
	tell(changed, invalidate)
	return replayed, err
}

func tell(changed []productVersion, invalidate func(id, version int64)) {
	for _, product := range changed {
		invalidate(product.ID, product.Version)
	}
}

// pauseFor waits for the time between two things of which there may be rate a
// second, 0 being no limit.
func pauseFor(ctx context.Context, rate int) error {
	if rate == 0 {
		return ctx.Err()
	}
	return sleep(ctx, time.Second/time.Duration(rate))
}
