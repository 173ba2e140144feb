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
	window   int  // the most source samples that one output sample needs
	identity bool // each output sample is the source sample of its own index
}

// newAxis maps src samples to dst. An output sample is scale source samples
// wide and the first begins at offset, in source samples. Where scale is above
// one the kernel is stretched by it, which makes it the low-pass filter that
// keeps frequencies out which the output cannot hold.
func newAxis(src, dst int, scale, offset float64) axis {
	stretch := max(scale, 1)
	radius := 2 * stretch
	a := axis{taps: make([]taps, dst), window: min(src, int(2*radius)+2), identity: src == dst}
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

// resample reads rows of interleaved 8-bit samples (one channel, or four), of
// at least the source's width, and emits the rows of the resized image from the top down. A row passed to
// emit is valid until emit returns, one returned by read until the next read.
// Besides its tables it holds one window of horizontally resized rows.
func resample(read func(y int) []byte, channels int, horizontal, vertical axis, emit func(y int, row []byte)) {
	width := len(horizontal.taps) * channels
	if horizontal.identity && vertical.identity {
		for y := range vertical.taps {
			emit(y, read(y)[:width])
		}
		return
	}
	ring := make([][]int16, vertical.window)
	for i := range ring {
		ring[i] = make([]int16, width)
	}
	sums, out := make([]int32, width), make([]byte, width)
	next := 0
	for y, t := range vertical.taps {
		for ; next < t.start+len(t.weights); next++ {
			horizontal.apply(ring[next%len(ring)], read(next), channels)
		}
		t.combine(sums, ring)
		narrow(out, sums)
		emit(y, out)
	}
}

// apply resizes one row, leaving rowBits fractional bits.
func (a axis) apply(dst []int16, src []byte, channels int) {
	if channels == 1 {
		a.apply1(dst, src)
	} else {
		a.apply4(dst, src)
	}
}

const (
	rowShift = weightBits - rowBits
	rowHalf  = 1 << (rowShift - 1)
	sumShift = weightBits + rowBits
	sumHalf  = 1 << (sumShift - 1)
)

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
