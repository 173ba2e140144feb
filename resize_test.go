package main

import (
	"fmt"
	"image"
	"math"
	"math/rand/v2"
	"testing"

	"golang.org/x/image/draw"
)

func TestAxisWeightsSumToOne(t *testing.T) {
	t.Parallel()
	sizes := [][2]int{{1, 1}, {2, 1}, {3, 2}, {7, 7}, {100, 99}, {100, 33}, {5472, 2048}, {65535, 1}, {65535, 2048}, {3, 9}, {1, 4}}
	for _, size := range sizes {
		scale := float64(size[0]) / float64(size[1])
		for _, offset := range []float64{0, -scale / 2} {
			a := newAxis(size[0], size[1], scale, offset)
			for i, tap := range a.taps {
				sum, absolute := 0, 0
				for _, w := range tap.weights {
					sum += int(w)
					absolute += max(int(w), -int(w))
				}
				if sum != weightOne || absolute >= 2*weightOne {
					t.Errorf("%v offset %v: weights of sample %d sum to %d, absolutely to %d", size, offset, i, sum, absolute)
				}
				if tap.start < 0 || tap.start+len(tap.weights) > size[0] || len(tap.weights) > a.window {
					t.Errorf("%v offset %v: sample %d takes %d from %d on", size, offset, i, len(tap.weights), tap.start)
				}
			}
		}
	}
}

func TestAxisOfEqualSizesIsIdentity(t *testing.T) {
	t.Parallel()
	if !newAxis(77, 77, 1, 0).identity {
		t.Error("same size is not identity")
	}
	if newAxis(77, 77, 1, -0.5).identity || newAxis(77, 76, 77./76, 0).identity {
		t.Error("shifted or resized is identity")
	}
}

// resizeGrey resizes a grey image by the resampler under test.
func resizeGrey(m *image.Gray, w, h int) *image.Gray {
	d := &storedImage{
		header: imageHeader{Width: m.Rect.Dx(), Height: m.Rect.Dy()},
		pixels: m, frame: m.Rect,
	}
	return d.render(w, h).(*image.Gray)
}

// A zone plate holds every frequency. Those that the small image cannot hold
// must come out as flat grey; aliased they would come out as false rings.
func TestZonePlateShowsNoMoire(t *testing.T) {
	t.Parallel()
	const side, factor = 1024, 4
	plate := image.NewGray(image.Rect(0, 0, side, side))
	for y := range side {
		for x := range side {
			r2 := float64(x*x + y*y)
			// Half a cycle a sample, the most there is, is reached at distance side.
			plate.Pix[y*side+x] = uint8(math.Round(127.5 + 127.5*math.Cos(math.Pi*r2/(2*side))))
		}
	}
	small := resizeGrey(plate, side/factor, side/factor)
	worst, passed := 0.0, 0.0
	for y := range side / factor {
		for x := range side / factor {
			// 1 is the highest frequency that the small image can hold.
			frequency := math.Hypot(float64(x), float64(y)) / (side / factor) * factor
			contrast := math.Abs(float64(small.GrayAt(x, y).Y) - 127.5)
			switch {
			case frequency > 1.8 && frequency < factor:
				worst = max(worst, contrast)
			case frequency < 0.3:
				passed = max(passed, contrast)
			}
		}
	}
	if worst > 10 {
		t.Errorf("contrast %.0f where there should be none: moiré", worst)
	}
	if passed < 115 {
		t.Errorf("contrast %.0f at low frequencies, want nearly 127: blurred", passed)
	}
}

func TestResampleAgreesWithReference(t *testing.T) {
	t.Parallel()
	const w, h = 97, 61
	rng := rand.New(rand.NewPCG(1, 2))
	grey := image.NewGray(image.Rect(0, 0, w, h))
	colour := image.NewNRGBA(grey.Rect)
	for i := range grey.Pix {
		grey.Pix[i] = uint8(rng.Uint32())
	}
	for i := range colour.Pix {
		colour.Pix[i] = uint8(rng.Uint32()) | uint8(i%4/3*255) // opaque
	}
	for _, size := range []image.Point{{96, 60}, {48, 30}, {31, 20}, {10, 6}, {1, 1}, {97, 20}} {
		t.Run(fmt.Sprint(size), func(t *testing.T) {
			t.Parallel()
			bounds := image.Rectangle{Max: size}
			wantGrey := image.NewGray(bounds)
			draw.CatmullRom.Scale(wantGrey, bounds, grey, grey.Rect, draw.Src, nil)
			comparePixels(t, resizeGrey(grey, size.X, size.Y), wantGrey, 1, 2)

			wantColour := image.NewNRGBA(bounds)
			draw.CatmullRom.Scale(wantColour, bounds, colour, colour.Rect, draw.Src, nil)
			d := &storedImage{header: imageHeader{Width: w, Height: h}, pixels: colour, frame: colour.Rect}
			comparePixels(t, d.render(size.X, size.Y), wantColour, 1, 3)
		})
	}
}

// comparePixels compares two images by their 8-bit RGBA: the mean difference
// of a channel may be mean, the largest most.
func comparePixels(t *testing.T, got, want image.Image, mean float64, most int) {
	t.Helper()
	if got.Bounds().Size() != want.Bounds().Size() {
		t.Fatalf("size %v, want %v", got.Bounds().Size(), want.Bounds().Size())
	}
	total, worst, count := 0, 0, 0
	for y := range got.Bounds().Dy() {
		for x := range got.Bounds().Dx() {
			r0, g0, b0, a0 := got.At(got.Bounds().Min.X+x, got.Bounds().Min.Y+y).RGBA()
			r1, g1, b1, a1 := want.At(want.Bounds().Min.X+x, want.Bounds().Min.Y+y).RGBA()
			for _, d := range []int{int(r0>>8) - int(r1>>8), int(g0>>8) - int(g1>>8), int(b0>>8) - int(b1>>8), int(a0>>8) - int(a1>>8)} {
				d = max(d, -d)
				total, worst, count = total+d, max(worst, d), count+1
			}
		}
	}
	if m := float64(total) / float64(count); m > mean || worst > most {
		t.Errorf("mean difference %.2f (allowed %.2f), largest %d (allowed %d)", m, mean, worst, most)
	}
}
