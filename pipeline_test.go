package main

import (
	"context"
	"errors"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sync/semaphore"
)

// lossyDB loses the connection: once lose is set, when it has committed a
// transaction, and once undo is set, before it commits one.
type lossyDB struct {
	database
	lose, undo atomic.Bool
}

func (d *lossyDB) InTx(ctx context.Context, do func(querier) error) error {
	err := d.database.InTx(ctx, func(tx querier) error {
		err := do(tx)
		if err == nil && d.undo.CompareAndSwap(true, false) {
			return errUnavailable
		}
		return err
	})
	if err == nil && d.lose.CompareAndSwap(true, false) {
		return errUnavailable
	}
	return err
}

// A result whose commit got through though its answer did not is told to the
// caches all the same: nobody else has.
func TestPipelineTellsOfACommitThatItDidNotSee(t *testing.T) {
	t.Parallel()
	outcomes := map[string]func(w *work){
		"ready":    func(w *work) { w.image.Key, w.outputs = "key", []compressedImage{{}} },
		"to retry": func(w *work) { w.err = transient("http_503", "503 Service Unavailable") },
		"dead":     func(w *work) { w.err = permanent("http_404", "404 Not Found") },
	}
	eachStore(t, func(t *testing.T, s *store) {
		db := &lossyDB{database: s.database}
		for name, happen := range outcomes {
			product := create(t, s, "https://a.example/1.jpg")
			job := publishDue(t, s)[0]
			reserve(t, s, job, "key")
			var told []productVersion
			p := &pipeline{
				imageSettings: imageSettings{RetryAttempts: 2, RetryBase: maxRetryDelay},
				store:         newStore(db),
				invalidate:    func(id, version int64) { told = append(told, productVersion{id, version}) },
				memory:        semaphore.NewWeighted(1),
				log:           testLog(t),
			}
			hand := semaphore.NewWeighted(1)
			settled(t, hand.Acquire(t.Context(), 1))
			var verdicts []verdict
			delivery := newDelivery(job, hand, 1, func(v verdict) error { verdicts = append(verdicts, v); return nil })
			w := &work{delivery: delivery, log: p.log, image: Image{ID: job.ID}}
			happen(w)
			db.lose.Store(true)
			p.settle(t.Context(), w)
			if !slices.Equal(told, []productVersion{{product.ID, 2}}) || len(verdicts) != 1 {
				t.Errorf("%s: told %v, settled with %v", name, told, verdicts)
			}
		}
	})
}

// released counts the sources that are no longer held.
type released struct {
	sources
	n int
}

func (r *released) Release([]byte) { r.n++ }

// The source of an image that fails is let go of at once, and once: others wait for
// its memory.
func TestSourceOfAFailedImageIsReleased(t *testing.T) {
	t.Parallel()
	let := &released{}
	p := &pipeline{imageSettings: imageSettings{MaxPixels: 100}, sources: let}
	w := &work{source: []byte("no image"), log: testLog(t)}
	for range 2 {
		w = p.step("admit", t.Context(), p.admit)(w)
		if w.err == nil || w.source != nil || let.n != 1 {
			t.Errorf("after %v the source was released %d times, want once", w.err, let.n)
		}
	}
}

// So is what was set aside for the pixels, of an image that cannot be decoded and
// of one that is compressed, but for what its outputs take until they are stored.
func TestMemoryOfAnImageIsReleased(t *testing.T) {
	t.Parallel()
	const memory = 100 << 20
	photo := jpegPhoto(t, 400, 400)
	for _, source := range [][]byte{photo[:len(photo)/2], photo} {
		p := &pipeline{imageSettings: imageSettings{MaxPixels: 1 << 20, MaxSide: 100, Memory: memory, Quality: 80}, memory: semaphore.NewWeighted(memory), log: testLog(t)}
		w := &work{source: source, log: p.log}
		settled(t, p.admit(t.Context(), w))
		err := p.decode(t.Context(), w)
		if err == nil {
			err = p.compress(t.Context(), w)
		}
		waiting := int64(0)
		for _, out := range w.outputs {
			waiting += int64(cap(out.Data))
		}
		if (err == nil) != (len(source) == len(photo)) || (waiting > 0) != (err == nil) || w.held != waiting {
			t.Errorf("%d bytes of a photo: %v, %d of outputs, and %d bytes are held", len(source), err, waiting, w.held)
		}
		if p.memory.TryAcquire(memory-waiting+1) || !p.memory.TryAcquire(memory-waiting) {
			t.Errorf("%d bytes of a photo: other than %d bytes are held", len(source), waiting)
		}
	}
}

// awayBlobs is a storage that is away.
type awayBlobs struct{}

var errAway = errors.New("away")

func (awayBlobs) Put(context.Context, string, []byte) error { return errAway }
func (awayBlobs) Delete(context.Context, string) error      { return errAway }

// While the storage is away for hours, or does not delete what is in the way, no
// delivery is held until the broker takes it back, which counts against the image:
// it is queued anew, and no worse off than before. One that reaches the storage late
// is not kept for as long again.
func TestImageIsPutOffWhileItCannotBeStored(t *testing.T) {
	t.Parallel()
	t.Run("storage away", func(t *testing.T) { t.Parallel(); wantPutOff(t, errAway, false) })
	t.Run("object in the way", func(t *testing.T) { t.Parallel(); wantPutOff(t, errObjectBusy, true) })
}

func wantPutOff(t *testing.T, why error, deleting bool) {
	eachStore(t, func(t *testing.T, s *store) {
		create(t, s, "https://a.example/1.jpg")
		job := publishDue(t, s)[0]
		_, err := s.CountLoneStart(t.Context(), job.ID)
		settled(t, err)
		p := &pipeline{store: s, blobs: awayBlobs{}, memory: semaphore.NewWeighted(1), log: testLog(t)}
		hand := semaphore.NewWeighted(1)
		settled(t, hand.Acquire(t.Context(), 1))
		settled(t, p.memory.Acquire(t.Context(), 1))
		var verdicts []verdict
		delivery := newDelivery(job, hand, 1, func(v verdict) error { verdicts = append(verdicts, v); return nil })
		w := &work{delivery: delivery, log: p.log, image: Image{ID: job.ID}, held: 1, outputs: []compressedImage{{Data: []byte("x"), Ext: "jpg"}}}

		if deleting {
			_, err := s.Exec(t.Context(), `INSERT INTO garbage (object_key, delete_at, deleting) VALUES ($1, $2, true)`, blobKey(job.ProductID, job.ID, []byte("x"), "jpg"), s.now())
			settled(t, err)
		}
		w.started = time.Now().Add(maxPersistDelay/10 - storagePatience) // so it has a second left
		ctx, cancel := context.WithTimeout(t.Context(), storagePatience/20)
		defer cancel()
		w = p.step("upload", ctx, p.upload)(w)
		if early := time.Since(w.started); !errors.Is(w.err, errNotStored) || !errors.Is(w.err, why) || early < storagePatience {
			t.Fatalf("given up after %v in hand: %v", early, w.err)
		}
		if p.memory.TryAcquire(1) {
			t.Error("the memory of an output that waits is given back")
		}
		p.settle(t.Context(), w)
		if !slices.Equal(verdicts, []verdict{verdictDone}) || !p.memory.TryAcquire(1) {
			t.Errorf("settled with %v, and %d bytes are held", verdicts, w.held)
		}
		image, err := s.PendingImage(t.Context(), job.ID)
		if err != nil || image.Attempts != 0 {
			t.Errorf("afterwards: %+v, %v", image, err)
		}
		if starts, err := s.CountLoneStart(t.Context(), job.ID); err != nil || starts != 1 {
			t.Errorf("the next start is counted as %d, %v", starts, err)
		}
		s.now = func() time.Time { return time.Now().Add(maxRetryDelay) }
		if again := publishDue(t, s); len(again) != 1 || again[0].ID != job.ID {
			t.Errorf("due are %v", again)
		}
	})
}
