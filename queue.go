package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/VictoriaMetrics/metrics"
	amqp "github.com/rabbitmq/amqp091-go"
	"golang.org/x/sync/semaphore"
)

// The names are part of the contract with operators.
const (
	workQueueName = "image_processing_queue"
	deadQueueName = "image_processing_queue.dead"
)

const (
	// deliveryLimit is how often a message may come back before the broker gives
	// it up. Each prefetched message of a killed worker counts one, so it must be
	// well above a handful; poison.go says what becomes of those that reach it.
	deliveryLimit = 20
	// noDeliveryLimit keeps the dead queue's messages however often they are
	// looked at; RabbitMQ 4 would drop them after 20 times by default.
	noDeliveryLimit = 1<<31 - 1
	// confirmWindow is how many messages may be unconfirmed at once. One at a
	// time gives hundreds of messages a second, hundreds at a time thousands.
	confirmWindow = 500
	// brokerTimeout bounds every wait for the broker's answer, a whole window
	// of confirms included. A healthy broker needs a tenth of a second.
	brokerTimeout = 10 * time.Second
	// topologyInterval is how soon a deleted queue is noticed when nothing is
	// published and nothing consumed.
	topologyInterval = 5 * time.Second

	reconnectLeast = 200 * time.Millisecond
	reconnectMost  = 15 * time.Second
)

var (
	errNoBroker      = errors.New("not connected to the broker")
	errBrokerBlocked = errors.New("the broker has blocked publishing (a memory or disk alarm)")
	errAlarmOver     = errors.New("the alarm of the broker is over, connecting anew")
	errNoQueue       = errors.New("queue " + workQueueName + " does not exist")
	errSettled       = errors.New("delivery is already settled")
	errBrokerFrozen  = errors.New("the broker does not answer")
	errQueueRefused  = errors.New("the queue refused jobs")
)

// verdict is what becomes of a delivery.
type verdict int

const (
	verdictDone     verdict = iota // finished, or not to be done any more
	verdictRejected                // to the dead-letter queue
	verdictReleased                // back to the queue
)

// Delivery is one received job. Exactly one of Ack, Reject and Release is
// called, once; Consume waits for it before it returns. An error of them means
// that the queue will deliver the job again, which is harmless since the row is
// the truth.
type Delivery struct {
	Job         Job
	Redelivered bool // a worker has had it before
	Counted     bool // its start is counted in its row until it has an outcome: see poison.go
	settle      func(verdict) error
}

// Ack removes the job from the queue.
func (d Delivery) Ack() error { return d.settle(verdictDone) }

// Reject moves the job to the dead-letter queue. Its row must say so already.
func (d Delivery) Reject() error { return d.settle(verdictRejected) }

// Release gives the job back for any worker to take: at shutdown, or when a
// part of ours is away. It counts towards the delivery limit.
func (d Delivery) Release() error { return d.settle(verdictReleased) }

// newDelivery returns a delivery that settles once and then gives its places in
// hand back.
func newDelivery(job Job, hand *semaphore.Weighted, places int64, settle func(verdict) error) Delivery {
	var settled atomic.Bool
	return Delivery{Job: job, settle: func(v verdict) error {
		if !settled.CompareAndSwap(false, true) {
			return errSettled
		}
		defer hand.Release(places)
		return settle(v)
	}}
}

// rabbitQueue is the queue in RabbitMQ. It keeps one connection for publishing
// and one for each Consume, since an alarm of the broker stops everything on a
// connection that publishes.
type rabbitQueue struct {
	url     string
	refill  func(context.Context) (int64, error)
	log     *slog.Logger
	timeout time.Duration // of every wait for the broker
	pace    retryPace     // of connecting, copied by each who does

	foreign atomic.Int64 // messages in the dead queue that are no job, as of the last sweep

	publishing sync.Mutex    // held for one Publish
	suspect    chan struct{} // a token: the topology is to be looked at now

	mu        sync.Mutex
	publisher *amqpPublisher // nil while there is none
	fault     error          // why there is none
	changed   chan struct{}  // closed and replaced when publisher changes

	published, refused *metrics.Counter
	connected          *metrics.Gauge
}

// newRabbitQueue returns the queue at an AMQP URL. When the work queue does not
// exist (first start, deleted, broker wiped), refill makes every published and
// unfinished job due again and says how many. It runs before the queue is
// declared, so a crash between the two is repaired by whoever comes next; while
// it fails there is no queue. Nothing works until Run runs.
func newRabbitQueue(url string, refill func(context.Context) (int64, error), log *slog.Logger) *rabbitQueue {
	return &rabbitQueue{
		url:       url,
		refill:    refill,
		log:       log,
		timeout:   brokerTimeout,
		pace:      retryPace{least: reconnectLeast, most: reconnectMost},
		suspect:   make(chan struct{}, 1),
		fault:     errNoBroker,
		changed:   make(chan struct{}),
		published: metrics.GetOrCreateCounter("pms_queue_published_total"),
		refused:   metrics.GetOrCreateCounter("pms_queue_refused_total"),
		connected: metrics.GetOrCreateGauge("pms_queue_connected", nil),
	}
}

// Run keeps the topology and the publishing connection, whatever happens to the
// broker, until ctx ends. It waits for a Publish that is under way.
func (q *rabbitQueue) Run(ctx context.Context) error {
	pace := q.pace
	health := healthLog{log: q.log.With("stage", "publish")}
	for {
		err := q.keepPublisher(ctx, &pace, &health)
		if ctx.Err() != nil {
			return nil
		}
		q.setPublisher(nil, err)
		if errors.Is(err, errAlarmOver) {
			continue
		}
		health.fault(faultKind(err), "queue is away, retrying", err)
		pace.wait(ctx)
	}
}

// keepPublisher connects and serves until the connection is of no more use. The
// connection is replaced as well when an alarm ends, so that no late confirm or
// return of a batch given up meanwhile can be taken for one of a later batch.
func (q *rabbitQueue) keepPublisher(ctx context.Context, pace *retryPace, health *healthLog) error {
	link, err := dialAMQP(ctx, q.url, "publish", q.timeout)
	if err != nil {
		return err
	}
	defer link.close()
	if err := q.ensureTopology(ctx, link); err != nil {
		return err
	}
	p, err := newAMQPPublisher(ctx, link, workQueueName)
	if err != nil {
		return err
	}
	q.setPublisher(p, nil)
	pace.reset()
	health.mended("queue is connected")
	err = q.watchPublisher(ctx, p, health)
	if ctx.Err() != nil {
		q.publishing.Lock() // a batch under way is finished
		defer q.publishing.Unlock()
	}
	q.setPublisher(nil, err)
	return err
}

// watchPublisher returns when p is of no more use.
func (q *rabbitQueue) watchPublisher(ctx context.Context, p *amqpPublisher, health *healthLog) error {
	tick := time.NewTicker(topologyInterval)
	defer tick.Stop()
	blocked := p.link.blocked
	for {
		select {
		case <-ctx.Done():
			return nil
		case err := <-p.closed:
			return fmt.Errorf("publishing channel closed: %w", orClosed(err))
		case <-p.link.alive.Done():
			return context.Cause(p.link.alive)
		case <-p.link.unblocked:
			return errAlarmOver
		case <-blocked:
			blocked = nil // said once
			health.fault("blocked", "queue takes no messages", errBrokerBlocked)
			continue
		case <-tick.C:
		case <-q.suspect:
		}
		// A blocked connection gets no answers.
		if isClosed(p.link.blocked) {
			continue
		}
		if err := q.lookAtTopology(ctx, p.link); err != nil {
			return err
		}
	}
}

// lookAtTopology mends what is missing. It declares nothing that is there: a work
// queue that is deleted between the look and the declaration would be made anew and
// not be filled.
func (q *rabbitQueue) lookAtTopology(ctx context.Context, link *amqpLink) error {
	for _, name := range []string{workQueueName, deadQueueName} {
		_, exists, err := link.inspect(ctx, name)
		if err != nil {
			return fmt.Errorf("look for queue %s: %w", name, err)
		}
		if !exists {
			return q.ensureTopology(ctx, link)
		}
	}
	return nil
}

// ensureTopology makes the queues what they should be. A queue that exists with
// other arguments is an error (406 PRECONDITION_FAILED) that an operator must
// mend: only they can know what to do with the messages in it.
func (q *rabbitQueue) ensureTopology(ctx context.Context, link *amqpLink) error {
	_, exists, err := link.inspect(ctx, workQueueName)
	if err != nil {
		return fmt.Errorf("look for queue %s: %w", workQueueName, err)
	}
	if !exists {
		n, err := q.refill(ctx)
		if err != nil {
			return fmt.Errorf("make published jobs due again: %w", err)
		}
		point("queue refilled")
		q.log.Info("work queue is missing, creating it", "queue", workQueueName, "republish", n)
	}
	if err := link.declare(ctx, deadQueueName, deadQueueArgs()); err != nil {
		return err
	}
	point("dead queue declared")
	if err := link.declare(ctx, workQueueName, workQueueArgs()); err != nil {
		return err
	}
	point("work queue declared")
	return nil
}

// workQueueArgs asks for dead-lettering that survives a crash of the broker,
// which needs all of quorum, at-least-once and reject-publish.
func workQueueArgs() amqp.Table {
	return amqp.Table{
		amqp.QueueTypeArg:           amqp.QueueTypeQuorum,
		"x-dead-letter-exchange":    "",
		"x-dead-letter-routing-key": deadQueueName,
		"x-dead-letter-strategy":    "at-least-once",
		amqp.QueueOverflowArg:       amqp.QueueOverflowRejectPublish,
		"x-delivery-limit":          int32(deliveryLimit),
	}
}

func deadQueueArgs() amqp.Table {
	return amqp.Table{
		amqp.QueueTypeArg:  amqp.QueueTypeQuorum,
		"x-delivery-limit": int32(noDeliveryLimit),
	}
}

// setPublisher tells everybody who waits or asks that the publisher changed.
func (q *rabbitQueue) setPublisher(p *amqpPublisher, fault error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if fault == nil {
		fault = errNoBroker
	}
	q.publisher, q.fault = p, fault
	close(q.changed)
	q.changed = make(chan struct{})
	if p != nil {
		q.connected.Set(1)
	} else {
		q.connected.Set(0)
	}
}

// current returns the publisher, or why there is none that takes messages.
func (q *rabbitQueue) current() (*amqpPublisher, error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.publisher == nil {
		return nil, q.fault
	}
	if isClosed(q.publisher.link.blocked) {
		return nil, errBrokerBlocked
	}
	return q.publisher, nil
}

// awaitTopology waits until Run has found or made the queues as they should be.
func (q *rabbitQueue) awaitTopology(ctx context.Context) error {
	for {
		q.mu.Lock()
		ready, changed := q.publisher != nil, q.changed
		q.mu.Unlock()
		if ready {
			return nil
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-changed:
		}
	}
}

// recheck has the topology looked at now, since something was seen that a
// missing queue would explain.
func (q *rabbitQueue) recheck() { poke(q.suspect) }

// Ping says whether jobs can be published now. It never waits.
func (q *rabbitQueue) Ping(context.Context) error {
	_, err := q.current()
	return err
}

// Waiting returns how many jobs are in the queue that no worker has taken. When
// ctx ends before the answer, the publishing connection is given up.
func (q *rabbitQueue) Waiting(ctx context.Context) (int, error) {
	p, err := q.current()
	if err != nil {
		return 0, err
	}
	n, err := p.link.waiting(ctx)
	if errors.Is(err, errNoQueue) {
		q.recheck()
	}
	return n, err
}

// Publish returns when the queue holds the jobs: confirmed and not returned.
// All that are not known to be in the queue are refused; they may be in it all
// the same. With an error the broker is away or hung, and the rest of a batch
// was not tried. It takes at most brokerTimeout for each window, whatever the
// broker does; when ctx ends first, the connection is given up with the batch.
func (q *rabbitQueue) Publish(ctx context.Context, jobs []Job) (refused []Job, err error) {
	q.publishing.Lock()
	defer q.publishing.Unlock()
	p, err := q.current()
	if err != nil {
		return jobs, err
	}
	for window := range slices.Chunk(jobs, confirmWindow) {
		if err != nil {
			refused = append(refused, window...)
			continue
		}
		var bad []Job
		bad, err = p.publish(ctx, window)
		refused = append(refused, bad...)
	}
	if len(refused) > 0 {
		q.recheck()
	}
	q.published.Add(len(jobs) - len(refused))
	q.refused.Add(len(refused))
	return refused, err
}

// amqpPublisher is a confirming channel. It is good for one unfinished batch: after
// that it is closed, since confirms and returns could arrive late.
type amqpPublisher struct {
	link    *amqpLink
	queue   string // to publish to
	ch      *amqp.Channel
	returns <-chan amqp.Return
	closed  <-chan *amqp.Error
}

func newAMQPPublisher(ctx context.Context, link *amqpLink, queue string) (*amqpPublisher, error) {
	p := &amqpPublisher{link: link, queue: queue}
	err := link.onChannel(ctx, func(ch *amqp.Channel) error {
		p.ch = ch
		p.closed = p.ch.NotifyClose(make(chan *amqp.Error, 1))
		p.returns = p.ch.NotifyReturn(make(chan amqp.Return, confirmWindow))
		return p.ch.Confirm(false)
	})
	if err != nil {
		return nil, fmt.Errorf("open publishing channel: %w", err)
	}
	return p, nil
}

// publish sends up to confirmWindow jobs and waits until each is settled.
// The broker sends the return of a message before its confirm, the client
// library hands both on in one goroutine, and returns has room for a window, so
// a message whose confirm is here has its return here too, if there is one.
func (p *amqpPublisher) publish(ctx context.Context, jobs []Job) (refused []Job, err error) {
	if leftOut("confirms") {
		_, err := p.send(jobs)
		return nil, err
	}
	var confirms []*amqp.DeferredConfirmation
	err = p.link.call(ctx, func() (err error) {
		if confirms, err = p.send(jobs); err != nil {
			return err
		}
		point("published")
		return p.await(confirms)
	})
	point("confirmed")
	returned := p.drainReturns()
	for i, job := range jobs {
		if i >= len(confirms) || !confirms[i].Acked() || returned[messageID(job)] {
			refused = append(refused, job)
		}
	}
	if err != nil {
		if !errors.Is(err, errBrokerBlocked) { // which is watched until its end
			p.link.kill(err)
		}
		return refused, fmt.Errorf("publish %d jobs: %w", len(jobs), err)
	}
	return refused, nil
}

func (p *amqpPublisher) send(jobs []Job) ([]*amqp.DeferredConfirmation, error) {
	confirms := make([]*amqp.DeferredConfirmation, 0, len(jobs))
	for _, job := range jobs {
		confirm, err := p.ch.PublishWithDeferredConfirm("", p.queue, true, false, encodeJob(job, time.Now()))
		if err != nil {
			return confirms, fmt.Errorf("send job %d: %w", job.ID, err)
		}
		confirms = append(confirms, confirm)
	}
	return confirms, nil
}

// await waits for every confirm, and no longer than the connection lives and
// is not blocked.
func (p *amqpPublisher) await(confirms []*amqp.DeferredConfirmation) error {
	for _, confirm := range confirms {
		select {
		case <-confirm.Done():
		case <-p.link.blocked:
			return errBrokerBlocked
		case <-p.link.alive.Done():
			return context.Cause(p.link.alive)
		}
	}
	if p.ch.IsClosed() {
		return errNoBroker // a closing channel settles its confirms as not acked
	}
	return nil
}

// drainReturns takes the returns that are here and tells whose they are.
func (p *amqpPublisher) drainReturns() map[string]bool {
	returned := make(map[string]bool)
	for {
		select {
		case r, ok := <-p.returns:
			if !ok {
				return returned
			}
			returned[r.MessageId] = true
		default:
			return returned
		}
	}
}

func messageID(job Job) string { return strconv.FormatInt(job.ID, 10) }

// encodeJob makes the message of a job: persistent, and with what ties it to a
// request in headers too, where an operator's tools can show it.
func encodeJob(job Job, now time.Time) amqp.Publishing {
	body, _ := json.Marshal(job) // never fails
	headers := amqp.Table{}
	if job.RequestID != "" {
		headers["x-request-id"] = job.RequestID
	}
	if job.Traceparent != "" {
		headers["traceparent"] = job.Traceparent
	}
	return amqp.Publishing{
		Headers:      headers,
		ContentType:  "application/json",
		DeliveryMode: amqp.Persistent,
		MessageId:    messageID(job),
		Timestamp:    now,
		AppId:        "pms",
		Body:         body,
	}
}

// decodeJob reads a message's job. It passes over fields that it does not know,
// since during an upgrade newer instances publish too.
func decodeJob(body []byte) (Job, error) {
	var job Job
	if err := json.Unmarshal(body, &job); err != nil {
		return Job{}, fmt.Errorf("decode job: %w", err)
	}
	if job.ID <= 0 || job.ProductID <= 0 {
		return Job{}, errors.New("decode job: no job or no product id")
	}
	return job, nil
}

// faultKind tells faults of the broker apart without the ports and times that
// make the text of each error its own.
func faultKind(err error) string {
	if broker, ok := errors.AsType[*amqp.Error](err); ok {
		return strconv.Itoa(broker.Code)
	}
	switch {
	case errors.Is(err, errNoQueue):
		return "no queue"
	case errors.Is(err, errBrokerFrozen):
		return "frozen"
	}
	return "away"
}

// isClosed says whether a channel that is only ever closed is closed.
func isClosed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}
