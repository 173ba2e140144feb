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

// Bands meet without a seam: the result is the same, byte by byte, as in one piece.
func TestBandsAreOneImage(t *testing.T) {
	t.Parallel()
	m := photo(1500, 2*bandRows+401)
	for _, side := range []int{2 * bandRows, bandRows + 1, 3 * bandRows} {
		d := &storedImage{header: imageHeader{Width: 1500, Height: m.Rect.Dy(), Orientation: 6}, pixels: m, frame: m.Rect}
		w, h := fitInto(1500, m.Rect.Dy(), side)
		var got, want *image.YCbCr
		withProcessors(t, 2, func(p processors) {
			d.spread = p.spread
			got = d.render(w, h).(*image.YCbCr)
		})
		want = d.renderInOnePiece(w, h)
		if !bytes.Equal(got.Y, want.Y) || !bytes.Equal(got.Cb, want.Cb) || !bytes.Equal(got.Cr, want.Cr) {
			t.Errorf("bands differ from one piece at %d×%d", w, h)
		}
	}
}

// renderInOnePiece resizes each plane by itself.
func (d *storedImage) renderInOnePiece(w, h int) *image.YCbCr {
	m, src, o := d.pixels.(*image.YCbCr), d.header, d.header.Orientation
	out := image.NewYCbCr(uprightRect(w, h, o), image.YCbCrSubsampleRatio420)
	one := func(dst, pix []byte, dstStride, stride int, horizontal, vertical axis) {
		g := newGrid(dst, dstStride, 1, len(horizontal.taps), len(vertical.taps), o)
		resample(func(y int) []byte { return pix[y*stride:] }, 1, horizontal, vertical, g.put)
	}
	one(out.Y, m.Y, out.YStride, m.YStride, lumaAxis(src.Width, w), lumaAxis(src.Height, h))
	horizontal := chromaAxis(src.Width, w, 2, o.mirrorsX())
	vertical := chromaAxis(src.Height, h, 2, o.mirrorsY())
	one(out.Cb, m.Cb, out.CStride, m.CStride, horizontal, vertical)
	one(out.Cr, m.Cr, out.CStride, m.CStride, horizontal, vertical)
	return out
}
