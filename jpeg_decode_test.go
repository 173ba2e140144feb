package main

import (
	"bytes"
	"errors"
	"fmt"
	"image"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// decodeBoth decodes a JPEG to fit in side × side by decodeJPEG, and another by
// image/jpeg and the same resampler.
func decodeBoth(data, other []byte, side int) (got, want image.Image, gotErr, wantErr error) {
	h, err := readImageHeader(data, testPixels)
	if err != nil || !h.jpeg.streams() {
		return nil, nil, err, err
	}
	size := h.outputSizes(side, nil)[0]
	got, gotErr = h.decodeTo(data, size, imageTools{})
	stored, wantErr := decodeStored(other, h)
	if wantErr != nil {
		return got, nil, gotErr, wantErr
	}
	w, ht := h.Orientation.size(size.X, size.Y)
	if m, ok := stored.pixels.(*image.YCbCr); ok {
		luma, chroma := h.jpeg.components[0], h.jpeg.components[1]
		return got, resized(m, h, w, ht, luma.h/chroma.h, luma.v/chroma.v), gotErr, nil
	}
	return got, stored.render(w, ht), gotErr, nil
}

// resized is an image whose chroma samples cover subX × subY pixels, at w × h stored
// pixels and upright.
func resized(m *image.YCbCr, header imageHeader, w, h, subX, subY int) *image.YCbCr {
	out := new(buffers).yCbCr(uprightRect(w, h, header.Orientation))
	feed := func(r *resampler, plane []byte, stride int) {
		r.feed(func(y int) []byte { return plane[y*stride:] }, r.vertical.source)
	}
	feed(lumaResampler(out.Y, out.YStride, header, w, h), m.Y, m.YStride)
	feed(chromaResampler(out.Cb, out.CStride, header, w, h, subX, subY), m.Cb, m.CStride)
	feed(chromaResampler(out.Cr, out.CStride, header, w, h, subX, subY), m.Cr, m.CStride)
	return out
}

// alike fails the test if a JPEG is not decoded as another is by image/jpeg, which
// rounds elsewhere.
func alike(t *testing.T, data, other []byte, sides ...int) {
	t.Helper()
	for _, side := range sides {
		got, want, err, wantErr := decodeBoth(data, other, side)
		if err != nil || wantErr != nil {
			t.Fatal(err, wantErr)
		}
		if a, b := samplesOf(got), samplesOf(want); len(a) != len(b) || farthest(a, b) > 1 {
			t.Errorf("in %d × %d: %d samples off by up to %d, of %d", side, side, len(a), farthest(a, b), len(b))
		}
	}
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
	photos, _ := filepath.Glob(".cache/photos/Picture_*.jpg") // small ones, for they take long
	if len(files) == 0 {
		t.Fatal("no files")
	}
	for _, name := range append(files, photos...) {
		t.Run(filepath.Base(name), func(t *testing.T) {
			t.Parallel()
			data := readTestFile(t, name)
			if h, err := readImageHeader(data, testPixels); err == nil && !h.jpeg.streams() {
				t.Skip("RGB or CMYK")
			}
			alike(t, data, data, maxImageSide, 500)
		})
	}
}

// cjpeg (libjpeg) makes what photographs seldom are, and image/jpeg never makes.
// However the coefficients are stored, they are the same.
func TestJPEGsOfEveryKind(t *testing.T) {
	t.Parallel()
	script := filepath.Join(t.TempDir(), "scans")
	if err := os.WriteFile(script, []byte("1; 0; 2;"), 0o600); err != nil {
		t.Fatal(err)
	}
	m := photo(149, 83)
	for _, sampling := range []string{"1x1", "2x1", "1x2", "2x2", "4x1", "4x2"} {
		for _, kind := range []string{"", "-grayscale", "-quality 100", "-quality 3", "-quality 1 -baseline"} {
			plain := strings.Fields("-sample " + sampling + " " + kind)
			other := cjpeg(t, m, plain...)
			for _, storage := range []string{"", "-progressive", "-restart 1", "-restart 3B", "-progressive -restart 7B", "-scans " + script, "-restart 5B -scans " + script} {
				if strings.Contains(kind, "gray") && strings.Contains(storage, "-scans") {
					continue
				}
				t.Run(sampling+kind+storage, func(t *testing.T) {
					t.Parallel()
					data := cjpeg(t, m, append(slices.Clone(plain), strings.Fields(storage)...)...)
					alike(t, data, other, maxImageSide, 70, 9)
					for _, n := range []int{2, len(data) / 2, len(data) - 10} {
						if _, err := compressBytes(data[:len(data)-n], 100); errorCode(err) != "corrupt_image" {
							t.Errorf("without its last %d bytes: %v", n, err)
						}
					}
				})
			}
		}
	}
}

// What is missing from a scan is not made up, although the file comes to its end.
func TestJPEGWithHolesIsRefused(t *testing.T) {
	t.Parallel()
	data := cjpeg(t, photo(149, 83), "-restart", "3B")
	second := bytes.Index(data, []byte("\xff\xd1"))
	whole := cjpeg(t, photo(149, 83))
	for name, file := range map[string][]byte{
		"short scan":           slices.Concat(whole[:len(whole)/2], []byte("\xff\xd9")),
		"short interval":       slices.Concat(data[:second-20], data[second:]),
		"no restart marker":    slices.Concat(data[:second], data[second+2:]),
		"other restart marker": slices.Concat(data[:second], []byte("\xff\xd2"), data[second+2:]),
	} {
		if _, err := compressBytes(file, 100); errorCode(err) != "corrupt_image" {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// RGB is left to image/jpeg. Of an image that says it is JFIF, it is YCbCr whatever
// else it says.
func TestRGBInJPEG(t *testing.T) {
	t.Parallel()
	data := cjpeg(t, photo(40, 30), "-rgb")
	if h, err := readImageHeader(data, testPixels); err != nil || h.jpeg.streams() {
		t.Errorf("RGB is taken for YCbCr, %v", err)
	}
	data = withJPEGSegment(data, 0xe0, "JFIF\x00\x01\x01\x00\x00\x01\x00\x01\x00\x00")
	if h, err := readImageHeader(data, testPixels); err != nil || !h.jpeg.streams() {
		t.Errorf("JFIF is taken for RGB, %v", err)
	}
	alike(t, data, data, 40)
}

// What says whether an image is RGB is read as libjpeg does, and what is stored of it
// says the same.
func TestRGBIsShownAsRGB(t *testing.T) {
	t.Parallel()
	var bare []byte // without Adobe's segment
	for s := range jpegSegments(cjpeg(t, photo(40, 30), "-rgb")) {
		if s.kind != jpegAPP14 {
			bare = append(bare, s.raw...)
		}
	}
	numbered := bytes.Clone(bare)
	for n, name := range []byte("RGB") {
		numbered[bytes.Index(numbered, []byte("\xff"+jpegSOF0))+10+3*n] = byte(n + 1)
		numbered[bytes.Index(numbered, []byte("\xff"+jpegSOS))+5+2*n] = byte(n + 1)
		if bare[bytes.Index(bare, []byte("\xff"+jpegSOS))+5+2*n] != name {
			t.Fatal("the components have other names")
		}
	}
	const adobe = "Adobe\x00\x64\x00\x00\x00\x00"
	for names, data := range map[string][]byte{"RGB": bare, "123": numbered} {
		for adobeName, file := range map[string][]byte{
			"none": data, "RGB": withJPEGSegment(data, 0xee, adobe+"\x00"), "YCbCr": withJPEGSegment(data, 0xee, adobe+"\x01"),
			"RGB and more": withJPEGSegment(data, 0xee, adobe+"\x00x"), "YCbCr and more": withJPEGSegment(data, 0xee, adobe+"\x01x"),
			"cut": withJPEGSegment(data, 0xee, adobe), "another's": withJPEGSegment(data, 0xee, "Aaobe\x00\x64\x00\x00\x00\x00\x00"),
		} {
			t.Run(names+", Adobe: "+adobeName, func(t *testing.T) {
				t.Parallel()
				shownAlike(t, file)
				shownAlike(t, withJPEGSegment(file, 0xe0, "JFIF\x00\x01\x01\x00\x00\x01\x00\x01\x00\x00"))
			})
		}
	}
}

// shownAlike fails the test if libjpeg sees something else in a JPEG than in what is
// kept of it, or than what is decoded here.
func shownAlike(t *testing.T, data []byte) {
	t.Helper()
	want, err := djpeg(t, data)
	if err != nil {
		t.Fatal(err)
	}
	h := headerOf(t, data)
	kept, _ := keepSource(h, data)
	got, err := djpeg(t, kept.Data)
	if err != nil {
		t.Fatal(err)
	}
	comparePixels(t, got, want, 0, 0)
	d, err := decodeImage(data, h, maxImageSide, imageTools{})
	if err != nil {
		t.Fatal(err)
	}
	comparePixels(t, d.img, want, 10, 80) // chroma has a quarter of the samples now
}

// A grey image has no transform, and Adobe's segment says so.
func TestGreyOfAdobeIsGrey(t *testing.T) {
	t.Parallel()
	data := withJPEGSegment(encodedJPEG(t, greyPhoto(40, 30), 80), 0xee, "Adobe\x00\x64\x00\x00\x00\x00\x00")
	if h, err := readImageHeader(data, testPixels); err != nil || !h.jpeg.streams() {
		t.Errorf("grey is taken for RGB, %v", err)
	}
	alike(t, data, data, 40)
}

// What other decoders refuse must not be published as it is.
func TestJPEGsThatOthersRefuse(t *testing.T) {
	t.Parallel()
	data, progressive := cjpeg(t, photo(149, 83)), cjpeg(t, photo(149, 83), "-progressive")
	at := bytes.Index(data, []byte("\xff"+jpegSOF0))
	frame := data[at : at+19]
	large := bytes.Clone(data)
	large[at+11] = 0x44 // eighteen blocks in an MCU
	for name, test := range map[string]struct {
		file []byte
		want error
	}{
		"a second frame header":        {slices.Concat(data[:len(data)-2], frame, data[len(data)-2:]), errJPEGFrames},
		"too large an MCU":             {large, errJPEGSampling},
		"a scan that refines too late": {bytes.Replace(progressive, []byte("\x01\x3f\x21"), []byte("\x01\x3f\x31"), 1), errJPEGScanHeader},
		"a code of all ones":           {bytes.Replace(data, dcTable(1, "\x0b"), dcTable(2, "\x0b\x0c"), 1), errJPEGTable},
		"a DC coefficient of 16 bits":  {bytes.Replace(data, dcTable(1, "\x0b"), dcTable(1, "\x10"), 1), errJPEGTable},
	} {
		if _, _, err, _ := decodeBoth(test.file, data, 200); !errors.Is(err, test.want) {
			t.Errorf("%s: %v, want %v", name, err, test.want)
		}
		if _, err := djpeg(t, test.file); err == nil {
			t.Errorf("%s is not refused by libjpeg", name)
		}
	}
}

// dcTable is the first DC table of T.81, table K.3, with as many codes of nine bits,
// for other symbols.
func dcTable(longest byte, symbols string) []byte {
	return []byte("\xff\xc4\x00" + string(30+longest) + "\x00\x00\x01\x05\x01\x01\x01\x01\x01" + string(longest) +
		"\x00\x00\x00\x00\x00\x00\x00\x00\x01\x02\x03\x04\x05\x06\x07\x08\x09\x0a" + symbols)
}

// libjpeg refuses a second start marker, which is skipped here.
func TestKeptJPEGHasOneStart(t *testing.T) {
	t.Parallel()
	poor := encodeJPEGPlanes(photo(160, 120), 20, nil) // kept, since quality 80 is larger
	c, _ := mustCompress(t, slices.Concat(poor[:2], poor), 2048)
	if !bytes.Equal(c.Data, poor) {
		t.Errorf("%d bytes of %s, want %d", len(c.Data), c.Ext, len(poor))
	}
	if _, err := djpeg(t, c.Data); err != nil {
		t.Error(err)
	}
}

// A file may define any number of tables; only those that a scan uses cost anything.
func TestTablesAreMadeWhenTheyAreNeeded(t *testing.T) {
	t.Parallel()
	var table huffmanLookup
	if size := table.define([]byte("\x01" + strings.Repeat("\x00", 15) + "\x05")); size != 17 {
		t.Fatalf("a table of %d bytes, want 17", size)
	}
	var none [1 << lookupBits]lookupEntry
	if table.entries != none {
		t.Error("made when it was defined")
	}
	if table.lookup().entries[0].symbol() != 5 {
		t.Error("not made when it is needed")
	}
	table.define([]byte("\x01" + strings.Repeat("\x00", 15) + "\x06"))
	if table.lookup().entries[0].symbol() != 6 {
		t.Error("not made anew")
	}
}

// cjpeg encodes an image.
func cjpeg(t *testing.T, m image.Image, options ...string) []byte {
	t.Helper()
	path, err := exec.LookPath("cjpeg")
	if err != nil {
		t.Skip("no cjpeg (libjpeg-turbo-progs)")
	}
	size := m.Bounds().Size()
	pixels := fmt.Appendf(nil, "P6 %d %d 255\n", size.X, size.Y)
	for i := range size.X * size.Y {
		r, g, b, _ := m.At(i%size.X, i/size.X).RGBA()
		pixels = append(pixels, uint8(r>>8), uint8(g>>8), uint8(b>>8))
	}
	cmd := exec.Command(path, options...)
	cmd.Stdin = bytes.NewReader(pixels)
	data, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// BenchmarkDecodeJPEG decodes photographs and fits them in IMAGE_MAX_SIDE's default,
// by decodeJPEG and by image/jpeg.
func BenchmarkDecodeJPEG(b *testing.B) {
	m := photo(4000, 3000)
	for name, data := range map[string][]byte{"baseline": encodedJPEG(b, m, 90), "progressive": encodeJPEGPlanes(m, 90, nil)} {
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
				stored, err := decodeStored(data, h)
				if err != nil {
					b.Fatal(err)
				}
				stored.render(fit.X, fit.Y)
			}
		})
	}
}

// What image/jpeg makes an image of as decodeJPEG does is of the same size.
func FuzzJPEGAgainstStandard(f *testing.F) {
	for _, data := range smallImages(f) {
		f.Add(data)
	}
	rgb := withJPEGSegment(encodedJPEG(f, photo(20, 17), 60), 0xee, "Adobe\x00\x64\x00\x00\x00\x00\x00")
	f.Add(withJPEGSegment(withJPEGSegment(rgb, 0xe0, "JFXX\x00\x10"), 0xe0, "JFIF\x00\x01\x01\x00\x00\x01\x00\x01\x00\x00"))
	f.Fuzz(func(t *testing.T, data []byte) {
		h, err := readImageHeader(data, 1<<16)
		if err != nil || h.jpeg == nil || !h.jpeg.streams() {
			return
		}
		got, want, err, wantErr := decodeBoth(data, data, maxImageSide)
		if err != nil || wantErr != nil { // of broken files each passes over something else
			return
		}
		if _, rgb := want.(*image.NRGBA); rgb { // image/jpeg goes by the last APP0 alone
			return
		}
		if a, b := len(samplesOf(got)), len(samplesOf(want)); a != b {
			t.Errorf("%d samples, want %d", a, b)
		}
	})
}
