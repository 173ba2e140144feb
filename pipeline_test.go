package main

import (
	"context"
	"slices"
	"sync/atomic"
	"testing"

	"golang.org/x/sync/semaphore"
)

// lossyDB commits a transaction and then loses the connection, once lose is set.
type lossyDB struct {
	database
	lose atomic.Bool
}

func (d *lossyDB) InTx(ctx context.Context, do func(querier) error) error {
	err := d.database.InTx(ctx, do)
	if err == nil && d.lose.CompareAndSwap(true, false) {
		return errUnavailable
	}
	return err
}

// A result whose commit got through though its answer did not is told to the
// caches all the same: nobody else has.
func TestPipelineTellsOfACommitThatItDidNotSee(t *testing.T) {
	t.Parallel()
	outcomes := map[string]func(w *work){
		"ready":    func(w *work) { w.image.Key, w.outputs = "key", []compressedImage{{}} },
		"to retry": func(w *work) { w.err = transient("http_503", "503 Service Unavailable") },
		"dead":     func(w *work) { w.err = permanent("http_404", "404 Not Found") },
	}
	eachStore(t, func(t *testing.T, s *store) {
		db := &lossyDB{database: s.database}
		for name, happen := range outcomes {
			product := create(t, s, "https://a.example/1.jpg")
			job := publishDue(t, s)[0]
			if err := s.ReserveObject(t.Context(), job.ID, "key"); err != nil {
				t.Fatal(err)
			}
			var told []productVersion
			p := &pipeline{
				imageSettings: imageSettings{RetryAttempts: 2},
				store:         newStore(db),
				invalidate:    func(id, version int64) { told = append(told, productVersion{id, version}) },
				log:           testLog(t),
			}
			hand := semaphore.NewWeighted(1)
			settled(t, hand.Acquire(t.Context(), 1))
			var verdicts []verdict
			delivery := newDelivery(job, hand, func(v verdict) error { verdicts = append(verdicts, v); return nil })
			w := &work{delivery: delivery, log: p.log, image: Image{ID: job.ID}}
			happen(w)
			db.lose.Store(true)
			p.settle(t.Context(), w)
			if !slices.Equal(told, []productVersion{{product.ID, 2}}) || len(verdicts) != 1 {
				t.Errorf("%s: told %v, settled with %v", name, told, verdicts)
			}
		}
	})
}
