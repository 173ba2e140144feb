package main

import (
	"bytes"
	"errors"
	"image"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	"golang.org/x/sync/errgroup"
)

// withProcessors runs do on one of n processors, and ends them.
func withProcessors(t *testing.T, n int, do func(processors)) {
	t.Helper()
	var group errgroup.Group
	p := startProcessors(&group, n)
	done := make(chan struct{})
	p <- func() { defer close(done); do(p) }
	<-done
	close(p)
	if err := group.Wait(); err != nil {
		t.Fatal(err)
	}
}

func TestSpreadUsesIdleProcessorsAndNoMore(t *testing.T) {
	t.Parallel()
	const n = 3
	withProcessors(t, n, func(p processors) {
		var atWork, most atomic.Int32
		part := func() {
			now := atWork.Add(1)
			defer atWork.Add(-1)
			for m := most.Load(); now > m && !most.CompareAndSwap(m, now); m = most.Load() {
			}
			for range 1000 { // others come in meanwhile
				runtime.Gosched()
			}
		}
		// The others may not be waiting for a task yet the first time.
		eventually(t, "all processors take part", func() bool {
			p.spread(slices.Repeat([]func(){part}, 20))
			return most.Load() >= n
		})
		if most.Load() > n || atWork.Load() != 0 {
			t.Errorf("%d parts at once on %d processors, %d not ended", most.Load(), n, atWork.Load())
		}
	})
}

func TestSpreadWithoutHelpDoesAllItself(t *testing.T) {
	t.Parallel()
	withProcessors(t, 1, func(p processors) {
		done := 0 // no lock: the race detector would tell
		part := func() { done++ }
		if p.spread([]func(){part, part, part}); done != 3 {
			t.Errorf("%d parts done", done)
		}
	})
}

func TestPanicOfAPartIsTheCallers(t *testing.T) {
	t.Parallel()
	err := errors.New("none")
	withProcessors(t, 2, func(p processors) {
		defer recoverCodec("resize", &err)
		boom := func() { panic("bad row") }
		p.spread([]func(){boom, boom, boom, boom})
	})
	if errorCode(err) != "decoder_panic" || !strings.Contains(err.Error(), "bad row") {
		t.Errorf("got %v", err)
	}
}

// Bands meet without a seam, whoever works on them: the result is the same, byte
// by byte, on one processor and on several.
func TestBandsAreOneImage(t *testing.T) {
	t.Parallel()
	data := encodedJPEG(t, photo(300, 601), 90)
	h := headerOf(t, data)
	h.Orientation = 6
	for _, side := range []int{601, 333, 1} {
		alone, err := decodeImage(data, h, side, imageTools{})
		if err != nil {
			t.Fatal(err)
		}
		withProcessors(t, 3, func(p processors) {
			for range 2 {
				helped, err := decodeImage(data, h, side, imageTools{spread: p.spread})
				if err != nil {
					t.Error(err)
					return
				}
				a, b := alone.img.(*image.YCbCr), helped.img.(*image.YCbCr)
				if !bytes.Equal(a.Y, b.Y) || !bytes.Equal(a.Cb, b.Cb) || !bytes.Equal(a.Cr, b.Cr) {
					t.Errorf("side %d: with help it is another image", side)
				}
			}
		})
	}
}
