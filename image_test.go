package main

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"image"
	"image/color"
	"image/gif"
	"image/jpeg"
	"image/png"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

const (
	testPixels  = 50_000_000
	testQuality = 80
)

// compressBytes takes an image file through the whole way.
func compressBytes(data []byte, maxSide int) (compressedImage, error) {
	all, err := compressSizes(data, maxSide)
	if err != nil {
		return compressedImage{}, err
	}
	return all[0], nil
}

// compressSizes makes variants too.
func compressSizes(data []byte, maxSide int, widths ...int) ([]compressedImage, error) {
	h, err := readImageHeader(data, testPixels)
	if err != nil {
		return nil, err
	}
	d, err := decodeImage(data, h, maxSide, imageTools{})
	if err != nil {
		return nil, err
	}
	return compressImage(d, data, widths, testQuality)
}

// mustCompress also checks that the result is what it says it is.
func mustCompress(t *testing.T, data []byte, maxSide int) (compressedImage, image.Image) {
	t.Helper()
	c, err := compressBytes(data, maxSide)
	if err != nil {
		t.Fatal(err)
	}
	m, format, err := image.Decode(bytes.NewReader(c.Data))
	if err != nil {
		t.Fatalf("result: %v", err)
	}
	if mediaType("."+c.Ext) != "image/"+format {
		t.Errorf("result is %s, but said to be %s", format, c.Ext)
	}
	if format == formatWebP { // a kept source, which the decoder hands out in video range
		expandVideoRange(m)
	}
	if m.Bounds().Size() != image.Pt(c.Width, c.Height) {
		t.Errorf("result is %v, but said to be %d×%d", m.Bounds(), c.Width, c.Height)
	}
	return c, m
}

func headerOf(t testing.TB, data []byte) imageHeader {
	t.Helper()
	h, err := readImageHeader(data, testPixels)
	if err != nil {
		t.Fatal(err)
	}
	return h
}

// decoded is an image as the standard library, or x/image, sees it.
func decoded(t testing.TB, data []byte) image.Image {
	t.Helper()
	m, _, err := image.Decode(bytes.NewReader(data))
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func errorCode(err error) string {
	var e *imageError
	if errors.As(err, &e) && e.Permanent {
		return e.Code
	}
	return fmt.Sprint(err)
}

// goTestdata reads a file of the Go distribution's src/image.
func goTestdata(t testing.TB, name string) []byte {
	t.Helper()
	return readTestFile(t, filepath.Join(goOutput(t, "env", "GOROOT"), "src", "image", name))
}

// webpTestdata reads a file of golang.org/x/image's testdata.
func webpTestdata(t testing.TB, name string) []byte {
	t.Helper()
	return readTestFile(t, filepath.Join(goOutput(t, "list", "-m", "-f", "{{.Dir}}", "golang.org/x/image"), "testdata", name))
}

func goOutput(t testing.TB, args ...string) string {
	t.Helper()
	out, err := exec.Command("go", args...).Output()
	if err != nil {
		t.Skipf("go %s: %v", args[0], err)
	}
	return strings.TrimSpace(string(out))
}

func readTestFile(t testing.TB, name string) []byte {
	t.Helper()
	if _, err := os.Stat(name); errors.Is(err, os.ErrNotExist) {
		t.Skipf("sample image is not there: %v", err)
	}
	return readFile(t, name)
}

func readFile(t testing.TB, name string) []byte {
	t.Helper()
	data, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// photo draws something like a photo: soft shapes, an edge, texture.
func photo(w, h int) *image.YCbCr {
	m := image.NewYCbCr(image.Rect(0, 0, w, h), image.YCbCrSubsampleRatio420)
	for y := range h {
		row := m.Y[y*m.YStride:][:w]
		for x := range row {
			v := 60 + 120*y/h + 40*((x*8/w+y*8/h)&1) + (x*7+y*13+x*y>>4)&15
			row[x] = uint8(v)
		}
	}
	for i := range m.Cb {
		x, y := i%m.CStride, i/m.CStride
		m.Cb[i] = uint8(90 + 140*x/w)
		m.Cr[i] = uint8(90 + 140*y/h)
	}
	return m
}

func encodedJPEG(t testing.TB, m image.Image, quality int) []byte {
	t.Helper()
	var b bytes.Buffer
	if err := jpeg.Encode(&b, m, &jpeg.Options{Quality: quality}); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func encodedPNG(t testing.TB, m image.Image) []byte {
	t.Helper()
	var b bytes.Buffer
	if err := png.Encode(&b, m); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func encodedGIF(t testing.TB, m image.Image) []byte {
	t.Helper()
	var b bytes.Buffer
	if err := gif.Encode(&b, m, nil); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// withJPEGSegment inserts a segment after the start marker.
func withJPEGSegment(data []byte, marker byte, body string) []byte {
	segment := binary.BigEndian.AppendUint16([]byte{0xff, marker}, uint16(2+len(body)))
	return bytes.Join([][]byte{data[:2], segment, []byte(body), data[2:]}, nil)
}

// withPNGChunk inserts a chunk after the header.
func withPNGChunk(data []byte, kind, body string) []byte {
	return bytes.Join([][]byte{data[:33], pngChunk(kind, body), data[33:]}, nil)
}

func pngChunk(kind, body string) []byte {
	chunk := binary.BigEndian.AppendUint32(nil, uint32(len(body)))
	chunk = append(chunk, kind+body...)
	return binary.BigEndian.AppendUint32(chunk, crc32.ChecksumIEEE(chunk[4:]))
}

// webpFile makes a WebP with a VP8X chunk of the given flags before the others.
func webpFile(flags byte, w, h int, chunks ...[]byte) []byte {
	extended := []byte{flags, 0, 0, 0, byte(w - 1), byte((w - 1) >> 8), 0, byte(h - 1), byte((h - 1) >> 8), 0}
	out := appendRIFF(newWebP(), "VP8X", extended)
	return finishWebP(append(out, bytes.Join(chunks, nil)...))
}

// corners is an image whose four quarters differ, and whose sides do.
func corners(w, h int) *image.RGBA {
	m := image.NewRGBA(image.Rect(0, 0, w, h))
	quarter := []color.RGBA{{220, 40, 40, 255}, {40, 200, 60, 255}, {50, 60, 220, 255}, {230, 220, 60, 255}}
	for y := range h {
		for x := range w {
			m.SetRGBA(x, y, quarter[2*(2*y/h)+2*x/w])
		}
	}
	return m
}

func TestTransparentColourDoesNotBleed(t *testing.T) {
	t.Parallel()
	m := image.NewNRGBA(image.Rect(0, 0, 200, 200))
	for y := range 200 {
		for x := range 200 {
			c := color.NRGBA{0, 255, 0, 0} // invisible green
			if (x-100)*(x-100)+(y-100)*(y-100) < 80*80 {
				c = color.NRGBA{255, 0, 0, 255}
			}
			m.SetNRGBA(x, y, c)
		}
	}
	c, got := mustCompress(t, encodedPNG(t, m), 60)
	if c.Ext != "png" {
		t.Fatalf("transparent image became %s", c.Ext)
	}
	partly := 0
	for y := range 60 {
		for x := range 60 {
			p := color.NRGBAModel.Convert(got.At(x, y)).(color.NRGBA)
			if p.A > 0 && p.A < 255 {
				partly++
			}
			if p.A > 8 && (p.R < 240 || p.G > 12) {
				t.Fatalf("pixel (%d,%d) is %v, want red", x, y, p)
			}
		}
	}
	if partly == 0 {
		t.Error("the disc has no soft edge")
	}
}

func TestHiddenColourIsCleared(t *testing.T) {
	t.Parallel()
	m := image.NewNRGBA(image.Rect(0, 0, 2, 1))
	copy(m.Pix, []byte{90, 80, 70, 0, 90, 80, 70, 1})
	d := &storedImage{header: imageHeader{Width: 2, Height: 1}, pixels: m, frame: m.Rect}
	if got := d.render(2, 1).(*image.NRGBA).Pix; !bytes.Equal(got, []byte{0, 0, 0, 0, 90, 80, 70, 1}) {
		t.Errorf("pixels are %v", got)
	}
}

// What is kept of a source holds no more memory than it is long.
func TestKeptSourceHoldsNothingElse(t *testing.T) {
	t.Parallel()
	data := encodeJPEGPlanes(photo(200, 100), 30, nil)
	c, err := compressBytes(append(bytes.Clone(data), make([]byte, 1<<20)...), 2048)
	if err != nil {
		t.Fatal(err)
	}
	if len(c.Data) != len(data) || cap(c.Data) > 2*len(data) {
		t.Errorf("%d bytes of %d are kept, and %d held", len(c.Data), len(data), cap(c.Data))
	}
}

func TestCMYKIsNeverKept(t *testing.T) {
	t.Parallel()
	data := goTestdata(t, "testdata/video-001.cmyk.jpeg")
	h := headerOf(t, data)
	if _, ok := keepSource(h, data); ok {
		t.Error("kept")
	}
}

func TestColourIsKept(t *testing.T) {
	t.Parallel()
	tests := map[string]struct {
		data, want []byte
		mean       float64
	}{
		"jpeg":                {goTestdata(t, "testdata/video-001.jpeg"), goTestdata(t, "testdata/video-001.png"), 5},
		"progressive jpeg":    {goTestdata(t, "testdata/video-001.progressive.jpeg"), goTestdata(t, "testdata/video-001.png"), 5},
		"4:4:4 jpeg":          {goTestdata(t, "testdata/video-001.q50.444.jpeg"), goTestdata(t, "testdata/video-001.png"), 6},
		"4:1:0 jpeg":          {goTestdata(t, "testdata/video-001.q50.410.jpeg"), goTestdata(t, "testdata/video-001.png"), 7},
		"4:4:0 jpeg":          {goTestdata(t, "testdata/video-001.q50.440.progressive.jpeg"), goTestdata(t, "testdata/video-001.png"), 7},
		"rgb jpeg":            {goTestdata(t, "testdata/video-001.rgb.jpeg"), goTestdata(t, "testdata/video-001.rgb.png"), 5},
		"cmyk jpeg":           {goTestdata(t, "testdata/video-001.cmyk.jpeg"), goTestdata(t, "testdata/video-001.cmyk.png"), 5},
		"gif":                 {goTestdata(t, "testdata/video-001.gif"), goTestdata(t, "testdata/video-001.png"), 8},
		"interlaced gif":      {goTestdata(t, "testdata/video-001.interlaced.gif"), goTestdata(t, "testdata/video-001.png"), 8},
		"lossy webp":          {webpTestdata(t, "video-001.lossy.webp"), goTestdata(t, "testdata/video-001.png"), 5},
		"lossless webp":       {webpTestdata(t, "blue-purple-pink.lossless.webp"), webpTestdata(t, "blue-purple-pink.png"), 4},
		"webp with a palette": {webpTestdata(t, "gopher-doc.4bpp.lossless.webp"), webpTestdata(t, "gopher-doc.4bpp.png"), 4},
		"webp with alpha":     {webpTestdata(t, "gopher-doc.with-alpha.lossless.webp"), webpTestdata(t, "gopher-doc.with-alpha.png"), 4},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			want := decoded(t, test.want)
			_, got := mustCompress(t, test.data, 2048)
			comparePixels(t, got, want, test.mean, 255)
			_, small := mustCompress(t, test.data, 60)
			_, wantSmall := mustCompress(t, test.want, 60)
			comparePixels(t, small, wantSmall, test.mean, 255)
		})
	}
}

func TestGreyStaysGrey(t *testing.T) {
	t.Parallel()
	grey16 := image.NewGray16(image.Rect(0, 0, 90, 90))
	opaqueGrey := image.NewNRGBA(grey16.Rect)
	for i := range 90 * 90 {
		binary.BigEndian.PutUint16(grey16.Pix[2*i:], uint16(i*8))
		copy(opaqueGrey.Pix[4*i:], []byte{uint8(i), uint8(i), uint8(i), 255})
	}
	tests := map[string][]byte{
		"jpeg":             goTestdata(t, "testdata/video-005.gray.jpeg"),
		"png":              goTestdata(t, "testdata/video-005.gray.png"),
		"16-bit png":       encodedPNG(t, grey16),
		"png of rgb":       encodedPNG(t, opaqueGrey),
		"gif":              goTestdata(t, "testdata/video-005.gray.gif"),
		"jpeg, 2×2 factor": goTestdata(t, "testdata/video-005.gray.q50.2x2.jpeg"),
	}
	for name, data := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			if _, m := mustCompress(t, data, 64); m.ColorModel() != color.GrayModel {
				t.Errorf("result is %T", m)
			}
		})
	}
}

func TestPNGSuite(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(goOutput(t, "env", "GOROOT"), "src", "image", "png", "testdata", "pngsuite")
	names, err := filepath.Glob(filepath.Join(dir, "*.png"))
	if err != nil || len(names) == 0 {
		t.Skipf("no pngsuite in %s: %v", dir, err)
	}
	for _, name := range names {
		t.Run(filepath.Base(name), func(t *testing.T) {
			t.Parallel()
			data := readTestFile(t, name)
			want := decoded(t, data)
			_, got := mustCompress(t, data, 2048)
			comparePixels(t, got, want, 12, 255) // JPEG is hard on such small graphics
			mustCompress(t, data, 11)
		})
	}
}

func TestFirstGIFFrameOnItsCanvas(t *testing.T) {
	t.Parallel()
	palette := color.Palette{color.NRGBA{250, 0, 0, 255}, color.NRGBA{0, 0, 250, 255}, color.Transparent}
	first := image.NewPaletted(image.Rect(2, 3, 8, 9), palette)
	first.SetColorIndex(4, 5, 2)
	second := image.NewPaletted(image.Rect(0, 0, 10, 12), palette)
	for i := range second.Pix {
		second.Pix[i] = 1
	}
	var data bytes.Buffer
	animation := &gif.GIF{Image: []*image.Paletted{first, second}, Delay: []int{5, 5}, Config: image.Config{Width: 10, Height: 12}}
	if err := gif.EncodeAll(&data, animation); err != nil {
		t.Fatal(err)
	}
	want := image.NewNRGBA(image.Rect(0, 0, 10, 12))
	for y := 3; y < 9; y++ {
		for x := 2; x < 8; x++ {
			want.Set(x, y, first.At(x, y))
		}
	}
	c, got := mustCompress(t, data.Bytes(), 100)
	if _, ok := got.(*image.Paletted); c.Ext != "png" || !ok {
		t.Errorf("result is %s, %T; want a png with a palette", c.Ext, got)
	}
	comparePixels(t, got, want, 0, 0)
}

func TestFirstWebPFrameOnItsCanvas(t *testing.T) {
	t.Parallel()
	still := webpTestdata(t, "gopher-doc.with-alpha.lossless.webp")
	want := decoded(t, still)
	w, h := want.Bounds().Dx(), want.Bounds().Dy()
	head := []byte{2, 0, 0, 1, 0, 0, byte(w - 1), byte((w - 1) >> 8), 0, byte(h - 1), byte((h - 1) >> 8), 0, 9, 0, 0, 0}
	for c := range webpChunks(still) {
		if c.kind == "VP8L" {
			head = append(head, c.raw...)
		}
	}
	frame := appendRIFF(nil, "ANMF", head)
	data := webpFile(webpAnimationFlag|webpAlphaFlag, w+10, h+10, appendRIFF(nil, "ANIM", make([]byte, 6)), frame, frame)
	canvas := image.NewNRGBA(image.Rect(0, 0, w+10, h+10))
	for y := range h {
		for x := range w {
			canvas.Set(x+4, y+2, want.At(x, y))
		}
	}
	c, got := mustCompress(t, data, 1000)
	if c.Ext != "png" {
		t.Errorf("result is %s", c.Ext)
	}
	comparePixels(t, got, canvas, 0, 0)
}

func TestSizeAndFormat(t *testing.T) {
	t.Parallel()
	opaque := corners(300, 200)
	noisy := image.NewNRGBA(image.Rect(0, 0, 64, 64))
	for i := range noisy.Pix {
		noisy.Pix[i] = uint8(i * i >> 3)
	}
	tests := map[string]struct {
		data []byte
		side int
		ext  string
		w, h int
	}{
		"small photo is not enlarged":      {encodedJPEG(t, photo(300, 200), 95), 2048, "jpg", 300, 200},
		"wide photo fits":                  {encodedJPEG(t, photo(300, 200), 95), 150, "jpg", 150, 100},
		"tall photo fits":                  {encodedJPEG(t, photo(200, 300), 95), 150, "jpg", 100, 150},
		"thin image keeps a pixel":         {encodedJPEG(t, photo(300, 1), 95), 100, "jpg", 100, 1},
		"opaque png becomes jpeg":          {encodedPNG(t, opaque), 150, "jpg", 150, 100},
		"flat png that fits stays":         {encodedPNG(t, opaque), 2048, "png", 300, 200},
		"alpha with many colours":          {encodedPNG(t, noisy), 32, "png", 32, 32},
		"lossless webp that is small":      {webpTestdata(t, "gopher-doc.1bpp.lossless.webp"), 2048, "webp", 75, 100},
		"gif that fits and is small":       {encodedGIF(t, opaque), 2048, "gif", 300, 200},
		"cmyk is converted although large": {goTestdata(t, "testdata/video-001.cmyk.jpeg"), 2048, "jpg", 150, 103},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c, _ := mustCompress(t, test.data, test.side)
			if c.Ext != test.ext || c.Width != test.w || c.Height != test.h {
				t.Errorf("got %s of %d×%d, want %s of %d×%d", c.Ext, c.Width, c.Height, test.ext, test.w, test.h)
			}
		})
	}
}

func TestNeverLargerThanUsableSource(t *testing.T) {
	t.Parallel()
	for _, quality := range []int{1, 20, 50, 80, 81, 95} {
		source := encodedJPEG(t, photo(160, 120), quality)
		if c, _ := mustCompress(t, source, 2048); len(c.Data) > len(source) {
			t.Errorf("quality %d: %d bytes became %d", quality, len(source), len(c.Data))
		}
	}
	for name, source := range smallImages(t) {
		h := headerOf(t, source)
		if c, _ := mustCompress(t, source, 2048); !h.Orientation.turns() && !h.Animated && len(c.Data) > len(source) {
			t.Errorf("%s: %d bytes became %d", name, len(source), len(c.Data))
		}
	}
}
