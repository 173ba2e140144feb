package main

import (
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// The variables that points_armed.go reads.
const (
	crashAtVar = "PMS_CRASH_AT"
	withoutVar = "PMS_WITHOUT"
)

// crashPointsVar has TestCrashPoints try every point; else each fourth has to do.
const crashPointsVar = "CRASH_POINTS"

// launchArmed starts the program whose points are armed.
func launchArmed(t *testing.T, env map[string]string, args ...string) *instance {
	t.Helper()
	path, err := buildArmed()
	if err != nil {
		t.Fatal(err)
	}
	return launchProgram(t, path, environment(env), args...)
}

var buildArmed = sync.OnceValues(func() (string, error) { return buildProgram(armedProgram, "-tags", "points") })

// crashPoints are all of the program's, in the order in which an image passes them.
var crashPoints = []string{
	"queue refilled", "dead queue declared", "work queue declared",
	"product created",
	"claimed", "published", "confirmed", "marked as published",
	"received", "downloaded", "object reserved", "object stored", "about to settle",
	"settled as ready", "acked", "settled for a retry", "settled as dead", "rejected",
	"replayed", "dead copy judged", "dead copy removed", addedPoint,
	"product changed", "product deleted",
	"garbage claimed", "object deleted", "garbage forgotten",
}

// topologyPoints are those at which there is something to lose only if a queue
// was there and is gone.
var topologyPoints = crashPoints[:3]

// addedPoint is the one that needs a dead queue that has lost what was in it.
const addedPoint = "dead copies added"

// Whatever step the program is killed at, the next one to start finishes what
// the dead one began: every image ends as it deserves, no object is left over,
// and the dead queue holds the dead letters.
func TestCrashPoints(t *testing.T) {
	t.Parallel()
	for _, name := range pointsInCode(t) {
		if !slices.Contains(crashPoints, name) {
			t.Errorf("point %q is in the code and not in the table", name)
		}
	}
	for n, name := range crashPoints {
		if os.Getenv(crashPointsVar) != "all" && n%4 != 1 {
			continue
		}
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := newCrash(t)
			c.run(t, name)
		})
	}
}

// pointsInCode finds the calls of point in the program's source.
func pointsInCode(t *testing.T) (names []string) {
	t.Helper()
	files, err := filepath.Glob("*.go")
	if err != nil {
		t.Fatal(err)
	}
	call := regexp.MustCompile(`\bpoint\("([^"]*)"\)`)
	for _, file := range files {
		source := readFile(t, file)
		if strings.HasSuffix(file, "_test.go") {
			continue
		}
		for _, match := range call.FindAllSubmatch(source, -1) {
			names = append(names, string(match[1]))
		}
	}
	return names
}

// proofPlace is a place on real servers where a program is broken and audited.
type proofPlace struct {
	env      map[string]string
	accepted *acceptanceLog
	auditor  *auditor
	photos   *photoServer
}

func newProofPlace(t *testing.T) proofPlace {
	t.Helper()
	bucket := testS3(t)
	env := environment(bucketEnv(bucket), map[string]string{
		"DATABASE_URL": testDatabase(t), "AMQP_URL": testAMQP(t), "IMAGE_WORKERS": "1", "LISTEN_ADDR": freeAddr(t)})
	seedUser(t, env)
	accepted := newAcceptanceLog(t)
	return proofPlace{env: env, accepted: accepted, photos: newPhotoServer(t),
		auditor: newAuditor(t, accepted, env["DATABASE_URL"], env["AMQP_URL"], bucket)}
}

// freeAddr is an address that a program can have again after a crash.
func freeAddr(t *testing.T) string {
	t.Helper()
	port, err := freePort()
	if err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("127.0.0.1:%d", port)
}

func (p *proofPlace) accept(t *testing.T, a acceptance) {
	t.Helper()
	if err := p.accepted.add(a); err != nil {
		t.Fatal(err)
	}
}

// crash is a client that goes through a product's life while the program dies
// once and is started again. It insists, as a client would: what was not
// answered is sent again.
type crash struct {
	proofPlace
	api  instance // only its URL is used
	died chan error
}

func newCrash(t *testing.T) *crash {
	c := &crash{proofPlace: newProofPlace(t), died: make(chan error, 1)}
	c.api.url = "http://" + c.env["LISTEN_ADDR"]
	return c
}

// run has one process die at a point and a clean one take over.
func (c *crash) run(t *testing.T, name string) {
	if slices.Contains(topologyPoints, name) {
		c.loseWorkQueue(t)
	}
	first := launchArmed(t, environment(c.env, map[string]string{crashAtVar: name}))
	go func() { c.died <- first.wait() }()
	c.live(t)
	if name == addedPoint {
		c.loseDeadQueue(t)
	}
	eventually(t, "the point is reached", func() bool {
		c.nudge(t)
		c.succeed(t)
		return c.died == nil
	})
	c.auditor.letTimePass(t, 2*garbageGrace)
	v := c.auditor.await(t, settleTime, func() { c.nudge(t) })
	if !v.clean() {
		t.Errorf("after a crash at %q: %v", name, v)
	}
}

// succeed is called while something is waited for: when the first process has
// died it starts the next.
func (c *crash) succeed(t *testing.T) {
	t.Helper()
	select {
	case err := <-c.died:
		var exit *exec.ExitError
		if !errors.As(err, &exit) || exit.String() != "signal: killed" {
			t.Fatalf("the first process ended with %v", err)
		}
		c.died = nil
		c.auditor.letTimePass(t, 2*leaseTime)
		launchArmed(t, c.env)
	default:
	}
}

// insist sends a request until it is answered with one of the statuses.
func (c *crash) insist(t *testing.T, method, path string, body any, header http.Header, out any, want ...int) {
	t.Helper()
	eventually(t, fmt.Sprintf("%s %s is answered", method, path), func() bool {
		c.succeed(t)
		response, err := c.api.sendWith(method, path, body, header, out)
		return err == nil && slices.Contains(want, response.StatusCode)
	})
}

// settledRows waits until no image is pending and the dead queue has had a
// moment to receive its copies.
func (c *crash) settledRows(t *testing.T) {
	t.Helper()
	eventually(t, "no image is pending", func() bool {
		c.succeed(t)
		n, err := c.auditor.count(t.Context(), "status = 'pending'")
		return err == nil && n == 0
	})
	ch := openChannel(t, c.env["AMQP_URL"])
	pollUntil(time.Now().Add(time.Second), func() bool {
		queue, err := ch.QueueDeclarePassive(deadQueueName, true, false, false, false, nil)
		n, dbErr := c.auditor.count(t.Context(), "status = 'failed'")
		return err == nil && dbErr == nil && queue.Messages == n
	})
}

// live is the product's life: it passes every point.
func (c *crash) live(t *testing.T) {
	good, flaky := c.photos.serve("/good", jpegPhoto(t, 50, 40)), c.photos.serve("/flaky", jpegPhoto(t, 60, 40), 503)
	gone, text := c.photos.URL+"/gone", c.photos.serve("/text", []byte("no image"))
	p := c.createPublished(t, "first", good, flaky, gone, text)
	brief := c.create(t, "second", c.photos.URL+"/good")
	c.settledRows(t)
	c.photos.serve("/gone", jpegPhoto(t, 70, 40))
	c.insist(t, "POST", "/dead-letters/replay", nil, nil, nil, http.StatusAccepted)
	c.settledRows(t)

	late := c.photos.serve("/late", jpegPhoto(t, 80, 40))
	patch := map[string]any{"product_images": []string{flaky, gone, text, late}}
	c.insist(t, "PATCH", fmt.Sprintf("/products/%d", p.ID), patch, nil, nil, http.StatusOK)
	ready := []string{"ready"}
	c.accept(t, acceptance{Product: p.ID, Images: []expectedImage{{flaky, ready}, {gone, ready}, {text, []string{"not_an_image"}}, {late, ready}}})
	c.insist(t, "DELETE", fmt.Sprintf("/products/%d", brief.ID), nil, nil, nil, http.StatusNoContent, http.StatusNotFound)
	c.accept(t, acceptance{Product: brief.ID, Deleted: true})
}

// loseWorkQueue has an earlier process publish an image, and takes the queue away
// with it.
func (c *crash) loseWorkQueue(t *testing.T) {
	t.Helper()
	earlier := launchArmed(t, c.env, "api")
	earlier.awaitStart(t, []string{"api"})
	source := c.photos.serve("/earlier", jpegPhoto(t, 90, 40))
	c.accept(t, acceptance{Product: earlier.post(t, source).ID, Images: []expectedImage{{source, []string{"ready"}}}})
	eventually(t, "the image is published", func() bool {
		n, err := c.auditor.count(t.Context(), published)
		return err == nil && n == 1
	})
	earlier.kill()
	if _, err := openChannel(t, c.env["AMQP_URL"]).QueueDelete(workQueueName, false, false, false); err != nil {
		t.Fatal(err)
	}
}

// loseDeadQueue empties the dead queue behind the program's back, long after its
// copies had come there.
func (c *crash) loseDeadQueue(t *testing.T) {
	t.Helper()
	if _, err := openChannel(t, c.env["AMQP_URL"]).QueuePurge(deadQueueName, false); err != nil {
		t.Fatal(err)
	}
	c.auditor.letTimePass(t, 2*deadGrace)
}

func (c *crash) create(t *testing.T, key string, sources ...string) (p shown) {
	t.Helper()
	body := map[string]any{"user_id": 1, "product_name": key, "product_price": 1, "product_images": sources}
	c.insist(t, "POST", "/products", body, http.Header{"Idempotency-Key": {key}}, &p, http.StatusCreated)
	return p
}

// createPublished has the images downloaded only when all their rows say that
// they are published: until then a dispatcher would repeat whatever is lost.
func (c *crash) createPublished(t *testing.T, key string, sources ...string) shown {
	t.Helper()
	for _, source := range sources {
		release := c.photos.holdBack(strings.TrimPrefix(source, c.photos.URL))
		defer release()
	}
	p := c.create(t, key, sources...)
	eventually(t, "the images are published", func() bool {
		c.succeed(t)
		n, err := c.auditor.count(t.Context(), fmt.Sprintf("product_id = %d AND %s", p.ID, published))
		return err == nil && n == len(sources)
	})
	return p
}

// nudge has the janitor look now, as every change of a product does.
func (c *crash) nudge(t *testing.T) {
	t.Helper()
	body := map[string]any{"user_id": 1, "product_name": "for the janitor", "product_price": 1, "product_images": []string{}}
	var p shown
	if _, err := c.api.send("POST", "/products", body, &p); err == nil {
		c.api.send("DELETE", fmt.Sprintf("/products/%d", p.ID), nil, nil)
	}
}
