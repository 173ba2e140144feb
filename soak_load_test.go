package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"
)

const (
	soakShelf  = 20  // products that are always there, and are read
	soakTomes  = 200 // others, so large that an export does not fit into the sockets
	soakPasses = 4   // how often each flow is gone through in a round of a long soak
)

// soakHanging are the flows that in a long soak wait until the program has enough
// of them. The others fill that time.
var soakHanging = []string{"a webhook that hangs", "silent connections"}

// soakFlows are what clients do, each from beginning to end: what it makes for
// longer it takes away again, or has a name that begins with "soak".
var soakFlows = map[string]func(*soakClient) error{
	"products with images": (*soakClient).images,
	"images that fail":     (*soakClient).failures,
	"reads":                (*soakClient).reads,
	"lists":                (*soakClient).lists,
	"changes":              (*soakClient).changes,
	"streams":              (*soakClient).streams,
	"webhooks":             (*soakClient).webhooks,
	"a webhook that hangs": (*soakClient).hangingWebhook,
	"import":               (*soakClient).brokenImport,
	"export":               (*soakClient).brokenExport,
	"idempotency keys":     (*soakClient).keys,
	"tokens":               (*soakClient).tokens,
	"pages":                (*soakClient).pages,
	"refusals":             (*soakClient).refusals,
	"aborted requests":     (*soakClient).aborted,
	"silent connections":   (*soakClient).silent,
}

// soakClient is who goes through a flow.
type soakClient struct {
	*soakWorld
	ctx  context.Context
	t    *testing.T // for commands alone
	name string     // of the products that it makes
}

// stock makes what is there all the time: the catalogue, another user, and a
// webhook of that one's to which nothing can be delivered.
func (w *soakWorld) stock(t *testing.T) {
	t.Helper()
	if out, code := runCommand(t, w.env, "user", "add", "-name", "Bea", "-email", "bea@example.com"); code != 0 {
		t.Fatal(out)
	}
	var rows []byte
	for n := range soakShelf {
		rows = append(rows, encodeJSON(soakProduct(fmt.Sprint("shelf ", n)))...)
	}
	tome := soakProduct("tome")
	tome["product_description"] = strings.Repeat("\U0001f45f", maxDescriptionLength)
	rows = append(rows, bytes.Repeat(encodeJSON(tome), soakTomes)...)
	c := &soakClient{soakWorld: w, ctx: t.Context(), t: t}
	if err := c.imported(rows, soakShelf+soakTomes); err != nil {
		t.Fatal(err)
	}
	err := inTurn(
		func() error {
			return c.ask("POST", "/webhooks", map[string]any{"url": w.hooks.URL + "/refuse", "user_id": 2}, nil, http.StatusCreated)
		},
		func() error {
			return c.ask("POST", "/products", map[string]any{"user_id": 2, "product_name": "Bea's", "product_price": 1}, nil, http.StatusCreated)
		})
	if err != nil {
		t.Fatal(err)
	}
}

// round has all flows gone through at once, and puts the shop in order.
func (w *soakWorld) round(t *testing.T) {
	t.Helper()
	before := w.requests.Load()
	group, ctx := errgroup.WithContext(t.Context())
	for name, flow := range soakFlows {
		group.Go(func() error {
			for range w.passes(name) {
				c := &soakClient{soakWorld: w, ctx: ctx, t: t, name: fmt.Sprintf("soak %d.", w.serial.Add(1))}
				if err := flow(c); err != nil {
					return fmt.Errorf("%s: %w", name, err)
				}
			}
			return nil
		})
	}
	if err := group.Wait(); err != nil {
		t.Fatalf("round %d: %v", w.count, err)
	}
	c := &soakClient{soakWorld: w, ctx: t.Context(), t: t}
	eventually(t, "nothing of the round is on sale any more", func() bool {
		n, err := c.clear("soak")
		if err != nil {
			t.Fatal(err)
		}
		return n == 0
	})
	w.count++
	w.sent += int(w.requests.Load() - before)
}

// passes is how often a flow is gone through in a round.
func (w *soakWorld) passes(name string) int {
	if w.patient && !slices.Contains(soakHanging, name) {
		return soakPasses
	}
	return 1
}

// inTurn takes steps up to the first that fails.
func inTurn(steps ...func() error) error {
	for _, step := range steps {
		if err := step(); err != nil {
			return err
		}
	}
	return nil
}

// ask sends a request and wants one of some statuses.
func (c *soakClient) ask(method, path string, body, out any, want ...int) error {
	return c.askWith(nil, method, path, body, out, want...)
}

func (c *soakClient) askWith(header http.Header, method, path string, body, out any, want ...int) error {
	response, err := c.api.sendWith(method, path, body, header, out)
	if err == nil && !slices.Contains(want, response.StatusCode) {
		err = errors.New(response.Status)
	}
	return wrap(err, "%s %s", method, path)
}

// create makes a product with images of these kinds, see chaosHost.
func (c *soakClient) create(kinds ...string) (p shown, err error) {
	sources := make([]string, len(kinds))
	for n, kind := range kinds {
		sources[n] = c.host.source(kind, c.serial.Add(1))
	}
	err = c.ask("POST", "/products", soakProduct(c.name, sources...), &p, http.StatusCreated)
	return p, err
}

func soakProduct(name string, sources ...string) map[string]any {
	return map[string]any{"user_id": 1, "product_name": name, "product_price": "1.50", "product_images": append([]string{}, sources...)}
}

func productPath(id int64) string { return fmt.Sprintf("/products/%d", id) }

// clear deletes the products with a name, which tells how many there were.
func (c *soakClient) clear(name string) (n int, err error) {
	var page struct{ Items []shown }
	if err := c.ask("GET", "/products?limit=200&name="+url.QueryEscape(name), nil, &page, http.StatusOK); err != nil {
		return 0, err
	}
	for _, p := range page.Items {
		if err := c.ask("DELETE", productPath(p.ID), nil, nil, http.StatusNoContent, http.StatusNotFound); err != nil {
			return 0, err
		}
	}
	return len(page.Items), nil
}

// listen reads a stream up to a text, and then breaks it off.
func (c *soakClient) listen(path, upTo, lastID string) (seen string, err error) {
	ctx, cancel := context.WithCancel(c.ctx)
	defer cancel()
	request, err := http.NewRequestWithContext(ctx, "GET", c.api.url+path, nil)
	if err != nil {
		return "", err
	}
	request.Header.Set("Last-Event-ID", lastID)
	response, err := c.api.web.Do(request)
	if err != nil {
		return "", err
	}
	defer response.Body.Close()
	for lines := bufio.NewReader(response.Body); !strings.Contains(seen, upTo); {
		line, err := lines.ReadString('\n')
		if seen += line; err != nil {
			return seen, fmt.Errorf("stream %s ends with %v before %q: %q", path, err, upTo, seen)
		}
	}
	return seen, nil
}

// made waits until no image of a product is pending.
func (c *soakClient) made(p *shown) error {
	if _, err := c.listen(productPath(p.ID)+"/events", "event: done", ""); err != nil {
		return err
	}
	return c.ask("GET", productPath(p.ID), nil, p, http.StatusOK)
}

// images are made, made again, replaced and deleted.
func (c *soakClient) images() error {
	p, err := c.create("photo", "photo", "changing", "slow", "flaky")
	if err != nil {
		return err
	}
	return inTurn(
		func() error { return c.made(&p) },
		func() error {
			return c.ask("POST", productPath(p.ID)+"/images/reprocess", nil, nil, http.StatusAccepted)
		},
		func() error { return c.made(&p) },
		func() error {
			patch := map[string]any{"product_images": []string{p.Images[0].Source, c.host.source("photo", c.serial.Add(1))}}
			return c.ask("PATCH", productPath(p.ID), patch, &p, http.StatusOK)
		},
		func() error { return c.made(&p) },
		func() error { return c.ask("DELETE", productPath(p.ID), nil, nil, http.StatusNoContent) })
}

// failures are read, replayed and discarded.
func (c *soakClient) failures() error {
	p, err := c.create("missing", "text", "broken", "elsewhere", "forbidden", "down", "flaky")
	if err != nil {
		return err
	}
	type letter struct {
		ID      int64
		Product int64 `json:"product_id"`
	}
	var dead struct{ Items []letter }
	list := func() error {
		err := c.ask("GET", "/dead-letters?limit=200", nil, &dead, http.StatusOK)
		dead.Items = slices.DeleteFunc(dead.Items, func(l letter) bool { return l.Product != p.ID })
		return err
	}
	path := func(n int) string { return fmt.Sprintf("/dead-letters/%d", dead.Items[n].ID) }
	return inTurn(
		func() error { return c.made(&p) }, list,
		func() error { return c.ask("GET", path(0), nil, nil, http.StatusOK) },
		func() error { return c.ask("POST", path(0)+"/replay", nil, nil, http.StatusAccepted) },
		func() error {
			return c.ask("POST", "/dead-letters/replay?code=not_an_image", nil, nil, http.StatusAccepted)
		},
		func() error { return c.made(&p) }, list,
		func() error {
			for n := range dead.Items {
				if err := c.ask("DELETE", path(n), nil, nil, http.StatusNoContent); err != nil {
					return err
				}
			}
			return nil
		})
}

// reads are hits, misses, unmodified, or of nothing.
func (c *soakClient) reads() error {
	var page struct{ Items []shown }
	if err := c.ask("GET", "/products?name=shelf&limit=5", nil, &page, http.StatusOK); err != nil {
		return err
	}
	for _, p := range page.Items {
		unless := http.Header{"If-None-Match": {etag(p.Version)}}
		nothing := productPath(1<<40 + c.serial.Add(1))
		err := inTurn(
			func() error { return c.ask("GET", productPath(p.ID), nil, nil, http.StatusOK) },
			func() error { return c.askWith(unless, "GET", productPath(p.ID), nil, nil, http.StatusNotModified) },
			func() error { return c.ask("GET", nothing, nil, nil, http.StatusNotFound) })
		if err != nil {
			return err
		}
	}
	return nil
}

// lists are read from page to page.
func (c *soakClient) lists() error {
	for _, sort := range []string{"id", "-product_price", "product_name", "-created_at"} {
		query := url.Values{"name": {"shelf"}, "limit": {"7"}, "sort": {sort}}
		for next := new(string); next != nil; {
			var page struct {
				Cursor *string `json:"next_cursor"`
			}
			if err := c.ask("GET", "/products?"+query.Encode(), nil, &page, http.StatusOK); err != nil {
				return err
			}
			if next = page.Cursor; next != nil {
				query.Set("cursor", *next)
			}
		}
	}
	return nil
}

// changes are PATCH, PUT, a lost update and DELETE; and one of the product whose
// events cannot be delivered.
func (c *soakClient) changes() error {
	p, err := c.create()
	if err != nil {
		return err
	}
	var beas struct{ Items []shown }
	stale := http.Header{"If-Match": {etag(p.Version)}}
	price := map[string]any{"product_price": c.serial.Load()}
	return inTurn(
		func() error { return c.ask("PATCH", productPath(p.ID), price, nil, http.StatusOK) },
		func() error {
			return c.askWith(stale, "PATCH", productPath(p.ID), price, nil, http.StatusPreconditionFailed)
		},
		func() error {
			whole := map[string]any{"product_name": c.name, "product_price": 2}
			return c.ask("PUT", productPath(p.ID), whole, nil, http.StatusOK)
		},
		func() error { return c.ask("DELETE", productPath(p.ID), nil, nil, http.StatusNoContent) },
		func() error { return c.ask("DELETE", productPath(p.ID), nil, nil, http.StatusNotFound) },
		func() error { return c.ask("GET", "/products?user_id=2", nil, &beas, http.StatusOK) },
		func() error { return c.ask("PATCH", productPath(beas.Items[0].ID), price, nil, http.StatusOK) })
}

// streams are broken off: of a product with an image in work, of all, and of all
// from a place on.
func (c *soakClient) streams() error {
	p, err := c.create("slow")
	if err != nil {
		return err
	}
	if _, err := c.listen(productPath(p.ID)+"/events", "event: ", ""); err != nil {
		return err
	}
	seen, err := c.listen("/events?user_id=1", "id: ", "")
	if err != nil {
		return err
	}
	_, id, _ := strings.Cut(seen, "id: ")
	for _, last := range []string{strings.TrimSpace(id), "1-1"} {
		if _, err := c.listen("/events", "\n\n", last); err != nil {
			return err
		}
	}
	return c.made(&p)
}

// webhooks are made, delivered to at the second try, and deleted.
func (c *soakClient) webhooks() error {
	hook, err := c.hook("/good/" + c.name)
	if err != nil {
		return err
	}
	path := fmt.Sprintf("/webhooks/%d", hook.ID)
	return inTurn(
		func() error { _, err := c.create(); return err },
		func() error {
			return c.await("a delivery arrives", func() bool { return c.hooks.at("/good/"+c.name).served.Load() > 0 })
		},
		func() error { return c.ask("GET", path, nil, nil, http.StatusOK) },
		func() error { return c.ask("GET", "/webhooks", nil, nil, http.StatusOK) },
		func() error { return c.ask("POST", path+"/replay", nil, nil, http.StatusAccepted) },
		func() error { return c.ask("DELETE", path, nil, nil, http.StatusNoContent) })
}

// hangingWebhook is deleted while its receiver hangs, which does so until the
// program gives up, or in a short soak for no longer.
func (c *soakClient) hangingWebhook() error {
	hook, err := c.hook("/hang/" + c.name)
	if err != nil {
		return err
	}
	at := c.hooks.at("/hang/" + c.name)
	return inTurn(
		func() error { _, err := c.create(); return err },
		func() error { return c.await("a delivery hangs", func() bool { return at.waiting.Load() > 0 }) },
		func() error {
			return c.ask("DELETE", fmt.Sprintf("/webhooks/%d", hook.ID), nil, nil, http.StatusNoContent)
		},
		func() error {
			if !c.patient {
				close(at.release)
			}
			return c.await("no delivery hangs", func() bool { return at.waiting.Load() == 0 })
		})
}

func (c *soakClient) hook(path string) (hook shownWebhook, err error) {
	err = c.ask("POST", "/webhooks", map[string]any{"url": c.hooks.URL + strings.ReplaceAll(path, " ", "%20")}, &hook, http.StatusCreated)
	return hook, err
}

func (c *soakClient) await(what string, holds func() bool) error {
	if !pollUntil(time.Now().Add(settleTime), func() bool { return c.ctx.Err() != nil || holds() }) {
		return fmt.Errorf("never came true: %s", what)
	}
	return c.ctx.Err()
}

// brokenImport breaks off an import that is being answered, and makes a whole one.
func (c *soakClient) brokenImport() error {
	row := encodeJSON(soakProduct(c.name, c.host.source("photo", c.serial.Add(1))))
	body, rows := io.Pipe()
	defer rows.Close()
	ctx, cancel := context.WithCancel(c.ctx)
	defer cancel()
	request, err := http.NewRequestWithContext(ctx, "POST", c.api.url+"/products/import", body)
	if err != nil {
		return err
	}
	request.Header.Set("Content-Type", string(ndjsonRows))
	go rows.Write(slices.Concat(row, row, row[:10])) // ends with the request
	response, err := c.api.web.Do(request)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	answer := json.NewDecoder(response.Body)
	for range 2 {
		var line importLine
		if err := answer.Decode(&line); err != nil || line.Status != rowCreated {
			return fmt.Errorf("import: %+v, %w", line, err)
		}
	}
	cancel()
	return c.imported(slices.Concat(row, row), 2)
}

// imported makes a whole import.
func (c *soakClient) imported(rows []byte, want int) error {
	response, err := c.api.web.Post(c.api.url+"/products/import", string(ndjsonRows), bytes.NewReader(rows))
	if err != nil {
		return err
	}
	defer response.Body.Close()
	text, err := io.ReadAll(response.Body)
	if err == nil && !strings.Contains(string(text), fmt.Sprintf(`"created":%d,`, want)) {
		err = fmt.Errorf("import: %s", text)
	}
	return err
}

// brokenExport breaks off an export that is not all sent.
func (c *soakClient) brokenExport() error {
	for _, query := range []string{"", "?format=csv"} {
		response, err := c.get(c.ctx, c.api.url+"/products/export"+query)
		if err != nil {
			return err
		}
		_, err = io.ReadFull(response.Body, make([]byte, 1000))
		response.Body.Close()
		if err != nil {
			return fmt.Errorf("export: %w", err)
		}
	}
	return nil
}

// keys: two at once with one key are one product, and so is a third; another body
// is refused.
func (c *soakClient) keys() error {
	key, other := http.Header{"Idempotency-Key": {c.name}}, soakProduct(c.name)
	other["product_price"] = 2
	var both errgroup.Group
	for range 2 {
		both.Go(func() error {
			return c.askWith(key, "POST", "/products", soakProduct(c.name), nil, http.StatusCreated, http.StatusConflict)
		})
	}
	return inTurn(both.Wait,
		func() error { return c.askWith(key, "POST", "/products", soakProduct(c.name), nil, http.StatusCreated) },
		func() error { return c.askWith(key, "POST", "/products", other, nil, http.StatusUnprocessableEntity) },
		func() error {
			if n, err := c.clear(c.name); n != 1 || err != nil {
				return fmt.Errorf("%d products of one key, %w", n, err)
			}
			return nil
		})
}

// tokens are made, used and revoked.
func (c *soakClient) tokens() error {
	token, code := runCommand(c.t, c.env, "token", "create", "-user", "1")
	list, listCode := runCommand(c.t, c.env, "token", "list")
	if code != 0 || listCode != 0 {
		return fmt.Errorf("%s %s", token, list)
	}
	lines := strings.Split(strings.TrimSpace(list), "\n")
	header := http.Header{"Authorization": {"Bearer " + strings.TrimSpace(token)}}
	unknown := http.Header{"Authorization": {"Bearer " + tokenPrefix + strings.Repeat("x", 43)}}
	return inTurn(
		func() error { return c.askWith(header, "GET", "/webhooks", nil, nil, http.StatusOK) },
		func() error { return c.askWith(header, "GET", "/overview", nil, nil, http.StatusForbidden) },
		func() error { return c.askWith(unknown, "GET", "/products", nil, nil, http.StatusUnauthorized) },
		func() error {
			if out, code := runCommand(c.t, c.env, "token", "revoke", strings.Fields(lines[len(lines)-1])[0]); code != 0 {
				return errors.New(out)
			}
			return nil
		})
}

func (c *soakClient) get(ctx context.Context, url string) (*http.Response, error) {
	request, err := http.NewRequestWithContext(ctx, "GET", url, nil)
	if err != nil {
		return nil, err
	}
	return c.api.web.Do(request)
}

// pages are for people and machines that look after the program.
func (c *soakClient) pages() error {
	for _, path := range []string{"/", "/console/app.js", "/openapi.yaml", "/healthz", "/readyz", "/overview", "/metrics", "/debug/pprof/", "/debug/pprof/goroutine"} {
		if _, err := c.api.page(path); err != nil {
			return err
		}
	}
	return nil
}

// refusals are answered with an error of each kind.
func (c *soakClient) refusals() error {
	large := map[string]any{"product_description": strings.Repeat("x", maxBody)}
	return inTurn(
		func() error {
			return c.ask("POST", "/products", map[string]any{"colour": "red"}, nil, http.StatusBadRequest)
		},
		func() error {
			return c.ask("POST", "/products", map[string]any{"user_id": 4711}, nil, http.StatusUnprocessableEntity)
		},
		func() error { return c.ask("POST", "/products", large, nil, http.StatusRequestEntityTooLarge) },
		func() error { return c.ask("GET", "/products?sort=colour", nil, nil, http.StatusUnprocessableEntity) },
		func() error { return c.ask("GET", "/nothing", nil, nil, http.StatusNotFound) },
		func() error { return c.ask("POST", "/healthz", nil, nil, http.StatusMethodNotAllowed) })
}

// aborted requests have a client that goes away at any moment.
func (c *soakClient) aborted() error {
	for n := range 12 {
		ctx, cancel := context.WithTimeout(c.ctx, rand.N(6*time.Millisecond))
		path := []string{"/products?limit=200", "/products/export", productPath(1), "/events"}[n%4]
		response, err := c.get(ctx, c.api.url+path)
		if err == nil {
			io.Copy(io.Discard, response.Body)
			response.Body.Close()
		}
		cancel()
	}
	return nil
}

// silent connections send nothing, or stop in the middle: of a header, of a body.
// In a long soak the server ends those that have not sent a header.
func (c *soakClient) silent() error {
	var group errgroup.Group
	half := "POST /products HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer " + c.admin + "\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{"
	for _, begin := range []string{"", "GET /products HT", half} {
		group.Go(func() error {
			conn, err := net.Dial("tcp", strings.TrimPrefix(c.api.url, "http://"))
			if err != nil {
				return err
			}
			defer conn.Close()
			if _, err := io.WriteString(conn, begin); err != nil {
				return err
			}
			if c.patient && begin != half {
				conn.SetDeadline(time.Now().Add(settleTime))
				_, err = io.Copy(io.Discard, conn)
			}
			return err
		})
	}
	return group.Wait()
}

// soakReceiver is a server for webhooks: /good/… answers the first request with a
// 503, /hang/… none until it is released, and everything else refuses.
type soakReceiver struct {
	*httptest.Server
	paths sync.Map // *soakHook by path
}

// soakHook is what happens at one path.
type soakHook struct {
	served, waiting atomic.Int64
	release         chan struct{}
}

func newSoakReceiver(t *testing.T) *soakReceiver {
	r := &soakReceiver{}
	r.Server = httptest.NewServer(r)
	t.Cleanup(func() { r.CloseClientConnections(); r.Close() })
	return r
}

func (r *soakReceiver) at(path string) *soakHook {
	hook, _ := r.paths.LoadOrStore(path, &soakHook{release: make(chan struct{})})
	return hook.(*soakHook)
}

func (r *soakReceiver) ServeHTTP(w http.ResponseWriter, request *http.Request) {
	io.Copy(io.Discard, request.Body) // only then it is noticed that the sender is gone
	at := r.at(request.URL.Path)
	switch {
	case strings.HasPrefix(request.URL.Path, "/hang/"):
		at.waiting.Add(1)
		defer at.waiting.Add(-1)
		select {
		case <-at.release:
		case <-request.Context().Done():
		}
	case !strings.HasPrefix(request.URL.Path, "/good/"):
		http.NotFound(w, request)
	case at.served.Add(1) == 1:
		http.Error(w, "busy", http.StatusServiceUnavailable)
	}
}
