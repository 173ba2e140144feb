package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
)

// bury makes a dead letter of the image of a published job, as a worker would.
func bury(t *testing.T, s *store, job Job, why *imageError) {
	t.Helper()
	image, err := s.PendingImage(t.Context(), job.ID)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.SettleFailed(t.Context(), job, failure{imageError: why, Attempt: image.Attempts + 1}); err != nil {
		t.Fatal(err)
	}
}

// graveyard is a store with dead letters of two users, on several hosts, a minute
// apart; the one of an id failed when the clock had advanced by so many minutes.
func graveyard(t *testing.T, s *store) (start time.Time, other int64) {
	t.Helper()
	start = s.now()
	now := start
	s.now = func() time.Time { return now }
	other = addUser(t, s)
	for n, letter := range []struct {
		user         int64
		source, code string
	}{
		{1, "https://a.example/1.jpg", "http_404"},
		{1, "http://A.example.:8080/2.jpg", "http_404"},
		{other, "https://a.example/3.jpg", "http_503"},
		{other, "https://b.example/4.jpg", "http_404"},
		{1, "http://[2001:DB8::1]:8080/5.jpg", "timeout"},
	} {
		p := Product{UserID: letter.user, Name: "Shoe", Images: sourcesOf(letter.source)}
		if _, err := s.CreateProduct(t.Context(), p, origin{}, nil); err != nil {
			t.Fatal(err)
		}
		now = start.Add(time.Duration(n+1) * time.Minute)
		bury(t, s, publishDue(t, s)[0], permanent(letter.code, "why"))
	}
	return start, other
}

func deadIDs(t *testing.T, s *store, query string) (ids []int64) {
	t.Helper()
	values, err := url.ParseQuery(query)
	if err != nil {
		t.Fatal(err)
	}
	f, wrong := readDeadFilter(values)
	if wrong != nil {
		t.Fatal(wrong)
	}
	for after := int64(0); ; { // pages of two
		page, err := s.DeadLetters(t.Context(), f, after, 2)
		if err != nil {
			t.Fatal(err)
		}
		for _, letter := range page {
			ids, after = append(ids, letter.ID), letter.ID
		}
		if len(page) < 2 {
			break
		}
	}
	if n, err := s.CountDead(t.Context(), f); err != nil || n != len(ids) {
		t.Errorf("%s: listed %d, counted %d, %v", query, len(ids), n, err)
	}
	return ids
}

func TestDeadLettersByFilter(t *testing.T) {
	t.Parallel()
	eachStore(t, func(t *testing.T, s *store) {
		start, other := graveyard(t, s)
		at := func(d time.Duration) string { return url.QueryEscape(start.Add(d).Format(time.RFC3339Nano)) }
		for query, want := range map[string][]int64{
			"":                           {1, 2, 3, 4, 5},
			"code=http_404":              {1, 2, 4},
			"code=http_40":               nil,
			"host=a.example":             {1, 2, 3},
			"host=A.EXAMPLE.":            {1, 2, 3},
			"host=a.example:8080":        {2},
			"host=a.example:443":         {1, 3},
			"host=2001:db8::1":           {5},
			"host=[2001:db8::1]":         {5},
			"host=example":               nil,
			"user_id=1":                  {1, 2, 5},
			"user_id=999999":             nil,
			"since=" + at(0):             {1, 2, 3, 4, 5},
			"since=" + at(4*time.Minute): {4, 5},
			"since=" + at(4*time.Minute+time.Microsecond):                 {5},
			"since=" + at(time.Hour):                                      nil,
			fmt.Sprintf("user_id=%d&code=http_503&host=a.example", other): {3},
			"code=http_404&host=a.example&since=" + at(2*time.Minute):     {2},
		} {
			if got := deadIDs(t, s, query); fmt.Sprint(got) != fmt.Sprint(want) {
				t.Errorf("%s: %v, want %v", query, got, want)
			}
		}
	})
}

// Who puts a filter into the body must not replay everything.
func TestReplayReadsNoFilterFromItsBody(t *testing.T) {
	t.Parallel()
	a := newAPI(t)
	graveyard(t, a.store)
	a.do(t, "POST", "/dead-letters/replay", `{"code":"http_503"}`).wantProblem(t, http.StatusBadRequest, "code")
	if n, err := a.store.CountDead(t.Context(), deadFilter{}); err != nil || n != 5 {
		t.Errorf("%d dead letters are left, %v", n, err)
	}
	got := a.do(t, "POST", "/dead-letters/replay", `{}`, "X-Request-Id", "replay-1")
	if got.Code != http.StatusAccepted || got.json["replayed"] != 5.0 {
		t.Errorf("answered %d: %v", got.Code, got.json)
	}
	for _, job := range publishDue(t, a.store) {
		if job.RequestID != "replay-1" {
			t.Errorf("image %d is replayed for request %q", job.ID, job.RequestID)
		}
	}
}

func TestDeadLettersRefuse(t *testing.T) {
	t.Parallel()
	a := newAPI(t)
	for query, fields := range map[string][]string{
		"code=": {"code"}, "code=%ff": {"code"}, "code=%00": {"code"},
		"host=": {"host"}, "host=a/b": {"host"}, "host=u@a": {"host"}, "host=a:0": {"host"}, "host=a:x": {"host"}, "host=http://a": {"host"}, "host=a%20b": {"host"}, "host=%3F": {"host"},
		"user_id=0": {"user_id"}, "user_id=x": {"user_id"},
		"since=": {"since"}, "since=yesterday": {"since"}, "since=2026-01-02": {"since"}, "since=2026-01-02T03:04:05": {"since"}, "since=0000-01-01T00:00:00Z": {"since"},
		"since=x&code=&user_id=-1": {"code", "user_id", "since"},
	} {
		t.Run(query, func(t *testing.T) {
			a.do(t, "GET", "/dead-letters?"+query, "").wantProblem(t, 422, fields...)
			a.do(t, "POST", "/dead-letters/replay?"+query, "").wantProblem(t, 422, fields...)
		})
	}
	for _, query := range []string{"colour=red", "code=a&code=b", "%zz"} {
		a.do(t, "GET", "/dead-letters?"+query, "").wantProblem(t, 400)
		a.do(t, "POST", "/dead-letters/replay?"+query, "").wantProblem(t, 400)
	}
	a.do(t, "GET", "/dead-letters?limit=0&cursor=x&code=", "").wantProblem(t, 422, "code", "limit", "cursor")
	a.do(t, "POST", "/dead-letters/replay?limit=1", "").wantProblem(t, 400)
}

func TestReplayByFilterOverHTTP(t *testing.T) {
	t.Parallel()
	a := newAPI(t)
	graveyard(t, a.store)
	next := a.do(t, "GET", "/dead-letters?host=a.example&limit=2", "")
	if link := next.Header().Get("Link"); !strings.Contains(link, "host=a.example") || !strings.Contains(link, "cursor=") {
		t.Errorf("the link to the next page: %s", link)
	}
	for _, filter := range []string{"code=http_404", "host=a.example", "user_id=1", "since=2026-01-02T03:04:05Z", "limit=1"} {
		if got := a.do(t, "GET", "/dead-letters?"+filter, ""); got.Code != 200 {
			t.Errorf("the list of %s: %d %s", filter, got.Code, got.Body)
		}
	}
	for _, c := range []struct {
		query string
		want  float64
	}{{"?since=9000-01-01T00:00:00Z", 0}, {"?code=http_404&host=a.example", 2}, {"?code=http_404&host=a.example", 0}, {"?user_id=1", 1}, {"", 2}, {"", 0}} {
		if got := a.do(t, "POST", "/dead-letters/replay"+c.query, ""); got.Code != 202 || got.json["replayed"] != c.want {
			t.Errorf("replay%s: %d %s, want %v", c.query, got.Code, got.Body, c.want)
		}
	}
}

// Many who press the button at once, for all and for each, replay each dead
// letter once: it is published once, and its product's version is raised once.
func TestReplaysAtOnceAreOne(t *testing.T) {
	t.Parallel()
	eachStore(t, func(t *testing.T, s *store) {
		const products, images, pressing = 10, 4, 8
		for range products {
			create(t, s, "https://a.example/1", "https://a.example/2", "https://a.example/3", "https://a.example/4")
		}
		for _, job := range publishDue(t, s) {
			bury(t, s, job, permanent("http_404", "404 Not Found"))
		}
		var group sync.WaitGroup
		var mu sync.Mutex
		total := 0
		for n := range pressing {
			group.Go(func() {
				var replayed int
				var err error
				if n%2 == 0 {
					replayed, err = replay(t.Context(), s, deadFilter{}, origin{}, 0, func(int64, int64) {})
				} else {
					for id := int64(products * images); id > 0 && err == nil; id-- { // against the order of the others
						var one int
						one, _, err = s.ReplayDead(t.Context(), []int64{id, id - 1}, origin{})
						replayed += one
					}
				}
				mu.Lock()
				defer mu.Unlock()
				total += replayed
				if err != nil {
					t.Error(err)
				}
			})
		}
		group.Wait()
		if jobs := publishDue(t, s); total != products*images || len(jobs) != products*images {
			t.Errorf("replayed %d, published %d, want %d", total, len(jobs), products*images)
		}
		if left := publishDue(t, s); len(left) != 0 {
			t.Errorf("published again: %v", left)
		}
	})
}

// Two replays may meet at two products from either side.
func TestReplayOfManyRaisesEachVersionOnce(t *testing.T) {
	t.Parallel()
	eachStore(t, func(t *testing.T, s *store) {
		p := create(t, s, "https://a.example/1", "https://a.example/2")
		for _, job := range publishDue(t, s) {
			bury(t, s, job, permanent("http_404", "404 Not Found"))
		}
		before, _ := s.Product(t.Context(), p.ID)
		told := make(map[int64]int64)
		n, err := replay(t.Context(), s, deadFilter{}, origin{}, 0, func(id, version int64) { told[id] = version })
		after, _ := s.Product(t.Context(), p.ID)
		if err != nil || n != 2 || after.Version != before.Version+1 || told[p.ID] != after.Version {
			t.Errorf("replayed %d, %v; version %d after %d, caches were told %v", n, err, after.Version, before.Version, told)
		}
	})
}

func TestReplayKeepsItsRate(t *testing.T) {
	t.Parallel()
	eachStore(t, func(t *testing.T, s *store) {
		graveyard(t, s)
		start := time.Now()
		if n, err := replay(t.Context(), s, deadFilter{}, origin{}, 20, func(int64, int64) {}); err != nil || n != 5 {
			t.Fatalf("replayed %d, %v", n, err)
		}
		if took := time.Since(start); took < 4*time.Second/20 {
			t.Errorf("5 at 20 a second took %v", took)
		}
	})
}

func TestReplayInterruptedSaysWhatIsDone(t *testing.T) {
	t.Parallel()
	eachStore(t, func(t *testing.T, s *store) {
		graveyard(t, s)
		ctx, cancel := context.WithCancel(t.Context())
		n, err := replay(ctx, s, deadFilter{}, origin{}, 1, func(int64, int64) { cancel() })
		if left := deadIDs(t, s, ""); n != 1 || err == nil || len(left) != 4 {
			t.Errorf("replayed %d, %v, left %v", n, err, left)
		}
	})
}

// runCommand runs one command of the program in the process of the test.
func runCommand(t *testing.T, env map[string]string, args ...string) (out string, code int) {
	t.Helper()
	var text bytes.Buffer
	code = exitCode(run(t.Context(), args, func(name string) string { return env[name] }, &text, io.Discard), &text)
	return text.String(), code
}

func TestDeadCommands(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	graveyard(t, storeIn(t, dir))
	env := environment(map[string]string{"DATA_DIR": dir})
	for _, c := range []struct {
		args string
		code int
		says string // the end of it; all of it where it begins with "="
	}{
		{"list -code timeout", 0, "http://[2001:DB8::1]:8080/5.jpg\n"},
		{"list -host nowhere.example", 0, "SOURCE\n"},
		{"list -host a/b", 2, ""},
		{"list -since yesterday", 2, ""},
		{"list -user 0", 2, ""},
		{"show 3", 0, ""},
		{"show 99", 1, ""},
		{"replay", 2, ""},
		{"replay -all 3", 2, ""},
		{"replay -all -code timeout", 2, ""},
		{"replay -code timeout 3", 2, ""},
		{"replay -all -rate -1", 2, ""},
		{"replay -all -dry-run", 0, "=would replay 5\n"},
		{"replay -host a.example -code http_404 -dry-run", 0, "=would replay 2\n"},
		{"replay -dry-run 3 99", 1, ""},
		{"replay -dry-run 3 4", 0, "=would replay 2\n"},
		{"replay 3", 0, "=replayed 3\n"},
		{"replay 3", 0, "=replayed 3\n"}, // in work already
		{"replay 99", 1, ""},
		{"discard 3", 1, ""},
		{"discard 4", 0, "=discarded 4\n"},
		{"replay 4", 1, ""},
		{"replay -host a.example -rate 1000", 0, "=replayed 2\n"},
		{"replay -all", 0, "=replayed 1\n"},
		{"replay -all", 0, "=replayed 0\n"},
	} {
		out, code := runCommand(t, env, append([]string{"dead"}, strings.Fields(c.args)...)...)
		whole, isWhole := strings.CutPrefix(c.says, "=")
		if code != c.code || isWhole && out != whole || !isWhole && !strings.HasSuffix(out, c.says) {
			t.Errorf("dead %s: exit code %d, %q", c.args, code, out)
		}
	}
}

// dead show has every attempt, as GET /dead-letters/{id} does.
func TestDeadLetterShowsItsHistory(t *testing.T) {
	t.Parallel()
	eachStore(t, func(t *testing.T, s *store) {
		create(t, s, "https://a.example/1.jpg")
		job := publishDue(t, s)[0]
		first := failure{imageError: transient("http_503", "503 Service Unavailable"), Attempt: 1, Duration: 1500 * time.Millisecond, RetryAt: s.now()}
		if _, err := s.SettleFailed(t.Context(), job, first); err != nil {
			t.Fatal(err)
		}
		advance(s, time.Second)
		bury(t, s, job, permanent("http_404", "404 Not Found"))
		letter, err := s.DeadLetter(t.Context(), job.ID)
		if err != nil {
			t.Fatal(err)
		}
		var shown struct {
			Attempts int
			Error    errorJSON
			FailedAt time.Time `json:"failed_at"`
			History  []struct {
				FailedAt   time.Time `json:"failed_at"`
				DurationMS int64     `json:"duration_ms"`
				Error      errorJSON
			}
		}
		if err := json.Unmarshal(encodeJSON(letter.json()), &shown); err != nil {
			t.Fatal(err)
		}
		h := shown.History
		if shown.Attempts != 2 || shown.Error.Code != "http_404" || len(h) != 2 || h[0].Error != (errorJSON{"http_503", "503 Service Unavailable"}) ||
			h[0].DurationMS != 1500 || h[1].Error.Code != "http_404" || !h[1].FailedAt.Equal(shown.FailedAt) || !h[0].FailedAt.Before(h[1].FailedAt) {
			t.Errorf("shown: %+v", shown)
		}
	})
}

// A page of dead letters reads no more rows than its most selective filter
// matches, and a page's worth besides.
func TestDeadLetterPagesReadNoMoreThanTheyNeed(t *testing.T) {
	t.Parallel()
	_, db := postgresStore(t)
	const letters, limit = 100_000, 50
	if _, err := db.pool.Exec(t.Context(), fmt.Sprintf(`
		INSERT INTO products (user_id, product_name, name_folded, product_description, price_cents, created_at, updated_at) VALUES (1, '', '', '', 0, now(), now());
		INSERT INTO images (product_id, user_id, position, source, host, port, status, failed_at, error_code)
		SELECT 1, n %% 1000, 0, '', 'h' || n %% 500, 80, 'failed', timestamptz '2026-01-01' + n * interval '1 second', 'c' || n %% 200 FROM generate_series(1, %d) n;
		INSERT INTO images (product_id, user_id, position, source, host, port, status) SELECT 1, 1, 0, '', 'h', 80, 'ready' FROM generate_series(1, %d) n;
		ANALYZE images`, letters, letters), pgx.QueryExecModeSimpleProtocol); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		filter  deadFilter
		matches int
	}{
		"none":       {deadFilter{}, 0},
		"code":       {deadFilter{Code: "c7"}, letters / 200},
		"host":       {deadFilter{Host: "h7", Port: 80}, letters / 500},
		"user":       {deadFilter{UserID: new(int64(7))}, letters / 1000},
		"since":      {deadFilter{Since: time.Date(2026, 1, 1, 0, 0, letters-100, 0, time.UTC)}, 101},
		"long since": {deadFilter{Since: time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)}, 0},
		"nobody":     {deadFilter{Code: "none"}, 1},
	} {
		for page, after := range map[string]int64{"first": 0, "deep": letters / 2} {
			sql, args := c.filter.pageSQL(after, limit)
			plan, root := explain(t, db, sql, args...)
			if read := int(root.readOf("images")); read > c.matches+limit {
				t.Errorf("%s, %s page: reads %d rows, the filter matches %d:\n%s", name, page, read, c.matches, plan)
			}
		}
	}
}

// A replay by command reaches the running program, which has the product cached.
func TestReplayByCommandBesideTheProgram(t *testing.T) {
	t.Parallel()
	for name, settings := range map[string]func(t *testing.T) map[string]string{
		"embedded": func(t *testing.T) map[string]string { return map[string]string{"DATA_DIR": t.TempDir()} },
		"servers":  serverEnv,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			env := environment(settings(t), map[string]string{"CACHE_TTL": "24h"})
			photos := newPhotoServer(t)
			api := start(t, env)
			p := api.settled(t, api.post(t, photos.URL+"/late").ID)
			api.get(t, p.ID)
			photos.serve("/late", jpegPhoto(t, 40, 40))
			if out, code := runCommand(t, env, "dead", "replay", "-all"); code != 0 || out != "replayed 1\n" {
				t.Fatalf("dead replay: %d %s", code, out)
			}
			eventually(t, "the image is ready", func() bool { return api.get(t, p.ID).Images[0].Status == "ready" })
		})
	}
}
