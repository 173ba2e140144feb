package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/ncruces/go-sqlite3/driver"
)

// peersVar names the directory with the programs that this one is compared with,
// and turns the comparison on.
const peersVar = "PEERS"

const (
	// peerRate is a rate that each server bears with ease, in requests a second.
	peerRate = 500
	// peerTime is how long a measurement takes, about.
	peerTime   = 2 * time.Second
	peerRounds = 5
)

// peerSteps are what each server is measured at, in each round.
var peerSteps = []struct {
	name, request     string
	connections, rate int
}{
	{"one product, 32 connections", "read", loadConnections, 0},
	{"one product, 4 connections", "read", 4, 0},
	{fmt.Sprintf("one product, %d a second", peerRate), "read", loadConnections, peerRate},
	{"page of 50 by price, 32 connections", "list", loadConnections, 0},
	{"create, 32 connections", "create", loadConnections, 0},
	{"create with two image URLs, 32 connections", "create with images", loadConnections, 0},
}

// peer is a server of the comparison, with 10,000 products that have two stored
// images each.
type peer struct {
	name     string
	base     *peer // what it is measured against; nil for ours
	program  *instance
	database []*serverProcess      // its CPU counts too; none if it is in the program
	requests map[string]loadClient // what is missing is not measured
	pending  func() bool           // work in the background goes on; nil if there is none
	figures  map[string][]float64  // by name, one a round
}

// TestCompareWithPeers prints how this program and others of its kind compare:
// each with its documented settings for production, on loopback, asked by the
// same client, in turns. What they do for a request is not the same; see README.
func TestCompareWithPeers(t *testing.T) {
	dir := os.Getenv(peersVar)
	if dir == "" {
		t.Skip("make peers runs this")
	}
	photos := newPhotoServer(t)
	sources := fmt.Sprintf("[%q,%q]", photos.serve("/a.jpg", jpegPhoto(t, 64, 64)), photos.serve("/b.jpg", jpegPhoto(t, 64, 64)))
	embedded := embeddedPeer(t, sources)
	c := &peerComparison{peers: []*peer{
		embedded, pocketBase(t, dir, embedded, "", sources), pocketBase(t, dir, embedded, "FULL", sources), serversPeer(t, sources),
	}}
	for _, p := range c.peers {
		p.figures = make(map[string][]float64)
		c.note(p, "one product, bytes", float64(p.size(t)))
		c.note(p, "memory at rest, MB", p.memory(t))
		p.warmUp(t)
	}
	for range peerRounds {
		for _, step := range peerSteps {
			for _, p := range c.peers {
				if load, ok := p.requests[step.request]; ok {
					load.Connections = step.connections
					c.measure(t, p, load, step.name, step.rate)
				}
			}
		}
	}
	for _, p := range c.peers {
		c.note(p, "memory after the load, MB", p.memory(t))
	}
	c.print()
}

// peerComparison is all that was measured.
type peerComparison struct {
	peers []*peer
	names []string // of the figures, in the order in which they came
}

func (c *peerComparison) note(p *peer, name string, value float64) {
	if !slices.Contains(c.names, name) {
		c.names = append(c.names, name)
	}
	p.figures[name] = append(p.figures[name], value)
}

func (c *peerComparison) measure(t *testing.T, p *peer, load loadClient, name string, rate int) {
	t.Helper()
	if rate > 0 {
		load.Requests = rate * int(peerTime/time.Second)
	}
	seen, cpu := p.measure(t, load, rate)
	if rate > 0 {
		c.note(p, name+": p50, µs", float64(seen.P50.Microseconds()))
		c.note(p, name+": p99, µs", float64(seen.P99.Microseconds()))
		return
	}
	c.note(p, name+": a second", float64(load.Requests)/seen.Took.Seconds())
	c.note(p, name+": CPU, µs", float64(cpu.Microseconds())/float64(load.Requests))
}

func (c *peerComparison) print() {
	head := "| |"
	for _, p := range c.peers {
		head += " " + p.name + " |"
	}
	fmt.Printf("%s\n|%s\n", head, strings.Repeat(" --- |", len(c.peers)+1))
	for _, name := range c.names {
		row := "| " + name + " |"
		for _, p := range c.peers {
			row += " " + p.cell(name) + " |"
		}
		fmt.Println(row)
	}
}

// cell is the median of a figure, and of its ratios to the base in each round.
func (p *peer) cell(name string) string {
	of := p.figures[name]
	if len(of) == 0 {
		return ""
	}
	median := func(of []float64) float64 { return slices.Sorted(slices.Values(of))[len(of)/2] }
	cell := fmt.Sprintf("%.0f", median(of))
	if p.base == nil {
		return cell
	}
	ratios := slices.Clone(of)
	for round := range ratios {
		ratios[round] /= p.base.figures[name][round]
	}
	return cell + fmt.Sprintf(" (%.2f)", median(ratios))
}

// warmUp learns how many requests take the time of a measurement.
func (p *peer) warmUp(t *testing.T) {
	t.Helper()
	for name, load := range p.requests {
		load.Connections, load.Requests = loadConnections, 1000
		seen, _ := p.measure(t, load, 0)
		load.Requests = max(loadConnections, int(peerTime*time.Duration(load.Requests)/seen.Took))
		p.requests[name] = load
	}
}

// measure has a client send its requests, and answers what it saw and what the
// server and its database used of the CPU. Then it waits until they rest.
func (p *peer) measure(t *testing.T, load loadClient, rate int) (seen loadSeen, cpu time.Duration) {
	t.Helper()
	load.Addr = p.program.url[len("http://"):]
	before := p.cpu(t)
	load.Rate = rate
	seen = load.run(t)
	cpu = p.cpu(t) - before
	if p.pending != nil {
		eventually(t, p.name+" rests", func() bool { return !p.pending() })
	}
	p.program.log.forget("")
	return seen, cpu
}

func (p *peer) cpu(t *testing.T) (used time.Duration) {
	t.Helper()
	for _, process := range append(p.database, &serverProcess{pid: p.program.pid}) {
		more, err := process.treeCPU()
		if err != nil {
			t.Fatal(err)
		}
		used += more
	}
	return used
}

func (p *peer) memory(t *testing.T) float64 {
	t.Helper()
	return float64(memoryOf(t, p.program.pid, "VmRSS:")) / 1e6
}

// size is the size of a product, which must have both its images.
func (p *peer) size(t *testing.T) int {
	t.Helper()
	var product json.RawMessage
	read := p.requests["read"]
	askPeer(t, "GET", p.program.url+read.Paths[0], read.Header, nil, &product)
	if !bytes.Contains(product, []byte("a.jpg")) || !bytes.Contains(product, []byte("b.jpg")) {
		t.Fatalf("the product of %s has not both its images: %s", p.name, product)
	}
	return len(product)
}

// askPeer is a request while a server is set up. Its body is JSON, or nil.
func askPeer(t *testing.T, method, url string, header http.Header, body []byte, out any) {
	t.Helper()
	request, err := http.NewRequestWithContext(t.Context(), method, url, bytes.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	maps.Copy(request.Header, header)
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	if response.StatusCode != http.StatusOK {
		t.Fatalf("%s %s: %s", method, url, response.Status)
	}
	if err := json.NewDecoder(response.Body).Decode(out); err != nil {
		t.Fatal(err)
	}
}

func jsonHeader(authorization string) http.Header {
	return http.Header{"Content-Type": {"application/json"}, "Authorization": {authorization}}
}

// The product that every server has and is asked to make.
const (
	peerName        = "Trail shoe"
	peerDescription = "Light, grippy. Light, grippy. Light, grippy. Light, grippy. Light, grippy. Light, grippy. Light, grippy."
	peerSources     = `["https://images.example.com/trail-shoe-a.jpg","https://images.example.com/trail-shoe-b.jpg"]`
	peerNumbers     = `WITH RECURSIVE s(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM s WHERE n < 10000) `
)

// ourSeed stores our products, as they are when their images are ready.
const ourSeed = peerNumbers + `
INSERT INTO products (user_id, product_name, name_folded, product_description, price_cents, created_at, updated_at)
SELECT 1, '` + peerName + `', 'trail shoe', '` + peerDescription + `', n * 7919 % 100000, '2026-01-02 03:04:05.678', '2026-01-02 03:04:05.678' FROM s;
INSERT INTO images (product_id, user_id, position, source, host, port, status, ready_at, object_key, width, height, bytes, source_bytes)
SELECT p.id, 1, i.position, 'https://images.example.com/trail-shoe-' || i.letter || '.jpg', 'images.example.com', 443, 'ready', '2026-01-02 03:04:06.789',
	'products/' || p.id || '/' || i.position || '-0123456789abcdef.jpg', 2048, 1365, 181233, 2410033
FROM products p CROSS JOIN (SELECT 0 AS position, 'a' AS letter UNION SELECT 1, 'b') i ORDER BY p.id, i.position`

// ourPeer is this program as it is run behind a proxy: with tokens, and a log.
func ourPeer(t *testing.T, name string, env map[string]string, sources string, args ...string) *peer {
	t.Helper()
	env = environment(env, map[string]string{"AUTH": "on", "LOG_LEVEL": "info", "RATE_LIMIT": "0"}) // all the load is one token's
	header := jsonHeader("Bearer " + createToken(t, env))
	body := `{"user_id":1,"product_name":"` + peerName + `","product_description":"` + peerDescription + `","product_price":89.9,"product_images":`
	return &peer{name: name, program: startBinary(t, env, args...), requests: map[string]loadClient{
		"read":               {Paths: productPaths(loadConnections), Header: header, Status: 200},
		"list":               {Paths: []string{"/products?sort=product_price&limit=50"}, Header: header, Status: 200},
		"create":             {Method: "POST", Paths: []string{"/products"}, Body: body + "[]}", Header: header, Status: 201},
		"create with images": {Method: "POST", Paths: []string{"/products"}, Body: body + sources + "}", Header: header, Status: 201},
	}}
}

func embeddedPeer(t *testing.T, sources string) *peer {
	t.Helper()
	dir := t.TempDir()
	s := storeIn(t, dir)
	execSQLite(t, filepath.Join(dir, "pms.db"), ourSeed)
	p := ourPeer(t, "pms, embedded", map[string]string{"DATA_DIR": dir}, sources)
	p.pending = imagesPending(t, s)
	return p
}

// serversPeer has its images made by a worker, whose CPU does not count. The S3
// server goes with all that it has: to empty a shared one would take minutes.
func serversPeer(t *testing.T, sources string) *peer {
	t.Helper()
	env := bucketEnv(startS3(t).newBucket(t))
	env["DATABASE_URL"], env["REDIS_URL"], env["AMQP_URL"] = testDatabase(t), testRedis(t), testAMQP(t)
	seedUser(t, env)
	execPostgres(t, env["DATABASE_URL"], ourSeed+"; ANALYZE")
	db, err := openPostgres(t.Context(), env["DATABASE_URL"])
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(db.Close)
	server, err := sharedPostgres()
	if err != nil {
		t.Fatal(err)
	}
	p := ourPeer(t, "pms, servers", env, sources, "api")
	startBinary(t, environment(env), "worker")
	p.database, p.pending = []*serverProcess{server.proc}, imagesPending(t, newStore(db))
	return p
}

func imagesPending(t *testing.T, s *store) func() bool {
	return func() bool {
		var n int
		if err := queryRow(t.Context(), s, []any{&n}, "SELECT count(*) FROM images WHERE status = 'pending'"); err != nil {
			t.Fatal(err)
		}
		return n > 0
	}
}

func execSQLite(t *testing.T, path, sql string) {
	t.Helper()
	db, err := driver.Open("file:" + filepath.ToSlash(path))
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	if _, err := db.ExecContext(t.Context(), sql); err != nil {
		t.Fatal(err)
	}
}

// pocketBaseProducts is the collection: read by all, made by users.
const pocketBaseProducts = `{"name": "products", "type": "base", "listRule": "", "viewRule": "", "createRule": "@request.auth.id != \"\"",
	"fields": [{"name": "owner", "type": "relation", "collectionId": "_pb_users_auth_", "maxSelect": 1, "required": true},
		{"name": "name", "type": "text", "required": true}, {"name": "description", "type": "text"}, {"name": "price", "type": "number"},
		{"name": "sources", "type": "json"}, {"name": "images", "type": "file", "maxSelect": 10},
		{"name": "created", "type": "autodate", "onCreate": true}, {"name": "updated", "type": "autodate", "onCreate": true, "onUpdate": true}],
	"indexes": ["CREATE INDEX products_price ON products (price, id)"]}`

const pocketBaseSeed = peerNumbers + `
INSERT INTO products (id, owner, name, description, price, sources, images, created, updated)
SELECT printf('product%%08d', n), '%s', '` + peerName + `', '` + peerDescription + `', n * 7919 %% 100000 / 100.0, '` + peerSources + `',
	'["trail_shoe_a_0123456789a.jpg","trail_shoe_b_0123456789b.jpg"]', '2026-01-02 03:04:05.678Z', '2026-01-02 03:04:05.678Z' FROM s;
ANALYZE`

// pocketBase is PocketBase with SQLite as it sets it, or with synchronous as given.
func pocketBase(t *testing.T, dir string, base *peer, synchronous, sources string) *peer {
	t.Helper()
	data, program, name := t.TempDir(), filepath.Join(dir, "pocketbase"), "PocketBase"
	if out, err := exec.Command(program, "superuser", "upsert", "ann@example.com", "correct-horse", "--dir", data).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if synchronous != "" {
		name += ", synchronous=" + synchronous
	}
	serve := func() *instance {
		port, err := freePort()
		if err != nil {
			t.Fatal(err)
		}
		addr := fmt.Sprintf("127.0.0.1:%d", port)
		i := launchProgram(t, program, map[string]string{"SYNCHRONOUS": synchronous}, "serve", "--http="+addr, "--dir="+data)
		i.url = "http://" + addr
		eventually(t, "PocketBase answers", func() bool { return statusOf(i.url+"/api/health") == http.StatusOK })
		return i
	}
	setup := serve()
	user, token := setUpPocketBase(t, setup.url+"/api/collections")
	if err := setup.stop(); err != nil {
		t.Fatal(err)
	}
	execSQLite(t, filepath.Join(data, "data.db"), fmt.Sprintf(pocketBaseSeed, user))
	const records = "/api/collections/products/records"
	var reads []string
	for n := range loadConnections {
		reads = append(reads, fmt.Sprintf("%s/product%08d", records, n+1))
	}
	body := `{"owner":"` + user + `","name":"` + peerName + `","description":"` + peerDescription + `","price":89.9,"sources":`
	return &peer{name: name, base: base, program: serve(), requests: map[string]loadClient{
		"read":               {Paths: reads, Status: 200},
		"list":               {Paths: []string{records + "?sort=price&perPage=50&skipTotal=1"}, Status: 200},
		"create":             {Method: "POST", Paths: []string{records}, Body: body + "[]}", Header: jsonHeader(token), Status: 200},
		"create with images": {Method: "POST", Paths: []string{records}, Body: body + sources + "}", Header: jsonHeader(token), Status: 200},
	}}
}

// setUpPocketBase makes the collection, and a user with a token.
func setUpPocketBase(t *testing.T, collections string) (id, token string) {
	t.Helper()
	var admin, user, made struct {
		ID, Token string
		Record    struct{ ID string }
	}
	login := []byte(`{"identity": "ann@example.com", "email": "ann@example.com", "password": "correct-horse", "passwordConfirm": "correct-horse"}`)
	askPeer(t, "POST", collections+"/_superusers/auth-with-password", jsonHeader(""), login, &admin)
	askPeer(t, "POST", collections, jsonHeader(admin.Token), []byte(pocketBaseProducts), &made)
	askPeer(t, "POST", collections+"/users/records", jsonHeader(admin.Token), login, &made)
	askPeer(t, "POST", collections+"/users/auth-with-password", jsonHeader(""), login, &user)
	return user.Record.ID, user.Token
}
