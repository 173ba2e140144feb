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
)

// errCacheAway is the answer of a Redis that is known to be away. It costs no
// time.
var errCacheAway = errors.New("cache unavailable")

const (
	// redisTimeout bounds one operation, and with it what a hung Redis adds to
	// a read before the breaker opens: no more than 50 ms, the timer's own
	// lateness included.
	redisTimeout = 40 * time.Millisecond

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
)

// cacheBreaker is 1 while Redis is away and left alone.
var cacheBreaker = metrics.NewGauge("pms_cache_breaker_open", nil)

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
	timeout time.Duration // redisTimeout, except in tests that have no use for it
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
// connect, Run does. Bodies live for ttl; size bounds the client-side cache, in
// bytes.
func newRedisCache(redisURL string, ttl time.Duration, size int64, log *slog.Logger) (*redisCache, error) {
	options, err := rueidis.ParseURL(redisURL)
	if err != nil {
		if bad, ok := errors.AsType[*url.Error](err); ok { // its text has the URL, which may have a password
			err = bad.Err
		}
		return nil, fmt.Errorf("parse redis url: %w", err)
	}
	options.ClientName = "pms"
	options.ForceSingleClient = true
	options.PipelineMultiplex = -1 // one connection: the size of its cache is then the whole
	options.CacheSizeEachConn = int(size)
	options.AlwaysPipelining = true // without it the timeout of one operation closes the connection
	options.DisableRetry = true     // retries would go on until the context ends
	options.Dialer.Timeout = redisDialTimeout
	options.ConnWriteTimeout = redisWriteTimeout
	return &redisCache{
		options: options,
		timeout: redisTimeout,
		ttl:     ttl,
		log:     log,
		put:     rueidis.NewLuaScript(redisPut),
		lost:    make(chan error, 1),
	}, nil
}

// Get implements cacheBackend.
func (b *redisCache) Get(id int64) (cacheEntry, error) {
	conn := b.live.Load()
	if conn == nil {
		return cacheEntry{}, errCacheAway
	}
	op := newLazyTimeout(b.timeout)
	defer op.release()
	result := conn.DoCache(op, conn.B().Get().Key(redisKey(id)).Cache(), b.ttl)
	value, err := result.AsBytes()
	if rueidis.IsRedisNil(err) {
		value, err = nil, nil
	}
	if err != nil {
		return cacheEntry{}, b.failed(conn, fmt.Errorf("get product %d from redis: %w", id, err))
	}
	entry := splitEntry(value)
	entry.local = result.IsCacheHit()
	if !entry.local { // a local copy says nothing about Redis' health
		conn.answered()
	}
	return entry, nil
}

// Put implements cacheBackend.
func (b *redisCache) Put(id, version int64, body []byte) error {
	conn := b.live.Load()
	if conn == nil {
		return errCacheAway
	}
	op := newLazyTimeout(b.timeout)
	defer op.release()
	err := b.put.Exec(op, conn, []string{redisKey(id)}, []string{
		strconv.FormatInt(version, 10),
		rueidis.BinaryString(body),
		strconv.FormatInt(entryTTL(version, body, b.ttl).Milliseconds(), 10),
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
	return wrap(conn.Do(ctx, conn.B().Ping().Build()).Error(), "ping redis")
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
	if _, refused := errors.AsType[*rueidis.RedisError](err); refused {
		conn.answered()
		return err
	}
	if conn.failedForGood(time.Now(), b.timeout) && b.live.CompareAndSwap(conn, nil) {
		b.lost <- err
	}
	return err
}

// failedForGood counts a failure and reports whether it opens the breaker.
func (c *redisConn) failedForGood(now time.Time, timeout time.Duration) bool {
	c.since.CompareAndSwap(0, now.UnixNano())
	first := c.since.Load()
	return c.failures.Add(1) >= redisFailures && first != 0 && now.UnixNano()-first >= int64(timeout)
}

// Run keeps a connection to Redis until ctx ends. It logs when Redis goes away
// and when it is back, once each.
func (b *redisCache) Run(ctx context.Context) error {
	health := healthLog{log: b.log}
	for {
		err := b.serve(ctx, func() { health.note(ctx, nil, "", "cache back") })
		if ctx.Err() != nil {
			return nil
		}
		health.fault("away", "cache unavailable", err)
		cacheBreaker.Set(1)
		if sleep(ctx, redisPause) != nil {
			return nil
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
	cacheBreaker.Set(0)
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
func splitEntry(value []byte) cacheEntry {
	head, body, ok := bytes.Cut(value, []byte{'\n'})
	if !ok {
		return cacheEntry{}
	}
	version, err := strconv.ParseInt(string(head), 10, 64)
	if err != nil || version <= 0 && (version != absent || len(body) > 0) {
		return cacheEntry{}
	}
	if len(body) == 0 {
		body = nil
	}
	return cacheEntry{version: version, body: body}
}

// lazyTimeout is a context that ends timeout after anyone first asked it
// anything. rueidis does not when it has a local copy, so the fastest and most
// frequent kind of read pays for no timer. It has no parent on purpose: readers
// of one key share one fetch, and would share the cancellation of its first.
type lazyTimeout struct {
	timeout time.Duration
	armed   context.Context
	cancel  context.CancelFunc
}

func (l *lazyTimeout) arm() context.Context {
	if l.armed == nil {
		l.armed, l.cancel = context.WithTimeout(context.Background(), l.timeout)
	}
	return l.armed
}

// release ends the context. One that was never asked anything was not kept by
// anyone either, and serves the next read.
func (l *lazyTimeout) release() {
	if l.cancel == nil {
		idleTimeouts.Put(l)
		return
	}
	l.cancel()
}

var idleTimeouts = sync.Pool{New: func() any { return new(lazyTimeout) }}

func newLazyTimeout(timeout time.Duration) *lazyTimeout {
	l := idleTimeouts.Get().(*lazyTimeout)
	l.timeout = timeout
	return l
}

// Deadline implements context.Context.
func (l *lazyTimeout) Deadline() (time.Time, bool) { return l.arm().Deadline() }

// Done implements context.Context.
func (l *lazyTimeout) Done() <-chan struct{} { return l.arm().Done() }

// Err implements context.Context.
func (l *lazyTimeout) Err() error { return l.arm().Err() }

// Value implements context.Context.
func (l *lazyTimeout) Value(any) any { return nil }
