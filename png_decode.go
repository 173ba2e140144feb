package main

import (
	"bytes"
	"compress/zlib"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"image"
	"io"
	"strings"
)

// The PNG decoder (PNG specification, third edition). It accepts what image/png
// does, and differs in what it holds: rows are resized as they are unpacked, so
// there are never more than two. An interlaced image does not come from the top
// down, and is put together first, at eight bits a sample.

// What is wrong with a PNG.
var (
	errPNGChecksum     = errors.New("invalid checksum")
	errPNGOrder        = errors.New("chunk out of order")
	errPNGPalette      = errors.New("bad palette")
	errPNGTransparency = errors.New("bad transparency")
	errPNGEnd          = errors.New("bad end")
	errPNGFilter       = errors.New("bad filter type")
	errPNGLong         = errors.New("too much pixel data")
)

// Colour types (PNG specification, 11.2.1).
const (
	pngGrey            = 0
	pngTruecolour      = 2
	pngIndexed         = 3
	pngGreyAlpha       = 4
	pngTruecolourAlpha = 6
)

// pngDepths has the bits that a sample may have, by colour type.
var pngDepths = map[byte]string{
	pngGrey:            "\x01\x02\x04\x08\x10",
	pngTruecolour:      "\x08\x10",
	pngIndexed:         "\x01\x02\x04\x08",
	pngGreyAlpha:       "\x08\x10",
	pngTruecolourAlpha: "\x08\x10",
}

// pngHeader is what IHDR says.
type pngHeader struct {
	width, height int
	depth         int // bits a sample
	colour        byte
	interlaced    bool
}

// parsePNGHeader reads the body of IHDR, and answers nil if there can be no such image.
func parsePNGHeader(body []byte) *pngHeader {
	if len(body) != 13 || strings.IndexByte(pngDepths[body[9]], body[8]) < 0 || body[10] != 0 || body[11] != 0 || body[12] > 1 {
		return nil
	}
	return &pngHeader{
		width: int(binary.BigEndian.Uint32(body)), height: int(binary.BigEndian.Uint32(body[4:])),
		depth: int(body[8]), colour: body[9], interlaced: body[12] == 1,
	}
}

// channels is how many samples a pixel has.
func (h *pngHeader) channels() int {
	return [...]int{pngGrey: 1, pngTruecolour: 3, pngIndexed: 1, pngGreyAlpha: 2, pngTruecolourAlpha: 4}[h.colour]
}

// rowBytes is how long a row is without its filter type.
func (h *pngHeader) rowBytes(width int) int { return (width*h.channels()*h.depth + 7) / 8 }

// cost is what the decoder holds besides the window of inflate, and what an output
// pixel takes: two rows as they are stored, one of 8-bit samples and one of
// RGBA; for an interlaced image all rows as they are resized, too.
func (h *pngHeader) cost(transparent bool) (decode int64, output float64) {
	decode = int64(2*h.rowBytes(h.width) + (h.channels()+4)*h.width)
	perPixel := int64(4)
	switch {
	case h.colour == pngGrey && !transparent:
		perPixel, output = 1, outputGrey
	case h.colour == pngTruecolour && !transparent:
		output = outputRGB
	default:
		output = outputRGBA
	}
	if h.interlaced {
		decode += perPixel * int64(h.width) * int64(h.height)
	}
	return decode, output
}

// decodePNG decodes a PNG, resizes it to w × h stored pixels and turns it upright.
func decodePNG(data []byte, header imageHeader, w, h int, tools imageTools) (out image.Image, err error) {
	defer func() {
		if r := recover(); r != nil {
			bad, ok := r.(pngRowError)
			if !ok {
				panic(r)
			}
			out, err = nil, bad.error
		}
	}()
	p, err := newPNGRows(data, header.png)
	if err != nil {
		return nil, err
	}
	read := p.read
	if p.interlaced {
		read = p.merge()
	}
	d := &storedImage{imageTools: tools, header: header}
	if p.isGrey() {
		out = d.renderGrey(w, h, read)
	} else {
		out = d.renderNRGBA(w, h, read)
	}
	if err := p.finish(); err != nil {
		return nil, err
	}
	return out, nil
}

// pngRows unpacks the rows of a PNG from the top down: as 8-bit grey if the image
// is grey and opaque, else as straight 8-bit RGBA.
type pngRows struct {
	*pngHeader
	palette [256][4]byte // RGBA; opaque black beyond what the file has
	key     []byte       // the pixel that is transparent, in 8-bit samples, or 16-bit ones as stored; nil if there is none
	scale   byte         // makes a grey sample of less than 8 bits one of 8
	idat    idatReader
	stream  io.Reader // idat, inflated

	current, above []byte // as stored: the filter type, the row; above the first row are zeros
	samples, rgba  []byte // the row in 8-bit samples, and as RGBA
	out            []byte // what read answers
	next, end      int    // rows of the image, or of a pass
}

func newPNGRows(data []byte, h *pngHeader) (*pngRows, error) {
	p := &pngRows{pngHeader: h, scale: 1}
	if h.colour == pngGrey && h.depth < 8 {
		p.scale = byte(255 / (1<<h.depth - 1))
	}
	for i := range p.palette {
		p.palette[i] = [4]byte{3: 255}
	}
	if err := p.readChunks(data); err != nil {
		return nil, err
	}
	stream, err := zlib.NewReader(&p.idat)
	if err != nil {
		return nil, err
	}
	p.stream = stream
	p.current, p.above = make([]byte, 1+h.rowBytes(h.width)), make([]byte, 1+h.rowBytes(h.width))
	p.samples = make([]byte, h.channels()*h.width)
	if !p.isGrey() {
		p.rgba = make([]byte, 4*h.width)
	}
	p.begin(h.width, h.height)
	return p, nil
}

// isGrey reports whether rows are grey, else they are RGBA.
func (p *pngRows) isGrey() bool { return p.colour == pngGrey && p.key == nil }

// readChunks checks all chunks and takes what is needed to read rows: the palette,
// what is transparent, and where the pixels begin.
func (p *pngRows) readChunks(data []byte) (err error) {
	seen := "IHDR" // the last chunk whose place matters (5.6)
	rest := data[len(pngSignature):]
	for c := range pngChunks(data) {
		covered, sum := c.raw[4:len(c.raw)-4], c.raw[len(c.raw)-4:]
		if crc32.ChecksumIEEE(covered) != binary.BigEndian.Uint32(sum) {
			return errPNGChecksum
		}
		switch c.kind {
		case "PLTE":
			err, seen = p.readPalette(c.body, seen), c.kind
		case "tRNS":
			err, seen = p.readTransparency(c.body, seen), c.kind
		case "IDAT":
			if seen == "IHDR" && p.colour == pngIndexed {
				return errPNGOrder
			}
			if seen != "IDAT" {
				p.idat.rest = rest
			}
			seen = c.kind
		case "IEND":
			if len(c.body) != 0 {
				return errPNGEnd
			}
			return nil
		}
		if err != nil {
			return err
		}
		rest = rest[len(c.raw):]
	}
	return io.ErrUnexpectedEOF
}

// readPalette reads PLTE, which comes first. An image of true colour may have one
// too, as a hint.
func (p *pngRows) readPalette(body []byte, seen string) error {
	if seen != "IHDR" {
		return errPNGOrder
	}
	colours := len(body) / 3
	if p.colour&pngTruecolour == 0 || len(body)%3 != 0 || colours < 1 || colours > min(256, 1<<p.depth) {
		return errPNGPalette
	}
	for i := range colours {
		copy(p.palette[i][:], body[3*i:][:3])
	}
	return nil
}

// readTransparency reads tRNS, which comes before the pixels and after a palette.
func (p *pngRows) readTransparency(body []byte, seen string) error {
	switch {
	case seen == "tRNS" || seen == "IDAT":
		return errPNGOrder
	case p.colour == pngIndexed && seen == "PLTE" && len(body) <= 256:
		for i, alpha := range body {
			p.palette[i][3] = alpha
		}
		return nil
	case (p.colour == pngGrey || p.colour == pngTruecolour) && len(body) == 2*p.channels():
		p.key = body
		if p.depth < 16 { // the upper byte of each sample does not count
			p.key = make([]byte, p.channels())
			for i := range p.key {
				p.key[i] = body[2*i+1] * p.scale
			}
		}
		return nil
	}
	return errPNGTransparency
}

// idatReader reads the bodies of consecutive IDAT chunks as one.
type idatReader struct {
	body []byte // of the chunk in hand
	rest []byte // of the file
}

// Read reads no further than to the end of a chunk: what is left of it when the
// stream ends is an error, what is left of the file is not.
func (r *idatReader) Read(b []byte) (int, error) {
	for len(r.body) == 0 {
		c, ok := pngChunkAt(r.rest)
		if !ok || c.kind != "IDAT" {
			return 0, io.EOF
		}
		r.body, r.rest = c.body, r.rest[len(c.raw):]
	}
	n := copy(b, r.body)
	r.body = r.body[n:]
	return n, nil
}

// begin makes ready for an image of that size, or a pass of it.
func (p *pngRows) begin(width, height int) {
	p.next, p.end = 0, height
	n := 1 + p.rowBytes(width)
	p.current, p.above = p.current[:n], p.above[:n]
	p.samples = p.samples[:p.channels()*width]
	if !p.isGrey() {
		p.rgba = p.rgba[:4*width]
	}
	clear(p.above)
	p.out = p.convert(p.above[1:])
}

// pngRowError is what read panics with, and decodePNG recovers: nobody between them
// could go on, and resizing what is left would cost as much as a good image.
type pngRowError struct{ error }

// read answers row y; it only goes forward, and panics with a pngRowError. The row
// is the caller's until the next one is read.
func (p *pngRows) read(y int) []byte {
	for ; p.next <= y; p.next++ {
		if err := p.unpack(); err != nil {
			panic(pngRowError{fmt.Errorf("row %d: %w", p.next, err)})
		}
		p.out = p.convert(p.current[1:])
		p.current, p.above = p.above, p.current
	}
	return p.out
}

// unpack reads the next row as it is stored.
func (p *pngRows) unpack() error {
	if _, err := io.ReadFull(p.stream, p.current); err != nil {
		return err
	}
	return unfilter(p.current[0], p.current[1:], p.above[1:], max(1, p.channels()*p.depth/8))
}

// finish reads what is left, to the end and its checksum, and answers what was
// wrong anywhere.
func (p *pngRows) finish() error {
	p.read(p.end - 1)
	_, err := io.ReadFull(p.stream, p.current[:1])
	switch {
	case err == nil || err == io.EOF && len(p.idat.body) > 0:
		return errPNGLong
	case err != io.EOF:
		return err
	}
	return nil
}

// adam7 are the passes of an interlaced image (8.1): the first pixel of each, and
// the steps to its next.
var adam7 = [7]struct{ x, y, dx, dy int }{
	{0, 0, 8, 8}, {4, 0, 8, 8}, {0, 4, 4, 8}, {2, 0, 4, 4}, {0, 2, 2, 4}, {1, 0, 2, 2}, {0, 1, 1, 2},
}

// merge reads all passes of an interlaced image, and answers a reader of the
// rows that they make.
func (p *pngRows) merge() func(y int) []byte {
	channels := 4
	if p.isGrey() {
		channels = 1
	}
	stride := channels * p.width
	pix := make([]byte, stride*p.height)
	for _, pass := range adam7 {
		width, height := ceilDiv(p.width-pass.x, pass.dx), ceilDiv(p.height-pass.y, pass.dy)
		if width == 0 || height == 0 {
			continue
		}
		p.begin(width, height)
		g := grid{pix: pix, channels: channels, origin: pass.y*p.width + pass.x, dx: pass.dx, dy: pass.dy * p.width}
		for y := range height {
			g.put(y, p.read(y))
		}
	}
	return func(y int) []byte { return pix[y*stride:][:stride] }
}

// convert makes a stored row what read answers.
func (p *pngRows) convert(stored []byte) []byte {
	samples := p.samples
	switch {
	case p.depth == 8:
		samples = stored
	case p.depth == 16:
		narrow16(samples, stored)
	default:
		spreadBits(samples, stored, p.depth, p.scale)
	}
	if p.isGrey() {
		return samples
	}
	p.toRGBA(samples)
	if p.depth == 16 {
		samples = stored // all bits are compared
	}
	hideKey(p.rgba, samples, p.key)
	return p.rgba
}

func (p *pngRows) toRGBA(in []byte) {
	out := p.rgba
	switch p.colour {
	case pngGrey:
		for ; len(in) >= 1 && len(out) >= 4; in, out = in[1:], out[4:] {
			*(*[4]byte)(out) = [4]byte{in[0], in[0], in[0], 255}
		}
	case pngGreyAlpha:
		for ; len(in) >= 2 && len(out) >= 4; in, out = in[2:], out[4:] {
			*(*[4]byte)(out) = [4]byte{in[0], in[0], in[0], in[1]}
		}
	case pngIndexed:
		for ; len(in) >= 1 && len(out) >= 4; in, out = in[1:], out[4:] {
			*(*[4]byte)(out) = p.palette[in[0]]
		}
	case pngTruecolour:
		for ; len(in) >= 3 && len(out) >= 4; in, out = in[3:], out[4:] {
			*(*[4]byte)(out) = [4]byte{in[0], in[1], in[2], 255}
		}
	case pngTruecolourAlpha:
		copy(out, in)
	}
}

// hideKey makes the pixels transparent that are key, unless that is nil.
func hideKey(rgba, pixels, key []byte) {
	if key == nil {
		return
	}
	for ; len(pixels) > 0; pixels, rgba = pixels[len(key):], rgba[4:] {
		if bytes.Equal(pixels[:len(key)], key) {
			rgba[3] = 0
		}
	}
}

// spreadBits gives samples of less than a byte, the leftmost in the highest bits,
// one each, times scale.
func spreadBits(dst, src []byte, depth int, scale byte) {
	for x := range dst {
		bit := x * depth
		dst[x] = src[bit/8] << (bit % 8) >> (8 - depth) * scale
	}
}

// narrow16 reduces big-endian 16-bit samples to 8 bits, to the nearest.
func narrow16(dst, src []byte) {
	for i := range dst {
		v := uint32(src[2*i])<<8 | uint32(src[2*i+1])
		dst[i] = uint8((v*255 + 32767) / 65535)
	}
}

// unfilter restores a row in place (9.2); step is how many bytes a pixel has.
func unfilter(filter byte, row, above []byte, step int) error {
	switch filter {
	case 0:
	case 1:
		left := row[:len(row)-step]
		rest := row[step:][:len(left)]
		for i, v := range left {
			rest[i] += v
		}
	case 2:
		above = above[:len(row)]
		for i := range row {
			row[i] += above[i]
		}
	case 3:
		unfilterAverage(row, above, step)
	case 4:
		unfilterPaeth(row, above, step)
	default:
		return errPNGFilter
	}
	return nil
}

func unfilterAverage(row, above []byte, step int) {
	for i := range step {
		row[i] += above[i] / 2
	}
	left := row[:len(row)-step]
	rest, above := row[step:][:len(left)], above[step:][:len(left)]
	for i, v := range left {
		rest[i] += byte((uint(v) + uint(above[i])) / 2)
	}
}

func unfilterPaeth(row, above []byte, step int) {
	for i := range step { // all but the one above is zero
		row[i] += above[i]
	}
	left, corner := row[:len(row)-step], above[:len(row)-step]
	rest, above := row[step:][:len(left)], above[step:][:len(left)]
	corner = corner[:len(left)]
	for i, v := range left {
		rest[i] += paeth(v, above[i], corner[i])
	}
}

// paeth is whichever is nearest to left + above - corner (9.4), without branches.
func paeth(left, above, corner byte) byte {
	a, b := int(above)-int(corner), int(left)-int(corner) // from left, and from above
	c := abs(a + b)
	a, b = abs(a), abs(b)
	if b < a {
		a, left = b, above
	}
	if c < a {
		left = corner
	}
	return left
}

func abs(x int) int { return max(x, -x) }
