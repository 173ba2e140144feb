package main

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// workload is what the database says of the images as a whole. It is true for
// all instances together.
type workload struct {
	Pending   int           // neither ready nor dead
	Published int           // of those: in the queue, or in a worker's hands
	DueFor    time.Duration // how long the first job that should be in the queue has waited to get there
	Dead      int           // dead letters
	DeadFor   time.Duration // the age of the oldest of them
	Ready     int           // that became ready in the span asked for
	Failed    int           // that became dead letters in it, and still are
}

// workloadLimit is how far images are counted, so that a look at a long backlog
// costs little. A count of this much means "at least".
const workloadLimit = 100_000

var selectWorkload = fmt.Sprintf(`
SELECT
	(SELECT count(*) FROM (SELECT 1 FROM images WHERE status = 'pending' AND run_at IS NOT NULL LIMIT %[1]d) AS due),
	(SELECT count(*) FROM (SELECT 1 FROM images WHERE status = 'pending' AND run_at IS NULL LIMIT %[1]d) AS published),
	(SELECT count(*) FROM (SELECT 1 FROM images WHERE %[2]s LIMIT %[1]d) AS dead),
	(SELECT count(*) FROM images WHERE ready_at > $1 AND ready_at <= $2),
	(SELECT count(*) FROM images WHERE %[2]s AND failed_at > $1 AND failed_at <= $2)`,
	workloadLimit, isDead)

const (
	selectOldestDue  = `SELECT run_at FROM images WHERE status = 'pending' AND run_at <= $1 ORDER BY run_at LIMIT 1`
	selectOldestDead = `SELECT failed_at FROM images WHERE ` + isDead + ` AND failed_at <= $1 ORDER BY failed_at LIMIT 1`
)

// Workload reads the workload; Ready and Failed are of the time after since, up
// to until.
func (s *store) Workload(ctx context.Context, since, until time.Time) (workload, error) {
	var w workload
	var due int
	err := queryRow(ctx, s, []any{&due, &w.Published, &w.Dead, &w.Ready, &w.Failed}, selectWorkload, since, until)
	if err == nil {
		w.Pending = min(due+w.Published, workloadLimit)
		w.DueFor, err = s.age(ctx, selectOldestDue)
	}
	if err == nil {
		w.DeadFor, err = s.age(ctx, selectOldestDead)
	}
	return w, wrap(err, "read the workload")
}

// age answers how long ago the time was that a query selects, or 0 if it selects
// nothing.
func (s *store) age(ctx context.Context, sql string) (time.Duration, error) {
	var at time.Time
	now := s.now()
	err := queryRow(ctx, s, []any{&at}, sql, now)
	if errors.Is(err, errNotFound) {
		return 0, nil
	}
	return now.Sub(at), err
}
