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
		awaitLockWait(t, db)
		_, err := queryIDs(t.Context(), tx, lock, last)
		return err
	})
	if err := errors.Join(err, <-changed); err != nil {
		t.Error(err)
	}
}

// A commit whose client has gone may still be under way: what came of it is known
// when its lock is free.
func TestLostWriteIsAwaited(t *testing.T) {
	t.Parallel()
	s, db := postgresStore(t)
	p := create(t, s)
	eventually(t, "the version is that of the commit", func() bool { // within lostWriteTime, as far as the machine lets
		p.Version++
		now := make(chan []productVersion, 1)
		err := db.InTx(t.Context(), func(tx querier) error {
			if _, err := tx.Exec(t.Context(), `UPDATE products SET version = $2 WHERE id = $1`, p.ID, p.Version); err != nil {
				return err
			}
			go func() { now <- s.versionsNow(t.Context(), p.ID) }()
			awaitLockWait(t, db)
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		found := <-now
		if len(found) > 0 && found[0] != (productVersion{p.ID, p.Version}) {
			t.Fatalf("found %+v, want version %d", found, p.Version)
		}
		return len(found) > 0
	})
}

func awaitLockWait(t *testing.T, db *postgres) {
	t.Helper()
	eventually(t, "somebody waits for a lock", func() bool {
		var waits bool
		err := queryRow(t.Context(), db, []any{&waits}, `SELECT EXISTS (SELECT 1 FROM pg_stat_activity
			WHERE datname = current_database() AND wait_event_type = 'Lock')`)
		return err == nil && waits
	})
}
