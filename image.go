package main

import (
	"bytes"
	"fmt"
	"image"
	"image/gif"
	"image/jpeg"
	"image/png"
	"math"
	"net/http"

	"golang.org/x/image/webp"
)

// Image formats by content, never by name or header.
const (
	formatJPEG = "jpeg"
	formatPNG  = "png"
	formatGIF  = "gif"
	formatWebP = "webp"
)

// maxImageSide is the longest side of any image, in or out: JPEG can hold no
// longer one, and it bounds the resampler's tables.
const maxImageSide = 65535

// imageHeader is what an image's bytes say of it before a pixel is decoded.
type imageHeader struct {
	Format        string
	Width, Height int         // as stored, before the orientation is applied
	Orientation   orientation // from EXIF
	Animated      bool        // has frames after the first, which are not decoded
	Profile       []byte      // ICC profile, nil when there is none or it is sRGB

	decodeBytes int64      // what the decoder allocates
	outputBytes float64    // held for each output pixel: planes and encoded form
	sourceBytes int        // length of the file
	jpeg        *jpegFrame // of a JPEG
	png         *pngHeader // of a PNG
}

// storedImage is an image's pixels as its decoder made them, at full size and
// not yet turned.
type storedImage struct {
	imageTools
	header imageHeader
	pixels image.Image     // nil if the decoder yields them row by row
	frame  image.Rectangle // where pixels lie in the image; the rest is transparent
}

// decodedImage is an image at the size of its output, and upright.
type decodedImage struct {
	imageTools
	header imageHeader
	img    image.Image // *image.Gray, *image.YCbCr (4:2:0) or *image.NRGBA
}

// imageTools are what images share. The zero value is ready.
type imageTools struct {
	spread  func(parts []func()) // runs parts of the work, at once if it can; nil: one after the other
	buffers *buffers
}

func (t imageTools) run(parts []func()) {
	if t.spread != nil {
		t.spread(parts)
		return
	}
	for _, part := range parts {
		part()
	}
}

// compressedImage is what gets stored.
type compressedImage struct {
	Data          []byte
	Ext           string // jpg, png, webp or gif
	Width, Height int
	LostProfile   string // the kind of colour that the source's profile is for, if it does not fit the result's
}

// readImageHeader tells what data is and what it will cost, and allocates
// next to nothing whatever sizes the header claims. maxPixels bounds width
// times height. Its errors are *imageError: not_an_image, too_many_pixels,
// too_many_scans, corrupt_image.
func readImageHeader(data []byte, maxPixels int64) (h imageHeader, err error) {
	defer recoverCodec("read the header", &err)
	h, err = parseHeader(data)
	if err != nil {
		return imageHeader{}, err
	}
	if h.Width <= 0 || h.Height <= 0 {
		return imageHeader{}, permanent("corrupt_image", "%s of %d×%d pixels", h.Format, h.Width, h.Height)
	}
	if max(h.Width, h.Height) > maxImageSide || int64(h.Width)*int64(h.Height) > maxPixels {
		return imageHeader{}, permanent("too_many_pixels", "%s of %d×%d pixels; at most %d and no side above %d",
			h.Format, h.Width, h.Height, maxPixels, maxImageSide)
	}
	h.sourceBytes = len(data)
	return h, nil
}

// sniffFormat names the format by its signature, "" if it is none of ours.
func sniffFormat(data []byte) string {
	switch {
	case bytes.HasPrefix(data, []byte("\xff\xd8\xff")):
		return formatJPEG
	case bytes.HasPrefix(data, []byte(pngSignature)):
		return formatPNG
	case bytes.HasPrefix(data, []byte("GIF87a")), bytes.HasPrefix(data, []byte("GIF89a")):
		return formatGIF
	case len(data) >= 12 && string(data[:4]) == "RIFF" && string(data[8:12]) == "WEBP":
		return formatWebP
	}
	return ""
}

func parseHeader(data []byte) (imageHeader, error) {
	switch sniffFormat(data) {
	case formatJPEG:
		return readJPEGHeader(data)
	case formatPNG:
		return readPNGHeader(data)
	case formatGIF:
		return readGIFHeader(data)
	case formatWebP:
		return readWebPHeader(data)
	}
	return imageHeader{}, permanent("not_an_image", "the content is neither JPEG, PNG, GIF nor WebP but looks like %s",
		http.DetectContentType(data))
}

// What decoding and encoding hold besides what grows with the pixels:
// inflate and deflate windows, readers, code tables, and the rows of bands that
// are resized at once.
const fixedCost = 2 << 20

// sideCost is held for each pixel of width and height: for each of three planes its
// weights, a window of resized rows, a row of blocks and buffers of rows, all rounded up.
const sideCost = 192

// keptShare is how much of what an output holds while it is encoded stays, at
// most, while the next smaller one is made: planes and file, but no tokens. (2.4
// of 6.5 bytes a pixel for grey, 3.5 of 9.7 for colour, 13.2 of 18.3 with alpha.)
const keptShare = 0.75

// costAt is how many bytes decoding and compressing will hold at once, at most,
// besides the source itself, for an output that fits in maxSide × maxSide and
// its variants:
//
//	what the decoder allocates (the header readers know each format's formula)
//	+ for each pixel of the output in hand the planes and the encoded form
//	+ for each of those before it, what stays of them
//	+ the source's copy without metadata, and a profile for each output
//	+ sideCost for each pixel of width + height, and fixedCost.
func (h imageHeader) costAt(maxSide int, widths []int) int64 {
	peak, kept := 0.0, 0.0
	sides, profiles := h.Width+h.Height, 0
	for _, size := range h.outputSizes(maxSide, widths) {
		bytes := float64(size.X) * float64(size.Y) * h.outputBytes
		peak = max(peak, kept+bytes)
		kept += bytes * keptShare
		sides += size.X + size.Y
		profiles += len(h.Profile)
	}
	return h.decodeBytes + int64(math.Ceil(peak)) + int64(h.sourceBytes+profiles) + sideCost*int64(sides) + fixedCost
}

// outputSizes are those of the image that fits in maxSide × maxSide and of its
// variants, upright.
func (h imageHeader) outputSizes(maxSide int, widths []int) []image.Point {
	w, ht := h.Orientation.size(h.Width, h.Height)
	fitW, fitH := fitInto(w, ht, maxSide)
	return append([]image.Point{{fitW, fitH}}, h.variantSizes(fitW, widths)...)
}

// variantSizes are the sizes of an image's variants: of those widths that are less
// than fit, the width of the image itself. They go from the widest down.
func (h imageHeader) variantSizes(fit int, widths []int) (sizes []image.Point) {
	w, ht := h.Orientation.size(h.Width, h.Height)
	for _, width := range widths {
		if width < fit {
			height := math.Round(float64(ht) * float64(width) / float64(w))
			sizes = append(sizes, image.Pt(width, max(1, int(height))))
		}
	}
	return sizes
}

// What the JPEG encoder holds for a sample at most, measured with white noise at
// quality 100: a token of four bytes for each coefficient, in pieces, and the file.
const jpegSample = 4.1 + 1.1

// Bytes held for each output pixel. A JPEG has one sample for grey and one and
// a half for colour. PNG is never much longer than its pixels, but counts three
// times its length, since its buffer doubles as it grows; RGBA may need one more
// byte for a palette's indexes or for grey.
const (
	outputGrey  = planeSlack + jpegSample
	outputYCbCr = 1.5 * (planeSlack + jpegSample)
	outputRGB   = 4*planeSlack + outputYCbCr
	outputRGBA  = 4*planeSlack + 1 + 3*4.1
)

// decodeImage decodes data, whose header is h, fits it into maxSide × maxSide,
// never enlarging, and turns it upright. A decoder that panics is this image's
// failure: decoder_panic.
func decodeImage(data []byte, h imageHeader, maxSide int, tools imageTools) (d *decodedImage, err error) {
	defer recoverCodec("decode "+h.Format, &err)
	size := h.outputSizes(maxSide, nil)[0]
	img, err := h.decodeTo(data, size, tools)
	if err != nil {
		return nil, permanent("corrupt_image", "decode %s: %v", h.Format, err)
	}
	return &decodedImage{tools, h, img}, nil
}

// decodeTo decodes the image to a size, upright.
func (h imageHeader) decodeTo(data []byte, size image.Point, tools imageTools) (image.Image, error) {
	width, height := h.Orientation.size(size.X, size.Y)
	switch {
	case h.jpeg != nil && h.jpeg.streams():
		return decodeJPEG(data, h, width, height, tools)
	case h.png != nil:
		return decodePNG(data, h, width, height, tools)
	}
	stored, err := decodeStored(data, h)
	if err != nil {
		return nil, err
	}
	stored.imageTools = tools
	return stored.render(width, height), nil
}

// decodeStored decodes the whole image.
func decodeStored(data []byte, h imageHeader) (*storedImage, error) {
	pixels, frame, err := decodePixels(data, h)
	if err != nil {
		return nil, err
	}
	canvas := image.Rect(0, 0, h.Width, h.Height)
	if frame.Empty() || !frame.In(canvas) || (frame != canvas && h.Format != formatGIF && !h.Animated) {
		return nil, fmt.Errorf("pixels cover %v of %v", frame, canvas)
	}
	return &storedImage{header: h, pixels: pixels, frame: frame}, nil
}

// decodePixels runs the decoder of h's format, and says where in the image its
// pixels belong.
func decodePixels(data []byte, h imageHeader) (image.Image, image.Rectangle, error) {
	var offset image.Point
	var pixels image.Image
	var err error
	switch h.Format {
	case formatJPEG:
		pixels, err = jpeg.Decode(bytes.NewReader(data))
	case formatGIF:
		pixels, err = gif.Decode(bytes.NewReader(data)) // stops after the first frame
	case formatWebP:
		if h.Animated {
			data, offset, err = firstWebPFrame(data, image.Rect(0, 0, h.Width, h.Height))
		}
		if err == nil {
			pixels, err = webp.Decode(bytes.NewReader(data))
		}
	default:
		err = fmt.Errorf("unknown format %q", h.Format)
	}
	if err != nil {
		return nil, image.Rectangle{}, err
	}
	if h.Format == formatWebP {
		expandVideoRange(pixels)
	}
	return pixels, pixels.Bounds().Add(offset), nil
}

// recoverCodec is deferred around codecs. It turns a panic into err.
func recoverCodec(doing string, err *error) {
	if r := recover(); r != nil {
		*err = permanent("decoder_panic", "%s: %v", doing, r)
	}
}

// compressImage encodes d: as JPEG at quality if it is opaque, else as PNG.
// source is what d was decoded from; without its metadata it is the result
// where it would do as it is and the encoded form is not smaller.
//
// The results after the first are the image's variants, each resized from the
// pixels of the one before it. widths go from the widest down; those that are
// no narrower than the image are left out. Of d, nothing is left.
func compressImage(d *decodedImage, source []byte, widths []int, quality int) (all []compressedImage, err error) {
	defer recoverCodec("compress "+d.header.Format, &err)
	defer func() { d.buffers.giveBack(d.img) }()
	fit := d.img.Bounds().Size()
	for n, size := range append([]image.Point{fit}, d.header.variantSizes(fit.X, widths)...) {
		if n > 0 {
			d.shrink(size)
		}
		d.makePlanes()
		c, err := d.encode(quality)
		if err != nil {
			return nil, permanent("corrupt_image", "compress %s: %v", d.header.Format, err)
		}
		all = append(all, c)
	}
	if w, h := d.header.Orientation.size(fit.X, fit.Y); w != d.header.Width || h != d.header.Height {
		return all, nil
	}
	if kept, ok := keepSource(d.header, source); ok && len(kept.Data) <= len(all[0].Data) {
		kept.Data = bytes.Clone(kept.Data) // its capacity is the source's length
		all[0] = kept
	}
	return all, nil
}

// replace puts img in the place of d.img, which it gives back.
func (d *decodedImage) replace(img image.Image) {
	d.buffers.giveBack(d.img)
	d.img = img
}

// shrink resizes the image once more.
func (d *decodedImage) shrink(size image.Point) {
	b := d.img.Bounds()
	larger := storedImage{imageTools: d.imageTools, header: imageHeader{Width: b.Dx(), Height: b.Dy()}, pixels: d.img, frame: b}
	d.replace(larger.render(size.X, size.Y))
}

// fitInto scales w × h down to fit in side × side, and leaves it if it does.
func fitInto(w, h, side int) (int, int) {
	if w <= side && h <= side {
		return w, h
	}
	scale := float64(side) / float64(max(w, h))
	return max(1, int(math.Round(float64(w)*scale))), max(1, int(math.Round(float64(h)*scale)))
}

// keepSource returns the source without its metadata, if clients can show it
// as it is: upright, one frame, no CMYK.
func keepSource(h imageHeader, source []byte) (compressedImage, bool) {
	if h.Orientation.turns() || h.Animated || h.jpeg != nil && h.jpeg.cmyk() {
		return compressedImage{}, false
	}
	data, ok := stripMetadata(h.Format, source, h.Profile != nil)
	if !ok {
		return compressedImage{}, false
	}
	return newCompressed(h.Format, data, image.Rect(0, 0, h.Width, h.Height)), true
}

func newCompressed(format string, data []byte, bounds image.Rectangle) compressedImage {
	ext := format
	if format == formatJPEG {
		ext = "jpg"
	}
	return compressedImage{Data: data, Ext: ext, Width: bounds.Dx(), Height: bounds.Dy()}
}

// makePlanes makes a JPEG's planes of an image that is opaque.
func (d *decodedImage) makePlanes() {
	if m, ok := d.img.(*image.NRGBA); ok && m.Opaque() {
		d.replace(d.opaquePlanes(m))
	}
}

func (d *decodedImage) opaquePlanes(m *image.NRGBA) image.Image {
	// An RGB profile may tint grey, so only unprofiled grey becomes a grey JPEG.
	if profileSpace(d.header.Profile) != "RGB " {
		if grey := greyOf(m, d.buffers); grey != nil {
			return grey
		}
	}
	return planesOf(m, d.buffers)
}

// encode encodes the image. A profile goes along if it is for the output's kind
// of colour: RGB for colour, GRAY for grey. Others end here: CMYK is converted by
// the plain formula, and grey with alpha becomes RGBA, so their profiles would be
// wrong for the result.
func (d *decodedImage) encode(quality int) (compressedImage, error) {
	if m, ok := d.img.(*image.NRGBA); ok {
		return encodePNG(m, d.header.Profile, d.buffers)
	}
	return encodeJPEG(d.img, d.header.Profile, quality, d.buffers), nil
}

func encodeJPEG(img image.Image, profile []byte, quality int, b *buffers) compressedImage {
	data := encodeJPEGPlanes(img, quality, b)
	want := "RGB "
	if _, grey := img.(*image.Gray); grey {
		want = "GRAY"
	}
	return newEncoded(formatJPEG, data, img.Bounds(), profile, want, addJPEGProfile)
}

// newEncoded adds the profile to an encoded image if it is for that kind of colour.
func newEncoded(format string, data []byte, bounds image.Rectangle, profile []byte, colour string, add func(data, profile []byte) []byte) compressedImage {
	space := profileSpace(profile)
	if space == colour {
		return newCompressed(format, add(data, profile), bounds)
	}
	c := newCompressed(format, data, bounds)
	c.LostProfile = space
	return c
}

// encodePNG writes an image with alpha, with a palette where that is exact.
func encodePNG(m *image.NRGBA, profile []byte, b *buffers) (compressedImage, error) {
	var img image.Image = m
	if p := palettedOf(m); p != nil {
		img = p
	}
	var out bytes.Buffer
	encoder := png.Encoder{BufferPool: b}
	if err := encoder.Encode(&out, img); err != nil {
		return compressedImage{}, fmt.Errorf("encode png: %w", err)
	}
	return newEncoded(formatPNG, out.Bytes(), img.Bounds(), profile, "RGB ", addPNGProfile), nil
}
