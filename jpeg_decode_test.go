package main

import (
	"bytes"
	"errors"
	"image"
	"image/jpeg"
	"os"
	"path/filepath"
	"testing"
)

// decodeBoth decodes a JPEG at full size by decodeJPEG, and by image/jpeg and the
// same resampler.
func decodeBoth(data []byte) (got, want image.Image, gotErr, wantErr error) {
	h, err := readImageHeader(data, testPixels)
	if err != nil || !h.jpeg.streams() {
		return nil, nil, err, err
	}
	got, gotErr = decodeJPEG(data, h, h.Width, h.Height, imageTools{})
	stored, wantErr := decodeStored(data, h)
	if wantErr == nil {
		want = stored.render(h.Width, h.Height)
	}
	return got, want, gotErr, wantErr
}

// samplesOf are an image's planes, one after the other.
func samplesOf(m image.Image) []byte {
	switch m := m.(type) {
	case *image.Gray:
		return m.Pix
	case *image.YCbCr:
		return bytes.Join([][]byte{m.Y, m.Cb, m.Cr}, nil)
	}
	return nil
}

// farthest is the largest difference of two samples.
func farthest(a, b []byte) int {
	worst := 0
	for i := range a {
		d := int(a[i]) - int(b[i])
		worst = max(worst, d, -d)
	}
	return worst
}

func TestJPEGsAsTheStandardLibrarySeesThem(t *testing.T) {
	t.Parallel()
	files, _ := filepath.Glob(filepath.Join(goOutput(t, "env", "GOROOT"), "src", "image", "testdata", "*.jpeg"))
	photos, _ := filepath.Glob(".cache/photos/*.jpg")
	if len(files) == 0 {
		t.Fatal("no files")
	}
	for _, name := range append(files, photos...) {
		t.Run(filepath.Base(name), func(t *testing.T) {
			t.Parallel()
			data := readTestFile(t, name)
			got, want, err, wantErr := decodeBoth(data)
			if err != nil || wantErr != nil {
				t.Fatal(err, wantErr)
			}
			if want == nil {
				t.Skip("RGB or CMYK")
			}
			a, b := samplesOf(got), samplesOf(want)
			if len(a) != len(b) || farthest(a, b) > 1 {
				t.Errorf("%d samples off by up to %d, of %d", len(a), farthest(a, b), len(b))
			}
		})
	}
}

func BenchmarkDecodeJPEG(b *testing.B) {
	files := map[string][]byte{"made": encodedJPEG(b, photo(4000, 3000), 90)}
	for _, name := range []string{os.Getenv("JPEG")} {
		if name != "" {
			files[filepath.Base(name)] = readTestFile(b, name)
		}
	}
	for name, data := range files {
		h, err := readImageHeader(data, testPixels)
		if err != nil {
			b.Fatal(err)
		}
		fit := h.outputSizes(2048, nil)[0]
		b.Run(name+"/ours", func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if _, err := decodeJPEG(data, h, fit.X, fit.Y, imageTools{}); err != nil {
					b.Fatal(err)
				}
			}
		})
		b.Run(name+"/standard", func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				m, err := jpeg.Decode(bytes.NewReader(data))
				if err != nil {
					b.Fatal(err)
				}
				d := &storedImage{header: h, pixels: m, frame: m.Bounds()}
				d.render(fit.X, fit.Y)
			}
		})
	}
}

// Whatever image/jpeg makes an image of, decodeJPEG does too, and of the same size.
// (Of coefficients that no encoder makes, each makes something else.)
func FuzzJPEGAgainstStandard(f *testing.F) {
	for _, data := range smallImages(f) {
		f.Add(data)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		h, err := readImageHeader(data, 1<<16)
		if err != nil || h.jpeg == nil || !h.jpeg.streams() {
			return
		}
		got, want, err, wantErr := decodeBoth(data)
		if wantErr != nil || errors.Is(err, errJPEGTable) { // it takes a table that is missing for one of zeros
			return
		}
		if err != nil {
			t.Fatalf("not decoded: %v", err)
		}
		if a, b := len(samplesOf(got)), len(samplesOf(want)); a != b {
			t.Errorf("%d samples, want %d", a, b)
		}
	})
}
