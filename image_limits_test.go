package main

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"image"
	"image/color"
	"image/gif"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"runtime/metrics"
	"strconv"
	"strings"
	"testing"
)

func TestBadInputIsRefused(t *testing.T) {
	t.Parallel()
	photoJPEG := encodedJPEG(t, photo(80, 60), 90)
	tests := map[string]struct {
		data []byte
		code string
	}{
		"nothing":              {nil, "not_an_image"},
		"html":                 {[]byte("<!doctype html><p>not found"), "not_an_image"},
		"svg":                  {[]byte(`<svg xmlns="http://www.w3.org/2000/svg" width="1" height="1"/>`), "not_an_image"},
		"bmp":                  {webpTestdata(t, "video-001.bmp"), "not_an_image"},
		"png, wrong checksum":  {goTestdata(t, "png/testdata/invalid-crc32.png"), "corrupt_image"},
		"png, no end":          {goTestdata(t, "png/testdata/invalid-noend.png"), "corrupt_image"},
		"png, truncated":       {goTestdata(t, "png/testdata/invalid-trunc.png"), "corrupt_image"},
		"png, bad zlib":        {goTestdata(t, "png/testdata/invalid-zlib.png"), "corrupt_image"},
		"jpeg cut in half":     {photoJPEG[:len(photoJPEG)/2], "corrupt_image"},
		"jpeg cut in header":   {photoJPEG[:100], "corrupt_image"},
		"jpeg, arithmetic":     {jpegHeaderOf(0xc9, 8, 8), "corrupt_image"},
		"jpeg of no width":     {jpegHeaderOf(0xc0, 0, 8), "corrupt_image"},
		"png of no height":     {pngHeaderOf(8, 0), "corrupt_image"},
		"gif of no frame":      {[]byte("GIF89a\x01\x00\x01\x00\x00\x00\x00;"), "corrupt_image"},
		"webp of no chunk":     {finishWebP(newWebP()), "corrupt_image"},
		"webp, cut in a chunk": {cutWebP(100, 100), "corrupt_image"},
		"webp, empty anim":     {webpFile(webpAnimationFlag, 9, 9, appendRIFF(nil, "ANMF", make([]byte, 16))), "corrupt_image"},
		"webp, frame too wide": {webpFile(webpAnimationFlag, 9, 9, appendRIFF(nil, "ANMF", append(make([]byte, 6), "\xff\xff\xff\xff\xff\xff1234"...))), "corrupt_image"},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			if _, err := compressBytes(test.data, 100); errorCode(err) != test.code {
				t.Errorf("got %v, want %s", err, test.code)
			}
		})
	}
}

// A size of zero is found before anything is decoded.
func TestHeaderOfNoSizeIsRefused(t *testing.T) {
	t.Parallel()
	for name, data := range map[string][]byte{"jpeg": jpegHeaderOf(0xc0, 0, 8), "png": pngHeaderOf(8, 0)} {
		if _, err := readImageHeader(data, testPixels); errorCode(err) != "corrupt_image" {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// The canvas is what was checked and counted, so a frame that claims more must
// be refused before its decoder allocates it.
func TestFrameLargerThanItsCanvasIsRefused(t *testing.T) {
	t.Parallel()
	head := []byte{0, 0, 0, 0, 0, 0, 74, 0, 0, 99, 0, 0, 9, 0, 0, 0}
	data := webpFile(webpAnimationFlag, 75, 99, appendRIFF(nil, "ANMF", head))
	if _, _, err := firstWebPFrame(data, image.Rect(0, 0, 75, 99)); err == nil {
		t.Error("accepted")
	}
	if _, _, err := firstWebPFrame(data, image.Rect(0, 0, 75, 100)); err != nil {
		t.Errorf("frame that fits: %v", err)
	}
}

func jpegHeaderOf(marker byte, w, h int) []byte {
	frame := []byte{8, byte(h >> 8), byte(h), byte(w >> 8), byte(w), 3, 1, 0x22, 0, 2, 0x11, 1, 3, 0x11, 1}
	return append(withJPEGSegment([]byte("\xff\xd8"), marker, string(frame)), "\xff\xda\x00\x0c\x03\x01\x00\x02\x11\x03\x11\x00\x3f\x00data"...)
}

// cutWebP is a lossless WebP of one colour, of which its pixels take no bits: it can be
// decoded, although its chunk claims to be longer than the file.
func cutWebP(w, h int) []byte {
	size := uint32(w-1) | uint32(h-1)<<14
	body := binary.LittleEndian.AppendUint32([]byte{0x2f}, size)
	body = append(body, 0x88, 0x88, 0x08, 0, 0) // no transform, no cache, five codes of one symbol
	return finishWebP(appendRIFF(newWebP(), "VP8L", body))[:webpHeaderSize+8+len(body)-2]
}

func pngHeaderOf(w, h uint32) []byte {
	return pngOf(pngKind{colour: pngTruecolourAlpha, depth: 8}.header(w, h))
}

// Not parallel: it looks at the process's count of allocated bytes.
func TestHeaderBombsAreRefusedUnallocated(t *testing.T) {
	lossless := []byte{0x2f, 0xff, 0xff, 0xff, 0x0f, 0, 0, 0} // 16384 × 16384
	tests := map[string][]byte{
		"jpeg":               jpegHeaderOf(0xc0, 65535, 65535),
		"progressive jpeg":   jpegHeaderOf(0xc2, 65535, 65535),
		"png":                pngHeaderOf(65535, 65535),
		"png, long sides":    pngHeaderOf(1<<31-1, 1<<31-1),
		"png, one long side": pngHeaderOf(70_000, 1),
		"gif":                []byte("GIF89a\xff\xff\xff\xff\x00\x00\x00,\x00\x00\x00\x00\xff\xff\xff\xff\x00\x02\x01\x00\x00;"),
		"webp, extended":     webpFile(0, 40_000, 40_000, appendRIFF(nil, "VP8L", lossless)),
		"webp, lossless":     finishWebP(appendRIFF(newWebP(), "VP8L", lossless)),
	}
	for name, data := range tests {
		if len(data) > 100 {
			t.Errorf("%s: %d bytes, meant to be small", name, len(data))
		}
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		_, err := readImageHeader(data, testPixels)
		runtime.ReadMemStats(&after)
		if errorCode(err) != "too_many_pixels" {
			t.Errorf("%s: %v", name, err)
		}
		if n := after.TotalAlloc - before.TotalAlloc; n > 100_000 {
			t.Errorf("%s: %d bytes allocated", name, n)
		}
	}
}

// smallImages has one small file of each kind.
func smallImages(t testing.TB) map[string][]byte {
	pixel := image.NewNRGBA(image.Rect(0, 0, 5, 4))
	pixel.Set(1, 1, color.NRGBA{200, 100, 50, 128})
	var animation bytes.Buffer
	frames := &gif.GIF{Delay: []int{1, 1}}
	for range 2 {
		frames.Image = append(frames.Image, image.NewPaletted(image.Rect(0, 0, 6, 5), color.Palette{color.Black, color.Transparent}))
	}
	if err := gif.EncodeAll(&animation, frames); err != nil {
		t.Fatal(err)
	}
	return map[string][]byte{
		"jpeg":             withJPEGSegment(encodedJPEG(t, photo(20, 17), 60), 0xe1, exifName+exifData(6)),
		"progressive jpeg": goTestdata(t, "testdata/video-001.q50.420.progressive.jpeg"),
		"png":              withPNGChunk(encodedPNG(t, pixel), "eXIf", exifData(3)),
		"interlaced png":   goTestdata(t, "png/testdata/gray-gradient.interlaced.png"),
		"gif":              animation.Bytes(),
		"lossless webp":    webpTestdata(t, "gopher-doc.1bpp.lossless.webp"),
		"lossy webp":       webpTestdata(t, "video-001.lossy.webp"),
	}
}

func TestTruncatedInputNeverPanics(t *testing.T) {
	t.Parallel()
	for name, data := range smallImages(t) {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			for n := 0; n < len(data); n += 1 + len(data)/300 {
				_, err := compressBytes(data[:n], 8)
				code := errorCode(err)
				if err != nil && code != "corrupt_image" && code != "not_an_image" {
					t.Errorf("first %d bytes of %d: %v", n, len(data), err)
				}
				if err == nil && n < len(data)/2 {
					t.Errorf("first %d bytes of %d pass for an image", n, len(data))
				}
			}
		})
	}
}

func TestPanicFailsThatImageAlone(t *testing.T) {
	t.Parallel()
	bounds := image.Rect(0, 0, 8, 8)
	cut := &image.NRGBA{Pix: make([]byte, 100), Stride: 32, Rect: bounds}
	d := &decodedImage{header: imageHeader{Format: formatPNG, Width: 8, Height: 8}, img: cut}
	if _, err := compressImage(d, nil, nil, testQuality); errorCode(err) != "decoder_panic" {
		t.Errorf("got %v", err)
	}
}

// Not parallel: it looks at the process's count of allocated bytes. What a
// decoder allocates in all is no less than what it ever holds.
func TestCostCoversTheDecoder(t *testing.T) {
	deep := image.NewNRGBA64(image.Rect(0, 0, 700, 500))
	for i := range deep.Pix {
		deep.Pix[i] = uint8(i)
	}
	tests := smallImages(t)
	tests["16-bit png"] = encodedPNG(t, deep)
	tests["baseline jpeg"] = encodedJPEG(t, photo(1001, 701), 90)
	tests["lossy webp"] = webpTestdata(t, "blue-purple-pink-large.normal-filter.lossy.webp")
	tests["lossless webp"] = webpTestdata(t, "blue-purple-pink-large.lossless.webp")
	tests["interlaced png"] = goTestdata(t, "png/testdata/benchRGB-interlace.png")
	tests["larger progressive jpeg"] = goTestdata(t, "testdata/video-001.progressive.jpeg")
	tests["cmyk jpeg"] = goTestdata(t, "testdata/video-001.cmyk.jpeg")
	for name, data := range tests {
		h, err := readImageHeader(data, testPixels)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		d, err := decodeImage(data, h, max(h.Width, h.Height), imageTools{})
		runtime.ReadMemStats(&after)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		allocated := int64(after.TotalAlloc - before.TotalAlloc)
		if bound := h.decodeBytes + planeBytes(d.img) + sideCost*int64(h.Width+h.Height) + 60_000; allocated > bound {
			t.Errorf("%s: decoder allocated %d, counted %d", name, allocated, bound)
		}
	}
}

// planeBytes is how long an image's planes are.
func planeBytes(img image.Image) int64 {
	switch m := img.(type) {
	case *image.Gray:
		return int64(len(m.Pix))
	case *image.YCbCr:
		return int64(len(m.Y) + len(m.Cb) + len(m.Cr))
	}
	return int64(len(img.(*image.NRGBA).Pix))
}

// White noise is the worst that an encoder can get. Not parallel: it looks at
// the process's count of allocated bytes.
func TestCostCoversEncodedNoise(t *testing.T) {
	colour := noise(512, 512, 1)
	grey := &image.Gray{Pix: colour.Y, Stride: colour.YStride, Rect: colour.Rect}
	for _, quality := range []int{1, testQuality, 100} {
		for name, test := range map[string]struct {
			image   image.Image
			samples float64 // a pixel
		}{"colour": {colour, 1.5}, "grey": {grey, 1}} {
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			encodeJPEGPlanes(test.image, quality, nil)
			runtime.ReadMemStats(&after)
			held := float64(after.TotalAlloc - before.TotalAlloc - 200_000) // pieces that are not full
			if held /= test.samples * 512 * 512; held > jpegSample {
				t.Errorf("%s at quality %d: %.2f bytes a sample, %.2f are counted", name, quality, held, jpegSample)
			}
		}
	}
}

const memoryChild = "IMAGE_TEST_MEMORY_CHILD"

// TestMemoryOf20Megapixels takes a photo through in a process of its own and
// asks how much memory the runtime has ever mapped on top of the idle process.
func TestMemoryOf20Megapixels(t *testing.T) {
	if name := os.Getenv(memoryChild); name != "" {
		printMappedFor(t, name)
		return
	}
	if testing.Short() {
		t.Skip("takes seconds")
	}
	t.Parallel()
	const limit = 100 << 20
	name := filepath.Join(t.TempDir(), "photo.jpg")
	data := tallJPEG(t, encodedJPEG(t, photo(5472, 16), 85), 3648/16)
	if err := os.WriteFile(name, data, 0o600); err != nil {
		t.Fatal(err)
	}
	child := exec.Command(os.Args[0], "-test.run=^TestMemoryOf20Megapixels$", "-test.v")
	child.Env = append(os.Environ(), memoryChild+"="+name)
	out, err := child.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	_, after, ok := strings.Cut(string(out), "mapped ")
	value, _, _ := strings.Cut(after, " ")
	mapped, err := strconv.ParseInt(value, 10, 64)
	if !ok || err != nil {
		t.Fatalf("no figure in %q", out)
	}
	h := headerOf(t, data)
	t.Logf("20 megapixels of %d kB: %.1f MiB; Cost %.1f MiB, at 2048 %.1f MiB", len(data)>>10,
		float64(mapped)/(1<<20), float64(h.costAt(maxImageSide, nil))/(1<<20), float64(h.costAt(2048, nil))/(1<<20))
	if mapped > limit {
		t.Errorf("%d bytes on top of idle, want at most %d", mapped, limit)
	}
	if mapped > h.costAt(maxImageSide, nil) || mapped > h.costAt(2048, nil) {
		t.Errorf("%d bytes on top of idle, but the cost says %d, and %d at 2048", mapped, h.costAt(maxImageSide, nil), h.costAt(2048, nil))
	}
}

// tallJPEG stacks a JPEG that is one row of MCUs high rows times, by repeating its
// scan with restart markers: a big photo at the price of a small one.
func tallJPEG(t *testing.T, strip []byte, rows int) []byte {
	t.Helper()
	var out []byte
	for s := range jpegSegments(strip) {
		switch s.kind {
		case jpegSOF0:
			out = append(out, s.raw...)
			frame := out[len(out)-len(s.body):]
			height, width := binary.BigEndian.Uint16(frame[1:]), binary.BigEndian.Uint16(frame[3:])
			binary.BigEndian.PutUint16(frame[1:], height*uint16(rows))
			out = append(out, 0xff, jpegDRI[0], 0, 4)
			out = binary.BigEndian.AppendUint16(out, (width+15)/16)
		case jpegSOS:
			header := 4 + len(s.body)
			out = append(out, s.raw[:header]...)
			for i := range rows {
				out = append(out, s.raw[header:]...)
				out = append(out, 0xff, 0xd0+byte(i%8))
			}
			out = out[:len(out)-2]
		default:
			out = append(out, s.raw...)
		}
	}
	return out
}

// printMappedFor runs in the child. Mapped memory never shrinks, so its growth
// is the peak; the race detector's shadow is not in it.
func printMappedFor(t *testing.T, name string) {
	data := readFile(t, name)
	runtime.GC()
	before := mappedBytes()
	if _, err := compressBytes(data, 2048); err != nil {
		t.Fatal(err)
	}
	fmt.Printf("mapped %d bytes\n", mappedBytes()-before)
}

func mappedBytes() int64 {
	sample := []metrics.Sample{{Name: "/memory/classes/total:bytes"}}
	metrics.Read(sample)
	return int64(min(sample[0].Value.Uint64(), math.MaxInt64))
}

func FuzzDecodeImage(f *testing.F) {
	for _, data := range smallImages(f) {
		f.Add(data)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		const maxPixels = 1 << 16
		h, err := readImageHeader(data, maxPixels)
		if err != nil {
			if code := errorCode(err); code != "not_an_image" && code != "corrupt_image" && code != "too_many_pixels" && code != "too_many_scans" {
				t.Fatalf("header: %v", err)
			}
			return
		}
		d, err := decodeImage(data, h, 32, imageTools{})
		if err != nil {
			if code := errorCode(err); code != "corrupt_image" {
				t.Fatalf("decode: %v", err)
			}
			return
		}
		all, err := compressImage(d, data, []int{20, 3}, testQuality)
		if err != nil {
			t.Fatalf("compress: %v", err)
		}
		for _, c := range all {
			if _, _, err := image.Decode(bytes.NewReader(c.Data)); err != nil {
				t.Fatalf("result: %v", err)
			}
		}
	})
}
