package main

import (
	"context"
	"errors"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"github.com/redis/rueidis"
)

// mechanism is one of the three things that keep the cache consistent.
type mechanism int

const (
	none mechanism = iota
	versionCheck
	tombstones
	ownWrites // the least-version memory
)

// The negative controls: in a scripted race that a mechanism is there for, the
// checker finds nothing while it works, and finds what it must when it is off.
func TestConsistencyCheckerFindsWhatIsBroken(t *testing.T) {
	t.Parallel()
	tests := map[string]struct {
		off  mechanism
		race func(*cluster)
		want func(*judgement) int // the rule that must be seen broken
	}{
		"without the version check of the script": {versionCheck, (*cluster).oldLoadEndsAfterAWrite, func(j *judgement) int { return j.unequal }},
		"without the tombstone":                   {tombstones, (*cluster).oldLoadEndsAfterADeletion, func(j *judgement) int { return j.undeleted }},
		"without the least-version memory":        {ownWrites, (*cluster).readBeforeTheMarkerIsSent, func(j *judgement) int { return j.ownWrites }},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			for _, off := range []mechanism{none, test.off} {
				c := newCluster(t, off)
				test.race(c)
				j := judge(c.history, nil)
				j.unequal = c.unequal()
				if off == none && j.violations() != 0 {
					t.Errorf("with everything on:\n%s", j)
				}
				if off != none && test.want(j) == 0 {
					t.Errorf("the checker has found nothing:\n%s", j)
				}
			}
		})
	}
}

// cluster is three instances' caches in one process, on one Redis and one
// database in small. Product 1 is in the database and in no cache. The load of
// instance 1 can be held back.
type cluster struct {
	t       *testing.T
	off     mechanism
	redis   *testServer
	db      *shelf
	caches  []*cache
	history []operation
	began   time.Time

	loading chan struct{} // closed when the first load of instance 1 has its answer
	goOn    chan struct{} // close it to let that load return
	holding atomic.Bool   // no marker leaves instance 0
	release chan struct{} // close it to let them go
}

func newCluster(t *testing.T, off mechanism) *cluster {
	t.Helper()
	c := &cluster{t: t, off: off, redis: startRedis(t), db: newShelf(1), began: time.Now(),
		loading: make(chan struct{}), goOn: make(chan struct{}), release: make(chan struct{})}
	var first atomic.Bool
	slow := readerFunc(func(ctx context.Context, id int64) (document, error) {
		doc, err := c.db.Product(ctx, id)
		if first.CompareAndSwap(false, true) {
			close(c.loading)
			<-c.goOn
		}
		return doc, err
	})
	for _, next := range []productReader{c.db, slow, c.db} {
		backend := redisBackend(t, c.redis.URL, quiet)
		if off == versionCheck {
			backend.put = unchecked()
		}
		one := newCache(next, &heldMarkers{backend, c}, cacheTTL, quiet)
		runUntilEnd(t, one.Run)
		eventually(t, "redis answers", func() bool { return backend.Ping(t.Context()) == nil })
		c.caches = append(c.caches, one)
	}
	return c
}

// heldMarkers keeps back the markers of instance 0 while the cluster says so.
type heldMarkers struct {
	cacheBackend
	cluster *cluster
}

func (h *heldMarkers) Put(id, version int64, body []byte) error {
	if body == nil && h.cluster.holding.Load() {
		<-h.cluster.release
	}
	return h.cacheBackend.Put(id, version, body)
}

// read reads product 1 on an instance and records it. It is also how a test
// waits for what the backend holds: on a busy machine a read may miss it.
func (c *cluster) read(instance int) document {
	if c.off == ownWrites {
		c.forget(instance)
	}
	begin := time.Since(c.began)
	doc, err := c.caches[instance].Product(c.t.Context(), 1)
	if err != nil && !errors.Is(err, errNotFound) {
		c.t.Fatal(err)
	}
	c.record(operation{instance: instance, version: doc.Version}, begin)
	return doc
}

func (c *cluster) record(op operation, begin time.Duration) {
	op.key, op.start, op.end = 1, begin, time.Since(c.began)
	c.history = append(c.history, op)
}

// write commits a version through an instance.
func (c *cluster) write(instance int) {
	begin := time.Since(c.began)
	version := c.db.commit(1)
	c.caches[instance].Invalidate(1, version)
	c.record(operation{write: true, instance: instance, version: version}, begin)
}

// remove deletes the product through an instance. Without tombstones the key is
// deleted in Redis, as is usual.
func (c *cluster) remove(instance int) {
	begin := time.Since(c.began)
	c.db.remove(1)
	if c.off == tombstones {
		admin(c.t, c.redis, "DEL", redisKey(1))
	} else {
		c.caches[instance].Invalidate(1, tombstone)
	}
	c.record(operation{write: true, instance: instance, version: tombstone}, begin)
}

// forget empties the least-version memory of an instance.
func (c *cluster) forget(instance int) {
	f := c.caches[instance].floors
	f.mu.Lock()
	defer f.mu.Unlock()
	clear(f.young)
	clear(f.old)
	clear(f.unsent) // the marker itself is under way already
}

// awaitEntry waits until Redis has a version of the product.
func (c *cluster) awaitEntry(version int64) {
	c.t.Helper()
	eventually(c.t, "redis has the version", func() bool {
		entry, err := c.caches[0].backend.Get(1)
		return err == nil && entry.version == version
	})
}

// unequal counts the instances that differ from the database after rest. It
// asks instance 0, which wrote, last: its memory makes it mend Redis.
func (c *cluster) unequal() (count int) {
	want, _ := c.db.Product(c.t.Context(), 1)
	for _, one := range slices.Backward(c.caches) {
		if doc, _ := one.Product(c.t.Context(), 1); doc.Version != want.Version {
			count++
		}
	}
	return count
}

// startOldLoad lets instance 1 read version 1 from the database and no further.
// The returned function lets it end.
func (c *cluster) startOldLoad() (end func()) {
	begin := time.Since(c.began)
	old := readAsync(c.t.Context(), c.caches[1], 1)
	<-c.loading
	return func() {
		close(c.goOn)
		got := <-old
		if got.err != nil {
			c.t.Fatal(got.err)
		}
		c.record(operation{instance: 1, version: got.doc.Version}, begin)
	}
}

func (c *cluster) oldLoadEndsAfterAWrite() {
	endOldLoad := c.startOldLoad()
	c.write(0)
	c.awaitEntry(2)
	eventually(c.t, "redis has the body", func() bool { return c.read(0).Cached })
	endOldLoad()
	c.read(2)
}

func (c *cluster) oldLoadEndsAfterADeletion() {
	endOldLoad := c.startOldLoad()
	c.remove(0)
	if c.off == none {
		c.awaitEntry(tombstone)
	}
	endOldLoad()
	for range 3 {
		c.read(0)
	}
}

func (c *cluster) readBeforeTheMarkerIsSent() {
	defer close(c.release)
	close(c.goOn) // nobody is slow here
	eventually(c.t, "redis has version 1", func() bool { return c.read(0).Cached })
	c.holding.Store(true)
	c.write(0)
	c.read(0)
}

// unchecked is the script of a cache that stores whatever comes last.
func unchecked() *rueidis.Lua {
	return rueidis.NewLuaScript(`return redis.call('SET', KEYS[1], ARGV[1] .. '\n' .. ARGV[2], 'PX', ARGV[3])`)
}
