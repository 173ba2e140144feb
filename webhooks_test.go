package main

import (
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

// receiver is somebody's server for webhooks.
type receiver struct {
	*httptest.Server
	mu     sync.Mutex
	got    []received
	answer func(n int, r received, w http.ResponseWriter) // to the nth request, from 0; nil: 200
}

// received is a request as it came.
type received struct {
	header http.Header
	body   string
}

func newReceiver(t *testing.T, answer func(n int, r received, w http.ResponseWriter)) *receiver {
	t.Helper()
	rec := &receiver{answer: answer}
	rec.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		one := received{r.Header, string(body)}
		rec.mu.Lock()
		n := len(rec.got)
		rec.got = append(rec.got, one)
		rec.mu.Unlock()
		if rec.answer != nil {
			rec.answer(n, one, w)
		}
	}))
	t.Cleanup(rec.Close)
	return rec
}

func (r *receiver) all() []received {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.got)
}

// await waits until a request of this type has come.
func (r *receiver) await(t *testing.T, kind string) (one received) {
	t.Helper()
	eventually(t, "the receiver is told "+kind, func() bool {
		for _, one = range r.all() {
			if one.kind() == kind {
				return true
			}
		}
		return false
	})
	return one
}

func (r received) kind() string {
	var body struct{ Type string }
	json.Unmarshal([]byte(r.body), &body)
	return body.Type
}

// verified checks a request as a receiver does who has read
// https://www.standardwebhooks.com alone.
func (r received) verified(secret string) error {
	key, err := base64.StdEncoding.DecodeString(strings.TrimPrefix(secret, "whsec_"))
	if err != nil {
		return err
	}
	at, err := strconv.ParseInt(r.header.Get("webhook-timestamp"), 10, 64)
	if age := time.Since(time.Unix(at, 0)); err != nil || age > 5*time.Minute || age < -5*time.Minute {
		return fmt.Errorf("webhook-timestamp %d, %v", at, err)
	}
	mac := hmac.New(sha256.New, key)
	io.WriteString(mac, r.header.Get("webhook-id")+"."+r.header.Get("webhook-timestamp")+"."+r.body)
	sent, err := base64.StdEncoding.DecodeString(strings.TrimPrefix(r.header.Get("webhook-signature"), "v1,"))
	if err != nil || !hmac.Equal(sent, mac.Sum(nil)) {
		return fmt.Errorf("webhook-signature %q, %v", r.header.Get("webhook-signature"), err)
	}
	return nil
}

// shownWebhook is a webhook as a client reads it.
type shownWebhook struct {
	ID              int64
	Secret, Status  string
	Waiting, Failed int
	Last            *struct{ Error *errorJSON } `json:"last_delivery"`
	Failures        []struct {
		ID       string
		Attempts int
		Error    errorJSON
	}
}

func (i *instance) hook(t *testing.T, url string) (hook shownWebhook) {
	t.Helper()
	i.call(t, "POST", "/webhooks", map[string]any{"url": url}, &hook)
	return hook
}

func (i *instance) readHook(t *testing.T, id int64) (hook shownWebhook) {
	t.Helper()
	i.call(t, "GET", fmt.Sprintf("/webhooks/%d", id), nil, &hook)
	return hook
}

// Each event arrives, signed, with the URLs that the API shows; after a failure
// once more, under the same id.
func TestWebhookTellsWhatHappens(t *testing.T) {
	t.Parallel()
	eachDeployment(t, func(t *testing.T, api *instance) {
		hooks := newReceiver(t, func(n int, _ received, w http.ResponseWriter) {
			if n == 0 {
				w.WriteHeader(http.StatusServiceUnavailable)
			}
		})
		photos := newPhotoServer(t)
		hook := api.hook(t, hooks.URL)
		p := api.settled(t, api.post(t, photos.serve("/a", jpegPhoto(t, 50, 50))).ID)
		ready := hooks.await(t, "image.ready")
		eventually(t, "all is delivered", func() bool { return api.readHook(t, hook.ID).Waiting == 0 })
		got := hooks.all()
		ids := make(map[string]string)
		for _, one := range got {
			if err := one.verified(hook.Secret); err != nil {
				t.Error(err)
			}
			id := one.header.Get("webhook-id")
			if body, seen := ids[id]; seen && body != one.body {
				t.Errorf("%s is\n%s\nand was\n%s", id, one.body, body)
			}
			ids[id] = one.body
		}
		if len(got) != 3 || len(ids) != 2 || !strings.Contains(ready.body, `"url":"`+p.Images[0].URL+`"`) || p.Images[0].URL == "" {
			t.Errorf("%d requests with %d ids: %v\nthe product: %+v", len(got), len(ids), got, p)
		}
		if after := api.readHook(t, hook.ID); after.Failed != 0 || after.Secret != "" || after.Last == nil || after.Last.Error != nil {
			t.Errorf("the webhook after that: %+v", after)
		}
	})
}

// A webhook leads to no address that images may not come from: not a packet goes
// there. The failure can be read.
func TestWebhookToAForbiddenAddressSendsNothing(t *testing.T) {
	t.Parallel()
	port := canary(t)
	api := start(t, environment(map[string]string{"DATA_DIR": t.TempDir(), "IMAGE_ALLOW_PRIVATE": "false"}))
	hook := api.hook(t, "http://127.0.0.1:"+port)
	api.post(t)
	var shown shownWebhook
	eventually(t, "the delivery has failed", func() bool { shown = api.readHook(t, hook.ID); return shown.Failed == 1 })
	if code := shown.Failures[0].Error.Code; code != "forbidden_address" && code != "forbidden_port" || shown.Waiting != 0 || shown.Last.Error == nil {
		t.Errorf("it is %+v", shown)
	}
}

// A receiver that answers 410 gets nothing more. It can be brought back, and gets
// what it has missed.
func TestWebhookThatIsGone(t *testing.T) {
	t.Parallel()
	eachDatabase(t, func(t *testing.T, env map[string]string) {
		api := start(t, env)
		hooks := newReceiver(t, func(n int, _ received, w http.ResponseWriter) {
			if n == 0 {
				w.WriteHeader(http.StatusGone)
			}
		})
		hook := api.hook(t, hooks.URL)
		api.post(t)
		var shown shownWebhook
		eventually(t, "the webhook is gone", func() bool { shown = api.readHook(t, hook.ID); return shown.Status == "gone" })
		if shown.Failed != 1 || shown.Waiting != 0 || shown.Failures[0].Error.Code != "http_410" || shown.Failures[0].Attempts != 1 {
			t.Errorf("it is %+v", shown)
		}
		missed := api.post(t)
		other := newReceiver(t, nil)
		api.hook(t, other.URL)
		api.post(t)
		other.await(t, "product.created")
		if n := len(hooks.all()); n != 1 {
			t.Errorf("%d requests came to a receiver that is gone", n)
		}
		api.call(t, "POST", fmt.Sprintf("/webhooks/%d/replay", hook.ID), nil, nil)
		eventually(t, "it has got all it missed", func() bool { return len(hooks.all()) == 4 })
		if !slices.ContainsFunc(hooks.all(), func(r received) bool {
			return strings.Contains(r.body, fmt.Sprintf(`"product_id":%d,`, missed.ID))
		}) {
			t.Errorf("it was not told of product %d: %v", missed.ID, hooks.all())
		}
	})
}

// What fails for good is shown with its reason, after the tries that images have.
func TestWebhookDeliveryIsGivenUp(t *testing.T) {
	t.Parallel()
	api := start(t, environment(map[string]string{"DATA_DIR": t.TempDir(), "RETRY_ATTEMPTS": "3"}))
	hooks := newReceiver(t, func(n int, r received, w http.ResponseWriter) {
		if n < 3 {
			w.WriteHeader(http.StatusBadGateway)
		}
	})
	hook := api.hook(t, hooks.URL)
	api.post(t)
	var shown shownWebhook
	eventually(t, "the delivery has failed", func() bool { shown = api.readHook(t, hook.ID); return shown.Failed == 1 })
	got := hooks.all()
	if f := shown.Failures[0]; len(got) != 3 || f.Attempts != 3 || f.Error.Code != "http_502" || f.ID != got[0].header.Get("webhook-id") {
		t.Errorf("after %d requests %+v", len(got), shown)
	}
	api.call(t, "POST", fmt.Sprintf("/webhooks/%d/replay", hook.ID), nil, nil)
	eventually(t, "the replay is delivered", func() bool {
		shown = api.readHook(t, hook.ID)
		return shown.Failed == 0 && shown.Waiting == 0
	})
	if got = hooks.all(); len(got) != 4 || got[3].header.Get("webhook-id") != got[0].header.Get("webhook-id") {
		t.Errorf("the replay came as %v", got[3:])
	}
	api.log.await(t, `"msg":"webhook delivered"`, `"webhook_id":1`, `"product_id":1`)
}

// A receiver that does not answer holds up itself alone.
func TestSlowReceiverHoldsUpNobodyElse(t *testing.T) {
	t.Parallel()
	api := start(t, environment(map[string]string{"DATA_DIR": t.TempDir()}))
	release := make(chan struct{})
	slow := newReceiver(t, func(int, received, http.ResponseWriter) { <-release })
	defer close(release)
	quick := newReceiver(t, nil)
	api.hook(t, slow.URL)
	api.hook(t, quick.URL)
	for round := range 3 { // each a look for what is due, or more
		for range webhookParallel {
			api.post(t)
		}
		eventually(t, "the quick receiver has all", func() bool { return len(quick.all()) == (round+1)*webhookParallel })
	}
	if n := len(slow.all()); n > webhookParallel {
		t.Errorf("%d at once to the slow receiver", n)
	}
}

// A delivery that hangs takes one place of its webhook's and no more, and holds up
// none of the others.
func TestHangingDeliveryHoldsUpNoOther(t *testing.T) {
	t.Parallel()
	api := start(t, environment(map[string]string{"DATA_DIR": t.TempDir()}))
	release := make(chan struct{})
	hooks := newReceiver(t, func(n int, _ received, _ http.ResponseWriter) {
		if n == 1 {
			<-release
		}
	})
	defer close(release)
	api.hook(t, hooks.URL)
	for n := range 4 {
		api.post(t)
		eventually(t, "the newest has arrived", func() bool { return len(hooks.all()) == n+1 })
	}
}

// A program that ends before an event was sent leaves it to the next.
func TestWebhookOutlivesTheProgram(t *testing.T) {
	t.Parallel()
	eachDatabase(t, func(t *testing.T, env map[string]string) {
		hooks := newReceiver(t, func(n int, _ received, w http.ResponseWriter) {
			if n == 0 {
				w.Header().Set("Retry-After", "3600")
				w.WriteHeader(http.StatusServiceUnavailable)
			}
		})
		first := start(t, env)
		hook := first.hook(t, hooks.URL)
		first.post(t)
		first.log.await(t, "webhook delivery will be tried again")
		if err := first.stop(); err != nil {
			t.Fatal(err)
		}
		alter(t, env, `UPDATE deliveries SET run_at = '2026-01-01 00:00:00.000'`)
		second := start(t, env)
		eventually(t, "the rest is delivered", func() bool { return second.readHook(t, hook.ID).Waiting == 0 && len(hooks.all()) == 2 })
		if got := hooks.all(); got[0].header.Get("webhook-id") != got[1].header.Get("webhook-id") {
			t.Errorf("delivered %v", got)
		}
	})
}

// hookOn stores a webhook of all products.
func hookOn(t *testing.T, s *store, url string) webhook {
	t.Helper()
	hook, err := s.CreateWebhook(t.Context(), webhook{URL: url, Secret: newWebhookSecret()})
	if err != nil {
		t.Fatal(err)
	}
	return hook
}

// giveUpDelivery claims a webhook's next delivery, which then fails for good.
func giveUpDelivery(t *testing.T, s *store, to webhook, why *imageError, gone bool) {
	t.Helper()
	_, claimed, err := s.ClaimDeliveries(t.Context(), to.ID, 1, 1)
	if err == nil {
		err = s.SettleUndelivered(t.Context(), to.ID, claimed[0], failure{imageError: why}, gone)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// makeDeliveries makes all that there is to make, and waits until it is so many.
func makeDeliveries(t *testing.T, s *store, hook webhook, want int) {
	t.Helper()
	eventually(t, "the deliveries are made", func() bool {
		if _, err := s.MakeDeliveries(t.Context(), feedPage, func(e event) []byte { return []byte(e.What) }); err != nil {
			t.Fatal(err)
		}
		shown, err := s.Webhook(t.Context(), hook.ID)
		return err == nil && shown.Waiting >= want
	})
}

// However many processes make deliveries at once, an event is one for each
// webhook that it is for.
func TestDeliveriesAreMadeOnce(t *testing.T) {
	t.Parallel()
	eachStore(t, func(t *testing.T, s *store) {
		before := create(t, s)
		other := addUser(t, s)
		eventually(t, "the event can be read", func() bool { return len(logged(t, s, place{})) == 1 })
		all, theirs := hookOn(t, s, "http://a.example"), webhook{UserID: &other, URL: "http://b.example", Secret: newWebhookSecret()}
		theirs, err := s.CreateWebhook(t.Context(), theirs)
		if err != nil {
			t.Fatal(err)
		}
		const products = 20
		var making sync.WaitGroup
		for n := range 4 {
			making.Go(func() {
				for range products / 4 {
					p := Product{UserID: 1, Name: "x"}
					if n == 0 {
						p.UserID = other
					}
					_, err := s.CreateProduct(t.Context(), p, origin{}, nil)
					if err == nil {
						_, err = s.MakeDeliveries(t.Context(), 1, func(e event) []byte { return []byte(e.What) })
					}
					if err != nil {
						t.Error(err)
					}
				}
			})
		}
		making.Wait()
		eventually(t, "the events can be read", func() bool { return len(logged(t, s, place{})) == 1+products })
		late := hookOn(t, s, "http://c.example") // while the others have some of it before them
		makeDeliveries(t, s, all, products)
		makeDeliveries(t, s, theirs, products/4)
		if shown, err := s.Webhook(t.Context(), late.ID); err != nil || shown.Waiting != 0 {
			t.Errorf("%d deliveries of what was before the webhook, %v", shown.Waiting, err)
		}
		_, claimed, err := s.ClaimDeliveries(t.Context(), all.ID, 1, 1000)
		ids := make(map[int64]bool)
		for _, d := range claimed {
			ids[d.EventID] = true
		}
		if err != nil || len(claimed) != products || len(ids) != products || claimed[0].ProductID == before.ID {
			t.Errorf("%d deliveries of %d events, %v", len(claimed), len(ids), err)
		}
		if _, claimed, err := s.ClaimDeliveries(t.Context(), theirs.ID, 1, 1000); err != nil || len(claimed) != products/4 {
			t.Errorf("%d deliveries for another user's webhook, %v", len(claimed), err)
		}
	})
}

// A webhook that is back is given what it has missed, by and by; the others, which
// have had it, are not given it again.
func TestWebhookThatIsBackCatchesUp(t *testing.T) {
	t.Parallel()
	eachStore(t, func(t *testing.T, s *store) {
		ahead, gone := hookOn(t, s, "http://a.example"), hookOn(t, s, "http://b.example")
		create(t, s)
		makeDeliveries(t, s, gone, 1)
		giveUpDelivery(t, s, gone, permanent("http_410", "410"), true)
		create(t, s)
		create(t, s)
		makeDeliveries(t, s, ahead, 3)
		if n, err := s.ReplayDeliveries(t.Context(), gone.ID); n != 1 || err != nil {
			t.Fatal(n, err)
		}
		create(t, s)
		eventually(t, "the news are settled", func() bool {
			var n int
			return queryRow(t.Context(), s, []any{&n}, `SELECT count(*) FROM settled_events`) == nil && n == 4
		})
		wantWaiting := func(hook webhook, want int) {
			t.Helper()
			if shown, err := s.Webhook(t.Context(), hook.ID); err != nil || shown.Waiting != want {
				t.Errorf("%d deliveries wait for webhook %d, want %d: %v", shown.Waiting, hook.ID, want, err)
			}
		}
		for n := 2; n <= 5; n++ {
			more, err := s.MakeDeliveries(t.Context(), 1, func(e event) []byte { return []byte(e.What) })
			if more != (n <= 4) || err != nil {
				t.Fatalf("more: %t, %v", more, err)
			}
			wantWaiting(ahead, 4) // at once
			wantWaiting(gone, min(n, 4))
		}
	})
}

// Somebody's webhook does not wait until a product of theirs is stored, nor the
// product for the webhook. (SQLite has one writer at a time.)
func TestWebhookIsStoredBesideProducts(t *testing.T) {
	t.Parallel()
	s, db := postgresStore(t)
	err := db.InTx(t.Context(), func(tx querier) error {
		_, err := tx.Exec(t.Context(), `INSERT INTO products (user_id, product_name, name_folded, product_description, price_cents, created_at, updated_at)
			VALUES (1, '', '', '', 0, now(), now())`)
		if err != nil {
			return err
		}
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		defer cancel()
		_, err = s.CreateWebhook(ctx, webhook{UserID: new(int64(1)), URL: "http://a.example", Secret: newWebhookSecret()})
		return err
	})
	if err != nil {
		t.Error(err)
	}
}

// A replay ends, and what it has queued is given up with its reason, though the
// receiver says meanwhile that it wants no more.
func TestReplayToAWebhookThatIsGoneEnds(t *testing.T) {
	t.Parallel()
	eachStore(t, func(t *testing.T, s *store) {
		hook := hookOn(t, s, "http://a.example")
		create(t, s)
		makeDeliveries(t, s, hook, 1)
		giveUpDelivery(t, s, hook, permanent("http_404", "404"), false)
		again := &retiringDB{database: s.database, id: hook.ID}
		if n, err := newStore(again).ReplayDeliveries(t.Context(), hook.ID); n != 0 || err != nil {
			t.Errorf("%d replayed, %v", n, err)
		}
		insert := `INSERT INTO deliveries (webhook_id, event_id, product_id, body, run_at) VALUES ($1, 1, 1, '', $2)`
		if _, err := s.Exec(t.Context(), insert, hook.ID, s.now()); err != nil {
			t.Fatal(err)
		}
		if err := s.ForgetDeliveries(t.Context()); err != nil {
			t.Fatal(err)
		}
		failed, err := s.FailedDeliveries(t.Context(), hook.ID, 10)
		if err != nil || len(failed) != 2 || failed[0].Code != "http_410" || failed[1].Code != "http_404" {
			t.Errorf("failed: %+v, %v", failed, err)
		}
	})
}

// retiringDB has a webhook gone again as soon as it is back.
type retiringDB struct {
	database
	id int64
}

func (d *retiringDB) Exec(ctx context.Context, sql string, args ...any) (int64, error) {
	n, err := d.database.Exec(ctx, sql, args...)
	if sql == reviveWebhook && err == nil {
		_, err = d.database.Exec(ctx, retireWebhook, d.id, time.Now().UTC())
	}
	return n, err
}

// A claim is a lease: what its process did not settle is due again, and then the
// first process has no say in it.
func TestDeliveryIsClaimedForATime(t *testing.T) {
	t.Parallel()
	eachStore(t, func(t *testing.T, s *store) {
		hook := hookOn(t, s, "http://a.example")
		create(t, s)
		makeDeliveries(t, s, hook, 1)
		claim := func(claim int64) []delivery {
			_, claimed, err := s.ClaimDeliveries(t.Context(), hook.ID, claim, 10)
			if err != nil {
				t.Fatal(err)
			}
			return claimed
		}
		first := claim(1)
		if second := claim(2); len(first) != 1 || len(second) != 0 {
			t.Fatalf("claimed %v, and again %v", first, second)
		}
		advance(s, deliveryLease+time.Second)
		second := claim(3)
		if len(second) != 1 {
			t.Fatal("it is not due again after its lease")
		}
		late := failure{imageError: permanent("http_404", "404")}
		if err := errors.Join(s.SettleUndelivered(t.Context(), hook.ID, first[0], late, false), s.SettleDelivered(t.Context(), hook.ID, first[0]),
			s.GiveBackDelivery(t.Context(), first[0])); err != nil {
			t.Fatal(err)
		}
		if shown, err := s.Webhook(t.Context(), hook.ID); err != nil || shown.Waiting != 1 || shown.Failed != 0 || len(claim(4)) != 0 {
			t.Errorf("after the late settlement: %+v, %v", shown, err)
		}
	})
}

// The least wait that a receiver asks for is kept.
func TestReceiverSaysWhenToComeBack(t *testing.T) {
	t.Parallel()
	eachStore(t, func(t *testing.T, s *store) {
		hook := hookOn(t, s, "http://a.example")
		create(t, s)
		makeDeliveries(t, s, hook, 1)
		d := newDeliverer(s, encoder{}, fetchLimits{}, imageSettings{RetryAttempts: 2, RetryBase: time.Millisecond}, slog.New(slog.DiscardHandler))
		d.post = func(context.Context, string, http.Header, []byte) error {
			return &imageError{Code: "http_503", RetryAfter: time.Hour}
		}
		d.lane(t.Context(), hook.ID)
		for _, want := range []int{0, 1} {
			if due, err := s.DueWebhooks(t.Context()); err != nil || len(due) != want {
				t.Errorf("due: %v, %v, want %d", due, err, want)
			}
			advance(s, time.Hour+time.Second)
		}
	})
}

// A webhook that is deleted gets nothing more, and leaves nothing behind.
func TestDeletedWebhookGetsNothing(t *testing.T) {
	t.Parallel()
	eachStore(t, func(t *testing.T, s *store) {
		hook := hookOn(t, s, "http://a.example")
		create(t, s)
		create(t, s)
		makeDeliveries(t, s, hook, 2)
		_, claimed, err := s.ClaimDeliveries(t.Context(), hook.ID, 1, 1)
		if err != nil {
			t.Fatal(err)
		}
		if err := s.DeleteWebhook(t.Context(), hook.ID); err != nil {
			t.Fatal(err)
		}
		if due, err := s.DueWebhooks(t.Context()); err != nil || len(due) != 0 {
			t.Errorf("due: %v, %v", due, err)
		}
		if _, _, err := s.ClaimDeliveries(t.Context(), hook.ID, 1, 10); !errors.Is(err, errNotFound) {
			t.Errorf("claimed of it: %v", err)
		}
		if err := s.SettleDelivered(t.Context(), hook.ID, claimed[0]); err != nil {
			t.Errorf("settling what was being sent: %v", err)
		}
		var left int
		if err := queryRow(t.Context(), s, []any{&left}, `SELECT count(*) FROM deliveries`); err != nil || left != 0 {
			t.Errorf("%d deliveries are left, %v", left, err)
		}
		create(t, s)
		if more, err := s.MakeDeliveries(t.Context(), feedPage, nil); more || err != nil {
			t.Errorf("more deliveries: %t, %v", more, err)
		}
	})
}

// Events stay until every webhook has been given them; deliveries that were given
// up go after a week.
func TestWebhooksKeepWhatTheyNeed(t *testing.T) {
	t.Parallel()
	eachStore(t, func(t *testing.T, s *store) {
		hook := hookOn(t, s, "http://a.example")
		create(t, s)
		create(t, s)
		advance(s, eventTime+time.Minute)
		if err := s.ForgetEvents(t.Context()); err != nil {
			t.Fatal(err)
		}
		makeDeliveries(t, s, hook, 2)
		giveUpDelivery(t, s, hook, permanent("http_404", "404"), false)
		forget := func(want int) {
			t.Helper()
			if err := s.ForgetDeliveries(t.Context()); err != nil {
				t.Fatal(err)
			}
			if shown, err := s.Webhook(t.Context(), hook.ID); err != nil || shown.Failed != want || shown.Waiting != 1 {
				t.Errorf("%+v, %v, want %d failed", shown, err, want)
			}
		}
		forget(1)
		advance(s, failedDeliveryTime+time.Minute)
		forget(0)
	})
}

// An outage of the database between a delivery and its settlement costs no
// attempt, and sends nothing twice if it is short.
func TestDeliveryOutlivesTheDatabase(t *testing.T) {
	t.Parallel()
	s, line := behindProxy(t)
	hooks := newReceiver(t, func(int, received, http.ResponseWriter) { line.Cut() })
	hook := hookOn(t, s, hooks.URL)
	d := newDeliverer(s, encoder{}, fetchLimits{AllowPrivate: true}, imageSettings{RetryAttempts: 6, RetryBase: time.Millisecond}, slog.New(slog.DiscardHandler))
	create(t, s)
	makeDeliveries(t, s, hook, 1)
	var lane sync.WaitGroup
	lane.Go(func() { d.lane(t.Context(), hook.ID) })
	eventually(t, "the delivery has arrived", func() bool { return len(hooks.all()) == 1 })
	eventually(t, "the database is away", func() bool { return s.Ping(t.Context()) != nil })
	line.Restore(t)
	lane.Wait()
	if shown, err := s.Webhook(t.Context(), hook.ID); err != nil || shown.Waiting+shown.Failed != 0 || shown.LastCode != "" || len(hooks.all()) != 1 {
		t.Errorf("%+v, %v; %d requests", shown, err, len(hooks.all()))
	}
}

// What is being sent when the program ends is given back, with no attempt counted,
// for after a pause: what kept it from being sent may last.
func TestDeliveryIsGivenBackAtTheEnd(t *testing.T) {
	t.Parallel()
	eachStore(t, func(t *testing.T, s *store) {
		ctx, end := context.WithCancel(t.Context())
		hooks := newReceiver(t, func(int, received, http.ResponseWriter) { end(); <-t.Context().Done() })
		hook := hookOn(t, s, hooks.URL)
		d := newDeliverer(s, encoder{}, fetchLimits{AllowPrivate: true}, imageSettings{RetryAttempts: 6, RetryBase: time.Millisecond}, slog.New(slog.DiscardHandler))
		create(t, s)
		makeDeliveries(t, s, hook, 1)
		now := s.now()
		s.now = func() time.Time { return now }
		d.lane(ctx, hook.ID)
		if shown, err := s.Webhook(t.Context(), hook.ID); err != nil || shown.LastAt != nil || shown.Waiting != 1 || len(hooks.all()) != 1 {
			t.Errorf("%+v, %v; %d requests", shown, err, len(hooks.all()))
		}
		if due, err := s.DueWebhooks(t.Context()); err != nil || len(due) != 0 {
			t.Errorf("due at once are %v, %v", due, err)
		}
		advance(s, refusedDelay)
		if _, claimed, err := s.ClaimDeliveries(t.Context(), hook.ID, 1, 1); err != nil || len(claimed) != 1 || claimed[0].Attempts != 0 {
			t.Errorf("due again are %+v, %v", claimed, err)
		}
	})
}

// The answer's status is all that counts: a redirect is a failure and is not
// followed, a body without end is not waited for.
func TestPostLooksAtTheStatusAlone(t *testing.T) {
	t.Parallel()
	elsewhere := newReceiver(t, nil)
	for name, c := range map[string]struct {
		answer http.HandlerFunc
		code   string
		wait   time.Duration
	}{
		"204": {func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(204) }, "", 0},
		"a body without end": {func(w http.ResponseWriter, r *http.Request) {
			for r.Context().Err() == nil {
				w.Write(make([]byte, 4096))
			}
		}, "", 0},
		"a redirect": {func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, elsewhere.URL, http.StatusTemporaryRedirect)
		}, "http_307", 0},
		"400": {func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(400) }, "http_400", 0},
		"later": {func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Retry-After", "7")
			w.WriteHeader(429)
		}, "http_429", 7 * time.Second},
	} {
		t.Run(name, func(t *testing.T) {
			web := httptest.NewServer(c.answer)
			defer web.Close()
			f := newFetcher(fetchLimits{AllowPrivate: true, Timeout: 20 * time.Second})
			defer f.transport.CloseIdleConnections()
			start := time.Now()
			err := f.Post(t.Context(), web.URL, http.Header{}, []byte("{}"))
			if took := time.Since(start); took > 10*time.Second {
				t.Errorf("took %v", took)
			}
			var failed *imageError
			if errors.As(err, &failed); c.code == "" && err != nil || c.code != "" && (failed == nil || failed.Code != c.code || failed.RetryAfter != c.wait) {
				t.Errorf("answered %v", err)
			}
		})
	}
	if n := len(elsewhere.all()); n != 0 {
		t.Errorf("a redirect was followed %d times", n)
	}
}

// A webhook is its user's and the admins'. For others it is not there.
func TestWebhooksAreTheirUsers(t *testing.T) {
	t.Parallel()
	a := newTokenAPI(t)
	user := tokenOf(t, a.api, caller{1, false})
	as := func(token, method, path, body string) answer {
		t.Helper()
		return a.do(t, method, path, body, "Authorization", token)
	}
	mine := as(user, "POST", "/webhooks", `{"url":"https://shop.example/hook"}`)
	if mine.Code != 201 || mine.json["user_id"] != 1.0 || !strings.HasPrefix(mine.json["secret"].(string), "whsec_") || mine.Header().Get("Location") != "/webhooks/1" {
		t.Fatalf("%d %s", mine.Code, mine.Body)
	}
	const given = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
	ofAll := as(a.admin, "POST", "/webhooks", `{"url":"https://shop.example/all","secret":"`+given+`","user_id":null}`)
	if ofAll.Code != 201 || ofAll.json["user_id"] != nil || ofAll.json["secret"] != given {
		t.Errorf("an admin's: %d %s", ofAll.Code, ofAll.Body)
	}
	as(user, "POST", "/webhooks", `{"url":"https://shop.example/hook","user_id":2}`).wantProblem(t, 403)
	for token, want := range map[string]int{user: 1, a.stranger: 0, a.admin: 2} {
		list := as(token, "GET", "/webhooks", "")
		if items := list.json["items"].([]any); len(items) != want || strings.Contains(list.Body.String(), "whsec_") {
			t.Errorf("%d webhooks are listed, want %d: %s", len(items), want, list.Body)
		}
	}
	for _, request := range [][2]string{{"GET", "/webhooks/1"}, {"DELETE", "/webhooks/1"}, {"POST", "/webhooks/1/replay"}, {"GET", "/webhooks/2"}} {
		as(a.stranger, request[0], request[1], "").wantProblem(t, 404)
	}
	as(user, "GET", "/webhooks/2", "").wantProblem(t, 404)
	if one := as(user, "GET", "/webhooks/1", ""); one.Code != 200 || strings.Contains(one.Body.String(), "whsec_") || one.json["status"] != "active" {
		t.Errorf("one: %d %s", one.Code, one.Body)
	}
	if got := as(a.admin, "POST", "/webhooks/1/replay", ""); got.Code != 202 || got.json["replayed"] != 0.0 {
		t.Errorf("replay: %d %s", got.Code, got.Body)
	}
	if got := as(user, "DELETE", "/webhooks/1", ""); got.Code != 204 {
		t.Errorf("deleted: %d %s", got.Code, got.Body)
	}
	as(user, "GET", "/webhooks/1", "").wantProblem(t, 404)
}

func TestWebhooksAreCheckedAndCounted(t *testing.T) {
	t.Parallel()
	a := newAPI(t)
	for body, fields := range map[string][]string{
		`{}`: {"url"}, `{"url":null}`: {"url"}, `{"url":7}`: {"url"}, `{"url":"ftp://a.example"}`: {"url"}, `{"url":"https://u:p@a.example"}`: {"url"},
		`{"url":"https://a.example","secret":"whsec_c2hvcnQ=","user_id":0}`:                          {"secret", "user_id"},
		`{"url":"https://a.example","secret":"MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"}`:                    {"secret"},
		`{"url":"https://a.example","user_id":4711}`:                                                 {"user_id"},
		`{"url":"https://a.example","secret":"whsec_` + strings.Repeat("A", 88) + `","user_id":"x"}`: {"secret", "user_id"},
	} {
		a.do(t, "POST", "/webhooks", body).wantProblem(t, 422, fields...)
	}
	for range maxWebhooks {
		if got := a.do(t, "POST", "/webhooks", `{"url":"https://a.example"}`); got.Code != 201 {
			t.Fatalf("%d %s", got.Code, got.Body)
		}
	}
	a.do(t, "POST", "/webhooks", `{"url":"https://a.example"}`).wantProblem(t, 422, "url")
	if got := a.do(t, "POST", "/webhooks", `{"url":"https://a.example","user_id":1}`); got.Code != 201 {
		t.Errorf("another owner's: %d %s", got.Code, got.Body)
	}
}
