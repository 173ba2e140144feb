package main

import (
	"bytes"
	"compress/flate"
	"encoding/binary"
	"fmt"
	"image"
	"image/color"
	"image/gif"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// hostileImage is a file and what must become of it: "ready", an error's code,
// or "any" for what chance has made, which may become either.
type hostileImage struct {
	name string
	data []byte
	want string
}

// imageCodes are the codes with which an image's bytes can fail.
var imageCodes = []string{"not_an_image", "corrupt_image", "too_many_pixels", "too_many_scans", "too_much_memory"}

// fateOf answers what the standard library makes of a small file.
func fateOf(data []byte) string {
	if sniffFormat(data) == "" {
		return "not_an_image"
	}
	if _, _, err := image.Decode(bytes.NewReader(data)); err != nil {
		return "corrupt_image"
	}
	return "ready"
}

// sampleImages are those of Go and of golang.org/x/image, good and bad.
func sampleImages(t *testing.T) (all []hostileImage) {
	t.Helper()
	goImages := filepath.Join(goOutput(t, "env", "GOROOT"), "src", "image")
	x := goOutput(t, "list", "-m", "-f", "{{.Dir}}", "golang.org/x/image")
	for _, pattern := range []string{
		filepath.Join(goImages, "testdata", "*"), filepath.Join(goImages, "png", "testdata", "*.png"), filepath.Join(goImages, "png", "testdata", "pngsuite", "*.png"),
		filepath.Join(x, "testdata", "*.webp*"), filepath.Join(x, "testdata", "*.bmp"), filepath.Join(x, "testdata", "*.tiff"),
	} {
		names, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		for _, name := range names {
			data := readTestFile(t, name)
			all = append(all, hostileImage{filepath.Base(name), data, fateOf(data)})
		}
	}
	return all
}

// spoiltPhotos are real photographs, cut off and with bits turned.
func spoiltPhotos(t *testing.T) (all []hostileImage) {
	t.Helper()
	photos := map[string][]byte{"photo": encodedJPEG(t, photo(1600, 1200), 90), "webp": webpTestdata(t, "yellow_rose.lossy-with-alpha.webp"), "png": goTestdata(t, "testdata/video-001.png")}
	if data, err := os.ReadFile(".cache/photos/Fossa_by_Jasper_Roks.jpg"); err == nil {
		photos["Fossa"] = data
	}
	random := rand.New(rand.NewPCG(5, 6))
	for name, data := range photos {
		all = append(all, hostileImage{name, data, "ready"})
		for _, percent := range []int{0, 1, 25, 50, 75, 99} {
			cut := data[:max(1, len(data)*percent/100)]
			all = append(all, hostileImage{fmt.Sprintf("%s, %d%% of it", name, percent), cut, fateOf(cut)})
		}
		for n := range 6 {
			flipped := bytes.Clone(data)
			for range 1 + n*n {
				flipped[random.IntN(len(flipped))] ^= 1 << random.IntN(8)
			}
			all = append(all, hostileImage{fmt.Sprintf("%s, %d bits turned", name, 1+n*n), flipped, "any"})
		}
	}
	return all
}

// manyScans makes a progressive grey JPEG of side × side pixels: a first scan,
// and then some of a few bytes each, for which the decoder goes over all blocks.
func manyScans(side, scans int) []byte {
	blocks := ((side + 7) / 8) * ((side + 7) / 8)
	out := []byte("\xff\xd8")
	out = append(out, "\xff\xdb\x00\x43\x00"...)
	out = append(out, bytes.Repeat([]byte{1}, 64)...)
	out = append(out, 0xff, 0xc2, 0, 11, 8, byte(side>>8), byte(side), byte(side>>8), byte(side), 1, 1, 0x11, 0)
	oneCode := "\x01" + strings.Repeat("\x00", 15) // one code, of one bit
	out = append(out, "\xff\xc4\x00\x14\x00"+oneCode+"\x00"...)
	out = append(out, "\xff\xc4\x00\x14\x10"+oneCode+"\xe0"...) // a run of 16,384 blocks without coefficients, and 14 more bits
	out = append(out, "\xff\xda\x00\x08\x01\x01\x00\x00\x00\x00"...)
	out = append(out, make([]byte, blocks/8+1)...)
	for range scans - 1 {
		out = append(out, "\xff\xda\x00\x08\x01\x01\x00\x01\x3f\x10"...) // refines all coefficients
		out = append(out, make([]byte, (blocks/16384+1)*15/8+1)...)
	}
	return append(out, "\xff\xd9"...)
}

// manyFrames makes a GIF of small frames.
func manyFrames(t *testing.T, n int) []byte {
	t.Helper()
	frame := image.NewPaletted(image.Rect(0, 0, 16, 16), color.Palette{color.Black, color.White})
	var out bytes.Buffer
	err := gif.EncodeAll(&out, &gif.GIF{Image: slices.Repeat([]*image.Paletted{frame}, n), Delay: make([]int, n)})
	if err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

// bombs are small files that promise to be large, or take long.
func bombs(t *testing.T) []hostileImage {
	t.Helper()
	small := encodedPNG(t, image.NewNRGBA(image.Rect(0, 0, 8, 8)))
	baseline := encodedJPEG(t, photo(64, 64), 80)
	scan := baseline[bytes.Index(baseline, []byte("\xff\xda")) : len(baseline)-2]
	deep := image.NewNRGBA64(image.Rect(0, 0, 300, 200))
	for i := range deep.Pix {
		deep.Pix[i] = uint8(i * i)
	}
	lossless := []byte{0x2f, 0xff, 0xff, 0xff, 0x0f, 0, 0, 0} // 16384 × 16384
	return []hostileImage{
		{"nothing", nil, "empty_body"},
		{"one byte", []byte{0xff}, "not_an_image"},
		{"a page", []byte("<!doctype html><p>not found"), "not_an_image"},
		{"SVG", []byte(`<svg xmlns="http://www.w3.org/2000/svg"/>`), "not_an_image"},
		{"a PDF", []byte("%PDF-1.7\n"), "not_an_image"},
		{"AVIF", []byte("\x00\x00\x00\x1cftypavif\x00\x00\x00\x00avifmif1miaf"), "not_an_image"},
		{"a script behind a GIF's signature", []byte("GIF89a/*<script>*/=1;"), "corrupt_image"},
		{"JPEG of 65535²", jpegHeaderOf(0xc0, 65535, 65535), "too_many_pixels"},
		{"progressive JPEG of 65535²", jpegHeaderOf(0xc2, 65535, 65535), "too_many_pixels"},
		{"PNG of 65535²", pngHeaderOf(65535, 65535), "too_many_pixels"},
		{"PNG of 2³¹-1", pngHeaderOf(1<<31-1, 1<<31-1), "too_many_pixels"},
		{"PNG with a side of 2³²-1", pngHeaderOf(1<<32-1, 1), "too_many_pixels"},
		{"GIF of 65535²", []byte("GIF89a\xff\xff\xff\xff\x00\x00\x00,\x00\x00\x00\x00\xff\xff\xff\xff\x00\x02\x01\x00\x00;"), "too_many_pixels"},
		{"WebP of 16384²", finishWebP(appendRIFF(newWebP(), "VP8L", lossless)), "too_many_pixels"},
		{"WebP of 6500² in 28 bytes, its chunk not whole", cutWebP(6500, 6500), "corrupt_image"},
		{"PNG of 5200², all there", slices.Concat(pngHeaderOf(5200, 5200), pngChunk("IDAT", zipped(t, 5200*(1+4*5200))), pngChunk("IEND", "")), "ready"},
		{"PNG of 5000², no data", pngHeaderOf(5000, 5000), "corrupt_image"},
		{"interlaced PNG of 5000², no data", pngOf(pngKind{colour: pngTruecolourAlpha, depth: 8, interlaced: 1}.header(5000, 5000)), "too_much_memory"},
		{"progressive JPEG of 7000²", jpegHeaderOf(0xc2, 7000, 7000), "too_much_memory"},
		{"GIF with a small canvas and a large frame", []byte("GIF89a\x08\x00\x08\x00\x00\x00\x00,\x00\x00\x00\x00\xff\xff\xff\xff\x00\x02\x01\x00\x00;"), "corrupt_image"},
		{"100 scans", manyScans(2000, maxProgressiveScans), "ready"},
		{"101 scans", manyScans(2000, maxProgressiveScans+1), "too_many_scans"},
		{"1,000 scans", manyScans(2000, 1000), "too_many_scans"},
		{"25 scans of 16 megapixels", manyScans(4000, 25), "ready"},
		{"26 scans of 16 megapixels", manyScans(4000, 26), "too_many_scans"},
		{"20,000 scans", manyScans(2000, 20_000), "too_many_scans"},
		{"a sequential JPEG of 1,000 scans", slices.Concat(baseline[:len(baseline)-2], bytes.Repeat(scan, 1000), []byte("\xff\xd9")), "too_many_scans"},
		{"10,000 frames", manyFrames(t, 10_000), "ready"},
		{"16 bits", encodedPNG(t, deep), "ready"},
		{"one pixel", encodedPNG(t, image.NewGray(image.Rect(0, 0, 1, 1))), "ready"},
		{"20,000 pixels wide, one high", encodedPNG(t, image.NewGray(image.Rect(0, 0, 20_000, 1))), "ready"},
		{"a profile of 64 MiB, zipped", withPNGChunk(small, "iCCP", profileBomb(t, 64<<20)), "ready"},
		{"500 profiles", manyProfiles(t, small, 500), "ready"},
		{"a million chunks", manyChunks(small, 1_000_000), "ready"},
		{"EXIF that points nowhere", withJPEGSegment(baseline, 0xe1, exifName+"II*\x00\xff\xff\xff\xff"), "ready"},
		{"EXIF with 65,535 entries", withJPEGSegment(baseline, 0xe1, exifName+"II*\x00\x08\x00\x00\x00\xff\xff"+strings.Repeat("x", 60_000)), "ready"},
		{"a JPEG behind a JPEG", slices.Concat(baseline, baseline), "ready"},
		{"a JPEG and a page", slices.Concat(baseline, []byte("<script>alert(1)</script>")), "ready"},
		{"a frame header twice", append(slices.Clone(jpegHeaderOf(0xc0, 8, 8)[:21]), jpegHeaderOf(0xc0, 800, 800)[2:]...), "corrupt_image"},
	}
}

// profileBomb is the body of an iCCP chunk that unpacks to size bytes.
func profileBomb(t *testing.T, size int) string {
	t.Helper()
	return "x\x00\x00" + zipped(t, size)
}

// zipped is what unpacks to size zeros (RFC 1950), a mebibyte or more of them.
// Only the first two are packed: with zeros before it, each looks like the one before.
func zipped(t *testing.T, size int) string {
	t.Helper()
	var out bytes.Buffer
	packer, err := flate.NewWriter(&out, flate.BestSpeed)
	if err != nil {
		t.Fatal(err)
	}
	pack := func(zeros int) string {
		out.Reset()
		packer.Write(make([]byte, zeros))
		packer.Flush()
		return out.String()
	}
	const block = 1 << 20
	first, next, rest := pack(block), pack(block), pack(size%block)
	end := binary.BigEndian.AppendUint32([]byte{3, 0}, uint32(size%65521)<<16|1) // an empty last block, and Adler-32
	return "\x78\x01" + first + strings.Repeat(next, size/block-1) + rest + string(end)
}

func manyProfiles(t *testing.T, png []byte, n int) []byte {
	t.Helper()
	chunk := pngChunk("iCCP", profileBomb(t, maxProfileBytes))
	return slices.Concat(png[:33], bytes.Repeat(chunk, n), png[33:])
}

func manyChunks(png []byte, n int) []byte {
	return slices.Concat(png[:33], bytes.Repeat(pngChunk("teXt", ""), n), png[33:])
}

// mostDelay is how many times longer a good image may be in hand among hostile
// ones than among as many of its like: on an idle machine a third of the time.
// longestWork is how many times longer any image may, which takes its turn for
// IMAGE_MEMORY besides: on an idle machine four times.
const (
	mostDelay   = 3
	longestWork = 30
)

// imageDuration is how long an image was in the program's hands, in its log.
var imageDuration = regexp.MustCompile(`"msg":"image (?:ready|dead)".*"duration":([0-9.e+-]+)(?:.*"source_bytes":([0-9]+))?`)

// The battery, end to end, through a program that may take 112 MiB for decoded
// images: every one becomes what it should, the program lives, its memory stays
// within the limit, and a good image among them waits no longer than it would
// among as many of its like.
func TestHostileImages(t *testing.T) {
	t.Parallel()
	if _, err := os.Stat("/proc/self/status"); err != nil {
		t.Skip("needs /proc")
	}
	all := slices.Concat(sampleImages(t), spoiltPhotos(t), bombs(t))
	if len(all) < 80 {
		t.Errorf("%d images", len(all))
	}
	const memory, slack = 112 << 20, 96 << 20 // sources on their way, and what the collector has not taken yet
	b := battery{photos: newPhotoServer(t), good: jpegPhoto(t, 1600, 1200), fates: make(map[string]int)}
	b.api = startBinary(t, environment(map[string]string{"DATA_DIR": t.TempDir(), "IMAGE_MEMORY": fmt.Sprint(memory), "IMAGE_WORKERS": "2"}))
	b.run(t, nil)
	idle := peakMemory(t, b.api.pid)
	likes := slices.Repeat([]hostileImage{{"one like it", b.good, "ready"}}, 3*maxImages)
	before, _ := b.run(t, likes)
	clear(b.fates)
	among, slowest := b.run(t, all)
	fates := maps.Clone(b.fates)
	after, _ := b.run(t, likes)
	usual := (before + after) / 2 // what else the machine does changes meanwhile
	grown := peakMemory(t, b.api.pid) - idle
	t.Logf("%d images, the slowest in %v: %v; a good one takes %v (median) among them and %v among its like", len(all), slowest, fates, among, usual)
	t.Logf("the peak is %d MiB above that at rest, with %d MiB for images", grown>>20, memory>>20)
	if slowest > longestWork*usual || among > mostDelay*usual {
		t.Errorf("the slowest image took %v, a good one %v, which is %v among its like", slowest, among, usual)
	}
	if grown > memory+slack {
		t.Errorf("the peak is %d MiB above that at rest", grown>>20)
	}
}

// battery is a program that gets hostile images, and a good one with each batch of them.
type battery struct {
	api    *instance
	photos *photoServer
	good   []byte
	fates  map[string]int
	posted int
	read   int // of the program's log
}

// run has images go through the program, all at once. It answers the median time
// that a good one was in its hands, and the longest of any.
func (b *battery) run(t *testing.T, all []hostileImage) (good, longest time.Duration) {
	t.Helper()
	batches := slices.Collect(slices.Chunk(all, maxImages-1))
	if len(batches) == 0 {
		batches = [][]hostileImage{nil}
	}
	var products []shown
	for _, batch := range batches {
		products = append(products, b.post(t, batch))
	}
	for n, batch := range batches {
		b.await(t, batch, products[n])
	}
	return b.durations(t, len(all)+len(batches))
}

func (b *battery) post(t *testing.T, batch []hostileImage) shown {
	t.Helper()
	b.posted++
	sources := []string{b.photos.serve(fmt.Sprintf("/%d/good", b.posted), b.good)}
	for n, hostile := range batch {
		sources = append(sources, b.photos.serve(fmt.Sprintf("/%d/%d", b.posted, n), nonNil(hostile.data)))
	}
	return b.api.post(t, sources...)
}

// await waits until all images of a product are settled, and checks what has
// become of them.
func (b *battery) await(t *testing.T, batch []hostileImage, p shown) {
	t.Helper()
	good := hostileImage{"the good image", b.good, "ready"}
	for n, got := range b.api.settled(t, p.ID).Images {
		hostile := slices.Concat([]hostileImage{good}, batch)[n]
		fate := got.Status
		if got.Error != nil {
			fate = got.Error.Code
		}
		b.fates[fate]++
		if fate != hostile.want && (hostile.want != "any" || fate != "ready" && !slices.Contains(imageCodes, fate)) {
			t.Errorf("%s: %s %v, want %s", hostile.name, fate, got.Error, hostile.want)
		}
		if got.Attempts > 1 {
			t.Errorf("%s was tried %d times", hostile.name, got.Attempts)
		}
	}
}

// durations reads what the program logs of the images since the last call: the
// median time that a good one was in its hands, and the longest of any.
func (b *battery) durations(t *testing.T, images int) (good, longest time.Duration) {
	t.Helper()
	var lines [][]string
	eventually(t, "all images are in the log", func() bool {
		lines = imageDuration.FindAllStringSubmatch(b.api.log.tail(1<<22), -1)
		return len(lines) >= b.read+images
	})
	var goods []time.Duration
	for _, line := range lines[b.read:] {
		seconds, err := strconv.ParseFloat(line[1], 64)
		if err != nil {
			t.Fatal(err)
		}
		took := time.Duration(seconds * float64(time.Second))
		longest = max(longest, took)
		if line[2] == strconv.Itoa(len(b.good)) {
			goods = append(goods, took)
		}
	}
	b.read = len(lines)
	slices.Sort(goods)
	return goods[len(goods)/2], longest
}

// What would take more than all of IMAGE_MEMORY is refused before it is decoded,
// and what fits goes on.
func TestImageThatMemoryCannotHold(t *testing.T) {
	t.Parallel()
	photos := newPhotoServer(t)
	api := start(t, environment(map[string]string{"DATA_DIR": t.TempDir(), "IMAGE_MEMORY": "8MiB"}))
	large, small := photos.serve("/large", pngHeaderOf(2000, 2000)), photos.serve("/small", encodedJPEG(t, photo(64, 64), 80))
	images := api.settled(t, api.post(t, large, small).ID).Images
	if e := images[0].Error; e == nil || e.Code != "too_much_memory" {
		t.Errorf("the large image: %s, %+v", images[0].Status, e)
	}
	if images[1].Status != "ready" {
		t.Errorf("the small image: %s, %+v", images[1].Status, images[1].Error)
	}
}

func nonNil(data []byte) []byte {
	if data == nil {
		return []byte{} // nil is a photo that is not there
	}
	return data
}

// One worker reads all headers, so one that takes long holds up every image.
func TestHeadersAreReadQuickly(t *testing.T) {
	t.Parallel()
	const size = 8 << 20
	small := encodedPNG(t, image.NewNRGBA(image.Rect(0, 0, 8, 8)))
	baseline := encodedJPEG(t, photo(64, 64), 80)
	profile := pngChunk("iCCP", profileBomb(t, maxProfileBytes))
	webp := webpTestdata(t, "video-001.lossy.webp")
	for name, data := range map[string][]byte{
		"PNG of empty chunks":      manyChunks(small, size/12),
		"PNG of zipped profiles":   slices.Concat(small[:33], bytes.Repeat(profile, size/len(profile)), small[33:]),
		"JPEG of empty segments":   slices.Concat(baseline[:2], bytes.Repeat([]byte("\xff\xe5\x00\x02"), size/4), baseline[2:]),
		"JPEG of stuffing":         slices.Concat(baseline[:2], bytes.Repeat([]byte("\xff\x00"), size/2), baseline[2:]),
		"JPEG of fill bytes":       slices.Concat(baseline[:2], bytes.Repeat([]byte("\xff"), size), baseline[2:]),
		"JPEG of end markers":      slices.Concat(baseline, bytes.Repeat([]byte("\xff\xd8\xff\xd9"), size/4)),
		"JPEG with one long scan":  slices.Concat(baseline[:len(baseline)-2], bytes.Repeat([]byte("\xff\x00"), size/2)),
		"JPEG of restart markers":  slices.Concat(baseline[:len(baseline)-2], bytes.Repeat([]byte("\xff\xd0"), size/2)),
		"GIF of empty extensions":  slices.Concat([]byte("GIF89a\x01\x00\x01\x00\x00\x00\x00"), bytes.Repeat([]byte("!\xfe\x00"), size/3)),
		"GIF of blocks of a byte":  slices.Concat([]byte("GIF89a\x01\x00\x01\x00\x00\x00\x00!\xfe"), bytes.Repeat([]byte("\x01x"), size/2)),
		"WebP of empty chunks":     finishWebP(slices.Concat(bytes.Clone(webp), bytes.Repeat([]byte("XXXX\x00\x00\x00\x00"), size/8))),
		"EXIF in 500 JPEG headers": slices.Concat(baseline[:2], bytes.Repeat(withJPEGSegment([]byte("\xff\xd8"), 0xe1, exifName+"II*\x00\x08\x00\x00\x00\xff\xff"+strings.Repeat("\x00", 65_000))[2:], 500), baseline[2:]),
	} {
		t.Run(name, func(t *testing.T) {
			begin := time.Now()
			_, err := readImageHeader(data, testPixels)
			if took := time.Since(begin); took > 10*time.Second { // with the race detector, on a busy machine
				t.Errorf("took %v, and said %v", took, err)
			} else {
				t.Logf("%v", took)
			}
		})
	}
}

func TestMostScans(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		frame jpegFrame
		want  int
	}{
		{jpegFrame{width: 100, height: 100}, 4}, {jpegFrame{width: 100, height: 100, progressive: true}, 100}, {jpegFrame{progressive: true}, 100},
		{jpegFrame{width: 2000, height: 2000, progressive: true}, 100}, {jpegFrame{width: 4000, height: 4000, progressive: true}, 25},
		{jpegFrame{width: 7000, height: 7000, progressive: true}, 20}, {jpegFrame{width: 65535, height: 65535, progressive: true}, 20},
	} {
		if got := c.frame.maxScans(); got != c.want {
			t.Errorf("%d×%d, progressive %v: %d scans, want %d", c.frame.width, c.frame.height, c.frame.progressive, got, c.want)
		}
	}
	for scans, want := range map[int]string{100: "", 101: "too_many_scans"} {
		if _, err := readImageHeader(manyScans(64, scans), testPixels); err == nil && want != "" || err != nil && errorCode(err) != want {
			t.Errorf("%d scans: %v, want %q", scans, err, want)
		}
	}
}
