package main

import "math"

// idctBits are the fractional bits of what goes through inverseDCT.
const idctBits = 12

// dequantiser multiplies coefficients, row by row, by their steps. The scale that
// inverse8 leaves is part of it, and the eighth of the transform in two dimensions.
type dequantiser [64]int

// newDequantiser takes steps in zigzag order.
func newDequantiser(steps *[64]uint16) *dequantiser {
	var q dequantiser
	for k, at := range zigzag {
		q[at] = int(math.Round(float64(steps[k]) * aanScale(int(at)/8) * aanScale(int(at)%8) / 8 * (1 << idctBits)))
	}
	return &q
}

// A block whose coefficients end at lowEnd in zigzag order or before has none
// outside of its first four rows and columns.
const lowEnd = 10

// sampleMiddle is what samples are centred on (T.81, A.3.1), and a half for rounding.
const sampleMiddle = 128<<idctBits + 1<<(idctBits-1)

// inverseDCT transforms a block into eight rows of eight samples (T.81, A.3.3),
// by the method of Arai, Agui and Nakajima backwards (see forwardDCT). end is how
// many coefficients in zigzag order may be other than zero.
func (q *dequantiser) inverseDCT(dst []byte, stride int, b *jpegBlock, end int) {
	switch {
	case end <= 1:
		fillBlock(dst, stride, toSample(int(b[0])*q[0]+sampleMiddle))
	case end <= lowEnd:
		q.inverseLow(dst, stride, b)
	default:
		q.inverseWhole(dst, stride, b)
	}
}

func (q *dequantiser) inverseWhole(dst []byte, stride int, b *jpegBlock) {
	var t [64]int
	for x := range 8 {
		c, m, o := b[x:x+57:x+57], q[x:x+57:x+57], t[x:x+57:x+57]
		if c[8]|c[16]|c[24]|c[32]|c[40]|c[48]|c[56] == 0 {
			v := int(c[0]) * m[0]
			o[0], o[8], o[16], o[24], o[32], o[40], o[48], o[56] = v, v, v, v, v, v, v, v
			continue
		}
		o[0], o[8], o[16], o[24], o[32], o[40], o[48], o[56] = inverse8(int(c[0])*m[0], int(c[8])*m[8], int(c[16])*m[16], int(c[24])*m[24],
			int(c[32])*m[32], int(c[40])*m[40], int(c[48])*m[48], int(c[56])*m[56])
	}
	for y := range 8 {
		r, o := t[8*y:8*y+8:8*y+8], dst[y*stride:][:8:8]
		s0, s1, s2, s3, s4, s5, s6, s7 := inverse8(r[0]+sampleMiddle, r[1], r[2], r[3], r[4], r[5], r[6], r[7])
		o[0], o[1], o[2], o[3], o[4], o[5], o[6], o[7] = toSample(s0), toSample(s1), toSample(s2), toSample(s3), toSample(s4), toSample(s5), toSample(s6), toSample(s7)
	}
}

// inverseLow is inverseWhole of a block that ends at lowEnd.
func (q *dequantiser) inverseLow(dst []byte, stride int, b *jpegBlock) {
	var t [64]int
	for x := range 4 {
		c, m, o := b[x:x+25:x+25], q[x:x+25:x+25], t[x:x+57:x+57]
		o[0], o[8], o[16], o[24], o[32], o[40], o[48], o[56] = inverse4(int(c[0])*m[0], int(c[8])*m[8], int(c[16])*m[16], int(c[24])*m[24])
	}
	for y := range 8 {
		r, o := t[8*y:8*y+4:8*y+4], dst[y*stride:][:8:8]
		s0, s1, s2, s3, s4, s5, s6, s7 := inverse4(r[0]+sampleMiddle, r[1], r[2], r[3])
		o[0], o[1], o[2], o[3], o[4], o[5], o[6], o[7] = toSample(s0), toSample(s1), toSample(s2), toSample(s3), toSample(s4), toSample(s5), toSample(s6), toSample(s7)
	}
}

func fillBlock(dst []byte, stride int, v byte) {
	for y := range 8 {
		o := dst[y*stride:][:8:8]
		o[0], o[1], o[2], o[3], o[4], o[5], o[6], o[7] = v, v, v, v, v, v, v, v
	}
}

func toSample(v int) byte {
	v >>= idctBits
	if v&^255 != 0 {
		v = ^v >> 63 // all ones if it is too large, else zero
	}
	return byte(v)
}

// The factors of the rotations that inverse8 undoes.
const (
	sqrt2       = 11585 // √2
	twoCos2     = 15137 // 2·cos(2π/16)
	twoCos2Less = 8867  // 2·(cos(2π/16) − cos(6π/16))
	twoCos2More = 21407 // 2·(cos(2π/16) + cos(6π/16))
)

// inverse8 is the inverse transform of eight coefficients.
func inverse8(a, b, c, d, e, f, g, h int) (o0, o1, o2, o3, o4, o5, o6, o7 int) {
	// Even part.
	a, e = a+e, a-e
	c, g = c+g, c-g
	g = g*sqrt2>>factorBits - c
	a, c = a+c, a-c
	e, g = e+g, e-g
	// Odd part.
	d, f = f+d, f-d
	b, h = b+h, b-h
	turn := (f + h) * twoCos2
	low := (h*twoCos2Less - turn) >> factorBits
	high := (turn - f*twoCos2More) >> factorBits
	b, d = b+d, (b-d)*sqrt2>>factorBits
	high -= b
	d -= high
	low += d
	return a + b, e + high, g + d, c - low, c + low, g - d, e - high, a - b
}

// inverse4 is inverse8 where the last four coefficients are zero.
func inverse4(a, b, c, d int) (o0, o1, o2, o3, o4, o5, o6, o7 int) {
	g := c*sqrt2>>factorBits - c
	a, c, e, g := a+c, a-c, a+g, a-g
	turn := (b - d) * twoCos2
	low := (b*twoCos2Less - turn) >> factorBits
	high := (turn + d*twoCos2More) >> factorBits
	b, d = b+d, (b-d)*sqrt2>>factorBits
	high -= b
	d -= high
	low += d
	return a + b, e + high, g + d, c - low, c + low, g - d, e - high, a - b
}
