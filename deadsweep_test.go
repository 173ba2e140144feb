package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
)

// burial is a store and a RabbitMQ with dead letters, and what keeps them equal.
type burial struct {
	store  *store
	queue  *rabbitQueue
	keeper *deadKeeper
	in     *consuming
	ch     *amqp.Channel
}

func newBurial(t *testing.T, url string) *burial {
	t.Helper()
	b := &burial{store: storeIn(t, t.TempDir())}
	b.queue = runQueue(t, newRabbitQueue(url, b.store.RequeueAll, testLog(t)))
	b.keeper = newDeadKeeper(b.store, b.queue, func(int64, int64) {}, func() {}, testLog(t))
	b.keeper.grace = 0
	b.in, b.ch = consume(t, b.queue, 1), openChannel(t, url)
	return b
}

// bury makes n products with an image each that dies as it does in a worker:
// the row first, then the delivery is rejected.
func (b *burial) bury(t *testing.T, n int) (jobs []Job) {
	t.Helper()
	for range n {
		jobs = append(jobs, b.take(t, func(d Delivery) error { return d.Reject() }))
	}
	b.awaitCopies(t, n)
	return jobs
}

// take makes a product whose image dies, and settles its delivery.
func (b *burial) take(t *testing.T, settle func(Delivery) error) Job {
	t.Helper()
	create(t, b.store, "https://a.example/1.jpg")
	publishAll(t, b.queue, publishDue(t, b.store)...)
	d := receive(t, b.in.out)
	bury(t, b.store, d.Job, permanent("http_404", "404 Not Found"))
	settled(t, settle(d))
	return d.Job
}

// awaitCopies waits until the dead queue has at least n messages.
func (b *burial) awaitCopies(t *testing.T, n int) {
	t.Helper()
	eventually(t, fmt.Sprintf("%d copies are in the dead queue", n), func() bool {
		queue, err := b.ch.QueueDeclarePassive(deadQueueName, true, false, false, false, nil)
		return err == nil && queue.Messages >= n
	})
}

// copies reads the dead queue and waits until what it has read is back there:
// who looks meanwhile finds it empty.
func (b *burial) copies(t *testing.T) (ids []int64, foreign []string) {
	t.Helper()
	conn, err := amqp.Dial(b.queue.url)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		conn.Close() // gives all back
		b.awaitCopies(t, len(ids)+len(foreign))
	}()
	ch, err := conn.Channel()
	if err != nil {
		t.Fatal(err)
	}
	for {
		message, ok, err := ch.Get(deadQueueName, false)
		if err != nil {
			t.Fatal(err)
		}
		if !ok {
			slices.Sort(ids)
			return ids, foreign
		}
		if job, err := decodeJob(message.Body); err != nil {
			foreign = append(foreign, string(message.Body))
		} else {
			ids = append(ids, job.ID)
		}
	}
}

// wantAgreement compares the queue with the rows.
func (b *burial) wantAgreement(t *testing.T) {
	t.Helper()
	letters, err := b.store.DeadLetters(t.Context(), deadFilter{}, 0, 1000)
	if err != nil {
		t.Fatal(err)
	}
	var dead []int64
	for _, letter := range letters {
		dead = append(dead, letter.ID)
	}
	var copies []int64
	if !pollUntil(time.Now().Add(testPatience), func() bool { copies, _ = b.copies(t); return slices.Equal(copies, dead) }) {
		t.Errorf("the queue has copies of %v, the rows say %v", copies, dead)
	}
}

func (b *burial) look(t *testing.T) {
	t.Helper()
	if err := b.keeper.look(t.Context()); err != nil {
		t.Fatalf("look: %v", err)
	}
}

func (b *burial) publishCopy(t *testing.T, job Job) {
	t.Helper()
	before, _ := b.copies(t)
	if err := b.ch.PublishWithContext(t.Context(), "", deadQueueName, true, false, encodeJob(job, time.Now())); err != nil {
		t.Fatal(err)
	}
	b.awaitCopies(t, len(before)+1)
}

// disturbances are the ways in which queue and rows come to differ. Each is done
// to one dead letter.
var disturbances = map[string]func(t *testing.T, b *burial, job Job){
	"replayed": func(t *testing.T, b *burial, job Job) {
		if n, _, err := b.store.ReplayDead(t.Context(), []int64{job.ID}, origin{}); err != nil || n != 1 {
			t.Fatal(n, err)
		}
	},
	"discarded": func(t *testing.T, b *burial, job Job) {
		if err := b.store.DiscardDead(t.Context(), job.ID); err != nil {
			t.Fatal(err)
		}
	},
	"product deleted": func(t *testing.T, b *burial, job Job) {
		deleteProduct(t, b.store, job.ProductID)
	},
	"image replaced": func(t *testing.T, b *burial, job Job) {
		_, err := b.store.UpdateProduct(t.Context(), job.ProductID, origin{}, func(Product) error { return nil },
			func(p *Product) { p.Images = sourcesOf("https://a.example/new.jpg") })
		if err != nil {
			t.Fatal(err)
		}
	},
	"copied twice":  func(t *testing.T, b *burial, job Job) { b.publishCopy(t, job); b.publishCopy(t, job) },
	"copy vanished": func(t *testing.T, b *burial, _ Job) { getRaw(t, b.ch, deadQueueName) },
	"worker ended between commit and reject, the redelivery was acked": func(t *testing.T, b *burial, _ Job) {
		b.take(t, func(d Delivery) error { return d.Ack() })
	},
	"purged": func(t *testing.T, b *burial, _ Job) {
		if _, err := b.ch.QueuePurge(deadQueueName, false); err != nil {
			t.Fatal(err)
		}
	},
	"queue deleted": func(t *testing.T, b *burial, _ Job) {
		if _, err := b.ch.QueueDelete(deadQueueName, false, false, false); err != nil {
			t.Fatal(err)
		}
		b.queue.recheck()
		eventually(t, "the dead queue is back", func() bool {
			ch := openChannel(t, b.queue.url)
			_, err := ch.QueueDeclarePassive(deadQueueName, true, false, false, false, nil)
			return err == nil
		})
	},
	"copy of a job that never was": func(t *testing.T, b *burial, _ Job) { b.publishCopy(t, Job{ID: 1 << 40, ProductID: 1}) },
}

// One look mends each way in which the dead queue and the rows can differ.
func TestDeadQueueAgreesWithTheRowsAgain(t *testing.T) {
	t.Parallel()
	for name, disturb := range disturbances {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := newBurial(t, testAMQP(t))
			jobs := b.bury(t, 3)
			b.wantAgreement(t)
			disturb(t, b, jobs[1])
			b.look(t)
			b.wantAgreement(t)
		})
	}
}

// Whatever has happened, in whatever order, one sweep is enough.
func TestDeadQueueAgreesAfterManyDisturbances(t *testing.T) {
	t.Parallel()
	b := newBurial(t, testAMQP(t))
	jobs := b.bury(t, 24)
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	names := slices.DeleteFunc(slices.Sorted(maps.Keys(disturbances)), func(name string) bool { return name == "purged" || name == "queue deleted" })
	for _, job := range jobs {
		disturbances[names[random.IntN(len(names))]](t, b, job)
	}
	b.keeper.nextSweep = time.Time{}
	b.look(t)
	b.wantAgreement(t)
}

// A broker that has lost everything gets its dead letters back.
func TestDeadQueueAfterAWipedBroker(t *testing.T) {
	t.Parallel()
	rabbit := startRabbitMQ(t)
	b := newBurial(t, rabbit.URL)
	b.bury(t, 3)
	rabbit.Kill(t)
	rabbit.Wipe(t)
	rabbit.Start(t)
	eventually(t, "the queue is connected again", func() bool { _, err := b.queue.DeadCopies(t.Context()); return err == nil })
	b.look(t)
	b.ch = openChannel(t, rabbit.URL)
	b.wantAgreement(t)
}

// While numbers agree the queue is not read; what cancels out in the numbers is
// found when it is time.
func TestDeadQueueIsReadOnlyForAReason(t *testing.T) {
	t.Parallel()
	b := newBurial(t, testAMQP(t))
	jobs := b.bury(t, 2)
	publishRaw(t, b.ch, deadQueueName, "no job")
	b.awaitCopies(t, 3)
	b.look(t)                     // reads, and learns of what is no job
	read := func() (most int64) { // how often the queue has been read
		for range 3 {
			m, ok, err := b.ch.Get(deadQueueName, false)
			if err != nil || !ok {
				t.Fatal(ok, err)
			}
			defer m.Nack(false, true)
			most = max(most, deliveryCount(m))
		}
		return most
	}
	before := read()
	b.awaitCopies(t, 3)
	for range 5 {
		b.look(t)
	}
	if after := read(); after != before+1 { // read itself counts
		t.Errorf("five looks at what agrees read the queue %d times", after-before-1)
	}
	if _, foreign := b.copies(t); !slices.Equal(foreign, []string{"no job"}) {
		t.Errorf("what is no job: %q", foreign)
	}

	disturbances["replayed"](t, b, jobs[1])              // one copy too many ...
	b.take(t, func(d Delivery) error { return d.Ack() }) // ... and one too few
	b.look(t)
	if copies, _ := b.copies(t); !slices.Equal(copies, []int64{jobs[0].ID, jobs[1].ID}) {
		t.Errorf("read before its time: %v", copies)
	}
	b.keeper.nextSweep = time.Now()
	b.look(t)
	b.wantAgreement(t)
}

// Copies of the latest deaths are given time to arrive.
func TestDeadQueueGivesCopiesTime(t *testing.T) {
	t.Parallel()
	b := newBurial(t, testAMQP(t))
	b.keeper.grace = time.Minute
	b.take(t, func(d Delivery) error { return d.Ack() })
	b.keeper.nextSweep = time.Time{}
	b.look(t)
	if copies, _ := b.copies(t); len(copies) != 0 {
		t.Errorf("published at once: %v", copies)
	}
	advance(b.store, 2*time.Minute)
	b.look(t)
	b.wantAgreement(t)
}

// A copy that someone has in hand is not missing, and two do not sweep at once.
func TestDeadQueueIsLeftToWhoHasIt(t *testing.T) {
	t.Parallel()
	b := newBurial(t, testAMQP(t))
	jobs := b.bury(t, 3)
	disturbances["discarded"](t, b, jobs[0])
	held, ok, err := b.ch.Get(deadQueueName, false)
	if err != nil || !ok {
		t.Fatal(ok, err)
	}
	hold := openChannel(t, b.queue.url)
	if _, err := hold.QueueDeclare(sweepLockName, false, true, true, false, nil); err != nil {
		t.Fatal(err)
	}
	if err := b.keeper.sweep(t.Context()); !errors.Is(err, errSweepTaken) {
		t.Errorf("a second sweep: %v", err)
	}
	if _, err := hold.QueueDelete(sweepLockName, false, false, false); err != nil {
		t.Fatal(err)
	}
	counted := false // a copy in hand is counted by nobody, but may be given back in between
	err = b.queue.SweepDead(t.Context(), func(ctx context.Context, copies []deadCopy) ([]bool, error) {
		counted = len(copies) == 2
		return b.keeper.judge(ctx, copies)
	}, func(func(Job, error) bool) {})
	if err != nil || !counted {
		t.Errorf("sweep: %v, all seen: %t", err, counted)
	}
	settled(t, held.Nack(false, true))
	b.awaitCopies(t, 3)
	b.look(t)
	b.wantAgreement(t)
}

// A queue longer than one consumer's share is read whole. All of it is removed,
// if not at once: see removeExtra.
func TestDeadQueueThatIsLong(t *testing.T) {
	t.Parallel()
	url := testAMQP(t)
	q := runQueue(t, newRabbitQueue(url, noRefill, testLog(t)))
	const long = sweepWindow + 1500
	link, err := dialAMQP(t.Context(), url, "test", testPatience)
	if err != nil {
		t.Fatal(err)
	}
	defer link.close()
	p, err := newAMQPPublisher(t.Context(), link, deadQueueName)
	if err != nil {
		t.Fatal(err)
	}
	for window := range slices.Chunk(jobs(long), confirmWindow) {
		if refused, err := p.publish(t.Context(), window); err != nil || len(refused) > 0 {
			t.Fatal(refused, err)
		}
	}
	sweep := func(stays bool) (seen map[int64]bool, err error) {
		seen = make(map[int64]bool)
		err = q.SweepDead(t.Context(), func(_ context.Context, copies []deadCopy) ([]bool, error) {
			stay := make([]bool, len(copies))
			for n, c := range copies {
				seen[c.Job.ID], stay[n] = true, stays
			}
			return stay, nil
		}, func(func(Job, error) bool) {})
		return seen, err
	}
	eventually(t, "all are read", func() bool { seen, err := sweep(true); return err == nil && len(seen) == long })
	eventually(t, "all are back", func() bool { n, err := q.DeadCopies(t.Context()); return err == nil && n == long })
	ch := openChannel(t, url)
	eventually(t, "none is left", func() bool {
		if _, err := sweep(false); err != nil {
			return false
		}
		message, ok, err := ch.Get(deadQueueName, false)
		if err != nil {
			t.Fatal(err)
		}
		if ok {
			settled(t, message.Reject(true))
		}
		return !ok
	})
}

// A sweep that cannot ask the rows changes nothing.
func TestDeadQueueWithoutADatabase(t *testing.T) {
	t.Parallel()
	b := newBurial(t, testAMQP(t))
	jobs := b.bury(t, 2)
	disturbances["discarded"](t, b, jobs[0])
	away := func(context.Context, []deadCopy) ([]bool, error) { return nil, errUnavailable }
	if err := b.queue.SweepDead(t.Context(), away, func(func(Job, error) bool) {}); !errors.Is(err, errUnavailable) {
		t.Errorf("sweep: %v", err)
	}
	b.awaitCopies(t, 2)
	b.look(t)
	b.wantAgreement(t)
}

// A worker that ended between the commit of a failure and the reject leaves a
// message that is delivered again: it goes where it should have gone. A second
// message of the same job does not.
func TestDeadJobThatIsDeliveredAgain(t *testing.T) {
	t.Parallel()
	b := newBurial(t, testAMQP(t))
	p := &pipeline{store: b.store, invalidate: func(int64, int64) {}, log: testLog(t)}
	job := b.take(t, func(d Delivery) error { return d.Release() }) // as the broker does when a worker ends
	again := receive(t, b.in.out)
	settled(t, p.letGo(t.Context(), &work{delivery: again, log: p.log}))
	b.awaitCopies(t, 1)
	b.wantAgreement(t)

	publishAll(t, b.queue, job)
	second := receive(t, b.in.out)
	settled(t, p.letGo(t.Context(), &work{delivery: second, log: p.log}))
	b.in.stop(t)
	b.wantAgreement(t)

	t.Log("with the database away the delivery is settled all the same")
	b.store.Close()
	b.in = consume(t, b.queue, 1)
	publishAll(t, b.queue, job)
	settled(t, receive(t, b.in.out).Release())
	settled(t, p.letGo(t.Context(), &work{delivery: receive(t, b.in.out), log: p.log}))
}

// The running program keeps the queue and the rows equal by itself.
func TestProgramKeepsTheDeadQueue(t *testing.T) {
	t.Parallel()
	env := environment(serverEnv(t))
	photos := newPhotoServer(t)
	api := start(t, env)
	p := api.settled(t, api.post(t, photos.URL+"/1", photos.URL+"/2", photos.URL+"/3").ID)
	ch := openChannel(t, env["AMQP_URL"])
	awaitReady(t, ch, deadQueueName, 3)
	var letters struct{ Items []deadLetterShown }
	api.call(t, "GET", "/dead-letters", nil, &letters)
	photos.serve("/1", jpegPhoto(t, 40, 40))
	api.call(t, "POST", fmt.Sprintf("/dead-letters/%d/replay", letters.Items[0].ID), nil, nil)
	awaitReady(t, ch, deadQueueName, 2)
	api.call(t, "DELETE", fmt.Sprintf("/dead-letters/%d", letters.Items[1].ID), nil, nil)
	awaitReady(t, ch, deadQueueName, 1)
	if _, err := ch.QueuePurge(deadQueueName, false); err != nil {
		t.Fatal(err)
	}
	awaitReady(t, ch, deadQueueName, 1)
	if m := getRaw(t, ch, deadQueueName); m.MessageId != fmt.Sprint(letters.Items[2].ID) {
		t.Errorf("the copy is of job %s, want %d", m.MessageId, letters.Items[2].ID)
	}
	awaitReady(t, ch, deadQueueName, 1)
	api.call(t, "DELETE", fmt.Sprintf("/products/%d", p.ID), nil, nil)
	awaitReady(t, ch, deadQueueName, 0)
}
