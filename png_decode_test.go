package main

import (
	"bytes"
	"compress/zlib"
	"encoding/binary"
	"fmt"
	"image"
	"image/color"
	"image/png"
	"io"
	"math/rand/v2"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// decodeExactly decodes a PNG at its own size, not turned.
func decodeExactly(data []byte) (image.Image, error) {
	h, err := readImageHeader(data, 1<<20)
	if err != nil {
		return nil, err
	}
	h.Orientation = 0
	return h.decodeTo(data, image.Pt(h.Width, h.Height), imageTools{})
}

// checkPNG holds the decoder against image/png: it accepts the same, of what is
// not too large and begins with its header, and makes the same of it.
func checkPNG(t *testing.T, name string, data []byte) {
	t.Helper()
	got, err := decodeExactly(data)
	if code := errorCode(err); code == "too_many_pixels" || code == "not_an_image" || len(data) > 16 && string(data[12:16]) != "IHDR" {
		return
	}
	want, refused := png.Decode(bytes.NewReader(data))
	if (err == nil) != (refused == nil) {
		t.Errorf("%s: got %v, image/png says %v", name, err, refused)
	}
	if err == nil && refused == nil && !bytes.Equal(straight8(got), straight8(want)) {
		t.Errorf("%s: pixels differ from those of image/png", name)
	}
}

// straight8 are an image's pixels as straight RGBA, 8 bits to the nearest, and
// without the colour of what is transparent.
func straight8(m image.Image) (out []byte) {
	b := m.Bounds()
	for y := b.Min.Y; y < b.Max.Y; y++ {
		for x := b.Min.X; x < b.Max.X; x++ {
			p := straightOf(m.At(x, y))
			if p.A == 0 {
				p = color.NRGBA{}
			}
			out = append(out, p.R, p.G, p.B, p.A)
		}
	}
	return out
}

// straightOf converts what color.NRGBAModel would by way of premultiplied samples,
// and cut off.
func straightOf(c color.Color) color.NRGBA {
	round := func(v uint16) uint8 { return uint8((uint32(v) + 128) / 257) }
	switch c := c.(type) {
	case color.Gray16:
		return color.NRGBA{round(c.Y), round(c.Y), round(c.Y), 255}
	case color.RGBA64: // opaque
		return color.NRGBA{round(c.R), round(c.G), round(c.B), 255}
	case color.NRGBA64:
		return color.NRGBA{round(c.R), round(c.G), round(c.B), round(c.A)}
	}
	return color.NRGBAModel.Convert(c).(color.NRGBA)
}

// pngKind is one of the ways to store a PNG.
type pngKind struct {
	colour, depth byte
	interlaced    byte
	transparency  string // the body of tRNS
}

// pngKinds are all there are.
func pngKinds() (kinds []pngKind) {
	for colour, depths := range pngDepths {
		for _, depth := range []byte(depths) {
			for interlaced := range byte(2) {
				kinds = append(kinds, pngKind{colour, depth, interlaced, ""})
				if transparency := map[byte]string{pngGrey: "\xff\x01", pngTruecolour: "\x00\x01\x00\x02\x01\x01", pngIndexed: "\x00\x80"}[colour]; transparency != "" {
					kinds = append(kinds, pngKind{colour, depth, interlaced, transparency})
				}
			}
		}
	}
	return kinds
}

// header is the IHDR of a PNG of that kind.
func (k pngKind) header(w, h uint32) string {
	body := binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint32(nil, w), h)
	return "IHDR" + string(append(body, k.depth, k.colour, 0, 0, k.interlaced))
}

// chunksOf are those of a PNG of that kind whose pixels are noise of few levels,
// in all filters, but that the pixels are not packed.
func (k pngKind) chunksOf(w, h int, random *rand.Rand) []string {
	header := k.header(uint32(w), uint32(h))
	chunks := []string{header}
	if k.colour == pngIndexed {
		chunks = append(chunks, "PLTE\x01\x02\x03\x80\x90\xa0")
	}
	if k.transparency != "" {
		chunks = append(chunks, "tRNS"+k.transparency)
	}
	passes := [][2]int{{w, h}}
	if k.interlaced == 1 {
		passes = nil
		for _, p := range adam7 {
			if size := [2]int{(w - p.x + p.dx - 1) / p.dx, (h - p.y + p.dy - 1) / p.dy}; size[0] > 0 {
				passes = append(passes, size)
			}
		}
	}
	var pixels []byte
	for _, size := range passes {
		for range size[1] {
			pixels = append(pixels, byte(random.IntN(5)))
			for range parsePNGHeader([]byte(header[4:])).rowBytes(size[0]) {
				pixels = append(pixels, byte(random.IntN(3)+random.IntN(2)*random.IntN(256)))
			}
		}
	}
	return append(chunks, "IDAT"+string(pixels), "IEND")
}

// pngOf makes a file of chunks.
func pngOf(chunks ...string) []byte {
	out := []byte(pngSignature)
	for _, c := range chunks {
		out = append(out, pngChunk(c[:4], c[4:])...)
	}
	return out
}

// packed packs the pixels.
func packed(chunks []string) []string {
	chunks = slices.Clone(chunks)
	for i, c := range chunks {
		if strings.HasPrefix(c, "IDAT") {
			var out bytes.Buffer
			packer := zlib.NewWriter(&out)
			io.WriteString(packer, c[4:])
			packer.Close()
			chunks[i] = "IDAT" + out.String()
		}
	}
	return chunks
}

func TestPNGIsDecodedAsByTheStandardLibrary(t *testing.T) {
	t.Parallel()
	random := rand.New(rand.NewPCG(1, 2))
	for _, kind := range pngKinds() {
		for _, size := range [][2]int{{1, 1}, {1, 9}, {9, 1}, {2, 3}, {3, 2}, {5, 5}, {8, 8}, {33, 17}} {
			chunks := packed(kind.chunksOf(size[0], size[1], random))
			data := pngOf(chunks...)
			if _, err := decodeExactly(data); err != nil {
				t.Errorf("%+v of %v: %v", kind, size, err)
			}
			checkPNG(t, fmt.Sprintf("%+v of %v", kind, size), data)
		}
	}
	dir := filepath.Join(goOutput(t, "env", "GOROOT"), "src", "image")
	for _, pattern := range []string{"testdata/*.png", "png/testdata/*.png", "png/testdata/pngsuite/*.png"} {
		names, err := filepath.Glob(filepath.Join(dir, pattern))
		if err != nil || len(names) == 0 {
			t.Errorf("no %s: %v", pattern, err)
		}
		for _, name := range names {
			checkPNG(t, filepath.Base(name), readTestFile(t, name))
		}
	}
}

// Whatever is wrong with a file, this decoder refuses it where image/png does.
func TestBadPNGIsRefusedAsByTheStandardLibrary(t *testing.T) {
	t.Parallel()
	random := rand.New(rand.NewPCG(3, 4))
	for _, kind := range pngKinds() {
		plain := kind.chunksOf(6, 5, random)
		chunks := packed(plain)
		data := pngOf(chunks...)
		check := func(name string, data []byte) { t.Helper(); checkPNG(t, fmt.Sprintf("%+v, %s", kind, name), data) }
		for n := range data {
			check(fmt.Sprintf("cut at %d", n), data[:n])
			spoilt := bytes.Clone(data)
			spoilt[n] ^= 1 << random.IntN(8)
			check(fmt.Sprintf("byte %d changed", n), spoilt)
		}
		with := func(name string, chunks []string) { t.Helper(); check(name, pngOf(chunks...)) }
		at := slices.IndexFunc(chunks, func(c string) bool { return c[:4] == "IDAT" })
		before, stream, pixels, end := chunks[:at], chunks[at], plain[at], chunks[at+1:]
		with("more pixels", packed(slices.Concat(before, []string{pixels + "x"}, end)))
		with("fewer pixels", packed(slices.Concat(before, []string{pixels[:len(pixels)-1]}, end)))
		with("unknown filter", packed(slices.Concat(before, []string{"IDAT\x05" + pixels[5:]}, end)))
		with("a little behind the stream", slices.Concat(before, []string{stream + "x"}, end))
		with("much behind the stream", slices.Concat(before, []string{stream + strings.Repeat("x", 5000)}, end))
		with("a chunk behind the stream", slices.Concat(before, []string{stream, "IDATx"}, end))
		with("a wrong checksum of the pixels", slices.Concat(before, []string{stream[:len(stream)-1] + "x"}, end))
		with("in bytes", slices.Concat(before, inBytes(stream), end))
		with("torn", slices.Concat(before, []string{stream[:9], "teXt", "IDAT" + stream[9:]}, end))
		with("text and more pixels", slices.Concat(before, []string{stream, "teXtx", "IDATx"}, end))
		with("text before the pixels", slices.Concat(before, []string{"teXtx", stream}, end))
		with("an end that has a body", slices.Concat(before, []string{stream, "IENDx"}))
		with("no pixels", slices.Concat(before, end))
		with("a header that is too long", slices.Concat([]string{chunks[0] + "\x00"}, chunks[1:]))
		with("a header that is too short", slices.Concat([]string{chunks[0][:16]}, chunks[1:]))
		for at := range chunks {
			with(fmt.Sprintf("without %.4q", chunks[at]), slices.Delete(slices.Clone(chunks), at, at+1))
		}
		for at := len("IHDR") + 8; at < len(chunks[0]); at++ {
			for value := range byte(18) {
				header := []byte(chunks[0])
				header[at] = value
				with(fmt.Sprintf("byte %d of the header %d", at, value), slices.Concat([]string{string(header)}, chunks[1:]))
			}
		}
		for _, extra := range []string{"PLTE123", "PLTE1234", "PLTE", "PLTE" + strings.Repeat("abc", 256), "PLTE" + strings.Repeat("abc", 257),
			"tRNS", "tRNS\x00\x01", "tRNS\x00\x01\x00\x01\x00\x01", "tRNS" + strings.Repeat("\x40", 256), "tRNS" + strings.Repeat("\x40", 257), chunks[0]} {
			for at := range len(chunks) + 1 {
				with(fmt.Sprintf("%.5q put in at %d", extra, at), slices.Insert(slices.Clone(chunks), at, extra))
				with(fmt.Sprintf("%.5q instead of %d", extra, at), slices.Concat(chunks[:max(at, 1)-1], []string{extra}, chunks[at:]))
			}
		}
	}
}

// The last row is read to its end, and what follows, even if the resampler has no
// weight for it.
func TestBadPNGIsRefusedToItsLastRow(t *testing.T) {
	t.Parallel()
	const height = 40_000
	pixels := make([]byte, 2*height)
	for _, filter := range []byte{0, 5} {
		pixels[2*height-2] = filter
		data := pngOf(packed([]string{pngKind{colour: pngGrey, depth: 8}.header(1, height), "IDAT" + string(pixels), "IEND"})...)
		_, err := compressBytes(data, 1)
		if (err != nil) != (filter == 5) {
			t.Errorf("a last row of filter %d: %v", filter, err)
		}
	}
}

// inBytes spreads a chunk's body over as many as it is long, with empty ones between them.
func inBytes(chunk string) (chunks []string) {
	for i := 4; i < len(chunk); i++ {
		chunks = append(chunks, chunk[:4], chunk[:4]+chunk[i:i+1])
	}
	return chunks
}

// FuzzPNGAgainstStandard sets the checksums right, so that chance gets beyond them.
// Pixels are read as they are, and packed besides.
func FuzzPNGAgainstStandard(f *testing.F) {
	random := rand.New(rand.NewPCG(5, 6))
	for _, kind := range pngKinds() {
		chunks := kind.chunksOf(7, 5, random)
		f.Add(pngOf(chunks...))
		f.Add(pngOf(packed(chunks)...))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		if !bytes.HasPrefix(data, []byte(pngSignature)) {
			return
		}
		var chunks []string
		for c := range pngChunks(data) {
			chunks = append(chunks, string(c.raw[4:len(c.raw)-4]))
		}
		for _, data := range [][]byte{data, pngOf(chunks...), pngOf(packed(chunks)...)} {
			checkPNG(t, "file", data)
		}
	})
}

// BenchmarkPNG decodes row by row, and whole by image/png. The latter leaves 16 bits
// and palettes for later, the former does not.
func BenchmarkPNG(b *testing.B) {
	for name, data := range benchmarkPNGs(b) {
		h, err := readImageHeader(data, testPixels)
		if err != nil {
			b.Fatal(err)
		}
		b.Run(name+"/rows", func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				p, err := newPNGRows(data, h.png)
				if err != nil {
					b.Fatal(err)
				}
				if p.interlaced {
					p.merge()
				}
				if err := p.finish(); err != nil {
					b.Fatal(err)
				}
			}
		})
		b.Run(name+"/standard", func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if _, err := png.Decode(bytes.NewReader(data)); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func benchmarkPNGs(b *testing.B) map[string][]byte {
	const w, h = 1500, 1000
	m := photo(w, h)
	opaque, alpha, deep, grey := image.NewNRGBA(m.Rect), image.NewNRGBA(m.Rect), image.NewNRGBA64(m.Rect), image.NewGray(m.Rect)
	for y := range h {
		for x := range w {
			c := color.NRGBAModel.Convert(m.At(x, y)).(color.NRGBA)
			opaque.SetNRGBA(x, y, c)
			grey.SetGray(x, y, color.Gray{c.R})
			c.A = uint8(min(255, y))
			alpha.SetNRGBA(x, y, c)
			deep.Set(x, y, c)
		}
	}
	return map[string][]byte{"RGB": encodedPNG(b, opaque), "RGBA": encodedPNG(b, alpha), "RGBA of 16 bits": encodedPNG(b, deep), "grey": encodedPNG(b, grey),
		"palette": encodedPNG(b, palettedOf(fewColours(alpha))), "interlaced": goTestdata(b, "png/testdata/benchRGB-interlace.png")}
}

// fewColours leaves two bits of each channel.
func fewColours(m *image.NRGBA) *image.NRGBA {
	for i := range m.Pix {
		m.Pix[i] &= 0xc0
	}
	return m
}
