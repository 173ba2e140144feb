package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strconv"
	"time"

	"github.com/VictoriaMetrics/metrics"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sync/singleflight"
)

// document is a product as clients read it: the encoded JSON with its version.
type document struct {
	ID      int64
	Version int64
	Body    []byte // never modified after it was made: readers share it
	Cached  bool   // came out of the cache
}

// productReader reads the current state of a product. It fails with
// errNotFound or errUnavailable.
type productReader interface {
	Product(ctx context.Context, id int64) (document, error)
}

// cacheEntry is what a backend keeps of a product: a body with its version, or
// a marker, a version alone, that says "nothing older than this".
type cacheEntry struct {
	version int64  // 0: there is no entry. See also absent and tombstone
	body    []byte // nil in a marker
	local   bool   // no other process was asked for it
}

// cacheBackend is where entries are kept between reads: Redis, or the memory of
// the process.
//
// Get and Put take no context. They bound their own time, and what they do is
// shared by many readers, so it must not end with the request of one of them.
type cacheBackend interface {
	// Get returns the entry of a product.
	Get(id int64) (cacheEntry, error)
	// Put stores what is newer than the entry that is there and ignores the
	// rest. Of two equal versions a body is newer than a marker. A nil body makes
	// a marker. How long the entry lives is entryTTL.
	Put(id, version int64, body []byte) error
	// Run does the backend's own work until ctx ends, then closes it.
	Run(ctx context.Context) error
}

const (
	// tombstone is the version of a deleted product: nothing is newer. It is
	// the largest integer that Redis' Lua, which counts in doubles, compares
	// exactly.
	tombstone int64 = 1<<53 - 1

	// absent is the version of a product that was looked for and not found:
	// everything is newer, so no product that is made later stays hidden by it.
	absent int64 = -1

	// absentTTL bounds how long a product that is made stays hidden when the
	// word of it is lost.
	absentTTL = 5 * time.Second

	// markerTTL is the least life of a marker. It must exceed loadTimeout, so
	// that a load which began before the write finds the marker when it ends.
	markerTTL = 60 * time.Second

	// loadTimeout bounds one load, which no longer belongs to any one request.
	loadTimeout = 10 * time.Second

	// maxLoads bounds how often a read starts again because the product was
	// written while it was loaded.
	maxLoads = 3

	sendRetry    = 250 * time.Millisecond // between tries to send the markers
	sendWorkers  = 8                      // markers in flight at once
	markerBatch  = 1000                   // markers looked up at once, which readers wait for
	flushTimeout = 2 * time.Second        // for sending the last markers at the end
)

// lagBuckets reach from a marker that goes out at once to one that waited for a
// Redis that was away. In seconds.
var lagBuckets = []float64{.0001, .00025, .0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60}

var (
	cacheLocalHits = metrics.NewCounter(`pms_cache_hits_total{source="local"}`)
	cacheRedisHits = metrics.NewCounter(`pms_cache_hits_total{source="redis"}`)
	cacheMisses    = metrics.NewCounter("pms_cache_misses_total")
	cacheLoads     = metrics.NewCounter("pms_cache_loads_total")
	cacheErrors    = metrics.NewCounter("pms_cache_errors_total")
	// cacheLag is the time from a write's commit to the moment when the backend
	// had the marker, and with it told the other instances.
	cacheLag = metrics.NewPrometheusHistogramExt("pms_cache_invalidation_lag_seconds", lagBuckets)
)

// entryTTL is how long a backend keeps an entry, where bodies live for ttl.
func entryTTL(version int64, body []byte, ttl time.Duration) time.Duration {
	switch {
	case version == absent:
		return absentTTL
	case body == nil:
		return max(ttl, markerTTL)
	}
	return ttl
}

// cache is a productReader that remembers what another one said. It promises:
//
//   - after Invalidate(id, v) returned, no read that begins on this instance
//     gets a version below v, and none gets a deleted product;
//   - on one instance the version of a product never goes backwards;
//   - another instance is behind until the marker has reached the backend. A
//     marker waits while the backend is away; if the process dies meanwhile,
//     or the backend lost its memory just then, the others are behind by the TTL
//     of what they have at the very worst;
//   - a backend that fails costs no error, only loads.
type cache struct {
	next    productReader
	backend cacheBackend
	log     *slog.Logger
	floors  *floors
	flights singleflight.Group
	wake    chan struct{} // tells Run that a marker waits
}

// newCache returns a cache of next. ttl bounds the life of a document in the
// backend and must be the one that the backend was made with. Run must be
// running for invalidations to leave the process.
func newCache(next productReader, backend cacheBackend, ttl time.Duration, log *slog.Logger) *cache {
	return &cache{
		next:    next,
		backend: backend,
		log:     log,
		floors:  newFloors(ttl + loadTimeout),
		wake:    make(chan struct{}, 1),
	}
}

// Product returns a product from the cache, else from the reader behind it.
func (c *cache) Product(ctx context.Context, id int64) (document, error) {
	floor := c.floors.get(id)
	if floor == tombstone {
		cacheLocalHits.Inc()
		return document{Cached: true}, notFound(id)
	}
	entry, err := c.backend.Get(id)
	if entry.version == tombstone || entry.version == absent && floor <= 0 {
		c.floors.see(id, entry.version)
		countHit(entry)
		return document{Cached: true}, notFound(id)
	}
	// Once it was not found here, nobody's copy is believed before a load has
	// seen the product: the copy may be from before a deletion.
	trusted := floor != absent
	if trusted && entry.version > floor { // then it must not go backwards from here
		c.floors.see(id, entry.version)
	}
	if trusted && entry.body != nil && entry.version >= floor {
		countHit(entry)
		return document{ID: id, Version: entry.version, Body: entry.body, Cached: true}, nil
	}
	cacheMisses.Inc()
	return c.load(ctx, id, flight{floor: max(floor, entry.version, 0), trusted: trusted, fill: err == nil})
}

func countHit(entry cacheEntry) {
	if entry.local {
		cacheLocalHits.Inc()
	} else {
		cacheRedisHits.Inc()
	}
}

func notFound(id int64) error { return fmt.Errorf("read product %d: %w", id, errNotFound) }

// flight is a load that any number of readers wait for.
type flight struct {
	// floor is the least version that its result may have. It is part of the
	// flight's key because a load that began before a write may return what was
	// there before it: whoever comes after the write has a higher floor, and so
	// never joins such a load.
	floor   int64
	trusted bool // a copy in the backend is as good as a load. Part of the key too
	fill    bool // the backend answered; after its first failure it is left alone, so that a hung one delays a read once at most
}

func (f flight) key(id int64) string {
	key := strconv.FormatInt(id, 10) + "/" + strconv.FormatInt(f.floor, 10)
	if !f.trusted {
		key += "!"
	}
	return key
}

// load reads a product past the cache. The result is at least as new as the
// floor, and as anything that this instance wrote or showed meanwhile, unless
// the product is written faster than it can be read.
func (c *cache) load(ctx context.Context, id int64, f flight) (document, error) {
	least := f.floor
	var doc document
	for range maxLoads {
		var err error
		if doc, err = c.join(ctx, id, f); err != nil {
			return document{}, err
		}
		floor := c.floors.get(id)
		if doc.Version >= floor {
			c.floors.see(id, doc.Version)
			return doc, nil
		}
		if floor == tombstone {
			return document{}, notFound(id)
		}
		f.floor = floor
	}
	if doc.Version < least {
		return document{}, fmt.Errorf("read product %d: got version %d after %d: %w", id, doc.Version, least, errUnavailable)
	}
	return doc, nil
}

// join takes part in a flight, or starts it. Where there is nothing to fill there
// is none, since it would cost a tenth of the load: productLoader has readers
// share queries as well.
func (c *cache) join(ctx context.Context, id int64, f flight) (document, error) {
	if !f.fill {
		return c.fetch(ctx, id, f)
	}
	landed := c.flights.DoChan(f.key(id), func() (any, error) {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), loadTimeout)
		defer cancel()
		return c.fetch(ctx, id, f)
	})
	select {
	case <-ctx.Done():
		return document{}, fmt.Errorf("read product %d: %w", id, context.Cause(ctx))
	case result := <-landed:
		if result.Err != nil {
			return document{}, result.Err
		}
		return result.Val.(document), nil
	}
}

// fetch does the work of one flight, or of one reader.
func (c *cache) fetch(ctx context.Context, id int64, f flight) (document, error) {
	if f.trusted && f.fill {
		// Between the reader's look and the start of this flight another flight
		// may have ended. Looking again keeps a stampede at one load.
		entry, err := c.backend.Get(id)
		if err == nil && entry.body != nil && entry.version >= f.floor {
			return document{ID: id, Version: entry.version, Body: entry.body, Cached: true}, nil
		}
		f.fill = err == nil
	}
	doc, err := c.next.Product(ctx, id)
	if errors.Is(err, errNotFound) {
		c.notThere(id, f)
	}
	if err != nil {
		return document{}, err
	}
	if f.fill && doc.Version >= c.floors.get(id) && ctx.Err() == nil { // a load that took too long may be older than the markers
		_ = c.backend.Put(id, doc.Version, doc.Body) // counted there; the next read will load again
	}
	return doc, nil
}

// notThere remembers that a load has not found a product. If it was there
// before the load began, it was deleted, and for good: no id is used twice.
// That is then told to everybody, since whoever deleted it may have died first.
func (c *cache) notThere(id int64, f flight) {
	if f.floor > 0 {
		c.Invalidate(id, tombstone)
		return
	}
	c.floors.see(id, absent)
	if f.fill && c.floors.get(id) == absent {
		_ = c.backend.Put(id, absent, nil) // counted there
	}
}

// Invalidate says that version of a product was committed, the first included,
// or that it was deleted if version is tombstone or above. From its return on this instance
// serves nothing older; the others learn of it through the backend. It never
// blocks and never fails.
func (c *cache) Invalidate(id, version int64) {
	if !c.floors.write(id, min(version, tombstone)) {
		cacheErrors.Inc()
	}
	poke(c.wake)
}

// Run sends the markers of Invalidate to the backend, and runs the backend,
// until ctx ends. It then takes up to flushTimeout to send what is left.
func (c *cache) Run(ctx context.Context) error {
	work, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	var backend errgroup.Group
	backend.Go(func() error { return c.backend.Run(work) })
	c.sendUntil(ctx)
	c.flush(work)
	stop()
	return backend.Wait()
}

func (c *cache) sendUntil(ctx context.Context) {
	rotate := time.NewTicker(c.floors.keep)
	defer rotate.Stop()
	var retry <-chan time.Time
	for {
		select {
		case <-ctx.Done():
			return
		case <-rotate.C:
			c.floors.rotate()
			continue
		case <-c.wake:
		case <-retry:
		}
		retry = nil
		if !c.send(ctx) {
			retry = time.After(sendRetry)
		}
	}
}

// send sends the markers that wait and reports whether all were stored. It
// stops at the first failure: the backend is away then.
func (c *cache) send(ctx context.Context) bool {
	for {
		batch := c.floors.waiting(markerBatch)
		if len(batch) == 0 {
			return true
		}
		if c.sendBatch(ctx, batch) != nil {
			return false
		}
	}
}

func (c *cache) sendBatch(ctx context.Context, batch map[int64]marker) error {
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(sendWorkers)
	for id, marker := range batch {
		group.Go(func() error {
			if ctx.Err() != nil {
				return ctx.Err()
			}
			if err := c.backend.Put(id, marker.version, nil); err != nil {
				return err
			}
			c.floors.sent(id, marker.version)
			cacheLag.Update(time.Since(marker.since).Seconds())
			return nil
		})
	}
	return group.Wait()
}

func (c *cache) flush(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, flushTimeout)
	defer cancel()
	for !c.send(ctx) {
		if sleep(ctx, sendRetry) != nil {
			c.log.Warn("invalidations not sent", "count", len(c.floors.waiting(maxUnsent)))
			return
		}
	}
}
