package main

import (
	"math"
	"math/rand/v2"
	"testing"
)

// The inverse transform agrees with its definition (ITU-T T.81, A.3.3), whatever
// part of the block it may pass over.
func TestInverseDCT(t *testing.T) {
	t.Parallel()
	rng := rand.New(rand.NewPCG(1, 2))
	for _, end := range []int{0, 1, 2, lowEnd - 1, lowEnd, lowEnd + 1, 64} {
		worst := 0.0
		for range 300 {
			var steps [64]uint16
			var b jpegBlock
			for k := range steps {
				steps[k] = uint16(1 + rng.IntN(40))
				if k < end && rng.IntN(3) > 0 {
					b[zigzag[k]] = int16(rng.NormFloat64() * 300 / float64(int(steps[k])*(k+1)))
				}
			}
			got := make([]byte, 100)
			newDequantiser(&steps).inverseDCT(got, 13, &b, end)
			var plain [64]float64
			for k, at := range zigzag {
				plain[at] = float64(b[at]) * float64(steps[k])
			}
			for i, want := range inverseByDefinition(&plain) {
				worst = max(worst, math.Abs(float64(got[i/8*13+i%8])-min(max(want, 0), 255)))
			}
		}
		if worst > 0.52 {
			t.Errorf("%d coefficients: off by %.3f", end, worst)
		}
	}
}

func inverseByDefinition(coefficients *[64]float64) (samples [64]float64) {
	for i := range samples {
		sum := 0.0
		for at, c := range coefficients {
			u, v := at%8, at/8
			for _, f := range []int{u, v} {
				if f == 0 {
					c /= math.Sqrt2
				}
			}
			sum += c * math.Cos(float64((2*(i%8)+1)*u)*math.Pi/16) * math.Cos(float64((2*(i/8)+1)*v)*math.Pi/16)
		}
		samples[i] = sum/4 + 128
	}
	return samples
}
