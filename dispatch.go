package main

import (
	"context"
	"log/slog"
	"time"
)

const (
	// dispatchBatch is how many jobs one transaction claims.
	dispatchBatch = confirmWindow
	// dispatchTimeout bounds the claim and the publishing of a batch. It leaves the
	// queue time to give up by itself, and leaseTime leaves time to mark what it took.
	dispatchTimeout = brokerTimeout + 5*time.Second
	// pollInterval serves retries whose time has come, other instances' jobs, and
	// whatever lost its Wake.
	pollInterval = time.Second

	dispatchRetryLeast = 200 * time.Millisecond
	dispatchRetryMost  = 5 * time.Second

	// reconcileInterval and reconcileAge catch jobs whose message was lost though
	// the queue stood. What was there to be taken has then been in hand for an
	// interval. That is far above what an image in work takes, but where IMAGE_TIMEOUT
	// is long or storage away: it then gets a second message, which costs work and
	// changes nothing, since the row is settled once.
	reconcileInterval = 3 * time.Minute
	reconcileAge      = 15 * time.Minute
)

// jobSource is the store as the dispatcher needs it.
type jobSource interface {
	// DispatchDue claims up to limit due jobs for leaseTime, calls publish with
	// them, and marks as published those not refused, also when publish returns an
	// error. After a crash in between they are due again when the lease is over. It
	// returns how many it claimed.
	DispatchDue(ctx context.Context, limit int, publish func(context.Context, []Job) (refused []Job, err error)) (claimed int, err error)
	// RequeuePublished makes every published and unfinished job whose publishing
	// is older than age due again, and returns how many.
	RequeuePublished(ctx context.Context, age time.Duration) (int64, error)
}

// jobSink is the queue as the dispatcher feeds it.
type jobSink interface {
	// Ping says whether jobs can be published now; it never waits.
	Ping(ctx context.Context) error
	// Publish returns when the queue holds all jobs but the refused ones. With
	// an error some may not even have been tried; they are refused too.
	Publish(ctx context.Context, jobs []Job) (refused []Job, err error)
	// Waiting returns how many jobs no worker has taken.
	Waiting(ctx context.Context) (int, error)
}

// dispatcher moves due jobs from their rows to the queue. Any number of
// instances may run theirs side by side.
type dispatcher struct {
	source jobSource
	queue  jobSink
	log    *slog.Logger
	wake   chan struct{} // a token
	pace   retryPace
	health healthLog
	idle   bool // no job waited when last looked for the lost
}

func newDispatcher(source jobSource, queue jobSink, log *slog.Logger) *dispatcher {
	return &dispatcher{
		source: source,
		queue:  queue,
		log:    log,
		wake:   make(chan struct{}, 1),
		pace:   retryPace{least: dispatchRetryLeast, most: dispatchRetryMost},
		health: healthLog{log: log.With("stage", "dispatch")},
	}
}

// Wake says that a job may be due. It never blocks.
func (d *dispatcher) Wake() { poke(d.wake) }

// Run dispatches until ctx ends. It finishes a batch that it began, since jobs
// published and not marked would be published twice.
func (d *dispatcher) Run(ctx context.Context) error {
	reconcile := time.NewTicker(reconcileInterval)
	defer reconcile.Stop()
	timer := time.NewTimer(0)
	defer timer.Stop()
	var wake <-chan struct{} // nil while a failure is waited out
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-reconcile.C:
			d.reconcile(ctx)
			continue
		case <-wake:
		case <-timer.C:
		}
		var pause time.Duration
		if pause, wake = pollInterval, d.wake; !d.drain(ctx) {
			pause, wake = d.pace.next(), nil
		}
		timer.Reset(pause)
	}
}

// drain dispatches until nothing is due any more, and says whether that went
// well. Without a queue it leaves the database alone; the queue says itself
// that it is away, and the poll sees it come back.
func (d *dispatcher) drain(ctx context.Context) bool {
	for ctx.Err() == nil {
		if d.queue.Ping(ctx) != nil {
			return true
		}
		claimed, err := d.dispatch(ctx)
		d.health.note(ctx, err, "dispatching fails, retrying", "dispatching works again")
		if err != nil {
			return false
		}
		d.pace.reset()
		if claimed < dispatchBatch {
			return true
		}
	}
	return true
}

// dispatch moves one batch. A refusal alone is an error too, so that a queue that
// is full or gone is not offered jobs at speed.
func (d *dispatcher) dispatch(ctx context.Context) (claimed int, err error) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), dispatchTimeout)
	defer cancel()
	return d.source.DispatchDue(ctx, dispatchBatch, func(ctx context.Context, jobs []Job) ([]Job, error) {
		refused, err := d.queue.Publish(ctx, jobs)
		if err == nil && len(refused) > 0 {
			err = errQueueRefused
		}
		return refused, err
	})
}

// reconcile publishes again what has been published for long and is neither
// finished nor waiting. With jobs in the queue it cannot tell the two apart, nor
// just after there were any, and does nothing: a backlog is not to be published
// again and again.
func (d *dispatcher) reconcile(ctx context.Context) {
	idle, err := d.isIdle(ctx)
	var n int64
	if idle && d.idle {
		n, err = d.source.RequeuePublished(ctx, reconcileAge)
	}
	d.idle = idle
	if err != nil {
		d.log.Warn("reconciling is put off", "stage", "dispatch", "err", err)
		return
	}
	if n > 0 {
		d.log.Warn("jobs went missing, publishing them again", "stage", "dispatch", "republish", n)
		d.Wake()
	}
}

// isIdle says whether there is a queue and no job waits in it.
func (d *dispatcher) isIdle(ctx context.Context) (bool, error) {
	if d.queue.Ping(ctx) != nil {
		return false, nil
	}
	waiting, err := d.queue.Waiting(ctx)
	return err == nil && waiting == 0, err
}
