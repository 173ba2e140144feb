package main

import (
	"bytes"
	"image"
	"slices"
	"sync"
	"testing"
)

// compressPooled is compressImage of a file, with two variants.
func compressPooled(data []byte, b *buffers) ([]compressedImage, error) {
	h, err := readImageHeader(data, testPixels)
	if err != nil {
		return nil, err
	}
	d, err := decodeImage(data, h, 2048, imageTools{buffers: b})
	if err != nil {
		return nil, err
	}
	return compressImage(d, data, []int{70, 40}, testQuality)
}

// Images that share buffers come out as each does alone: no one writes into a
// buffer that it has given back, or reads from it.
func TestSharedBuffersChangeNoImage(t *testing.T) {
	t.Parallel()
	alpha := image.NewNRGBA(image.Rect(0, 0, 90, 60))
	copy(alpha.Pix, slices.Concat(noise(90, 60, 1).Y, noise(90, 60, 2).Y, noise(90, 60, 3).Y, noise(90, 60, 4).Y))
	files := [][]byte{
		encodedJPEG(t, photo(90, 60), 90), encodedJPEG(t, noise(90, 60, 5), 90), encodedJPEG(t, greyPhoto(90, 60), 90),
		encodedPNG(t, alpha), encodedPNG(t, corners(90, 60)), encodedPNG(t, greyPhoto(90, 60)), encodedGIF(t, corners(90, 60)),
	}
	shared := new(buffers)
	var group sync.WaitGroup
	for n, data := range files {
		want, err := compressPooled(data, nil)
		if err != nil || len(want) != 3 {
			t.Fatalf("file %d: %d results, %v", n, len(want), err)
		}
		for range 2 {
			group.Go(func() {
				for range 20 {
					got, err := compressPooled(data, shared)
					if err != nil || !slices.EqualFunc(got, want, func(a, b compressedImage) bool { return bytes.Equal(a.Data, b.Data) }) {
						t.Errorf("file %d came out otherwise, %v", n, err)
						return
					}
				}
			})
		}
	}
	group.Wait()
}

// A small plane in a large buffer would hold more than is counted.
func TestBuffersAreNotMuchLargerThanTheirPlanes(t *testing.T) {
	t.Parallel()
	b := new(buffers)
	for _, n := range []int{1000, 790, 640, 530} {
		b.giveBack(b.grey(image.Rect(0, 0, 1000, 1)))
		if got := cap(b.plane(n)); float64(got) > planeSlack*float64(n) {
			t.Errorf("%d bytes lie in a buffer of %d", n, got)
		}
	}
}

// BenchmarkCompress shows what buffers save: anew is without them.
func BenchmarkCompress(b *testing.B) {
	for name, data := range map[string][]byte{
		"photo": encodedJPEG(b, photo(4000, 3000), 90),
		"alpha": encodedPNG(b, disc(1200)),
	} {
		h := headerOf(b, data)
		for kind, pool := range map[string]*buffers{"anew": nil, "pooled": new(buffers)} {
			b.Run(name+"/"+kind, func(b *testing.B) {
				b.ReportAllocs()
				for b.Loop() {
					d, err := decodeImage(data, h, 2048, imageTools{buffers: pool})
					if err != nil {
						b.Fatal(err)
					}
					if _, err := compressImage(d, data, []int{800, 320}, testQuality); err != nil {
						b.Fatal(err)
					}
				}
			})
		}
	}
}

// disc is a coloured disc on a transparent ground.
func disc(side int) *image.NRGBA {
	m := image.NewNRGBA(image.Rect(0, 0, side, side))
	for y := range side {
		for x := range side {
			if dx, dy := 2*x-side, 2*y-side; dx*dx+dy*dy < side*side {
				copy(m.Pix[m.PixOffset(x, y):], []byte{uint8(x), uint8(y), uint8(x * y >> 6), 255})
			}
		}
	}
	return m
}
