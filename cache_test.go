package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

const (
	cacheTTL  = time.Minute // longer than any test
	cacheSize = 64 << 20
)

var quiet = slog.New(slog.NewTextHandler(io.Discard, nil))

// readerFunc is a productReader scripted by a test.
type readerFunc func(ctx context.Context, id int64) (document, error)

func (f readerFunc) Product(ctx context.Context, id int64) (document, error) { return f(ctx, id) }

// bodyOf is the only right body of a version of a product.
func bodyOf(id, version int64) []byte {
	return fmt.Appendf(nil, `{"id":%d,"version":%d}`, id, version)
}

func documentOf(id, version int64) document {
	return document{ID: id, Version: version, Body: bodyOf(id, version)}
}

// shelf is a database in small: the version of each product.
type shelf struct {
	mu       sync.Mutex
	versions map[int64]int64
	loads    atomic.Int64
}

func newShelf(ids ...int64) *shelf {
	s := &shelf{versions: make(map[int64]int64)}
	for _, id := range ids {
		s.versions[id] = 1
	}
	return s
}

func (s *shelf) Product(_ context.Context, id int64) (document, error) {
	s.loads.Add(1)
	s.mu.Lock()
	defer s.mu.Unlock()
	if version := s.versions[id]; version != 0 {
		return documentOf(id, version), nil
	}
	return document{}, errNotFound
}

// commit writes a new version and returns it.
func (s *shelf) commit(id int64) int64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.versions[id]++
	return s.versions[id]
}

func (s *shelf) remove(id int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.versions, id)
}

// runUntilEnd runs a part for the rest of the test.
func runUntilEnd(t testing.TB, run func(context.Context) error) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("run: %v", err)
		}
	})
}

func redisBackend(t *testing.T, redisURL string, log *slog.Logger) *redisCache {
	t.Helper()
	return patientRedis(t, redisURL, cacheTTL, cacheSize, log)
}

// patientRedis is a backend that waits for a Redis that a busy machine makes slow.
func patientRedis(t *testing.T, redisURL string, ttl time.Duration, size int64, log *slog.Logger) *redisCache {
	t.Helper()
	backend, err := newRedisCache(redisURL, ttl, size, log)
	if err != nil {
		t.Fatal(err)
	}
	backend.timeout, backend.options.ConnWriteTimeout = testPatience, testPatience
	return backend
}

// hastyRedis is a backend as the program has it.
func hastyRedis(t *testing.T, redisURL string, log *slog.Logger) *redisCache {
	t.Helper()
	backend, err := newRedisCache(redisURL, cacheTTL, cacheSize, log)
	if err != nil {
		t.Fatal(err)
	}
	return backend
}

// connected runs a Redis backend by itself and waits for it to answer.
func connected(t *testing.T, backend *redisCache) *redisCache {
	t.Helper()
	runUntilEnd(t, backend.Run)
	eventually(t, "redis answers", func() bool { return backend.Ping(t.Context()) == nil })
	return backend
}

// eachBackend runs a test over every implementation of cacheBackend. The test
// may call its argument for two backends, which then share what they keep.
func eachBackend(t *testing.T, test func(t *testing.T, open func() cacheBackend)) {
	t.Run("in the process", func(t *testing.T) {
		t.Parallel()
		backend := newMemoryCache(cacheTTL, cacheSize)
		test(t, func() cacheBackend { return backend })
	})
	t.Run("in Redis", func(t *testing.T) {
		t.Parallel()
		server := startRedis(t)
		test(t, func() cacheBackend { return redisBackend(t, server.URL, quiet) })
	})
}

// startCache returns a running cache whose backend answers.
func startCache(t *testing.T, next productReader, backend cacheBackend) *cache {
	t.Helper()
	c := newCache(next, backend, cacheTTL, quiet)
	runUntilEnd(t, c.Run)
	if redis, ok := backend.(*redisCache); ok {
		eventually(t, "redis answers", func() bool { return redis.Ping(t.Context()) == nil })
	}
	return c
}

func mustRead(t *testing.T, c *cache, id int64) document {
	t.Helper()
	doc, err := c.Product(t.Context(), id)
	if err != nil {
		t.Fatalf("product %d: %v", id, err)
	}
	if doc.ID != id || !bytes.Equal(doc.Body, bodyOf(id, doc.Version)) {
		t.Fatalf("product %d: got document of product %d, version %d, with body %s", id, doc.ID, doc.Version, doc.Body)
	}
	return doc
}

// mustPut and mustGet try again: on a busy machine Redis may miss redisTimeout.
func mustPut(t *testing.T, backend cacheBackend, id, version int64, body []byte) {
	t.Helper()
	eventually(t, "put succeeds", func() bool { return backend.Put(id, version, body) == nil })
}

func mustGet(t *testing.T, backend cacheBackend, id int64) (version int64, body []byte) {
	t.Helper()
	eventually(t, "get succeeds", func() bool {
		entry, err := backend.Get(id)
		version, body = entry.version, entry.body
		return err == nil
	})
	return version, body
}

func TestCacheBackends(t *testing.T) {
	t.Parallel()
	type entry struct {
		version int64
		body    string
	}
	const marker = ""
	tests := map[string]struct {
		puts []entry
		want entry
	}{
		"nothing":                           {nil, entry{0, marker}},
		"a body":                            {[]entry{{1, "a"}}, entry{1, "a"}},
		"a marker":                          {[]entry{{1, marker}}, entry{1, marker}},
		"a newer body replaces a body":      {[]entry{{1, "a"}, {2, "b"}}, entry{2, "b"}},
		"an older body is ignored":          {[]entry{{2, "b"}, {1, "a"}}, entry{2, "b"}},
		"what was not found":                {[]entry{{absent, marker}}, entry{absent, marker}},
		"any body replaces not found":       {[]entry{{absent, marker}, {1, "a"}}, entry{1, "a"}},
		"and any marker does":               {[]entry{{absent, marker}, {1, marker}}, entry{1, marker}},
		"not found is older than all":       {[]entry{{1, marker}, {absent, marker}}, entry{1, marker}},
		"versions compare as numbers":       {[]entry{{9, "a"}, {10, "b"}, {8, "c"}}, entry{10, "b"}},
		"a newer marker replaces a body":    {[]entry{{1, "a"}, {2, marker}}, entry{2, marker}},
		"an older marker is ignored":        {[]entry{{2, "b"}, {1, marker}}, entry{2, "b"}},
		"a body beats the marker it fits":   {[]entry{{2, marker}, {2, "b"}}, entry{2, "b"}},
		"a marker does not unseat its body": {[]entry{{2, "b"}, {2, marker}}, entry{2, "b"}},
		"an old body does not beat a marker": {[]entry{{3, marker}, {2, "b"}},
			entry{3, marker}},
		"of one version the first body stays":          {[]entry{{2, "b"}, {2, "c"}}, entry{2, "b"}},
		"a tombstone beats everything":                 {[]entry{{5, "a"}, {tombstone, marker}, {6, "b"}, {tombstone - 1, "c"}}, entry{tombstone, marker}},
		"large versions compare exactly":               {[]entry{{tombstone - 1, "b"}, {tombstone - 2, "a"}}, entry{tombstone - 1, "b"}},
		"a large version's body is told from a marker": {[]entry{{tombstone - 1, "b"}, {tombstone - 1, "c"}}, entry{tombstone - 1, "b"}},
		"a body may hold anything":                     {[]entry{{7, "\n1\n\x00\xff"}}, entry{7, "\n1\n\x00\xff"}},
		"a body of a megabyte":                         {[]entry{{7, strings.Repeat("x", 1<<20)}}, entry{7, strings.Repeat("x", 1<<20)}},
	}
	eachBackend(t, func(t *testing.T, open func() cacheBackend) {
		backend := open()
		if redis, ok := backend.(*redisCache); ok {
			connected(t, redis)
		}
		id := int64(0)
		for name, test := range tests {
			id++
			for _, put := range test.puts {
				body := []byte(put.body)
				if put.body == marker {
					body = nil
				}
				mustPut(t, backend, id, put.version, body)
			}
			version, body := mustGet(t, backend, id)
			if version != test.want.version || string(body) != test.want.body || (body == nil) != (test.want.body == marker) {
				t.Errorf("%s: got version %d with body %.20q, want version %d with body %.20q",
					name, version, body, test.want.version, test.want.body)
			}
		}
	})
}

func TestCacheBackendsKeepTheNewestOfConcurrentPuts(t *testing.T) {
	t.Parallel()
	eachBackend(t, func(t *testing.T, open func() cacheBackend) {
		backend := open()
		if redis, ok := backend.(*redisCache); ok {
			connected(t, redis)
		}
		const ids, versions = 10, 40
		var wg sync.WaitGroup
		for id := int64(1); id <= ids; id++ {
			for v := int64(1); v <= versions; v++ {
				wg.Go(func() {
					if !pollUntil(time.Now().Add(settleTime), func() bool { return backend.Put(id, v, bodyOf(id, v)) == nil }) {
						t.Errorf("put version %d of product %d: not in time", v, id)
					}
				})
			}
		}
		wg.Wait()
		for id := int64(1); id <= ids; id++ {
			version, body := mustGet(t, backend, id)
			if version != versions || !bytes.Equal(body, bodyOf(id, versions)) {
				t.Errorf("product %d: got version %d, body %s", id, version, body)
			}
		}
	})
}

func TestCacheServesWhatItKeeps(t *testing.T) {
	t.Parallel()
	eachBackend(t, func(t *testing.T, open func() cacheBackend) {
		db := newShelf(1, 2)
		c := startCache(t, db, open())
		if doc := mustRead(t, c, 1); doc.Cached {
			t.Error("first read came from the cache")
		}
		eventually(t, "the second read is a hit", func() bool { return mustRead(t, c, 1).Cached })
		mustRead(t, c, 2)
		loads := db.loads.Load()
		for range 100 {
			mustRead(t, c, 1)
		}
		if got := db.loads.Load(); got != loads {
			t.Errorf("100 hits made %d loads", got-loads)
		}
	})
}

func TestCacheNeverShowsWhatWasOverwritten(t *testing.T) {
	t.Parallel()
	eachBackend(t, func(t *testing.T, open func() cacheBackend) {
		db := newShelf(1)
		c := startCache(t, db, open())
		var written atomic.Int64 // the version of the last write that returned
		written.Store(1)
		stop := make(chan struct{})
		var readers sync.WaitGroup
		for range 4 {
			readers.Go(func() {
				var last int64
				for {
					select {
					case <-stop:
						return
					default:
					}
					least := written.Load()
					doc, err := c.Product(t.Context(), 1)
					if err != nil {
						t.Errorf("read: %v", err)
						return
					}
					if doc.Version < least || doc.Version < last || !bytes.Equal(doc.Body, bodyOf(1, doc.Version)) {
						t.Errorf("got version %d, body %s, after a write of %d and a read of %d", doc.Version, doc.Body, least, last)
						return
					}
					last = doc.Version
				}
			})
		}
		for range 100 {
			version := db.commit(1)
			c.Invalidate(1, version)
			written.Store(version)
			for range 3 { // leave room for hits between the writes
				mustRead(t, c, 1)
			}
		}
		close(stop)
		readers.Wait()
	})
}

func TestCacheInvalidationReachesOtherInstances(t *testing.T) {
	t.Parallel()
	eachBackend(t, func(t *testing.T, open func() cacheBackend) {
		db := newShelf(1)
		here, there := startCache(t, db, open()), startCache(t, db, open())
		eventually(t, "both have the product", func() bool {
			return mustRead(t, here, 1).Cached && mustRead(t, there, 1).Cached
		})
		here.Invalidate(1, db.commit(1))
		eventually(t, "the other instance shows the new version", func() bool { return mustRead(t, there, 1).Version == 2 })

		db.remove(1)
		here.Invalidate(1, math.MaxInt64)
		eventually(t, "the other instance knows that it is gone", func() bool {
			_, err := there.Product(t.Context(), 1)
			return errors.Is(err, errNotFound)
		})
	})
}

func TestCacheDeletedProductNeverComesBack(t *testing.T) {
	t.Parallel()
	eachBackend(t, func(t *testing.T, open func() cacheBackend) {
		// The reader is stuck in the past: it goes on to return the product.
		db := newShelf(1)
		c := startCache(t, db, open())
		mustRead(t, c, 1)
		loads := db.loads.Load()
		c.Invalidate(1, math.MaxInt64)
		c.Invalidate(1, 7) // the settling of one of its images, committed before, told late
		for range 50 {
			if doc, err := c.Product(t.Context(), 1); !errors.Is(err, errNotFound) {
				t.Fatalf("got version %d, error %v, of a deleted product", doc.Version, err)
			}
		}
		if got := db.loads.Load(); got != loads {
			t.Errorf("reads of a deleted product made %d loads", got-loads)
		}
		eventually(t, "the tombstone is stored", func() bool {
			entry, err := c.backend.Get(1)
			return err == nil && entry.version == tombstone
		})
	})
}

func TestCacheProductDeletedWhileItIsLoaded(t *testing.T) {
	t.Parallel()
	db := newGate()
	c := startCache(t, db, newMemoryCache(cacheTTL, cacheSize))
	read := readAsync(t.Context(), c, 1)
	answer := <-db.asked
	c.Invalidate(1, math.MaxInt64)
	answer <- documentOf(1, 1)
	select {
	case got := <-read:
		if !errors.Is(got.err, errNotFound) {
			t.Errorf("got version %d, error %v", got.doc.Version, got.err)
		}
	case again := <-db.asked:
		again <- documentOf(1, 1)
		t.Error("asked again for a deleted product")
	}
}

func TestCacheKeepsNotFound(t *testing.T) {
	t.Parallel()
	eachBackend(t, func(t *testing.T, open func() cacheBackend) {
		db := newShelf()
		here, there := startCache(t, db, open()), startCache(t, db, open())
		for _, c := range []*cache{here, there} {
			eventually(t, "what is not there is known not to be", func() bool { return isKnownAbsent(t, c, 1) })
		}
		loads := db.loads.Load()
		for range 100 {
			if !isKnownAbsent(t, here, 1) {
				t.Fatal("not found, but not from the cache")
			}
		}
		if got := db.loads.Load(); got != loads {
			t.Errorf("100 reads of what is not there made %d loads", got-loads)
		}
		here.Invalidate(1, db.commit(1))
		mustRead(t, here, 1) // at once
		eventually(t, "the other instance has the new product", func() bool {
			_, err := there.Product(t.Context(), 1)
			return err == nil
		})
	})
}

func isKnownAbsent(t *testing.T, c *cache, id int64) bool {
	t.Helper()
	doc, err := c.Product(t.Context(), id)
	if !errors.Is(err, errNotFound) {
		t.Fatalf("product %d: got version %d, error %v", id, doc.Version, err)
	}
	return doc.Cached
}

func TestCacheForgetsNotFoundSoon(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		db := newShelf()
		c := newCache(db, newMemoryCache(cacheTTL, cacheSize), cacheTTL, quiet)
		isKnownAbsent(t, c, 1)
		db.commit(1) // and the word of it is lost
		<-time.After(absentTTL - time.Second)
		if !isKnownAbsent(t, c, 1) {
			t.Error("forgotten before its time")
		}
		<-time.After(2 * time.Second)
		mustRead(t, c, 1)
	})
}

// A load that did not find a product which was made meanwhile hides it from
// nobody.
func TestCacheCreationIsNotHiddenByALoadFromBefore(t *testing.T) {
	t.Parallel()
	eachBackend(t, func(t *testing.T, open func() cacheBackend) {
		db := newShelf()
		loading, goOn := make(chan struct{}), make(chan struct{})
		var first atomic.Bool
		slow := readerFunc(func(ctx context.Context, id int64) (document, error) {
			doc, err := db.Product(ctx, id)
			if first.CompareAndSwap(false, true) {
				close(loading)
				<-goOn
			}
			return doc, err
		})
		here, there := startCache(t, db, open()), startCache(t, slow, open())
		before := readAsync(t.Context(), there, 1)
		<-loading
		here.Invalidate(1, db.commit(1))
		mustRead(t, here, 1)
		eventually(t, "the backend knows the product", func() bool {
			entry, err := here.backend.Get(1)
			return err == nil && entry.version == 1
		})
		close(goOn)
		if got := <-before; !errors.Is(got.err, errNotFound) {
			t.Errorf("the load from before got version %d, %v", got.doc.Version, got.err)
		}
		mustRead(t, there, 1)
		mustRead(t, here, 1)
	})
}

// What was not found does not come back from a copy that is older than its
// deletion, and what such a copy shows to have been there is deleted for good.
func TestCacheDeletedProductDoesNotComeBackFromAnOldCopy(t *testing.T) {
	t.Parallel()
	db := newShelf()
	backend := newMemoryCache(cacheTTL, cacheSize)
	c := startCache(t, db, backend)
	if _, err := c.Product(t.Context(), 1); !errors.Is(err, errNotFound) {
		t.Fatal(err)
	}
	backend.mu.Lock()
	backend.remove(backend.entries[1])
	backend.mu.Unlock()
	if err := backend.Put(1, 7, bodyOf(1, 7)); err != nil { // from before the deletion, of which the backend does not know
		t.Fatal(err)
	}
	for range 3 {
		if doc, err := c.Product(t.Context(), 1); !errors.Is(err, errNotFound) {
			t.Errorf("got version %d, %v", doc.Version, err)
		}
	}
	eventually(t, "everybody is told", func() bool { version, _ := mustGet(t, backend, 1); return version == tombstone })
	if got := db.loads.Load(); got != 2 {
		t.Errorf("made %d loads, want 2", got)
	}
}

// gate is a productReader that tells of each load and waits for its answer.
type gate struct {
	asked chan chan document
}

func newGate() *gate { return &gate{asked: make(chan chan document)} }

func (g *gate) Product(ctx context.Context, _ int64) (document, error) {
	answer := make(chan document)
	g.asked <- answer
	select {
	case doc := <-answer:
		return doc, nil
	case <-ctx.Done():
		return document{}, ctx.Err()
	}
}

type outcome struct {
	doc document
	err error
}

// readAsync begins a read and returns where its outcome will arrive.
func readAsync(ctx context.Context, c *cache, id int64) <-chan outcome {
	result := make(chan outcome, 1)
	go func() {
		doc, err := c.Product(ctx, id)
		result <- outcome{doc, err}
	}()
	return result
}

func TestCacheReadAfterAWriteDoesNotJoinALoadFromBefore(t *testing.T) {
	t.Parallel()
	eachBackend(t, func(t *testing.T, open func() cacheBackend) {
		db := newGate()
		c := startCache(t, db, open())
		before := readAsync(t.Context(), c, 1)
		old := <-db.asked
		c.Invalidate(1, 2)
		after := readAsync(t.Context(), c, 1)
		recent := <-db.asked // a load of its own
		recent <- documentOf(1, 2)
		if got := <-after; got.err != nil || got.doc.Version != 2 {
			t.Fatalf("read after the write got version %d, error %v", got.doc.Version, got.err)
		}
		old <- documentOf(1, 1)
		// By now version 2 was shown, so version 1 is no answer any more. The old
		// read asks again, or finds version 2 in the cache.
		for {
			select {
			case again := <-db.asked:
				again <- documentOf(1, 2)
				continue
			case got := <-before:
				if got.err != nil || got.doc.Version != 2 {
					t.Fatalf("read before the write got version %d, error %v", got.doc.Version, got.err)
				}
			}
			break
		}
		if entry, err := c.backend.Get(1); err != nil || entry.version != 2 {
			t.Errorf("backend has version %d, error %v", entry.version, err)
		}
	})
}

// Nor does one that knows of a deletion: the load may end with a copy from before.
func TestCacheReadAfterNotFoundDoesNotJoinALoadFromBefore(t *testing.T) {
	t.Parallel()
	db := newGate()
	c := startCache(t, db, newMemoryCache(cacheTTL, cacheSize))
	before := readAsync(t.Context(), c, 1)
	old := <-db.asked
	c.floors.see(1, absent)
	after := readAsync(t.Context(), c, 1)
	recent := <-db.asked // a load of its own
	recent <- documentOf(1, 2)
	old <- documentOf(1, 2)
	for _, read := range []<-chan outcome{before, after} {
		if got := <-read; got.err != nil || got.doc.Version != 2 {
			t.Errorf("got version %d, error %v", got.doc.Version, got.err)
		}
	}
}

// What a load has read that took too long may be older than any marker that is left.
func TestCacheKeepsNothingOfALoadThatTookTooLong(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		backend := newMemoryCache(cacheTTL, cacheSize)
		c := newCache(readerFunc(func(_ context.Context, id int64) (document, error) {
			time.Sleep(loadTimeout + 1) // the bubble's clock
			return documentOf(id, 1), nil
		}), backend, cacheTTL, quiet)
		mustRead(t, c, 1)
		if entry, _ := backend.Get(1); entry.version != 0 {
			t.Errorf("version %d was kept", entry.version)
		}
	})
}

func TestCacheFilledByAnOldLoadAfterItLostItsMemory(t *testing.T) {
	t.Parallel()
	shown := map[string]func(backend *memoryCache){
		"version 2 was loaded": func(*memoryCache) {},
		"version 2 was a hit":  func(backend *memoryCache) { backend.Put(1, 2, bodyOf(1, 2)) },
	}
	for name, prepare := range shown {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			db := newShelf(1)
			db.commit(1)
			backend := newMemoryCache(cacheTTL, cacheSize)
			prepare(backend)
			c := startCache(t, db, backend)
			mustRead(t, c, 1)
			backend.mu.Lock()
			backend.remove(backend.entries[1])
			backend.mu.Unlock()
			if err := backend.Put(1, 1, bodyOf(1, 1)); err != nil { // another instance, slow
				t.Fatal(err)
			}
			if doc := mustRead(t, c, 1); doc.Version != 2 {
				t.Errorf("version went back to %d", doc.Version)
			}
		})
	}
}

func TestCacheReaderThatIsBehindIsNotBelieved(t *testing.T) {
	t.Parallel()
	db := newShelf(1)
	c := startCache(t, db, newMemoryCache(cacheTTL, cacheSize))
	c.Invalidate(1, 5)
	if doc, err := c.Product(t.Context(), 1); !errors.Is(err, errUnavailable) {
		t.Errorf("got version %d, error %v", doc.Version, err)
	}
	if got := db.loads.Load(); got != maxLoads {
		t.Errorf("made %d loads, want %d", got, maxLoads)
	}
}

// watched is a backend that calls after once it has looked for an entry. It
// looks again when a busy machine made Redis miss redisTimeout.
type watched struct {
	cacheBackend
	after func()
}

func (w *watched) Get(id int64) (entry cacheEntry, err error) {
	pollUntil(time.Now().Add(settleTime), func() bool {
		entry, err = w.cacheBackend.Get(id)
		return err == nil
	})
	w.after()
	return entry, err
}

func TestCacheStampedeMakesOneLoad(t *testing.T) {
	t.Parallel()
	eachBackend(t, func(t *testing.T, open func() cacheBackend) {
		const readers = 1000
		var loads, looks atomic.Int64
		allLooked := make(chan struct{})
		db := readerFunc(func(context.Context, int64) (document, error) {
			loads.Add(1)
			<-allLooked
			return documentOf(1, 1), nil
		})
		c := startCache(t, db, &watched{open(), func() {
			if looks.Add(1) == readers+1 { // the flight looks as well
				close(allLooked)
			}
		}})
		var wg sync.WaitGroup
		for range readers {
			wg.Go(func() {
				if doc, err := c.Product(t.Context(), 1); err != nil || doc.Version != 1 {
					t.Errorf("got version %d, error %v", doc.Version, err)
				}
			})
		}
		wg.Wait()
		if got := loads.Load(); got != 1 {
			t.Errorf("%d readers made %d loads", readers, got)
		}
	})
}

func TestCacheReaderTooLateForTheFlightFindsWhatItStored(t *testing.T) {
	t.Parallel()
	db := newShelf(1)
	backend := newMemoryCache(cacheTTL, cacheSize)
	looked, goOn := make(chan struct{}), make(chan struct{})
	var first atomic.Bool
	c := startCache(t, db, &watched{backend, func() {
		if first.CompareAndSwap(false, true) {
			close(looked)
			<-goOn
		}
	}})
	late := readAsync(t.Context(), c, 1)
	<-looked
	mustRead(t, c, 1)
	close(goOn)
	if got := <-late; got.err != nil || got.doc.Version != 1 {
		t.Errorf("got version %d, error %v", got.doc.Version, got.err)
	}
	if got := db.loads.Load(); got != 1 {
		t.Errorf("made %d loads, want 1", got)
	}
}

func TestCacheReaderThatLeavesDoesNotEndTheLoadOfOthers(t *testing.T) {
	t.Parallel()
	db := newGate()
	c := startCache(t, db, newMemoryCache(cacheTTL, cacheSize))
	ctx, leave := context.WithCancel(t.Context())
	first := readAsync(ctx, c, 1)
	answer := <-db.asked
	second := readAsync(t.Context(), c, 1)
	leave()
	if got := <-first; !errors.Is(got.err, context.Canceled) {
		t.Fatalf("reader that left got %v", got.err)
	}
	answer <- documentOf(1, 1)
	// The second reader joined the load or found what it stored; never its error.
	if got := <-second; got.err != nil {
		t.Fatalf("reader that stayed got %v", got.err)
	}
}

func TestCacheFloors(t *testing.T) {
	t.Parallel()
	f := newFloors(time.Second)
	steps := []struct {
		name string
		do   func()
		want int64
	}{
		{"nothing", func() {}, 0},
		{"it was not found", func() { f.see(1, absent); f.see(1, absent) }, absent},
		{"a read raises it", func() { f.see(1, 3) }, 3},
		{"not to be found does not lower it", func() { f.see(1, absent) }, 3},
		{"an older read does not lower it", func() { f.see(1, 2) }, 3},
		{"a write raises it", func() { f.write(1, 4) }, 4},
		{"an older write does not lower it", func() { f.write(1, 2) }, 4},
		{"the first rotation keeps it", f.rotate, 4},
		{"an unsent marker keeps it for ever", func() { f.rotate(); f.rotate(); f.rotate() }, 4},
		{"another version was sent", func() { f.sent(1, 3); f.rotate(); f.rotate() }, 4},
		{"sent, it begins anew", func() { f.sent(1, 4) }, 4},
		{"and lives through one rotation", f.rotate, 4},
		{"but not two", f.rotate, 0},
	}
	for _, step := range steps {
		step.do()
		if got := f.get(1); got != step.want {
			t.Fatalf("%s: floor is %d, want %d", step.name, got, step.want)
		}
	}
	for id := range int64(maxSeen) {
		f.see(id, absent)
	}
	if f.see(maxSeen, 3); f.get(maxSeen) != 3 {
		t.Error("products that were not found leave no room for one that was")
	}
	for id := range int64(maxUnsent) {
		f.write(id, 1)
	}
	if f.write(maxUnsent+1, 1) || !f.write(1, 2) {
		t.Error("the bound of unsent markers does not hold, or holds for those that wait already")
	}
	if f.get(maxUnsent+1) != 1 {
		t.Error("beyond the bound this instance has no floor")
	}
}

func TestCacheForgetsInTime(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		db := newShelf(1)
		backend := newMemoryCache(cacheTTL, cacheSize)
		c := newCache(db, backend, cacheTTL, quiet)
		runUntilEnd(t, c.Run)
		mustRead(t, c, 1)
		c.Invalidate(1, db.commit(1))
		synctest.Wait()
		wait := func(d time.Duration) { <-time.After(d); synctest.Wait() }

		if entry, _ := backend.Get(1); entry.version != 2 || entry.body != nil {
			t.Fatalf("marker was not stored: version %d, body %s", entry.version, entry.body)
		}
		wait(cacheTTL + loadTimeout - time.Second)
		if c.floors.get(1) != 2 {
			t.Error("floor was forgotten while something older might turn up")
		}
		mustRead(t, c, 1)
		wait(cacheTTL - time.Second)
		if !mustRead(t, c, 1).Cached {
			t.Error("body was forgotten before its time")
		}
		wait(2 * time.Second)
		if mustRead(t, c, 1).Cached {
			t.Error("body was kept beyond its time")
		}
		wait(3 * (cacheTTL + loadTimeout))
		if c.floors.get(1) != 0 {
			t.Error("floor was never forgotten")
		}
	})
}

func TestMemoryCacheStaysWithinItsBound(t *testing.T) {
	t.Parallel()
	const body = 1000
	m := newMemoryCache(cacheTTL, 10*(body+memoryEntryBytes))
	for id := range int64(10) {
		m.Put(id, 1, make([]byte, body))
	}
	m.Get(0) // now 1 is the least recently used
	m.Put(10, 1, make([]byte, body))
	for id, want := range map[int64]bool{0: true, 1: false, 2: true, 10: true} {
		if entry, _ := m.Get(id); (entry.version != 0) != want {
			t.Errorf("product %d is there: %v, want %v", id, entry.version != 0, want)
		}
	}
	m.Put(0, 2, make([]byte, 100*body))
	if entry, _ := m.Get(0); entry.version != 2 || entry.body != nil {
		t.Errorf("of a body larger than the cache it has version %d and %d bytes, want a marker", entry.version, len(entry.body))
	}
	if m.size > m.limit || m.recent.Len() != len(m.entries) {
		t.Errorf("holds %d of %d bytes, %d entries in the list, %d in the map", m.size, m.limit, m.recent.Len(), len(m.entries))
	}
}

func BenchmarkCacheHit(b *testing.B) {
	b.Run("in the process", func(b *testing.B) {
		benchmarkHits(b, newMemoryCache(cacheTTL, cacheSize))
	})
	b.Run("local copy of Redis", func(b *testing.B) {
		server := startRedis(b)
		backend, err := newRedisCache(server.URL, cacheTTL, cacheSize, quiet)
		if err != nil {
			b.Fatal(err)
		}
		benchmarkHits(b, backend)
	})
}

func benchmarkHits(b *testing.B, backend cacheBackend) {
	c := newCache(newShelf(1), backend, cacheTTL, quiet)
	runUntilEnd(b, c.Run)
	read := func() document {
		doc, err := c.Product(b.Context(), 1)
		if err != nil {
			b.Fatal(err)
		}
		return doc
	}
	eventually(b, "reads are hits", func() bool { return read().Cached })
	b.ReportAllocs()
	for b.Loop() {
		read()
	}
}
