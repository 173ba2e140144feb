package main

import (
	"encoding/binary"
	"errors"
	"image"
	"io"
	"slices"
)

// The JPEG decoder. It differs from image/jpeg in what it holds: what is read is
// resized band by band, so of an image in one scan never more than two bands are
// there, and of any other its coefficients, of two bytes each. While the
// components of a band are transformed and resized, the next band is already being read.
// RGB and CMYK, which are rare, are left to image/jpeg.

// What is wrong with a JPEG's segments.
var (
	errJPEGFrames     = errors.New("more than one frame header")
	errJPEGSampling   = errors.New("unknown sampling factors")
	errJPEGScanHeader = errors.New("scan header that cannot be read")
	errJPEGTable      = errors.New("table that cannot be read, or none")
	errJPEGNoScan     = errors.New("component without a scan")
)

// decodeJPEG decodes a grey or YCbCr JPEG, resizes it to w × h stored pixels and
// turns it upright.
func decodeJPEG(data []byte, header imageHeader, w, h int, tools imageTools) (image.Image, error) {
	d, out, err := newJPEGDecoder(header, w, h, tools)
	if err != nil {
		return nil, err
	}
	scanned := false
	for s := range jpegSegments(data) {
		if scanned && isJPEGFrame(s.kind) {
			return nil, errJPEGFrames
		}
		switch s.kind {
		case jpegDQT:
			err = d.readQuantisers(s.body)
		case jpegDHT:
			err = d.readHuffman(s.body)
		case jpegDRI:
			err = d.readInterval(s.body)
		case jpegSOS:
			err = d.readScan(s)
			scanned = true
		case jpegEOI:
			return out, d.finish()
		}
		if err != nil {
			return nil, err
		}
	}
	return nil, io.ErrUnexpectedEOF
}

// jpegDecoder is a JPEG on its way.
type jpegDecoder struct {
	imageTools
	frame    *jpegFrame
	planes   []*jpegPlane
	whole    *jpegBand           // where scans leave their coefficients for each other; nil if there is but one
	steps    [4]*[64]uint16      // of quantisation, in zigzag order
	huffman  [2][4]huffmanLookup // DC and AC
	interval int                 // MCUs between restart markers, zero if there are none
}

// jpegPlane is a component as it is decoded.
type jpegPlane struct {
	jpegSampling
	mcus                   int // in a row
	columns                int // blocks in a row of MCUs
	blocksWide, blocksHigh int // those that hold samples
	height                 int
	steps                  *dequantiser // as the component's first scan finds it
	strip                  []byte       // a row of blocks
	resampler              *resampler
}

// newJPEGDecoder also answers the image that it will fill.
func newJPEGDecoder(header imageHeader, w, h int, tools imageTools) (*jpegDecoder, image.Image, error) {
	f := header.jpeg
	d := &jpegDecoder{imageTools: tools, frame: f}
	for _, s := range f.components {
		if f.components[0].h%s.h != 0 || f.components[0].v%s.v != 0 {
			return nil, nil, errJPEGSampling
		}
		d.planes = append(d.planes, newJPEGPlane(f, s))
	}
	if f.whole {
		d.whole = d.newBand(f.mcuRows())
	}
	return d, d.resizeTo(header, w, h), nil
}

func newJPEGPlane(f *jpegFrame, s jpegSampling) *jpegPlane {
	luma := f.components[0]
	p := &jpegPlane{jpegSampling: s, mcus: f.mcuColumns(), columns: f.mcuColumns() * s.h}
	p.height = ceilDiv(f.height*s.v, luma.v)
	p.blocksWide, p.blocksHigh = ceilDiv(ceilDiv(f.width*s.h, luma.h), 8), ceilDiv(p.height, 8)
	p.strip = make([]byte, 64*p.blocksWide)
	return p
}

// resizeTo gives each plane its resampler, into the image that it answers.
func (d *jpegDecoder) resizeTo(header imageHeader, w, h int) image.Image {
	o := header.Orientation
	luma := d.planes[0]
	if len(d.planes) == 1 {
		out := d.buffers.grey(uprightRect(w, h, o))
		luma.resampler = lumaResampler(out.Pix, out.Stride, header, w, h)
		return out
	}
	out := d.buffers.yCbCr(uprightRect(w, h, o))
	luma.resampler = lumaResampler(out.Y, out.YStride, header, w, h)
	for i, pix := range [][]byte{out.Cb, out.Cr} {
		p := d.planes[1+i]
		p.resampler = chromaResampler(pix, out.CStride, header, w, h, luma.h/p.h, luma.v/p.v)
	}
	return out
}

// readQuantisers reads DQT (ITU-T T.81, B.2.4.1).
func (d *jpegDecoder) readQuantisers(body []byte) error {
	for len(body) > 0 {
		wide, id := int(body[0]>>4), body[0]&15
		body = body[1:]
		size := 64 * (1 + wide)
		if wide > 1 || id > 3 || len(body) < size {
			return errJPEGTable
		}
		var steps [64]uint16
		for k := range steps {
			if wide == 1 {
				steps[k] = binary.BigEndian.Uint16(body[2*k:])
			} else {
				steps[k] = uint16(body[k])
			}
		}
		d.steps[id] = &steps
		body = body[size:]
	}
	return nil
}

// readHuffman reads DHT (T.81, B.2.4.2).
func (d *jpegDecoder) readHuffman(body []byte) error {
	for len(body) > 0 {
		class, id := body[0]>>4, body[0]&15
		if class > 1 || id > 3 {
			return errJPEGTable
		}
		size := d.huffman[class][id].define(body[1:])
		if size == 0 || class == 0 && slices.Max(d.huffman[class][id].symbols) > 15 {
			return errJPEGTable
		}
		body = body[1+size:]
	}
	return nil
}

// readInterval reads DRI (T.81, B.2.4.4).
func (d *jpegDecoder) readInterval(body []byte) error {
	if len(body) != 2 {
		return errJPEGTable
	}
	d.interval = int(binary.BigEndian.Uint16(body))
	return nil
}

// readScan reads SOS and what follows it (T.81, B.2.3).
func (d *jpegDecoder) readScan(s segment) error {
	scan, err := d.newScan(s)
	if err != nil {
		return err
	}
	if d.whole == nil {
		return d.stream(scan)
	}
	rows := d.frame.mcuRows()
	if len(scan.parts) == 1 {
		rows = scan.parts[0].plane.blocksHigh
	}
	return scan.readRows(d.whole, rows)
}

func (d *jpegDecoder) newScan(s segment) (*jpegScanReader, error) {
	n := (len(s.body) - 4) / 2
	if n < 1 || len(s.body) != 4+2*n || int(s.body[0]) != n || d.whole == nil && n != len(d.planes) {
		return nil, errJPEGScanHeader
	}
	scan := &jpegScanReader{last: 63, interval: d.interval}
	scan.data = s.raw[4+len(s.body):]
	refines := false
	if rest := s.body[1+2*n:]; d.frame.progressive {
		scan.first, scan.last, scan.low = int(rest[0]), int(rest[1]), int(rest[2]&15)
		high := int(rest[2] >> 4)
		refines = high != 0
		if scan.last > 63 || scan.first > scan.last || (scan.first == 0) != (scan.last == 0) || scan.first > 0 && n > 1 || scan.low > 13 || refines && high != scan.low+1 {
			return nil, errJPEGScanHeader
		}
	}
	scan.block = scan.decoder(d.frame.progressive, refines)
	for i := range n {
		if err := d.addPart(scan, s.body[1+2*i], s.body[2+2*i], refines); err != nil {
			return nil, err
		}
	}
	blocks := 0
	for _, part := range scan.parts {
		blocks += part.plane.h * part.plane.v
	}
	if n > 1 && blocks > 10 { // T.81, B.2.3
		return nil, errJPEGSampling
	}
	return scan, nil
}

// addPart adds the component of that name to a scan, and the tables that it needs.
func (d *jpegDecoder) addPart(scan *jpegScanReader, id, tables byte, refines bool) error {
	for i, p := range d.planes {
		if p.id != id {
			continue
		}
		part := scanPart{plane: p, index: i}
		for _, other := range scan.parts {
			if other.plane == p {
				return errJPEGScanHeader
			}
		}
		if steps := d.steps[p.table]; p.steps == nil && steps != nil {
			p.steps = newDequantiser(steps)
		}
		if tables>>4 > 3 || tables&15 > 3 {
			return errJPEGScanHeader
		}
		part.dc, part.ac = d.huffman[0][tables>>4].lookup(), d.huffman[1][tables&15].lookup()
		if p.steps == nil || part.dc == nil && scan.first == 0 && !refines || part.ac == nil && scan.last > 0 {
			return errJPEGTable
		}
		scan.parts = append(scan.parts, part)
		return nil
	}
	return errJPEGScanHeader
}

// stream reads the one scan of a sequential image band by band, each while the one
// before it is resized.
func (d *jpegDecoder) stream(scan *jpegScanReader) (err error) {
	if d.planes[0].resampler.next > 0 {
		return nil // another scan of the same
	}
	rows, bandRows := d.frame.mcuRows(), d.frame.bandRows()
	current, coming := d.newBand(bandRows), d.newBand(bandRows)
	read := func() { err = scan.readRows(coming, min(bandRows, rows-coming.first)) }
	read()
	for err == nil && coming.first < rows {
		current, coming = coming, current
		coming.first = current.first + bandRows
		d.run(append([]func(){read}, d.resizing(current)...))
	}
	return err
}

// resizing are the parts of the work that transform and resize a band.
func (d *jpegDecoder) resizing(b *jpegBand) (parts []func()) {
	for i, p := range d.planes {
		parts = append(parts, func() { p.resize(&b.planes[i], b.first*p.v) })
	}
	return parts
}

// finish resizes what had to wait for the last scan.
func (d *jpegDecoder) finish() error {
	for _, p := range d.planes {
		if p.steps == nil {
			return errJPEGNoScan
		}
	}
	if d.whole != nil {
		d.run(d.resizing(d.whole))
	}
	return nil
}

// jpegBand is the coefficients of some rows of MCUs.
type jpegBand struct {
	first  int // row of MCUs
	planes []blockRows
}

// blockRows are a component's blocks in a band, in rows of whole MCUs.
type blockRows struct {
	blocks []jpegBlock
	ends   []uint8 // of each, how many coefficients in zigzag order may be other than zero
}

func (d *jpegDecoder) newBand(rows int) *jpegBand {
	b := new(jpegBand)
	for _, p := range d.planes {
		n := rows * p.v * p.columns
		b.planes = append(b.planes, blockRows{make([]jpegBlock, n), make([]uint8, n)})
	}
	return b
}

// resize transforms blocks, whose first row is of that number, and feeds them to
// the resampler.
func (p *jpegPlane) resize(b *blockRows, first int) {
	stride := 8 * p.blocksWide
	for at, row := 0, first; at < len(b.blocks) && row < p.blocksHigh; at, row = at+p.columns, row+1 {
		for x := range p.blocksWide {
			p.steps.inverseDCT(p.strip[8*x:], stride, &b.blocks[at+x], int(b.ends[at+x]))
		}
		top := 8 * row
		p.resampler.feed(func(y int) []byte { return p.strip[(y-top)*stride:] }, min(top+8, p.height))
	}
}
