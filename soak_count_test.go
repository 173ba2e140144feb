package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	amqp "github.com/rabbitmq/amqp091-go"
	"github.com/redis/rueidis"
)

// soakWorld is a running shop and those who count what it has.
type soakWorld struct {
	programs map[string]*instance // api and worker
	dirs     map[string]string    // where each of them may write files
	env      map[string]string
	api      *instance
	admin    string // a token
	patient  bool   // what hangs is left to the program's own timeouts
	web      *http.Transport
	host     *chaosHost
	hooks    *soakReceiver
	serial   atomic.Int64 // makes names unique
	requests atomic.Int64
	count    int // rounds
	sent     int // requests of the rounds

	storage auditor // asks PostgreSQL and S3
	redis   rueidis.Client
	broker  *testServer   // nil: its connections cannot be counted
	queues  *amqp.Channel // of a connection of its own
}

// asAdmin gives the admin's token to each request that does not bring its own.
type asAdmin struct{ *soakWorld }

// RoundTrip implements http.RoundTripper.
func (w asAdmin) RoundTrip(r *http.Request) (*http.Response, error) {
	w.requests.Add(1)
	if r.Header.Get("Authorization") == "" {
		r = r.Clone(r.Context())
		r.Header.Set("Authorization", "Bearer "+w.admin)
	}
	return w.web.RoundTrip(r)
}

// newSoakWorld starts an API and a worker that listens too, on servers.
func newSoakWorld(t *testing.T, patient bool) *soakWorld {
	t.Helper()
	bucket := testS3(t)
	w := &soakWorld{
		programs: make(map[string]*instance), dirs: make(map[string]string), patient: patient, web: &http.Transport{},
		host: newChaosHost(t, chaosPhotos(t)[:60]), hooks: newSoakReceiver(t), storage: auditor{s3: bucket},
	}
	w.env = environment(bucketEnv(bucket), map[string]string{
		"DATABASE_URL": withPool(t, testDatabase(t), 4), "REDIS_URL": testRedis(t), "AMQP_URL": testAMQP(t), "AUTH": "on", "RATE_LIMIT": "0",
		"RETRY_ATTEMPTS": "3", "IMAGE_WORKERS": "2", "LOG_LEVEL": "warn", "WORKER_LISTEN_ADDR": freeAddr(t)})
	// How many connections idle is chance, and says nothing of those that leak.
	w.host.Config.SetKeepAlivesEnabled(false)
	w.hooks.Config.SetKeepAlivesEnabled(false)
	seedUser(t, w.env)
	w.admin = createToken(t, w.env, "-admin")
	for _, name := range []string{"api", "worker"} {
		w.dirs[name] = t.TempDir()
		env := environment(w.env, map[string]string{"TMPDIR": w.dirs[name], "HOME": w.dirs[name], "DATA_DIR": w.dirs[name], "LOG_LEVEL": "info"})
		w.programs[name] = startBinary(t, env, name)
		w.programs[name].web = &http.Client{Transport: asAdmin{w}, Timeout: settleTime}
	}
	w.api = w.programs["api"]
	w.programs["worker"].url = "http://" + w.env["WORKER_LISTEN_ADDR"]
	w.openServers(t)
	w.stock(t)
	return w
}

// withPool bounds the connections of each process so that one round needs them all.
func withPool(t *testing.T, database string, size int) string {
	t.Helper()
	u, err := url.Parse(database)
	if err != nil {
		t.Fatal(err)
	}
	query := u.Query()
	query.Set("pool_max_conns", strconv.Itoa(size))
	u.RawQuery = query.Encode()
	return u.String()
}

// openServers connects those who count to what they count.
func (w *soakWorld) openServers(t *testing.T) {
	t.Helper()
	var err error
	if w.storage.db, err = pgxpool.New(context.Background(), w.env["DATABASE_URL"]); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(w.storage.db.Close)
	w.redis = dialRedis(t, w.env["REDIS_URL"])
	t.Cleanup(w.redis.Close)
	w.queues = openChannel(t, w.env["AMQP_URL"])
	if rabbit, err := sharedRabbit(); err == nil && strings.HasPrefix(w.env["AMQP_URL"], rabbit.URL) {
		w.broker = rabbit
	}
}

// settle waits until the program has nothing to do any more, and no client keeps
// a connection.
func (w *soakWorld) settle(t *testing.T) {
	t.Helper()
	eventually(t, "everything has settled", func() bool {
		var rest bool
		err := w.storage.db.QueryRow(t.Context(), `SELECT NOT (`+anyWebhookBehind+`)
			AND NOT EXISTS (SELECT 1 FROM images WHERE status = 'pending')
			AND NOT EXISTS (SELECT 1 FROM deliveries WHERE run_at IS NOT NULL)
			AND NOT EXISTS (SELECT 1 FROM garbage WHERE deleting OR delete_at <= now())`).Scan(&rest)
		return err == nil && rest
	})
	w.web.CloseIdleConnections()
}

// sample counts everything.
func (w *soakWorld) sample(t *testing.T) soakSample {
	t.Helper()
	s := make(soakSample)
	for name, program := range w.programs {
		if err := program.countInside(name, s); err != nil {
			t.Fatalf("count what the %s has: %v", name, err)
		}
		s[name+": temporary files"] = countFiles(t, w.dirs[name])
	}
	w.samplePostgres(t, s)
	w.sampleRedis(t, s)
	for _, queue := range []string{workQueueName, deadQueueName} {
		q, err := w.queues.QueueDeclarePassive(queue, true, false, false, false, nil)
		if err != nil {
			t.Fatal(err)
		}
		s["rabbitmq: messages in "+strings.TrimPrefix(queue, "image_processing_")] = float64(q.Messages)
	}
	objects, err := w.storage.objects(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	s["s3: objects"] = float64(len(objects))
	return s
}

// countInside has the program look at itself until it has collected its garbage
// twice, which also empties its pools. The least of each thing counts: what is on
// its way out is no leak.
func (i *instance) countInside(name string, s soakSample) error {
	for began := -1.0; ; {
		if _, err := i.page("/debug/pprof/threadcreate"); err != nil { // a profile is packed with a megabyte of garbage
			return err
		}
		seen, err := i.metrics()
		if err != nil {
			return err
		}
		now := soakSample{
			// The next collection begins at twice what the last has left, with the
			// stacks; the heap itself has garbage again.
			name + ": heap, MB":   seen["go_memstats_next_gc_bytes"] / 2 / 1e6,
			name + ": goroutines": seen["go_goroutines"],
		}
		if files, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", i.pid)); err == nil { // on Linux
			now[name+": open files"] = float64(len(files))
		}
		s.least(now)
		collections := seen["go_gc_duration_seconds_count"]
		if began < 0 {
			began = collections
		}
		if collections >= began+2 {
			return nil
		}
	}
}

// metrics reads those metrics of the instance that have no labels.
func (i *instance) metrics() (map[string]float64, error) {
	text, err := i.page("/metrics")
	if err != nil {
		return nil, err
	}
	seen := make(map[string]float64)
	for line := range bytes.Lines(text) {
		name, value, _ := strings.Cut(strings.TrimSpace(string(line)), " ")
		if n, err := strconv.ParseFloat(value, 64); err == nil {
			seen[name] = n
		}
	}
	return seen, nil
}

// page reads what is at a path.
func (i *instance) page(path string) ([]byte, error) {
	response, err := i.web.Get(i.url + path)
	if err != nil {
		return nil, err
	}
	defer response.Body.Close()
	data, err := io.ReadAll(response.Body)
	if err == nil && response.StatusCode != http.StatusOK {
		err = fmt.Errorf("GET %s: %s", path, response.Status)
	}
	return data, err
}

func countFiles(t *testing.T, dir string) (n float64) {
	t.Helper()
	err := filepath.WalkDir(dir, func(_ string, entry fs.DirEntry, err error) error {
		if errors.Is(err, os.ErrNotExist) {
			return nil // it was just deleted
		}
		if err == nil && !entry.IsDir() {
			n++
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// soakOverdue says for each table of which rows are kept for a time by design when
// that is over.
var soakOverdue = map[string]struct{ kept, overdue string }{
	"events":           {"events", "created_at < now() - interval '1 day'"},
	"idempotency_keys": {"idempotency_keys", "created_at < now() - interval '1 day'"},
	"deliveries":       {"failed deliveries", "failed_at < now() - interval '7 days'"},
	"garbage":          {"garbage not due", "delete_at <= now()"},
}

// samplePostgres counts the rows of every table. Those that are overdue are the
// janitor's, who comes each quarter of a minute: letGo waits for him.
func (w *soakWorld) samplePostgres(t *testing.T, s soakSample) {
	t.Helper()
	for _, table := range w.tables(t) {
		kept, overdue := "rows of "+table, "false"
		if rule, ok := soakOverdue[table]; ok {
			kept, overdue = rule.kept, rule.overdue
		}
		s["postgres: "+kept] = w.number(t, `SELECT count(*) FROM `+table+` WHERE (`+overdue+`) IS NOT true`)
	}
	s["postgres: connections"] = w.number(t, `SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'pms'`)
	s["postgres: open transactions"] = w.number(t, `SELECT count(*) FROM pg_stat_activity
		WHERE datname = current_database() AND application_name = 'pms' AND state LIKE 'idle in transaction%'`)
}

func (w *soakWorld) tables(t *testing.T) (names []string) {
	t.Helper()
	rows, err := w.storage.db.Query(t.Context(), `SELECT relname FROM pg_stat_user_tables ORDER BY relname`)
	if err != nil {
		t.Fatal(err)
	}
	if names, err = pgx.CollectRows(rows, pgx.RowTo[string]); err != nil {
		t.Fatal(err)
	}
	return names
}

func (w *soakWorld) number(t *testing.T, sql string) float64 {
	t.Helper()
	var n int64
	if err := w.storage.db.QueryRow(t.Context(), sql).Scan(&n); err != nil {
		t.Fatalf("%s: %v", sql, err)
	}
	return float64(n)
}

// soakKeys answers how many keys never expire, how many do later than in ARGV[1]
// milliseconds, and how many do in time.
const soakKeys = `
local never, late, kept = 0, 0, 0
for _, key in ipairs(redis.call('KEYS', '*')) do
  local left = redis.call('PTTL', key)
  if left == -1 then never = never + 1 elseif left > tonumber(ARGV[1]) then late = late + 1 else kept = kept + 1 end
end
return {never, late, kept}`

// sampleRedis counts keys by whether they go by themselves within markerTTL, which
// is no less than CACHE_TTL here, and what Redis remembers of who has read them.
func (w *soakWorld) sampleRedis(t *testing.T, s soakSample) {
	t.Helper()
	command := w.redis.B().Eval().Script(soakKeys).Numkeys(0).Arg(strconv.FormatInt(markerTTL.Milliseconds(), 10)).Build()
	counts, err := w.redis.Do(t.Context(), command).AsIntSlice()
	if err != nil {
		t.Fatal(err)
	}
	info, err := w.redis.Do(t.Context(), w.redis.B().Info().Section("clients", "stats").Build()).ToString()
	if err != nil {
		t.Fatal(err)
	}
	s["redis: keys that never expire"], s["redis: keys that live too long"], s["redis: keys that expire"] = float64(counts[0]), float64(counts[1]), float64(counts[2])
	for name, what := range map[string]string{"connected_clients:": "redis: connections", "tracking_total_keys:": "redis: keys tracked"} {
		if _, value, ok := strings.Cut(info, name); ok {
			fmt.Sscan(value, &counts[0])
			s[what] = float64(counts[0])
		}
	}
}

// sampleBroker counts connections and channels. It starts an Erlang node for that,
// which costs a second, so it is not for each round.
func (w *soakWorld) sampleBroker(t *testing.T, s soakSample) {
	t.Helper()
	if w.broker == nil {
		return
	}
	uri, err := amqp.ParseURI(w.env["AMQP_URL"])
	if err != nil {
		t.Fatal(err)
	}
	var connections []struct {
		VHost    string
		Channels float64
	}
	out := rabbitctl(t, w.broker, "--quiet", "--formatter", "json", "list_connections", "vhost", "channels")
	if err := json.Unmarshal([]byte(out), &connections); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	for _, c := range connections {
		if c.VHost == uri.Vhost { // this test's own is one of them
			s["rabbitmq: connections"]++
			s["rabbitmq: channels"] += c.Channels
		}
	}
}

// soakStep is how far time is moved on after each round: all that is kept for a
// time, a week at most, is then overdue.
const soakStep = 8 * 24 * time.Hour

// letGo waits until what was kept for a time is gone: all rows that are overdue,
// but for one event, by which the others' place is known, and the objects that
// nothing refers to.
func (w *soakWorld) letGo(t *testing.T) {
	t.Helper()
	for table, rule := range soakOverdue {
		eventually(t, "there are no more "+rule.kept+" whose time is over", func() bool {
			return w.number(t, `SELECT count(*) FROM `+table+` WHERE `+rule.overdue) <= 1
		})
	}
	eventually(t, "the objects are those that images refer to", func() bool {
		objects, err := w.storage.objects(t.Context())
		held, countErr := w.storage.count(t.Context(), "object_key <> ''")
		return err == nil && countErr == nil && len(objects) == held
	})
}
