package main

import (
	"bytes"
	"fmt"
	"image"
	"image/color"
	"image/jpeg"
	"math"
	"math/rand/v2"
	"os/exec"
	"testing"
)

// noise is an image of random samples: every symbol, and long codes, occur.
func noise(w, h int, seed uint64) *image.YCbCr {
	random := rand.NewPCG(seed, 1)
	m := image.NewYCbCr(image.Rect(0, 0, w, h), image.YCbCrSubsampleRatio420)
	for _, plane := range [][]byte{m.Y, m.Cb, m.Cr} {
		for i := range plane {
			plane[i] = uint8(random.Uint64())
		}
	}
	return m
}

func greyPhoto(w, h int) *image.Gray {
	m := photo(w, h)
	return &image.Gray{Pix: m.Y, Stride: m.YStride, Rect: m.Rect}
}

// jpegSources are images whose sizes meet the blocks and MCUs in every way.
func jpegSources() map[string]image.Image {
	sources := map[string]image.Image{
		"noise": noise(200, 120, 1), "photo": photo(333, 217), "grey photo": greyPhoto(333, 217),
		// So many empty blocks that a run of them must be broken off.
		"flat, huge": image.NewYCbCr(image.Rect(0, 0, 2048, 1100), image.YCbCrSubsampleRatio420),
	}
	for _, side := range []int{1, 7, 8, 9, 15, 16, 17, 31, 33} {
		sources[fmt.Sprint("noise of side ", side)] = noise(side, 40-side, uint64(side))
		sources[fmt.Sprint("grey of side ", side)] = greyPhoto(side, 40-side)
	}
	return sources
}

// The decoder of the standard library reads the file, and gets what it gets
// from the encoder of the standard library. Both round in their own way, hence a tolerance.
func TestJPEGDecodesToItsSource(t *testing.T) {
	t.Parallel()
	for name, m := range jpegSources() {
		for _, quality := range []int{1, 50, 80, 100} {
			t.Run(fmt.Sprintf("%s at %d", name, quality), func(t *testing.T) {
				t.Parallel()
				got, err := jpeg.Decode(bytes.NewReader(encodeJPEGPlanes(m, quality, nil)))
				if err != nil {
					t.Fatal(err)
				}
				want, err := jpeg.Decode(bytes.NewReader(encodedJPEG(t, m, quality)))
				if err != nil {
					t.Fatal(err)
				}
				if gotErr, wantErr := meanError(got, m), meanError(want, m); gotErr > 1.02*wantErr+0.3 {
					t.Errorf("differs from its source by %.2f, the standard encoder's by %.2f", gotErr, wantErr)
				}
			})
		}
	}
}

// meanError is the root of the mean square of the samples' differences.
func meanError(a, b image.Image) float64 {
	switch a := a.(type) {
	case *image.Gray:
		b := b.(*image.Gray)
		return planeError(a.Pix, b.Pix, a.Stride, b.Stride, a.Rect.Size())
	case *image.YCbCr:
		b := b.(*image.YCbCr)
		chroma := image.Pt((a.Rect.Dx()+1)/2, (a.Rect.Dy()+1)/2)
		return max(planeError(a.Y, b.Y, a.YStride, b.YStride, a.Rect.Size()),
			planeError(a.Cb, b.Cb, a.CStride, b.CStride, chroma), planeError(a.Cr, b.Cr, a.CStride, b.CStride, chroma))
	}
	return math.Inf(1)
}

func planeError(a, b []byte, aStride, bStride int, size image.Point) float64 {
	sum := 0.0
	for y := range size.Y {
		for x := range size.X {
			d := float64(a[y*aStride+x]) - float64(b[y*bStride+x])
			sum += d * d
		}
	}
	return math.Sqrt(sum / float64(size.X*size.Y))
}

// An independent decoder reads it too, without a warning, and sees the same.
func TestJPEGIsReadByLibjpeg(t *testing.T) {
	t.Parallel()
	for name, m := range jpegSources() {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			data := encodeJPEGPlanes(m, testQuality, nil)
			got, err := djpeg(t, data, "-strict", "-nosmooth")
			if err != nil {
				t.Fatal(err)
			}
			want, err := jpeg.Decode(bytes.NewReader(data))
			if err != nil {
				t.Fatal(err)
			}
			comparePixels(t, got, want, 0.6, 4)
		})
	}
}

// djpeg decodes an image with libjpeg, whose warnings are errors here too.
func djpeg(t *testing.T, data []byte, options ...string) (image.Image, error) {
	t.Helper()
	path, err := exec.LookPath("djpeg")
	if err != nil {
		t.Skip("no djpeg (libjpeg-turbo-progs)")
	}
	cmd := exec.Command(path, append(options, "-pnm")...)
	cmd.Stdin = bytes.NewReader(data)
	var warnings bytes.Buffer
	cmd.Stderr = &warnings
	out, err := cmd.Output()
	if err != nil || warnings.Len() > 0 {
		return nil, fmt.Errorf("djpeg: %w: %s", err, warnings.String())
	}
	return readPNM(t, out), nil
}

// readPNM reads a binary PGM or PPM of 8 bits.
func readPNM(t *testing.T, data []byte) image.Image {
	t.Helper()
	var kind string
	var w, h, most int
	if _, err := fmt.Sscan(string(data[:min(len(data), 40)]), &kind, &w, &h, &most); err != nil || most != 255 {
		t.Fatalf("pnm %.20q: %v", data, err)
	}
	channels := map[string]int{"P5": 1, "P6": 3}[kind]
	pix := data[len(data)-w*h*channels:]
	m := image.NewRGBA(image.Rect(0, 0, w, h))
	for i := range w * h {
		p := pix[i*channels:]
		m.SetRGBA(i%w, i/w, color.RGBA{p[0], p[channels/2], p[channels-1], 255})
	}
	return m
}

func TestJPEGIsSmallerThanTheStandardEncoders(t *testing.T) {
	t.Parallel()
	for name, m := range map[string]image.Image{"photo": photo(800, 600), "grey photo": greyPhoto(800, 600), "noise": noise(400, 300, 1)} {
		ours, standard := len(encodeJPEGPlanes(m, testQuality, nil)), len(encodedJPEG(t, m, testQuality))
		t.Logf("%s: %d bytes, the standard encoder's %d", name, ours, standard)
		if ours >= standard {
			t.Errorf("%s: %d bytes, the standard encoder's %d", name, ours, standard)
		}
	}
}

// Counts like Fibonacci's numbers make the longest codes that there can be.
func TestHuffmanCodesAreAtMostSixteenBitsAndPrefixFree(t *testing.T) {
	t.Parallel()
	var fibonacci, one, all [256]int
	a, b := 1, 1
	for i := range 60 {
		fibonacci[i] = a
		a, b = b, a+b
	}
	one[7] = 5
	for i := range all {
		all[i] = 1 + i*i*i
	}
	for name, counts := range map[string][256]int{"fibonacci": fibonacci, "one symbol": one, "all symbols": all} {
		table := newHuffmanTable(&counts)
		room := 1 << 16 // of codes of sixteen bits
		for symbol, n := range counts {
			length := int(table.codes[symbol] & (1<<codeLengthBits - 1))
			if (n > 0) != (length > 0) || length > 16 {
				t.Errorf("%s: symbol %d of %d uses has a code of %d bits", name, symbol, n, length)
			}
			if length > 0 {
				room -= 1 << (16 - length)
				if code := table.codes[symbol] >> codeLengthBits; code == 1<<length-1 {
					t.Errorf("%s: symbol %d has the code of ones alone", name, symbol)
				}
			}
		}
		if room < 1 {
			t.Errorf("%s: codes overlap", name)
		}
	}
}

// forwardDCT against the definition (T.81, A.3.3), in floating point.
func TestForwardDCTIsTheDefinition(t *testing.T) {
	t.Parallel()
	pix := noise(8, 8, 3).Y
	var got [64]int
	forwardDCT(&got, pix, 8)
	for v := range 8 {
		for u := range 8 {
			sum := 0.0
			for i, p := range pix[:64] {
				sum += (float64(p) - 128) * math.Cos(float64(2*(i%8)+1)*float64(u)*math.Pi/16) * math.Cos(float64(2*(i/8)+1)*float64(v)*math.Pi/16)
			}
			norm := func(k int) float64 {
				if k == 0 {
					return math.Sqrt(0.125)
				}
				return 0.5
			}
			want := sum * norm(u) * norm(v)
			if got := float64(got[8*v+u]) / (8 * aanScale(u) * aanScale(v) * (1 << dctBits)); math.Abs(got-want) > 0.05 {
				t.Errorf("coefficient (%d,%d) is %.3f, want %.3f", u, v, got, want)
			}
		}
	}
}

func BenchmarkJPEGEncode(b *testing.B) {
	m := photo(2048, 1536)
	b.Run("ours", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			encodeJPEGPlanes(m, testQuality, nil)
		}
	})
	b.Run("standard", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			encodedJPEG(b, m, testQuality)
		}
	})
}
