package main

import (
	"context"
	"errors"
	"log/slog"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
)

// queueUnderTest is what the pipeline, the dispatcher and main use of a queue.
type queueUnderTest interface {
	jobSink
	Run(ctx context.Context) error
	Consume(ctx context.Context, prefetch int, out chan<- Delivery) error
}

type refillFunc = func(context.Context) (int64, error)

func noRefill(context.Context) (int64, error) { return 0, nil }

func testLog(t testing.TB) *slog.Logger {
	return slog.New(slog.NewTextHandler(t.Output(), nil)).With("test", t.Name())
}

// TestQueueContract is what both queues promise alike.
func TestQueueContract(t *testing.T) {
	t.Parallel()
	queues := map[string]func(t *testing.T, refill refillFunc) queueUnderTest{
		"embedded": func(t *testing.T, refill refillFunc) queueUnderTest { return newEmbeddedQueue(refill, testLog(t)) },
		"rabbitmq": func(t *testing.T, refill refillFunc) queueUnderTest {
			return newRabbitQueue(testAMQP(t), refill, testLog(t))
		},
	}
	promises := map[string]func(t *testing.T, open func(refillFunc) queueUnderTest){
		"a job arrives as it was published and is gone once acked": promiseDelivery,
		"a released job is delivered again":                        promiseRelease,
		"no more than prefetch jobs are in hand":                   promisePrefetch,
		"what is in hand can be acked after fetching stopped":      promiseStop,
		"two consumers share the jobs":                             promiseShare,
		"a delivery settles once":                                  promiseSettleOnce,
		"no job is taken before the queue is filled":               promiseRefillFirst,
		"thousands of jobs pass":                                   promiseMany,
	}
	for kind, make := range queues {
		for promise, check := range promises {
			t.Run(kind+"/"+promise, func(t *testing.T) {
				t.Parallel()
				check(t, func(refill refillFunc) queueUnderTest { return make(t, refill) })
			})
		}
	}
}

func promiseDelivery(t *testing.T, open func(refillFunc) queueUnderTest) {
	q := runQueue(t, open(noRefill))
	want := Job{ID: 7, ProductID: 3, origin: origin{"r-1", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}}
	publishAll(t, q, want)
	in := consume(t, q, 1)
	d := receive(t, in.out)
	if d.Job != want {
		t.Errorf("got %+v, want %+v", d.Job, want)
	}
	settled(t, d.Ack())
	in.stop(t)
	again := consume(t, q, 1)
	publishAll(t, q, Job{ID: 8, ProductID: 3})
	if d := receive(t, again.out); d.Job.ID != 8 {
		t.Errorf("job %d came back after its ack", d.Job.ID)
	} else {
		settled(t, d.Ack())
	}
}

func promiseRelease(t *testing.T, open func(refillFunc) queueUnderTest) {
	q := runQueue(t, open(noRefill))
	publishAll(t, q, Job{ID: 1, ProductID: 1})
	in := consume(t, q, 1)
	settled(t, receive(t, in.out).Release())
	d := receive(t, in.out)
	if d.Job.ID != 1 {
		t.Errorf("got job %d, want 1", d.Job.ID)
	}
	settled(t, d.Ack())
}

func promisePrefetch(t *testing.T, open func(refillFunc) queueUnderTest) {
	q := runQueue(t, open(noRefill))
	publishAll(t, q, jobs(5)...)
	in := consume(t, q, 2)
	first, second := receive(t, in.out), receive(t, in.out)
	eventually(t, "three jobs wait", func() bool { n, err := q.Waiting(t.Context()); return err == nil && n == 3 })
	select {
	case d := <-in.out:
		t.Fatalf("job %d is the third in hand of two", d.Job.ID)
	case <-time.After(100 * time.Millisecond):
	}
	settled(t, first.Ack())
	third := receive(t, in.out)
	settled(t, second.Ack())
	settled(t, third.Ack())
	for range 2 {
		settled(t, receive(t, in.out).Ack())
	}
}

func promiseStop(t *testing.T, open func(refillFunc) queueUnderTest) {
	q := runQueue(t, open(noRefill))
	publishAll(t, q, jobs(4)...)
	in := consume(t, q, 2)
	acked, released := receive(t, in.out), receive(t, in.out)
	in.cancel()
	eventually(t, "two jobs wait", func() bool { n, err := q.Waiting(t.Context()); return err == nil && n == 2 })
	settled(t, acked.Ack())
	select {
	case err := <-in.ended:
		t.Fatalf("Consume returned %v with a delivery in hand", err)
	case <-time.After(50 * time.Millisecond):
	}
	settled(t, released.Release())
	in.stop(t)
	eventually(t, "three jobs wait", func() bool { n, err := q.Waiting(t.Context()); return err == nil && n == 3 })
	rest := consume(t, q, 3)
	for range 3 {
		d := receive(t, rest.out)
		if d.Job.ID == acked.Job.ID {
			t.Errorf("job %d came back after its ack", d.Job.ID)
		}
		settled(t, d.Ack())
	}
}

func promiseShare(t *testing.T, open func(refillFunc) queueUnderTest) {
	q := runQueue(t, open(noRefill))
	one, other := consume(t, q, 1), consume(t, q, 1)
	publishAll(t, q, jobs(2)...)
	d, e := receive(t, one.out), receive(t, other.out)
	if d.Job.ID == e.Job.ID {
		t.Errorf("both got job %d", d.Job.ID)
	}
	settled(t, d.Ack())
	settled(t, e.Ack())
}

func promiseSettleOnce(t *testing.T, open func(refillFunc) queueUnderTest) {
	q := runQueue(t, open(noRefill))
	publishAll(t, q, jobs(2)...)
	in := consume(t, q, 1)
	d := receive(t, in.out)
	settled(t, d.Ack())
	for verb, err := range map[string]error{"Ack": d.Ack(), "Reject": d.Reject(), "Release": d.Release()} {
		if !errors.Is(err, errSettled) {
			t.Errorf("%s after Ack: %v", verb, err)
		}
	}
	settled(t, receive(t, in.out).Ack()) // the subscription still lives
}

func promiseRefillFirst(t *testing.T, open func(refillFunc) queueUnderTest) {
	var allowed atomic.Bool
	asked := make(chan struct{}, 100)
	q := open(func(context.Context) (int64, error) {
		asked <- struct{}{}
		if !allowed.Load() {
			return 0, errUnavailable
		}
		return 2, nil
	})
	if refused, err := q.Publish(t.Context(), jobs(2)); err == nil || len(refused) != 2 {
		t.Errorf("before Run: refused %v, error %v", refused, err)
	}
	runUntilEnd(t, q.Run)
	receive(t, asked)
	receive(t, asked)
	if refused, err := q.Publish(t.Context(), jobs(2)); err == nil || len(refused) != 2 {
		t.Errorf("before the refill: refused %v, error %v", refused, err)
	}
	if q.Ping(t.Context()) == nil {
		t.Error("ready before the refill")
	}
	allowed.Store(true)
	eventually(t, "the queue is ready", func() bool { return q.Ping(t.Context()) == nil })
	publishAll(t, q, jobs(2)...)
}

func promiseMany(t *testing.T, open func(refillFunc) queueUnderTest) {
	const many = 3*confirmWindow - 1
	q := runQueue(t, open(noRefill))
	publishAll(t, q, jobs(many)...)
	in := consume(t, q, 50)
	seen := make(map[int64]bool)
	for range many {
		d := receive(t, in.out)
		seen[d.Job.ID] = true
		settled(t, d.Ack())
	}
	if len(seen) != many {
		t.Errorf("%d of %d jobs arrived", len(seen), many)
	}
}

func TestQueueRejectsToDeadQueue(t *testing.T) {
	t.Parallel()
	url := testAMQP(t)
	q := runQueue(t, newRabbitQueue(url, noRefill, testLog(t)))
	ch := openChannel(t, url)
	publishRaw(t, ch, workQueueName, "no job at all")
	publishRaw(t, ch, workQueueName, `{"job":0,"product":9}`)
	publishRaw(t, ch, workQueueName, `{"job":5,"product":9,"of_a_newer_version":true}`)
	in := consume(t, q, 1)
	d := receive(t, in.out)
	if d.Job != (Job{ID: 5, ProductID: 9}) {
		t.Errorf("got %+v", d.Job)
	}
	settled(t, d.Reject())
	got := make(map[string]any)
	for range 3 {
		m := getRaw(t, ch, deadQueueName)
		got[string(m.Body)] = m.Headers["x-first-death-reason"]
	}
	for body, reason := range got {
		if reason != "rejected" {
			t.Errorf("%s died of %v", body, reason)
		}
	}
	if len(got) != 3 {
		t.Errorf("dead queue holds %v", got)
	}
}

func TestQueueMessageOnTheWire(t *testing.T) {
	t.Parallel()
	url := testAMQP(t)
	q := runQueue(t, newRabbitQueue(url, noRefill, testLog(t)))
	publishAll(t, q, Job{ID: 12, ProductID: 4, origin: origin{"req", "trace"}})
	m := getRaw(t, openChannel(t, url), workQueueName)
	if m.DeliveryMode != amqp.Persistent || m.MessageId != "12" || m.AppId != "pms" || m.ContentType != "application/json" {
		t.Errorf("properties: %+v", m)
	}
	if m.Headers["x-request-id"] != "req" || m.Headers["traceparent"] != "trace" || time.Since(m.Timestamp) > time.Minute {
		t.Errorf("headers %v, timestamp %v", m.Headers, m.Timestamp)
	}
	if want := `{"job":12,"product":4,"request_id":"req","traceparent":"trace"}`; string(m.Body) != want {
		t.Errorf("body %s, want %s", m.Body, want)
	}
}

func TestQueueDeletedIsRefilled(t *testing.T) {
	t.Parallel()
	url := testAMQP(t)
	refills := make(chan struct{}, 10)
	q := runQueue(t, newRabbitQueue(url, func(context.Context) (int64, error) { refills <- struct{}{}; return 0, nil }, testLog(t)))
	receive(t, refills)
	ch := openChannel(t, url)
	in := consume(t, q, 1)
	publishAll(t, q, jobs(1)...)
	settled(t, receive(t, in.out).Ack())

	t.Log("deleted below a consumer")
	if _, err := ch.QueueDelete(workQueueName, false, false, false); err != nil {
		t.Fatal(err)
	}
	receive(t, refills)
	eventually(t, "the queue takes jobs", func() bool { refused, err := q.Publish(t.Context(), jobs(1)); return err == nil && refused == nil })
	settled(t, receive(t, in.out).Ack())
	in.stop(t)

	t.Log("deleted below a publisher: not routed, though confirmed")
	if _, err := ch.QueueDelete(workQueueName, false, false, false); err != nil {
		t.Fatal(err)
	}
	refused, err := q.Publish(t.Context(), jobs(3))
	if err != nil || len(refused) != 3 {
		t.Errorf("without a queue: refused %v, error %v", refused, err)
	}
	receive(t, refills)
	eventually(t, "the queue takes jobs", func() bool { refused, err := q.Publish(t.Context(), jobs(1)); return err == nil && refused == nil })
}

// A consumer that RabbitMQ sends nothing, though messages wait, gives its
// subscription up; one that has a message in hand, or nothing to wait for, keeps it.
func TestQueueConsumerThatIsForgotten(t *testing.T) {
	t.Parallel()
	url := testAMQP(t)
	q := runQueue(t, newRabbitQueue(url, noRefill, testLog(t)))
	link, err := dialAMQP(t.Context(), url, "test", testPatience)
	if err != nil {
		t.Fatal(err)
	}
	defer link.close()
	c, err := newAMQPConsumer(t.Context(), link, 1)
	if err != nil {
		t.Fatal(err)
	}
	look := func(what string, wants ...error) {
		t.Helper()
		for n, want := range wants {
			if err := c.look(); !errors.Is(err, want) {
				t.Errorf("%s, look %d: %v, want %v", what, n+1, err, want)
			}
		}
	}
	look("nothing waits", nil, nil)
	publishAll(t, q, jobs(2)...) // one comes, the other cannot: that is all a test can do
	eventually(t, "one waits", func() bool { n, err := q.Waiting(t.Context()); return err == nil && n == 1 })
	settled(t, c.hand.Acquire(t.Context(), 1))
	look("one is in hand", nil, nil)
	c.hand.Release(1)
	look("one waits", nil, errPassedOver)
	deleteQueues(t, url)
	look("there is no queue", errNoQueue)
}

func TestQueueWithOtherArguments(t *testing.T) {
	t.Parallel()
	url := testAMQP(t)
	ch := openChannel(t, url)
	if _, err := ch.QueueDeclare(workQueueName, true, false, false, false, nil); err != nil {
		t.Fatal(err)
	}
	q := newRabbitQueue(url, noRefill, testLog(t))
	runUntilEnd(t, q.Run)
	eventually(t, "the fault is told", func() bool {
		err := q.Ping(t.Context())
		return err != nil && strings.Contains(err.Error(), "PRECONDITION_FAILED")
	})
	if _, err := ch.QueueDelete(workQueueName, false, false, false); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the queue is ready", func() bool { return q.Ping(t.Context()) == nil })
}

// runQueue runs q until the test ends and waits until it takes jobs.
func runQueue[Q queueUnderTest](t *testing.T, q Q) Q {
	t.Helper()
	runUntilEnd(t, q.Run)
	eventually(t, "the queue is ready", func() bool { return q.Ping(t.Context()) == nil })
	return q
}

type consuming struct {
	out    chan Delivery
	ended  chan error
	cancel context.CancelFunc
}

// consume starts a consumer that stops at the latest when the test ends.
func consume(t *testing.T, q queueUnderTest, prefetch int) *consuming {
	ctx, cancel := context.WithCancel(context.Background())
	in := &consuming{out: make(chan Delivery), ended: make(chan error, 1), cancel: cancel}
	go func() { in.ended <- q.Consume(ctx, prefetch, in.out); close(in.ended) }()
	t.Cleanup(func() { in.stop(t) })
	return in
}

// stop may be called more than once.
func (in *consuming) stop(t *testing.T) {
	t.Helper()
	in.cancel()
	select {
	case err := <-in.ended:
		if err != nil {
			t.Errorf("Consume: %v", err)
		}
	case <-time.After(testPatience):
		t.Error("Consume does not return")
	}
}

// testPatience is far above what anything takes here, a broker's start included.
const testPatience = settleTime

func receive[T any](t *testing.T, c <-chan T) T {
	t.Helper()
	select {
	case v := <-c:
		return v
	case <-time.After(testPatience):
		t.Fatal("nothing arrives")
		panic("unreachable")
	}
}

func jobs(n int) []Job {
	list := make([]Job, n)
	for i := range list {
		list[i] = Job{ID: int64(i + 1), ProductID: 1}
	}
	return list
}

func publishAll(t *testing.T, q queueUnderTest, jobs ...Job) {
	t.Helper()
	refused, err := q.Publish(t.Context(), jobs)
	if err != nil || len(refused) > 0 {
		t.Fatalf("publish %d jobs: refused %d, error %v", len(jobs), len(refused), err)
	}
}

func settled(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Errorf("settle: %v", err)
	}
}

func publishRaw(t *testing.T, ch *amqp.Channel, queue, body string) {
	t.Helper()
	err := ch.PublishWithContext(t.Context(), "", queue, true, false, amqp.Publishing{Body: []byte(body)})
	if err != nil {
		t.Fatal(err)
	}
}

// getRaw takes the next message of a queue, and waits for one.
func getRaw(t *testing.T, ch *amqp.Channel, queue string) amqp.Delivery {
	t.Helper()
	var message amqp.Delivery
	eventually(t, queue+" has a message", func() bool {
		m, ok, err := ch.Get(queue, true)
		if err != nil {
			t.Fatal(err)
		}
		message = m
		return ok
	})
	return message
}

func awaitReady(t *testing.T, ch *amqp.Channel, queue string, want int) {
	t.Helper()
	got := -1
	eventually(t, queue+" holds what it should", func() bool {
		q, err := ch.QueueDeclarePassive(queue, true, false, false, false, nil)
		if err != nil {
			t.Fatal(err)
		}
		got = q.Messages
		return got == want
	})
}
