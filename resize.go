package main

import "math"

// Fixed point of the resampler. The horizontal pass leaves rowBits fractional
// bits in an int16, so that rounding twice costs nothing visible; with weights
// whose absolute sum is below 2 (see TestAxisWeights) no intermediate overflows.
const (
	weightBits = 14
	weightOne  = 1 << weightBits
	rowBits    = 6
)

// taps are the source samples that make one output sample, and their weights
// in units of 1/weightOne. The weights sum to weightOne exactly.
type taps struct {
	start   int
	weights []int16
}

// axis says for one direction how each output sample is made.
type axis struct {
	taps     []taps
	source   int  // how many source samples there are
	window   int  // the most source samples that one output sample needs, and one more if there is
	identity bool // each output sample is the source sample of its own index
}

// newAxis maps src samples to dst. An output sample is scale source samples
// wide and the first begins at offset, in source samples. Where scale is above
// one the kernel is stretched by it, which makes it the low-pass filter that
// keeps frequencies out which the output cannot hold.
func newAxis(src, dst int, scale, offset float64) axis {
	stretch := max(scale, 1)
	radius := 2 * stretch
	a := axis{taps: make([]taps, dst), source: src, window: min(src, int(2*radius)+2), identity: src == dst}
	values := make([]float64, a.window)
	// One backing array for all weights: it is the axis's whole memory.
	store := make([]int16, 0, dst*a.window)
	for i := range a.taps {
		center := offset + (float64(i)+0.5)*scale
		first := max(0, int(math.Ceil(center-radius-0.5)))
		last := min(src-1, int(math.Floor(center+radius-0.5)))
		kernel := values[:last-first+1]
		for k := range kernel {
			kernel[k] = catmullRom((float64(first+k) + 0.5 - center) / stretch)
		}
		mark := len(store)
		store = appendWeights(store, kernel)
		a.taps[i] = trimTaps(first, store[mark:])
		if t := a.taps[i]; t.start != i || len(t.weights) != 1 {
			a.identity = false
		}
	}
	return a
}

// catmullRom is the cubic of Keys (1981) with a = -1/2, which is zero from 2 on.
func catmullRom(x float64) float64 {
	x = math.Abs(x)
	switch {
	case x < 1:
		return (1.5*x-2.5)*x*x + 1
	case x < 2:
		return ((-0.5*x+2.5)*x-4)*x + 2
	}
	return 0
}

// appendWeights appends kernel scaled to a sum of weightOne. It rounds the
// running sum and stores its steps, so that the total is exact and the
// error of rounding does not gather in one place, however small the weights.
func appendWeights(dst []int16, kernel []float64) []int16 {
	total := 0.0
	for _, v := range kernel {
		total += v
	}
	sum, done := 0.0, 0
	for _, v := range kernel {
		sum += v
		next := int(math.Round(sum / total * weightOne))
		dst = append(dst, int16(next-done))
		done = next
	}
	return dst
}

// trimTaps drops the samples of weight zero at both ends.
func trimTaps(first int, weights []int16) taps {
	for len(weights) > 1 && weights[0] == 0 {
		first, weights = first+1, weights[1:]
	}
	for len(weights) > 1 && weights[len(weights)-1] == 0 {
		weights = weights[:len(weights)-1]
	}
	return taps{first, weights}
}

// resampler makes the rows of a resized image of rows of interleaved 8-bit samples
// (one channel, or four), from the top down. A row passed to emit is valid until
// emit returns. Besides its tables it holds one window of horizontally resized
// rows and two of the source's.
type resampler struct {
	channels             int
	horizontal, vertical axis
	emit                 func(y int, row []byte)

	ring  [][]int16 // resized rows, each at its index modulo the ring's length
	pairs []uint64  // two rows side by side
	sums  []int32
	out   []byte
	next  int // the first row of the source that was not read
	done  int // how many rows were emitted
}

func newResampler(channels int, horizontal, vertical axis, emit func(y int, row []byte)) *resampler {
	r := &resampler{channels: channels, horizontal: horizontal, vertical: vertical, emit: emit}
	if horizontal.identity && vertical.identity {
		return r
	}
	width := len(horizontal.taps) * channels
	r.sums, r.out = make([]int32, width), make([]byte, width)
	r.ring = make([][]int16, vertical.window)
	for i := range r.ring {
		r.ring[i] = make([]int16, width)
	}
	return r
}

// feed reads on, up to row end, and emits what can be made of that. Rows are at
// least as long as the source is wide, and valid until the next is read.
func (r *resampler) feed(read func(y int) []byte, end int) {
	if r.ring == nil {
		for ; r.next < end; r.next++ {
			r.emit(r.next, read(r.next)[:r.horizontal.source*r.channels])
		}
		return
	}
	for ; r.done < len(r.vertical.taps); r.done++ {
		t := r.vertical.taps[r.done]
		needed := t.start + len(t.weights)
		for r.next < min(needed, end) {
			r.take(read, end)
		}
		if needed > end {
			return
		}
		t.combine(r.sums, r.ring)
		narrow(r.out, r.sums)
		r.emit(r.done, r.out)
	}
}

// take resizes the next row into the ring; of one channel two at once, if there
// are two before end, for which a window has room.
func (r *resampler) take(read func(y int) []byte, end int) {
	if r.next%8 == 0 {
		stepBack()
	}
	row := r.ring[r.next%len(r.ring)]
	switch {
	case r.channels == 4:
		r.horizontal.apply4(row, read(r.next))
	case r.next+1 == end:
		r.horizontal.apply1(row, read(r.next))
	default:
		r.pairUp(read)
		r.next++
		r.horizontal.apply2(row, r.ring[r.next%len(r.ring)], r.pairs)
	}
	r.next++
}

// pairUp puts the next two rows into the halves of r.pairs.
func (r *resampler) pairUp(read func(y int) []byte) {
	if r.pairs == nil {
		r.pairs = make([]uint64, r.horizontal.source)
	}
	pairs := r.pairs
	for x, v := range read(r.next)[:len(pairs)] {
		pairs[x] = uint64(v)
	}
	for x, v := range read(r.next + 1)[:len(pairs)] {
		pairs[x] |= uint64(v) << 32
	}
}

const (
	rowShift = weightBits - rowBits
	rowHalf  = 1 << (rowShift - 1)
	sumShift = weightBits + rowBits
	sumHalf  = 1 << (sumShift - 1)
)

// apply1 resizes a row of one channel, leaving rowBits fractional bits.
func (a axis) apply1(dst []int16, src []byte) {
	for i, t := range a.taps {
		samples := src[t.start:][:len(t.weights)]
		sum := int32(rowHalf)
		for k, w := range t.weights {
			sum += int32(w) * int32(samples[k])
		}
		dst[i] = int16(sum >> rowShift)
	}
}

// apply2 is apply1 for two rows at once: one multiplication of 64 bits does two
// of 32. The lower half's sum, where it is negative, has borrowed one from the upper:
// 1/16384 of a level.
func (a axis) apply2(upper, lower []int16, pairs []uint64) {
	upper, lower = upper[:len(a.taps)], lower[:len(a.taps)]
	for i, t := range a.taps {
		samples := pairs[t.start:][:len(t.weights)]
		sum := uint64(rowHalf | rowHalf<<32)
		for k, w := range t.weights {
			sum += uint64(int64(w)) * samples[k]
		}
		upper[i], lower[i] = int16(int32(sum)>>rowShift), int16(int32(sum>>32)>>rowShift)
	}
}

// apply4 is apply1 for a row of four channels.
func (a axis) apply4(dst []int16, src []byte) {
	for i, t := range a.taps {
		samples := src[4*t.start:][:4*len(t.weights)]
		r, g, b, alpha := int32(rowHalf), int32(rowHalf), int32(rowHalf), int32(rowHalf)
		for k, w := range t.weights {
			px := samples[4*k:][:4]
			r += int32(w) * int32(px[0])
			g += int32(w) * int32(px[1])
			b += int32(w) * int32(px[2])
			alpha += int32(w) * int32(px[3])
		}
		out := dst[4*i:][:4]
		out[0], out[1] = int16(r>>rowShift), int16(g>>rowShift)
		out[2], out[3] = int16(b>>rowShift), int16(alpha>>rowShift)
	}
}

// combine sums the rows of t, which ring holds at their index modulo its
// length. Four rows a turn read and write the sums a quarter as often.
func (t taps) combine(sums []int32, ring [][]int16) {
	for i := range sums {
		sums[i] = sumHalf
	}
	row := func(k int) []int16 { return ring[(t.start+k)%len(ring)][:len(sums)] }
	k := 0
	for ; k+4 <= len(t.weights); k += 4 {
		r0, r1, r2, r3 := row(k), row(k+1), row(k+2), row(k+3)
		w0, w1 := int32(t.weights[k]), int32(t.weights[k+1])
		w2, w3 := int32(t.weights[k+2]), int32(t.weights[k+3])
		for i := range sums {
			sums[i] += w0*int32(r0[i]) + w1*int32(r1[i]) + w2*int32(r2[i]) + w3*int32(r3[i])
		}
	}
	for ; k < len(t.weights); k++ {
		r, w := row(k), int32(t.weights[k])
		for i := range sums {
			sums[i] += w * int32(r[i])
		}
	}
}

// narrow turns sums into samples; the kernel's overshoot is cut off here.
func narrow(dst []byte, sums []int32) {
	dst = dst[:len(sums)]
	for i, s := range sums {
		dst[i] = uint8(min(max(s>>sumShift, 0), 255))
	}
}
