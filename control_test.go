package main

import (
	"errors"
	"fmt"
	"net"
	"net/http"
	"os/exec"
	"strconv"
	"testing"

	amqp "github.com/rabbitmq/amqp091-go"
)

// The negative controls: what the auditor says of a program that lacks one of
// its safeguards, when the very thing happens that the safeguard is for. With it
// nothing may be amiss; without it the auditor must complain, or it would not
// notice a loss elsewhere either.
func TestAuditorNoticesWhatIsMissing(t *testing.T) {
	t.Parallel()
	controls := map[string]struct {
		safeguard string
		fault     func(c *control, t *testing.T)
		harm      func(findings) int
	}{
		"what was sent never arrives":       {"confirms", (*control).loseInTransit, func(v findings) int { return v.Lost }},
		"a worker dies before its commit":   {"commit before ack", (*control).dieBeforeCommit, func(v findings) int { return v.Lost }},
		"the queue is deleted":              {"refill", (*control).deleteQueue, func(v findings) int { return v.Lost }},
		"a worker dies after its upload":    {"reservation", (*control).dieAfterUpload, func(v findings) int { return v.Orphans }},
		"an image is dead, nothing is hurt": {"commit before ack", (*control).letOneFail, func(v findings) int { return v.Disagreeing }},
	}
	for name, control := range controls {
		t.Run(name+", with "+control.safeguard, func(t *testing.T) {
			t.Parallel()
			c := newControl(t, "")
			control.fault(c, t)
			if v := c.auditor.await(t, settleTime, func() { c.collect(t) }); !v.clean() {
				t.Errorf("the auditor complains: %v", v)
			}
		})
		t.Run(name+", without "+control.safeguard, func(t *testing.T) {
			t.Parallel()
			c := newControl(t, control.safeguard)
			control.fault(c, t)
			v, err := c.auditor.audit(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			if control.harm(v) != 1 {
				t.Errorf("the auditor does not notice the one thing that is wrong: %v", v)
			}
		})
	}
}

// control is a program, with or without a safeguard, to which one thing happens.
// A fault returns when everything is over that the program can do by itself
// within moments: what comes later of its own accord (the reconciler after a
// quarter of an hour) is no substitute for the safeguard.
type control struct {
	proofPlace
	without string
	api     *instance
}

func newControl(t *testing.T, without string) *control {
	return &control{proofPlace: newProofPlace(t), without: without}
}

// launch starts the program as the control wants it, an api or a worker.
func (c *control) launch(t *testing.T, env map[string]string, command string) *instance {
	t.Helper()
	i := launchArmed(t, environment(c.env, map[string]string{withoutVar: c.without}, env), command)
	i.awaitStart(t, []string{command})
	return i
}

// begin has a product accepted whose one image will end as told.
func (c *control) begin(t *testing.T, path, want string) shown {
	t.Helper()
	p := c.api.post(t, c.photos.URL+path)
	c.accept(t, acceptance{Product: p.ID, Images: []expectedImage{{c.photos.URL + path, []string{want}}}})
	return p
}

// awaitImage waits until one image satisfies a condition.
func (c *control) awaitImage(t *testing.T, condition string) {
	t.Helper()
	eventually(t, condition, func() bool {
		n, err := c.auditor.count(t.Context(), condition)
		return err == nil && n == 1
	})
}

// witness has a later image pass the whole way: what came before it in the
// queue has passed too, or never will.
func (c *control) witness(t *testing.T) {
	t.Helper()
	c.photos.serve("/witness", jpegPhoto(t, 20, 30))
	p := c.begin(t, "/witness", "ready")
	c.awaitImage(t, fmt.Sprintf("product_id = %d AND status = 'ready'", p.ID))
}

const published = "status = 'pending' AND run_at IS NULL"

// loseInTransit cuts the line to the broker with a message in it.
func (c *control) loseInTransit(t *testing.T) {
	uri, err := amqp.ParseURI(c.env["AMQP_URL"])
	if err != nil {
		t.Fatal(err)
	}
	proxy := startProxy(t, net.JoinHostPort(uri.Host, strconv.Itoa(uri.Port)))
	direct := c.env["AMQP_URL"]
	host, port, _ := net.SplitHostPort(proxy.Addr)
	uri.Host = host
	if uri.Port, err = strconv.Atoi(port); err != nil {
		t.Fatal(err)
	}
	c.api = c.launch(t, map[string]string{"AMQP_URL": uri.String()}, "api")
	c.api.log.await(t, `"msg":"queue is connected"`)
	proxy.Stall()
	c.photos.serve("/photo", jpegPhoto(t, 40, 30))
	c.begin(t, "/photo", "ready")
	sent := "claim <> 0"
	if c.without != "" {
		sent = published // nobody waited for the broker's word
	}
	c.awaitImage(t, sent)
	proxy.Cut()
	proxy.Restore(t)
	c.launch(t, map[string]string{"AMQP_URL": direct}, "worker")
	c.witness(t)
}

func (c *control) dieBeforeCommit(t *testing.T) {
	c.killWorkerAt(t, "about to settle")
	c.launch(t, nil, "worker")
	c.witness(t)
}

// killWorkerAt has the first worker die with an image in hand.
func (c *control) killWorkerAt(t *testing.T, name string) shown {
	t.Helper()
	c.api = c.launch(t, nil, "api")
	worker := c.launch(t, map[string]string{crashAtVar: name}, "worker")
	c.photos.serve("/photo", jpegPhoto(t, 40, 30))
	p := c.begin(t, "/photo", "ready")
	var exit *exec.ExitError
	if err := worker.wait(); !errors.As(err, &exit) || exit.String() != "signal: killed" {
		t.Fatalf("the worker ended with %v", err)
	}
	return p
}

// deleteQueue takes the queue away that has a message in it.
func (c *control) deleteQueue(t *testing.T) {
	c.api = c.launch(t, nil, "api")
	c.photos.serve("/photo", jpegPhoto(t, 40, 30))
	c.begin(t, "/photo", "ready")
	c.awaitImage(t, published)
	if _, err := openChannel(t, c.env["AMQP_URL"]).QueueDelete(workQueueName, false, false, false); err != nil {
		t.Fatal(err)
	}
	c.launch(t, nil, "worker")
	c.witness(t)
}

// dieAfterUpload deletes the product of an object that nobody has referred to yet.
func (c *control) dieAfterUpload(t *testing.T) {
	p := c.killWorkerAt(t, "object stored")
	c.api.call(t, http.MethodDelete, fmt.Sprintf("/products/%d", p.ID), nil, nil)
	c.accept(t, acceptance{Product: p.ID, Deleted: true})
	c.launch(t, nil, "worker")
	c.witness(t)
	c.auditor.letTimePass(t, 2*garbageGrace)
	c.collect(t)
	if c.without == "" {
		return
	}
	// Garbage that is known is gone by now, so this is not.
	eventually(t, "no garbage is known", func() bool {
		var n int
		err := c.auditor.db.QueryRow(t.Context(), "SELECT count(*) FROM garbage").Scan(&n)
		return err == nil && n == 0
	})
}

// letOneFail has an image fail for good.
func (c *control) letOneFail(t *testing.T) {
	c.api = c.launch(t, nil, "api")
	c.launch(t, nil, "worker")
	c.begin(t, "/missing", "http_404")
	c.awaitImage(t, "status = 'failed'")
	c.witness(t)
}

// collect has the janitor look now, as every deletion does.
func (c *control) collect(t *testing.T) {
	t.Helper()
	c.api.call(t, http.MethodDelete, fmt.Sprintf("/products/%d", c.api.post(t).ID), nil, nil)
}
