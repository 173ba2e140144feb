package main

import (
	"context"
	"fmt"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"
)

// logged is the log after a place, in words.
func logged(t *testing.T, s *store, after place) (entries []string) {
	t.Helper()
	events, err := s.EventsAfter(t.Context(), after, 1000)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range events {
		if e.What == imageChanged {
			entries = append(entries, fmt.Sprintf("%d/%d %s %d%s", e.ProductID, e.Image.Position, e.Image.Status, e.Image.Attempts, e.Image.Key))
		} else {
			entries = append(entries, fmt.Sprintf("%d %s %d", e.ProductID, e.What, e.Version))
		}
	}
	return entries
}

// awaitLogged waits until the log has as many entries as are wanted: on a server
// that others use too, their transactions hold ours back.
func awaitLogged(t *testing.T, s *store, after place, want ...string) {
	t.Helper()
	var got []string
	eventually(t, "the log has its entries", func() bool { got = logged(t, s, after); return len(got) >= len(want) })
	if !slices.Equal(got, want) {
		t.Errorf("the log has\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

// What changes a product as clients see it is an event, once; what is on the way
// to that is none.
func TestEveryVisibleChangeIsAnEvent(t *testing.T) {
	t.Parallel()
	eachStore(t, func(t *testing.T, s *store) {
		ctx := t.Context()
		must := func(err error) {
			t.Helper()
			if err != nil {
				t.Fatal(err)
			}
		}
		p := create(t, s, "https://a.example/1.jpg", "https://a.example/2.jpg")
		jobs := publishDue(t, s)
		must(s.PutOff(ctx, jobs[0].ID))
		_, err := s.CountLoneStart(ctx, jobs[1].ID)
		must(err)
		_, err = s.SettleFailed(ctx, jobs[0], failure{imageError: transient("http_503", "503"), Attempt: 1, RetryAt: s.now()})
		must(err)
		finish(t, s, jobs[1], "key")
		bury(t, s, jobs[0], permanent("http_404", "404"))
		_, _, err = s.ReplayDead(ctx, []int64{jobs[0].ID}, origin{})
		must(err)
		bury(t, s, jobs[0], permanent("http_404", "404"))
		must(s.DiscardDead(ctx, jobs[0].ID)) // which no product shows
		_, _, err = s.ReprocessProduct(ctx, p.ID, origin{}, always)
		must(err)
		_, err = s.UpdateProduct(ctx, p.ID, origin{}, always, setSources("https://a.example/2.jpg", "https://a.example/3.jpg"))
		must(err)
		must(s.DeleteProduct(ctx, p.ID, always))
		id := fmt.Sprint(p.ID)
		awaitLogged(t, s, place{}, id+" created 1", id+"/0 pending 1", id+"/1 ready 0key", id+"/0 failed 2", id+"/0 pending 0", id+"/0 failed 1",
			id+"/1 pending 0key", id+" updated 8", id+" deleted 8")
	})
}

// Ids are taken in another order than transactions end. What ends late is not
// passed over, and everybody reads the same order.
func TestNoEventIsPassedOverByItsId(t *testing.T) {
	t.Parallel()
	s, begin := concurrentStore(t)
	start, err := s.LastEvent(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	insert := func(tx querier) (id int64) {
		err := queryRow(t.Context(), tx, []any{&id}, insertProduct, 1, "x", "x", "", 0, s.now())
		if err != nil {
			t.Fatal(err)
		}
		return id
	}
	early, endEarly := begin()
	first := insert(early)
	late, endLate := begin()
	second := insert(late)
	endLate()
	if last, err := s.LastEvent(t.Context()); err != nil || last != start {
		t.Errorf("while a transaction is open, the log's end moved from %v to %v, %v", start, last, err)
	}
	if got := logged(t, s, start); len(got) > 0 {
		t.Errorf("read before what comes first: %v", got)
	}
	endEarly()
	awaitLogged(t, s, start, fmt.Sprintf("%d created 1", first), fmt.Sprintf("%d created 1", second))
}

// A transaction that began first may change a product last: the product's events
// are in the order of its changes all the same.
func TestEventsOfAProductAreInTheOrderOfItsChanges(t *testing.T) {
	t.Parallel()
	s, begin := concurrentStore(t)
	p := create(t, s)
	eventually(t, "the product's event can be read", func() bool { return len(logged(t, s, place{})) == 1 })
	start, _ := s.LastEvent(t.Context())
	update := func(tx querier, version int) {
		if _, err := tx.Exec(t.Context(), updateProduct, p.ID, "x", "x", "", 0, version, s.now()); err != nil {
			t.Fatal(err)
		}
	}
	older, endOlder := begin()
	if _, err := older.Exec(t.Context(), `UPDATE users SET name = 'x' WHERE id = 1`); err != nil { // from here on it has its number
		t.Fatal(err)
	}
	newer, endNewer := begin()
	update(newer, 2)
	endNewer()
	update(older, 3)
	endOlder()
	awaitLogged(t, s, start, fmt.Sprintf("%d updated 2", p.ID), fmt.Sprintf("%d updated 3", p.ID))
}

// concurrentStore is a store on PostgreSQL on which a test can have transactions
// open side by side.
func concurrentStore(t *testing.T) (s *store, begin func() (tx querier, commit func())) {
	t.Helper()
	s, db := postgresStore(t)
	return s, sideBySide(t, db)
}

// sideBySide begins transactions that are open side by side.
func sideBySide(t *testing.T, db *postgres) (begin func() (tx querier, commit func())) {
	return func() (querier, func()) {
		tx, err := db.pool.Begin(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { tx.Rollback(context.Background()) })
		return pgQuerier{tx, statementTimeout}, func() {
			if err := tx.Commit(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// After a day events are forgotten. Who has seen the last one has missed nothing,
// however long nothing happens; who has not is told.
func TestOldEventsAreForgotten(t *testing.T) {
	t.Parallel()
	eachStore(t, func(t *testing.T, s *store) {
		has := func(p place) bool {
			has, err := s.HasPlace(t.Context(), p)
			if err != nil {
				t.Fatal(err)
			}
			return has
		}
		var ends []place
		for n := range 3 {
			create(t, s)
			eventually(t, "the event can be read", func() bool { return len(logged(t, s, place{})) == n+1 })
			end, _ := s.LastEvent(t.Context())
			ends = append(ends, end)
		}
		for range 2 {
			if err := s.ForgetEvents(t.Context()); err != nil || !has(ends[0]) {
				t.Fatalf("young events were forgotten: %v", err)
			}
		}
		if has(place{}) || has(place{ends[2].Tx, ends[2].ID + 1}) || has(place{ends[2].Tx + 1, 1}) {
			t.Error("a place outside the log is known")
		}
		advance(s, eventTime+time.Minute)
		if err := s.ForgetEvents(t.Context()); err != nil {
			t.Fatal(err)
		}
		if has(ends[0]) || has(ends[1]) || !has(ends[2]) {
			t.Errorf("after a day the places are known: %t, %t, the last: %t", has(ends[0]), has(ends[1]), has(ends[2]))
		}
	})
}

// behindProxy is the test's store, and the line to its database.
func behindProxy(t *testing.T) (*store, *tcpProxy) {
	t.Helper()
	u, err := url.Parse(testDatabase(t))
	if err != nil {
		t.Fatal(err)
	}
	line := startProxy(t, u.Host)
	u.Host = line.Addr
	db, err := openPostgres(t.Context(), u.String())
	if err != nil {
		t.Fatal(err)
	}
	return migratedStore(t, db), line
}
