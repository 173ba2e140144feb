package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/VictoriaMetrics/metrics"
	"github.com/redis/rueidis"
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

// cacheBackend is where documents are kept between reads: Redis, or the memory
// of the process. It keeps one entry a product, which is a body with its
// version or a marker, a version alone, that says "nothing older than this".
//
// Get and Put take no context. They bound their own time, and what they do is
// shared by many readers, so it must not end with the request of one of them.
type cacheBackend interface {
	// Get returns the entry of a product. Version 0 means that there is none,
	// a nil body that it is a marker.
	Get(id int64) (version int64, body []byte, err error)
	// Put stores what is newer than the entry that is there and ignores the
	// rest. Of two equal versions a body is newer than a marker.
	Put(id, version int64, body []byte) error
	// Run does the backend's own work until ctx ends, then closes it.
	Run(ctx context.Context) error
}

const (
	// tombstone is the version of a deleted product: nothing is newer. It is
	// the largest integer that Redis' Lua, which counts in doubles, compares
	// exactly.
	tombstone int64 = 1<<53 - 1

	// markerTTL is the least life of a marker. It must exceed loadTimeout, so
	// that a load which began before the write finds the marker when it ends.
	markerTTL = 60 * time.Second

	// loadTimeout bounds one load, which no longer belongs to any one request.
	loadTimeout = 10 * time.Second

	// maxLoads bounds how often a read starts again because the product was
	// written while it was loaded.
	maxLoads = 3

	// maxUnsent bounds the markers kept while the backend is away. Whatever is
	// written beyond it is covered on this instance by its floor, and on others
	// by the TTL of what they have.
	maxUnsent = 100_000

	// maxSeen bounds the floors that are kept because of reads: about 5 MB.
	maxSeen = 100_000

	sendRetry    = 250 * time.Millisecond // between tries to send the markers
	sendWorkers  = 8                      // markers in flight at once
	markerBatch  = 1000                   // markers looked up at once, which readers wait for
	flushTimeout = 2 * time.Second        // for sending the last markers at the end
)

var (
	cacheHits   = metrics.NewCounter("pms_cache_hits_total")
	cacheMisses = metrics.NewCounter("pms_cache_misses_total")
	cacheLoads  = metrics.NewCounter("pms_cache_loads_total")
	cacheErrors = metrics.NewCounter("pms_cache_errors_total")
)

// cache is a productReader that remembers what another one said. It promises:
//
//   - after Invalidate(id, v) returned, no read that begins on this instance
//     gets a version below v, and none gets a deleted product;
//   - on one instance the version of a product never goes backwards;
//   - another instance is behind until the marker has reached the backend, and
//     by the TTL at the very worst;
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
	version, body, err := c.backend.Get(id)
	if version > floor { // then it must not go backwards from here
		c.floors.see(id, version)
		floor = version
	}
	if floor == tombstone {
		return document{}, notFound(id)
	}
	if body != nil && version == floor {
		cacheHits.Inc()
		return document{ID: id, Version: version, Body: body, Cached: true}, nil
	}
	cacheMisses.Inc()
	return c.load(ctx, id, floor, err == nil)
}

func notFound(id int64) error { return fmt.Errorf("read product %d: %w", id, errNotFound) }

// load reads a product past the cache. The result is at least as new as
// floor, and as anything that this instance wrote or showed meanwhile, unless
// the product is written faster than it can be read.
func (c *cache) load(ctx context.Context, id, floor int64, fill bool) (document, error) {
	least := floor
	var doc document
	for range maxLoads {
		var err error
		if doc, err = c.join(ctx, id, floor, fill); err != nil {
			return document{}, err
		}
		if floor = c.floors.get(id); doc.Version >= floor {
			c.floors.see(id, doc.Version)
			return doc, nil
		}
		if floor == tombstone {
			return document{}, notFound(id)
		}
	}
	if doc.Version < least {
		return document{}, fmt.Errorf("read product %d: got version %d after %d: %w", id, doc.Version, least, errUnavailable)
	}
	return doc, nil
}

// join takes part in the load of a product, or starts it. The floor is part of
// the flight's key because a load that began before a write may return what
// was there before it: whoever comes after the write has a higher floor, and
// so never joins such a load.
func (c *cache) join(ctx context.Context, id, floor int64, fill bool) (document, error) {
	key := strconv.FormatInt(id, 10) + "/" + strconv.FormatInt(floor, 10)
	flight := c.flights.DoChan(key, func() (any, error) {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), loadTimeout)
		defer cancel()
		return c.fetch(ctx, id, floor, fill)
	})
	select {
	case <-ctx.Done():
		return document{}, fmt.Errorf("read product %d: %w", id, context.Cause(ctx))
	case result := <-flight:
		if result.Err != nil {
			return document{}, result.Err
		}
		return result.Val.(document), nil
	}
}

// fetch does the work of one flight. fill says whether the backend answered
// the reader that started the flight; after its first failure it is left
// alone, so that a hung backend delays a read once at most.
func (c *cache) fetch(ctx context.Context, id, floor int64, fill bool) (document, error) {
	if fill {
		// Between the reader's look and the start of this flight another flight
		// may have ended. Looking again keeps a stampede at one load.
		version, body, err := c.backend.Get(id)
		if err == nil && body != nil && version >= floor {
			return document{ID: id, Version: version, Body: body, Cached: true}, nil
		}
		fill = err == nil
	}
	cacheLoads.Inc()
	doc, err := c.next.Product(ctx, id)
	if err != nil {
		return document{}, err
	}
	if fill && doc.Version >= c.floors.get(id) {
		_ = c.backend.Put(id, doc.Version, doc.Body) // counted there; the next read will load again
	}
	return doc, nil
}

// Invalidate says that version of a product was committed, or that it was
// deleted if version is tombstone or above. From its return on this instance
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

func (c *cache) sendBatch(ctx context.Context, batch map[int64]int64) error {
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(sendWorkers)
	for id, version := range batch {
		group.Go(func() error {
			if ctx.Err() != nil {
				return ctx.Err()
			}
			if err := c.backend.Put(id, version, nil); err != nil {
				return err
			}
			c.floors.sent(id, version)
			return nil
		})
	}
	return group.Wait()
}

func (c *cache) flush(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, flushTimeout)
	defer cancel()
	for !c.send(ctx) {
		select {
		case <-ctx.Done():
			c.log.Warn("invalidations not sent", "count", len(c.floors.waiting(maxUnsent)))
			return
		case <-time.After(sendRetry):
		}
	}
}

// floors holds the least version of a product that this instance may serve:
// what it wrote itself, since its marker reaches the backend later and an
// invalidation reaches the client-side cache later still; and what it served,
// since a backend that lost its memory may be filled by a load that is old.
//
// A floor is needed for as long as something older may turn up: until a load
// that began before the write has ended and what it stored has expired, which
// is keep. To forget in time without a clock for each entry there are two
// generations: rotate, called every keep, drops the older one. A version whose
// marker has not been sent is kept until it was.
type floors struct {
	keep time.Duration

	mu         sync.RWMutex
	young, old map[int64]int64
	unsent     map[int64]int64
}

func newFloors(keep time.Duration) *floors {
	return &floors{
		keep:   keep,
		young:  make(map[int64]int64),
		old:    make(map[int64]int64),
		unsent: make(map[int64]int64),
	}
}

// get returns the floor of a product, 0 if it has none.
func (f *floors) get(id int64) int64 {
	f.mu.RLock()
	defer f.mu.RUnlock()
	return max(f.young[id], f.old[id], f.unsent[id])
}

// see raises the floor because version was read. Beyond maxSeen it does
// nothing, and only the backend keeps versions from going backwards.
func (f *floors) see(id, version int64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if version > max(f.young[id], f.old[id], f.unsent[id]) && len(f.young) < maxSeen {
		f.young[id] = version
	}
}

// write raises the floor because version was committed, and queues its marker.
// It reports false if too many markers wait already.
func (f *floors) write(id, version int64) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.young[id] = max(f.young[id], version)
	if _, queued := f.unsent[id]; !queued && len(f.unsent) >= maxUnsent {
		return false
	}
	f.unsent[id] = max(f.unsent[id], version)
	return true
}

// waiting returns up to limit of the versions whose markers have not been sent.
func (f *floors) waiting(limit int) map[int64]int64 {
	f.mu.RLock()
	defer f.mu.RUnlock()
	batch := make(map[int64]int64)
	for id, version := range f.unsent {
		if len(batch) == limit {
			break
		}
		batch[id] = version
	}
	return batch
}

// sent says that the marker of a version was stored. The floor's time begins
// anew: until now others may have stored what is older.
func (f *floors) sent(id, version int64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.unsent[id] == version {
		delete(f.unsent, id)
	}
	f.young[id] = max(f.young[id], version)
}

func (f *floors) rotate() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.old, f.young = f.young, make(map[int64]int64)
}

// errCacheAway is the answer of a Redis that is known to be away. It costs no
// time.
var errCacheAway = errors.New("cache unavailable")

const (
	// redisTimeout bounds one operation, and with it what a hung Redis adds to
	// a read before the breaker opens.
	redisTimeout = 50 * time.Millisecond

	// redisDialTimeout bounds the dialing and again the greeting. It is only
	// ever waited for in Run, or cut to redisTimeout in a read.
	redisDialTimeout = 200 * time.Millisecond

	// redisWriteTimeout is how long a connection may be silent after a ping, one
	// second after the last answer, before it is given up with its local copies.
	redisWriteTimeout = 500 * time.Millisecond

	// redisFailures is how many operations must fail in a row to open the
	// breaker. They must also span redisTimeout, so that one that began after
	// the first failure has failed too: a pause of this process alone makes any
	// number of operations late at once.
	redisFailures = 3

	// redisPause is between two attempts to connect.
	redisPause = 500 * time.Millisecond

	// redisLocalBytes bounds the client-side cache. It is per connection, and
	// there is one connection.
	redisLocalBytes = 64 << 20
)

// redisPut stores ARGV[2] as version ARGV[1] for ARGV[3] milliseconds if that
// is newer than what is there. An entry is its version in decimal, a line feed,
// and the body, which is empty in a marker. The first 18 bytes are enough to
// read any version up to tombstone and to tell a marker from a body.
//
// A Redis that is out of memory refuses to SET but not to DEL. Removing the
// entry is then the next best thing: what is old must not stay.
const redisPut = `
local head = redis.call('GETRANGE', KEYS[1], 0, 17)
local feed = string.find(head, '\n', 1, true)
if feed then
  local have, new = tonumber(string.sub(head, 1, feed - 1)), tonumber(ARGV[1])
  if have and (have > new or have == new and (#head > feed or ARGV[2] == '')) then
    return 0
  end
end
local reply = redis.pcall('SET', KEYS[1], ARGV[1] .. '\n' .. ARGV[2], 'PX', ARGV[3])
if reply.err then
  redis.call('DEL', KEYS[1])
  return reply
end
return 1
`

// redisCache is the cacheBackend in Redis, shared by all instances, with a
// client-side cache in front of it that Redis invalidates (RESP3 tracking).
//
// The breaker and the connection are one: live is nil while Redis is away, and
// then every operation fails at once. Failures in a row set it to
// nil; Run, not a reader, then tries to connect again. A connection that is given up
// takes its local copies with it, and so do lost ones, so nothing is served
// that Redis could no longer invalidate. A hung Redis cannot keep them alive
// either: they expire with the entry itself, after ttl at most.
type redisCache struct {
	options rueidis.ClientOption
	ttl     time.Duration
	log     *slog.Logger
	put     *rueidis.Lua
	live    atomic.Pointer[redisConn]
	lost    chan error // why live was set to nil; room for the one that there can be
}

// redisConn is a client with its failures since Redis last answered.
type redisConn struct {
	rueidis.Client
	failures atomic.Int32
	since    atomic.Int64 // Unix time of the first of them in nanoseconds, or 0
}

// newRedisCache returns the backend at a redis:// or rediss:// URL. It does not
// connect, Run does. Bodies live for ttl, markers for markerTTL at least.
func newRedisCache(redisURL string, ttl time.Duration, log *slog.Logger) (*redisCache, error) {
	options, err := rueidis.ParseURL(redisURL)
	if err != nil {
		var bad *url.Error
		if errors.As(err, &bad) { // its text has the URL, which may have a password
			err = bad.Err
		}
		return nil, fmt.Errorf("parse redis url: %w", err)
	}
	options.ClientName = "pms"
	options.ForceSingleClient = true
	options.PipelineMultiplex = -1 // one connection: redisLocalBytes is then the whole
	options.CacheSizeEachConn = redisLocalBytes
	options.AlwaysPipelining = true // without it the timeout of one operation closes the connection
	options.DisableRetry = true     // retries would go on until the context ends
	options.Dialer.Timeout = redisDialTimeout
	options.ConnWriteTimeout = redisWriteTimeout
	return &redisCache{
		options: options,
		ttl:     ttl,
		log:     log,
		put:     rueidis.NewLuaScript(redisPut),
		lost:    make(chan error, 1),
	}, nil
}

// Get implements cacheBackend.
func (b *redisCache) Get(id int64) (version int64, body []byte, err error) {
	conn := b.live.Load()
	if conn == nil {
		return 0, nil, errCacheAway
	}
	op := &lazyTimeout{}
	defer op.release()
	result := conn.DoCache(op, conn.B().Get().Key(redisKey(id)).Cache(), b.ttl)
	value, err := result.AsBytes()
	if rueidis.IsRedisNil(err) {
		value, err = nil, nil
	}
	if err != nil {
		return 0, nil, b.failed(conn, fmt.Errorf("get product %d from redis: %w", id, err))
	}
	if !result.IsCacheHit() { // a local copy says nothing about Redis' health
		conn.answered()
	}
	version, body = splitEntry(value)
	return version, body, nil
}

// Put implements cacheBackend.
func (b *redisCache) Put(id, version int64, body []byte) error {
	conn := b.live.Load()
	if conn == nil {
		return errCacheAway
	}
	ttl := b.ttl
	if body == nil {
		ttl = max(ttl, markerTTL)
	}
	op := &lazyTimeout{}
	defer op.release()
	err := b.put.Exec(op, conn, []string{redisKey(id)}, []string{
		strconv.FormatInt(version, 10),
		rueidis.BinaryString(body),
		strconv.FormatInt(ttl.Milliseconds(), 10),
	}).Error()
	if err != nil {
		return b.failed(conn, fmt.Errorf("put product %d into redis: %w", id, err))
	}
	conn.answered()
	return nil
}

// Ping reports whether Redis answers.
func (b *redisCache) Ping(ctx context.Context) error {
	conn := b.live.Load()
	if conn == nil {
		return errCacheAway
	}
	ctx, cancel := context.WithTimeout(ctx, redisDialTimeout)
	defer cancel()
	if err := conn.Do(ctx, conn.B().Ping().Build()).Error(); err != nil {
		return fmt.Errorf("ping redis: %w", err)
	}
	return nil
}

// answered says that Redis has answered on a connection.
func (c *redisConn) answered() {
	if c.since.Load() != 0 { // look first: it is 0 nearly always, and writing is dear
		c.failures.Store(0)
		c.since.Store(0)
	}
}

// failed counts a failure and returns it. What Redis itself refuses (out of
// memory, loading its data) came at once and so does not count for the breaker.
func (b *redisCache) failed(conn *redisConn, err error) error {
	cacheErrors.Inc()
	var refusal *rueidis.RedisError
	if errors.As(err, &refusal) {
		conn.answered()
		return err
	}
	if conn.failedForGood(time.Now()) && b.live.CompareAndSwap(conn, nil) {
		b.lost <- err
	}
	return err
}

// failedForGood counts a failure and reports whether it opens the breaker.
func (c *redisConn) failedForGood(now time.Time) bool {
	c.since.CompareAndSwap(0, now.UnixNano())
	first := c.since.Load()
	return c.failures.Add(1) >= redisFailures && first != 0 && now.UnixNano()-first >= int64(redisTimeout)
}

// Run keeps a connection to Redis until ctx ends. It logs when Redis goes away
// and when it is back, once each.
func (b *redisCache) Run(ctx context.Context) error {
	away := false
	for {
		err := b.serve(ctx, func() {
			if away {
				b.log.Info("cache back")
			}
			away = false
		})
		if ctx.Err() != nil {
			return nil
		}
		if !away {
			b.log.Warn("cache unavailable", "err", err)
		}
		away = true
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(redisPause):
		}
	}
}

// serve connects and offers the connection to readers until it is lost, and
// returns why, or until ctx ends. It calls connected in between. Closing waits
// for a second at most for a Redis that hangs.
func (b *redisCache) serve(ctx context.Context, connected func()) error {
	client, err := rueidis.NewClient(b.options)
	if client != nil {
		defer client.Close()
	}
	if err != nil {
		return fmt.Errorf("connect to redis: %w", err)
	}
	connected()
	b.live.Store(&redisConn{Client: client})
	defer b.live.Store(nil)
	select {
	case <-ctx.Done():
		return nil
	case err := <-b.lost:
		return err
	}
}

func redisKey(id int64) string {
	var buf [32]byte
	return string(strconv.AppendInt(append(buf[:0], "product:"...), id, 10))
}

// splitEntry takes apart what redisPut stored. Anything else is no entry.
func splitEntry(value []byte) (version int64, body []byte) {
	head, body, ok := bytes.Cut(value, []byte{'\n'})
	if !ok {
		return 0, nil
	}
	version, err := strconv.ParseInt(string(head), 10, 64)
	if err != nil || version <= 0 {
		return 0, nil
	}
	if len(body) == 0 {
		return version, nil
	}
	return version, body
}

// lazyTimeout is a context that ends redisTimeout after anyone first asked it
// anything. rueidis does not when it has a local copy, so the fastest and most
// frequent kind of read pays for no timer. It has no parent on purpose: readers
// of one key share one fetch, and would share the cancellation of its first.
type lazyTimeout struct {
	armed  context.Context
	cancel context.CancelFunc
}

func (l *lazyTimeout) arm() context.Context {
	if l.armed == nil {
		l.armed, l.cancel = context.WithTimeout(context.Background(), redisTimeout)
	}
	return l.armed
}

func (l *lazyTimeout) release() {
	if l.cancel != nil {
		l.cancel()
	}
}

// Deadline implements context.Context.
func (l *lazyTimeout) Deadline() (time.Time, bool) { return l.arm().Deadline() }

// Done implements context.Context.
func (l *lazyTimeout) Done() <-chan struct{} { return l.arm().Done() }

// Err implements context.Context.
func (l *lazyTimeout) Err() error { return l.arm().Err() }

// Value implements context.Context.
func (l *lazyTimeout) Value(any) any { return nil }
