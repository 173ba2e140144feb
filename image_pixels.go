package main

import (
	"fmt"
	"image"
	"image/color"
	"math"
)

// orientation is EXIF's: how the stored rows and columns lie on the upright
// image. 0 and 1 are upright already.
type orientation uint8

func (o orientation) turns() bool      { return o > 1 }
func (o orientation) transposes() bool { return o >= 5 }

// mirrorsX: stored columns run backwards. mirrorsY: stored rows do.
func (o orientation) mirrorsX() bool { return o == 2 || o == 3 || o == 7 || o == 8 }
func (o orientation) mirrorsY() bool { return o == 3 || o == 4 || o == 6 || o == 7 }

// size is the upright size of a stored image of w × h.
func (o orientation) size(w, h int) (int, int) {
	if o.transposes() {
		return h, w
	}
	return w, h
}

// grid is a block of samples into which stored rows are written upright, so
// that turning needs neither a second image nor a second pass.
type grid struct {
	pix            []byte
	channels       int
	origin, dx, dy int // stored sample (x, y) lies at channels × (origin + x·dx + y·dy)
}

// newGrid writes w × h stored samples into pix, whose rows are stride bytes.
func newGrid(pix []byte, stride, channels, w, h int, o orientation) grid {
	stride /= channels
	g := grid{pix: pix, channels: channels, dx: 1, dy: stride}
	if o.transposes() {
		g.dx, g.dy = stride, 1
	}
	if o.mirrorsX() {
		g.origin += (w - 1) * g.dx
		g.dx = -g.dx
	}
	if o.mirrorsY() {
		g.origin += (h - 1) * g.dy
		g.dy = -g.dy
	}
	return g
}

// put writes stored row y.
func (g grid) put(y int, row []byte) {
	at := g.channels * (g.origin + y*g.dy)
	if g.dx == 1 {
		copy(g.pix[at:], row)
		return
	}
	step := g.channels * g.dx
	for ; len(row) > 0; row = row[g.channels:] {
		copy(g.pix[at:], row[:g.channels])
		at += step
	}
}

// render resizes the image to w × h stored pixels and turns it upright. The
// result is *image.Gray, *image.YCbCr (4:2:0) or *image.NRGBA.
func (d *storedImage) render(w, h int) image.Image {
	whole := d.frame == image.Rect(0, 0, d.header.Width, d.header.Height)
	switch m := d.pixels.(type) {
	case *image.Gray:
		return d.renderGrey(w, h, func(y int) []byte { return m.Pix[y*m.Stride:] })
	case *image.YCbCr:
		if whole && m.SubsampleRatio == image.YCbCrSubsampleRatio420 {
			return d.renderYCbCr(w, h, m)
		}
	}
	return d.renderNRGBA(w, h, d.rowReader())
}

func (d *storedImage) renderGrey(w, h int, read func(y int) []byte) image.Image {
	out := d.buffers.grey(uprightRect(w, h, d.header.Orientation))
	lumaResampler(out.Pix, out.Stride, d.header, w, h).feed(read, d.header.Height)
	return out
}

func uprightRect(w, h int, o orientation) image.Rectangle {
	w, h = o.size(w, h)
	return image.Rect(0, 0, w, h)
}

// renderYCbCr resizes each plane of 4:2:0, as a WebP's and our own are, without a
// detour by RGB. decodeJPEG does so for the other kinds.
func (d *storedImage) renderYCbCr(w, h int, m *image.YCbCr) image.Image {
	out := d.buffers.yCbCr(uprightRect(w, h, d.header.Orientation))
	plane := func(r *resampler, src []byte, stride int) func() {
		return func() { r.feed(func(y int) []byte { return src[y*stride:] }, r.vertical.source) }
	}
	d.run([]func(){
		plane(lumaResampler(out.Y, out.YStride, d.header, w, h), m.Y, m.YStride),
		plane(chromaResampler(out.Cb, out.CStride, d.header, w, h, 2, 2), m.Cb, m.CStride),
		plane(chromaResampler(out.Cr, out.CStride, d.header, w, h, 2, 2), m.Cr, m.CStride),
	})
	return out
}

// lumaResampler resizes a plane of src's size to w × h stored samples in pix.
func lumaResampler(pix []byte, stride int, src imageHeader, w, h int) *resampler {
	g := newGrid(pix, stride, 1, w, h, src.Orientation)
	return newResampler(1, lumaAxis(src.Width, w), lumaAxis(src.Height, h), g.put)
}

// chromaResampler resizes a plane whose samples cover subX × subY pixels of src each
// to one of 4:2:0 for w × h stored pixels.
func chromaResampler(pix []byte, stride int, src imageHeader, w, h, subX, subY int) *resampler {
	o := src.Orientation
	horizontal := chromaAxis(src.Width, w, subX, o.mirrorsX())
	vertical := chromaAxis(src.Height, h, subY, o.mirrorsY())
	g := newGrid(pix, stride, 1, len(horizontal.taps), len(vertical.taps), o)
	return newResampler(1, horizontal, vertical, g.put)
}

func lumaAxis(src, dst int) axis {
	return newAxis(src, dst, float64(src)/float64(dst), 0)
}

// chromaAxis makes chroma samples that cover two output pixels each, of source
// samples that cover sub source pixels each (centred, as JFIF has it).
// An odd output length leaves the last sample a pixel short. If the axis is
// mirrored afterwards that must be the first, so the samples begin a pixel early.
func chromaAxis(src, dst, sub int, mirrored bool) axis {
	pixel := float64(src) / float64(dst) / float64(sub) // an output pixel in chroma samples
	offset := 0.0
	if mirrored && dst%2 == 1 {
		offset = -pixel
	}
	return newAxis((src+sub-1)/sub, (dst+1)/2, 2*pixel, offset)
}

// renderNRGBA goes by RGBA, premultiplied while it is resized, so that the
// colour of transparent pixels does not bleed into the others. What is not
// resized is not premultiplied either, and so stays exact. A row that is read
// may be changed until the next is.
func (d *storedImage) renderNRGBA(w, h int, read func(y int) []byte) image.Image {
	src, o := d.header, d.header.Orientation
	out := d.buffers.nrgba(uprightRect(w, h, o))
	g := newGrid(out.Pix, out.Stride, 4, w, h, o)
	if w == src.Width && h == src.Height {
		for y := range h {
			row := read(y)
			clearTransparent(row)
			g.put(y, row)
		}
		return out
	}
	premultiplied := func(y int) []byte {
		row := read(y)
		premultiply(row)
		return row
	}
	newResampler(4, lumaAxis(src.Width, w), lumaAxis(src.Height, h), func(y int, row []byte) {
		unpremultiply(row)
		g.put(y, row)
	}).feed(premultiplied, src.Height)
	return out
}

// rowReader returns a function that reads a row of the whole image as straight
// 8-bit RGBA. The row is the caller's until the next one is read.
func (d *storedImage) rowReader() func(y int) []byte {
	row := make([]byte, 4*d.header.Width)
	part := row[4*d.frame.Min.X : 4*d.frame.Max.X]
	convert := rowConverter(d.pixels)
	return func(y int) []byte {
		if y < d.frame.Min.Y || y >= d.frame.Max.Y {
			clear(part)
		} else {
			convert(part, y-d.frame.Min.Y)
		}
		return row
	}
}

// rowConverter returns a function that writes row y, counted from the top of
// img, as straight 8-bit RGBA. It knows what the decoders return.
func rowConverter(img image.Image) func(dst []byte, y int) {
	switch m := img.(type) {
	case *image.RGBA: // the decoders make only opaque ones, which are straight too
		return func(dst []byte, y int) { copy(dst, m.Pix[y*m.Stride:]) }
	case *image.NRGBA:
		return func(dst []byte, y int) { copy(dst, m.Pix[y*m.Stride:]) }
	case *image.Paletted:
		return palettedRows(m)
	case *image.CMYK:
		return func(dst []byte, y int) { cmykRow(dst, m.Pix[y*m.Stride:]) }
	case *image.YCbCr:
		return func(dst []byte, y int) { yCbCrRow(dst, m, y) }
	case *image.NYCbCrA:
		return func(dst []byte, y int) {
			yCbCrRow(dst, &m.YCbCr, y)
			for x, a := range m.A[y*m.AStride:][:len(dst)/4] {
				dst[4*x+3] = a
			}
		}
	}
	panic(fmt.Sprintf("no decoder answers %T", img))
}

func palettedRows(m *image.Paletted) func(dst []byte, y int) {
	var table [256][4]byte
	for i, c := range m.Palette {
		n := color.NRGBAModel.Convert(c).(color.NRGBA)
		table[i] = [4]byte{n.R, n.G, n.B, n.A}
	}
	return func(dst []byte, y int) {
		for x, index := range m.Pix[y*m.Stride:][:len(dst)/4] {
			copy(dst[4*x:], table[index][:])
		}
	}
}

func cmykRow(dst, src []byte) {
	for i := 0; i+4 <= len(dst); i += 4 {
		dst[i], dst[i+1], dst[i+2] = color.CMYKToRGB(src[i], src[i+1], src[i+2], src[i+3])
		dst[i+3] = 255
	}
}

func yCbCrRow(dst []byte, m *image.YCbCr, y int) {
	for x := range len(dst) / 4 {
		px, py := m.Rect.Min.X+x, m.Rect.Min.Y+y
		yi, ci := m.YOffset(px, py), m.COffset(px, py)
		dst[4*x], dst[4*x+1], dst[4*x+2] = color.YCbCrToRGB(m.Y[yi], m.Cb[ci], m.Cr[ci])
		dst[4*x+3] = 255
	}
}

func premultiply(row []byte) {
	for ; len(row) >= 4; row = row[4:] {
		if a := uint32(row[3]); a != 255 {
			for i, v := range row[:3] {
				row[i] = uint8((uint32(v)*a + 127) / 255)
			}
		}
	}
}

// unpremultiply also bounds the colours by alpha, above which the kernel's
// overshoot may have taken them.
func unpremultiply(row []byte) {
	for ; len(row) >= 4; row = row[4:] {
		a := uint32(row[3])
		if a == 255 {
			continue
		}
		for i, v := range row[:3] {
			row[i] = uint8((min(uint32(v), a)*255 + a/2) / max(a, 1))
		}
	}
}

// clearTransparent blackens what cannot be seen: it only costs bytes, and may
// be what somebody meant to remove.
func clearTransparent(row []byte) {
	for ; len(row) >= 4; row = row[4:] {
		if row[3] == 0 {
			row[0], row[1], row[2] = 0, 0, 0
		}
	}
}

// expandVideoRange stretches the planes of a lossy WebP in place: VP8 has luma
// from 16 to 235 and chroma from 16 to 240 (RFC 6386, section 9.2, by
// way of ITU-R BT.601), and the decoder hands them out so, while image.YCbCr and
// JPEG mean the full range.
func expandVideoRange(img image.Image) {
	var m *image.YCbCr
	switch p := img.(type) {
	case *image.YCbCr:
		m = p
	case *image.NYCbCrA:
		m = &p.YCbCr
	default:
		return
	}
	stretch(m.Y, 16, 219, 0)
	stretch(m.Cb, 128, 224, 128)
	stretch(m.Cr, 128, 224, 128)
}

// stretch maps samples so that from becomes to and a range of span the full one.
func stretch(plane []byte, from, span, to int) {
	var table [256]byte
	for v := range table {
		full := math.Round(float64(v-from) * 255 / float64(span))
		table[v] = uint8(min(max(int(full)+to, 0), 255))
	}
	for i, v := range plane {
		plane[i] = table[v]
	}
}

// greyOf returns an opaque image's grey form, or nil if it has any colour.
func greyOf(m *image.NRGBA, b *buffers) *image.Gray {
	for i := 0; i+4 <= len(m.Pix); i += 4 {
		if m.Pix[i] != m.Pix[i+1] || m.Pix[i] != m.Pix[i+2] {
			return nil
		}
	}
	out := b.grey(m.Rect)
	for i := range out.Pix {
		out.Pix[i] = m.Pix[4*i]
	}
	return out
}

// palettedOf returns an image's form with a palette, or nil if it has more
// than 256 colours.
func palettedOf(m *image.NRGBA) *image.Paletted {
	indexes := make(map[color.NRGBA]uint8, 256)
	out := image.NewPaletted(m.Rect, nil)
	for i := range out.Pix {
		p := m.Pix[4*i:][:4]
		c := color.NRGBA{p[0], p[1], p[2], p[3]}
		index, ok := indexes[c]
		if !ok {
			if len(indexes) == 256 {
				return nil
			}
			index = uint8(len(indexes))
			indexes[c] = index
			out.Palette = append(out.Palette, c)
		}
		out.Pix[i] = index
	}
	return out
}

// planesOf converts an opaque image to YCbCr (JFIF 1.02) of half as many chroma
// samples each way, each the mean of its four pixels'. The factors are JFIF's in
// units of 1/65536; chroma's sum of four pixels is two bits longer.
func planesOf(m *image.NRGBA, b *buffers) *image.YCbCr {
	out := b.yCbCr(m.Rect)
	w, h := m.Rect.Dx(), m.Rect.Dy()
	for y := range h {
		row, luma := m.Pix[y*m.Stride:], out.Y[y*out.YStride:][:w]
		for x := range luma {
			p := row[4*x:][:3]
			luma[x] = uint8((19595*uint32(p[0]) + 38470*uint32(p[1]) + 7471*uint32(p[2]) + 1<<15) >> 16)
		}
	}
	for y := range (h + 1) / 2 {
		upper, lower := m.Pix[2*y*m.Stride:], m.Pix[min(2*y+1, h-1)*m.Stride:]
		for x := range (w + 1) / 2 {
			left, right := 8*x, 4*min(2*x+1, w-1)
			p, q, r, s := upper[left:][:3], upper[right:][:3], lower[left:][:3], lower[right:][:3]
			red := int(p[0]) + int(q[0]) + int(r[0]) + int(s[0])
			green := int(p[1]) + int(q[1]) + int(r[1]) + int(s[1])
			blue := int(p[2]) + int(q[2]) + int(r[2]) + int(s[2])
			const middle, half = 128 << 18, 1 << 17
			at := y*out.CStride + x
			out.Cb[at] = uint8(min((-11056*red-21712*green+32768*blue+middle+half)>>18, 255))
			out.Cr[at] = uint8(min((32768*red-27440*green-5328*blue+middle+half)>>18, 255))
		}
	}
	return out
}
