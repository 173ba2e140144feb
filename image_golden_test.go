package main

import (
	"image"
	"path/filepath"
	"testing"
)

// TestGoldenImages compares what becomes of images of each kind with how
// independent decoders (libvips and libjpeg) see them, whole and at half their size.
// scripts/compare-images/golden.mjs made the files.
func TestGoldenImages(t *testing.T) {
	t.Parallel()
	const (
		exact  = 0.5 // no loss but rounding
		photos = 3.5 // two JPEGs of such small size, the second at quality 80
		edges  = 5   // sharp edges in chroma of half the size
	)
	tests := map[string]struct {
		mean  float64 // how much a channel may differ on average
		ext   string
		model string // the Go type of the result
	}{
		"orientation-1.jpg":     {photos, "jpg", "colour"},
		"orientation-2.jpg":     {photos, "jpg", "colour"},
		"orientation-3.jpg":     {photos, "jpg", "colour"},
		"orientation-4.jpg":     {photos, "jpg", "colour"},
		"orientation-5.jpg":     {photos, "jpg", "colour"},
		"orientation-6.jpg":     {photos, "jpg", "colour"},
		"orientation-7.jpg":     {photos, "jpg", "colour"},
		"orientation-8.jpg":     {photos, "jpg", "colour"},
		"progressive-444.jpg":   {edges, "jpg", "colour"},
		"grey.jpg":              {photos, "jpg", "grey"},
		"display-p3.jpg":        {photos, "jpg", "profile"},
		"cmyk.jpg":              {edges, "jpg", "colour"},
		"ycck.jpg":              {edges, "jpg", "colour"},
		"interlaced-16-bit.png": {edges, "jpg", "colour"},
		"grey-16-bit.png":       {photos, "jpg", "grey"},
		"alpha.png":             {exact, "png", "alpha"},
		"alpha-16-bit.png":      {exact, "png", "alpha"},
		"palette.png":           {exact, "png", "alpha"},
		"lossy.webp":            {photos, "jpg", "colour"},
		"lossy-alpha.webp":      {1.5, "png", "alpha"},
		"lossless-alpha.webp":   {exact, "png", "alpha"},
		"palette.gif":           {exact, "png", "alpha"},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			source := readTestFile(t, filepath.Join("testdata", "golden", name))
			for _, size := range []string{"whole", "half"} {
				want := decoded(t, readTestFile(t, filepath.Join("testdata", "golden", name+"."+size+".png")))
				side := max(want.Bounds().Dx(), want.Bounds().Dy())
				c, got := compressWell(t, source, side)
				if c.Ext != test.ext && size == "half" {
					t.Errorf("%s: result is %s", size, c.Ext)
				}
				if kind := kindOf(t, c, got); kind != test.model {
					t.Errorf("%s: result is %s, want %s", size, kind, test.model)
				}
				t.Run(size, func(t *testing.T) { comparePixels(t, onWhite(got), onWhite(want), test.mean, 90) })
			}
		})
	}
}

// compressWell compresses at a quality at which loss does not hide mistakes.
func compressWell(t *testing.T, source []byte, side int) (compressedImage, image.Image) {
	t.Helper()
	c := compressBest(t, source, side, nil)[0]
	return c, decodeResult(t, c)
}

func compressBest(t *testing.T, source []byte, side int, widths []int) []compressedImage {
	t.Helper()
	h := headerOf(t, source)
	d, err := decodeImage(source, h, side, imageTools{})
	if err != nil {
		t.Fatal(err)
	}
	all, err := compressImage(d, source, widths, 95)
	if err != nil {
		t.Fatal(err)
	}
	return all
}

func decodeResult(t *testing.T, c compressedImage) image.Image {
	t.Helper()
	m := decoded(t, c.Data)
	if c.Ext == formatWebP { // a kept source, which the decoder hands out in video range
		expandVideoRange(m)
	}
	return m
}

// kindOf says in a word what of its kind an image has kept.
func kindOf(t *testing.T, c compressedImage, m image.Image) string {
	h := headerOf(t, c.Data)
	_, grey := m.(*image.Gray)
	opaque, _ := m.(interface{ Opaque() bool })
	switch {
	case h.Profile != nil:
		return "profile"
	case grey:
		return "grey"
	case opaque != nil && !opaque.Opaque():
		return "alpha"
	}
	return "colour"
}

// onWhite is what a page shows of an image: what is transparent has no colour.
func onWhite(m image.Image) image.Image {
	b := m.Bounds()
	out := image.NewRGBA(image.Rect(0, 0, b.Dx(), b.Dy()))
	for y := range b.Dy() {
		for x := range b.Dx() {
			r, g, bl, a := m.At(b.Min.X+x, b.Min.Y+y).RGBA()
			at := out.PixOffset(x, y)
			for i, v := range []uint32{r, g, bl} {
				out.Pix[at+i] = uint8((v + 65535 - a) / 257)
			}
			out.Pix[at+3] = 255
		}
	}
	return out
}
