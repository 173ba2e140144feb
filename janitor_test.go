package main

import (
	"testing"
	"testing/synctest"
	"time"
)

// What is too old to be of use goes by itself. (That the tables' methods take no
// more than that is tested with each of them.)
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
		advance(s, failedDeliveryTime+time.Minute)
		runUntilEnd(t, newJanitor(s, awayBlobs{}, quiet).Run)
		time.Sleep(garbageInterval + 1) // the bubble's clock
		synctest.Wait()
		for table, want := range map[string]int{"idempotency_keys": 0, "deliveries": 0, "events": 1} {
			var n int
			if err := queryRow(t.Context(), s, []any{&n}, `SELECT count(*) FROM `+table); err != nil || n != want {
				t.Errorf("%s has %d rows, want %d: %v", table, n, want, err)
			}
		}
	})
}
