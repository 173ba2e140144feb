package main

import (
	"image"
	"image/png"
	"math/bits"
	"sync"
)

// buffers are memory that images leave to those after them: what is large, lives
// for one image, and would otherwise be the garbage collector's most frequent
// work. Who gives something back must have no reference to it left. The zero value
// is ready; nil allocates anew each time.
//
// What lies here unused belongs to no image and is in no image's cost. The garbage
// collector takes it away.
type buffers struct {
	planes [64]sync.Pool // *[]byte, by how many bits its capacity has
	tokens sync.Pool     // *[tokenPiece]uint32
	pngs   sync.Pool     // *png.EncoderBuffer
}

// planeSlack is how much larger a buffer may be than the plane that is put into it,
// so that what is held stays what costAt counts.
const planeSlack = 1.25

// plane answers n bytes, in which there may be anything.
func (b *buffers) plane(n int) []byte {
	if b != nil {
		if old, ok := b.planes[bits.Len(uint(n))].Get().(*[]byte); ok && cap(*old) >= n && float64(cap(*old)) <= planeSlack*float64(n) {
			return (*old)[:n]
		}
	}
	return make([]byte, n)
}

func (b *buffers) grey(r image.Rectangle) *image.Gray {
	return &image.Gray{Pix: b.plane(r.Dx() * r.Dy()), Stride: r.Dx(), Rect: r}
}

func (b *buffers) nrgba(r image.Rectangle) *image.NRGBA {
	return &image.NRGBA{Pix: b.plane(4 * r.Dx() * r.Dy()), Stride: 4 * r.Dx(), Rect: r}
}

// yCbCr answers planes of 4:2:0, which are parts of one buffer.
func (b *buffers) yCbCr(r image.Rectangle) *image.YCbCr {
	w, h := r.Dx(), r.Dy()
	cw, ch := (w+1)/2, (h+1)/2
	all := b.plane(w*h + 2*cw*ch)
	luma, chroma := w*h, cw*ch
	return &image.YCbCr{
		Y: all[:luma], Cb: all[luma : luma+chroma], Cr: all[luma+chroma:],
		YStride: w, CStride: cw, SubsampleRatio: image.YCbCrSubsampleRatio420, Rect: r,
	}
}

// giveBack takes the planes of an image that grey, nrgba or yCbCr answered.
func (b *buffers) giveBack(img image.Image) {
	if b == nil {
		return
	}
	var pix []byte
	switch m := img.(type) {
	case *image.Gray:
		pix = m.Pix
	case *image.NRGBA:
		pix = m.Pix
	case *image.YCbCr:
		pix = m.Y[:cap(m.Y)]
	}
	if pix != nil {
		b.planes[bits.Len(uint(cap(pix)))].Put(&pix)
	}
}

// tokenPiece answers an empty piece of a tokenList.
func (b *buffers) tokenPiece() []uint32 {
	if b != nil {
		if old, ok := b.tokens.Get().(*[tokenPiece]uint32); ok {
			return old[:0]
		}
	}
	return make([]uint32, 0, tokenPiece)
}

func (b *buffers) giveBackTokens(piece []uint32) {
	if b != nil && cap(piece) == tokenPiece {
		b.tokens.Put((*[tokenPiece]uint32)(piece[:tokenPiece]))
	}
}

// Get is png.EncoderBufferPool's; a nil buffer has the encoder make one.
func (b *buffers) Get() *png.EncoderBuffer {
	if b == nil {
		return nil
	}
	old, _ := b.pngs.Get().(*png.EncoderBuffer)
	return old
}

// Put is png.EncoderBufferPool's.
func (b *buffers) Put(used *png.EncoderBuffer) {
	if b != nil {
		b.pngs.Put(used)
	}
}
