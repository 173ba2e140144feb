package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"image"
	"io"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// settleTime is how long a test waits for what should happen soon, on a machine
// that may be busy with other things.
const settleTime = 2 * time.Minute

// instance is a running program: one call of run, as main makes it, or a
// process of its own.
type instance struct {
	url  string
	log  *watchedLog
	stop func() error // as SIGTERM does, and waits for the end
	kill func()       // as SIGKILL does; only a process can be killed
	wait func() error // until it ends by itself; only a process does
	pid  int
	web  *http.Client // who speaks to it; nil: http.DefaultClient
}

// environment are settings for tests; later maps win.
func environment(settings ...map[string]string) map[string]string {
	env := map[string]string{
		"LISTEN_ADDR": "127.0.0.1:0", "IMAGE_ALLOW_PRIVATE": "true", "RETRY_BASE": "1ms", "LOG_LEVEL": "debug", "LOG_FORMAT": "json",
	}
	for _, more := range settings {
		maps.Copy(env, more)
	}
	return env
}

// start runs the program inside the test's process.
func start(t *testing.T, env map[string]string, args ...string) *instance {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	i := &instance{log: newWatchedLog()}
	ended := make(chan error, 1)
	go func() {
		err := run(ctx, args, func(name string) string { return env[name] }, io.Discard, i.log)
		i.log.Close()
		ended <- err
	}()
	i.stop = sync.OnceValue(func() error {
		cancel()
		return <-ended
	})
	t.Cleanup(func() {
		if err := i.stop(); err != nil {
			t.Errorf("%v ended with: %v", args, err)
		}
		i.dumpIfFailed(t)
	})
	i.awaitStart(t, args)
	return i
}

// startBinary runs the program as a process of its own.
func startBinary(t testing.TB, env map[string]string, args ...string) *instance {
	t.Helper()
	i := launchProgram(t, programPath(t), env, args...)
	i.awaitStart(t, args)
	return i
}

// launchProgram starts a program and does not wait until it works. It ends with
// the test.
func launchProgram(t testing.TB, path string, env map[string]string, args ...string) *instance {
	t.Helper()
	r, err := theReaper()
	if err != nil {
		t.Fatal(err)
	}
	i := &instance{log: newWatchedLog()}
	cmd := exec.Command(path, args...)
	cmd.SysProcAttr = groupAttr(nil)
	cmd.Stderr = i.log
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "HOME=" + t.TempDir()}
	for name, value := range env {
		cmd.Env = append(cmd.Env, name+"="+value)
	}
	cmd.Dir = t.TempDir()
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	i.pid = cmd.Process.Pid
	r.watch(i.pid, syscall.SIGKILL)
	i.wait = sync.OnceValue(func() error {
		err := cmd.Wait()
		r.forget(i.pid)
		i.log.Close()
		return err
	})
	i.stop = func() error {
		cmd.Process.Signal(syscall.SIGTERM)
		return i.wait()
	}
	i.kill = func() {
		cmd.Process.Kill()
		i.wait()
	}
	t.Cleanup(func() { i.kill(); i.dumpIfFailed(t) })
	return i
}

// programPath builds the program once, without the race detector.
func programPath(t testing.TB) string {
	t.Helper()
	path, err := buildBinary()
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// The kinds of the program: as it is shipped, and with points.go's points armed.
const (
	plainProgram = "plain"
	armedProgram = "armed"
)

// programFile is where a kind of the program is built; TestMain removes it.
func programFile(kind string) string {
	return filepath.Join(os.TempDir(), fmt.Sprintf("pms-test-%s-%d", kind, os.Getpid()))
}

var buildBinary = sync.OnceValues(func() (string, error) { return buildProgram(plainProgram) })

func buildProgram(kind string, flags ...string) (string, error) {
	path := programFile(kind)
	command := append([]string{"build", "-o", path}, flags...)
	out, err := exec.Command("go", append(command, ".")...).CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("%w: %s", err, out)
	}
	return path, nil
}

// awaitStart waits until the instance works, and learns its address.
func (i *instance) awaitStart(t testing.TB, args []string) {
	t.Helper()
	if slices.Contains(args, "worker") {
		i.log.await(t, `"msg":"starting"`)
		return
	}
	var line struct{ Addr string }
	if err := json.Unmarshal([]byte(i.log.await(t, `"msg":"listening"`)), &line); err != nil {
		t.Fatal(err)
	}
	i.url = "http://" + line.Addr
}

func (i *instance) dumpIfFailed(t testing.TB) {
	if t.Failed() {
		t.Logf("the log of the program:\n%s", i.log.tail(60))
	}
}

// watchedLog keeps what a program logs, and lets tests wait for a line.
type watchedLog struct {
	mu     sync.Mutex
	grown  *sync.Cond
	text   bytes.Buffer
	closed bool
}

func newWatchedLog() *watchedLog {
	l := &watchedLog{}
	l.grown = sync.NewCond(&l.mu)
	return l
}

func (l *watchedLog) Write(data []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	defer l.grown.Broadcast()
	return l.text.Write(data)
}

func (l *watchedLog) Close() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.closed = true
	l.grown.Broadcast()
}

// await answers the first line that has all the given parts.
func (l *watchedLog) await(t testing.TB, parts ...string) string {
	t.Helper()
	deadline := time.Now().Add(settleTime)
	wake := time.AfterFunc(settleTime, l.grown.Broadcast)
	defer wake.Stop()
	l.mu.Lock()
	defer l.mu.Unlock()
	for {
		for line := range strings.Lines(l.text.String()) {
			if !slices.ContainsFunc(parts, func(part string) bool { return !strings.Contains(line, part) }) {
				return line
			}
		}
		if l.closed || time.Now().After(deadline) {
			t.Fatalf("no log line has %q in\n%s", parts, l.text.String())
		}
		l.grown.Wait()
	}
}

// forget drops the lines that have part, so that a long run does not keep them.
func (l *watchedLog) forget(part string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	var kept bytes.Buffer
	for line := range bytes.Lines(l.text.Bytes()) {
		if !bytes.Contains(line, []byte(part)) || !bytes.HasSuffix(line, []byte("\n")) {
			kept.Write(line)
		}
	}
	l.text = kept
}

func (l *watchedLog) tail(n int) string {
	l.mu.Lock()
	defer l.mu.Unlock()
	lines := strings.Split(l.text.String(), "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "\n")
}

// photoServer is an image host that a test can make fail.
type photoServer struct {
	*httptest.Server
	mu     sync.Mutex
	photos map[string][]byte
	faults map[string][]int // statuses to answer with before the photo is served
	hold   map[string]chan struct{}
	asked  map[string]int
	held   map[string]int // of requests that are held back now
	most   map[string]int // of those, at any time
}

func newPhotoServer(t testing.TB) *photoServer {
	p := &photoServer{photos: make(map[string][]byte), faults: make(map[string][]int), hold: make(map[string]chan struct{}), asked: make(map[string]int), held: make(map[string]int), most: make(map[string]int)}
	p.Server = httptest.NewServer(p)
	t.Cleanup(p.Close)
	return p
}

func (p *photoServer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	p.mu.Lock()
	p.asked[r.URL.Path]++
	data, hold, status := p.photos[r.URL.Path], p.hold[r.URL.Path], 0
	if faults := p.faults[r.URL.Path]; len(faults) > 0 {
		status, p.faults[r.URL.Path] = faults[0], faults[1:]
	} else if data == nil {
		status = http.StatusNotFound
	}
	p.mu.Unlock()
	if hold != nil {
		p.count(r.URL.Path, 1)
		select {
		case <-hold:
		case <-r.Context().Done():
		}
		p.count(r.URL.Path, -1)
	}
	if status != 0 {
		http.Error(w, "fault", status)
		return
	}
	w.Write(data)
}

// serve puts a photo at path, behind some failures, and answers its URL.
func (p *photoServer) serve(path string, data []byte, faults ...int) string {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.photos[path], p.faults[path] = data, faults
	return p.URL + path
}

// holdBack keeps requests for path waiting until the returned function is called.
func (p *photoServer) holdBack(path string) (release func()) {
	p.mu.Lock()
	defer p.mu.Unlock()
	hold := make(chan struct{})
	p.hold[path] = hold
	return sync.OnceFunc(func() { close(hold) })
}

func (p *photoServer) count(path string, change int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.held[path] += change
	p.most[path] = max(p.most[path], p.held[path])
}

// mostHeld is how many requests for path were held back at once.
func (p *photoServer) mostHeld(path string) int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.most[path]
}

func (p *photoServer) requests(path string) int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.asked[path]
}

// jpegPhoto is a photograph as a camera stores it.
func jpegPhoto(t testing.TB, width, height int) []byte {
	t.Helper()
	return encodedJPEG(t, photo(width, height), 95)
}

// call sends a request and decodes the answer into out, if that is not nil.
func (i *instance) call(t *testing.T, method, path string, body, out any) *http.Response {
	t.Helper()
	response, err := i.send(method, path, body, out)
	if err != nil {
		t.Fatalf("%s %s: %v", method, path, err)
	}
	return response
}

func (i *instance) send(method, path string, body, out any) (*http.Response, error) {
	return i.sendWith(method, path, body, nil, out)
}

// sendWith is send with more header fields.
func (i *instance) sendWith(method, path string, body any, header http.Header, out any) (*http.Response, error) {
	var sent []byte
	if body != nil {
		var err error
		if sent, err = json.Marshal(body); err != nil {
			return nil, err
		}
	}
	request, err := http.NewRequest(method, i.url+path, bytes.NewReader(sent))
	if err != nil {
		return nil, err
	}
	maps.Copy(request.Header, header)
	request.Header.Set("Content-Type", "application/json")
	response, err := cmp.Or(i.web, http.DefaultClient).Do(request)
	if err != nil {
		return nil, err
	}
	defer response.Body.Close()
	data, err := io.ReadAll(response.Body)
	if err != nil {
		return nil, err
	}
	if err := checkExchange(request, sent, response.StatusCode, response.Header, data); err != nil {
		return nil, err
	}
	if out != nil {
		if response.StatusCode >= 300 {
			return nil, fmt.Errorf("%s: %s", response.Status, data)
		}
		return response, json.Unmarshal(data, out)
	}
	return response, nil
}

// shown is a product as a client reads it.
type shown struct {
	ID         int64
	Version    int64
	Price      json.Number `json:"product_price"`
	Compressed []*string   `json:"compressed_product_images"`
	Images     []struct {
		Source, Status, URL string
		Width, Height       int
		Bytes               int
		SourceBytes         int `json:"source_bytes"`
		Variants            []struct {
			Width int
			URL   string
			Bytes int
		}
		Attempts int
		Error    *errorJSON
	}
}

// post creates a product of user 1 with the given images.
func (i *instance) post(t *testing.T, sources ...string) shown {
	t.Helper()
	var p shown
	i.call(t, "POST", "/products", map[string]any{
		"user_id": 1, "product_name": "Trail shoe", "product_price": "89.90", "product_images": sources}, &p)
	return p
}

func (i *instance) get(t *testing.T, id int64) shown {
	t.Helper()
	var p shown
	i.call(t, "GET", fmt.Sprintf("/products/%d", id), nil, &p)
	return p
}

// settled waits, on the product's event stream, until none of its images is
// pending, and reads it.
func (i *instance) settled(t *testing.T, id int64) shown {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), settleTime)
	defer cancel()
	request, err := http.NewRequestWithContext(ctx, "GET", fmt.Sprintf("%s/products/%d/events", i.url, id), nil)
	if err != nil {
		t.Fatal(err)
	}
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	stream, err := io.ReadAll(response.Body)
	if err != nil || !bytes.Contains(stream, []byte("event: done\n")) {
		t.Fatalf("the events of product %d ended with %v after\n%s", id, err, stream)
	}
	if err := checkExchange(request, nil, response.StatusCode, response.Header, stream); err != nil {
		t.Error(err)
	}
	return i.get(t, id)
}

// eventually waits for what no signal tells.
func eventually(t testing.TB, what string, holds func() bool) {
	t.Helper()
	if !pollUntil(time.Now().Add(settleTime), holds) {
		t.Fatalf("never came true: %s", what)
	}
}

// serverEnv are settings for servers that are the test's own, with user 1.
func serverEnv(t *testing.T) map[string]string {
	t.Helper()
	env := bucketEnv(testS3(t))
	env["DATABASE_URL"], env["REDIS_URL"], env["AMQP_URL"] = testDatabase(t), testRedis(t), testAMQP(t)
	seedUser(t, env)
	return env
}

func bucketEnv(s3 s3Env) map[string]string {
	env := s3.Vars()
	env["S3_BUCKET"] = s3.Bucket
	return env
}

// seedUser adds user 1 as an operator would.
func seedUser(t *testing.T, env map[string]string) {
	t.Helper()
	var out bytes.Buffer
	err := run(t.Context(), []string{"user", "add", "-name", "Ann", "-email", "ann@example.com"}, func(name string) string { return env[name] }, &out, io.Discard)
	if err != nil || out.String() != "1\n" {
		t.Fatalf("user add: %q, %v", out.String(), err)
	}
}

// eachDeployment runs a test on the embedded default, on servers, and with API
// and worker apart.
func eachDeployment(t *testing.T, test func(t *testing.T, api *instance)) {
	t.Run("embedded", func(t *testing.T) {
		t.Parallel()
		test(t, start(t, environment(map[string]string{"DATA_DIR": t.TempDir()})))
	})
	t.Run("servers", func(t *testing.T) {
		t.Parallel()
		test(t, start(t, environment(serverEnv(t))))
	})
	t.Run("apart", func(t *testing.T) {
		t.Parallel()
		env := environment(serverEnv(t))
		start(t, env, "worker")
		test(t, start(t, env, "api"))
	})
}

// The main job: a product is created with photos, they are compressed, stored
// and served, the product is read from the cache, changed, and read again.
func TestProductFromPostToCachedRead(t *testing.T) {
	t.Parallel()
	eachDeployment(t, func(t *testing.T, api *instance) {
		photos := newPhotoServer(t)
		large, small := jpegPhoto(t, 3000, 1500), jpegPhoto(t, 300, 400)
		created := api.post(t, photos.serve("/large", large), photos.serve("/small", small))
		p := api.settled(t, created.ID)
		wantStored(t, p, 0, "image/jpeg", 2048, 1024, len(large))
		wantStored(t, p, 1, "image/jpeg", 300, 400, len(small))
		if p.Version != 3 {
			t.Errorf("version %d after two images", p.Version)
		}

		path := fmt.Sprintf("/products/%d", p.ID)
		var cached shown
		eventually(t, "the product is read from the cache", func() bool { // the workers' word of their last change may still be on its way
			return api.call(t, "GET", path, nil, &cached).Header.Get("Cache-Status") == "pms; hit"
		})
		if fmt.Sprint(deref(cached)) != fmt.Sprint(deref(p)) {
			t.Errorf("read from the cache %+v, before %+v", cached, p)
		}

		patch := map[string]any{"product_price": 79.5, "product_images": []string{photos.URL + "/small", photos.serve("/new", jpegPhoto(t, 100, 100))}}
		var changed shown
		api.call(t, "PATCH", path, patch, &changed)
		if changed.Price != "79.50" || changed.Images[0].URL != p.Images[1].URL || changed.Images[1].Status != "pending" {
			t.Errorf("after the change: %+v", changed)
		}
		if now := api.get(t, p.ID); now.Version < changed.Version {
			t.Errorf("read version %d after version %d was answered", now.Version, changed.Version)
		}
		p2 := api.settled(t, p.ID)
		wantStored(t, p2, 1, "image/jpeg", 100, 100, p2.Images[1].SourceBytes)
		if photos.requests("/small") != 1 {
			t.Errorf("an image that stayed was downloaded %d times", photos.requests("/small"))
		}
		eventually(t, "the replaced image's object is gone", func() bool { return statusOf(p.Images[0].URL) == 404 })

		api.call(t, "DELETE", path, nil, nil)
		if response := api.call(t, "GET", path, nil, nil); response.StatusCode != 404 {
			t.Errorf("a deleted product: %s", response.Status)
		}
		eventually(t, "the deleted product's objects are gone", func() bool {
			return statusOf(p2.Images[0].URL) == 404 && statusOf(p2.Images[1].URL) == 404
		})
	})
}

// deref lets products be compared by what they hold.
func deref(p shown) (out []string) {
	for _, url := range p.Compressed {
		if url != nil {
			out = append(out, *url)
		}
	}
	p.Compressed = nil
	return append(out, fmt.Sprintf("%+v", p))
}

// wantStored fetches a stored image as a browser would and looks at it.
func wantStored(t *testing.T, p shown, n int, contentType string, width, height, sourceBytes int) {
	t.Helper()
	got := p.Images[n]
	if got.Status != "ready" || p.Compressed[n] == nil || *p.Compressed[n] != got.URL || got.Width != width || got.Height != height || got.SourceBytes != sourceBytes {
		t.Fatalf("image %d is %+v, want it ready with %d × %d of %d bytes", n, got, width, height, sourceBytes)
	}
	response, data := download(t, got.URL)
	if ct, cc := response.Header.Get("Content-Type"), response.Header.Get("Cache-Control"); ct != contentType || cc != "public, max-age=31536000, immutable" {
		t.Errorf("Content-Type %q, Cache-Control %q", ct, cc)
	}
	config, format, err := image.DecodeConfig(bytes.NewReader(data))
	if err != nil || config.Width != width || config.Height != height || "image/"+format != contentType {
		t.Errorf("the stored image is %d × %d in %s, %v", config.Width, config.Height, format, err)
	}
	if len(data) != got.Bytes || len(data) > sourceBytes {
		t.Errorf("%d bytes are stored of %d, %d are told", len(data), sourceBytes, got.Bytes)
	}
}

// download gets what a URL has, as a browser without a token would.
func download(t *testing.T, url string) (*http.Response, []byte) {
	t.Helper()
	response, err := http.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	data, err := io.ReadAll(response.Body)
	if err != nil || response.StatusCode != http.StatusOK {
		t.Fatalf("GET %s: %s, %v", url, response.Status, err)
	}
	return response, data
}

func textOf(t *testing.T, url string) string {
	t.Helper()
	_, data := download(t, url)
	return string(data)
}

func statusOf(url string) int {
	response, err := http.Get(url)
	if err != nil {
		return 0
	}
	response.Body.Close()
	return response.StatusCode
}

// Failures that may pass are retried, those that will not are dead at once, and
// a dead letter that was replayed when its cause is mended becomes ready.
func TestImagesThatFail(t *testing.T) {
	t.Parallel()
	eachDeployment(t, func(t *testing.T, api *instance) {
		photos := newPhotoServer(t)
		p := api.post(t,
			photos.serve("/flaky", jpegPhoto(t, 50, 50), 503, 500, 429),
			photos.URL+"/missing",
			photos.serve("/text", []byte("<html>not an image</html>")),
			photos.serve("/down", jpegPhoto(t, 50, 50), slices.Repeat([]int{502}, 6)...))
		p = api.settled(t, p.ID)
		for n, want := range []struct {
			status, code    string
			asked, attempts int
		}{{"ready", "", 4, 3}, {"failed", "http_404", 1, 1}, {"failed", "not_an_image", 1, 1}, {"failed", "http_502", 6, 6}} {
			got := p.Images[n]
			code := ""
			if got.Error != nil {
				code = got.Error.Code
			}
			path := strings.TrimPrefix(got.Source, photos.URL)
			if got.Status != want.status || code != want.code || photos.requests(path) != want.asked || got.Attempts != want.attempts {
				t.Errorf("%s is %s (%s) after %d attempts and %d requests, want %+v", path, got.Status, code, got.Attempts, photos.requests(path), want)
			}
		}
		var letters struct{ Items []deadLetterShown }
		api.call(t, "GET", "/dead-letters", nil, &letters)
		if len(letters.Items) != 3 {
			t.Fatalf("dead letters %+v", letters.Items)
		}
		var down deadLetterShown
		api.call(t, "GET", fmt.Sprintf("/dead-letters/%d", letters.Items[2].ID), nil, &down)
		if down.Position != 3 || len(down.History) != 6 || down.History[5].Error.Code != "http_502" {
			t.Errorf("the history of /down: %+v", down)
		}
		photos.serve("/missing", jpegPhoto(t, 60, 40))
		var replayed replayedJSON
		api.call(t, "POST", "/dead-letters/replay", nil, &replayed)
		if replayed.Replayed != 3 {
			t.Errorf("replayed %d", replayed.Replayed)
		}
		p = api.settled(t, p.ID)
		for n, want := range []string{"ready", "ready", "failed", "ready"} {
			if p.Images[n].Status != want {
				t.Errorf("after the replay image %d is %s, want %s", n, p.Images[n].Status, want)
			}
		}
	})
}

type deadLetterShown struct {
	ID       int64
	Position int
	History  []struct{ Error errorJSON }
}

// A result that comes after its image was replaced changes nothing, and its
// object goes.
func TestResultOvertakenByAChange(t *testing.T) {
	t.Parallel()
	eachDeployment(t, func(t *testing.T, api *instance) {
		photos := newPhotoServer(t)
		release := photos.holdBack("/old")
		defer release()
		p := api.post(t, photos.serve("/old", jpegPhoto(t, 50, 50)))
		eventually(t, "the old image is being downloaded", func() bool { return photos.requests("/old") == 1 })
		patch := map[string]any{"product_images": []string{photos.serve("/new", jpegPhoto(t, 70, 70))}}
		api.call(t, "PATCH", fmt.Sprintf("/products/%d", p.ID), patch, &p)
		p = api.settled(t, p.ID)
		release()
		again := api.post(t, photos.serve("/after", jpegPhoto(t, 30, 30)))
		api.settled(t, again.ID)
		if got := api.get(t, p.ID); len(got.Images) != 1 || got.Images[0].Width != 70 || got.Version != p.Version {
			t.Errorf("the product is now %+v", got)
		}
	})
}

// Another instance's cache learns of a change without being asked.
func TestChangesReachTheOtherInstances(t *testing.T) {
	t.Parallel()
	env := environment(serverEnv(t))
	one, other := start(t, env, "api"), start(t, env, "api")
	p := one.post(t)
	other.get(t, p.ID)
	other.get(t, p.ID)
	for price := range 20 {
		one.call(t, "PATCH", fmt.Sprintf("/products/%d", p.ID), map[string]any{"product_price": price + 1}, &p)
		if got := one.get(t, p.ID); got.Version != p.Version {
			t.Fatalf("an instance read version %d after its own write of %d", got.Version, p.Version)
		}
		eventually(t, "the other instance reads the new version", func() bool { return other.get(t, p.ID).Version == p.Version })
	}
	one.call(t, "DELETE", fmt.Sprintf("/products/%d", p.ID), nil, nil)
	eventually(t, "the other instance knows of the deletion", func() bool {
		return other.call(t, "GET", fmt.Sprintf("/products/%d", p.ID), nil, nil).StatusCode == 404
	})
}

// A rush for a product that is in no cache costs each instance one query.
func TestColdKeyCostsEachInstanceOneQuery(t *testing.T) {
	t.Parallel()
	readers := []int{1000, 100, 100} // an instance
	pg := startPostgres(t)
	env := environment(map[string]string{"DATABASE_URL": pg.URL, "REDIS_URL": testRedis(t), "AMQP_URL": testAMQP(t), "DATA_DIR": t.TempDir()})
	seedUser(t, env)
	apis := []*instance{startBinary(t, env, "api"), startBinary(t, env, "api"), startBinary(t, env, "api")}
	request := fmt.Sprintf("GET /products/%d HTTP/1.1\r\nHost: shop\r\n\r\n", apis[0].post(t).ID)
	var rush []*halfRequest // connections that are open, so that a thousand can ask within milliseconds
	for n, api := range apis {
		for range readers[n] {
			rush = append(rush, beginRequest(t, api, "", request))
		}
	}
	pg.Freeze(t) // so that all come before the first has its answer
	for _, reader := range rush {
		reader.send(t)
	}
	for n, api := range apis {
		eventually(t, "all readers wait", func() bool { return api.metric(t, "pms_cache_misses_total") == float64(readers[n]) })
	}
	pg.Thaw(t)
	for _, reader := range rush {
		if status, body := reader.finish(t); status != http.StatusOK {
			t.Errorf("answered %d: %s", status, body)
		}
	}
	for n, api := range apis {
		loads, failures := api.metric(t, "pms_cache_loads_total"), api.metric(t, "pms_cache_errors_total")
		// A Redis that a busy machine has no time for keeps nothing for the last of them.
		if loads != 1 && failures == 0 || loads > 3 {
			t.Errorf("instance %d made %v queries for %d readers, and Redis failed %v times", n, loads, readers[n], failures)
		}
	}
}

// What the README has a newcomer type after `go run .` works as it says there.
func TestReadmeTryIt(t *testing.T) {
	t.Parallel()
	readme := readFile(t, "README.md")
	_, lines, found := strings.Cut(string(readme), "In another terminal")
	_, lines, _ = strings.Cut(lines, "```sh\n")
	lines, _, closed := strings.Cut(lines, "\n```")
	if !found || !closed {
		t.Fatal("the lines to try are not where they were")
	}
	photos := newPhotoServer(t)
	photos.serve("/images/gophers/ladder.svg", []byte("<svg/>"))
	photos.serve("/doc/gopher/fiveyears.jpg", jpegPhoto(t, 40, 30))
	shop := startBinary(t, environment(map[string]string{"DATA_DIR": t.TempDir()}))
	script := strings.NewReplacer("https://go.dev", photos.URL, "http://127.0.0.1:8080", shop.url).Replace(lines)
	shell := exec.Command("sh", "-c", "set -e; curl() { command curl -sS --fail-with-body \"$@\"; echo; }\n"+script)
	out, err := shell.CombinedOutput()
	if err != nil {
		t.Fatalf("%v in:\n%s\n%s", err, script, out)
	}
	rest := string(out)
	for _, want := range []string{
		"HTTP/1.1 201", `"status":"failed"`, "HTTP/1.1 200", "/media/products/1/", "HTTP/1.1 304",
		`"Trail shoe"`, "HTTP/1.1 200", `"product_price":79.50`, `"not_an_image"`, `{"replayed":1}`, "HTTP/1.1 204",
	} {
		if _, rest, found = strings.Cut(rest, want); !found {
			t.Fatalf("%s is not where it should be in:\n%s", want, out)
		}
	}
}

// metric reads one of the instance's metrics.
func (i *instance) metric(t *testing.T, name string) float64 {
	t.Helper()
	_, after, found := strings.Cut("\n"+textOf(t, i.url+"/metrics"), "\n"+name+" ")
	value, err := strconv.ParseFloat(strings.Fields(after + " ?")[0], 64)
	if !found || err != nil {
		t.Fatalf("no metric %s: %v", name, err)
	}
	return value
}

// A second program on the files of the embedded default would serve what the
// first has changed, so it is refused; operators' commands are not.
func TestEmbeddedDefaultServesOnce(t *testing.T) {
	t.Parallel()
	env := environment(map[string]string{"DATA_DIR": t.TempDir()})
	first := startBinary(t, env)
	second := launchProgram(t, programPath(t), env)
	eventually(t, "the second is refused", func() bool { return strings.Contains(second.log.tail(3), env["DATA_DIR"]+": another") })
	if err := second.wait(); err == nil {
		t.Error("the second ended well")
	}
	var out bytes.Buffer
	if err := run(t.Context(), []string{"dead", "list"}, func(name string) string { return env[name] }, &out, &out); err != nil {
		t.Error(err)
	}
	first.kill()
	startBinary(t, env)
}

// The embedded default keeps what it accepted when it is killed.
func TestEmbeddedDefaultSurvivesKill(t *testing.T) {
	t.Parallel()
	photos := newPhotoServer(t)
	env := environment(map[string]string{"DATA_DIR": t.TempDir()})
	first := startBinary(t, env)
	ready := first.settled(t, first.post(t, photos.serve("/a", jpegPhoto(t, 80, 80))).ID)
	release := photos.holdBack("/held")
	defer release()
	photos.serve("/held", jpegPhoto(t, 90, 90))
	var pending []int64
	for range 20 {
		pending = append(pending, first.post(t, photos.URL+"/held").ID)
	}
	eventually(t, "images are in work", func() bool { return photos.requests("/held") > 0 })
	first.kill()
	release()
	second := startBinary(t, env)
	for _, id := range pending {
		if got := second.settled(t, id); got.Images[0].Status != "ready" {
			t.Errorf("product %d, accepted before the kill: %+v", id, got.Images[0])
		}
	}
	if got := second.get(t, ready.ID); got.Images[0].Status != "ready" || statusOf(strings.Replace(got.Images[0].URL, first.url, second.url, 1)) != 200 {
		t.Errorf("product %d, ready before the kill: %+v", ready.ID, got.Images[0])
	}
	if err := second.stop(); err != nil {
		t.Errorf("SIGTERM: %v", err)
	}
}

// A worker that is killed loses nothing: the broker hands its images to another.
func TestWorkerIsKilled(t *testing.T) {
	t.Parallel()
	env := environment(serverEnv(t))
	photos := newPhotoServer(t)
	release := photos.holdBack("/held")
	defer release()
	api := start(t, env, "api")
	worker := startBinary(t, env, "worker")
	p := api.post(t, photos.serve("/held", jpegPhoto(t, 90, 90)), photos.serve("/free", jpegPhoto(t, 80, 80)))
	eventually(t, "an image is in work", func() bool { return photos.requests("/held") == 1 })
	worker.kill()
	release()
	startBinary(t, env, "worker")
	for n, image := range api.settled(t, p.ID).Images {
		if image.Status != "ready" || image.Attempts != 0 {
			t.Errorf("image %d: %+v", n, image)
		}
	}
}

// SIGTERM: requests and images in hand are finished, and the exit is clean.
func TestStopFinishesWhatIsInHand(t *testing.T) {
	t.Parallel()
	photos := newPhotoServer(t)
	release := photos.holdBack("/held")
	defer release()
	env := environment(map[string]string{"DATA_DIR": t.TempDir()})
	first := start(t, env)
	p := first.post(t, photos.serve("/held", jpegPhoto(t, 90, 90)))
	eventually(t, "the image is in work", func() bool { return photos.requests("/held") == 1 })
	stopped := make(chan error, 1)
	go func() { stopped <- first.stop() }()
	first.log.await(t, `"msg":"stopping"`)
	release()
	if err := <-stopped; err != nil {
		t.Errorf("stopped with: %v", err)
	}
	first.log.await(t, `"msg":"image ready"`, fmt.Sprintf(`"product_id":%d`, p.ID))
	second := start(t, env)
	if got := second.get(t, p.ID); got.Images[0].Status != "ready" {
		t.Errorf("after the restart: %+v", got.Images[0])
	}
}

// Without the servers that it needs for speed and for work, the API accepts and
// answers all the same; it says so at /readyz, and goes on by itself.
func TestServersAwayAndBack(t *testing.T) {
	t.Parallel()
	rabbit, redis, s3 := startRabbitMQ(t), startRedis(t), startS3(t)
	env := environment(bucketEnv(s3.newBucket(t)), map[string]string{
		"DATABASE_URL": testDatabase(t), "REDIS_URL": redis.URL, "AMQP_URL": rabbit.URL})
	seedUser(t, env)
	rabbit.Kill(t)
	redis.Kill(t)
	s3.Kill(t)
	photos := newPhotoServer(t)
	api := start(t, env)
	p := api.post(t, photos.serve("/a", jpegPhoto(t, 80, 80)))
	if got := api.get(t, p.ID); got.Images[0].Status != "pending" {
		t.Errorf("read with everything away: %+v", got)
	}
	var ready struct {
		Status string
		Parts  map[string]string
	}
	api.call(t, "GET", "/readyz", nil, &ready)
	want := map[string]string{"store": "ok", "queue": "unavailable", "cache": "unavailable", "blobs": "unavailable"}
	if ready.Status != "degraded" || !maps.Equal(ready.Parts, want) {
		t.Errorf("readyz: %+v", ready)
	}
	rabbit.Start(t)
	redis.Start(t)
	eventually(t, "the image waits for S3 alone", func() bool { return photos.requests("/a") == 1 })
	s3.Start(t)
	if got := api.settled(t, p.ID); got.Images[0].Status != "ready" || got.Images[0].Attempts != 0 {
		t.Errorf("with everything back: %+v", got.Images[0])
	}
	eventually(t, "readyz says ready", func() bool {
		api.call(t, "GET", "/readyz", nil, &ready)
		return ready.Status == "ready"
	})
}

// PostgreSQL killed: 503 with Retry-After, and recovery without a restart.
func TestDatabaseKilledAndBack(t *testing.T) {
	t.Parallel()
	pg := startPostgres(t)
	env := environment(map[string]string{"DATABASE_URL": pg.URL, "DATA_DIR": t.TempDir()})
	seedUser(t, env)
	photos := newPhotoServer(t)
	api := start(t, env)
	release := photos.holdBack("/a")
	defer release()
	p := api.post(t, photos.serve("/a", jpegPhoto(t, 80, 80)))
	eventually(t, "the image is in work", func() bool { return photos.requests("/a") == 1 })
	pg.Kill(t)
	release()
	response, err := api.send("GET", fmt.Sprintf("/products/%d", p.ID), nil, nil)
	if err != nil || response.StatusCode != 503 || response.Header.Get("Retry-After") == "" {
		t.Errorf("read with the database away: %v, %v", response, err)
	}
	if response := api.call(t, "GET", "/readyz", nil, nil); response.StatusCode != 503 {
		t.Errorf("readyz: %s", response.Status)
	}
	pg.Start(t)
	eventually(t, "products are read again", func() bool {
		response, err := api.send("GET", fmt.Sprintf("/products/%d", p.ID), nil, nil)
		return err == nil && response.StatusCode == 200
	})
	if got := api.settled(t, p.ID); got.Images[0].Status != "ready" || got.Images[0].Attempts != 0 {
		t.Errorf("after the outage: %+v", got.Images[0])
	}
}

// A database that is away when the program starts is waited for.
func TestDatabaseAwayAtStart(t *testing.T) {
	t.Parallel()
	pg := startPostgres(t)
	pg.Kill(t)
	env := environment(map[string]string{"DATABASE_URL": pg.URL, "DATA_DIR": t.TempDir()})
	api := start(t, env)
	if response := api.call(t, "GET", "/readyz", nil, nil); response.StatusCode != 503 {
		t.Errorf("readyz: %s", response.Status)
	}
	pg.Start(t)
	eventually(t, "the program is ready", func() bool { return api.call(t, "GET", "/readyz", nil, nil).StatusCode == 200 })
	seedUser(t, env)
	api.post(t)
}

// A photo of 20 megapixels is compressed within 150 MB on top of the program
// at rest.
func TestMemoryOfALargePhoto(t *testing.T) {
	t.Parallel()
	if _, err := os.Stat("/proc/self/status"); err != nil {
		t.Skip("needs /proc")
	}
	photos := newPhotoServer(t)
	photos.serve("/large", tallJPEG(t, encodedJPEG(t, photo(5472, 16), 95), 3648/16))
	api := startBinary(t, environment(map[string]string{"DATA_DIR": t.TempDir()}))
	api.settled(t, api.post(t, photos.serve("/small", jpegPhoto(t, 50, 50))).ID)
	idle := peakMemory(t, api.pid)
	p := api.settled(t, api.post(t, photos.URL+"/large").ID)
	if p.Images[0].Status != "ready" || p.Images[0].Width != 2048 {
		t.Fatalf("the large photo: %+v", p.Images[0])
	}
	if grown := peakMemory(t, api.pid) - idle; grown > 150<<20 {
		t.Errorf("the peak is %d MB above that of the program at rest", grown>>20)
	} else {
		t.Logf("the peak is %d MB above that of the program at rest, %d MB", grown>>20, idle>>20)
	}
}

// Real photographs, of up to 20 megapixels, baseline and progressive.
func TestRealPhotographs(t *testing.T) {
	t.Parallel()
	files, err := filepath.Glob(".cache/photos/*.jpg")
	if err != nil || len(files) == 0 {
		t.Skip("needs photographs: scripts/fetch-test-photos.sh")
	}
	photos := newPhotoServer(t)
	api := startBinary(t, environment(map[string]string{"DATA_DIR": t.TempDir()}))
	var sources []string
	var sizes []image.Config
	var lengths []int
	for _, file := range files[:min(len(files), maxImages)] {
		data := readFile(t, file)
		config, _, err := image.DecodeConfig(bytes.NewReader(data))
		if err != nil {
			t.Fatal(err)
		}
		sources, sizes, lengths = append(sources, photos.serve("/"+filepath.Base(file), data)), append(sizes, config), append(lengths, len(data))
	}
	p := api.settled(t, api.post(t, sources...).ID)
	for n := range sources {
		width, height := fitInto(sizes[n].Width, sizes[n].Height, 2048)
		wantStored(t, p, n, "image/jpeg", width, height, lengths[n])
	}
}

// peakMemory is the most memory that a process has had resident so far.
func peakMemory(t *testing.T, pid int) int64 { t.Helper(); return memoryOf(t, pid, "VmHWM:") }

// memoryOf is a field of /proc/PID/status (proc(5)), in bytes.
func memoryOf(t *testing.T, pid int, field string) int64 {
	t.Helper()
	status := readFile(t, fmt.Sprintf("/proc/%d/status", pid))
	_, after, _ := strings.Cut(string(status), field)
	kib, err := strconv.ParseInt(strings.Fields(after)[0], 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	return kib << 10
}

func TestCommandLine(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		args []string
		env  map[string]string
		code int
		says []string
	}{
		"help":                  {[]string{"help"}, nil, 0, []string{"token create", "IMAGE_MAX_SIDE", "2048"}},
		"-h":                    {[]string{"-h"}, nil, 0, []string{"Commands:"}},
		"help of a command":     {[]string{"worker", "-h"}, nil, 0, []string{"Commands:"}},
		"help of user":          {[]string{"user", "-h"}, nil, 0, []string{"user add"}},
		"help of dead show":     {[]string{"dead", "show", "-h"}, nil, 0, []string{"Commands:"}},
		"help behind words":     {[]string{"dead", "show", "41", "-h"}, nil, 0, []string{"Commands:"}},
		"help of a value":       {[]string{"user", "add", "-name", "--h"}, nil, 0, []string{"Commands:"}},
		"help despite settings": {[]string{"serve", "-h"}, map[string]string{"IMAGE_QUALITY": "0"}, 0, []string{"Commands:"}},
		"unknown command":       {[]string{"fly"}, nil, 2, []string{`unknown command "fly"`}},
		"half a command":        {[]string{"user"}, nil, 2, []string{`unknown command "user"`}},
		"unknown flag":          {[]string{"serve", "-x"}, nil, 2, []string{"-x"}},
		"stray argument":        {[]string{"serve", "now"}, nil, 2, []string{`"now"`}},
		"user without email":    {[]string{"user", "add", "-name", "x"}, nil, 2, []string{"-email"}},
		"token without user":    {[]string{"token", "create"}, nil, 2, []string{"-user"}},
		"dead on no database":   {[]string{"dead", "list"}, nil, 2, []string{"DATABASE_URL"}},
		"dead without id":       {[]string{"dead", "show"}, nil, 2, []string{"id"}},
		"dead with a bad id":    {[]string{"dead", "discard", "x"}, nil, 2, []string{`"x"`}},
		"user with a bad email": {[]string{"user", "add", "-name", "x", "-email", "Ann <ann@example.com>"}, nil, 2, []string{"-email"}},
		"api on its own":        {[]string{"api"}, nil, 2, []string{"DATABASE_URL", "AMQP_URL"}},
		"worker without broker": {[]string{"worker"}, map[string]string{"DATABASE_URL": "postgres://localhost/x"}, 2, []string{"AMQP_URL"}},
		"all bad settings at once": {nil, map[string]string{"LISTEN_ADDR": "x", "DATABASE_URL": "mysql://x", "REDIS_URL": "x", "AMQP_URL": "http://x", "CACHE_TTL": "0s", "CACHE_SIZE": "1KiB", "AUTH": "maybe",
			"IMAGE_WORKERS": "0", "IMAGE_VARIANTS": "0", "IMAGE_MEMORY": "2MiB", "IMAGE_MAX_BYTES": "x", "IMAGE_MAX_PIXELS": "-1", "IMAGE_MAX_SIDE": "0", "IMAGE_QUALITY": "101", "IMAGE_TIMEOUT": "5", "IMAGE_ALLOW_PRIVATE": "yes",
			"RETRY_ATTEMPTS": "0", "RETRY_BASE": "-1s", "LOG_LEVEL": "loud", "LOG_FORMAT": "xml", "PUBLIC_URL": "x", "S3_PUBLIC_URL": "x"}, 2,
			[]string{"LISTEN_ADDR", "IMAGE_VARIANTS", "DATABASE_URL", "REDIS_URL", "AMQP_URL", "CACHE_TTL", "CACHE_SIZE", "AUTH", "IMAGE_WORKERS", "IMAGE_MEMORY", "IMAGE_MAX_BYTES", "IMAGE_MAX_PIXELS", "IMAGE_MAX_SIDE",
				"IMAGE_QUALITY", "IMAGE_TIMEOUT", "IMAGE_ALLOW_PRIVATE", "RETRY_ATTEMPTS", "RETRY_BASE", "LOG_LEVEL", "LOG_FORMAT", "PUBLIC_URL", "S3_PUBLIC_URL", "S3_BUCKET"}},
		"settings that only their library knows to be bad": {nil, map[string]string{"DATABASE_URL": "postgres://h/d?pool_max_conns=x", "REDIS_URL": "redis://h/zero", "AMQP_URL": "amqp://h?heartbeat=x",
			"S3_BUCKET": "Two words", "S3_PUBLIC_URL": "https://h/?a=b", "PUBLIC_URL": "http://h/#f"}, 2, []string{"DATABASE_URL", "REDIS_URL", "AMQP_URL", "S3_BUCKET", "S3_PUBLIC_URL", "PUBLIC_URL"}},
		"settings that their library takes for this machine's": {nil, map[string]string{"DATABASE_URL": "postgre://u:p@db/pms?sslmode=disable", "REDIS_URL": "redis:6379", "AMQP_URL": "amqp:5672"}, 2,
			[]string{"DATABASE_URL", "REDIS_URL", "AMQP_URL"}},
		"an address of nobody":      {nil, map[string]string{"LISTEN_ADDR": "192.0.2.1:0", "AUTH": "off"}, 1, []string{"LISTEN_ADDR"}},
		"Redis without RESP3":       {nil, map[string]string{"REDIS_URL": "redis://h/?protocol=2"}, 2, []string{"REDIS_URL"}},
		"a bad endpoint":            {nil, map[string]string{"S3_BUCKET": "photos", "AWS_ENDPOINT_URL_S3": "127.0.0.1:9000"}, 2, []string{"AWS_ENDPOINT_URL_S3"}},
		"a bucket without a region": {nil, map[string]string{"S3_BUCKET": "photos", "AWS_CONFIG_FILE": os.DevNull}, 2, []string{"AWS_REGION"}},
		"a secret in a bad setting": {nil, map[string]string{"AMQP_URL": "ampq://u:hunter2@h"}, 2, []string{"AMQP_URL"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var out bytes.Buffer
			env := environment(map[string]string{"DATA_DIR": t.TempDir()}, c.env)
			code := exitCode(run(t.Context(), c.args, func(name string) string { return env[name] }, &out, &out), &out)
			if code != c.code {
				t.Errorf("exit code %d, want %d: %s", code, c.code, out.String())
			}
			for _, part := range c.says {
				if !strings.Contains(out.String(), part) {
					t.Errorf("%q is not in %s", part, out.String())
				}
			}
			if c.code != 0 && strings.Contains(out.String(), "Commands:") {
				t.Errorf("the manual hides the mistake: %s", out.String())
			}
			if strings.Contains(out.String(), "hunter2") {
				t.Errorf("a secret was printed: %s", out.String())
			}
		})
	}
}

func TestRedisURLMayEndInASlash(t *testing.T) {
	t.Parallel()
	env := map[string]string{"REDIS_URL": "redis://cache.example/"}
	if c, err := loadConfig(func(name string) string { return env[name] }, false); err != nil || c.RedisURL != "redis://cache.example" {
		t.Errorf("it is taken as %q, %v", c.RedisURL, err)
	}
}

func TestExampleSettingsAreComplete(t *testing.T) {
	t.Parallel()
	data := readFile(t, ".env.example")
	for _, s := range new(config).settings() {
		if !strings.Contains(string(data), "#"+s.name+"=") {
			t.Errorf(".env.example does not have %s", s.name)
		}
	}
}

func TestDotEnv(t *testing.T) {
	t.Parallel()
	values, err := readDotEnv(strings.NewReader("\ufeff# a comment\n\nA=1\nexport B = \"two words\" \nC='x=y'\nD=\n"))
	if err != nil || !maps.Equal(values, map[string]string{"A": "1", "B": "two words", "C": "x=y", "D": ""}) {
		t.Errorf("read %q, %v", values, err)
	}
	if _, err := readDotEnv(strings.NewReader("A=1\nnonsense\n")); err == nil || !strings.Contains(err.Error(), "line 2") {
		t.Errorf("a line without =: %v", err)
	}
}

func TestAuthenticationIsOffOnLoopbackOnly(t *testing.T) {
	t.Parallel()
	for addr, want := range map[string]bool{
		"127.0.0.1:80": false, "127.9.9.9:80": false, "[::1]:80": false, "localhost:80": false,
		":80": true, "0.0.0.0:80": true, "[::]:80": true, "192.168.1.1:80": true, "shop.example:80": true,
	} {
		env := map[string]string{"LISTEN_ADDR": addr}
		if c, err := loadConfig(func(name string) string { return env[name] }, false); err != nil || c.Auth != want {
			t.Errorf("on %s authentication is %t, %v", addr, c.Auth, err)
		}
		env["AUTH"] = "off"
		if c, _ := loadConfig(func(name string) string { return env[name] }, false); c.Auth {
			t.Errorf("on %s it cannot be switched off", addr)
		}
	}
}

// Clients cannot load an image from "all addresses".
func TestStartSaysThatClientsReachNoImage(t *testing.T) {
	t.Parallel()
	warned := func(addr, publicURL string) bool {
		var log bytes.Buffer
		a := &app{program: &program{log: slog.New(slog.NewTextHandler(&log, nil))}, name: "serve", media: new(fileBlobs), listener: addressOnly(addr)}
		a.PublicURL = publicURL
		a.logStart()
		return strings.Contains(log.String(), "PUBLIC_URL is not set")
	}
	for addr, want := range map[string]bool{"[::]:8080": true, "0.0.0.0:8080": true, "127.0.0.1:8080": false, "192.0.2.1:8080": false} {
		if got := warned(addr, ""); got != want {
			t.Errorf("%s: warned %t, want %t", addr, got, want)
		}
		if warned(addr, "https://shop.example") {
			t.Errorf("%s: warned though PUBLIC_URL is set", addr)
		}
	}
}

// addressOnly is a listener that has an address and no connections.
type addressOnly string

func (l addressOnly) Accept() (net.Conn, error) { return nil, net.ErrClosed }
func (l addressOnly) Close() error              { return nil }
func (l addressOnly) Addr() net.Addr {
	return net.TCPAddrFromAddrPort(netip.MustParseAddrPort(string(l)))
}
