package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
)

// killingHost serves photos, slowly, but for /poison: whoever asks for that is
// killed.
type killingHost struct {
	*httptest.Server
	mu     sync.Mutex
	worker *instance
	asked  int           // for /poison
	killed chan struct{} // a token for each
}

func newKillingHost(t *testing.T, pace time.Duration) *killingHost {
	h := &killingHost{killed: make(chan struct{}, 100)}
	photo := jpegPhoto(t, 40, 40)
	h.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if strings.HasPrefix(r.URL.Path, "/poison") {
			h.mu.Lock()
			defer h.mu.Unlock()
			h.asked++
			h.worker.kill()
			h.killed <- struct{}{}
			return
		}
		select {
		case <-time.After(pace):
			w.Write(photo)
		case <-r.Context().Done():
		}
	}))
	t.Cleanup(h.Close)
	return h
}

// supervise starts a worker, and another whenever one is killed, until ended says
// that the test is over.
func (h *killingHost) supervise(t *testing.T, env map[string]string, ended <-chan struct{}) {
	t.Helper()
	for {
		h.mu.Lock() // a worker that is killed at once is known by then
		h.worker = startBinary(t, env, "worker")
		h.mu.Unlock()
		select {
		case <-h.killed:
		case <-ended:
			return
		}
	}
}

// An image that ends its worker each time ends as a dead letter with that reason,
// after fewer than 20 deliveries. Images that were in hand beside it, which never
// have the time to finish there, become ready, with no attempt counted.
func TestPoisonTakesNoInnocents(t *testing.T) {
	t.Parallel()
	host := newKillingHost(t, 400*time.Millisecond)
	env := environment(serverEnv(t), map[string]string{"IMAGE_WORKERS": "1"})
	api := start(t, env, "api")
	p := api.post(t, host.URL+"/1", host.URL+"/2", host.URL+"/poison", host.URL+"/3")
	ended := make(chan struct{})
	go func() { // the event stream ends when no image is pending
		defer close(ended)
		api.send("GET", fmt.Sprintf("/products/%d/events", p.ID), nil, nil)
	}()
	host.supervise(t, env, ended)
	p = api.settled(t, p.ID)
	for n, image := range p.Images {
		switch {
		case n == 2 && (image.Status != "failed" || image.Error.Code != "poison" || image.Attempts != 1):
			t.Errorf("the poison: %+v", image)
		case n != 2 && (image.Status != "ready" || image.Attempts != 0):
			t.Errorf("innocent image %d: %+v", n, image)
		}
	}
	if host.asked != suspectDeliveries+maxLoneStarts {
		t.Errorf("the poison was started %d times, want %d", host.asked, suspectDeliveries+maxLoneStarts)
	}
	awaitReady(t, openChannel(t, env["AMQP_URL"]), deadQueueName, 1)
	var letters struct{ Items []deadLetterShown }
	api.call(t, "GET", "/dead-letters?code=poison", nil, &letters)
	if len(letters.Items) != 1 || letters.Items[0].Position != 2 {
		t.Errorf("dead letters: %+v", letters.Items)
	}
}

// So does one that ends the program whose queue is its own.
func TestPoisonOfTheWholeProgram(t *testing.T) {
	t.Parallel()
	host := newKillingHost(t, 100*time.Millisecond)
	env := environment(map[string]string{"DATA_DIR": t.TempDir(), "IMAGE_WORKERS": "1"})
	restart := func() {
		host.mu.Lock()
		defer host.mu.Unlock()
		host.worker = startBinary(t, env)
	}
	restart()
	const id = 1
	// Its answer may be lost: the program is killed as soon as it is at work.
	host.worker.send("POST", "/products", map[string]any{"user_id": 1, "product_name": "Shoe", "product_price": 1,
		"product_images": []string{host.URL + "/1", host.URL + "/poison", host.URL + "/2"}}, nil)
	for range maxLoneStarts {
		<-host.killed
		restart()
	}
	p := host.worker.settled(t, id)
	for n, image := range p.Images {
		if want := map[bool]string{true: "failed", false: "ready"}[n == 1]; image.Status != want || want == "failed" && image.Error.Code != "poison" {
			t.Errorf("image %d: %+v", n, image)
		}
	}
	if host.asked != maxLoneStarts {
		t.Errorf("the poison was started %d times, want %d", host.asked, maxLoneStarts)
	}
}

// returned publishes jobs that have come back so often each.
func returned(t *testing.T, q *rabbitQueue, counts map[int64]int) {
	t.Helper()
	ch := openChannel(t, q.url)
	get := func() amqp.Delivery {
		var message amqp.Delivery
		eventually(t, "a message is there", func() (ok bool) {
			var err error
			message, ok, err = ch.Get(workQueueName, false)
			return ok && err == nil
		})
		return message
	}
	for _, id := range slices.Sorted(maps.Keys(counts)) {
		publishAll(t, q, Job{ID: id, ProductID: 1})
		for range counts[id] - 1 {
			settled(t, get().Nack(false, true))
		}
		get() // held until the channel is closed, which counts too
	}
	settled(t, ch.Close())
	eventually(t, "all jobs wait", func() bool { n, err := q.Waiting(t.Context()); return err == nil && n == len(counts) })
}

func wantNothing(t *testing.T, out <-chan Delivery, when string) {
	t.Helper()
	select {
	case d := <-out:
		t.Fatalf("job %d came %s", d.Job.ID, when)
	case <-time.After(100 * time.Millisecond):
	}
}

// Suspects are in hand alone, the innocents among them first, once what came with
// them is finished. Then all goes on as before.
func TestSuspectsAreHandedOutAlone(t *testing.T) {
	t.Parallel()
	q := runQueue(t, newRabbitQueue(testAMQP(t), noRefill, testLog(t)))
	returned(t, q, map[int64]int{1: suspectDeliveries + 2, 2: suspectDeliveries, 3: suspectDeliveries - 1})
	in := consume(t, q, 5)
	company := receive(t, in.out)
	if company.Job.ID != 3 || company.Counted {
		t.Fatalf("first came %+v", company)
	}
	wantNothing(t, in.out, "while a suspect's company was in hand")
	settled(t, company.Ack())
	for _, id := range []int64{2, 1} {
		d := receive(t, in.out)
		if d.Job.ID != id || !d.Counted || !d.Redelivered {
			t.Fatalf("got %+v, want job %d alone", d, id)
		}
		publishAll(t, q, Job{ID: id + 10, ProductID: 1})
		wantNothing(t, in.out, "beside a suspect")
		settled(t, d.Ack())
	}
	for _, id := range []int64{12, 11} {
		d := receive(t, in.out)
		if d.Job.ID != id || d.Counted || d.Redelivered {
			t.Errorf("afterwards came %+v, want job %d", d, id)
		}
		settled(t, d.Ack())
	}
}

// A consumer that is stopped while it has suspects gives them back.
func TestSuspectsAtShutdown(t *testing.T) {
	t.Parallel()
	q := runQueue(t, newRabbitQueue(testAMQP(t), noRefill, testLog(t)))
	returned(t, q, map[int64]int{1: suspectDeliveries, 2: suspectDeliveries})
	in := consume(t, q, 5)
	first := receive(t, in.out)
	in.cancel()
	settled(t, first.Ack())
	in.stop(t)
	eventually(t, "the other is back", func() bool { n, err := q.Waiting(t.Context()); return err == nil && n == 1 })
}

// So is one that is stopped just when it would subscribe anew.
func TestSuspectsAtShutdownAfterTheLast(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithCancel(t.Context())
	log := slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelDebug, ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
		if a.Key == slog.MessageKey && a.Value.String() == "images are handed out side by side again" {
			cancel()
		}
		return a
	}}))
	q := runQueue(t, newRabbitQueue(testAMQP(t), noRefill, log))
	returned(t, q, map[int64]int{1: suspectDeliveries})
	out, ended := make(chan Delivery), make(chan error)
	go func() { ended <- q.Consume(ctx, 5, out) }()
	settled(t, receive(t, out).Ack())
	if err := receive(t, ended); err != nil {
		t.Errorf("Consume: %v", err)
	}
}

// A lost connection ends the wait for what is in hand.
func TestSuspectsWhoseConnectionIsLost(t *testing.T) {
	t.Parallel()
	uri, err := amqp.ParseURI(testAMQP(t))
	if err != nil {
		t.Fatal(err)
	}
	proxy := newCutProxy(t, net.JoinHostPort(uri.Host, strconv.Itoa(uri.Port)))
	uri.Port = proxy.port()
	q := runQueue(t, newRabbitQueue(uri.String(), noRefill, testLog(t)))
	returned(t, q, map[int64]int{1: suspectDeliveries})
	in := consume(t, q, 5)
	lost := receive(t, in.out)
	proxy.cut()
	again := receive(t, in.out)
	if lost.Ack() == nil || again.Job.ID != 1 || !again.Counted {
		t.Errorf("after the cut came %+v", again)
	}
	settled(t, again.Ack())
}

// At the broker's limit an innocent, which only lost connections, is queued anew,
// as often as an image may be started alone; then it is called poison.
func TestGivenUpByTheBroker(t *testing.T) {
	t.Parallel()
	b := newBurial(t, testAMQP(t))
	b.in.stop(t)
	p := create(t, b.store, "https://a.example/1.jpg")
	for round := range maxLoneStarts + 1 {
		jobs := publishDue(t, b.store)
		if len(jobs) != 1 {
			t.Fatalf("round %d: due are %v", round, jobs)
		}
		publishAll(t, b.queue, jobs...)
		giveUp(t, b)
		b.look(t)
		if round < maxLoneStarts {
			b.wantAgreement(t) // no copy: it is no dead letter
		}
	}
	b.wantAgreement(t)
	letter, err := b.store.DeadLetter(t.Context(), p.Images[0].ID)
	if err != nil || letter.ErrorCode != "poison" || letter.Attempts != 1 || len(letter.History) != 1 {
		t.Errorf("the dead letter: %+v, %v", letter, err)
	}
}

// giveUp has the broker reach its delivery limit with the message that waits.
func giveUp(t *testing.T, b *burial) {
	t.Helper()
	ch := openChannel(t, b.queue.url)
	messages, err := ch.Consume(workQueueName, "", false, false, false, false, nil)
	if err != nil {
		t.Fatal(err)
	}
	for range deliveryLimit + 1 {
		settled(t, receive(t, messages).Reject(true))
	}
	settled(t, ch.Close())
	b.awaitCopies(t, 1)
}

// A job that was published again since is in work: the message that the broker
// gave up is not about it.
func TestGivenUpOfAnEarlierPublishing(t *testing.T) {
	t.Parallel()
	eachStore(t, func(t *testing.T, s *store) {
		create(t, s, "https://a.example/1.jpg")
		job := publishDue(t, s)[0]
		if _, err := s.ReviveGivenUp(t.Context(), job, s.now().Add(-2*leaseTime)); !errors.Is(err, errNotFound) {
			t.Errorf("an old message: %v", err)
		}
		if version, err := s.ReviveGivenUp(t.Context(), job, s.now()); err != nil || version != 0 {
			t.Errorf("its message: version %d, %v", version, err)
		}
		if _, err := s.ReviveGivenUp(t.Context(), job, s.now()); !errors.Is(err, errNotFound) {
			t.Errorf("while it is due: %v", err)
		}
		if jobs := publishDue(t, s); len(jobs) != 1 {
			t.Errorf("due are %v", jobs)
		}
	})
}

// Starts are counted until there is an outcome, of whatever kind.
func TestLoneStartsAreCountedInARow(t *testing.T) {
	t.Parallel()
	outcomes := map[string]func(t *testing.T, s *store, job Job){
		"given back": func(t *testing.T, s *store, job Job) { settled(t, s.ForgetLoneStarts(t.Context(), job.ID)) },
		"to be tried again": func(t *testing.T, s *store, job Job) {
			f := failure{imageError: transient("http_503", ""), Attempt: 1, RetryAt: s.now()}
			_, err := s.SettleFailed(t.Context(), job, f)
			settled(t, err)
		},
		"dead and replayed": func(t *testing.T, s *store, job Job) {
			bury(t, s, job, poisonError(maxLoneStarts))
			_, _, err := s.ReplayDead(t.Context(), []int64{job.ID}, origin{})
			settled(t, err)
		},
		"ready and made again": func(t *testing.T, s *store, job Job) {
			finish(t, s, job, fmt.Sprint(job.ID))
			_, _, err := s.Reprocess(t.Context(), []int64{job.ID}, origin{})
			settled(t, err)
		},
	}
	eachStore(t, func(t *testing.T, s *store) {
		for name, happen := range outcomes {
			p := create(t, s, "https://a.example/1.jpg")
			publishDue(t, s)
			job := Job{ID: p.Images[0].ID, ProductID: p.ID}
			for n := range 3 {
				if starts, err := s.CountLoneStart(t.Context(), job.ID); err != nil || starts != n+1 {
					t.Errorf("start %d is counted as %d, %v", n+1, starts, err)
				}
			}
			happen(t, s, job)
			if starts, err := s.CountLoneStart(t.Context(), job.ID); err != nil || starts != 1 {
				t.Errorf("%s: the next start is counted as %d, %v", name, starts, err)
			}
		}
		if _, err := s.CountLoneStart(t.Context(), 999); !errors.Is(err, errNotFound) {
			t.Errorf("an image that is not there: %v", err)
		}
	})
}
