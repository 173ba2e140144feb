package main

import (
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net/http"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// chaosPlan is how long the chaos goes on: until all three are reached.
type chaosPlan struct {
	Images   int           // accepted
	Faults   int           // struck and healed
	Duration time.Duration // from the first fault on
	Seed     uint64        // of what is done to whom, and of what is posted
}

// readChaosPlan reads the plan from CHAOS_IMAGES, CHAOS_FAULTS, CHAOS_DURATION
// and CHAOS_SEED. Unset, it is one for every day, of about a minute.
func readChaosPlan(t *testing.T) chaosPlan {
	t.Helper()
	plan := chaosPlan{Images: 200, Faults: 8, Seed: uint64(time.Now().UnixNano())}
	for _, setting := range []struct {
		name string
		set  func(string) error
	}{
		{"CHAOS_IMAGES", number(&plan.Images, 1, 1<<30)},
		{"CHAOS_FAULTS", number(&plan.Faults, 1, 1<<30)},
		{"CHAOS_DURATION", duration(&plan.Duration, 0, 24*time.Hour)},
		{"CHAOS_SEED", func(v string) (err error) { plan.Seed, err = strconv.ParseUint(v, 10, 64); return err }},
	} {
		if value := os.Getenv(setting.name); value != "" {
			if err := setting.set(value); err != nil {
				t.Fatalf("%s: %v", setting.name, err)
			}
		}
	}
	return plan
}

// recoveryPatience is how long after a fault the service may take to get a new
// product's image ready. The longest that it waits for anything is 30 s.
const recoveryPatience = 2 * time.Minute

// Nothing is lost, whatever is killed, whenever: clients post products to two
// APIs while a saboteur does to everything that runs what may happen to it, one
// or two faults at a time. In the end an auditor compares what was accepted with
// what PostgreSQL, S3 and the dead queue hold. See README for the long form.
func TestChaos(t *testing.T) {
	t.Parallel()
	plan := readChaosPlan(t)
	t.Logf("CHAOS_SEED=%d", plan.Seed)
	w := newChaosWorld(t, plan.Seed)
	clients, stop := w.postProducts(t, plan.Seed)
	w.calmBefore(t, clients)
	start := time.Now()
	for w.struck < plan.Faults || clients.images.Load() < int64(plan.Images) || time.Since(start) < plan.Duration {
		w.sabotage(t, clients)
	}
	stop()
	took := time.Since(start)
	v := w.reckon(t)
	t.Logf("%d faults in %v\n%v\n%s", w.struck, took.Round(time.Second), v, w.recoveries())
	if !v.clean() || v.Accepted != int(clients.images.Load()) {
		t.Errorf("seed %d: promises are broken, or not all of the %d images were audited", plan.Seed, clients.images.Load())
	}
	for _, p := range w.programs {
		if err := p.stop(); err != nil {
			t.Errorf("%s ended with: %v", p.name, err)
		}
	}
}

// reckon lets the service finish what it has in hand, and audits it.
func (w *chaosWorld) reckon(t *testing.T) findings {
	t.Helper()
	ended := pollUntil(time.Now().Add(recoveryPatience), func() bool {
		n, err := w.auditor.count(t.Context(), "status = 'pending'")
		return err == nil && n == 0
	})
	if ended { // else the audit says which are not
		w.auditor.letTimePass(t, 2*garbageGrace)
	}
	v := w.auditor.await(t, recoveryPatience, w.collect)
	if err := w.auditor.contents(t.Context()); err != nil {
		t.Error(err)
	}
	return v
}

// calmBefore waits for a few products in which nothing is broken: the four
// dispatchers side by side must not publish any image once more than need be.
func (w *chaosWorld) calmBefore(t *testing.T, clients *chaosClients) {
	t.Helper()
	eventually(t, "products are accepted in the calm", func() bool { return clients.images.Load() >= 30 })
	v, err := w.auditor.audit(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if v.Twice != 0 || v.WronglyDead != 0 {
		t.Errorf("before the first fault: %v", v)
	}
}

// recoveries lists, for each kind of fault, how often it was and how long it took
// at the longest until a new image was ready.
func (w *chaosWorld) recoveries() string {
	lines := []string{"longest recovery after"}
	for kind, took := range w.recovered {
		lines = append(lines, fmt.Sprintf("  %-24s × %-3d %6.1f s", kind, len(took), slices.Max(took).Seconds()))
	}
	slices.Sort(lines[1:])
	return strings.Join(lines, "\n")
}

// chaosClients post products, insist until each is answered with 201, and write
// that down before anything else.
type chaosClients struct {
	apis     []string // URLs
	hosts    []*chaosHost
	accepted *acceptanceLog
	web      *http.Client
	images   atomic.Int64 // accepted
	serial   atomic.Int64 // makes keys and sources unique
}

// postInterval is how often each of the clients posts, if it is answered: slowly
// enough that nothing but a fault makes an image wait.
const (
	postInterval = 500 * time.Millisecond
	postClients  = 2
)

// mostPending is how many images may wait before the clients do: what they post
// in about five seconds. A machine that is slower than they are would else be tested
// for that, and not for its recovery.
const mostPending = 60

// crowded tells whether so many images wait. Nobody knows while PostgreSQL is away.
func (w *chaosWorld) crowded(ctx context.Context) bool {
	ctx, cancel := context.WithTimeout(ctx, postInterval)
	defer cancel()
	n, err := w.auditor.count(ctx, "status = 'pending'")
	return err == nil && n > mostPending
}

// postProducts has clients post until stop is called, which waits for them.
func (w *chaosWorld) postProducts(t *testing.T, seed uint64) (c *chaosClients, stop func()) {
	c = &chaosClients{hosts: w.hosts, accepted: w.accepted, web: &http.Client{Timeout: 10 * time.Second}}
	for _, p := range w.programs {
		if p.url != "" {
			c.apis = append(c.apis, p.url)
		}
	}
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	for n := range postClients {
		random := rand.New(rand.NewPCG(seed, uint64(n)))
		running.Go(func() {
			tick := time.NewTicker(postInterval)
			defer tick.Stop()
			for ; ctx.Err() == nil; <-tick.C {
				if w.crowded(ctx) {
					continue
				}
				if _, err := c.create(ctx, c.compose(random)); err != nil && ctx.Err() == nil {
					t.Errorf("post: %v", err)
					return
				}
			}
		})
	}
	stop = func() { cancel(); running.Wait() }
	t.Cleanup(stop)
	return c, stop
}

// compose makes up a product's images: most are good in the end, one in six is not.
func (c *chaosClients) compose(random *rand.Rand) []expectedImage {
	images := make([]expectedImage, 1+random.IntN(5))
	for n := range images {
		kind := "photo"
		switch roll := random.IntN(24); {
		case roll < len(badImages):
			kind = badImages[roll]
		case roll < len(badImages)+3:
			kind = "flaky"
		}
		host := c.hosts[random.IntN(len(c.hosts))]
		images[n] = expectedImage{host.source(kind, c.serial.Add(1)), imageEnds[kind]}
	}
	return images
}

// create posts a product to one API after the other until one says 201. The key
// makes all of these the same request.
func (c *chaosClients) create(ctx context.Context, images []expectedImage) (id int64, err error) {
	key := fmt.Sprintf("chaos %d", c.serial.Add(1))
	sources := make([]string, len(images))
	for n, image := range images {
		sources[n] = image.Source
	}
	body, err := json.Marshal(map[string]any{"user_id": 1, "product_name": key, "product_price": 1, "product_images": sources})
	if err != nil {
		return 0, err
	}
	tick := time.NewTicker(postInterval / 10)
	defer tick.Stop()
	for n := 0; ctx.Err() == nil; n++ {
		id, status, err := c.post(ctx, c.apis[n%len(c.apis)], key, body)
		switch {
		case err == nil && status == http.StatusCreated:
			err := c.accepted.add(acceptance{Product: id, Images: images})
			c.images.Add(int64(len(images)))
			return id, err
		case err == nil && status < 500 && status != http.StatusConflict:
			return 0, fmt.Errorf("answered %d for %s", status, body)
		}
		<-tick.C
	}
	return 0, ctx.Err()
}

func (c *chaosClients) post(ctx context.Context, api, key string, body []byte) (id int64, status int, err error) {
	request, err := http.NewRequestWithContext(ctx, http.MethodPost, api+"/products", strings.NewReader(string(body)))
	if err != nil {
		return 0, 0, err
	}
	request.Header.Set("Content-Type", "application/json")
	request.Header.Set("Idempotency-Key", key)
	response, err := c.web.Do(request)
	if err != nil {
		return 0, 0, err
	}
	defer response.Body.Close()
	if response.StatusCode != http.StatusCreated {
		return 0, response.StatusCode, nil
	}
	var p shown
	err = json.NewDecoder(response.Body).Decode(&p)
	return p.ID, response.StatusCode, err
}
