package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"hash/maphash"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

const (
	// consistencyReadsVar is how many reads TestReadsAreConsistent makes at least.
	consistencyReadsVar = "CONSISTENCY_READS"
	// shortReads are enough for each kind of outage to meet a thousand reads.
	shortReads = 10_000
	// readsPerOutage is how often a long run hurts Redis.
	readsPerOutage = 20_000

	hotSlots       = 8 // products that all read and write; a deleted one is followed by a new one
	writersPerSlot = 2
	readersEach    = 3                     // of each instance
	writePause     = 50 * time.Millisecond // of a writer, on average
	outageTime     = 2 * time.Second       // a silent connection is given up within it
	// restTime is how long after the last write every cache must show what the
	// database holds. It is far below CACHE_TTL, which must not be what mends it.
	restTime = 10 * time.Second
)

// What clients of three API processes see, while they and a worker change hot
// products and Redis is killed, hung, flushed and cut off, must be consistent.
//
//	make consistency
func TestReadsAreConsistent(t *testing.T) {
	t.Parallel()
	reads := shortReads
	if text := os.Getenv(consistencyReadsVar); text != "" {
		var err error
		if reads, err = strconv.Atoi(text); err != nil {
			t.Fatalf("%s: %v", consistencyReadsVar, err)
		}
	}
	r := startConsistencyRun(t)
	stop := make(chan struct{})
	var clients sync.WaitGroup
	for slot := range r.slots {
		r.create(0, slot)
		for range writersPerSlot {
			clients.Go(func() { r.writeUntil(stop, slot) })
		}
	}
	for instance := range r.apis {
		for range readersEach {
			clients.Go(func() { r.readUntil(stop, instance) })
		}
	}
	r.hurtRedis(t, max(len(r.outages()), reads/readsPerOutage), reads)
	close(stop)
	clients.Wait()

	j := judge(r.history, r.spans)
	j.unequal = r.unequalAfterRest(t)
	t.Logf("%s%d outages of Redis; slowest read %v, and %v while Redis was hurt", j, len(r.spans), r.slowest(false), r.slowest(true))
	if j.violations() > 0 || j.reads < reads {
		t.Errorf("%d violations in %d reads", j.violations(), j.reads)
	}
	for _, failure := range r.failures {
		t.Error(failure)
	}
	r.checkLogs(t)
}

// consistencyRun is a running shop and what its clients have seen.
type consistencyRun struct {
	apis  []*instance
	truth *instance // an API without a cache
	redis *testServer
	line  *tcpProxy // between the last API and Redis
	photo string
	began time.Time
	slots []atomic.Int64 // the product that is in each
	last  atomic.Int64   // the newest product
	reads atomic.Int64

	mu       sync.Mutex
	history  []operation
	created  []int64
	deleted  []int64
	failures []string // of requests
	spans    []outageSpan
}

func startConsistencyRun(t *testing.T) *consistencyRun {
	t.Helper()
	r := &consistencyRun{redis: startRedis(t), slots: make([]atomic.Int64, hotSlots), began: time.Now()}
	env := environment(bucketEnv(testS3(t)), map[string]string{"DATABASE_URL": testDatabase(t), "AMQP_URL": testAMQP(t), "REDIS_URL": r.redis.URL, "LOG_LEVEL": "info"})
	seedUser(t, env)
	r.line = startProxy(t, r.redis.addr())
	far := environment(env, map[string]string{"REDIS_URL": "redis://" + r.line.Addr})
	r.apis = []*instance{startBinary(t, env, "api"), startBinary(t, env, "api"), startBinary(t, far, "api")}
	r.truth = startBinary(t, environment(env, map[string]string{"REDIS_URL": "off"}), "api")
	startBinary(t, env, "worker")
	r.photo = newPhotoServer(t).serve("/a", jpegPhoto(t, 32, 32))
	return r
}

// redisOutage is one way to hurt Redis, and how it ends.
type redisOutage struct {
	name       string
	begin, end func(testing.TB)
}

func (r *consistencyRun) outages() []redisOutage {
	nothing := func(testing.TB) {}
	flush := func(t testing.TB) { flushRedis(t, r.redis.URL) }
	return []redisOutage{
		{"killed", r.redis.Kill, r.redis.Start},
		{"hung", r.redis.Freeze, r.redis.Thaw},
		{"flushed", flush, nothing},
		{"out of reach for one instance", func(testing.TB) { r.line.Cut() }, r.line.Restore},
		{"silent for one instance", func(testing.TB) { r.line.Stall() }, r.line.Restore},
	}
}

// hurtRedis spreads outages over the first reads of a run.
func (r *consistencyRun) hurtRedis(t *testing.T, count, reads int) {
	t.Helper()
	outages := r.outages()
	for n := range count {
		r.awaitReads(t, int64(reads)*int64(n+1)/int64(count+1))
		o := outages[n%len(outages)]
		span := outageSpan{from: time.Since(r.began)}
		o.begin(t)
		<-time.After(outageTime)
		o.end(t)
		r.awaitReady(t)
		span.to = time.Since(r.began)
		r.spans = append(r.spans, span)
		for _, api := range r.apis {
			api.log.forget(`"msg":"request"`)
		}
	}
	r.awaitReads(t, int64(reads))
}

func (r *consistencyRun) awaitReads(t *testing.T, count int64) {
	t.Helper()
	for last := int64(-1); r.reads.Load() < count; last = r.reads.Load() {
		if !pollUntil(time.Now().Add(settleTime), func() bool { return r.reads.Load() > last }) {
			t.Fatalf("reads have stopped at %d", last)
		}
	}
}

// awaitReady waits until every API has Redis again.
func (r *consistencyRun) awaitReady(t *testing.T) {
	t.Helper()
	for _, api := range r.apis {
		eventually(t, "the API has Redis again", func() bool {
			var state struct{ Status string }
			_, err := api.send("GET", "/readyz", nil, &state)
			return err == nil && state.Status == "ready"
		})
	}
}

func (r *consistencyRun) record(ops ...operation) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.history = append(r.history, ops...)
}

func (r *consistencyRun) fail(format string, args ...any) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.failures) < maxExamples {
		r.failures = append(r.failures, fmt.Sprintf(format, args...))
	}
}

// writeUntil changes the product in a slot, now and then replaces it, through
// any instance.
func (r *consistencyRun) writeUntil(stop <-chan struct{}, slot int) {
	for {
		select {
		case <-stop:
			return
		case <-time.After(rand.N(2 * writePause)):
		}
		instance := rand.IntN(len(r.apis))
		switch id := r.slots[slot].Load(); {
		case id == 0: // another writer is replacing it
		case rand.IntN(20) > 0:
			r.change(instance, id)
		case r.slots[slot].CompareAndSwap(id, 0):
			r.remove(instance, id)
			r.create(instance, slot)
		}
	}
}

func (r *consistencyRun) create(instance, slot int) {
	body := map[string]any{"user_id": 1, "product_name": "Shoe", "product_price": 1, "product_images": []string{r.photo}}
	start := time.Since(r.began)
	answer := r.write(instance, "POST", "/products", body, http.StatusCreated)
	if answer == nil {
		return
	}
	op := answer.operation(instance, start, time.Since(r.began))
	op.write = true
	r.record(op)
	r.mu.Lock()
	r.created = append(r.created, op.key)
	r.mu.Unlock()
	r.last.Store(op.key)
	r.slots[slot].Store(op.key)
}

// change writes a new price. The product may be gone by now.
func (r *consistencyRun) change(instance int, id int64) {
	start := time.Since(r.began)
	body := map[string]any{"product_price": rand.IntN(1_000_000)}
	answer := r.write(instance, "PATCH", "/products/"+strconv.FormatInt(id, 10), body, http.StatusOK, http.StatusNotFound)
	if answer == nil || answer.status == http.StatusNotFound {
		return
	}
	op := answer.operation(instance, start, time.Since(r.began))
	op.write = true
	r.record(op)
}

func (r *consistencyRun) remove(instance int, id int64) {
	op := operation{write: true, instance: instance, key: id, version: tombstone, start: time.Since(r.began)}
	if r.write(instance, "DELETE", "/products/"+strconv.FormatInt(id, 10), nil, http.StatusNoContent) == nil {
		return
	}
	op.end = time.Since(r.began)
	r.mu.Lock()
	defer r.mu.Unlock()
	r.history = append(r.history, op)
	r.deleted = append(r.deleted, id)
}

// write sends a change over a connection of its own pool. Any other status than
// those wanted is a failure, and the answer nil.
func (r *consistencyRun) write(instance int, method, path string, body any, want ...int) *productAnswer {
	data, err := json.Marshal(body)
	if err != nil {
		r.fail("%v", err)
		return nil
	}
	request, err := http.NewRequest(method, r.apis[instance].url+path, bytes.NewReader(data))
	if err != nil {
		r.fail("%v", err)
		return nil
	}
	request.Header.Set("Content-Type", "application/json")
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		r.fail("%s %s: %v", method, path, err)
		return nil
	}
	answer, err := readAnswer(response)
	if err != nil || !slices.Contains(want, answer.status) {
		r.fail("%s %s on instance %d: status %d, %v", method, path, instance, response.StatusCode, err)
		return nil
	}
	return answer
}

// readUntil reads products over one connection to an instance: mostly those in
// the slots, some that were deleted, and some that may be made next.
func (r *consistencyRun) readUntil(stop <-chan struct{}, instance int) {
	conn, err := net.Dial("tcp", strings.TrimPrefix(r.apis[instance].url, "http://"))
	if err != nil {
		r.fail("%v", err)
		return
	}
	defer conn.Close()
	in := bufio.NewReader(conn)
	var seen []operation
	defer func() { r.record(seen...) }()
	for {
		select {
		case <-stop:
			return
		default:
		}
		id := r.pick()
		start := time.Since(r.began)
		answer, err := ask(conn, in, id)
		end := time.Since(r.began)
		if err != nil || answer.status != http.StatusOK && answer.status != http.StatusNotFound {
			r.fail("GET product %d from instance %d at %v: %+v, %v", id, instance, start, answer, err)
			return
		}
		op := answer.operation(instance, start, end)
		op.misfit = op.misfit || answer.status == http.StatusOK && op.key != id
		op.key = id
		seen = append(seen, op)
		r.reads.Add(1)
	}
}

// pick chooses what to read.
func (r *consistencyRun) pick() int64 {
	switch rand.IntN(20) {
	case 0:
		return r.last.Load() + 1 + rand.Int64N(2)
	case 1:
		r.mu.Lock()
		defer r.mu.Unlock()
		if n := len(r.deleted); n > 0 {
			return r.deleted[n-1-rand.IntN(min(n, hotSlots))]
		}
	}
	if id := r.slots[rand.IntN(hotSlots)].Load(); id != 0 {
		return id
	}
	return r.last.Load()
}

// ask sends one request for a product and reads its answer.
func ask(conn net.Conn, in *bufio.Reader, id int64) (*productAnswer, error) {
	if err := conn.SetDeadline(time.Now().Add(settleTime)); err != nil {
		return nil, err
	}
	if _, err := fmt.Fprintf(conn, "GET /products/%d HTTP/1.1\r\nHost: pms\r\n\r\n", id); err != nil {
		return nil, err
	}
	response, err := http.ReadResponse(in, nil)
	if err != nil {
		return nil, err
	}
	return readAnswer(response)
}

// productAnswer is an answer with a product, or without one.
type productAnswer struct {
	status int
	etag   string
	body   []byte
}

func readAnswer(response *http.Response) (*productAnswer, error) {
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	return &productAnswer{response.StatusCode, response.Header.Get("Etag"), body}, err
}

// hashSeed makes hashes of bodies comparable within this process.
var hashSeed = maphash.MakeSeed()

// operation is what an answer shows, as a read. The body must be that of the
// version in the ETag.
func (a *productAnswer) operation(instance int, start, end time.Duration) operation {
	op := operation{instance: instance, start: start, end: end}
	if a.status >= 300 {
		return op
	}
	op.body = maphash.Bytes(hashSeed, a.body)
	var p struct{ ID, Version int64 }
	err := json.Unmarshal(a.body, &p)
	op.key, op.version = p.ID, p.Version
	op.misfit = err != nil || a.etag != etag(p.Version)
	return op
}

// unequalAfterRest waits until nothing changes any more and counts the answers
// of all instances that then differ from the database, of all products that
// ever were.
func (r *consistencyRun) unequalAfterRest(t *testing.T) (count int) {
	t.Helper()
	for _, id := range r.created {
		eventually(t, "no image is pending", func() bool {
			answer, err := askOnce(r.truth, id)
			return err == nil && !bytes.Contains(answer.body, []byte(`"pending"`))
		})
	}
	deadline := time.Now().Add(restTime)
	for _, id := range r.created {
		want, err := askOnce(r.truth, id)
		if err != nil {
			t.Fatal(err)
		}
		for n, api := range r.apis {
			var got *productAnswer
			same := func() bool {
				got, err = askOnce(api, id)
				return err == nil && got.status == want.status && (got.status >= 300 || bytes.Equal(got.body, want.body))
			}
			if !pollUntil(deadline, same) {
				count++
				t.Logf("product %d on instance %d after rest: %v %s, %v, in the database %s", id, n, got.status, got.body, err, want.body)
			}
		}
	}
	return count
}

func askOnce(api *instance, id int64) (*productAnswer, error) {
	response, err := http.Get(api.url + "/products/" + strconv.FormatInt(id, 10))
	if err != nil {
		return nil, err
	}
	return readAnswer(response)
}

// slowest is the longest that a read took, in outages or out of them.
func (r *consistencyRun) slowest(hurt bool) (longest time.Duration) {
	for _, op := range r.history {
		in := slices.ContainsFunc(r.spans, func(o outageSpan) bool { return o.from <= op.end && op.start <= o.to })
		if !op.write && in == hurt {
			longest = max(longest, op.end-op.start)
		}
	}
	return longest
}

// checkLogs wants one line when Redis goes away and one when it is back. On a busy
// machine a slow answer may look like an outage too. But each takes redisPause at
// the least, while a line for each request that fails would be thousands.
func (r *consistencyRun) checkLogs(t *testing.T) {
	t.Helper()
	most := int(time.Since(r.began)/redisPause) + 1
	for n, api := range r.apis {
		log := api.log.tail(1 << 30)
		away, back := strings.Count(log, `"msg":"cache unavailable"`), strings.Count(log, `"msg":"cache back"`)
		if away-back < 0 || away-back > 1 || away > most {
			t.Errorf("instance %d logged %d times that Redis was away and %d times that it was back, in %d outages", n, away, back, len(r.spans))
		}
	}
}
