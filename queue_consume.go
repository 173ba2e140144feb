package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
	"golang.org/x/sync/semaphore"
)

// Consume hands jobs to out, at most prefetch of them unsettled, and comes back
// by itself from whatever happens to the broker. When ctx ends it takes no more
// jobs, waits until those handed out are settled (which still works then), and
// returns nil; those of a lost connection are not waited for. It never closes
// out. It needs Run running.
func (q *rabbitQueue) Consume(ctx context.Context, prefetch int, out chan<- Delivery) error {
	pace := q.pace
	health := healthLog{log: q.log.With("stage", "consume")}
	for {
		err := q.consumeOnce(ctx, prefetch, out, func() {
			pace.reset()
			health.mended("consumer is connected")
		})
		if ctx.Err() != nil {
			return nil
		}
		q.recheck() // a deleted queue is seen here first
		health.fault(faultKind(err), "consumer lost the queue, retrying", err)
		pace.wait(ctx)
	}
}

// consumeOnce consumes over one connection. When that is lost, the deliveries in
// hand can no longer be settled, and the broker gives them to another consumer.
func (q *rabbitQueue) consumeOnce(ctx context.Context, prefetch int, out chan<- Delivery, connected func()) error {
	if err := q.awaitTopology(ctx); err != nil {
		return err
	}
	link, err := dialAMQP(ctx, q.url, "consume", q.timeout)
	if err != nil {
		return err
	}
	defer link.close()
	c, err := newAMQPConsumer(ctx, link, prefetch)
	if err != nil {
		return err
	}
	connected()
	for {
		select {
		case <-ctx.Done():
			return c.finish()
		case message, ok := <-c.messages:
			if !ok {
				return c.whyEnded()
			}
			q.handOut(ctx, c, message, out)
		}
	}
}

// handOut gives one message to out. What is no job of ours goes to the dead
// queue, where a person may look at it.
func (q *rabbitQueue) handOut(ctx context.Context, c *amqpConsumer, message amqp.Delivery, out chan<- Delivery) {
	job, err := decodeJob(message.Body)
	if err != nil {
		q.log.Warn("message is no job, rejecting it", "message_id", message.MessageId, "app_id", message.AppId, "err", err)
		_ = message.Reject(false) // else the broker delivers it again
		return
	}
	if c.hand.Acquire(c.link.alive, 1) != nil {
		return // the connection is lost, and the message with it
	}
	delivery := newDelivery(job, c.hand, func(v verdict) error { return settleMessage(message, v) })
	select {
	case out <- delivery:
	case <-ctx.Done():
		_ = delivery.Release()
	case <-c.link.alive.Done():
		_ = delivery.Release() // for the count; it fails
	}
}

func settleMessage(message amqp.Delivery, v verdict) error {
	var err error
	switch v {
	case verdictDone:
		err = message.Ack(false)
	case verdictRejected:
		err = message.Reject(false)
	case verdictReleased:
		err = message.Reject(true)
	}
	if err != nil {
		return fmt.Errorf("settle message %s: %w", message.MessageId, err)
	}
	return nil
}

// amqpConsumer is a subscription to the work queue.
type amqpConsumer struct {
	link     *amqpLink
	ch       *amqp.Channel
	prefetch int64
	hand     *semaphore.Weighted // of prefetch places; one a delivery in hand
	messages <-chan amqp.Delivery
	closed   <-chan *amqp.Error
	canceled <-chan string
}

// consumerTag need only be unique within a channel.
const consumerTag = "pms"

func newAMQPConsumer(ctx context.Context, link *amqpLink, prefetch int) (*amqpConsumer, error) {
	c := &amqpConsumer{link: link, prefetch: int64(prefetch), hand: semaphore.NewWeighted(int64(prefetch))}
	err := link.call(ctx, func() (err error) {
		if c.ch, err = link.conn.Channel(); err != nil {
			return err
		}
		c.closed = c.ch.NotifyClose(make(chan *amqp.Error, 1))
		c.canceled = c.ch.NotifyCancel(make(chan string, 1))
		if err := c.ch.Qos(prefetch, 0, false); err != nil {
			return err
		}
		c.messages, err = c.ch.Consume(workQueueName, consumerTag, false, false, false, false, nil)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("consume from %s: %w", workQueueName, err)
	}
	return c, nil
}

// finish takes no more messages, gives back those not handed out yet, and waits
// until the others are settled or can no longer be.
func (c *amqpConsumer) finish() error {
	err := c.link.call(context.Background(), func() error { return c.ch.Cancel(consumerTag, false) })
	if err != nil {
		return fmt.Errorf("stop consuming: %w", err)
	}
	for message := range c.messages { // closed by Cancel
		_ = message.Reject(true) // closing the connection does it too
	}
	// The error says that the connection was lost.
	_ = c.hand.Acquire(c.link.alive, c.prefetch)
	return nil
}

// whyEnded says why the broker sends no more.
func (c *amqpConsumer) whyEnded() error {
	select {
	case <-c.canceled:
		return fmt.Errorf("consumer was canceled: %w", errNoQueue)
	case err := <-c.closed:
		return fmt.Errorf("consumer channel closed: %w", orClosed(err))
	case <-c.link.alive.Done():
		return context.Cause(c.link.alive)
	}
}

// SweepDead looks once at every message that is in the dead-letter queue when it
// begins, so that the queue and the rows agree in the end.
//
// A job that came there by the delivery limit has killed or lost its worker each
// time, so its row does not know: poisoned is told, with the time of its
// publishing in whole seconds, by which a row that was replayed since can be told
// from one that died. Then keep says whether the copy is to stay. What keep does
// not want is removed. Messages that are no job, and those for which a function
// failed, stay; the first such error is returned at the end.
func (q *rabbitQueue) SweepDead(ctx context.Context, keep func(Job) (bool, error), poisoned func(job Job, published time.Time) error) error {
	link, err := dialAMQP(ctx, q.url, "sweep", q.timeout)
	if err != nil {
		return err
	}
	defer link.close() // gives back what was taken and not acked
	count, exists, err := link.inspect(ctx, deadQueueName)
	if err != nil {
		return fmt.Errorf("count dead letters: %w", err)
	}
	if !exists {
		return nil
	}
	var ch *amqp.Channel
	err = link.call(ctx, func() (err error) { ch, err = link.conn.Channel(); return err })
	if err != nil {
		return fmt.Errorf("sweep the dead queue: %w", err)
	}
	var failures error
	for range count {
		message, ok, err := getMessage(ctx, link, ch)
		if err != nil || !ok {
			return errors.Join(failures, err)
		}
		if err := sweepMessage(message, keep, poisoned); err != nil && failures == nil {
			failures = err
		}
	}
	return failures
}

func getMessage(ctx context.Context, link *amqpLink, ch *amqp.Channel) (message amqp.Delivery, ok bool, err error) {
	err = link.call(ctx, func() (err error) {
		message, ok, err = ch.Get(deadQueueName, false)
		return err
	})
	if err != nil {
		return message, false, fmt.Errorf("get from %s: %w", deadQueueName, err)
	}
	return message, ok, nil
}

// sweepMessage acks a message that is not to stay.
func sweepMessage(message amqp.Delivery, keep func(Job) (bool, error), poisoned func(Job, time.Time) error) error {
	job, err := decodeJob(message.Body)
	if err != nil {
		return nil // no job of ours, for a person to look at
	}
	if message.Headers["x-first-death-reason"] == "delivery_limit" {
		if err := poisoned(job, message.Timestamp); err != nil {
			return fmt.Errorf("mark poisonous job %d: %w", job.ID, err)
		}
	}
	stays, err := keep(job)
	if err != nil {
		return fmt.Errorf("look up dead job %d: %w", job.ID, err)
	}
	if stays {
		return nil
	}
	point("dead copy looked at")
	if err := message.Ack(false); err != nil {
		return fmt.Errorf("remove dead copy of job %d: %w", job.ID, err)
	}
	point("dead copy removed")
	return nil
}
