package main

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"image"
	"image/color"
	"testing"

	"golang.org/x/image/webp"
)

const secretPlace = "48.8584N secret place"

// exifData is an EXIF directory of an orientation and a text that must not leak.
func exifData(o int) string {
	b := []byte("MM\x00*\x00\x00\x00\x08\x00\x01")
	b = append(b, 0x01, 0x12, 0, 3, 0, 0, 0, 1, 0, byte(o), 0, 0)
	return string(b) + "\x00\x00\x00\x00" + secretPlace
}

// blend is a smooth image whose four corners differ: no edges, so that lossy
// coding leaves it nearly as it is whichever way it is turned.
func blend(w, h int) *image.RGBA {
	m := image.NewRGBA(image.Rect(0, 0, w, h))
	for y := range h {
		for x := range w {
			m.SetRGBA(x, y, color.RGBA{uint8(40 + 180*x/w), uint8(60 + 150*y/h), uint8(200 - 80*x/w - 80*y/h), 255})
		}
	}
	return m
}

// upright turns an image by the definition of EXIF's tag: it tells for each
// upright pixel where it was stored.
func upright(m image.Image, o int) image.Image {
	size := m.Bounds().Size()
	out := image.NewRGBA(uprightRect(size.X, size.Y, orientation(o)))
	for y := range out.Rect.Dy() {
		for x := range out.Rect.Dx() {
			from := storedAt(size, o, x, y)
			out.Set(x, y, m.At(from.X, from.Y))
		}
	}
	return out
}

// storedAt is where upright pixel (x, y) of an image was stored.
func storedAt(size image.Point, o, x, y int) image.Point {
	w, h := size.X, size.Y
	return [9]image.Point{
		1: {x, y}, 2: {w - 1 - x, y}, 3: {w - 1 - x, h - 1 - y}, 4: {x, h - 1 - y},
		5: {y, x}, 6: {y, h - 1 - x}, 7: {w - 1 - y, h - 1 - x}, 8: {w - 1 - y, x},
	}[o]
}

func TestOrientationIsApplied(t *testing.T) {
	t.Parallel()
	for o := 1; o <= 8; o++ {
		for _, size := range []image.Point{{64, 48}, {63, 47}} {
			plain := encodedJPEG(t, blend(size.X, size.Y), 95)
			turned := map[string][]byte{
				"jpeg": withJPEGSegment(plain, 0xe1, exifName+exifData(o)),
				"png":  withPNGChunk(encodedPNG(t, blend(size.X, size.Y)), "eXIf", exifData(o)),
			}
			for format, data := range turned {
				for _, side := range []int{100, 31} {
					t.Run(fmt.Sprintf("%d of %s %v to %d", o, format, size, side), func(t *testing.T) {
						t.Parallel()
						_, got := mustCompress(t, data, side)
						_, straight := mustCompress(t, plain, side)
						// The decoder repeats a chroma sample over two pixels, other two after
						// a turn of an odd side. See TestTurnedSamplesStayInPlace for the rest.
						comparePixels(t, got, upright(straight, o), 4, 25)
					})
				}
			}
		}
	}
}

// Where nothing but a turn happens the luma must be exact and the chroma must
// follow it, also if a side is odd and its last chroma sample stands for one pixel.
func TestTurnedSamplesStayInPlace(t *testing.T) {
	t.Parallel()
	for _, size := range []image.Point{{64, 48}, {63, 47}} {
		m := image.NewYCbCr(image.Rectangle{Max: size}, image.YCbCrSubsampleRatio444)
		for i := range m.Y {
			x, y := i%m.YStride, i/m.YStride
			m.Y[i], m.Cb[i], m.Cr[i] = uint8(x^5*y), uint8(2*x+64), uint8(2*y+64)
		}
		for o := 1; o <= 8; o++ {
			got := resized(m, imageHeader{Width: size.X, Height: size.Y, Orientation: orientation(o)}, size.X, size.Y, 1, 1)
			for y := range got.Rect.Dy() / 2 {
				for x := range got.Rect.Dx() / 2 {
					var cb, cr int
					for i := range 4 { // the mean of the four pixels that the sample covers
						px, py := 2*x+i%2, 2*y+i/2
						p := storedAt(size, o, px, py)
						if got.Y[got.YOffset(px, py)] != m.Y[m.YOffset(p.X, p.Y)] {
							t.Fatalf("%v orientation %d: luma (%d,%d) is not what was at %v", size, o, px, py, p)
						}
						cb, cr = cb+2*p.X+64, cr+2*p.Y+64
					}
					at := got.COffset(2*x, 2*y)
					if dcb, dcr := 4*int(got.Cb[at])-cb, 4*int(got.Cr[at])-cr; max(dcb, -dcb, dcr, -dcr) > 4 {
						t.Fatalf("%v orientation %d: chroma (%d,%d) off by %d/4 and %d/4", size, o, x, y, dcb, dcr)
					}
				}
			}
		}
	}
}

// A kept source must also look as before, to the bit.
func TestMetadataIsGone(t *testing.T) {
	t.Parallel()
	const comment = "made by secret place"
	poor := encodeJPEGPlanes(photo(160, 120), 20, nil) // kept, since quality 80 is larger
	flat := encodedPNG(t, corners(160, 120))           // kept, since a JPEG is larger
	still := webpTestdata(t, "gopher-doc.1bpp.lossless.webp")
	fourColours := image.NewPaletted(image.Rect(0, 0, 160, 120), color.Palette{color.Black, color.White, color.Gray{90}, color.Gray{180}})
	for i := range fourColours.Pix {
		fourColours.Pix[i] = uint8(i / 11 % 4)
	}
	flatGIF := encodedGIF(t, fourColours) // kept, since a JPEG is larger
	gifHead := 13 + gifColors(flatGIF[10])
	tests := map[string][]byte{
		"jpeg exif":      withJPEGSegment(poor, 0xe1, exifName+exifData(1)),
		"jpeg xmp":       withJPEGSegment(poor, 0xe1, "http://ns.adobe.com/xap/1.0/\x00"+secretPlace),
		"jpeg iptc":      withJPEGSegment(poor, 0xed, "Photoshop 3.0\x00"+secretPlace),
		"jpeg comment":   withJPEGSegment(poor, 0xfe, comment),
		"jpeg mpf":       withJPEGSegment(poor, 0xe2, "MPF\x00"+secretPlace),
		"jpeg thumbnail": withJPEGSegment(poor, 0xe0, "JFIF\x00\x01\x01\x00\x00\x01\x00\x01\x01\x07"+secretPlace),
		"jpeg trailer":   append(bytes.Clone(poor), secretPlace...),
		"jpeg adobe":     withJPEGSegment(poor, 0xee, "Adobe\x00\x64\x00\x00\x00\x00\x01"+secretPlace),
		"jpeg, resized":  withJPEGSegment(encodedJPEG(t, photo(3000, 200), 90), 0xe1, exifName+exifData(6)),
		"png exif":       withPNGChunk(flat, "eXIf", exifData(1)),
		"png text":       withPNGChunk(flat, "tEXt", "Comment\x00"+comment),
		"png xmp":        withPNGChunk(flat, "iTXt", "XML:com.adobe.xmp\x00\x00\x00\x00\x00"+secretPlace),
		"png trailer":    append(bytes.Clone(flat), secretPlace...),
		"png turned":     withPNGChunk(flat, "eXIf", exifData(8)),
		"webp": webpFile(webpEXIFFlag|webpXMPFlag, 75, 100, still[webpHeaderSize:],
			appendRIFF(nil, "EXIF", []byte(exifData(1))), appendRIFF(nil, "XMP ", []byte(secretPlace))),
		"gif comment": bytes.Join([][]byte{flatGIF[:gifHead], []byte("!\xfe\x14" + comment + "\x00"), flatGIF[gifHead:]}, nil),
	}
	for name, data := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			if !bytes.Contains(data, []byte("secret place")) {
				t.Fatal("the test's own input holds no secret")
			}
			c, got := mustCompress(t, data, 2048)
			for _, secret := range []string{"secret place", "Exif", "eXIf", "EXIF", "xmp", "XMP"} {
				if bytes.Contains(c.Data, []byte(secret)) {
					t.Errorf("%q is in the result", secret)
				}
			}
			h, _ := readImageHeader(data, testPixels)
			if h.Orientation.turns() || h.Width > 2048 {
				return
			}
			if mediaType("."+c.Ext) != "image/"+h.Format {
				t.Errorf("%s became %s; the test means to see a source kept", h.Format, c.Ext)
			}
			before := decoded(t, data)
			comparePixels(t, got, before, 0, 0)
		})
	}
}

// testProfile makes an ICC profile of a colour space with a description, long
// enough for several JPEG segments.
func testProfile(space, description string) []byte {
	p := make([]byte, 128, 70_000)
	copy(p[16:], space)
	copy(p[36:], "acsp")
	p = append(p, "\x00\x00\x00\x01desc\x00\x00\x00\x90"...)
	p = binary.BigEndian.AppendUint32(p, uint32(12+len(description)+1))
	p = append(p, "desc\x00\x00\x00\x00"...)
	p = binary.BigEndian.AppendUint32(p, uint32(len(description)+1))
	p = append(append(p, description...), 0)
	for i := len(p); i < cap(p); i++ {
		p = append(p, byte(i*i>>7))
	}
	return p
}

// profileV4 is the same in the form of ICC version 4.
func profileV4(description string) []byte {
	p := make([]byte, 128)
	copy(p[16:], "RGB ")
	copy(p[36:], "acsp")
	p = append(p, "\x00\x00\x00\x01desc\x00\x00\x00\x90"...)
	p = binary.BigEndian.AppendUint32(p, uint32(28+2*len(description)))
	p = append(p, "mluc\x00\x00\x00\x00\x00\x00\x00\x01\x00\x00\x00\x0cenUS"...)
	p = binary.BigEndian.AppendUint32(p, uint32(2*len(description)))
	p = append(p, 0, 0, 0, 28)
	for _, c := range []byte(description) {
		p = append(p, 0, c)
	}
	return p
}

func TestProfileIsKeptUnlessSRGB(t *testing.T) {
	t.Parallel()
	wide, srgb, grey := testProfile("RGB ", "Display P3"), testProfile("RGB ", "sRGB IEC61966-2.1"), testProfile("GRAY", "Dot Gain 20%")
	big, poor := encodedJPEG(t, photo(300, 200), 95), encodedJPEG(t, photo(300, 200), 10)
	greyJPEG := goTestdata(t, "testdata/video-005.gray.jpeg")
	soft := image.NewNRGBA(image.Rect(0, 0, 90, 90))
	for i := range soft.Pix {
		soft.Pix[i] = uint8(i >> 5)
	}
	still := webpTestdata(t, "blue-purple-pink.lossless.webp")
	stillSize, err := webp.DecodeConfig(bytes.NewReader(still))
	if err != nil {
		t.Fatal(err)
	}
	tests := map[string]struct{ data, want []byte }{
		"jpeg, beyond all bounds":  {addJPEGProfile(big, append(bytes.Clone(wide), make([]byte, maxProfileBytes)...)), nil},
		"jpeg":                     {addJPEGProfile(big, wide), wide},
		"jpeg, kept":               {addJPEGProfile(poor, wide), wide},
		"jpeg, srgb":               {addJPEGProfile(big, srgb), nil},
		"jpeg, srgb, kept":         {addJPEGProfile(poor, profileV4("sRGB built-in")), nil},
		"jpeg, srgb of version 4":  {addJPEGProfile(big, profileV4("sRGB built-in")), nil},
		"jpeg, linear":             {addJPEGProfile(big, profileV4("sRGB-elle-V4-g10.icc")), profileV4("sRGB-elle-V4-g10.icc")},
		"grey jpeg":                {addJPEGProfile(greyJPEG, grey), grey},
		"grey jpeg, rgb profile":   {addJPEGProfile(greyJPEG, wide), nil},
		"cmyk jpeg":                {addJPEGProfile(goTestdata(t, "testdata/video-001.cmyk.jpeg"), testProfile("CMYK", "FOGRA39")), nil},
		"png to jpeg":              {addPNGProfile(encodedPNG(t, photo(300, 200)), wide), wide},
		"png with alpha":           {addPNGProfile(encodedPNG(t, soft), wide), wide},
		"png with alpha, srgb":     {addPNGProfile(encodedPNG(t, soft), srgb), nil},
		"webp":                     {webpFile(webpProfileFlag, stillSize.Width, stillSize.Height, appendRIFF(nil, "ICCP", wide), still[webpHeaderSize:]), wide},
		"jpeg, profile incomplete": {withJPEGSegment(big, 0xe2, jpegProfileName+"\x01\x02"+string(wide[:1000])), nil},
	}
	lost := map[string]string{"grey jpeg, rgb profile": "RGB ", "cmyk jpeg": "CMYK"}
	for name, test := range tests {
		for _, side := range []int{2048, 80} {
			t.Run(fmt.Sprintf("%s to %d", name, side), func(t *testing.T) {
				t.Parallel()
				c, _ := mustCompress(t, test.data, side)
				h, err := readImageHeader(c.Data, testPixels)
				// The header has no sRGB profile in it, so look for its bytes besides.
				if err != nil || !bytes.Equal(h.Profile, test.want) {
					t.Errorf("%s: profile of %d bytes (%q), want %d; %v", c.Ext, len(h.Profile), profileSpace(h.Profile), len(test.want), err)
				}
				if c.LostProfile != lost[name] {
					t.Errorf("the lost profile is said to be for %q, want %q", c.LostProfile, lost[name])
				}
				named := bytes.Contains(c.Data, []byte(jpegProfileName)) || bytes.Contains(c.Data, []byte("iCCP")) || bytes.Contains(c.Data, []byte("ICCP"))
				if named != (test.want != nil) {
					t.Errorf("%s: names a profile: %v", c.Ext, named)
				}
			})
		}
	}
}

func TestKeptWebPHasItsFlagsFixed(t *testing.T) {
	t.Parallel()
	still := webpTestdata(t, "gopher-doc.1bpp.lossless.webp")
	exif := appendRIFF(nil, "EXIF", []byte(exifData(1)))
	kept, ok := stripMetadata(formatWebP, webpFile(webpAnimationFlag|webpEXIFFlag|webpXMPFlag|webpProfileFlag|webpAlphaFlag, 75, 100, still[webpHeaderSize:], exif), false)
	if !ok {
		t.Fatal("not stripped")
	}
	if flags := kept[webpHeaderSize+8]; flags != webpAlphaFlag {
		t.Errorf("flags are %08b", flags)
	}
	if size := binary.LittleEndian.Uint32(kept[4:]); int(size) != len(kept)-8 {
		t.Errorf("RIFF says %d bytes of %d", size, len(kept)-8)
	}
}

func TestChunksAfterTheEndOfWebPDoNotCount(t *testing.T) {
	t.Parallel()
	still := webpTestdata(t, "gopher-doc.1bpp.lossless.webp")
	h, err := readImageHeader(append(still, appendRIFF(nil, "EXIF", []byte(exifData(6)))...), testPixels)
	if err != nil || h.Orientation != 0 {
		t.Errorf("orientation %d, %v", h.Orientation, err)
	}
}

func TestUnreadableEXIFIsUpright(t *testing.T) {
	t.Parallel()
	for n := range exifData(6) {
		exifOrientation([]byte(exifData(6)[:n])) // must not panic
	}
	tests := map[string]struct {
		data string
		want orientation
	}{
		"big-endian":           {exifData(6), 6},
		"with its name":        {exifName + exifData(6), 6},
		"little-endian":        {"II*\x00\x08\x00\x00\x00\x01\x00\x12\x01\x03\x00\x01\x00\x00\x00\x08\x00\x00\x00", 8},
		"out of range":         {exifData(9), 0},
		"offset past the end":  {"MM\x00*\xff\xff\xff\xff\x00\x01", 0},
		"more entries than is": {"MM\x00*\x00\x00\x00\x08\xff\xff", 0},
		"not EXIF":             {"something else", 0},
	}
	for name, test := range tests {
		if got := exifOrientation([]byte(test.data)); got != test.want {
			t.Errorf("%s: %d, want %d", name, got, test.want)
		}
	}
}
