package main

import (
	"context"
	"errors"
	"testing"
)

// Whoever locks several images locks them by id, however PostgreSQL has put them,
// so that no two wait for each other.
func TestImagesAreLockedInOrder(t *testing.T) {
	t.Parallel()
	for name, change := range map[string]func(ctx context.Context, s *store, p Product) error{
		"a refill": func(ctx context.Context, s *store, _ Product) error {
			_, err := s.RequeueAll(ctx)
			return err
		},
		"a deletion": func(ctx context.Context, s *store, p Product) error { return s.DeleteProduct(ctx, p.ID, always) },
		"an update": func(ctx context.Context, s *store, p Product) error {
			_, err := s.UpdateProduct(ctx, p.ID, origin{}, always, func(p *Product) { p.Images = nil })
			return err
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s, db := postgresStore(t)
			p := create(t, s, "a", "b", "c")
			publishDue(t, s)
			first, last := p.Images[0].ID, p.Images[2].ID
			wantLockedInOrder(t, db, first, last, func(ctx context.Context) error { return change(ctx, s, p) })
		})
	}
	t.Run("what is published", func(t *testing.T) {
		t.Parallel()
		s, db := postgresStore(t)
		p := create(t, s, "a", "b", "c")
		claimed, publish := make(chan struct{}), make(chan struct{})
		dispatched := make(chan error, 1)
		go func() {
			_, err := s.DispatchDue(t.Context(), 10, func(context.Context, []Job) ([]Job, error) {
				close(claimed)
				<-publish
				return nil, nil
			})
			dispatched <- err
		}()
		<-claimed
		wantLockedInOrder(t, db, p.Images[0].ID, p.Images[2].ID, func(context.Context) error { close(publish); return <-dispatched })
	})
}

// wantLockedInOrder locks the first of some images, which it makes the last in the
// table and its indexes before, and wants the last of them not to be locked by who waits for it.
func wantLockedInOrder(t *testing.T, db *postgres, first, last int64, change func(ctx context.Context) error) {
	t.Helper()
	if _, err := db.Exec(t.Context(), `UPDATE images SET position = position + 100 WHERE id = $1`, first); err != nil {
		t.Fatal(err)
	}
	const lock = `SELECT id FROM images WHERE id = $1 FOR UPDATE NOWAIT`
	changed := make(chan error, 1)
	err := db.InTx(t.Context(), func(tx querier) error {
		if _, err := queryIDs(t.Context(), tx, lock, first); err != nil {
			return err
		}
		go func() { changed <- change(t.Context()) }()
		eventually(t, "it waits for the first image", func() bool {
			var waits bool
			err := queryRow(t.Context(), db, []any{&waits}, `SELECT EXISTS (SELECT 1 FROM pg_stat_activity
				WHERE datname = current_database() AND wait_event_type = 'Lock')`)
			return err == nil && waits
		})
		_, err := queryIDs(t.Context(), tx, lock, last)
		return err
	})
	if err := errors.Join(err, <-changed); err != nil {
		t.Error(err)
	}
}
