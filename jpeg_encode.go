package main

import (
	"encoding/binary"
	"image"
	"math"
	"math/bits"
)

// The JPEG encoder. It differs from image/jpeg in what it costs and what it
// yields: Huffman tables made for the image (ITU-T T.81, annex K.2) and
// progressive scans (annex G, spectral selection alone), which take 5 % off
// photos and far more off what is flat; and planes are read as they are.
//
// One pass over the blocks transforms, quantises and writes down each scan's
// symbols as tokens. They tell what tables fit; then they are spelled in them.

// encodeJPEGPlanes encodes an *image.Gray or a 4:2:0 *image.YCbCr, whose
// bounds begin at zero. quality is 1 to 100 and means what it does to libjpeg.
func encodeJPEGPlanes(img image.Image, quality int, b *buffers) []byte {
	e := newJPEGEncoder(img, quality, b)
	for row := range e.mcuRows {
		e.encodeRow(row)
	}
	for i := range e.scans {
		e.scans[i].flushRun()
	}
	return e.assemble(img.Bounds().Size())
}

// jpegEncoder holds an image on its way.
type jpegEncoder struct {
	components []jpegComponent
	mcuRows    int
	mcuColumns int
	quantisers []quantiser // luma's, and chroma's if there is any
	scans      []jpegScan  // in the order of the file; the first is of all DC coefficients
}

// jpegComponent is a plane and how it is cut into blocks.
type jpegComponent struct {
	pix           []byte
	stride        int
	width, height int
	factor        int // sampling factor, both ways
	columns, rows int // blocks that hold samples; MCUs may have more
	quantiser     *quantiser
	previous      int   // DC of the block before
	dc            []int // of the MCU row in hand, block row by block row
	scans         []int // that take its AC coefficients
}

// jpegScan is the symbols of one scan (T.81, B.2.3), of the coefficients from
// first to last in zigzag order.
type jpegScan struct {
	components  []int
	first, last int
	emptyBlocks int // ended blocks not yet written: an end-of-band run (G.1.2.2)
	tokens      tokenList
	counts      [2][256]int // how often a symbol is used, for each table
	tables      int
}

// jpegScript is the division into scans: what shows most goes first. Each
// component's AC coefficients are a scan of their own, as they must be (G.1.1.1.1).
func jpegScript(components int) []jpegScan {
	if components == 1 {
		return []jpegScan{
			{components: []int{0}, tables: 1},
			{components: []int{0}, first: 1, last: 5, tables: 1},
			{components: []int{0}, first: 6, last: 63, tables: 1},
		}
	}
	return []jpegScan{
		{components: []int{0, 1, 2}, tables: 2},
		{components: []int{0}, first: 1, last: 5, tables: 1},
		{components: []int{1}, first: 1, last: 63, tables: 1},
		{components: []int{2}, first: 1, last: 63, tables: 1},
		{components: []int{0}, first: 6, last: 63, tables: 1},
	}
}

func newJPEGEncoder(img image.Image, quality int, b *buffers) *jpegEncoder {
	e := &jpegEncoder{quantisers: make([]quantiser, 1, 2)}
	e.quantisers[0] = newQuantiser(&lumaQuantisation, quality)
	size := img.Bounds().Size()
	switch m := img.(type) {
	case *image.Gray:
		e.components = []jpegComponent{{pix: m.Pix, stride: m.Stride, width: size.X, height: size.Y, factor: 1}}
	case *image.YCbCr:
		e.quantisers = append(e.quantisers, newQuantiser(&chromaQuantisation, quality))
		w, h := (size.X+1)/2, (size.Y+1)/2
		e.components = []jpegComponent{
			{pix: m.Y, stride: m.YStride, width: size.X, height: size.Y, factor: 2},
			{pix: m.Cb, stride: m.CStride, width: w, height: h, factor: 1},
			{pix: m.Cr, stride: m.CStride, width: w, height: h, factor: 1},
		}
	}
	side := 8 * e.components[0].factor
	e.mcuColumns, e.mcuRows = (size.X+side-1)/side, (size.Y+side-1)/side
	e.scans = jpegScript(len(e.components))
	for i := range e.scans {
		e.scans[i].tokens.buffers = b
	}
	for i := range e.components {
		c := &e.components[i]
		c.columns, c.rows = (c.width+7)/8, (c.height+7)/8
		c.quantiser = &e.quantisers[min(i, 1)]
		c.dc = make([]int, e.mcuColumns*c.factor*c.factor)
	}
	for i, s := range e.scans[1:] {
		c := &e.components[s.components[0]]
		c.scans = append(c.scans, i+1)
	}
	return e
}

// encodeRow encodes one row of MCUs: AC coefficients block row by block row,
// as scans of one component have them, and then the DC coefficients MCU by MCU.
func (e *jpegEncoder) encodeRow(mcuRow int) {
	stepBack()
	for i := range e.components {
		c := &e.components[i]
		for v := range c.factor {
			e.encodeBlockRow(c, mcuRow*c.factor+v, c.dc[v*e.mcuColumns*c.factor:])
		}
	}
	for column := range e.mcuColumns {
		for i := range e.components {
			c := &e.components[i]
			for v := range c.factor {
				for h := range c.factor {
					e.putDC(c, min(i, 1), c.dc[(v*e.mcuColumns+column)*c.factor+h])
				}
			}
		}
	}
}

// encodeBlockRow puts a block row's AC tokens and keeps its DC coefficients.
// Blocks beyond the component, which fill MCUs up, repeat the last DC: that
// costs the fewest bits.
func (e *jpegEncoder) encodeBlockRow(c *jpegComponent, row int, dc []int) {
	width := e.mcuColumns * c.factor
	if row >= c.rows {
		for i := range width {
			dc[i] = c.dc[width-1]
		}
		return
	}
	var samples, coefficients [64]int
	var edge [64]byte
	for column := range width {
		if column >= c.columns {
			dc[column] = dc[column-1]
			continue
		}
		pix, stride := c.block(column, row, &edge)
		forwardDCT(&samples, pix, stride)
		nonZero := c.quantiser.quantise(&coefficients, &samples)
		dc[column] = coefficients[0]
		for _, i := range c.scans {
			e.scans[i].putAC(&coefficients, nonZero)
		}
	}
}

// block returns a block's samples. One that leaves the component is completed
// in edge by repeating the last row and column (T.81, A.2.4).
func (c *jpegComponent) block(column, row int, edge *[64]byte) (pix []byte, stride int) {
	x, y := 8*column, 8*row
	if x+8 <= c.width && y+8 <= c.height {
		return c.pix[y*c.stride+x:], c.stride
	}
	for i := range edge {
		edge[i] = c.pix[min(y+i/8, c.height-1)*c.stride+min(x+i%8, c.width-1)]
	}
	return edge[:], 8
}

// putDC codes a DC coefficient as its difference from the one before (T.81, F.1.2.1).
func (e *jpegEncoder) putDC(c *jpegComponent, table, value int) {
	e.scans[0].putValue(table, 0, value-c.previous)
	c.previous = value
}

// putAC codes the block's coefficients of this scan (T.81, G.1.2.2). Bit k of
// nonZero tells whether coefficient k is not zero.
func (s *jpegScan) putAC(coefficients *[64]int, nonZero uint64) {
	inBand := nonZero >> s.first << s.first & (1<<(s.last+1) - 1)
	if inBand != 0 {
		s.flushRun()
	}
	next := s.first
	for ; inBand != 0; inBand &= inBand - 1 {
		k := bits.TrailingZeros64(inBand)
		for ; k-next > 15; next += 16 {
			s.put(0, 0xf0, 0, 0) // a run of sixteen zeros
		}
		s.putValue(0, k-next, coefficients[k&63])
		next = k + 1
	}
	if next <= s.last {
		if s.emptyBlocks++; s.emptyBlocks == 1<<15-1 {
			s.flushRun()
		}
	}
}

// flushRun codes the run of ended blocks, if there is one.
func (s *jpegScan) flushRun() {
	if s.emptyBlocks == 0 {
		return
	}
	size := bits.Len(uint(s.emptyBlocks)) - 1
	s.put(0, size<<4, s.emptyBlocks-1<<size, size)
	s.emptyBlocks = 0
}

// putValue codes a value after a run of zeros by its size and its low bits; of
// a negative one, those of the value less one (T.81, F.1.2.1.1).
func (s *jpegScan) putValue(table, run, value int) {
	sign := value >> (bits.UintSize - 1)
	size := bits.Len(uint((value ^ sign) - sign))
	s.put(table, run<<4|size, (value+sign)&(1<<size-1), size)
}

func (s *jpegScan) put(table, symbol, extra, size int) {
	s.counts[table&1][symbol&255]++
	s.tokens.add(uint32(table<<28 | size<<24 | symbol<<16 | extra))
}

// tokenList is a list of tokens: the number of the table (bit 28), how many
// extra bits follow the code (4 bits), the symbol (8 bits) and the extra bits (16).
// It grows by pieces, so that growing copies nothing and holds nothing twice.
type tokenList struct {
	buffers *buffers
	full    [][]uint32
	last    []uint32
}

const tokenPiece = 8 << 10

func (l *tokenList) add(token uint32) {
	if len(l.last) == cap(l.last) {
		l.grow()
	}
	l.last = append(l.last, token)
}

func (l *tokenList) grow() {
	if l.last != nil {
		l.full = append(l.full, l.last)
	}
	l.last = l.buffers.tokenPiece()
}

// giveBack empties the list.
func (l *tokenList) giveBack() {
	for _, piece := range l.full {
		l.buffers.giveBackTokens(piece)
	}
	l.buffers.giveBackTokens(l.last)
	l.full, l.last = nil, nil
}

// assemble writes the file (T.81, annex B).
func (e *jpegEncoder) assemble(size image.Point) []byte {
	tables := make([][2]huffmanTable, len(e.scans))
	length := 1024
	for i := range e.scans {
		for n := range e.scans[i].tables {
			tables[i][n] = newHuffmanTable(&e.scans[i].counts[n])
			length += tables[i][n].length(&e.scans[i].counts[n])
		}
	}
	out := append(make([]byte, 0, length+length/64), 0xff, jpegSOI[0])
	out = e.appendQuantisers(out)
	out = e.appendFrame(out, size)
	for i := range e.scans {
		s := &e.scans[i]
		out = appendHuffmanTables(out, s, tables[i][:s.tables])
		out = appendScanHeader(out, s)
		out = s.appendData(out, &tables[i])
		s.tokens.giveBack() // no longer needed
	}
	return append(out, 0xff, jpegEOI[0])
}

// appendJPEGHead begins a segment whose body is size bytes.
func appendJPEGHead(out []byte, marker string, size int) []byte {
	return binary.BigEndian.AppendUint16(append(out, 0xff, marker[0]), uint16(2+size))
}

func (e *jpegEncoder) appendQuantisers(out []byte) []byte {
	out = appendJPEGHead(out, jpegDQT, 65*len(e.quantisers))
	for i := range e.quantisers {
		out = append(out, byte(i))
		out = append(out, e.quantisers[i].steps[:]...)
	}
	return out
}

func (e *jpegEncoder) appendFrame(out []byte, size image.Point) []byte {
	out = appendJPEGHead(out, jpegSOF2, 6+3*len(e.components))
	out = append(out, 8)
	out = binary.BigEndian.AppendUint16(out, uint16(size.Y))
	out = binary.BigEndian.AppendUint16(out, uint16(size.X))
	out = append(out, byte(len(e.components)))
	for i, c := range e.components {
		out = append(out, byte(i+1), byte(c.factor<<4|c.factor), byte(min(i, 1)))
	}
	return out
}

// appendScanHeader writes SOS. In the scan of DC coefficients the first component
// has a Huffman table of its own and the others share one.
func appendScanHeader(out []byte, s *jpegScan) []byte {
	out = appendJPEGHead(out, jpegSOS, 4+2*len(s.components))
	out = append(out, byte(len(s.components)))
	for i, c := range s.components {
		table := byte(0)
		if s.tables == 2 {
			table = byte(min(i, 1)) << 4
		}
		out = append(out, byte(c+1), table)
	}
	return append(out, byte(s.first), byte(s.last), 0)
}

// appendData spells the tokens. Up to 63 bits wait in pending, the oldest on top;
// after each 0xff byte a zero is stuffed (T.81, F.1.2.3).
func (s *jpegScan) appendData(out []byte, tables *[2]huffmanTable) []byte {
	pending, count := uint64(0), 0
	spell := func(tokens []uint32) {
		stepBack()
		for _, token := range tokens {
			code := tables[token>>28&1].codes[token>>16&255]
			extra := int(token >> 24 & 15)
			size := int(code&31) + extra
			pending = pending<<size | uint64(code>>5)<<extra | uint64(token&0xffff)
			if count += size; count >= 32 {
				count -= 32
				out = appendStuffed(out, uint32(pending>>count))
			}
		}
	}
	for _, piece := range s.tokens.full {
		spell(piece)
	}
	spell(s.tokens.last)
	return appendBits(out, pending, count)
}

// appendBits appends the low count bits of pending, and ones to the end of their
// last byte.
func appendBits(out []byte, pending uint64, count int) []byte {
	fill := -count & 7
	pending, count = pending<<fill|(1<<fill-1), count+fill
	for ; count > 0; count -= 8 {
		b := byte(pending >> (count - 8))
		if out = append(out, b); b == 0xff {
			out = append(out, 0)
		}
	}
	return out
}

// appendStuffed appends four bytes. Most have no 0xff among them, which shows
// at once: only there a byte has its top bit, and has it again after one is added to
// the seven below.
func appendStuffed(out []byte, word uint32) []byte {
	if word&(word&0x7f7f7f7f+0x01010101)&0x80808080 == 0 {
		return binary.BigEndian.AppendUint32(out, word)
	}
	return appendBits(out, uint64(word), 32)
}

// zigzag is the order of the coefficients in a file (T.81, figure A.6).
var zigzag = [64]uint8{
	0, 1, 8, 16, 9, 2, 3, 10, 17, 24, 32, 25, 18, 11, 4, 5,
	12, 19, 26, 33, 40, 48, 41, 34, 27, 20, 13, 6, 7, 14, 21, 28,
	35, 42, 49, 56, 57, 50, 43, 36, 29, 22, 15, 23, 30, 37, 44, 51,
	58, 59, 52, 45, 38, 31, 39, 46, 53, 60, 61, 54, 47, 55, 62, 63,
}

// The tables of T.81, annex K.1, row by row.
var (
	lumaQuantisation = [64]uint8{
		16, 11, 10, 16, 24, 40, 51, 61,
		12, 12, 14, 19, 26, 58, 60, 55,
		14, 13, 16, 24, 40, 57, 69, 56,
		14, 17, 22, 29, 51, 87, 80, 62,
		18, 22, 37, 56, 68, 109, 103, 77,
		24, 35, 55, 64, 81, 104, 113, 92,
		49, 64, 78, 87, 103, 121, 120, 101,
		72, 92, 95, 98, 112, 100, 103, 99,
	}
	chromaQuantisation = [64]uint8{
		17, 18, 24, 47, 99, 99, 99, 99,
		18, 21, 26, 66, 99, 99, 99, 99,
		24, 26, 56, 99, 99, 99, 99, 99,
		47, 66, 99, 99, 99, 99, 99, 99,
		99, 99, 99, 99, 99, 99, 99, 99,
		99, 99, 99, 99, 99, 99, 99, 99,
		99, 99, 99, 99, 99, 99, 99, 99,
		99, 99, 99, 99, 99, 99, 99, 99,
	}
)

// quantiser divides coefficients by their steps, in zigzag order. The scale of
// forwardDCT's output is part of the division.
type quantiser struct {
	steps    [64]uint8
	inverses [64]int // 1<<inverseBits divided by step and scale
}

// inverseBits leaves the product of a coefficient, 21 bits at most, and an inverse within
// 63 bits, and an inverse precise to a millionth.
const inverseBits = 40

// newQuantiser scales a table to a quality as libjpeg's users know it: 50 is
// the table, 100 is all ones.
func newQuantiser(table *[64]uint8, quality int) quantiser {
	scale := 200 - 2*quality
	if quality < 50 {
		scale = 5000 / max(quality, 1)
	}
	var q quantiser
	for k, at := range zigzag {
		step := min(max((int(table[at])*scale+50)/100, 1), 255)
		q.steps[k] = uint8(step)
		unit := 8 * aanScale(int(at)/8) * aanScale(int(at)%8) * float64(step) * (1 << dctBits)
		q.inverses[k] = int(math.Round((1 << inverseBits) / unit))
	}
	return q
}

// quantise rounds to the nearest step; bit k of nonZero tells whether out[k] is not zero.
func (q *quantiser) quantise(out, in *[64]int) (nonZero uint64) {
	for k := range out {
		v := (in[zigzag[k]&63]*q.inverses[k] + 1<<(inverseBits-1)) >> inverseBits
		out[k] = v
		nonZero |= uint64(v|-v) >> 63 << k
	}
	return nonZero
}

// dctBits are the fractional bits of forwardDCT's output. 13 more are those of
// its factors; an int has room for both.
const (
	dctBits    = 6
	factorBits = 13
)

// The factors of the DCT's rotations: cosines of multiples of π/16.
const (
	cos4     = 5793  // cos(4π/16)
	cos6     = 3135  // cos(6π/16)
	cos2Less = 4433  // cos(2π/16) − cos(6π/16)
	cos2More = 10703 // cos(2π/16) + cos(6π/16)
)

// aanScale is what a coefficient of index u is too large by, in each direction.
func aanScale(u int) float64 {
	if u == 0 {
		return 1
	}
	return math.Sqrt2 * math.Cos(float64(u)*math.Pi/16)
}

// forwardDCT transforms a block of samples (T.81, A.3.3) by the method of Arai,
// Agui and Nakajima ("A fast DCT-SQ scheme for images", 1988): five
// multiplications for eight samples, the rest of the scale left to the quantiser.
// Output is row by row, 8·aanScale(u)·aanScale(v) times too large, with dctBits fractional bits.
func forwardDCT(out *[64]int, pix []byte, stride int) {
	for y := 0; y < 64; y += 8 {
		p := pix[:8:8]
		row := out[y : y+8 : y+8]
		row[0], row[1], row[2], row[3], row[4], row[5], row[6], row[7] = dct8(int(p[0])<<dctBits, int(p[1])<<dctBits, int(p[2])<<dctBits,
			int(p[3])<<dctBits, int(p[4])<<dctBits, int(p[5])<<dctBits, int(p[6])<<dctBits, int(p[7])<<dctBits)
		if y < 56 {
			pix = pix[stride:]
		}
	}
	for x := range 8 {
		c := out[x : x+57 : x+57]
		c[0], c[8], c[16], c[24], c[32], c[40], c[48], c[56] = dct8(c[0], c[8], c[16], c[24], c[32], c[40], c[48], c[56])
	}
	out[0] -= 128 * 64 << dctBits // samples are centred on zero (T.81, A.3.1)
}

// dct8 is the transform of eight samples.
func dct8(a, b, c, d, e, f, g, h int) (o0, o1, o2, o3, o4, o5, o6, o7 int) {
	a, h = a+h, a-h
	b, g = b+g, b-g
	c, f = c+f, c-f
	d, e = d+e, d-e

	// Even part.
	a, d = a+d, a-d
	b, c = b+c, b-c
	even := ((c + d) * cos4) >> factorBits
	// Odd part.
	e, f, g = e+f, f+g, g+h
	middle := (f * cos4) >> factorBits
	turn := (e - g) * cos6
	low := (e*cos2Less + turn) >> factorBits
	high := (g*cos2More + turn) >> factorBits
	f, h = h-middle, h+middle
	return a + b, h + high, d + even, f - low, a - b, f + low, d - even, h - high
}
