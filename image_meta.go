package main

import (
	"bytes"
	"cmp"
	"compress/zlib"
	"encoding/binary"
	"hash/crc32"
	"io"
	"slices"
	"unicode/utf16"

	"golang.org/x/image/webp"
)

// readJPEGHeader reads up to the first scan, and counts the scans.
func readJPEGHeader(data []byte) (imageHeader, error) {
	h := imageHeader{Format: formatJPEG}
	var frame jpegFrame
	var profile jpegProfile
	jfif, adobe, transform := false, false, byte(0)
	for s := range jpegSegments(data) {
		switch {
		case s.kind == jpegAPP1 && bytes.HasPrefix(s.body, []byte(exifName)):
			h.Orientation = cmp.Or(h.Orientation, exifOrientation(s.body))
		case s.kind == jpegAPP2:
			profile.add(s.body)
		case s.kind == jpegAPP0 && bytes.HasPrefix(s.body, []byte("JFIF\x00")):
			jfif = true
		case s.kind == jpegAPP14 && isAdobe(s.body):
			adobe, transform = true, s.body[11]
		case isJPEGFrame(s.kind):
			if frame.components != nil || !frame.parse(s) {
				return h, permanent("corrupt_image", "jpeg with a frame header that cannot be read (marker %x)", s.kind)
			}
		}
		if s.kind == jpegSOS {
			frame.whole = frame.progressive || len(s.body) > 0 && int(s.body[0]) != len(frame.components)
			break
		}
	}
	if frame.components == nil {
		return h, permanent("corrupt_image", "jpeg without a frame header")
	}
	frame.rgb = len(frame.components) == 3 && !jfif && (adobe && transform == 0 || !adobe && frame.named("RGB"))
	if err := frame.checkScans(data); err != nil {
		return h, err
	}
	h.Width, h.Height = frame.width, frame.height
	h.jpeg = &frame
	h.decodeBytes, h.outputBytes = frame.cost()
	h.Profile = foreignProfile(profile.assemble())
	return h, nil
}

// isJPEGFrame reports whether kind is one of the SOF markers, of whatever process.
func isJPEGFrame(kind string) bool {
	return kind >= jpegSOF0 && kind <= jpegSOF15 && kind != jpegDHT && kind != jpegDAC && kind != jpegJPG
}

// jpegFrame is what a JPEG's SOF and Adobe segments say.
type jpegFrame struct {
	width, height int
	progressive   bool
	whole         bool // the first scan does not have everything
	rgb           bool // stored as RGB
	components    []jpegSampling
}

// jpegSampling is what a frame says of a component: its name, its horizontal and vertical
// sampling factor, and which quantisation table it has.
type jpegSampling struct {
	id    byte
	h, v  int
	table byte
}

// cmyk is what few browsers get right.
func (f *jpegFrame) cmyk() bool { return len(f.components) == 4 }

// named reports whether the components have these names.
func (f *jpegFrame) named(names string) bool {
	for i, c := range f.components {
		if i >= len(names) || names[i] != c.id {
			return false
		}
	}
	return true
}

// parse reads a baseline, extended or progressive frame of 8-bit samples,
// and reports false for any other.
func (f *jpegFrame) parse(s segment) bool {
	if s.kind > jpegSOF2 || len(s.body) < 6 || s.body[0] != 8 {
		return false
	}
	n := int(s.body[5])
	if n != 1 && n != 3 && n != 4 || len(s.body) != 6+3*n {
		return false
	}
	f.height = int(binary.BigEndian.Uint16(s.body[1:]))
	f.width = int(binary.BigEndian.Uint16(s.body[3:]))
	f.progressive = s.kind == jpegSOF2
	for i := range n {
		c := s.body[6+3*i:]
		f.components = append(f.components, jpegSampling{c[0], int(c[1] >> 4), int(c[1] & 15), c[2]})
		if h, v := c[1]>>4, c[1]&15; h < 1 || h > 4 || v < 1 || v > 4 || c[2] > 3 {
			return false
		}
	}
	if n == 1 { // never interleaved: its sampling factors do not count (T.81, A.2.2)
		f.components[0].h, f.components[0].v = 1, 1
	}
	return true
}

func (f *jpegFrame) mcuColumns() int { return ceilDiv(f.width, 8*f.components[0].h) }
func (f *jpegFrame) mcuRows() int    { return ceilDiv(f.height, 8*f.components[0].v) }

// bandRows is how many rows of MCUs are read before they are resized: 64 rows of
// pixels, or 72.
func (f *jpegFrame) bandRows() int { return min(f.mcuRows(), ceilDiv(8, f.components[0].v)) }

// streams reports whether decodeJPEG decodes the image, else image/jpeg does.
func (f *jpegFrame) streams() bool { return !f.cmyk() && !f.rgb }

// cost is what the decoder holds, and what an output pixel takes. decodeJPEG holds two
// bytes for each coefficient of two bands, or of all if there is more than one scan,
// and one for each block. image/jpeg holds a byte for each sample of whole
// MCUs, for a progressive image four more, and four bytes a pixel for RGB and CMYK.
func (f *jpegFrame) cost() (decode int64, output float64) {
	perMCU := int64(0)
	for _, c := range f.components {
		perMCU += int64(64 * c.h * c.v)
	}
	samples := perMCU * int64(f.mcuColumns()) * int64(f.mcuRows())
	output = outputYCbCr
	if len(f.components) == 1 {
		output = outputGrey
	}
	switch {
	case !f.streams():
		decode = samples + 4*int64(f.width)*int64(f.height)
		if f.progressive {
			decode += 4 * samples
		}
		return decode, outputRGB
	case f.whole:
		return 2*samples + samples/64, output
	}
	inBands := perMCU * int64(f.mcuColumns()) * int64(2*f.bandRows())
	return 2*inBands + inBands/64, output
}

func ceilDiv[N int | int64](a, b N) N { return (a + b - 1) / b }

// readPNGHeader reads IHDR and, up to the end, what else matters.
func readPNGHeader(data []byte) (imageHeader, error) {
	h := imageHeader{Format: formatPNG}
	transparent, profiled := false, false
	for c := range pngChunks(data) {
		if (c.kind == "IHDR") != (h.png == nil) {
			return h, permanent("corrupt_image", "png that does not begin with its header")
		}
		switch c.kind {
		case "IHDR":
			if h.png = parsePNGHeader(c.body); h.png == nil {
				return h, permanent("corrupt_image", "png with a header that cannot be read")
			}
		case "tRNS":
			transparent = true
		case "eXIf":
			h.Orientation = exifOrientation(c.body)
		case "iCCP":
			if !profiled { // there must be one at most, and each may take long to unpack
				h.Profile, profiled = foreignProfile(inflatePNGProfile(c.body)), true
			}
		}
	}
	if h.png == nil {
		return h, permanent("corrupt_image", "png without a header")
	}
	h.Width, h.Height = h.png.width, h.png.height
	h.decodeBytes, h.outputBytes = h.png.cost(transparent)
	return h, nil
}

// readGIFHeader reads the canvas and the first frame, and looks for a second.
func readGIFHeader(data []byte) (imageHeader, error) {
	h := imageHeader{Format: formatGIF, outputBytes: outputRGBA}
	frames := 0
	for s := range gifSegments(data) {
		switch s.kind {
		case gifHeader:
			h.Width = int(binary.LittleEndian.Uint16(s.body[6:]))
			h.Height = int(binary.LittleEndian.Uint16(s.body[8:]))
		case gifImage:
			frames++
		}
		if frames == 2 {
			break
		}
	}
	if frames == 0 {
		return h, permanent("corrupt_image", "gif without a whole frame")
	}
	h.Animated = frames > 1
	// A byte a pixel, and again while rows are put in order; a frame never exceeds its canvas.
	h.decodeBytes = 2 * int64(h.Width) * int64(h.Height)
	return h, nil
}

// readWebPHeader reads the size as the decoder sees it, and the chunks. The decoder
// would take a frame from a chunk that claims to be longer than the file too.
func readWebPHeader(data []byte) (imageHeader, error) {
	h := imageHeader{Format: formatWebP}
	config, err := webp.DecodeConfig(bytes.NewReader(data))
	if err != nil {
		return h, permanent("corrupt_image", "decode webp header: %v", err)
	}
	h.Width, h.Height = config.Width, config.Height
	whole, alpha, lossless := false, false, false
	for c := range webpChunks(data) {
		switch c.kind {
		case "ANMF": // its kind is not looked up: the dearest is assumed
			h.Animated, whole, alpha, lossless = true, true, true, true
		case "ALPH":
			alpha = true
		case "VP8 ":
			whole = true
		case "VP8L":
			whole, lossless = true, true
		case "EXIF":
			h.Orientation = exifOrientation(c.body)
		case "ICCP":
			h.Profile = foreignProfile(c.body)
		}
	}
	if !whole {
		return h, permanent("corrupt_image", "webp without a whole frame")
	}
	h.decodeBytes, h.outputBytes = webpCost(h, alpha, lossless, int64(len(data)))
	return h, nil
}

// webpCost is what the decoder allocates, and what an output pixel takes.
// Lossy: whole macroblocks at a byte and a half a pixel, 16 bytes of filter
// settings each, and a copy of the data. Lossless, and alpha too: four bytes a pixel,
// once more where a transform needs a second image, one for the alpha plane,
// and the Huffman tables: one set a tile of 4×4 or larger, 2600 at most, 2.7 kB each,
// and for each symbol, of which a byte of data can spell sixteen, 16 bytes.
func webpCost(h imageHeader, alpha, lossless bool, size int64) (decode int64, output float64) {
	const maxTables, tableBytes, tableSymbols, symbolBytes = 2600, 2700, 3136, 2 * 8
	w, ht := int64(h.Width), int64(h.Height)
	decode = size + ceilDiv(w, 16)*ceilDiv(ht, 16)*(384+16)
	if !alpha && !lossless {
		return decode, outputYCbCr
	}
	tables := min(maxTables, ceilDiv(w, 4)*ceilDiv(ht, 4))
	symbols := min(tables*tableSymbols, 16*size)
	return decode + 9*w*ht + tables*tableBytes + symbols*symbolBytes, outputRGBA
}

// exifName begins a JPEG segment, and some writers' WebP chunk, that holds EXIF.
const exifName = "Exif\x00\x00"

// exifOrientation reads tag 0x0112 of the first directory of EXIF data (CIPA
// DC-008), with or without exifName before it. What cannot be read is 0: upright.
func exifOrientation(data []byte) orientation {
	data = bytes.TrimPrefix(data, []byte(exifName))
	if len(data) < 8 {
		return 0
	}
	var order binary.ByteOrder
	switch string(data[:4]) {
	case "II*\x00":
		order = binary.LittleEndian
	case "MM\x00*":
		order = binary.BigEndian
	default:
		return 0
	}
	at := int64(order.Uint32(data[4:]))
	if at+2 > int64(len(data)) {
		return 0
	}
	entries := data[at+2:]
	for range order.Uint16(data[at:]) {
		if len(entries) < 12 {
			return 0
		}
		const tagOrientation, typeShort = 0x0112, 3
		if order.Uint16(entries) == tagOrientation && order.Uint16(entries[2:]) == typeShort {
			if o := order.Uint16(entries[8:]); o >= 1 && o <= 8 {
				return orientation(o)
			}
			return 0
		}
		entries = entries[12:]
	}
	return 0
}

// jpegProfileName begins an APP2 segment that holds a part of an ICC profile;
// the part's number and the number of parts follow (ICC.1, annex B.4).
const jpegProfileName = "ICC_PROFILE\x00"

// jpegProfile gathers the parts of a JPEG's ICC profile.
type jpegProfile struct {
	parts [256][]byte // by number, from 1
	count int
}

func (p *jpegProfile) add(body []byte) {
	part, ok := bytes.CutPrefix(body, []byte(jpegProfileName))
	if ok && len(part) >= 2 {
		p.parts[part[0]] = part[2:]
		p.count = int(part[1])
	}
}

// assemble joins the parts; nil if there is none or one is missing.
func (p *jpegProfile) assemble() []byte {
	parts := p.parts[1 : p.count+1]
	if slices.ContainsFunc(parts, func(b []byte) bool { return b == nil }) {
		return nil
	}
	return bytes.Join(parts, nil)
}

// maxProfileBytes bounds what a PNG's compressed profile may unpack to. Real
// ones reach 2 MiB, with look-up tables for printing.
const maxProfileBytes = 4 << 20

// inflatePNGProfile unpacks an iCCP chunk: name, zero, method, zlib data.
func inflatePNGProfile(body []byte) []byte {
	_, packed, ok := bytes.Cut(body, []byte{0})
	if !ok || len(packed) < 1 {
		return nil
	}
	z, err := zlib.NewReader(bytes.NewReader(packed[1:]))
	if err != nil {
		return nil
	}
	profile, err := io.ReadAll(io.LimitReader(z, maxProfileBytes+1))
	if err != nil || len(profile) > maxProfileBytes {
		return nil
	}
	return profile
}

// profileSpace is the kind of colour that an ICC profile is for ("RGB ", "GRAY",
// "CMYK"), "" if it is none.
func profileSpace(profile []byte) string {
	if len(profile) < 132 || string(profile[36:40]) != "acsp" {
		return ""
	}
	return string(profile[16:20])
}

// foreignProfile returns the profile unless it is sRGB, which is what clients
// assume without one, or no profile at all. One that is larger than any real one
// is none either: each output would carry it.
func foreignProfile(profile []byte) []byte {
	if len(profile) > maxProfileBytes {
		return nil
	}
	space := profileSpace(profile)
	if space == "" || space == "RGB " && slices.Contains(srgbNames, profileDescription(profile)) {
		return nil
	}
	return profile
}

// srgbNames are the descriptions of the profiles that are sRGB. A list, not a
// search for "sRGB": there are linear and wide-gamut ones with that in their name.
var srgbNames = []string{
	"sRGB", "sRGB IEC61966-2.1", "sRGB IEC61966-2-1", "sRGB IEC61966-2-1 black scaled", "IEC 61966-2-1 Default RGB Colour Space - sRGB",
	"IEC 61966-2.1 Default RGB colour space - sRGB", "sRGB2014", "sRGB built-in", "RGB built-in", "GIMP built-in sRGB", "Artifex sRGB", "Artifex PS sRGB Profile",
	"sRGB-elle-V2-srgbtrc.icc", "sRGB-elle-V4-srgbtrc.icc", "c2", "sRGB v4 ICC preference perceptual intent beta", "Generic sRGB Profile",
}

// profileDescription reads the tag "desc", in its form of ICC version 2 or 4.
func profileDescription(profile []byte) string {
	tag := profileTag(profile, "desc")
	if len(tag) < 12 {
		return ""
	}
	size := int64(binary.BigEndian.Uint32(tag[8:]))
	switch string(tag[:4]) {
	case "desc":
		if text := tag[12:]; size <= int64(len(text)) {
			return string(bytes.TrimRight(text[:size], "\x00 "))
		}
	case "mluc": // take the first of its languages
		if size < 1 || len(tag) < 28 {
			return ""
		}
		size, at := int64(binary.BigEndian.Uint32(tag[20:])), int64(binary.BigEndian.Uint32(tag[24:]))
		if at+size <= int64(len(tag)) {
			return string(bytes.TrimRight(utf16BE(tag[at:at+size]), "\x00 "))
		}
	}
	return ""
}

func utf16BE(b []byte) []byte {
	units := make([]uint16, len(b)/2)
	for i := range units {
		units[i] = binary.BigEndian.Uint16(b[2*i:])
	}
	return []byte(string(utf16.Decode(units)))
}

// profileTag finds a tag's data in the table that follows the 128 bytes of header.
func profileTag(profile []byte, name string) []byte {
	table := profile[132:]
	for range binary.BigEndian.Uint32(profile[128:]) {
		if len(table) < 12 {
			return nil
		}
		if string(table[:4]) == name {
			at, size := int64(binary.BigEndian.Uint32(table[4:])), int64(binary.BigEndian.Uint32(table[8:]))
			if at+size > int64(len(profile)) {
				return nil
			}
			return profile[at : at+size]
		}
		table = table[12:]
	}
	return nil
}

// addJPEGProfile puts a profile into a JPEG, right after its start marker.
func addJPEGProfile(data, profile []byte) []byte {
	const maxPart = 65535 - 2 - len(jpegProfileName) - 2
	parts := slices.Collect(slices.Chunk(profile, maxPart))
	out := make([]byte, 0, len(data)+len(profile)+len(parts)*(65535-maxPart+2))
	out = append(out, data[:2]...)
	for i, part := range parts {
		out = append(out, 0xff, jpegAPP2[0])
		out = binary.BigEndian.AppendUint16(out, uint16(2+len(jpegProfileName)+2+len(part)))
		out = append(out, jpegProfileName...)
		out = append(out, byte(i+1), byte(len(parts)))
		out = append(out, part...)
	}
	return append(out, data[2:]...)
}

// addPNGProfile puts a profile into a PNG, right after its header.
func addPNGProfile(data, profile []byte) []byte {
	var body bytes.Buffer
	body.WriteString("iCCPICC profile\x00\x00") // chunk name, profile name, deflate
	z := zlib.NewWriter(&body)
	z.Write(profile) // a bytes.Buffer does not fail
	z.Close()
	const afterHeader = len(pngSignature) + 12 + 13
	out := slices.Clone(data[:afterHeader])
	out = binary.BigEndian.AppendUint32(out, uint32(body.Len()-4))
	out = append(out, body.Bytes()...)
	out = binary.BigEndian.AppendUint32(out, crc32.ChecksumIEEE(body.Bytes()))
	return append(out, data[afterHeader:]...)
}
