package main

import (
	"cmp"
	"context"
	"slices"

	amqp "github.com/rabbitmq/amqp091-go"
)

// deliveryCount is how often a message has come back from a consumer. The
// broker counts in a header of its own, which the first delivery does not have.
func deliveryCount(message amqp.Delivery) int64 {
	n, _ := message.Headers["x-delivery-count"].(int64)
	return n
}

// suspect says that a message may be what ended the workers that had it.
func suspect(message amqp.Delivery) bool { return deliveryCount(message) >= suspectDeliveries }

// handOutAlone hands a suspect out while nothing else is in hand, so that what
// happens then is its own doing. It stops the subscription, lets what came with
// the suspect be finished, hands out one suspect after the other, and subscribes
// anew. Those that came back less often go first: they are more likely innocent.
// When ctx ends it gives back the suspects that it still has, and leaves c
// without a subscription.
func (q *rabbitQueue) handOutAlone(ctx context.Context, c *amqpConsumer, first amqp.Delivery, out chan<- Delivery) error {
	if err := c.cancel(); err != nil {
		return err
	}
	suspects := []amqp.Delivery{first}
	for message := range c.messages { // those that were on their way
		if suspect(message) {
			suspects = append(suspects, message)
		} else {
			q.handOut(ctx, c, message, out, false)
		}
	}
	slices.SortStableFunc(suspects, func(a, b amqp.Delivery) int { return cmp.Compare(deliveryCount(a), deliveryCount(b)) })
	for _, message := range suspects {
		if err := c.awaitEmptyHand(); err != nil {
			return err
		}
		if ctx.Err() != nil {
			_ = message.Reject(true) // closing the connection does it too
			continue
		}
		q.log.Debug("image is handed out alone", "message_id", message.MessageId, "deliveries", deliveryCount(message)+1)
		q.handOut(ctx, c, message, out, true)
	}
	if err := c.awaitEmptyHand(); err != nil || ctx.Err() != nil {
		return err
	}
	q.log.Debug("images are handed out side by side again")
	return c.resubscribe(ctx)
}

// awaitEmptyHand waits until every delivery is settled. An error says that the
// connection was lost before.
func (c *amqpConsumer) awaitEmptyHand() error {
	if err := c.hand.Acquire(c.link.alive, c.prefetch); err != nil {
		return context.Cause(c.link.alive)
	}
	c.hand.Release(c.prefetch)
	return nil
}

// resubscribe subscribes on a new channel, since RabbitMQ before 3.10.9 closes a
// channel whose consumer comes back to it (rabbitmq-server issue 5927).
func (c *amqpConsumer) resubscribe(ctx context.Context) error {
	old := c.ch
	if err := c.subscribe(ctx); err != nil {
		return err
	}
	return c.link.call(ctx, old.Close)
}
