package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// sentEvent is a server-sent event as a client sees it.
type sentEvent struct{ id, name, data string }

// readEvents reads a stream as WHATWG HTML has it, section 9.2.6: what has no
// data is no event, but its id counts.
func readEvents(stream string) (events []sentEvent) {
	id := ""
	for block := range strings.SplitSeq(stream, "\n\n") {
		var e sentEvent
		for line := range strings.Lines(block) {
			field, value, _ := strings.Cut(strings.TrimSuffix(line, "\n"), ": ")
			switch field {
			case "id":
				id = value
			case "event":
				e.name = value
			case "data":
				e.data = value
			}
		}
		if e.id = id; e.data != "" {
			events = append(events, e)
		}
	}
	return events
}

// A stream ends when its token is revoked.
func TestStreamsEndWithTheirToken(t *testing.T) {
	t.Parallel()
	a := newTokenAPI(t)
	url := served(t, a.api)
	revoke := a.revocable(t, a.stranger)
	var streams []*http.Response
	for _, path := range []string{"/events", "/products/1/events"} {
		request, err := http.NewRequestWithContext(t.Context(), "GET", url+path, nil)
		if err != nil {
			t.Fatal(err)
		}
		request.Header.Set("Authorization", a.stranger)
		response, err := http.DefaultClient.Do(request)
		if err != nil || response.StatusCode != 200 {
			t.Fatalf("%s: %v, %v", path, response, err)
		}
		t.Cleanup(func() { response.Body.Close() })
		streams = append(streams, response)
	}
	revoke()
	for _, stream := range streams {
		if _, err := io.ReadAll(stream.Body); err != nil {
			t.Errorf("%s: %v", stream.Request.URL.Path, err)
		}
	}
}

// revocable has a token looked at again soon, rather than after tokenTime, by what
// is begun now, and answers how to revoke it.
func (a tokenAPI) revocable(t *testing.T, token string) (revoke func()) {
	t.Helper()
	sum := sumOf(strings.TrimPrefix(token, "Bearer "))
	known, err := a.server.tokens.look(t.Context(), sum, a.store.TokenCaller)
	if err != nil {
		t.Fatal(err)
	}
	known.next = time.Now().Add(200 * time.Millisecond)
	a.server.tokens.known.Store(sum.key(), known)
	return func() {
		t.Helper()
		if _, err := a.store.Exec(t.Context(), `DELETE FROM tokens WHERE sha256 = $1`, sum[:]); err != nil {
			t.Fatal(err)
		}
	}
}

// listening is a client that follows a stream.
type listening struct {
	response *http.Response
	lines    *bufio.Reader
	all      bytes.Buffer // what was read of it
	lastID   string
	cancel   context.CancelFunc
}

// listen opens a stream, and has its first lines when it returns.
func listen(t *testing.T, url, lastID string) *listening {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), settleTime)
	t.Cleanup(cancel)
	request, err := http.NewRequestWithContext(ctx, "GET", url, nil)
	if err != nil {
		t.Fatal(err)
	}
	if lastID != "" {
		request.Header.Set("Last-Event-ID", lastID)
	}
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { response.Body.Close() })
	l := &listening{response: response, lastID: lastID, cancel: cancel}
	l.lines = bufio.NewReader(io.TeeReader(response.Body, &l.all))
	return l
}

// block reads up to the next empty line.
func (l *listening) block() (text string, err error) {
	for err == nil && !strings.HasSuffix(text, "\n\n") {
		var line string
		line, err = l.lines.ReadString('\n')
		text += line
	}
	for line := range strings.Lines(text) {
		if id, ok := strings.CutPrefix(line, "id: "); ok {
			l.lastID = strings.TrimSpace(id)
		}
	}
	return text, err
}

// next answers the next event, in words.
func (l *listening) next(t *testing.T) string {
	t.Helper()
	for {
		block, err := l.block()
		if err != nil {
			t.Fatalf("the stream ended with %v after\n%s", err, &l.all)
		}
		if events := readEvents(block); events != nil {
			return events[0].words()
		}
	}
}

// placed waits until the client knows its place.
func (l *listening) placed(t *testing.T) *listening {
	t.Helper()
	for l.lastID == "" {
		if _, err := l.block(); err != nil {
			t.Fatal(err)
		}
	}
	return l
}

// close ends the stream, and holds what came of it against openapi.yaml.
func (l *listening) close(t *testing.T) {
	t.Helper()
	l.cancel()
	whole := l.all.Bytes()[:bytes.LastIndex(l.all.Bytes(), []byte("\n\n"))+2]
	if err := checkExchange(l.response.Request, nil, l.response.StatusCode, l.response.Header, whole); err != nil {
		t.Error(err)
	}
}

func (e sentEvent) words() string {
	var data struct {
		ProductID int64 `json:"product_id"`
		Version   int64
		Action    string
		Position  int
		Status    string
		Attempts  int
	}
	if err := json.Unmarshal([]byte(e.data), &data); err != nil {
		return err.Error()
	}
	switch e.name {
	case "image":
		return fmt.Sprintf("image %d/%d %s %d", data.ProductID, data.Position, data.Status, data.Attempts)
	case "product":
		return fmt.Sprintf("product %d %s %d", data.ProductID, data.Action, data.Version)
	case "done":
		return fmt.Sprintf("done %d", data.Version)
	}
	return e.name
}

func wantEvents(t *testing.T, l *listening, want ...string) {
	t.Helper()
	for n, text := range want {
		if got := l.next(t); got != text {
			t.Fatalf("event %d is %q, want %q, in\n%s", n, got, text, &l.all)
		}
	}
}

// twoInstances are two APIs on one database.
func twoInstances(t *testing.T, s *store) (urls [2]string) {
	for n := range urls {
		urls[n], _ = newAPIOn(t, s).serve(t)
	}
	return urls
}

// serve answers over the network until the test ends, or its streams until stop.
func (a *api) serve(t *testing.T) (url string, stop func()) {
	web := httptest.NewServer(a.handler)
	t.Cleanup(web.Close)
	stop = sync.OnceFunc(func() { close(a.stopping) })
	t.Cleanup(stop)
	return web.URL, stop
}

// A client that comes back, to whichever instance, gets what it has missed, in
// order, each once.
func TestStreamResumesOnAnotherInstance(t *testing.T) {
	t.Parallel()
	eachStore(t, func(t *testing.T, s *store) {
		urls := twoInstances(t, s)
		l := listen(t, urls[0]+"/events", "").placed(t)
		p := create(t, s, "https://a.example/1.jpg", "https://a.example/2.jpg")
		created := fmt.Sprintf("product %d created 1", p.ID)
		wantEvents(t, l, created)
		l.close(t)

		jobs := publishDue(t, s)
		finish(t, s, jobs[0], "key")
		bury(t, s, jobs[1], permanent("http_404", "404 Not Found"))
		ready, failed := fmt.Sprintf("image %d/0 ready 0", p.ID), fmt.Sprintf("image %d/1 failed 1", p.ID)
		second := listen(t, urls[1]+"/events", l.lastID)
		wantEvents(t, second, ready)
		second.close(t)

		third := listen(t, urls[0]+"/events", second.lastID)
		wantEvents(t, third, failed)
		deleteProduct(t, s, p.ID)
		wantEvents(t, third, fmt.Sprintf("product %d deleted 3", p.ID))
		third.close(t)
	})
}

// A stream is of the products that its filters select.
func TestStreamFilters(t *testing.T) {
	t.Parallel()
	a := newAPI(t)
	url, _ := a.serve(t)
	other, err := a.store.CreateProduct(t.Context(), Product{UserID: addUser(t, a.store), Name: "x"}, origin{}, nil)
	if err != nil {
		t.Fatal(err)
	}
	ofUser := listen(t, url+"/events?user_id=1", "").placed(t)
	ofProduct := listen(t, fmt.Sprintf("%s/events?user_id=%d&product_id=%d", url, other.UserID, other.ID), "").placed(t)
	p := create(t, a.store)
	deleteProduct(t, a.store, other.ID)
	deleteProduct(t, a.store, p.ID)
	wantEvents(t, ofUser, fmt.Sprintf("product %d created 1", p.ID), fmt.Sprintf("product %d deleted 1", p.ID))
	wantEvents(t, ofProduct, fmt.Sprintf("product %d deleted 1", other.ID))
	ofUser.close(t)
	ofProduct.close(t)
	for _, id := range []string{"0", "x", "-1"} {
		a.do(t, "GET", "/events?user_id="+id+"&product_id="+id, "").wantProblem(t, 422, "user_id", "product_id")
	}
}

// Who has missed events is told so, and then goes on.
func TestStreamSaysThatEventsWereMissed(t *testing.T) {
	t.Parallel()
	eachStore(t, func(t *testing.T, s *store) {
		urls := twoInstances(t, s)
		p := create(t, s, "https://a.example/1.jpg")
		l := listen(t, urls[0]+"/events", "").placed(t)
		l.close(t)
		create(t, s)
		advance(s, eventTime+time.Minute)
		create(t, s)
		eventually(t, "the events can be read", func() bool { return len(logged(t, s, place{})) == 3 })
		if err := s.ForgetEvents(t.Context()); err != nil {
			t.Fatal(err)
		}
		for _, id := range []string{l.lastID, "nonsense", "1-", "99999999999-1", "-1--1", "0-0"} {
			again := listen(t, urls[0]+"/events", id)
			wantEvents(t, again, "reset")
			again.close(t)
		}
		path := fmt.Sprintf("/products/%d/events", p.ID)
		product := listen(t, urls[1]+path, "").placed(t)
		if product.close(t); product.lastID == (place{}).String() {
			t.Error("a product whose events are forgotten has the place before everything")
		}
		job := publishDue(t, s)[0]
		finish(t, s, job, "key")
		product = listen(t, urls[1]+path, "nonsense")
		wantEvents(t, product, "reset", "image 0/0 ready 0", "done 2")
		product.close(t)
	})
}

// A product's stream resumes too. Where its list of images has changed meanwhile,
// it tells all of them anew.
func TestProductStreamResumes(t *testing.T) {
	t.Parallel()
	eachStore(t, func(t *testing.T, s *store) {
		urls := twoInstances(t, s)
		p := create(t, s, "https://a.example/1.jpg", "https://a.example/2.jpg", "https://a.example/3.jpg")
		path := fmt.Sprintf("/products/%d/events", p.ID)
		jobs := publishDue(t, s)
		finish(t, s, jobs[0], "key")
		first := listen(t, urls[0]+path, "")
		wantEvents(t, first, "image 0/0 ready 0")
		fromStart := first.lastID
		if finish(t, s, jobs[1], "key1"); fromStart != (place{}).String() {
			t.Errorf("an image that the product had at first has the id %q", fromStart)
		}
		wantEvents(t, first, "image 0/1 ready 0")
		first.close(t)

		_, err := s.SettleFailed(t.Context(), jobs[2], failure{imageError: transient("http_503", "503"), Attempt: 1, RetryAt: s.now()})
		if err != nil {
			t.Fatal(err)
		}
		second := listen(t, urls[1]+path, first.lastID)
		wantEvents(t, second, "image 0/2 pending 1")
		second.close(t)
		anew := listen(t, urls[1]+path, fromStart)
		wantEvents(t, anew, "image 0/0 ready 0", "image 0/1 ready 0", "image 0/2 pending 1")
		anew.placed(t).close(t)

		for n := range resumeMost { // more than are told one by one
			f := failure{imageError: transient("http_503", "503"), Attempt: n + 2, RetryAt: s.now()}
			if _, err := s.SettleFailed(t.Context(), jobs[2], f); err != nil {
				t.Fatal(err)
			}
		}
		most := listen(t, urls[1]+path, second.lastID)
		wantEvents(t, most, "image 0/0 ready 0", "image 0/1 ready 0", fmt.Sprintf("image 0/2 pending %d", resumeMost+1))
		most.placed(t).close(t)

		change := setSources("https://a.example/4.jpg", "https://a.example/1.jpg")
		if _, err := s.UpdateProduct(t.Context(), p.ID, origin{}, always, change); err != nil {
			t.Fatal(err)
		}
		third := listen(t, urls[0]+path, second.lastID)
		wantEvents(t, third, "image 0/0 pending 0", "image 0/1 ready 0")
		if _, err := s.UpdateProduct(t.Context(), p.ID, origin{}, always, setSources("https://a.example/1.jpg")); err != nil {
			t.Fatal(err)
		}
		wantEvents(t, third, "image 0/0 ready 0", fmt.Sprintf("done %d", resumeMost+6))
		third.close(t)
	})
}

// What has happened to a product since its last image became ready its stream tells
// before it ends.
func TestProductStreamEndsWithNothingUntold(t *testing.T) {
	t.Parallel()
	a := newAPI(t)
	p := create(t, a.store, "https://a.example/1.jpg", "https://a.example/2.jpg")
	jobs := publishDue(t, a.store)
	finish(t, a.store, jobs[0], "key")
	w := &plainWriter{}
	stream := &productStream{server: a.server, id: p.ID,
		eventStream: &eventStream{w: w, control: http.NewResponseController(w), ctx: t.Context(), heartbeat: time.NewTicker(time.Hour)}}
	at, err := stream.read(t.Context())
	settled(t, err)
	settled(t, stream.tell(at))
	finish(t, a.store, jobs[1], "key1")
	_, err = a.store.UpdateProduct(t.Context(), p.ID, origin{}, always, setSources("https://a.example/2.jpg", "https://a.example/1.jpg"))
	settled(t, err)
	l := a.feed.listen(at, func(event) bool { return true })
	defer l.leave()
	settled(t, stream.follow(l))
	var told []string
	for _, e := range readEvents(w.String()) {
		told = append(told, e.words())
	}
	if want := []string{"image 0/0 ready 0", "image 0/1 ready 0", "image 0/0 ready 0", "image 0/1 ready 0", "done 4"}; !slices.Equal(told, want) {
		t.Errorf("told %q, want %q", told, want)
	}
}

// The stream of a product of which the log has nothing begins at the log's end. An
// event of the product that comes then may have a smaller id than what stands there.
func TestProductStreamTellsOfASmallerId(t *testing.T) {
	t.Parallel()
	db, err := openPostgres(t.Context(), startPostgres(t).URL) // where nobody else's transactions hold the log back
	settled(t, err)
	s, begin := migratedStore(t, db), sideBySide(t, db)
	url, _ := newAPIOn(t, s).serve(t)
	p, other := create(t, s, "https://a.example/1.jpg"), create(t, s)
	_, err = s.Exec(t.Context(), `DELETE FROM events`)
	settled(t, err)

	late, endLate := begin()
	settled(t, queryRow(t.Context(), late, []any{new(string)}, `SELECT pg_current_xact_id()::text`)) // from here on it has its number
	early, endEarly := begin()
	_, err = early.Exec(t.Context(), `UPDATE images SET status = 'failed', error_code = 'http_404' WHERE product_id = $1`, p.ID)
	settled(t, err)
	_, err = late.Exec(t.Context(), updateProduct, other.ID, "x", "x", "", 0, 2, s.now())
	settled(t, err)
	endLate()
	awaitLogged(t, s, place{}, fmt.Sprintf("%d updated 2", other.ID))
	l := listen(t, fmt.Sprintf("%s/products/%d/events", url, p.ID), "").placed(t)
	endEarly()
	wantEvents(t, l, "image 0/0 failed 0", "done 1")
	l.close(t)
}

// A product's stream ends when the product is deleted.
func TestProductStreamEndsWithTheProduct(t *testing.T) {
	t.Parallel()
	a := newAPI(t)
	url, _ := a.serve(t)
	p := create(t, a.store, "https://a.example/1.jpg")
	l := listen(t, fmt.Sprintf("%s/products/%d/events", url, p.ID), "").placed(t)
	deleteProduct(t, a.store, p.ID)
	if rest, err := io.ReadAll(l.lines); err != nil || len(readEvents(string(rest))) > 0 {
		t.Errorf("after the deletion: %q, %v", rest, err)
	}
}

// Streams outlive an outage of the database, and lose nothing by it.
func TestStreamOutlivesTheDatabase(t *testing.T) {
	t.Parallel()
	s, line := behindProxy(t)
	log := newWatchedLog()
	a := newAPIOn(t, s)
	a.feed = runFeed(t, s, slog.New(slog.NewJSONHandler(log, nil)))
	url, _ := a.serve(t)
	p := create(t, s, "https://a.example/1.jpg")
	eventually(t, "its event can be read", func() bool { return len(logged(t, s, place{})) == 1 })
	all := listen(t, url+"/events", "").placed(t)
	one := listen(t, fmt.Sprintf("%s/products/%d/events", url, p.ID), "").placed(t)
	line.Cut()
	log.await(t, "events cannot be read")
	line.Restore(t)
	log.await(t, "events can be read again")
	finish(t, s, publishDue(t, s)[0], "key")
	wantEvents(t, all, fmt.Sprintf("image %d/0 ready 0", p.ID))
	wantEvents(t, one, "image 0/0 ready 0", "done 2")
}

// Clients of an API learn what workers in other processes do.
func TestStreamTellsWhatWorkersDo(t *testing.T) {
	t.Parallel()
	eachDeployment(t, func(t *testing.T, api *instance) {
		photos := newPhotoServer(t)
		eventually(t, "the database has its tables", func() bool {
			response, err := http.Get(api.url + "/products/1")
			return err == nil && response.Body.Close() == nil && response.StatusCode == http.StatusNotFound
		})
		all := listen(t, api.url+"/events", "").placed(t)
		p := api.post(t, photos.serve("/a", jpegPhoto(t, 50, 50), 503))
		wantEvents(t, all, fmt.Sprintf("product %d created 1", p.ID), fmt.Sprintf("image %d/0 pending 1", p.ID), fmt.Sprintf("image %d/0 ready 1", p.ID))
		all.close(t)
		shown := api.get(t, p.ID)
		if last := readEvents(all.all.String()); !strings.Contains(last[len(last)-1].data, shown.Images[0].URL) || shown.Images[0].URL == "" {
			t.Errorf("the events %+v, the product %+v", last, shown)
		}
	})
}

// manyProducts stores products at once.
func manyProducts(t *testing.T, s *store, n int) {
	t.Helper()
	_, err := s.Exec(t.Context(), fmt.Sprintf(`
		WITH RECURSIVE n (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM n WHERE n < %d)
		INSERT INTO products (user_id, product_name, name_folded, product_description, price_cents, created_at, updated_at)
		SELECT 1, '', '', '', 0, $1, $1 FROM n`, n), s.now())
	if err != nil {
		t.Fatal(err)
	}
}

// A client that reads what it has missed is told how far it is, though nothing of
// that is for it, and its token is looked at.
func TestStreamThatCatchesUpKeepsItsPlaceAndToken(t *testing.T) {
	t.Parallel()
	a := newAPI(t)
	manyProducts(t, a.store, feedPage+1)
	expired := make(chan time.Time)
	close(expired)
	w := &plainWriter{}
	stream := &eventStream{w: w, control: http.NewResponseController(w), ctx: t.Context(), token: tokenWatch{
		expired: expired, look: func() (knownCaller, error) { return knownCaller{}, errNotFound },
	}}
	at, err := stream.catchUp(a.server, place{}, func(event) bool { return false })
	if err != errBadToken || at.ID != feedPage || w.String() != ":\nid: "+at.String()+"\n\n" {
		t.Errorf("at %v, %v: %q", at, err, w)
	}
}

// A client that does not read holds up nobody and holds no memory: what it has
// not taken is read for it from the log later, all and in order.
func TestSlowStreamReadsTheLogByItself(t *testing.T) {
	t.Parallel()
	a := newAPI(t)
	const more = feedBacklog + 2*feedPage
	slow, end := servePipe(a.handler.ServeHTTP)
	defer end()
	io.WriteString(slow, "GET /events HTTP/1.1\r\nHost: x\r\n\r\n")
	lines := bufio.NewReader(slow)
	for line := ""; !strings.HasPrefix(line, "id: "); line, _ = lines.ReadString('\n') {
	}
	quick := a.feed.listen(place{}, func(event) bool { return true })
	defer quick.leave()
	manyProducts(t, a.store, more)
	for n := range int64(more) {
		if e := <-quick.events; e.ProductID != n+1 {
			t.Fatalf("the quick reader's event %d is of product %d", n, e.ProductID)
		}
	}
	a.feed.mu.Lock()
	if len(a.feed.listeners) != 1 {
		t.Errorf("the slow client still listens: %d", len(a.feed.listeners))
	}
	a.feed.mu.Unlock()
	for n := 1; n <= more; {
		line, err := lines.ReadString('\n')
		if err != nil {
			t.Fatalf("ended at %d: %v", n, err)
		}
		if strings.HasPrefix(line, "data: ") {
			if want := fmt.Sprintf(`data: {"product_id":%d,`, n); !strings.HasPrefix(line, want) {
				t.Fatalf("%q, want %q", line, want)
			}
			n++
		}
	}
}

// plainWriter is a response that goes into a buffer.
type plainWriter struct {
	bytes.Buffer
	header http.Header
}

func (w *plainWriter) Header() http.Header              { return w.header }
func (w *plainWriter) WriteHeader(int)                  {}
func (w *plainWriter) Flush()                           {}
func (w *plainWriter) SetWriteDeadline(time.Time) error { return nil }

// On a stream on which nothing happens something is sent every 15 seconds, with
// the place once that has moved on; also while the database is away.
func TestSilentStreamsAreKeptOpen(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		feed := newEventFeed(nil, slog.New(slog.DiscardHandler))
		l := feed.listen(place{7, 1}, func(event) bool { return false })
		feed.pass([]event{{place: place{7, 2}}})
		w := &plainWriter{}
		ctx, stop := context.WithTimeout(t.Context(), 31*time.Second)
		defer stop()
		stream := &eventStream{w: w, control: http.NewResponseController(w), ctx: ctx, heartbeat: time.NewTicker(eventsHeartbeat), told: place{7, 1}}
		if _, err := stream.next(l); err != context.DeadlineExceeded || w.String() != ":\nid: 7-2\n\n:\n\n" {
			t.Errorf("after 31 s %v: %q", err, w)
		}
		w.Reset()
		stream.ctx, stop = context.WithTimeout(t.Context(), 31*time.Second)
		defer stop()
		away := func(context.Context) error { return errUnavailable }
		if err := stream.insist(away); err != context.DeadlineExceeded || w.String() != ":\n\n:\n\n" {
			t.Errorf("31 s without a database, %v: %q", err, w)
		}
	})
}

// Of what a client has missed since it was left behind it is not told the place,
// also if its heartbeat comes before it sees that it was.
func TestStreamLeftBehindDoesNotMoveOn(t *testing.T) {
	t.Parallel()
	feed := newEventFeed(nil, slog.New(slog.DiscardHandler))
	l := feed.listen(place{7, 0}, func(event) bool { return true })
	page := make([]event, feedBacklog+1)
	for n := range page {
		page[n].place = place{7, int64(n + 1)}
	}
	feed.pass(page)
	for range l.events { // takes what had come, up to the end
	}
	w := &plainWriter{}
	stream := &eventStream{w: w, control: http.NewResponseController(w), told: place{7, feedBacklog}}
	if err := stream.beat(l); err != nil || w.String() != ":\n\n" {
		t.Errorf("a heartbeat, %v: %q", err, w)
	}
}

// Streams end with the server, and HEAD ends at once.
func TestStreamsEndWithTheServer(t *testing.T) {
	t.Parallel()
	a := newAPI(t)
	url, stop := a.serve(t)
	p := create(t, a.store, "https://a.example/1.jpg")
	paths := []string{"/events", fmt.Sprintf("/products/%d/events", p.ID)}
	var streams []*listening
	for _, path := range paths {
		response, err := http.Head(url + path)
		if err != nil || response.StatusCode != 200 {
			t.Fatalf("HEAD: %v, %v", response, err)
		}
		streams = append(streams, listen(t, url+path, "").placed(t))
	}
	eventually(t, "two streams are open", func() bool { return a.limits.streaming.taken.Load() == 2 })
	stop()
	var ended sync.WaitGroup
	for _, l := range streams {
		ended.Go(func() {
			if _, err := io.ReadAll(l.lines); err != nil {
				t.Error(err)
			}
		})
	}
	ended.Wait()
	if a.feed.mu.Lock(); len(a.feed.listeners) != 0 {
		t.Errorf("%d listeners are left", len(a.feed.listeners))
	}
	a.feed.mu.Unlock()
}

// Hundreds of streams read each event once, and nothing of the past: they share it.
func TestStreamsShareTheirReads(t *testing.T) {
	t.Parallel()
	a := newAPI(t)
	past := create(t, a.store)
	end, err := a.store.LastEvent(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var got []<-chan *event
	for range 300 {
		l := a.feed.listen(end, func(e event) bool { return e.What == productCreated })
		defer l.leave()
		got = append(got, l.events)
	}
	create(t, a.store)
	first := <-got[0]
	if first.ProductID == past.ID {
		t.Error("the past was read")
	}
	if slices.ContainsFunc(got[1:], func(c <-chan *event) bool { return <-c != first }) {
		t.Error("an event was read more than once")
	}
}
