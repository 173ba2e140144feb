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
	look := time.NewTicker(topologyInterval)
	defer look.Stop()
	for {
		select {
		case <-ctx.Done():
			return c.finish()
		case <-look.C:
			if err := c.look(); err != nil {
				return err
			}
		case message, ok := <-c.messages:
			if !ok {
				return c.whyEnded()
			}
			c.passedOver = false
			if suspect(message) {
				err = q.handOutAlone(ctx, c, message, out)
			} else {
				q.handOut(ctx, c, message, out, false)
			}
			if err != nil { // the connection is lost, there is nothing to finish
				return err
			}
			if ctx.Err() != nil {
				return c.finish()
			}
		}
	}
}

// handOut gives one message to out; alone says that nothing else is in hand. What
// is no job of ours goes to the dead queue, where a person may look at it.
func (q *rabbitQueue) handOut(ctx context.Context, c *amqpConsumer, message amqp.Delivery, out chan<- Delivery, alone bool) {
	job, err := decodeJob(message.Body)
	if err != nil {
		q.log.Warn("message is no job, rejecting it", "message_id", message.MessageId, "app_id", message.AppId, "err", err)
		_ = message.Reject(false) // else the broker delivers it again
		return
	}
	if c.hand.Acquire(c.link.alive, 1) != nil {
		return // the connection is lost, and the message with it
	}
	delivery := newDelivery(job, c.hand, 1, func(v verdict) error { return settleMessage(message, v) })
	delivery.Counted, delivery.Redelivered = alone, message.Redelivered
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
	return wrap(err, "settle message %s", message.MessageId)
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

	passedOver bool // at the last look messages waited, and none has come since
}

// consumerTag need only be unique within a channel.
const consumerTag = "pms"

func newAMQPConsumer(ctx context.Context, link *amqpLink, prefetch int) (*amqpConsumer, error) {
	c := &amqpConsumer{link: link, prefetch: int64(prefetch), hand: semaphore.NewWeighted(int64(prefetch))}
	if err := c.subscribe(ctx); err != nil {
		return nil, err
	}
	return c, nil
}

// subscribe has the broker send messages on a channel of their own.
func (c *amqpConsumer) subscribe(ctx context.Context) error {
	err := c.link.onChannel(ctx, func(ch *amqp.Channel) (err error) {
		c.ch = ch
		c.closed = c.ch.NotifyClose(make(chan *amqp.Error, 1))
		c.canceled = c.ch.NotifyCancel(make(chan string, 1))
		if err := c.ch.Qos(int(c.prefetch), 0, false); err != nil {
			return err
		}
		c.messages, err = c.ch.Consume(workQueueName, consumerTag, false, false, false, false, nil)
		return err
	})
	return wrap(err, "consume from %s", workQueueName)
}

// cancel stops the subscription; messages that are here already can be read, and
// c.messages is closed behind them.
func (c *amqpConsumer) cancel() error {
	err := c.link.call(context.Background(), func() error { return c.ch.Cancel(consumerTag, false) })
	return wrap(err, "stop consuming")
}

// errPassedOver is the error of a subscription to a queue that is no more, while
// there is a new one of its name.
var errPassedOver = errors.New("the broker sends none of the messages that wait")

// look finds out whether the subscription still is one. RabbitMQ is to tell its
// consumers when their queue is deleted, but 3.10 at times does not, and then they
// would wait for ever, though there is a new queue of that name. Who has nothing
// in hand and gets no message between two looks, while some wait, has been forgotten.
func (c *amqpConsumer) look() error {
	if !c.hand.TryAcquire(c.prefetch) {
		return nil
	}
	c.hand.Release(c.prefetch)
	waiting, err := c.link.waiting(context.Background())
	if err == nil && waiting > 0 && c.passedOver {
		err = errPassedOver
	}
	c.passedOver = waiting > 0
	return err
}

// finish takes no more messages, gives back those not handed out yet, and waits
// until the others are settled or can no longer be.
func (c *amqpConsumer) finish() error {
	if err := c.cancel(); err != nil {
		return err
	}
	for message := range c.messages {
		_ = message.Reject(true) // closing the connection does it too
	}
	// The error says that the connection was lost.
	_ = c.hand.Acquire(c.link.alive, c.prefetch)
	return nil
}

// whyEnded says why the broker sends no more. The library closes canceled too when
// it closes the channel.
func (c *amqpConsumer) whyEnded() error {
	select {
	case _, ok := <-c.canceled:
		if ok {
			return fmt.Errorf("consumer was canceled: %w", errNoQueue)
		}
	case <-c.link.alive.Done():
		return context.Cause(c.link.alive)
	}
	select {
	case err := <-c.closed:
		return fmt.Errorf("consumer channel closed: %w", orClosed(err))
	case <-c.link.alive.Done():
		return context.Cause(c.link.alive)
	}
}
