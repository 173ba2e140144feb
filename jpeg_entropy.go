package main

import (
	"encoding/binary"
	"errors"
)

// What is wrong with a scan's data.
var (
	errJPEGShort   = errors.New("scan ends early")
	errJPEGCode    = errors.New("no such Huffman code")
	errJPEGRestart = errors.New("restart marker missing or out of order")
)

// bitReader reads a scan's entropy-coded data (ITU-T T.81, F.2.2.5), in which a
// zero is stuffed after each 0xff. At its end, or at a marker, it goes on with
// zeros and counts them: that too much was read is known by overrun.
type bitReader struct {
	data     []byte // not yet taken
	bits     uint64 // taken and not yet read, from the top
	count    int    // how many of them there are
	borrowed int    // how many of them were not in the data
}

// refill sees to it that there are 56 bits or more, and no more than 63. Eight bytes without a 0xff
// among them, as most are, come at once; what does not fit is taken again.
func (r *bitReader) refill() {
	if len(r.data) >= 8 {
		word := binary.BigEndian.Uint64(r.data)
		if word&(word&0x7f7f7f7f7f7f7f7f+0x0101010101010101)&0x8080808080808080 == 0 { // see appendStuffed
			r.bits |= word >> (r.count & 63)
			r.data = r.data[(63-r.count)>>3:]
			r.count |= 56
			return
		}
	}
	for r.count < 56 {
		r.bits |= uint64(r.next()) << (56 - r.count)
		r.count += 8
	}
}

// next takes a byte, or a borrowed zero.
func (r *bitReader) next() byte {
	switch {
	case len(r.data) > 0 && r.data[0] != 0xff:
		b := r.data[0]
		r.data = r.data[1:]
		return b
	case len(r.data) > 1 && r.data[1] == 0:
		r.data = r.data[2:]
		return 0xff
	}
	r.borrowed += 8
	return 0
}

// overrun reports whether more was read than there is.
func (r *bitReader) overrun() bool { return r.borrowed > r.count }

// restart goes on after the restart marker of that number, counted from zero
// to seven (T.81, E.2.4). What stands before it is skipped.
func (r *bitReader) restart(number int) error {
	if r.overrun() {
		return errJPEGShort
	}
	for len(r.data) >= 2 && (r.data[0] != 0xff || !isRestart(r.data[1])) {
		r.data = r.data[1:]
	}
	if len(r.data) < 2 || int(r.data[1]&7) != number {
		return errJPEGRestart
	}
	*r = bitReader{data: r.data[2:]}
	return nil
}

// read reads up to 16 bits. It needs a refill for every 56 of them.
func (r *bitReader) read(size int) int {
	v := int(r.bits >> 1 >> (63 - size&63))
	r.skip(size)
	return v
}

func (r *bitReader) skip(size int) {
	r.bits <<= size & 63
	r.count -= size
}

// readValue reads a value of that many bits: one without its top bit is negative
// (T.81, figure F.12).
func (r *bitReader) readValue(size int) int {
	return extend(r.read(size), size)
}

func extend(v, size int) int {
	if size > 0 && v>>(size-1) == 0 {
		return v - 1<<size + 1
	}
	return v
}

// lookupBits is how many bits are looked up at once. Most codes are no longer, and many
// have their value's bits within.
const lookupBits = 10

// huffmanLookup reads a Huffman code (T.81, annex C). It is made when a scan needs
// it: a file may define any number of tables.
type huffmanLookup struct {
	counts  []uint8 // of each length, how many codes there are; nil if there is no table
	made    bool
	entries [1 << lookupBits]lookupEntry // by the bits to come
	limits  [18]int                      // codes of a length are below its limit, filled up to 16 bits
	offsets [17]int                      // from a code to the index of its symbol
	symbols []uint8                      // by their codes, as the file has them
}

// lookupEntry holds, from the lowest bit: the symbol (8 bits); its code's length
// (5), zero if the code is longer than lookupBits; the length with the value's bits
// (6), zero if they are not within; and that value.
type lookupEntry int32

func (e lookupEntry) symbol() int   { return int(e & 255) }
func (e lookupEntry) length() int   { return int(e >> 8 & 31) }
func (e lookupEntry) together() int { return int(e >> 13 & 63) }
func (e lookupEntry) value() int    { return int(e >> 19) }

// define reads a table's lengths and symbols as DHT has them, and tells how many
// bytes they are: none if they are no table.
func (t *huffmanLookup) define(data []byte) (size int) {
	if len(data) < 16 {
		return 0
	}
	counts, total := data[:16], 0
	for _, n := range counts {
		total += int(n)
	}
	if total == 0 || total > 256 || len(data) < 16+total {
		return 0
	}
	code := 0
	for i, n := range counts {
		if code = code<<1 + int(n); code >= 2<<i {
			return 0 // more codes than there can be, of which none is all ones
		}
	}
	t.counts, t.symbols, t.made = counts, data[16:16+total], false
	return 16 + total
}

// lookup answers the table, ready to read with, or nil if it is not defined.
func (t *huffmanLookup) lookup() *huffmanLookup {
	if t.counts == nil {
		return nil
	}
	if !t.made {
		t.fill()
		t.made = true
	}
	return t
}

func (t *huffmanLookup) fill() {
	clear(t.entries[:])
	code, index := 0, 0
	for i, n := range t.counts {
		length := i + 1
		t.offsets[length] = index - code
		for range int(n) {
			t.enter(code, length, t.symbols[index])
			code++
			index++
		}
		t.limits[length] = code << (16 - length)
		code <<= 1
	}
	t.limits[17] = 1 << 16
}

// enter writes the entries that begin with a code.
func (t *huffmanLookup) enter(code, length int, symbol uint8) {
	rest := lookupBits - length
	if rest < 0 {
		return
	}
	size := int(symbol & 15)
	for tail := range 1 << rest {
		e := lookupEntry(symbol) | lookupEntry(length)<<8
		if size > 0 && size <= rest {
			value := extend(tail>>(rest-size), size)
			e |= lookupEntry(length+size)<<13 | lookupEntry(value)<<19
		}
		t.entries[code<<rest|tail] = e
	}
}

// readSymbol reads a code and leaves at least 40 bits after it.
func (r *bitReader) readSymbol(t *huffmanLookup) (int, error) {
	r.refill()
	if e := t.entries[r.bits>>(64-lookupBits)]; e.length() > 0 {
		r.skip(e.length())
		return e.symbol(), nil
	}
	return r.readLong(t)
}

// readLong reads a code that is longer than lookupBits.
func (r *bitReader) readLong(t *huffmanLookup) (int, error) {
	next := int(r.bits >> 48)
	length := lookupBits + 1
	for next >= t.limits[length] {
		length++
	}
	if length > 16 {
		return 0, errJPEGCode
	}
	r.skip(length)
	return int(t.symbols[next>>(16-length)+t.offsets[length]]), nil
}

// jpegBlock is the coefficients of a block, row by row, not multiplied yet.
type jpegBlock [64]int16

// scanPart is a component in a scan.
type scanPart struct {
	plane    *jpegPlane
	index    int        // of the plane
	rows     *blockRows // where its blocks go
	dc, ac   *huffmanLookup
	previous int // DC coefficient
}

// jpegScanReader decodes the blocks of a scan.
type jpegScanReader struct {
	bitReader
	parts       []scanPart
	first, last int // coefficients, in zigzag order
	low         int // bits that later scans refine (T.81, G.1.2)
	block       func(p *scanPart, b *jpegBlock, end *uint8) error
	emptyBlocks int // to come: an end-of-band run

	interval int // MCUs between restart markers, zero if there are none
	done     int // MCUs
}

// decoder is what decodes a block.
func (s *jpegScanReader) decoder(progressive, refines bool) func(*scanPart, *jpegBlock, *uint8) error {
	switch {
	case !progressive:
		return s.sequential
	case s.first == 0 && refines:
		return s.refineDC
	case s.first == 0:
		return s.firstDC
	case refines:
		return s.refineAC
	}
	return s.firstAC
}

// readRows reads the next n rows, as readRow has them, into a band.
func (s *jpegScanReader) readRows(b *jpegBand, n int) error {
	for i := range s.parts {
		s.parts[i].rows = &b.planes[s.parts[i].index]
	}
	for row := range n {
		if err := s.readRow(row); err != nil {
			return err
		}
	}
	return nil
}

// readRow decodes a row of MCUs of the band; in a scan of one component those are blocks
// (T.81, A.2.2).
func (s *jpegScanReader) readRow(row int) error {
	stepBack()
	if len(s.parts) == 1 {
		p := &s.parts[0]
		for x := range p.plane.blocksWide {
			if err := s.readUnit(p, row, x); err != nil {
				return err
			}
		}
	} else {
		for x := range s.parts[0].plane.mcus {
			if err := s.readMCU(row, x); err != nil {
				return err
			}
		}
	}
	if s.overrun() {
		return errJPEGShort
	}
	return nil
}

func (s *jpegScanReader) readUnit(p *scanPart, row, column int) error {
	if err := s.begin(); err != nil {
		return err
	}
	return s.readBlock(p, row, column)
}

func (s *jpegScanReader) readMCU(row, column int) error {
	if err := s.begin(); err != nil {
		return err
	}
	for i := range s.parts {
		p := &s.parts[i]
		for y := range p.plane.v {
			for x := range p.plane.h {
				if err := s.readBlock(p, row*p.plane.v+y, column*p.plane.h+x); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// begin begins an MCU, before which there may be a restart marker.
func (s *jpegScanReader) begin() error {
	if s.interval > 0 && s.done > 0 && s.done%s.interval == 0 {
		if err := s.restart((s.done/s.interval - 1) & 7); err != nil {
			return err
		}
		s.emptyBlocks = 0
		for i := range s.parts {
			s.parts[i].previous = 0
		}
	}
	s.done++
	return nil
}

func (s *jpegScanReader) readBlock(p *scanPart, row, column int) error {
	at := row*p.plane.columns + column
	return s.block(p, &p.rows.blocks[at], &p.rows.ends[at])
}

// readDifference decodes a DC coefficient (T.81, F.2.2.1).
func (s *jpegScanReader) readDifference(p *scanPart) error {
	size, err := s.readSymbol(p.dc)
	if err != nil {
		return err
	}
	p.previous += s.readValue(size)
	return nil
}

// sequential decodes a whole block (T.81, F.2.2). Where coefficients are said to
// follow the last one, they are left out, as libjpeg does.
func (s *jpegScanReader) sequential(p *scanPart, b *jpegBlock, end *uint8) error {
	if err := s.readDifference(p); err != nil {
		return err
	}
	*b = jpegBlock{0: int16(p.previous)}
	last := 0
	bits, count := s.bits, s.count // in registers
	for k := 1; k < 64; k++ {
		if count < 32 {
			s.bits, s.count = bits, count
			s.refill()
			bits, count = s.bits, s.count
		}
		e := p.ac.entries[bits>>(64-lookupBits)]
		if size := e.together(); size > 0 {
			bits <<= size & 63
			count -= size
			if k += e.symbol() >> 4; k > 63 {
				break
			}
			b[zigzag[k]&63] = int16(e.value())
			last = k
			continue
		}
		s.bits, s.count = bits, count
		symbol, err := s.readSymbol(p.ac)
		if err != nil {
			return err
		}
		run, size := symbol>>4, symbol&15
		if size == 0 && run < 15 {
			bits, count = s.bits, s.count
			break
		}
		value := s.readValue(size)
		if k += run; size > 0 && k < 64 {
			b[zigzag[k]&63] = int16(value)
			last = k
		}
		bits, count = s.bits, s.count
	}
	s.bits, s.count = bits, count
	*end = uint8(last + 1)
	return nil
}

// firstDC decodes the DC coefficient without its low bits (T.81, G.1.2.1).
func (s *jpegScanReader) firstDC(p *scanPart, b *jpegBlock, end *uint8) error {
	if err := s.readDifference(p); err != nil {
		return err
	}
	b[0] = int16(p.previous << s.low)
	*end = max(*end, 1)
	return nil
}

// refineDC decodes one more bit of the DC coefficient.
func (s *jpegScanReader) refineDC(_ *scanPart, b *jpegBlock, _ *uint8) error {
	b[0] |= int16(s.readBit() << s.low)
	return nil
}

func (s *jpegScanReader) readBit() int {
	if s.count == 0 {
		s.refill()
	}
	return s.read(1)
}

// firstAC decodes coefficients without their low bits (T.81, G.1.2.2).
func (s *jpegScanReader) firstAC(p *scanPart, b *jpegBlock, end *uint8) error {
	if s.emptyBlocks > 0 {
		s.emptyBlocks--
		return nil
	}
	for k := s.first; k <= s.last; k++ {
		symbol, err := s.readSymbol(p.ac)
		if err != nil {
			return err
		}
		run, size := symbol>>4, symbol&15
		if size == 0 && run < 15 {
			s.emptyBlocks = 1<<run + s.read(run) - 1
			return nil
		}
		value := s.readValue(size)
		if k += run; size > 0 && k <= s.last {
			b[zigzag[k]&63] = int16(value << s.low)
			*end = max(*end, uint8(k+1))
		}
	}
	return nil
}

// refineAC decodes one more bit of the coefficients that are not zero, and those
// that become so with it (T.81, G.1.2.3).
func (s *jpegScanReader) refineAC(p *scanPart, b *jpegBlock, end *uint8) error {
	k := s.first
	for s.emptyBlocks == 0 && k <= s.last {
		symbol, err := s.readSymbol(p.ac)
		if err != nil {
			return err
		}
		run, size := symbol>>4, symbol&15
		value := int16(0)
		switch {
		case size > 1:
			return errJPEGCode
		case size == 1:
			value = int16(extend(s.read(1), 1) << s.low)
		case run < 15:
			s.emptyBlocks = 1<<run + s.read(run)
			continue
		}
		if k = s.refine(b, k, run); k > s.last {
			return errJPEGCode
		}
		if value != 0 {
			b[zigzag[k]&63] = value
			*end = max(*end, uint8(k+1))
		}
		k++
	}
	if s.emptyBlocks > 0 {
		s.emptyBlocks--
		s.refine(b, k, 64)
	}
	return nil
}

// refine decodes the bits of coefficients that are not zero, from k on, up to
// the zero that follows that many others. It answers where that is.
func (s *jpegScanReader) refine(b *jpegBlock, k, zeros int) int {
	for ; k <= s.last; k++ {
		c := &b[zigzag[k]&63]
		switch {
		case *c == 0:
			if zeros--; zeros < 0 {
				return k
			}
		case s.readBit() == 0:
		case *c > 0:
			*c += 1 << s.low
		default:
			*c -= 1 << s.low
		}
	}
	return k
}
