package main

import (
	"context"
	"log/slog"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/redis/rueidis"
)

// outage is a cache with a Redis that a test can hurt, and a line to it that a
// test can break.
type outage struct {
	*cache
	server  *testServer
	line    *tcpProxy
	backend *redisCache
	db      *shelf
	log     *strings.Builder // read it when the cache has stopped or is at rest
	mu      sync.Mutex
}

// Write collects the log.
func (o *outage) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.log.Write(p)
}

func (o *outage) logged(message string) int {
	o.mu.Lock()
	defer o.mu.Unlock()
	return strings.Count(o.log.String(), message)
}

func startOutage(t *testing.T, ids ...int64) *outage {
	t.Helper()
	return startOutageOf(t, hastyRedis, ids...)
}

func startOutageOf(t *testing.T, open func(*testing.T, string, *slog.Logger) *redisCache, ids ...int64) *outage {
	t.Helper()
	o := &outage{server: startRedis(t), db: newShelf(ids...), log: new(strings.Builder)}
	o.line = startProxy(t, o.server.addr())
	o.backend = open(t, "redis://"+o.line.Addr, slog.New(slog.NewTextHandler(o, nil)))
	o.cache = startCache(t, o.db, o.backend)
	return o
}

// slowest reads every product once and returns the longest time a read took.
func (o *outage) slowest(t *testing.T, ids int64) time.Duration {
	t.Helper()
	var longest time.Duration
	for id := int64(1); id <= ids; id++ {
		begin := time.Now()
		mustRead(t, o.cache, id)
		longest = max(longest, time.Since(begin))
	}
	return longest
}

// scheduling is what a read may take on top of Redis' own timeout when the
// machine is busy.
const scheduling = 500 * time.Millisecond

func TestCacheOutages(t *testing.T) {
	t.Parallel()
	tests := map[string]struct{ begin, end func(*outage) }{
		"killed":                       {func(o *outage) { o.server.Kill(t) }, func(o *outage) { o.server.Start(t) }},
		"stopped":                      {func(o *outage) { o.server.Stop(t) }, func(o *outage) { o.server.Start(t) }},
		"hung":                         {func(o *outage) { o.server.Freeze(t) }, func(o *outage) { o.server.Thaw(t) }},
		"out of reach of one instance": {func(o *outage) { o.line.Cut() }, func(o *outage) { o.line.Restore(t) }},
		"silent towards one instance":  {func(o *outage) { o.line.Stall() }, func(o *outage) { o.line.Restore(t) }},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			const hot, cold = 5, 40
			ids := make([]int64, cold)
			for i := range ids {
				ids[i] = int64(i + 1)
			}
			o := startOutage(t, ids...)
			other := startCache(t, o.db, redisBackend(t, o.server.URL, quiet))
			for id := int64(1); id <= hot; id++ {
				eventually(t, "hot products are hits", func() bool {
					return mustRead(t, o.cache, id).Cached && mustRead(t, other, id).Cached
				})
			}

			test.begin(o)
			if longest := o.slowest(t, cold); longest > redisTimeout+scheduling {
				t.Errorf("a read took %v", longest)
			}
			// Writes go on, and are seen here at once.
			for id := int64(1); id <= hot; id++ {
				o.Invalidate(id, o.db.commit(id))
				if doc := mustRead(t, o.cache, id); doc.Version != 2 {
					t.Errorf("read version %d of product %d after the write of 2", doc.Version, id)
				}
			}
			eventually(t, "the breaker opens", func() bool {
				o.slowest(t, cold)
				return o.backend.live.Load() == nil
			})
			begin := time.Now()
			o.slowest(t, cold)
			if took := time.Since(begin); took > scheduling {
				t.Errorf("with the breaker open %d reads took %v", cold, took)
			}
			if err := o.backend.Ping(t.Context()); err == nil {
				t.Error("redis is said to be ready")
			}

			test.end(o)
			eventually(t, "reads are hits again", func() bool { return mustRead(t, o.cache, cold).Cached })
			for id := int64(1); id <= hot; id++ {
				eventually(t, "the other instance learns of what was written meanwhile", func() bool {
					return mustRead(t, other, id).Version == 2
				})
			}
			eventually(t, "every marker is sent", func() bool { return len(o.floors.waiting(maxUnsent)) == 0 })
			if gone, back := o.logged("cache unavailable"), o.logged("cache back"); gone != 1 || back != 1 {
				t.Errorf("logged %d times that it went away and %d times that it came back", gone, back)
			}
		})
	}
}

// A Redis that hangs costs a read no more than 50 ms. A machine that does
// something else meanwhile may spoil measurements, but not each of twenty.
func TestCacheHungRedisCostsAReadLittle(t *testing.T) {
	t.Parallel()
	const limit, reads, tries = 50 * time.Millisecond, 20, 20
	ids := make([]int64, reads*tries)
	for i := range ids {
		ids[i] = int64(i + 1)
	}
	o := startOutage(t, ids...)
	var longest time.Duration
	for try := range int64(tries) {
		o.server.Freeze(t)
		longest = 0
		for id := try*reads + 1; id <= (try+1)*reads; id++ {
			begin := time.Now()
			mustRead(t, o.cache, id)
			longest = max(longest, time.Since(begin))
		}
		o.server.Thaw(t)
		if longest <= limit {
			t.Logf("the longest read took %v", longest)
			return
		}
		eventually(t, "reads are hits again", func() bool { return mustRead(t, o.cache, 1).Cached })
	}
	t.Errorf("a read took %v, want at most %v", longest, limit)
}

// An instance that dies before it could tell of a write leaves the others
// behind for the TTL of what they have, and no longer.
func TestCacheWriteThatNobodyIsToldOfShowsWithinTheTTL(t *testing.T) {
	t.Parallel()
	const ttl = time.Second
	server := startRedis(t)
	line := startProxy(t, server.addr())
	db := newShelf(1)
	open := func(redisURL string) *cache {
		return startCache(t, db, patientRedis(t, redisURL, ttl, cacheSize, quiet))
	}
	writer, other := open("redis://"+line.Addr), open(server.URL)
	eventually(t, "the other instance has the product", func() bool { return mustRead(t, other, 1).Cached })
	line.Cut()
	writer.Invalidate(1, db.commit(1))
	committed := time.Now()
	eventually(t, "the other instance shows the write", func() bool { return mustRead(t, other, 1).Version == 2 })
	if lag := time.Since(committed); lag > 2*ttl {
		t.Errorf("took %v, the TTL is %v", lag, ttl)
	}
	if len(writer.floors.waiting(1)) == 0 {
		t.Error("the marker was sent")
	}
}

func TestCacheSizeBoundsTheLocalCopies(t *testing.T) {
	t.Parallel()
	const size, body, products = 1 << 20, 50 << 10, 100
	server := startRedis(t)
	backend := patientRedis(t, server.URL, cacheTTL, size, quiet)
	connected(t, backend)
	for id := range int64(products) {
		mustPut(t, backend, id, 1, make([]byte, body))
		mustGet(t, backend, id)
	}
	local := 0
	for id := range int64(products) { // backwards, since a miss displaces the oldest
		if entry, err := backend.Get(products - 1 - id); err == nil && entry.local {
			local++
		}
	}
	if bytes := local * body; bytes > size || bytes < size/2 {
		t.Errorf("%d bytes are kept, want at most %d and at least half of it", bytes, size)
	}
	client := dialRedis(t, server.URL)
	defer client.Close()
	eventually(t, "there is one connection, whose bound it is", func() bool {
		list, err := client.Do(t.Context(), client.B().ClientList().Build()).ToString()
		return err == nil && strings.Count(list, "name=pms") == 1
	})
}

func TestCacheHungRedisOpensTheBreakerBetweenLocalHits(t *testing.T) {
	t.Parallel()
	o := startOutage(t, 1, 2, 3, 4, 5, 6, 7, 8)
	eventually(t, "product 1 is a hit", func() bool { return mustRead(t, o.cache, 1).Cached })
	o.server.Freeze(t)
	defer o.server.Thaw(t)
	conn := o.backend.live.Load()
	for id := int64(2); id < 3+redisFailures; id++ {
		mustRead(t, o.cache, id)
		mustRead(t, o.cache, 1) // a local copy: no proof that Redis is well
	}
	if o.backend.live.Load() == conn {
		t.Errorf("breaker is closed after %d failures", conn.failures.Load())
	}
}

// A pause of this process makes all operations in hand late at once, which says
// nothing about Redis.
func TestCacheBreakerOpensForNoMomentAlone(t *testing.T) {
	t.Parallel()
	var conn redisConn
	now := time.Now()
	for range 2 * redisFailures {
		if conn.failedForGood(now, redisTimeout) {
			t.Fatal("it opened for what failed at one moment")
		}
	}
	if !conn.failedForGood(now.Add(redisTimeout), redisTimeout) {
		t.Error("it stayed closed for what failed later")
	}
}

func TestCacheWithoutRedisAtStart(t *testing.T) {
	t.Parallel()
	o := &outage{server: startRedis(t), db: newShelf(1), log: new(strings.Builder)}
	o.server.Kill(t)
	o.backend = hastyRedis(t, o.server.URL, slog.New(slog.NewTextHandler(o, nil)))
	o.cache = newCache(o.db, o.backend, cacheTTL, quiet)
	runUntilEnd(t, o.cache.Run)
	eventually(t, "the first try to connect has failed", func() bool { return o.logged("cache unavailable") == 1 })
	if mustRead(t, o.cache, 1).Cached {
		t.Error("hit without Redis")
	}
	o.Invalidate(1, o.db.commit(1))
	refuse(t, o.server.addr(), 3) // tries to connect; each would have its line in the log
	o.server.Start(t)
	eventually(t, "reads are hits", func() bool { return mustRead(t, o.cache, 1).Cached })
	eventually(t, "the marker is sent", func() bool { return len(o.floors.waiting(maxUnsent)) == 0 })
	if o.logged("cache unavailable") != 1 || o.logged("cache back") != 1 {
		t.Errorf("logged: %s", o.log)
	}
}

// refuse takes n connections in the place of a server that is down, and closes
// each. It listens once: whatever process is being started at that moment has the
// listener too, until its program runs.
func refuse(t *testing.T, addr string, n int) {
	t.Helper()
	listener, err := net.Listen("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	for range n {
		conn, err := listener.Accept()
		if err != nil {
			t.Fatal(err)
		}
		conn.Close()
	}
}

func TestCacheFlushedRedis(t *testing.T) {
	t.Parallel()
	o := startOutage(t, 1)
	eventually(t, "product 1 is a hit", func() bool { return mustRead(t, o.cache, 1).Cached })
	admin(t, o.server, "FLUSHALL")
	admin(t, o.server, "SCRIPT", "FLUSH")
	eventually(t, "its copy is gone", func() bool { return !mustRead(t, o.cache, 1).Cached })
	eventually(t, "product 1 is a hit again", func() bool { return mustRead(t, o.cache, 1).Cached })
}

func TestCacheFullRedisStillForgetsWhatIsOld(t *testing.T) {
	t.Parallel()
	o := startOutageOf(t, redisBackend, 1)
	other := startCache(t, o.db, redisBackend(t, o.server.URL, quiet))
	eventually(t, "both have product 1", func() bool {
		return mustRead(t, o.cache, 1).Cached && mustRead(t, other, 1).Cached
	})
	admin(t, o.server, "CONFIG", "SET", "maxmemory", "1")
	o.Invalidate(1, o.db.commit(1))
	eventually(t, "the other instance shows the new version", func() bool { return mustRead(t, other, 1).Version == 2 })
	if o.backend.live.Load() == nil || o.logged("cache unavailable") != 0 {
		t.Error("a Redis that refuses was taken for one that is away")
	}
	admin(t, o.server, "CONFIG", "SET", "maxmemory", "0")
	eventually(t, "the marker is sent", func() bool { return len(o.floors.waiting(maxUnsent)) == 0 })
}

func TestCacheRedisThatRefusesIsNotAway(t *testing.T) {
	t.Parallel()
	server := startRedis(t)
	backend := connected(t, hastyRedis(t, server.URL, quiet))
	admin(t, server, "CONFIG", "SET", "maxmemory", "1")
	conn := backend.live.Load()
	for begin := time.Now(); time.Since(begin) < 3*redisTimeout; {
		if backend.Put(1, 1, bodyOf(1, 1)) == nil {
			t.Fatal("put into a full Redis succeeded")
		}
	}
	if backend.live.Load() != conn {
		t.Error("the breaker opened")
	}
}

func TestCacheSendsItsLastMarkersAtTheEnd(t *testing.T) {
	t.Parallel()
	const markers = 300
	server := startRedis(t)
	reader := connected(t, redisBackend(t, server.URL, quiet))
	first := int64(1)
	eventually(t, "they are sent within flushTimeout, as far as the machine lets", func() bool {
		backend := redisBackend(t, server.URL, quiet)
		c := newCache(newShelf(), backend, cacheTTL, quiet)
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- c.Run(ctx) }()
		eventually(t, "redis answers", func() bool { return backend.Ping(t.Context()) == nil })
		for id := range int64(markers) {
			c.Invalidate(first+id, 9)
		}
		cancel()
		if err := <-done; err != nil {
			t.Fatal(err)
		}
		sent := 0
		for id := range int64(markers) {
			if version, _ := mustGet(t, reader, first+id); version == 9 {
				sent++
			}
		}
		first += markers
		return sent == markers
	})
}

func TestCacheMarkersOutliveLoads(t *testing.T) {
	t.Parallel()
	server := startRedis(t)
	backend := patientRedis(t, server.URL, 100*time.Millisecond, cacheSize, quiet)
	connected(t, backend)
	mustPut(t, backend, 1, 1, []byte("body"))
	mustPut(t, backend, 2, 1, nil)
	eventually(t, "the body expires", func() bool { version, _ := mustGet(t, backend, 1); return version == 0 })
	if version, _ := mustGet(t, backend, 2); version != 1 {
		t.Error("the marker expired with the body")
	}
}

func TestCacheForeignValuesInRedisAreNoEntries(t *testing.T) {
	t.Parallel()
	server := startRedis(t)
	backend := connected(t, redisBackend(t, server.URL, quiet))
	for i, value := range []string{"", "\n", "x\nbody", "-3\nbody", "-1\nbody", "no line feed", "99999999999999999999\nbody"} {
		id := int64(i + 1)
		admin(t, server, "SET", redisKey(id), value)
		if version, body := mustGet(t, backend, id); version != 0 || body != nil {
			t.Errorf("%q: got version %d, body %q", value, version, body)
		}
	}
}

func TestRedisURLErrorsKeepThePassword(t *testing.T) {
	t.Parallel()
	for _, bad := range []string{"redis://:hunter2@host:port", "http://:hunter2@host", "redis://:hunter2@host/x"} {
		if _, err := newRedisCache(bad, cacheTTL, cacheSize, quiet); err == nil || strings.Contains(err.Error(), "hunter2") {
			t.Errorf("%s: error is %v", bad, err)
		}
	}
}

// admin runs a command on a connection of its own.
func admin(t *testing.T, server *testServer, command ...string) {
	t.Helper()
	client, err := rueidis.NewClient(rueidis.ClientOption{InitAddress: []string{server.addr()}, ForceSingleClient: true, DisableCache: true})
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	if err := client.Do(t.Context(), client.B().Arbitrary(command...).Build()).Error(); err != nil {
		t.Fatalf("%v: %v", command, err)
	}
}

// An operator's command that is interrupted tells the caches of all that it has changed
// until it ends.
func TestInterruptedCommandTellsTheCaches(t *testing.T) {
	t.Parallel()
	url := testRedis(t)
	reader := connected(t, redisBackend(t, url, quiet))
	p := &program{config: config{RedisURL: url, CacheTTL: cacheTTL, CacheSize: cacheSize}, log: quiet}
	ctx, interrupt := context.WithCancel(t.Context())
	err := p.withInvalidation(ctx, func(invalidate func(id, version int64)) error {
		interrupt()
		for id := range int64(5) {
			invalidate(id+1, 3)
			eventually(t, "the caches are told", func() bool {
				e, err := reader.Get(id + 1)
				return err == nil && e.version == 3
			})
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
}
