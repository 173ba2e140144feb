package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/VictoriaMetrics/metrics"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sync/semaphore"
)

// consumer hands out jobs, up to prefetch at once, until ctx ends. What it has
// handed out by then can still be settled.
type consumer interface {
	Consume(ctx context.Context, prefetch int, out chan<- Delivery) error
}

// blobs keeps the compressed images.
type blobs interface {
	// Put stores an object, of the type that its key ends in; storing the same once
	// more changes nothing.
	Put(ctx context.Context, key string, data []byte) error
	// Delete deletes an object; that there is none is no error.
	Delete(ctx context.Context, key string) error
}

// sources downloads what images are made from.
type sources interface {
	Fetch(ctx context.Context, url string) ([]byte, error)
	// Release says that what Fetch returned is no longer held.
	Release(source []byte)
}

// errPutOff begins the errors that are nobody's fault and may last: the image is
// queued anew for later, and lets others have its place.
var errPutOff = errors.New("to be put off")

// imageSettings are the IMAGE_ and RETRY_ settings as the pipeline needs them.
type imageSettings struct {
	Workers       int
	Memory        int64
	MaxPixels     int64
	MaxSide       int
	Variants      []int // widths, from the widest down
	Quality       int
	RetryAttempts int
	RetryBase     time.Duration
}

// maxRetryDelay caps the backoff between the tries of an image.
const maxRetryDelay = 5 * time.Minute

// pipeline takes images through its stages, each with workers of its own and a
// channel without a buffer to the next: download → admit → decode → compress →
// upload → settle. A failure of an image travels with it to the last stage, the
// only one that writes down what has become of it and lets go of the delivery.
type pipeline struct {
	imageSettings
	store      *store
	queue      consumer
	blobs      blobs
	sources    sources
	invalidate func(productID, version int64) // a product has changed
	memory     *semaphore.Weighted            // bytes that decoded images hold, and outputs that wait
	log        *slog.Logger
	processors processors // made by Run
	buffers    buffers
}

// How many images a worker of the CPU-bound stages keeps busy in the others,
// where an image waits for the network. There are maxHostDownloads more, those
// that one slow host may have.
const (
	downloadsPerWorker = 4
	uploadsPerWorker   = 2
)

// work is one image on its way through the pipeline.
type work struct {
	delivery Delivery
	log      *slog.Logger
	started  time.Time
	image    Image
	source   []byte
	header   imageHeader
	decoded  *decodedImage
	held     int64             // bytes of pipeline.memory
	outputs  []compressedImage // the image, and then its variants
	err      error             // why the stages that follow have nothing to do
}

// Run processes images until stop ends, and then those that it has in hand.
// What is not finished when ctx ends goes back to the queue unharmed.
func (p *pipeline) Run(ctx, stop context.Context) error {
	downloads, uploads := maxHostDownloads+p.Workers*downloadsPerWorker, p.Workers*uploadsPerWorker
	deliveries := make(chan Delivery)
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error {
		defer close(deliveries)
		return p.queue.Consume(stop, downloads+1+2*p.Workers+2*uploads, deliveries)
	})
	received := stage(group, downloads, deliveries, func(d Delivery) *work { return p.download(ctx, d) })
	p.processors = startProcessors(group, p.Workers)
	admitted := stage(group, 1, received, p.step("admit", ctx, p.admit)) // one, so that a large image is not passed by small ones
	decoded := stage(group, p.Workers, admitted, p.step("decode", ctx, p.processors.run(p.decode)))
	compressed := stage(group, p.Workers, decoded, p.step("compress", ctx, p.processors.run(p.compress)))
	uploaded := stage(group, uploads, compressed, p.step("upload", ctx, p.upload))
	settled := stage(group, uploads, uploaded, func(w *work) *work { p.settle(ctx, w); return w })
	group.Go(func() error {
		defer close(p.processors)
		for range settled {
		}
		return nil
	})
	return group.Wait()
}

// processors run what needs a CPU rather than the network, each one thing at a
// time, on threads of their own, which step back for the rest of the program. An
// API in the same process stays quick while images are made.
type processors chan func()

func startProcessors(group *errgroup.Group, n int) processors {
	tasks := make(processors)
	for range n {
		group.Go(func() error {
			lowerPriority()
			for task := range tasks {
				task()
			}
			return nil
		})
	}
	return tasks
}

// run makes a step that runs on a processor.
func (tasks processors) run(do func(context.Context, *work) error) func(context.Context, *work) error {
	return func(ctx context.Context, w *work) (err error) {
		done := make(chan struct{})
		tasks <- func() {
			defer close(done)
			err = do(ctx, w)
		}
		<-done
		return err
	}
}

// spread runs parts, with the help of those processors that are idle now: a
// single large photo has several cores, and many have one each. It is called on
// a processor, so never more than there are at work. A part's panic is the caller's.
func (tasks processors) spread(parts []func()) {
	var next atomic.Int64
	var panicked atomic.Value
	help := func() {
		defer func() {
			if r := recover(); r != nil {
				panicked.Store(fmt.Errorf("%v", r))
			}
		}()
		for n := next.Add(1); n <= int64(len(parts)); n = next.Add(1) {
			parts[n-1]()
		}
	}
	var helpers sync.WaitGroup
	for idle := true; idle && next.Load() < int64(len(parts)); {
		helpers.Add(1)
		select {
		case tasks <- func() { defer helpers.Done(); help() }:
		default:
			helpers.Done()
			idle = false
		}
	}
	help()
	helpers.Wait()
	if err := panicked.Load(); err != nil {
		panic(err)
	}
}

// stage runs n workers that take items from in through do. Its channel is
// closed when in is closed and the last worker is done.
func stage[In, Out any](group *errgroup.Group, n int, in <-chan In, do func(In) Out) <-chan Out {
	out := make(chan Out)
	var workers sync.WaitGroup
	workers.Add(n)
	for range n {
		group.Go(func() error {
			defer workers.Done()
			for item := range in {
				out <- do(item)
			}
			return nil
		})
	}
	group.Go(func() error {
		workers.Wait()
		close(out)
		return nil
	})
	return out
}

// step makes a stage's function of one that may fail: it leaves work alone that
// has failed before, and measures the rest.
func (p *pipeline) step(name string, ctx context.Context, do func(context.Context, *work) error) func(*work) *work {
	duration := stageDuration(name)
	return func(w *work) *work {
		if w.err != nil {
			return w
		}
		start := time.Now()
		if err := do(ctx, w); err != nil {
			w.log = w.log.With("stage", name)
			w.err = err
			p.dropSource(w)
		}
		duration.UpdateDuration(start)
		return w
	}
}

func stageDuration(name string) *metrics.PrometheusHistogram {
	return metrics.GetOrCreatePrometheusHistogram(fmt.Sprintf(`pms_image_stage_duration_seconds{stage=%q}`, name))
}

// download is the first stage: it reads the job's row, which is the truth, and
// fetches the image's source.
func (p *pipeline) download(ctx context.Context, d Delivery) *work {
	w := &work{delivery: d, started: time.Now(), log: d.Job.on(p.log.With("job_id", d.Job.ID, "product_id", d.Job.ProductID))}
	w.log.Debug("image received")
	point("received")
	return p.step("download", ctx, func(ctx context.Context, w *work) error {
		err := p.persist(ctx, w, func() (err error) {
			w.image, err = p.store.PendingImage(ctx, d.Job.ID)
			return err
		})
		if err == nil {
			err = p.countStart(ctx, w)
		}
		if err != nil {
			return err
		}
		w.source, err = p.sources.Fetch(ctx, w.image.Source)
		point("downloaded")
		return err
	})(w)
}

// admit waits until there is memory for the decoded image, which stays taken
// until the image is compressed, and what its outputs take of it until it is settled.
// They wait for the storage and the database, never for memory.
func (p *pipeline) admit(ctx context.Context, w *work) (err error) {
	if w.header, err = readImageHeader(w.source, p.MaxPixels); err != nil {
		return err
	}
	cost := w.header.costAt(p.MaxSide, p.Variants)
	if cost > p.Memory {
		return permanent("too_much_memory", "decoding this image takes %d bytes, more than IMAGE_MEMORY (%d)", cost, p.Memory)
	}
	if err := p.memory.Acquire(ctx, cost); err != nil {
		return err
	}
	w.held = cost
	return nil
}

func (p *pipeline) decode(_ context.Context, w *work) (err error) {
	w.decoded, err = decodeImage(w.source, w.header, p.MaxSide, imageTools{p.processors.spread, &p.buffers})
	if err != nil {
		p.release(w)
	}
	return err
}

func (p *pipeline) compress(_ context.Context, w *work) (err error) {
	defer p.release(w)
	w.outputs, err = compressImage(w.decoded, w.source, p.Variants, p.Quality)
	for _, out := range w.outputs {
		if out.LostProfile != "" {
			w.log.Warn("the colour profile does not fit the result and is left out", "source", w.image.Source, "width", out.Width, "profile", out.LostProfile)
		}
	}
	return err
}

// release gives the decoded image's memory back, but for what its outputs take.
func (p *pipeline) release(w *work) {
	w.decoded = nil
	rest := int64(0)
	for _, out := range w.outputs {
		rest += int64(cap(out.Data))
	}
	rest = min(rest, w.held)
	p.memory.Release(w.held - rest)
	w.held = rest
}

// dropOutputs gives the outputs' memory back too.
func (p *pipeline) dropOutputs(w *work) {
	w.outputs = nil
	p.release(w)
}

// dropSource gives the source's memory back, of which later stages have no need.
// The header may have a profile that lies in it.
func (p *pipeline) dropSource(w *work) {
	if w.source != nil {
		p.sources.Release(w.source)
		w.source, w.header = nil, imageHeader{}
	}
}

// upload stores the compressed image and its variants under the keys that they
// will have. The reservation of them all sees to it that nothing is left behind
// if the image is never settled.
func (p *pipeline) upload(ctx context.Context, w *work) error {
	w.image.SourceBytes = int64(len(w.source))
	p.dropSource(w)
	w.image.Variants = nil
	for n, out := range w.outputs {
		key := blobKey(w.delivery.Job.ProductID, w.delivery.Job.ID, out.Data, out.Ext)
		if n == 0 {
			w.image.Key, w.image.Width, w.image.Height, w.image.Bytes = key, out.Width, out.Height, int64(len(out.Data))
		} else {
			w.image.Variants = append(w.image.Variants, variant{Width: out.Width, Key: key, Bytes: int64(len(out.Data))})
		}
	}
	return p.storeObjects(ctx, w)
}

// storagePatience is how long an image that cannot be stored is kept in hand, from
// its delivery on. It leaves those that wait behind it the time for a try of their
// own within RabbitMQ's consumer timeout, 30 minutes: then the broker delivers what
// is in hand once more, and what came back often enough is taken for poison.
const storagePatience = 10 * time.Minute

// errNotStored says that an image could not be stored for longer than storagePatience:
// the storage is away, or does not delete what is in the way.
var errNotStored = fmt.Errorf("%w: it cannot be stored", errPutOff)

func (p *pipeline) storeObjects(ctx context.Context, w *work) error {
	return p.persist(ctx, w, func() error {
		err := p.tryToStore(ctx, w)
		if err == nil || errors.Is(err, errNotFound) || ctx.Err() != nil || time.Since(w.started) <= storagePatience {
			return err
		}
		return fmt.Errorf("%w: %w", errNotStored, err)
	})
}

func (p *pipeline) tryToStore(ctx context.Context, w *work) error {
	keys := w.image.keys()
	if err := p.store.ReserveObject(ctx, w.image.ID, keys...); err != nil {
		return err
	}
	point("object reserved")
	for n, out := range w.outputs {
		if err := p.blobs.Put(ctx, keys[n], out.Data); err != nil {
			return err
		}
		point("object stored")
	}
	return nil
}

// settle writes down what has become of the image, and only then lets go of the
// delivery: a crash before that has the image delivered again.
func (p *pipeline) settle(ctx context.Context, w *work) {
	defer p.dropOutputs(w)
	if leftOut("commit before ack") {
		_ = w.delivery.Ack()
	}
	point("about to settle")
	var failed *imageError
	switch {
	case w.err == nil:
		w.err = p.settleReady(ctx, w)
	case errors.As(w.err, &failed):
		w.err = p.settleFailed(ctx, w, failed)
	}
	var err error
	switch {
	case w.err == nil:
		err = w.delivery.Ack()
		point("acked")
	case errors.Is(w.err, errNotFound):
		err = p.letGo(ctx, w)
	case errors.Is(w.err, errPutOff):
		err = p.putOff(ctx, w)
	case errors.As(w.err, &failed):
		err = w.delivery.Reject()
		point("rejected")
	default:
		w.log.Warn("image given back unfinished", "err", w.err)
		err = p.giveBack(ctx, w)
	}
	if err != nil {
		w.log.Warn("delivery not settled, the broker will deliver the image again", "err", err)
	}
}

// putOff queues an image anew, see errPutOff, and lets go of the delivery.
func (p *pipeline) putOff(ctx context.Context, w *work) error {
	err := p.persist(ctx, w, func() error { return p.store.PutOff(ctx, w.delivery.Job.ID) })
	switch {
	case errors.Is(err, errNotFound):
		return p.letGo(ctx, w)
	case err != nil:
		return errors.Join(err, p.giveBack(ctx, w))
	}
	imagesPutOff.Inc()
	level := slog.LevelDebug
	if errors.Is(w.err, errNoSocket) {
		level = slog.LevelWarn // it concerns more than this image
	}
	w.log.Log(ctx, level, "image put off", "err", w.err)
	return w.delivery.Ack()
}

// letGo settles the delivery of an image that is no longer wanted. If it is dead
// already, its worker may have ended between the commit and the reject, which is
// then done here. (What is missed here, deadKeeper mends.) That worker, or one that
// lost the answer to its commit, may not have told of the product's version either.
func (p *pipeline) letGo(ctx context.Context, w *work) error {
	if w.outputs != nil {
		discard := func() error { return p.store.DiscardUnwanted(ctx, w.image.ID, w.image.keys()) }
		if err := p.persist(ctx, w, discard); err != nil {
			return errors.Join(err, p.giveBack(ctx, w))
		}
	}
	if product, err := p.store.Product(ctx, w.delivery.Job.ProductID); err == nil {
		p.invalidate(product.ID, product.Version)
	}
	if w.delivery.Redelivered {
		dead, err := p.store.deadAmong(ctx, []int64{w.delivery.Job.ID})
		if err == nil && len(dead) > 0 {
			return w.delivery.Reject()
		}
	}
	w.log.Info("image no longer wanted")
	return w.delivery.Ack()
}

func (p *pipeline) settleReady(ctx context.Context, w *work) error {
	var version int64
	err := p.persist(ctx, w, func() (err error) {
		version, err = p.store.SettleReady(ctx, w.delivery.Job, w.image)
		if !errors.Is(err, errReservationLost) {
			return err
		}
		if err = p.storeObjects(ctx, w); err == nil {
			version, err = p.store.SettleReady(ctx, w.delivery.Job, w.image)
		}
		return err
	})
	if err != nil {
		return err
	}
	point("settled as ready")
	imagesReady.Inc()
	countBytes(w.image)
	p.invalidate(w.delivery.Job.ProductID, version)
	w.log.Info("image ready", "attempt", w.image.Attempts+1, "duration", time.Since(w.started).Seconds(),
		"width", w.image.Width, "height", w.image.Height, "bytes", w.image.Bytes, "source_bytes", w.image.SourceBytes, "variants", len(w.image.Variants))
	return nil
}

// settleFailed answers the failure if the image is dead now, nil if it will be
// tried again.
func (p *pipeline) settleFailed(ctx context.Context, w *work, why *imageError) error {
	f := p.failed(why, w.image.Attempts+1, p.store.now())
	f.Duration = time.Since(w.started)
	var version int64
	err := p.persist(ctx, w, func() (err error) {
		version, err = p.store.SettleFailed(ctx, w.delivery.Job, f)
		return err
	})
	if err != nil {
		return err
	}
	p.invalidate(w.delivery.Job.ProductID, version)
	if f.RetryAt.IsZero() {
		point("settled as dead")
		imagesDead.Inc()
		w.log.Warn("image dead", "attempt", f.Attempt, "duration", f.Duration.Seconds(), "source", w.image.Source, "code", why.Code, "err", why)
		return why
	}
	point("settled for a retry")
	imagesRetried.Inc()
	w.log.Warn("image will be tried again", "attempt", f.Attempt, "duration", f.Duration.Seconds(), "source", w.image.Source,
		"code", why.Code, "err", why, "retry_at", f.RetryAt)
	return nil
}

var (
	imagesReady   = metrics.NewCounter(`pms_images_total{result="ready"}`)
	imagesRetried = metrics.NewCounter(`pms_images_total{result="retried"}`)
	imagesDead    = metrics.NewCounter(`pms_images_total{result="dead"}`)
	imagesPutOff  = metrics.NewCounter(`pms_images_total{result="put_off"}`)
)

// failed is a try that failed now. It is the last if why is permanent, or there
// are to be no more.
func (s imageSettings) failed(why *imageError, attempt int, now time.Time) failure {
	f := failure{imageError: why, Attempt: attempt}
	if !why.Permanent && attempt < s.RetryAttempts {
		f.RetryAt = now.Add(max(backoff(s.RetryBase, attempt), why.RetryAfter))
	}
	return f
}

// The wait between the tries of a step that fails through our own parts.
const (
	minPersistDelay = 100 * time.Millisecond
	maxPersistDelay = 10 * time.Second
)

// persist does what needs the database or the storage until it succeeds: their
// outages are not the image's fault and cost it no attempt. It gives up when ctx
// ends, and at once when the image is no longer wanted or is to be put off.
func (p *pipeline) persist(ctx context.Context, w *work, do func() error) error {
	pace := retryPace{least: minPersistDelay, most: maxPersistDelay}
	for {
		err := do()
		if err == nil || errors.Is(err, errNotFound) || errors.Is(err, errPutOff) {
			return err
		}
		if ctx.Err() != nil {
			return fmt.Errorf("%w: %w", ctx.Err(), err)
		}
		delay := pace.next()
		w.log.Warn("waiting for the database or the storage", "retry_in", delay, "err", err)
		_ = sleep(ctx, delay)
	}
}
