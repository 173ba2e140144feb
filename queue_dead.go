package main

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
)

const (
	// sweepLockName is an exclusive queue that a sweep has while it runs. The
	// broker lets one connection have it, and takes it away with the connection.
	// (It does not enforce exclusive consumers of quorum queues.)
	sweepLockName = deadQueueName + ".sweep"
	// sweepWindow is how many messages one consumer of a sweep holds. The protocol
	// has 16 bits for it.
	sweepWindow = 20_000
	// sweepBatch is how many copies are compared with the rows at once.
	sweepBatch = 500
	// sweepIdle is how long a sweep waits for a message that should be there.
	sweepIdle = 2 * time.Second
	// sweepTimeout bounds a sweep. It is below the half hour after which RabbitMQ
	// closes the channel of whoever has not settled a message
	// (rabbitmq.com/docs/consumers, "Delivery Acknowledgement Timeout").
	sweepTimeout = 10 * time.Minute
)

var errSweepTaken = errors.New("another instance sweeps the dead queue")

// deadCopy is a message in the dead-letter queue.
type deadCopy struct {
	Job       Job
	GivenUp   bool      // by the broker, at the delivery limit: no worker has seen to its row
	Published time.Time // in whole seconds
}

// DeadCopies counts the copies in the dead-letter queue that nobody has in hand.
// Messages that the last sweep found to be no job are not counted.
func (q *rabbitQueue) DeadCopies(ctx context.Context) (int, error) {
	p, err := q.current()
	if err != nil {
		return 0, err
	}
	n, _, err := p.link.inspect(ctx, deadQueueName) // none if there is no queue, which Run makes soon
	if err != nil {
		return 0, fmt.Errorf("count dead copies: %w", err)
	}
	return n - int(q.foreign.Load()), nil
}

// SweepDead makes the dead-letter queue hold exactly one copy of each job that
// judge lets stay or that dead names. It shows every copy that is in the queue
// when it begins to judge, some at a time, removes those that are not to stay and
// second copies of one job, and publishes those of dead that it did not find.
// What is no job stays, for a person to look at.
//
// The queue is read without being emptied: what was not removed goes back when
// the connection is closed, however that comes about. One sweep runs at a time,
// since it would take what another holds for missing: errSweepTaken.
func (q *rabbitQueue) SweepDead(ctx context.Context, judge func(context.Context, []deadCopy) (stay []bool, err error), dead iter.Seq2[Job, error]) error {
	ctx, cancel := context.WithTimeout(ctx, sweepTimeout)
	defer cancel()
	link, err := dialAMQP(ctx, q.url, "sweep", q.timeout)
	if err != nil {
		return err
	}
	defer link.close()
	s := &deadSweep{link: link, judge: judge, seen: make(map[int64]bool)}
	if err := s.lock(ctx); err != nil {
		return err
	}
	if err := s.read(ctx); err != nil {
		return err
	}
	q.foreign.Store(int64(s.foreign))
	if err := s.removeExtra(ctx); err != nil {
		return err
	}
	return s.addMissing(ctx, dead)
}

// deadSweep is one sweep of the dead-letter queue.
type deadSweep struct {
	link     *amqpLink
	judge    func(context.Context, []deadCopy) ([]bool, error)
	channels []*amqp.Channel // of the consumers
	seen     map[int64]bool  // jobs with a copy that stays
	extra    []amqp.Delivery
	foreign  int // messages that are no job
}

func (s *deadSweep) lock(ctx context.Context) error {
	err := s.link.onChannel(ctx, func(ch *amqp.Channel) error {
		_, err := ch.QueueDeclare(sweepLockName, false, true, true, false, nil)
		return err
	})
	if broker, ok := errors.AsType[*amqp.Error](err); ok && broker.Code == amqp.ResourceLocked {
		return errSweepTaken
	}
	return wrap(err, "lock the dead queue")
}

// read reads as many messages as there are now. Fewer are an error: someone else
// has the others in hand, and they must not pass for missing.
func (s *deadSweep) read(ctx context.Context) error {
	count, _, err := s.link.inspect(ctx, deadQueueName)
	if err != nil {
		return fmt.Errorf("count dead copies: %w", err)
	}
	for read := 0; read < count; {
		messages, err := s.subscribe(ctx)
		if err != nil {
			return err
		}
		window := min(sweepWindow, count-read)
		for taken := 0; taken < window; {
			batch, err := receiveBatch(ctx, messages, min(sweepBatch, window-taken))
			if err != nil {
				return fmt.Errorf("read the dead queue, message %d of %d: %w", read+taken+len(batch), count, err)
			}
			if err := s.compare(ctx, batch); err != nil {
				return err
			}
			taken += len(batch)
		}
		read += window
	}
	return nil
}

// subscribe returns the next messages. Their consumer keeps what it has read, so
// the one after it gets others.
func (s *deadSweep) subscribe(ctx context.Context) (messages <-chan amqp.Delivery, err error) {
	err = s.link.onChannel(ctx, func(ch *amqp.Channel) (err error) {
		if err = ch.Qos(sweepWindow, 0, false); err != nil {
			return err
		}
		s.channels = append(s.channels, ch)
		messages, err = ch.Consume(deadQueueName, consumerTag, false, false, false, false, nil)
		return err
	})
	return messages, wrap(err, "consume from %s", deadQueueName)
}

// receiveBatch takes exactly n messages, or answers an error with fewer.
func receiveBatch(ctx context.Context, messages <-chan amqp.Delivery, n int) ([]amqp.Delivery, error) {
	batch := make([]amqp.Delivery, 0, n)
	idle := time.NewTimer(sweepIdle)
	defer idle.Stop()
	for len(batch) < n {
		select {
		case message, ok := <-messages:
			if !ok {
				return batch, errNoBroker
			}
			batch = append(batch, message)
			idle.Reset(sweepIdle)
		case <-idle.C:
			return batch, errors.New("it is not delivered")
		case <-ctx.Done():
			return batch, context.Cause(ctx)
		}
	}
	return batch, nil
}

// compare sorts messages into those that stay and those that are to go.
func (s *deadSweep) compare(ctx context.Context, batch []amqp.Delivery) error {
	var copies []deadCopy
	var messages []amqp.Delivery
	for _, message := range batch {
		job, err := decodeJob(message.Body)
		if err != nil {
			s.foreign++
			continue
		}
		givenUp := message.Headers["x-first-death-reason"] == "delivery_limit"
		copies = append(copies, deadCopy{job, givenUp, message.Timestamp})
		messages = append(messages, amqp.Delivery{Acknowledger: message.Acknowledger, DeliveryTag: message.DeliveryTag})
	}
	stay, err := s.judge(ctx, copies)
	if err != nil {
		return err
	}
	for n, c := range copies {
		if stay[n] && !s.seen[c.Job.ID] {
			s.seen[c.Job.ID] = true
		} else {
			s.extra = append(s.extra, messages[n])
		}
	}
	return nil
}

// removeExtra comes after all reading, or else the consumers would be sent more.
// An acknowledgement has no answer; that a channel is closed says that the broker
// has read those before it. A busy broker may still drop the last of many (what
// rabbit_fifo_client has not sent yet dies with its channel). Those copies come
// back, the numbers differ, and the next sweep removes them.
func (s *deadSweep) removeExtra(ctx context.Context) error {
	for _, message := range s.extra {
		point("dead copy judged")
		if err := message.Ack(false); err != nil {
			return fmt.Errorf("remove a dead copy: %w", err)
		}
		point("dead copy removed")
	}
	for _, ch := range s.channels {
		if err := s.link.call(ctx, ch.Close); err != nil {
			return fmt.Errorf("remove dead copies: %w", err)
		}
	}
	return nil
}

func (s *deadSweep) addMissing(ctx context.Context, dead iter.Seq2[Job, error]) error {
	p, err := newAMQPPublisher(ctx, s.link, deadQueueName)
	if err != nil {
		return err
	}
	var missing []Job
	flush := func() error {
		refused, err := p.publish(ctx, missing)
		if err == nil && len(refused) > 0 {
			err = errQueueRefused
		}
		if len(missing) > 0 {
			point("dead copies added")
		}
		missing = missing[:0]
		return wrap(err, "add missing dead copies")
	}
	for job, err := range dead {
		if err != nil {
			return err
		}
		if s.seen[job.ID] {
			continue
		}
		if missing = append(missing, job); len(missing) == confirmWindow {
			if err := flush(); err != nil {
				return err
			}
		}
	}
	return flush()
}
