package main

import (
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"strconv"
	"sync"
	"time"

	"github.com/VictoriaMetrics/metrics"
)

const (
	// webhookPoll is how often a process looks for events and for deliveries whose
	// time has come.
	webhookPoll = 500 * time.Millisecond
	// webhookTimeout is for one delivery, from the first dial to the answer.
	webhookTimeout = 15 * time.Second
	// webhookParallel is how many deliveries a process sends to one webhook at once,
	// each in a lane.
	webhookParallel = 4
	// deliveryLease is what a process has for sending what it has claimed, and for
	// writing down what has become of it.
	deliveryLease = 2 * webhookTimeout
	// webhookAnswer is how much of an answer's body is read, for the sake of the
	// connection: nobody looks at it.
	webhookAnswer    = 16 << 10
	webhookUserAgent = "pms/1 (webhooks)"
)

// deliverer makes deliveries of the events, and sends them. Each webhook has lanes
// of its own, so that a slow receiver holds up none but itself.
type deliverer struct {
	store    *store
	encoder  encoder
	post     func(ctx context.Context, url string, header http.Header, body []byte) error
	settings imageSettings // of its retries, which are as those of images
	log      *slog.Logger
	mu       sync.Mutex
	lanes    map[int64]int // by webhook, how many are open
}

func newDeliverer(db *store, enc encoder, limits fetchLimits, settings imageSettings, log *slog.Logger) *deliverer {
	limits.Timeout = webhookTimeout
	return &deliverer{
		store: db, encoder: enc, post: newFetcher(limits).Post,
		settings: settings, log: log.With("stage", "webhooks"), lanes: make(map[int64]int),
	}
}

// Run makes and sends deliveries until ctx ends. What is being sent then is given
// back, and may so arrive twice.
func (d *deliverer) Run(ctx context.Context) error {
	health := healthLog{log: d.log}
	poll := time.NewTicker(webhookPoll)
	defer poll.Stop()
	var lanes sync.WaitGroup
	defer lanes.Wait()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-poll.C:
		}
		health.note(ctx, d.work(ctx, &lanes), "webhooks cannot be served, retrying", "webhooks are served again")
	}
}

// work makes deliveries of new events, and opens a lane more for each webhook that
// has something due, be it because a delivery hangs in each of those it has. A long
// log becomes deliveries in several turns, so that those which are due need not wait.
func (d *deliverer) work(ctx context.Context, lanes *sync.WaitGroup) error {
	for more, until := true, time.Now().Add(webhookPoll); more && time.Now().Before(until); {
		var err error
		if more, err = d.store.MakeDeliveries(ctx, feedPage, d.body); err != nil {
			return err
		}
	}
	due, err := d.store.DueWebhooks(ctx)
	for _, id := range due {
		if d.enter(id) {
			lanes.Go(func() {
				defer d.leave(id)
				d.lane(ctx, id)
			})
		}
	}
	return err
}

func (d *deliverer) enter(webhookID int64) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.lanes[webhookID] == webhookParallel {
		return false
	}
	d.lanes[webhookID]++
	return true
}

func (d *deliverer) leave(webhookID int64) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.lanes[webhookID]--; d.lanes[webhookID] == 0 {
		delete(d.lanes, webhookID)
	}
}

// webhookJSON is the body of a delivery, as Standard Webhooks has it.
type webhookJSON struct {
	Type      string   `json:"type"`
	Timestamp jsonTime `json:"timestamp"` // of the event
	Data      any      `json:"data"`
}

func (d *deliverer) body(e event) []byte {
	m := d.encoder.event(e)
	kind := m.name + "." + string(e.What)
	if e.What == imageChanged {
		kind = m.name + "." + string(e.Image.Status)
	}
	return bytes.TrimSpace(encodeJSON(webhookJSON{kind, jsonTime(e.CreatedAt), m.data}))
}

// lane sends what is due of one webhook, one after the other, until nothing is or
// one could not be sent for a reason of ours.
func (d *deliverer) lane(ctx context.Context, id int64) {
	for ctx.Err() == nil {
		to, claimed, err := d.store.ClaimDeliveries(ctx, id, rand.Int64(), 1)
		if err != nil && !errors.Is(err, errNotFound) && ctx.Err() == nil {
			d.log.Warn("deliveries cannot be claimed", "webhook_id", id, "err", err)
		}
		if err != nil || len(claimed) == 0 {
			return
		}
		if !d.deliver(ctx, to, claimed[0]) {
			return
		}
	}
}

// deliver sends one delivery and writes down what has become of it. It says whether
// it was sent at all.
func (d *deliverer) deliver(ctx context.Context, to webhook, one delivery) (sent bool) {
	log := one.on(d.log.With("webhook_id", to.ID, "event_id", one.EventID, "product_id", one.ProductID))
	start := time.Now()
	header, err := webhookHeader(to.Secret, one, start)
	if err == nil {
		err = d.post(ctx, to.URL, header, []byte(one.Body))
	}
	log = log.With("attempt", one.Attempts+1, "duration", time.Since(start).Seconds())
	var failed *imageError
	switch {
	case err == nil:
		d.settle(log, func(ctx context.Context) error { return d.store.SettleDelivered(ctx, to.ID, one) })
		deliveriesDone.Inc()
		log.Info("webhook delivered")
	case errors.As(err, &failed):
		d.fail(log, to, one, failed)
	default: // ours, or the end
		log.Info("delivery given back unfinished", "err", err)
		d.settle(log, func(ctx context.Context) error { return d.store.GiveBackDelivery(ctx, one) })
		return false
	}
	return true
}

// fail writes a failed try down. A receiver that says 410 Gone wants no more.
func (d *deliverer) fail(log *slog.Logger, to webhook, one delivery, why *imageError) {
	f := d.settings.failed(why, one.Attempts+1, d.store.now())
	gone := why.Code == "http_410"
	d.settle(log, func(ctx context.Context) error { return d.store.SettleUndelivered(ctx, to.ID, one, f, gone) })
	switch {
	case gone:
		deliveriesFailed.Inc()
		log.Warn("webhook gone, it gets no more", "code", why.Code, "err", why)
	case f.RetryAt.IsZero():
		deliveriesFailed.Inc()
		log.Warn("webhook delivery failed for good", "code", why.Code, "err", why)
	default:
		deliveriesRetried.Inc()
		log.Warn("webhook delivery will be tried again", "code", why.Code, "err", why, "retry_at", f.RetryAt)
	}
}

var (
	deliveriesDone    = metrics.NewCounter(`pms_webhook_deliveries_total{outcome="delivered"}`)
	deliveriesRetried = metrics.NewCounter(`pms_webhook_deliveries_total{outcome="retried"}`)
	deliveriesFailed  = metrics.NewCounter(`pms_webhook_deliveries_total{outcome="failed"}`)
)

// settle writes down what has become of a delivery, though the process ends or
// the database is away, for as long as its lease surely lasts. After that it is
// sent again, with no attempt counted.
func (d *deliverer) settle(log *slog.Logger, do func(context.Context) error) {
	ctx, cancel := context.WithTimeout(context.Background(), deliveryLease-webhookTimeout)
	defer cancel()
	pace := retryPace{least: minPersistDelay, most: maxPersistDelay}
	for {
		err := do(ctx)
		if err == nil {
			return
		}
		if sleep(ctx, pace.next()) != nil {
			log.Warn("delivery not settled, it will be sent again", "err", err)
			return
		}
	}
}

// webhookHeader is what the Standard Webhooks' receivers verify: the id is that
// of the event, at each try and for each webhook.
func webhookHeader(secret string, one delivery, now time.Time) (http.Header, error) {
	key, err := secretBytes(secret)
	if err != nil {
		return nil, err
	}
	id, timestamp := webhookID(one.EventID), strconv.FormatInt(now.Unix(), 10)
	mac := hmac.New(sha256.New, key)
	fmt.Fprintf(mac, "%s.%s.%s", id, timestamp, one.Body)
	header := http.Header{
		"Content-Type":      {"application/json"},
		"User-Agent":        {webhookUserAgent},
		"Webhook-Id":        {id},
		"Webhook-Timestamp": {timestamp},
		"Webhook-Signature": {"v1," + base64.StdEncoding.EncodeToString(mac.Sum(nil))},
	}
	if one.Traceparent != "" {
		header["Traceparent"] = []string{one.Traceparent}
	}
	return header, nil
}

func webhookID(eventID int64) string { return "evt_" + strconv.FormatInt(eventID, 10) }

// Post sends a body to a URL that a stranger gave, on connections that are guarded
// as Fetch's are. Any answer of 2xx is good; a redirect is not followed. Errors
// are as those of Fetch.
func (f *fetcher) Post(ctx context.Context, url string, header http.Header, body []byte) error {
	u, err := parseURL(url)
	if err != nil {
		return permanent("bad_url", "the URL %v", err)
	}
	timed, cancel := context.WithTimeout(ctx, f.limits.Timeout)
	defer cancel()
	req, err := http.NewRequestWithContext(timed, http.MethodPost, u.String(), bytes.NewReader(body))
	if err != nil {
		return permanent("bad_url", "the URL cannot be requested")
	}
	req.Header = header
	resp, err := f.transport.RoundTrip(req)
	if err != nil {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		return f.downloadError(timed, u, err)
	}
	defer resp.Body.Close()
	if resp.StatusCode < 200 || resp.StatusCode > 299 {
		return statusError(resp)
	}
	_, _ = io.CopyN(io.Discard, resp.Body, webhookAnswer) // however it ends: the receiver has it
	return nil
}
