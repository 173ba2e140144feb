package main

import (
	"context"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"net/url"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// chaosWorld is everything that runs: each server behind a proxy, two APIs and
// two workers, the hosts of the images, and the auditor, whom nothing hurts.
type chaosWorld struct {
	servers  map[string]*testServer
	proxies  map[string]*tcpProxy
	programs []*chaosProgram
	hosts    []*chaosHost
	calm     *chaosHost // serves the saboteur's own images, and always does
	accepted *acceptanceLog
	auditor  *auditor

	random    *rand.Rand
	deck      []chaosFault // not struck yet in this round
	struck    int
	recovered map[string][]time.Duration // by kind of fault
}

// chaosProgram is an API or a worker that can be started anew.
type chaosProgram struct {
	*instance
	name string
	env  map[string]string
}

func (p *chaosProgram) start(t *testing.T) {
	t.Helper()
	p.instance = startBinary(t, p.env, p.name)
}

func newChaosWorld(t *testing.T, seed uint64) *chaosWorld {
	t.Helper()
	w := &chaosWorld{
		servers:   map[string]*testServer{"rabbitmq": startRabbitMQ(t), "postgres": startPostgres(t), "redis": startRedis(t), "s3": startS3(t)},
		proxies:   make(map[string]*tcpProxy),
		accepted:  newAcceptanceLog(t),
		random:    rand.New(rand.NewPCG(seed, 0)),
		recovered: make(map[string][]time.Duration),
	}
	for name, server := range w.servers {
		w.proxies[name] = startProxy(t, server.addr())
	}
	photos := chaosPhotos(t)
	for range 3 {
		w.hosts = append(w.hosts, newChaosHost(t, photos))
	}
	w.calm = newChaosHost(t, photos[:1])
	bucket := w.servers["s3"].newBucket(t)
	seedUser(t, map[string]string{"DATABASE_URL": w.servers["postgres"].URL})
	w.auditor = newAuditor(t, w.accepted, w.servers["postgres"].URL, w.servers["rabbitmq"].URL, bucket)
	w.startPrograms(t, bucket)
	return w
}

// startPrograms starts the APIs and the workers, with the proxies for servers. A
// good image is asked for so often that no fault makes it a dead letter. Each is
// connected before the next starts, since two that both find no queue both fill it.
func (w *chaosWorld) startPrograms(t *testing.T, bucket s3Env) {
	t.Helper()
	bucket.Endpoint = w.through(t, "s3")
	env := environment(bucketEnv(bucket), map[string]string{
		"DATABASE_URL": w.through(t, "postgres"), "REDIS_URL": w.through(t, "redis"), "AMQP_URL": w.through(t, "rabbitmq"),
		"IMAGE_WORKERS": "1", "IMAGE_TIMEOUT": "3s", "RETRY_ATTEMPTS": "10", "RETRY_BASE": "20ms", "LOG_LEVEL": "info"})
	for _, name := range []string{"api", "api", "worker", "worker"} {
		p := &chaosProgram{name: name, env: environment(env, map[string]string{"LISTEN_ADDR": freeAddr(t), "LOG_LEVEL": "info"})}
		p.start(t)
		p.log.await(t, `"msg":"queue is connected"`)
		w.programs = append(w.programs, p)
	}
}

// through is a server's URL by way of its proxy.
func (w *chaosWorld) through(t *testing.T, name string) string {
	t.Helper()
	u, err := url.Parse(w.servers[name].URL)
	if err != nil {
		t.Fatal(err)
	}
	u.Host = w.proxies[name].Addr
	return u.String()
}

// chaosFault is something that may happen.
type chaosFault struct {
	kind   string
	victim any           // of two faults at once, each has its own
	least  time.Duration // how long it lasts at least; at most three times that and a second
	strike func(t *testing.T) (heal func())
}

// hangTime is how long a thing hangs at least. The program's own timeouts are
// from 50 ms (Redis) to 10 s (RabbitMQ), so some pass and some do not.
const hangTime = 2 * time.Second

// chaosFaults are all that there are, always in the same order.
func (w *chaosWorld) chaosFaults() (faults []chaosFault) {
	for _, name := range slices.Sorted(maps.Keys(w.servers)) {
		faults = append(faults, serverFaults(name, w.servers[name])...)
		faults = append(faults, lineFaults(name, w.proxies[name])...)
	}
	for _, p := range w.programs {
		faults = append(faults, programFaults(p)...)
	}
	for _, mode := range slices.Sorted(maps.Keys(hostModes)) {
		faults = append(faults, chaosFault{"image hosts: " + mode, "hosts", hangTime, func(*testing.T) func() {
			w.setHosts(mode)
			return func() { w.setHosts("") }
		}})
	}
	return append(faults, brokerFaults(w.servers["rabbitmq"])...)
}

func serverFaults(name string, server *testServer) []chaosFault {
	return []chaosFault{
		{"kill " + name, name, 0, func(t *testing.T) func() { server.Kill(t); return func() { server.Start(t) } }},
		{"freeze " + name, name, hangTime, func(t *testing.T) func() { server.Freeze(t); return func() { server.Thaw(t) } }},
	}
}

func lineFaults(name string, proxy *tcpProxy) []chaosFault {
	return []chaosFault{
		{"cut line to " + name, name, hangTime / 2, func(t *testing.T) func() { proxy.Cut(); return func() { proxy.Restore(t) } }},
		{"stall line to " + name, name, hangTime, func(t *testing.T) func() { proxy.Stall(); return func() { proxy.Restore(t) } }},
		{"reset lines to " + name, name, 0, func(t *testing.T) func() { proxy.Reset(); return func() {} }},
	}
}

func programFaults(p *chaosProgram) []chaosFault {
	return []chaosFault{
		{"kill " + p.name, p, 0, func(t *testing.T) func() { p.kill(); return func() { p.start(t) } }},
		{"freeze " + p.name, p, hangTime, func(*testing.T) func() {
			signalPID(p.pid, sigFreeze)
			return func() { signalPID(p.pid, sigThaw) }
		}},
	}
}

// brokerFaults are those that only a broker can have.
func brokerFaults(rabbit *testServer) []chaosFault {
	return []chaosFault{
		{"delete both queues", "rabbitmq", 0, func(t *testing.T) func() { deleteQueues(t, rabbit.URL); return func() {} }},
		{"wipe rabbitmq", "rabbitmq", 0, func(t *testing.T) func() {
			rabbit.Kill(t)
			rabbit.Wipe(t)
			return func() { rabbit.Start(t) }
		}},
		{"memory alarm of rabbitmq", "rabbitmq", hangTime, func(t *testing.T) func() {
			rabbitctl(t, rabbit, "set_vm_memory_high_watermark", "absolute", "1MB")
			return func() { rabbitctl(t, rabbit, "set_vm_memory_high_watermark", "absolute", "512MB") }
		}},
	}
}

func (w *chaosWorld) setHosts(mode string) {
	for _, h := range w.hosts {
		h.setMode(mode)
	}
}

// draw takes the next fault that hurts none of these. Each comes once before any
// comes again.
func (w *chaosWorld) draw(hurt ...any) (chaosFault, bool) {
	if len(w.deck) == 0 {
		w.deck = w.chaosFaults()
		w.random.Shuffle(len(w.deck), func(i, j int) { w.deck[i], w.deck[j] = w.deck[j], w.deck[i] })
	}
	for n, fault := range w.deck {
		if !slices.Contains(hurt, fault.victim) {
			w.deck = slices.Delete(w.deck, n, n+1)
			return fault, true
		}
	}
	return chaosFault{}, false
}

// sabotage strikes one fault, or two at once, heals them, and waits until the
// service works again.
func (w *chaosWorld) sabotage(t *testing.T, clients *chaosClients) {
	t.Helper()
	first, _ := w.draw()
	faults := []chaosFault{first}
	if w.random.IntN(3) == 0 {
		if second, ok := w.draw(first.victim); ok {
			faults = append(faults, second)
		}
	}
	var heal []func()
	var lasts time.Duration
	for _, fault := range faults {
		w.struck++
		t.Logf("fault %d: %s", w.struck, fault.kind)
		heal = append(heal, fault.strike(t))
		lasts = max(lasts, fault.least+time.Duration(w.random.Int64N(int64(2*fault.least+time.Second))))
	}
	<-time.After(lasts) // that is what the fault consists of
	for _, mend := range heal {
		mend()
	}
	took := w.recover(t, clients)
	for _, fault := range faults {
		w.recovered[fault.kind] = append(w.recovered[fault.kind], took)
	}
}

// recover posts a product of its own and answers how long that took from the
// first try until its image was ready.
func (w *chaosWorld) recover(t *testing.T, clients *chaosClients) time.Duration {
	t.Helper()
	start := time.Now()
	ctx, cancel := context.WithTimeout(t.Context(), recoveryPatience)
	defer cancel()
	source := w.calm.source("photo", clients.serial.Add(1))
	id, err := clients.create(ctx, []expectedImage{{source, imageEnds["photo"]}})
	if err != nil {
		t.Fatalf("no product is accepted %v after the fault: %v", time.Since(start), err)
	}
	ready := fmt.Sprintf("product_id = %d AND status = 'ready'", id)
	if !pollUntil(start.Add(recoveryPatience), func() bool { n, err := w.auditor.count(ctx, ready); return err == nil && n == 1 }) {
		t.Fatalf("no image is ready %v after the fault", time.Since(start))
	}
	return time.Since(start)
}

// collect has the janitors look now, as a deletion does.
func (w *chaosWorld) collect() {
	for _, p := range w.programs {
		if p.url == "" {
			continue
		}
		var made shown
		if _, err := p.send("POST", "/products", map[string]any{"user_id": 1, "product_name": "x", "product_price": 1, "product_images": []string{}}, &made); err == nil {
			p.send("DELETE", fmt.Sprintf("/products/%d", made.ID), nil, nil) // else the next round does
		}
	}
}

// imageEnds says for each kind of source how its image must end.
var imageEnds = map[string][]string{
	"photo":     {"ready"},
	"flaky":     {"ready"},
	"missing":   {"http_404"},
	"forbidden": {"http_403"},
	"text":      {"not_an_image"},
	"elsewhere": {"bad_redirect"},
	// Answered with 503 each time, unless a fault kept the last answer from coming.
	"down": {"http_503", "timeout", "connection_reset", "truncated"},
}

// badImages are the kinds that can never be ready.
var badImages = []string{"missing", "forbidden", "text", "elsewhere", "down"}

// hostModes are what an image host does in its bad moments.
var hostModes = map[string]http.HandlerFunc{
	"503": func(w http.ResponseWriter, _ *http.Request) {
		http.Error(w, "overloaded", http.StatusServiceUnavailable)
	},
	"stall": func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() },
	"truncate": func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Length", "100000")
		w.Write(make([]byte, 1000))
	},
}

// mostTroubles is how often one source may suffer from its host, which is well
// below RETRY_ATTEMPTS: what is good in the end must not be dead before.
const mostTroubles = 3

// slowAnswer is how long what is slow takes.
const slowAnswer = 100 * time.Millisecond

// chaosHost serves /kind/n for each kind of imageEnds, and of a soak.
type chaosHost struct {
	*httptest.Server
	photos  [][]byte
	changes atomic.Int64 // what is "changing" is another photo each time

	mu       sync.Mutex
	mode     string         // a key of hostModes, or "" when it is well
	troubles map[string]int // by path
}

func newChaosHost(t *testing.T, photos [][]byte) *chaosHost {
	h := &chaosHost{photos: photos, troubles: make(map[string]int)}
	h.Server = httptest.NewServer(h)
	t.Cleanup(func() { h.CloseClientConnections(); h.Close() })
	return h
}

func (h *chaosHost) setMode(mode string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.mode = mode
}

func (h *chaosHost) source(kind string, n int64) string {
	return fmt.Sprintf("%s/%s/%d", h.URL, kind, n)
}

func (h *chaosHost) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	var n int
	kind, number, _ := strings.Cut(strings.TrimPrefix(r.URL.Path, "/"), "/")
	fmt.Sscan(number, &n)
	if mode := h.trouble(kind, r.URL.Path); mode != "" {
		hostModes[mode](w, r)
		return
	}
	switch kind {
	case "slow":
		<-time.After(slowAnswer)
		w.Write(h.photos[n%len(h.photos)])
	case "changing":
		w.Write(h.photos[int(h.changes.Add(1))%len(h.photos)])
	case "photo", "flaky":
		w.Write(h.photos[n%len(h.photos)])
	case "broken":
		photo := h.photos[n%len(h.photos)]
		w.Write(photo[:len(photo)/2])
	case "text":
		fmt.Fprint(w, "<html>not an image</html>")
	case "elsewhere":
		w.Header().Set("Location", "ftp://127.0.0.1/photo.jpg")
		w.WriteHeader(http.StatusFound)
	case "forbidden":
		http.Error(w, "no", http.StatusForbidden)
	case "down":
		http.Error(w, "down", http.StatusServiceUnavailable)
	default:
		http.NotFound(w, r)
	}
}

// trouble says what is to go wrong with a request: the host's mode, or twice for
// what is flaky.
func (h *chaosHost) trouble(kind, path string) string {
	h.mu.Lock()
	defer h.mu.Unlock()
	mode := h.mode
	if mode == "" && kind == "flaky" && h.troubles[path] < 2 {
		mode = "503"
	}
	if kind != "photo" && kind != "flaky" || mode == "" || h.troubles[path] == mostTroubles {
		return ""
	}
	h.troubles[path]++
	return mode
}

// chaosPhotos are small, for it is not the codecs that are to be proven here,
// with a few real ones among them where there are any.
func chaosPhotos(t *testing.T) (photos [][]byte) {
	t.Helper()
	for n := range 60 {
		photos = append(photos, jpegPhoto(t, 20+n, 30))
	}
	files, err := filepath.Glob(".cache/photos/*.jpg")
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range files {
		data := readFile(t, file)
		if len(data) < 512<<10 { // those of a few megapixels
			photos = append(photos, data)
		}
	}
	return photos
}
