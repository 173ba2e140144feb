package main

import (
	"context"
	"errors"
	"io"
	"net"
	"strconv"
	"sync"
	"testing"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
)

// TestQueueConnectionCut cuts every connection while a delivery is in hand. Its
// late ack must fail and not touch what the next connection delivered.
func TestQueueConnectionCut(t *testing.T) {
	t.Parallel()
	url := testAMQP(t)
	uri, err := amqp.ParseURI(url)
	if err != nil {
		t.Fatal(err)
	}
	proxy := newCutProxy(t, net.JoinHostPort(uri.Host, strconv.Itoa(uri.Port)))
	uri.Port = proxy.port()
	q := runQueue(t, newRabbitQueue(uri.String(), noRefill, testLog(t)))
	publishAll(t, q, jobs(1)...)
	in := consume(t, q, 1)
	stale := receive(t, in.out)
	proxy.cut()
	fresh := receive(t, in.out)
	if fresh.Job != stale.Job {
		t.Errorf("got %+v again, want %+v", fresh.Job, stale.Job)
	}
	if stale.Ack() == nil {
		t.Error("an ack over a lost connection says that it worked")
	}
	settled(t, fresh.Release())
	settled(t, receive(t, in.out).Ack())
	eventually(t, "the publisher is back", func() bool { return q.Ping(t.Context()) == nil })
	publishAll(t, q, Job{ID: 2, ProductID: 1})
	settled(t, receive(t, in.out).Ack())
}

// faultyBroker is a queue with a consumer on a node that has things done to it.
type faultyBroker struct {
	node    *testServer
	q       *rabbitQueue
	in      *consuming
	refills chan struct{}
	lastID  int64
}

// TestQueueBrokerFaults does to a node of its own what may happen to one. The
// queue and its consumer are the same all the time.
func TestQueueBrokerFaults(t *testing.T) {
	t.Parallel()
	b := &faultyBroker{node: startRabbitMQ(t), refills: make(chan struct{}, 100), lastID: 1000}
	b.q = newRabbitQueue(b.node.URL, func(context.Context) (int64, error) { b.refills <- struct{}{}; return 0, nil }, testLog(t))
	b.q.timeout, b.q.pace.most = 2*time.Second, time.Second
	runQueue(t, b.q)
	receive(t, b.refills)
	b.in = consume(t, b.q, 1)
	b.works(t)
	t.Run("frozen: a publish gives up, and all recovers", b.freeze)
	t.Run("memory alarm: a publish gives up, consuming goes on", b.alarm)
	t.Run("full: the nacked are refused", b.fill)
	t.Run("killed: the jobs are there after the restart, and the consumer comes back", b.kill)
	if len(b.refills) != 0 {
		t.Errorf("refilled %d times though the queue was never gone", len(b.refills))
	}
	t.Run("wiped: the queue is refilled", b.wipe)
}

// works has a new job pass. What a publish that gave up left comes before it.
func (b *faultyBroker) works(t *testing.T) {
	t.Helper()
	b.lastID++
	eventually(t, "the queue takes a job", func() bool {
		refused, err := b.q.Publish(t.Context(), []Job{{ID: b.lastID, ProductID: 1}})
		return err == nil && refused == nil
	})
	for {
		d := receive(t, b.in.out)
		settled(t, d.Ack())
		if d.Job.ID == b.lastID {
			return
		}
	}
}

func (b *faultyBroker) freeze(t *testing.T) {
	b.node.Freeze(t)
	start := time.Now()
	refused, err := b.q.Publish(t.Context(), jobs(confirmWindow))
	if took := time.Since(start); err == nil || len(refused) != confirmWindow || took > 5*time.Second {
		t.Errorf("refused %d, error %v after %v", len(refused), err, took)
	}
	eventually(t, "the fault is told", func() bool { return b.q.Ping(t.Context()) != nil })
	if _, err := b.q.Publish(t.Context(), jobs(1)); err == nil {
		t.Error("published to a frozen broker")
	}
	b.node.Thaw(t)
	b.works(t)
}

func (b *faultyBroker) alarm(t *testing.T) {
	publishAll(t, b.q, Job{ID: 2, ProductID: 1})
	held := receive(t, b.in.out)
	publishAll(t, b.q, Job{ID: 3, ProductID: 1})
	rabbitctl(t, b.node, "set_vm_memory_high_watermark", "absolute", "1MB")
	eventually(t, "a publish fails", func() bool { _, err := b.q.Publish(t.Context(), jobs(1)); return err != nil })
	if err := b.q.Ping(t.Context()); !errors.Is(err, errBrokerBlocked) {
		t.Errorf("under an alarm, Ping: %v", err)
	}
	settled(t, held.Ack())
	settled(t, receive(t, b.in.out).Ack())
	rabbitctl(t, b.node, "set_vm_memory_high_watermark", "absolute", "512MB")
	b.works(t)
}

func (b *faultyBroker) fill(t *testing.T) {
	rabbitctl(t, b.node, "set_policy", "full", ".*", `{"max-length":1}`, "--apply-to", "queues")
	eventually(t, "the queue is full", func() bool {
		refused, err := b.q.Publish(t.Context(), jobs(10))
		return err == nil && len(refused) > 0
	})
	if err := b.q.Ping(t.Context()); err != nil {
		t.Errorf("a full queue is not away: %v", err)
	}
	for n := 1; n > 0; { // RabbitMQ refuses until it is below the limit, even if that is lifted
		settled(t, receive(t, b.in.out).Ack())
		eventually(t, "the broker counts them", func() bool {
			var err error
			n, err = b.q.Waiting(t.Context())
			return err == nil
		})
	}
	rabbitctl(t, b.node, "clear_policy", "full")
	b.works(t)
}

func (b *faultyBroker) kill(t *testing.T) {
	publishAll(t, b.q, jobs(20)...)
	held := receive(t, b.in.out)
	b.node.Kill(t)
	if _, err := b.q.Publish(t.Context(), jobs(1)); err == nil {
		t.Error("published to a killed broker")
	}
	b.node.Start(t)
	if held.Ack() == nil {
		t.Error("an ack to a killed broker says that it worked")
	}
	seen := make(map[int64]bool)
	for len(seen) < 20 {
		d := receive(t, b.in.out)
		seen[d.Job.ID] = true
		settled(t, d.Ack())
	}
	b.works(t)
}

func (b *faultyBroker) wipe(t *testing.T) {
	b.node.Kill(t)
	b.node.Wipe(t)
	b.node.Start(t)
	receive(t, b.refills)
	b.works(t)
}

// cutProxy passes TCP on and can cut all that passes.
type cutProxy struct {
	listener net.Listener
	mu       sync.Mutex
	conns    []net.Conn
}

func newCutProxy(t *testing.T, target string) *cutProxy {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p := &cutProxy{listener: listener}
	var passing sync.WaitGroup
	passing.Go(func() {
		for {
			near, err := listener.Accept()
			if err != nil {
				return
			}
			far, err := net.Dial("tcp", target)
			if err != nil {
				near.Close()
				continue
			}
			p.mu.Lock()
			p.conns = append(p.conns, near, far)
			p.mu.Unlock()
			passing.Go(func() { io.Copy(near, far); near.Close() })
			passing.Go(func() { io.Copy(far, near); far.Close() })
		}
	})
	t.Cleanup(func() { listener.Close(); p.cut(); passing.Wait() })
	return p
}

func (p *cutProxy) port() int { return p.listener.Addr().(*net.TCPAddr).Port }

func (p *cutProxy) cut() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, c := range p.conns {
		c.Close()
	}
	p.conns = nil
}
