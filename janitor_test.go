package main

import (
	"context"
	"testing"
	"testing/synctest"
	"time"
)

// slowBlobs deletes an object in a second.
type slowBlobs struct{ awayBlobs }

func (slowBlobs) Delete(context.Context, string) error { time.Sleep(time.Second); return nil }

// What is too old to be of use goes by itself, though there is garbage for hours.
// (That the tables' methods take no more than that is tested with each of them.)
func TestJanitorForgetsWhatIsOld(t *testing.T) {
	t.Parallel()
	if _, err := migratedFile(); err != nil { // outside the bubble, which shares it
		t.Fatal(err)
	}
	synctest.Test(t, func(t *testing.T) {
		s := sqliteStore(t)
		create(t, s)
		once := &idempotency{Key: "k", Fingerprint: []byte("body"), Render: func(Product) []byte { return nil }}
		if _, err := s.CreateProduct(t.Context(), Product{UserID: 1}, origin{}, once); err != nil {
			t.Fatal(err)
		}
		hook := hookOn(t, s, "http://a.example")
		_, err := s.Exec(t.Context(), `INSERT INTO deliveries (webhook_id, event_id, product_id, body, failed_at) VALUES ($1, 1, 1, '', $2)`, hook.ID, s.now())
		if err != nil {
			t.Fatal(err)
		}
		const hours = `WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 10000) INSERT INTO garbage (object_key, delete_at) SELECT 'k' || i, $1 FROM n`
		if _, err := s.Exec(t.Context(), hours, s.now()); err != nil {
			t.Fatal(err)
		}
		advance(s, failedDeliveryTime+time.Minute)
		runUntilEnd(t, newJanitor(s, slowBlobs{}, quiet).Run)
		time.Sleep(2*garbageInterval + time.Second) // the bubble's clock
		synctest.Wait()
		for table, want := range map[string]int{"idempotency_keys": 0, "deliveries": 0, "events": 1} {
			var n int
			if err := queryRow(t.Context(), s, []any{&n}, `SELECT count(*) FROM `+table); err != nil || n != want {
				t.Errorf("%s has %d rows, want %d: %v", table, n, want, err)
			}
		}
	})
}
