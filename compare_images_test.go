//go:build linux

package main

import (
	"bufio"
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"image"
	"io"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/image/draw"
)

// compareVar names the directory with sharp in it, and turns the comparison on.
const compareVar = "COMPARE_IMAGES"

// compareSide is IMAGE_MAX_SIDE's default, which the comparison is about.
const compareSide = 2048

// compareQualities are those at which sharp is measured, so that its bytes at
// our likeness to the reference can be read off between two of them.
var compareQualities = []int{72, 76, 80, 84, 88}

// sample is one source of the comparison.
type sample struct {
	class string
	path  string
}

// score is what one side made of one sample.
type score struct {
	cpu    float64 // µs of one thread, the least of all rounds
	bytes  float64
	peak   float64 // kB of a process that has compressed this image alone
	idle   float64 // kB of a process that is ready to
	likely float64 // SSIM of the luma, the mean over two references
}

// TestCompareWithSharp prints how this pipeline and sharp compare, class by class.
// Both run on one core, one thread each, in turns.
func TestCompareWithSharp(t *testing.T) {
	dir := os.Getenv(compareVar)
	if dir == "" {
		t.Skip("make compare-images runs this")
	}
	c := &comparison{t: t, dir: dir, work: t.TempDir()}
	samples := c.samples()
	ours, sharps := c.open(c.ourCommand()), c.open(c.sharpCommand())
	rows := map[string][][5]float64{}
	fmt.Printf("%-12s %-38s %9s %9s %6s %6s %6s %6s %7s %7s\n", "class", "image", "our ms", "sharp ms", "cpu", "bytes", "=ssim", "memory", "ours", "sharp")
	for _, s := range samples {
		a, b, equal := c.compare(s, ours, sharps)
		row := [5]float64{a.cpu / b.cpu, a.bytes / b.bytes, a.bytes / equal, a.peak / b.peak, (a.peak - a.idle) / (b.peak - b.idle)}
		rows[s.class] = append(rows[s.class], row)
		fmt.Printf("%-12s %-38.38s %9.1f %9.1f %6.2f %6.3f %6.3f %6.2f %7.4f %7.4f\n", s.class, filepath.Base(s.path),
			a.cpu/1e3, b.cpu/1e3, row[0], row[1], row[2], row[3], a.likely, b.likely)
	}
	fmt.Printf("\n%-14s %6s %8s %8s %20s %8s %18s\n", "geometric mean", "images", "CPU", "bytes", "bytes at equal SSIM", "memory", "memory above idle")
	for _, class := range compareClasses {
		m := geometricMeans(rows[class])
		fmt.Printf("%-14s %6d %8.2f %8.3f %20.3f %8.2f %18.2f\n", class, len(rows[class]), m[0], m[1], m[2], m[3], m[4])
	}
}

var compareClasses = []string{"baseline", "progressive", "4:4:4", "on white", "png alpha", "webp"}

func geometricMeans(rows [][5]float64) (means [5]float64) {
	for i := range means {
		sum := 0.0
		for _, row := range rows {
			sum += math.Log(row[i])
		}
		means[i] = math.Exp(sum / float64(len(rows)))
	}
	return means
}

// comparison is one run of the test.
type comparison struct {
	t    *testing.T
	dir  string // with sharp
	work string // for files made on the way
}

// samples gathers photographs and makes what is missing of a class from them.
func (c *comparison) samples() []sample {
	photos, err := filepath.Glob(".cache/photos/*.jpg")
	if err != nil || len(photos) < 5 {
		c.t.Fatalf("%d photographs: %v", len(photos), err)
	}
	// The smallest would say little of photos: they need no resizing.
	slices.SortFunc(photos, func(a, b string) int { return cmp.Compare(pixelsOf(c.t, b), pixelsOf(c.t, a)) })
	photos = photos[:min(len(photos), 10)]
	maker := c.open(c.sharpCommand())
	samples := slices.Clone(natural(c.t, photos))
	for i, photo := range photos[:5] {
		name := strings.TrimSuffix(filepath.Base(photo), ".jpg")
		shape := []string{"bottle", "box"}[i%2]
		samples = append(samples,
			sample{"baseline", maker.make(c, name+"-95.jpg", sideRequest{Operation: "resave", Source: photo, Quality: 95, Chroma: "4:2:0"})},
			sample{"4:4:4", maker.make(c, name+"-444.jpg", sideRequest{Operation: "resave", Source: photo, Quality: 92, Chroma: "4:4:4"})},
			sample{"on white", maker.make(c, name+"-white.jpg", sideRequest{Operation: "shot", Source: photo, Side: 3000, Shape: shape})},
			sample{"png alpha", maker.make(c, name+"-alpha.png", sideRequest{Operation: "shot", Source: photo, Side: 2400, Shape: shape})},
		)
		if i < 3 {
			samples = append(samples, sample{"webp", maker.make(c, name+".webp", sideRequest{Operation: "resave", Source: photo, Quality: 90})})
		}
	}
	slices.SortStableFunc(samples, func(a, b sample) int {
		return cmp.Compare(slices.Index(compareClasses, a.class), slices.Index(compareClasses, b.class))
	})
	return samples
}

// natural sorts photographs into classes, at most four in each.
func natural(t *testing.T, photos []string) (samples []sample) {
	count := map[string]int{}
	for _, path := range photos {
		class := "baseline"
		for s := range jpegSegments(readTestFile(t, path)) {
			switch s.kind {
			case jpegSOF2:
				class = "progressive"
			}
		}
		if count[class]++; count[class] <= 4 {
			samples = append(samples, sample{class, path})
		}
	}
	return samples
}

func pixelsOf(t *testing.T, path string) int {
	h, err := readImageHeader(readTestFile(t, path), math.MaxInt64)
	if err != nil {
		t.Fatal(err)
	}
	return h.Width * h.Height
}

// compare measures both sides on one sample, in turns, and answers too how many
// bytes sharp needs to be as like the reference as ours is.
func (c *comparison) compare(s sample, ours, sharps *side) (a, b score, equal float64) {
	rounds, err := strconv.Atoi(cmp.Or(os.Getenv("COMPARE_ROUNDS"), "3"))
	if err != nil {
		c.t.Fatalf("COMPARE_ROUNDS: %v", err)
	}
	a.cpu, b.cpu = math.Inf(1), math.Inf(1)
	for range rounds {
		ours.compress(c, s, testQuality, &a)
		sharps.compress(c, s, testQuality, &b)
	}
	references := c.references(s)
	a.likely, b.likely = c.likeness(ours.out(c), references), c.likeness(sharps.out(c), references)
	c.memory(c.ourCommand, s, &a)
	c.memory(c.sharpCommand, s, &b)
	if s.class == "png alpha" { // no quality to vary: both are as good as they can be
		return a, b, b.bytes
	}
	var curve [][2]float64 // likeness, log bytes
	for _, quality := range compareQualities {
		var at score
		sharps.compress(c, s, quality, &at)
		curve = append(curve, [2]float64{c.likeness(sharps.out(c), references), math.Log(at.bytes)})
	}
	return a, b, math.Exp(interpolate(curve, a.likely))
}

// interpolate reads y at x off a curve that rises, and beyond its ends by the
// slope there.
func interpolate(curve [][2]float64, x float64) float64 {
	i := 1
	for i < len(curve)-1 && curve[i][0] < x {
		i++
	}
	p, q := curve[i-1], curve[i]
	return p[1] + (x-p[0])*(q[1]-p[1])/(q[0]-p[0])
}

// memory asks a fresh process for nothing, and then for one image.
func (c *comparison) memory(command func() *exec.Cmd, s sample, into *score) {
	process := c.open(command())
	defer process.close(c)
	process.call(c, sideRequest{Operation: "wait"})
	into.idle = process.peak(c)
	process.compress(c, s, testQuality, &score{cpu: math.Inf(1)})
	into.peak = process.peak(c)
}

// references are the sample at the size of the results, resized by each side's
// own kernel from all of its pixels: neither side is the measure of the other.
func (c *comparison) references(s sample) [][]float64 {
	path := filepath.Join(c.work, "reference.png")
	maker := c.open(c.sharpCommand())
	maker.call(c, sideRequest{Operation: "reference", Source: absolute(c.t, s.path), Out: path, Side: compareSide})
	maker.close(c)
	sharps := decodeFile(c.t, path)
	full := decodeFile(c.t, s.path)
	ours := image.NewRGBA(sharps.Bounds())
	draw.CatmullRom.Scale(ours, ours.Rect, full, full.Bounds(), draw.Src, nil)
	return [][]float64{lumaOf(sharps), lumaOf(ours)}
}

// likeness is the mean SSIM to the references.
func (c *comparison) likeness(path string, references [][]float64) float64 {
	m := decodeFile(c.t, path)
	luma, sum := lumaOf(m), 0.0
	for _, reference := range references {
		sum += ssim(luma, reference, m.Bounds().Dx())
	}
	return sum / float64(len(references))
}

func decodeFile(t *testing.T, path string) image.Image {
	m, _, err := image.Decode(bytes.NewReader(readTestFile(t, path)))
	if err != nil {
		t.Fatalf("decode %s: %v", path, err)
	}
	return m
}

// lumaOf is the luma (BT.601) of an image on white.
func lumaOf(m image.Image) []float64 {
	b := m.Bounds()
	out := make([]float64, 0, b.Dx()*b.Dy())
	if p, ok := m.(*image.YCbCr); ok {
		for y := range b.Dy() {
			for _, v := range p.Y[y*p.YStride:][:b.Dx()] {
				out = append(out, float64(v))
			}
		}
		return out
	}
	for y := b.Min.Y; y < b.Max.Y; y++ {
		for x := b.Min.X; x < b.Max.X; x++ {
			r, g, b, a := m.At(x, y).RGBA()
			white := 65535 - float64(a)
			out = append(out, (0.299*(float64(r)+white)+0.587*(float64(g)+white)+0.114*(float64(b)+white))/257)
		}
	}
	return out
}

// ssim is the mean structural similarity (Wang, Bovik, Sheikh, Simoncelli 2004) of
// two images of one width, over windows of 8 × 8 that half overlap.
func ssim(a, b []float64, width int) float64 {
	const size, c1, c2 = 8, (0.01 * 255) * (0.01 * 255), (0.03 * 255) * (0.03 * 255)
	total, windows := 0.0, 0.0
	for top := 0; (top+size)*width <= len(a); top += size / 2 {
		for left := 0; left+size <= width; left += size / 2 {
			var sa, sb, aa, bb, ab float64
			for y := range size {
				at := (top+y)*width + left
				for x := range size {
					p, q := a[at+x], b[at+x]
					sa, sb, aa, bb, ab = sa+p, sb+q, aa+p*p, bb+q*q, ab+p*q
				}
			}
			const n = size * size
			ma, mb := sa/n, sb/n
			va, vb, cov := aa/n-ma*ma, bb/n-mb*mb, ab/n-ma*mb
			total += (2*ma*mb + c1) * (2*cov + c2) / ((ma*ma + mb*mb + c1) * (va + vb + c2))
			windows++
		}
	}
	return total / windows
}

// sideRequest is one line to a side; sharp.mjs says what the operations are.
type sideRequest struct {
	Operation   string `json:"operation"`
	Source      string `json:"source"`
	Out         string `json:"out"`
	Side        int    `json:"side"`
	Quality     int    `json:"quality"`
	Chroma      string `json:"chroma"`
	Progressive bool   `json:"progressive"`
	Shape       string `json:"shape"`
}

// sideAnswer is the line that a side answers with.
type sideAnswer struct {
	CPU   float64 `json:"cpu"` // µs
	Bytes float64 `json:"bytes"`
	Error string  `json:"error"`
}

// side is a process that compresses images, one line a request.
type side struct {
	cmd   *exec.Cmd
	stdin io.WriteCloser
	lines *bufio.Scanner
}

func (c *comparison) sharpCommand() *exec.Cmd {
	return exec.Command("taskset", "-c", "0", "node", filepath.Join(c.dir, "sharp.mjs"))
}

// ourCommand is this test in the part of TestCompareSide.
func (c *comparison) ourCommand() *exec.Cmd {
	cmd := exec.Command("taskset", "-c", "0", os.Args[0], "-test.run=^TestCompareSide$", "-test.v=false")
	cmd.Env = append(os.Environ(), compareSideVar+"=1", "GOMAXPROCS=1")
	return cmd
}

func (c *comparison) open(cmd *exec.Cmd) *side {
	s := &side{cmd: cmd}
	var err error
	if s.stdin, err = cmd.StdinPipe(); err != nil {
		c.t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		c.t.Fatal(err)
	}
	s.lines = bufio.NewScanner(stdout)
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		c.t.Fatal(err)
	}
	c.t.Cleanup(func() { s.close(c) })
	return s
}

// close ends the process.
func (s *side) close(c *comparison) {
	s.stdin.Close()
	if s.cmd.ProcessState != nil {
		return
	}
	for s.lines.Scan() { // a test's last words
	}
	if err := s.cmd.Wait(); err != nil {
		c.t.Error(err)
	}
}

// peak is the most memory that the process has held, in kB. (The rusage of a
// process counts what its parent held when it forked.)
func (s *side) peak(c *comparison) (kB float64) {
	status := readTestFile(c.t, fmt.Sprintf("/proc/%d/status", s.cmd.Process.Pid))
	_, after, _ := strings.Cut(string(status), "VmHWM:")
	if _, err := fmt.Sscan(after, &kB); err != nil {
		c.t.Fatal(err)
	}
	return kB
}

func (s *side) call(c *comparison, r sideRequest) sideAnswer {
	line, err := json.Marshal(r)
	if err != nil {
		c.t.Fatal(err)
	}
	if _, err := s.stdin.Write(append(line, '\n')); err != nil {
		c.t.Fatal(err)
	}
	if !s.lines.Scan() {
		c.t.Fatalf("%s %s: no answer", r.Operation, r.Source)
	}
	var a sideAnswer
	if err := json.Unmarshal(s.lines.Bytes(), &a); err != nil || a.Error != "" {
		c.t.Fatalf("%s: %v %s", s.lines.Bytes(), err, a.Error)
	}
	return a
}

func (s *side) out(c *comparison) string {
	return filepath.Join(c.work, strconv.Itoa(s.cmd.Process.Pid))
}

func (s *side) compress(c *comparison, from sample, quality int, into *score) {
	a := s.call(c, sideRequest{Operation: "compress", Source: absolute(c.t, from.path), Out: s.out(c), Side: compareSide, Quality: quality})
	into.cpu, into.bytes = min(into.cpu, a.CPU), a.Bytes
}

// make has a sample made, and answers its path.
func (s *side) make(c *comparison, name string, r sideRequest) string {
	r.Source, r.Out = absolute(c.t, r.Source), filepath.Join(c.work, name)
	s.call(c, r)
	return r.Out
}

func absolute(t *testing.T, path string) string {
	path, err := filepath.Abs(path)
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// compareSideVar makes TestCompareSide this program's side of the comparison.
const compareSideVar = "COMPARE_IMAGES_SIDE"

func TestCompareSide(t *testing.T) {
	if os.Getenv(compareSideVar) == "" {
		t.Skip("is one side of the comparison with sharp")
	}
	lines := bufio.NewScanner(os.Stdin)
	for lines.Scan() {
		var r sideRequest
		if err := json.Unmarshal(lines.Bytes(), &r); err != nil {
			t.Fatal(err)
		}
		a, err := answerRequest(r)
		if err != nil {
			a.Error = err.Error()
		}
		if err := json.NewEncoder(os.Stdout).Encode(a); err != nil {
			t.Fatal(err)
		}
	}
}

func answerRequest(r sideRequest) (sideAnswer, error) {
	if r.Operation == "wait" {
		return sideAnswer{}, nil
	}
	data, err := os.ReadFile(r.Source)
	if err != nil {
		return sideAnswer{}, err
	}
	before, err := selfTime()
	if err != nil {
		return sideAnswer{}, err
	}
	result, err := compressBytes(data, r.Side)
	after, timeErr := selfTime()
	if err := errors.Join(err, timeErr); err != nil {
		return sideAnswer{}, err
	}
	return sideAnswer{CPU: after - before, Bytes: float64(len(result.Data))}, os.WriteFile(r.Out, result.Data, 0o600)
}

// selfTime is the CPU time of this process in µs.
func selfTime() (float64, error) {
	var usage syscall.Rusage
	err := syscall.Getrusage(syscall.RUSAGE_SELF, &usage)
	return float64(usage.Utime.Nano()+usage.Stime.Nano()) / 1e3, err
}
