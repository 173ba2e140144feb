package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
)

// amqpHeartbeat makes both sides notice a dead peer within half a minute.
const amqpHeartbeat = 10 * time.Second

// amqpLink is one AMQP connection with the socket beneath it. The client library
// waits for a frozen broker without regard to any context, so whatever may wait
// goes through call, which closes the socket in the end.
//
// The library's own recovery stays off: it reuses the channel on the new
// connection, where delivery tags begin at 1 again, so that a late ack can
// remove another job's message.
type amqpLink struct {
	conn      *amqp.Connection
	socket    net.Conn
	timeout   time.Duration
	alive     context.Context // ends with the connection, its cause is why
	end       context.CancelCauseFunc
	blocked   chan struct{} // closed when the broker blocks the connection
	unblocked chan struct{} // closed when it first lifts that
}

// dialAMQP connects. The caller closes the link.
func dialAMQP(ctx context.Context, url, purpose string, timeout time.Duration) (*amqpLink, error) {
	l := &amqpLink{timeout: timeout, blocked: make(chan struct{}), unblocked: make(chan struct{})}
	properties := amqp.NewConnectionProperties()
	properties.SetClientConnectionName("pms " + purpose)
	var stop func() bool
	conn, err := amqp.DialConfig(url, amqp.Config{
		Heartbeat:  amqpHeartbeat,
		Properties: properties,
		Dial: func(network, addr string) (net.Conn, error) {
			dialer := net.Dialer{Timeout: timeout}
			socket, err := dialer.DialContext(ctx, network, addr)
			if err != nil {
				return nil, err
			}
			l.socket = socket
			stop = context.AfterFunc(ctx, func() { socket.Close() })
			// The library lifts the deadline once the handshake is done.
			return socket, socket.SetDeadline(time.Now().Add(timeout))
		},
	})
	if stop != nil {
		stop()
	}
	if err != nil {
		if l.socket != nil {
			l.socket.Close()
		}
		return nil, fmt.Errorf("connect to the broker: %w", err)
	}
	l.conn = conn
	l.alive, l.end = context.WithCancelCause(context.Background())
	go l.watch(conn.NotifyClose(make(chan *amqp.Error, 1)), conn.NotifyBlocked(make(chan amqp.Blocking, 1)))
	return l, nil
}

// watch ends with the connection, which close brings about at the latest.
func (l *amqpLink) watch(closing <-chan *amqp.Error, blocks <-chan amqp.Blocking) {
	for {
		select {
		case err := <-closing:
			l.end(orClosed(err))
			return
		case block, ok := <-blocks:
			switch {
			case !ok:
				blocks = nil // the connection is closing
			case block.Active && !isClosed(l.blocked):
				close(l.blocked)
			case !block.Active && !isClosed(l.unblocked):
				close(l.unblocked)
			}
		}
	}
}

// orClosed names an orderly close, for which the library has a nil.
func orClosed(err *amqp.Error) error {
	if err == nil {
		return amqp.ErrClosed
	}
	return err
}

// call runs f, which waits for the broker, and kills the connection if that
// takes too long or ctx ends first. A killed connection makes f return.
func (l *amqpLink) call(ctx context.Context, f func() error) error {
	ctx, cancel := context.WithTimeoutCause(ctx, l.timeout, errBrokerFrozen)
	defer cancel()
	stop := context.AfterFunc(ctx, func() { l.kill(context.Cause(ctx)) })
	defer stop()
	err := f()
	if err != nil && ctx.Err() != nil {
		return context.Cause(ctx) // not what the killed socket said
	}
	return err
}

// onChannel is call with a new channel.
func (l *amqpLink) onChannel(ctx context.Context, f func(*amqp.Channel) error) error {
	return l.call(ctx, func() error {
		ch, err := l.conn.Channel()
		if err != nil {
			return err
		}
		return f(ch)
	})
}

// kill ends the connection without a word to the broker.
func (l *amqpLink) kill(why error) {
	l.end(why)
	l.socket.Close()
}

// close ends the connection in good order, after what was written to it, and
// within a second if the broker is frozen.
func (l *amqpLink) close() {
	_ = l.conn.CloseDeadline(time.Now().Add(time.Second)) // the socket goes anyway
	l.kill(amqp.ErrClosed)
}

// inspect looks whether a queue exists and how many messages wait in it, on a
// channel of its own, since the answer no closes the channel.
func (l *amqpLink) inspect(ctx context.Context, name string) (waiting int, exists bool, err error) {
	err = l.onChannel(ctx, func(ch *amqp.Channel) error {
		defer ch.Close()
		queue, err := ch.QueueDeclarePassive(name, true, false, false, false, nil)
		waiting = queue.Messages
		return err
	})
	if broker, ok := errors.AsType[*amqp.Error](err); ok && broker.Code == amqp.NotFound {
		return 0, false, nil
	}
	return waiting, err == nil, err
}

// waiting is how many jobs wait in the work queue, or errNoQueue.
func (l *amqpLink) waiting(ctx context.Context) (int, error) {
	n, exists, err := l.inspect(ctx, workQueueName)
	if err == nil && !exists {
		return 0, errNoQueue
	}
	return n, wrap(err, "count waiting jobs")
}

// declare makes a durable queue, or checks that the one there has these arguments.
func (l *amqpLink) declare(ctx context.Context, name string, args amqp.Table) error {
	err := l.onChannel(ctx, func(ch *amqp.Channel) error {
		defer ch.Close()
		_, err := ch.QueueDeclare(name, true, false, false, false, args)
		return err
	})
	return wrap(err, "declare queue %s", name)
}
