package main

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"image"
	"iter"
)

// segment is one piece of an image file, in the words of its format: a JPEG
// marker segment, a PNG or RIFF chunk, a GIF block.
type segment struct {
	kind string // JPEG: the marker byte; PNG and WebP: the four letters; GIF: see gifSegments
	raw  []byte // the whole piece
	body []byte // what the piece carries
}

// JPEG markers (ITU-T T.81, table B.1), as segment kinds.
const (
	jpegSOF0  = "\xc0"
	jpegSOF1  = "\xc1"
	jpegSOF2  = "\xc2" // progressive
	jpegDHT   = "\xc4"
	jpegJPG   = "\xc8"
	jpegDAC   = "\xcc"
	jpegSOF15 = "\xcf"
	jpegSOI   = "\xd8"
	jpegEOI   = "\xd9"
	jpegSOS   = "\xda"
	jpegDQT   = "\xdb"
	jpegDRI   = "\xdd"
	jpegAPP0  = "\xe0"
	jpegAPP1  = "\xe1"
	jpegAPP2  = "\xe2"
	jpegAPP14 = "\xee"
)

// jpegSegments walks a JPEG up to its end marker, or to where it breaks off.
// A scan's entropy-coded data belongs to its SOS. Stray bytes between segments
// are skipped, as decoders do.
func jpegSegments(data []byte) iter.Seq[segment] {
	return func(yield func(segment) bool) {
		for at := 0; ; {
			skip := bytes.IndexByte(data[at:], 0xff)
			if skip < 0 {
				return
			}
			at += skip
			if at+1 >= len(data) {
				return
			}
			if next := data[at+1]; next == 0 || next == 0xff || isRestart(next) { // stuffing, fill, a restart of nothing
				at++
				continue
			}
			s, ok := jpegSegmentAt(data[at:])
			if !ok || !yield(s) || s.kind == jpegEOI {
				return
			}
			at += len(s.raw)
		}
	}
}

// jpegSegmentAt reads the segment whose marker data begins with.
func jpegSegmentAt(data []byte) (segment, bool) {
	kind := string(data[1:2])
	if kind == jpegSOI || kind == jpegEOI {
		return segment{kind: kind, raw: data[:2]}, true
	}
	if len(data) < 4 {
		return segment{}, false
	}
	end := 2 + int(binary.BigEndian.Uint16(data[2:]))
	if end < 4 || end > len(data) {
		return segment{}, false
	}
	body := data[4:end]
	if kind == jpegSOS {
		end += scanLength(data[end:])
	}
	return segment{kind, data[:end], body}, true
}

func isRestart(marker byte) bool { return marker >= 0xd0 && marker <= 0xd7 }

// scanLength is how far a scan's entropy-coded data reaches: to the first
// marker that is neither a stuffed zero nor a restart.
func scanLength(data []byte) int {
	for at := 0; ; {
		skip := bytes.IndexByte(data[at:], 0xff)
		if skip < 0 || at+skip+1 >= len(data) {
			return len(data)
		}
		at += skip
		switch next := data[at+1]; {
		case next == 0xff:
			at++
		case next == 0 || isRestart(next):
			at += 2
		default:
			return at
		}
	}
}

const pngSignature = "\x89PNG\r\n\x1a\n"

// pngChunks walks the chunks of a PNG up to IEND, or to where it breaks off.
// Checksums are left to the decoder.
func pngChunks(data []byte) iter.Seq[segment] {
	return func(yield func(segment) bool) {
		for rest := data[len(pngSignature):]; ; {
			s, ok := pngChunkAt(rest)
			if !ok || !yield(s) || s.kind == "IEND" {
				return
			}
			rest = rest[len(s.raw):]
		}
	}
}

// pngChunkAt reads the chunk that data begins with.
func pngChunkAt(data []byte) (segment, bool) {
	if len(data) < 12 {
		return segment{}, false
	}
	size := int64(binary.BigEndian.Uint32(data))
	if size > int64(len(data)-12) {
		return segment{}, false
	}
	return segment{string(data[4:8]), data[:12+size], data[8 : 8+size]}, true
}

// riffChunks walks the chunks in data, which follow a RIFF header or stand in
// a chunk. The last may lack its padding byte.
func riffChunks(data []byte) iter.Seq[segment] {
	return func(yield func(segment) bool) {
		for len(data) >= 8 {
			size := int64(binary.LittleEndian.Uint32(data[4:]))
			if size > int64(len(data)-8) {
				return
			}
			padded := min(8+size+size%2, int64(len(data)))
			if !yield(segment{string(data[:4]), data[:padded], data[8 : 8+size]}) {
				return
			}
			data = data[padded:]
		}
	}
}

// webpHeaderSize is "RIFF", the length of what follows, "WEBP".
const webpHeaderSize = 12

// webpChunks walks the chunks of a WebP file; bytes after the RIFF's end are not its own.
func webpChunks(data []byte) iter.Seq[segment] {
	end := min(int64(len(data)), 8+int64(binary.LittleEndian.Uint32(data[4:])))
	return riffChunks(data[webpHeaderSize:max(end, webpHeaderSize)])
}

// firstWebPFrame makes a still WebP of an animation's first frame, and tells
// where it lies (WebP container specification, ANMF chunk). It must lie on
// canvas, since that is what was checked and counted.
func firstWebPFrame(data []byte, canvas image.Rectangle) ([]byte, image.Point, error) {
	for c := range webpChunks(data) {
		if c.kind != "ANMF" || len(c.body) < 16 {
			continue
		}
		offset := image.Pt(2*uint24(c.body), 2*uint24(c.body[3:]))
		size := image.Pt(uint24(c.body[6:])+1, uint24(c.body[9:])+1)
		if !(image.Rectangle{Min: offset, Max: offset.Add(size)}).In(canvas) {
			return nil, image.Point{}, fmt.Errorf("frame of %v at %v leaves the canvas of %v", size, offset, canvas.Size())
		}
		flags := byte(0)
		for inner := range riffChunks(c.body[16:]) {
			if inner.kind == "ALPH" {
				flags = webpAlphaFlag
			}
		}
		extended := append([]byte{flags, 0, 0, 0}, c.body[6:12]...) // both sides, each less one
		out := appendRIFF(newWebP(), "VP8X", extended)
		return finishWebP(append(out, c.body[16:]...)), offset, nil
	}
	return nil, image.Point{}, errors.New("animation without a frame")
}

// Bits of the first byte of a VP8X chunk.
const (
	webpAnimationFlag = 1 << 1
	webpXMPFlag       = 1 << 2
	webpEXIFFlag      = 1 << 3
	webpAlphaFlag     = 1 << 4
	webpProfileFlag   = 1 << 5
)

func uint24(b []byte) int { return int(b[0]) | int(b[1])<<8 | int(b[2])<<16 }

func newWebP() []byte { return []byte("RIFF\x00\x00\x00\x00WEBP") }

// finishWebP writes the length that newWebP left open.
func finishWebP(out []byte) []byte {
	binary.LittleEndian.PutUint32(out[4:], uint32(len(out)-8))
	return out
}

// appendRIFF appends a chunk, padded to an even length.
func appendRIFF(out []byte, kind string, body []byte) []byte {
	out = append(out, kind...)
	out = binary.LittleEndian.AppendUint32(out, uint32(len(body)))
	out = append(out, body...)
	if len(body)%2 == 1 {
		out = append(out, 0)
	}
	return out
}

// The kinds of gifSegments.
const (
	gifHeader    = "header" // signature, screen descriptor, global colours
	gifControl   = "control"
	gifExtension = "extension" // every other: comments, text, applications
	gifImage     = "image"     // descriptor, local colours, data; body is the descriptor
	gifTrailer   = "trailer"
)

// gifSegments walks the blocks of a GIF up to its trailer, or to where it breaks off.
func gifSegments(data []byte) iter.Seq[segment] {
	return func(yield func(segment) bool) {
		if len(data) < 13 {
			return
		}
		size := 13 + gifColors(data[10])
		for kind, body := gifHeader, data[:13]; size <= len(data); {
			if !yield(segment{kind, data[:size], body}) || kind == gifTrailer {
				return
			}
			data = data[size:]
			kind, body, size = gifBlock(data)
			if kind == "" {
				return
			}
		}
	}
}

// gifBlock tells kind, body and size of the block that data begins with; kind
// is "" if there is none.
func gifBlock(data []byte) (kind string, body []byte, size int) {
	switch {
	case len(data) >= 1 && data[0] == 0x3b:
		return gifTrailer, nil, 1
	case len(data) >= 2 && data[0] == 0x21:
		kind, size = gifExtension, 2
		if data[1] == 0xf9 {
			kind = gifControl
		}
	case len(data) >= 10 && data[0] == 0x2c:
		kind, body = gifImage, data[1:10]
		size = 10 + gifColors(body[8]) + 1 // and the code size
	default:
		return "", nil, 0
	}
	for size < len(data) && data[size] != 0 {
		size += 1 + int(data[size])
	}
	return kind, body, size + 1
}

// gifColors is the length in bytes of the colour table that flags announces.
func gifColors(flags byte) int {
	if flags&0x80 == 0 {
		return 0
	}
	return 3 << (flags&7 + 1)
}

// stripMetadata copies an image file without what is not needed to show it:
// EXIF, GPS, XMP, comments, thumbnails, bytes after its end. The pixels stay as
// they are, bit by bit. An ICC profile stays if keepProfile says so.
// It reports false for a file that does not come to its proper end.
func stripMetadata(format string, data []byte, keepProfile bool) ([]byte, bool) {
	switch format {
	case formatJPEG:
		return stripJPEG(data, keepProfile)
	case formatPNG:
		return stripPNG(data, keepProfile)
	case formatGIF:
		return stripGIF(data)
	case formatWebP:
		return stripWebP(data, keepProfile)
	}
	return nil, false
}

func stripJPEG(data []byte, keepProfile bool) ([]byte, bool) {
	out := make([]byte, 0, len(data))
	for s := range jpegSegments(data) {
		switch s.kind {
		case jpegSOI: // decoders refuse a second one
			if len(out) == 0 {
				out = append(out, s.raw...)
			}
		case jpegSOF0, jpegSOF1, jpegSOF2, jpegDHT, jpegDQT, jpegDRI, jpegSOS:
			out = append(out, s.raw...)
		case jpegAPP0:
			out = appendJFIF(out, s)
		case jpegAPP2:
			if keepProfile && bytes.HasPrefix(s.body, []byte(jpegProfileName)) {
				out = append(out, s.raw...)
			}
		case jpegAPP14:
			out = appendAdobe(out, s)
		case jpegEOI:
			return append(out, s.raw...), true
		}
	}
	return nil, false
}

// appendJFIF copies a JFIF header without its thumbnail, and no other APP0.
func appendJFIF(out []byte, s segment) []byte {
	if len(s.body) < 14 || !bytes.HasPrefix(s.body, []byte("JFIF\x00")) {
		return out
	}
	out = append(out, 0xff, 0xe0, 0, 16)
	out = append(out, s.body[:12]...)
	return append(out, 0, 0)
}

// isAdobe reports whether an APP14 is Adobe's, whose twelfth byte is zero for RGB and
// CMYK, else YCbCr or YCCK. More may follow.
func isAdobe(body []byte) bool { return len(body) >= 12 && bytes.HasPrefix(body, []byte("Adobe")) }

// appendAdobe copies Adobe's segment without what follows in it, and no other APP14.
func appendAdobe(out []byte, s segment) []byte {
	if !isAdobe(s.body) {
		return out
	}
	return append(append(out, 0xff, 0xee, 0, 14), s.body[:12]...)
}

// stripPNG keeps the critical chunks and those that change how pixels look.
// What is left of an animated PNG is its still image.
func stripPNG(data []byte, keepProfile bool) ([]byte, bool) {
	out := append(make([]byte, 0, len(data)), pngSignature...)
	for c := range pngChunks(data) {
		switch c.kind {
		case "IHDR", "PLTE", "IDAT", "tRNS", "gAMA", "cHRM", "sRGB", "cICP":
			out = append(out, c.raw...)
		case "iCCP":
			if keepProfile {
				out = append(out, c.raw...)
			}
		case "IEND":
			return append(out, c.raw...), true
		}
	}
	return nil, false
}

func stripGIF(data []byte) ([]byte, bool) {
	out := make([]byte, 0, len(data))
	for s := range gifSegments(data) {
		switch s.kind {
		case gifHeader, gifControl, gifImage:
			out = append(out, s.raw...)
		case gifTrailer:
			return append(out, s.raw...), true
		}
	}
	return nil, false
}

func stripWebP(data []byte, keepProfile bool) ([]byte, bool) {
	out := append(make([]byte, 0, len(data)+1), newWebP()...)
	for c := range webpChunks(data) {
		switch c.kind {
		case "VP8X":
			body := bytes.Clone(c.body)
			if len(body) != 10 {
				return nil, false
			}
			body[0] &^= webpAnimationFlag | webpXMPFlag | webpEXIFFlag
			if !keepProfile {
				body[0] &^= webpProfileFlag
			}
			out = appendRIFF(out, c.kind, body)
		case "ICCP":
			if keepProfile {
				out = appendRIFF(out, c.kind, c.body)
			}
		case "ALPH":
			out = appendRIFF(out, c.kind, c.body)
		case "VP8 ", "VP8L":
			return finishWebP(appendRIFF(out, c.kind, c.body)), true
		}
	}
	return nil, false
}
