package main

import (
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"
)

// entry is one of a batch, of user 1 and under no key.
func entry(name string, sources ...string) batchEntry {
	return batchEntry{Product: Product{UserID: 1, Name: name, Description: "d " + name, Price: 8990, Images: sourcesOf(sources...)}}
}

// keyed are n entries under keys, with a fingerprint each.
func keyed(n int) []batchEntry {
	entries := make([]batchEntry, n)
	for i := range entries {
		entries[i] = entry(fmt.Sprint("p", i))
		entries[i].Key, entries[i].Fingerprint = fmt.Sprint("key ", i), []byte{0, byte(i), 0xff}
	}
	return entries
}

func createBatch(t *testing.T, s *store, entries []batchEntry) []batchEntry {
	t.Helper()
	entries = slices.Clone(entries)
	if err := s.CreateProducts(t.Context(), entries, origin{RequestID: "req-1"}); err != nil {
		t.Fatal(err)
	}
	return entries
}

func TestBatchStoresWhatOneByOneWould(t *testing.T) {
	t.Parallel()
	eachStore(t, func(t *testing.T, s *store) {
		tricky := "\"quoted\"\r\n\t\\ \u2028 日本 😀 'x' 123 null"
		entries := createBatch(t, s, []batchEntry{
			entry(tricky, "http://h:81/b", "http://h/a", "http://h/a"), entry("123"), entry("z"), entry("a"),
		})
		alone := create(t, s, "http://h:81/b", "http://h/a", "http://h/a")
		for n, e := range entries {
			got, err := s.Product(t.Context(), e.ID)
			if err != nil {
				t.Fatal(err)
			}
			if got.Name != e.Name || got.Description != e.Description || got.Price != e.Price || got.Version != 1 || len(got.Images) != len(e.Images) {
				t.Errorf("entry %d was stored as %+v", n, got)
			}
			for p, image := range got.Images {
				if image.Position != p || image.Source != alone.Images[p].Source || image.Status != imagePending {
					t.Errorf("image %d is %+v", p, image)
				}
			}
			if n > 0 && e.ID <= entries[n-1].ID {
				t.Errorf("the ids are not in the order of the entries: %d after %d", e.ID, entries[n-1].ID)
			}
		}
		found, err := s.Products(t.Context(), productFilter{Name: "日本", Sort: defaultSort, Limit: 10})
		if err != nil || len(found) != 1 || found[0].ID != entries[0].ID {
			t.Errorf("found by its name: %v, %v", found, err)
		}
		jobs := publishDue(t, s)
		if len(jobs) != 6 || jobs[0].RequestID != "req-1" {
			t.Errorf("the jobs are %v", jobs)
		}
	})
}

func TestEntryOfABatchFailsAlone(t *testing.T) {
	t.Parallel()
	eachStore(t, func(t *testing.T, s *store) {
		stranger, refused := entry("b"), entry("c")
		stranger.UserID, refused.Err = 4711, errForbidden
		got := createBatch(t, s, []batchEntry{entry("a"), stranger, refused, entry("d")})
		if got[0].Err != nil || !errors.Is(got[1].Err, errUnknownUser) || got[2].Err != errForbidden || got[3].Err != nil {
			t.Errorf("the errors are %v, %v, %v, %v", got[0].Err, got[1].Err, got[2].Err, got[3].Err)
		}
		all, err := s.Products(t.Context(), productFilter{Sort: defaultSort, Limit: 10})
		if err != nil || len(all) != 2 || all[0].ID != got[0].ID || all[0].Name != "a" || all[1].ID != got[3].ID || all[1].Name != "d" {
			t.Errorf("stored were %v, %v", all, err)
		}
	})
}

// A key gives its product again for a day, whatever else the batch has.
func TestBatchCreatesOnceForEachKey(t *testing.T) {
	t.Parallel()
	eachStore(t, func(t *testing.T, s *store) {
		first := createBatch(t, s, keyed(5)[:3])
		clock := s.now
		s.now = func() time.Time { return clock().Add(time.Hour) }
		changed := keyed(5)
		changed[1].Fingerprint = []byte("another")
		again := createBatch(t, s, changed)
		for n, e := range again {
			switch {
			case n == 1 && !errors.Is(e.Err, errKeyReused),
				n != 1 && e.Err != nil,
				n != 1 && e.Existed != (n < 3),
				e.Existed && e.ID != first[n].ID:
				t.Errorf("entry %d: id %d, existed %t, %v", n, e.ID, e.Existed, e.Err)
			}
		}
		s.now = func() time.Time { return clock().Add(idempotencyTime) } // for the first three it is over
		late := createBatch(t, s, keyed(5))
		for n, e := range late {
			if e.Existed != (n >= 3) || e.Existed && e.ID != again[n].ID || !e.Existed && e.ID <= again[4].ID {
				t.Errorf("after a day: entry %d: %+v", n, e)
			}
		}
		for n, e := range createBatch(t, s, keyed(5)) {
			if !e.Existed || e.ID != late[n].ID {
				t.Errorf("and once more: %+v, want the id %d", e, late[n].ID)
			}
		}
	})
}

func TestBatchesAtOnceUnderTheSameKeys(t *testing.T) {
	t.Parallel()
	eachStore(t, func(t *testing.T, s *store) {
		const writers, size = 8, 50
		var got [writers][]batchEntry
		var group sync.WaitGroup
		for n := range writers {
			group.Go(func() {
				got[n] = keyed(size)
				if err := s.CreateProducts(t.Context(), got[n], origin{}); err != nil {
					t.Error(err)
				}
			})
		}
		group.Wait()
		for n := range writers {
			for i, e := range got[n] {
				if e.Err != nil || e.ID != got[0][i].ID {
					t.Fatalf("writer %d, entry %d: id %d, want %d; %v", n, i, e.ID, got[0][i].ID, e.Err)
				}
			}
		}
		all, err := s.Products(t.Context(), productFilter{Sort: defaultSort, Limit: maxLimit})
		if err != nil || len(all) != size {
			t.Errorf("%d products of %d keys, %v", len(all), size, err)
		}
	})
}
