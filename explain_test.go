package main

import (
	"encoding/json"
	"fmt"
	"os"
	"strconv"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5"
)

// catalogueSize is the size of the catalogue that list queries are proven on.
// LISTS_PRODUCTS sets it; make lists takes a million.
func catalogueSize(t testing.TB) int {
	t.Helper()
	text := os.Getenv("LISTS_PRODUCTS")
	if text == "" {
		return 100_000
	}
	size, err := strconv.Atoi(text)
	if err != nil {
		t.Fatalf("LISTS_PRODUCTS: %v", err)
	}
	return size
}

// smallCatalogueSize is that of the catalogue which they are compared with.
const smallCatalogueSize = 10_000

// No page of any list, at its beginning, far into the order or at its own end, reads
// more rows than its most selective filter matches, and a page's worth, and the products
// that it looks at first. It may read a little more where hardly more are left in the
// order, or where several filters match few, but evenly: PostgreSQL then finds it cheaper
// to read in the list's order until the page is full.
func TestListsReadNoMoreThanTheyNeed(t *testing.T) {
	t.Parallel()
	s, db := postgresStore(t)
	size := catalogueSize(t)
	fillCatalogue(t, db, size)
	far := make(map[sortOrder]*cursor)
	for _, sort := range allSorts() {
		far[sort] = middle(t, s, sort, size)
	}
	const limit, even = 50, 2
	lists, more := 0, 0
	for _, f := range listFilters() {
		matches, all := matchesOf(t, s, f)
		for sort, middle := range far {
			f.Sort, f.Limit = sort, limit
			for _, f.After = range []*cursor{nil, middle, beforeItsEnd(t, s, f)} {
				lists++
				q := listQueryOf(t, f)
				plan, page, near := explainList(t, s, q)
				allowed := matches + limit
				if len(q.filters()) > 0 {
					allowed += q.nearby()
				}
				read := int(page.readOf("products") + near.readOf("products"))
				if read > allowed {
					more++
					if all == 0 || read > even*limit*size/all {
						t.Errorf("%+v: reads %d rows, its most selective filter matches %d, all of them %d:\n%s", f, read, matches, all, plan)
					}
				}
			}
		}
	}
	t.Logf("%d of %d lists read more rows than their most selective filter matches, since a page is full sooner", more, lists)
	if more > lists/100 {
		t.Error("these are many")
	}
	wantEvenCosts(t, s, far)
}

// beforeItsEnd is a cursor to the last twenty products of a list, or nil if it has fewer.
func beforeItsEnd(t *testing.T, s *store, f productFilter) *cursor {
	t.Helper()
	const left = 20
	reverse := f
	reverse.Sort, reverse.Limit, reverse.After = "-"+f.Sort, left+1, nil
	if f.Sort.descending() {
		reverse.Sort = sortOrder(f.Sort.key())
	}
	last, err := s.Products(t.Context(), reverse)
	if err != nil {
		t.Fatal(err)
	}
	if len(last) <= left {
		return nil
	}
	return cursorAfter(last[left], f.Sort)
}

// listFilters are the filters of lists, one by one and together.
func listFilters() (filters []productFilter) {
	const unset = -1
	for _, user := range []int64{unset, 7, 1} { // 1 has a tenth of all products, and no boot
		for _, name := range []string{"", "number 345678", "unobtainium", "SHOE", "trail", "boot", "er 12"} {
			for _, price := range [][2]Price{{unset, unset}, {5000, 5002}, {1000, unset}, {99_000, unset}, {unset, 50_000}, {1000, 2000}} {
				f := productFilter{Name: name}
				if user != unset {
					f.UserID = &user
				}
				if price[0] != unset {
					f.MinPrice = &price[0]
				}
				if price[1] != unset {
					f.MaxPrice = &price[1]
				}
				filters = append(filters, f)
			}
		}
	}
	return filters
}

// Filling a queue anew reads the images that are pending, and not the whole table.
func TestRequeueAllReadsWhatIsPending(t *testing.T) {
	t.Parallel()
	s, db := postgresStore(t)
	const pending = 30
	p := create(t, s, "https://a.example/1.jpg")
	for _, sql := range []string{
		fmt.Sprintf(`INSERT INTO images (product_id, user_id, position, source, host, port, status, claim, run_at, published_at, failed_at)
			SELECT %d, 1, n, 'https://a.example/', 'a.example', 443, CASE WHEN n < %d THEN 'pending' ELSE 'failed' END,
				CASE WHEN n < 20 THEN n %% 2 ELSE 0 END, CASE WHEN n < 20 THEN now() END, CASE WHEN n >= 20 THEN now() END, CASE WHEN n >= %[2]d THEN now() END
			FROM generate_series(1, 20000) n`, p.ID, pending),
		`ANALYZE images`,
	} {
		if _, err := db.Exec(t.Context(), sql); err != nil {
			t.Fatal(err)
		}
	}
	plan, root := explain(t, db, selectPublished)
	if read := root.readOf("images"); read > pending+1 {
		t.Errorf("reads %v rows, %d are pending:\n%s", read, pending, plan)
	}
	ids, err := queryIDs(t.Context(), s, selectPublished)
	if err != nil {
		t.Fatal(err)
	}
	plan, root = explain(t, db, requeueAll, ids, s.now())
	if read := root.readOf("images"); read > 2*(pending+1) { // by the scan, and the update itself
		t.Errorf("reads %v rows to change %d:\n%s", read, len(ids), plan)
	}
}

// However many deliveries wait for a webhook, the next are found without sorting them.
func TestClaimDeliveriesReadsWhatItClaims(t *testing.T) {
	t.Parallel()
	s, db := postgresStore(t)
	hook := hookOn(t, s, "http://a.example")
	const claimed = 4
	for _, sql := range []string{
		fmt.Sprintf(`INSERT INTO deliveries (webhook_id, event_id, product_id, body, run_at)
			SELECT %d, n, 1, '', now() - n %% 100 * interval '1 second' FROM generate_series(1, 20000) n`, hook.ID),
		`ANALYZE deliveries`,
	} {
		if _, err := db.Exec(t.Context(), sql); err != nil {
			t.Fatal(err)
		}
	}
	plan, root := explain(t, db, claimDeliveries, hook.ID, s.now(), s.now().Add(deliveryLease), 1, claimed)
	if read := root.readOf("deliveries"); read > 3*claimed { // by the scan, its lock and the update itself
		t.Errorf("reads %v rows to claim %d:\n%s", read, claimed, plan)
	}
}

// The embedded default finds a place in the log, and one in any list, by an index
// alone: it neither begins at the first row with the same key nor sorts the rest.
func TestSQLiteFindsPlacesByIndex(t *testing.T) {
	t.Parallel()
	s := sqliteStore(t)
	want := func(what, part string, sorts int, sql string, args ...any) {
		t.Helper()
		r, err := s.QueryOnce(t.Context(), "EXPLAIN QUERY PLAN "+sql, args...)
		steps, err := collect(r, err, func(r rows) (step string, err error) {
			err = r.Scan(new(any), new(any), new(any), &step)
			return step, err
		})
		plan := strings.Join(steps, "\n")
		if err != nil || !strings.Contains(plan, part) || strings.Count(plan, "TEMP B-TREE") != sorts {
			t.Errorf("%s: %v, want %s:\n%s", what, err, part, plan)
		}
	}
	want("events after a place", "events_order ((tx,rowid)>(?,?))", 0, selectEvents, 0, 1, 1)
	want("is a place still in the log", "events_order ((tx,rowid)<(?,?))", 0, selectHasPlace, 0, 1)
	want("what was published", "images_published", 0, selectPublished)
	want("what is being published", "images_due", 0, selectPublished)
	want("is a webhook behind", "events_order ((tx,rowid)>(?,?))", 0, anyWebhookBehind)
	p := create(t, s)
	const imagesOfAPage = 1 // are sorted
	for _, sort := range allSorts() {
		beyond := "rowid>?"
		if sort.key() != "id" {
			beyond = "(" + sort.column() + ",rowid)>(?,?)"
		}
		if sort.descending() {
			beyond = strings.ReplaceAll(beyond, ">", "<")
		}
		f := productFilter{Sort: sort, Limit: 50, After: cursorAfter(p, sort)}
		for _, far := range []bool{false, true} { // which says nothing to SQLite
			f.UserID = nil
			q := listQueryOf(t, f)
			want(string(sort), beyond, imagesOfAPage, q.page(far), q.args...)
			f.UserID = new(int64(1))
			q = listQueryOf(t, f)
			want("a user's by "+string(sort), "user_id=? AND "+beyond, imagesOfAPage, q.page(far), q.args...)
		}
	}
}

func allSorts() []sortOrder {
	return []sortOrder{"id", "-id", "product_price", "-product_price", "created_at", "-created_at", "product_name", "-product_name"}
}

// wantEvenCosts checks that a page in the middle of a list (the ten-thousandth of
// a million products) costs at most 1.5 of the first, and the first at most 2 of
// that in a catalogue of 10,000. The
// cost is what does not depend on the machine: the blocks that PostgreSQL
// touches, of which two more do not count: a range may begin at the end of one.
// BenchmarkList has the times. Each list fills its pages at both sizes, since
// otherwise it is the number of products that would be compared.
func wantEvenCosts(t *testing.T, s *store, middles map[sortOrder]*cursor) {
	t.Helper()
	smallStore, db := postgresStore(t)
	fillCatalogue(t, db, smallCatalogueSize)
	filters := map[string]productFilter{
		"none":        {},
		"large user":  {UserID: new(int64(1))},
		"wide price":  {MinPrice: new(Price(1000))},
		"common name": {Name: "SHOE"},
		// Half of the user's products, each of which is a trail shoe.
		"large user, name, price": {UserID: new(int64(1)), Name: "trail", MaxPrice: new(Price(50_000))},
	}
	const farOver, sizeOver, more = 1.5, 2, 2
	var worstFar, worstSize float64
	for name, f := range filters {
		for sort, middle := range middles {
			f.Sort, f.Limit, f.After = sort, 50, nil
			_, small, _ := explainList(t, smallStore, listQueryOf(t, f))
			_, first, _ := explainList(t, s, listQueryOf(t, f))
			f.After = middle
			plan, far, _ := explainList(t, s, listQueryOf(t, f))
			worstFar, worstSize = max(worstFar, far.blocks()/first.blocks()), max(worstSize, first.blocks()/small.blocks())
			if far.blocks() > farOver*first.blocks()+more || first.blocks() > sizeOver*small.blocks() {
				t.Errorf("%s by %s: %v blocks, first page %v, in a small catalogue %v:\n%s", name, sort, far.blocks(), first.blocks(), small.blocks(), plan)
			}
		}
	}
	t.Logf("blocks touched: the page in the middle at most %.2f of the first, the first at most %.2f of that in a catalogue of %d", worstFar, worstSize, smallCatalogueSize)
}

// fillCatalogue stores products of a thousand users, the first of whom has a
// tenth of them. The indexes are made afterwards and no events noted, which
// takes a fraction of the time.
func fillCatalogue(t testing.TB, db *postgres, size int) {
	t.Helper()
	indexes, err := db.pool.Query(t.Context(), `SELECT indexname, indexdef FROM pg_indexes WHERE tablename = 'products' AND indexname <> 'products_pkey'`)
	if err != nil {
		t.Fatal(err)
	}
	drop, create := "", ""
	var name, def string
	_, err = pgx.ForEachRow(indexes, []any{&name, &def}, func() error {
		drop += "DROP INDEX " + name + ";"
		create += def + ";"
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, sql := range []string{drop, fmt.Sprintf(`
		SET maintenance_work_mem = '256MB'; SET synchronous_commit = off; ALTER TABLE products DISABLE TRIGGER USER;
		INSERT INTO users (id, name, email, created_at) SELECT n, 'u', 'u' || n, now() FROM generate_series(2, 1000) n;
		INSERT INTO products (user_id, product_name, name_folded, product_description, price_cents, created_at, updated_at)
		SELECT CASE WHEN n %% 10 = 0 THEN 1 ELSE 2 + n * 7919 %% 999 END, 'Shoe ' || name, 'shoe ' || lower(name), '',
			n * 104729 %% 100000, timestamptz '2026-01-01' + n * interval '1 second', now()
		FROM (SELECT n, (ARRAY['Trail','Boot','Sandal','Clog','Pump'])[1 + n %% 5] || ' number ' || n * 7907 %% 1000003 AS name FROM generate_series(1::bigint, %d) n) p;`, size),
		create, "ALTER TABLE products ENABLE TRIGGER USER; ANALYZE products"} {
		if _, err := db.pool.Exec(t.Context(), sql, pgx.QueryExecModeSimpleProtocol); err != nil {
			t.Fatalf("%v in %s", err, sql)
		}
	}
}

// matchesOf is how many products the most selective of a filter's conditions
// matches, or none if there is no filter, and how many all of them match.
func matchesOf(t *testing.T, s *store, f productFilter) (least, all int) {
	t.Helper()
	for _, one := range []productFilter{{UserID: f.UserID}, {Name: f.Name}, {MinPrice: f.MinPrice, MaxPrice: f.MaxPrice}} {
		if one != (productFilter{}) {
			if count := countProducts(t, s, one); least == 0 || count < least {
				least = max(count, 1)
			}
		}
	}
	return least, countProducts(t, s, f)
}

func countProducts(t *testing.T, s *store, f productFilter) (count int) {
	t.Helper()
	q := listQueryOf(t, f)
	if err := queryRow(t.Context(), s, []any{&count}, "SELECT count(*) FROM products "+where(q.all), q.args...); err != nil {
		t.Fatal(err)
	}
	return count
}

// middle is a cursor to the page of 50 in the middle of a list of all products.
func middle(t testing.TB, s *store, sort sortOrder, size int) *cursor {
	t.Helper()
	direction := ""
	if sort.descending() {
		direction = "DESC"
	}
	var id int64
	err := queryRow(t.Context(), s, []any{&id}, fmt.Sprintf("SELECT id FROM products ORDER BY %s %s, id %s OFFSET %d LIMIT 1", sort.column(), direction, direction, size/2-51))
	if err != nil {
		t.Fatal(err)
	}
	p, err := s.Product(t.Context(), id)
	if err != nil {
		t.Fatal(err)
	}
	return cursorAfter(p, sort)
}

// planNode is what is needed of EXPLAIN's output.
type planNode struct {
	Relation string  `json:"Relation Name"`
	Rows     float64 `json:"Actual Rows"`
	Loops    float64 `json:"Actual Loops"`
	Filtered float64 `json:"Rows Removed by Filter"`
	Recheck  float64 `json:"Rows Removed by Index Recheck"`
	Hit      float64 `json:"Shared Hit Blocks"` // with the children's
	Missed   float64 `json:"Shared Read Blocks"`
	Plans    []planNode
}

// readOf is how many rows of a table a plan has read.
func (n planNode) readOf(table string) (rows float64) {
	if n.Relation == table {
		rows = (n.Rows + n.Filtered + n.Recheck) * n.Loops
	}
	for _, child := range n.Plans {
		rows += child.readOf(table)
	}
	return rows
}

// blocks is how many blocks a plan has touched.
func (n planNode) blocks() float64 { return n.Hit + n.Missed }

// explainList runs the queries of a list, planned as the program has them planned:
// that of the page, and the look at what is near if there is one.
func explainList(t *testing.T, s *store, q listQuery) (plan string, page, near planNode) {
	t.Helper()
	far, err := s.matchesLieFar(t.Context(), q)
	if err != nil {
		t.Fatal(err)
	}
	plan, page = explain(t, s, q.page(far), q.args...)
	if len(q.filters()) > 0 {
		_, near = explain(t, s, q.near(), q.args...)
	}
	return plan, page, near
}

func listQueryOf(t *testing.T, f productFilter) listQuery {
	t.Helper()
	q, err := f.query()
	if err != nil {
		t.Fatal(err)
	}
	return q
}

func explain(t *testing.T, db database, sql string, args ...any) (plan string, root planNode) {
	t.Helper()
	r, err := db.QueryOnce(t.Context(), "EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) "+sql, args...)
	plans, err := collect(r, err, func(r rows) (text string, err error) { err = r.Scan(&text); return text, err })
	if err != nil {
		t.Fatal(err)
	}
	var out []struct{ Plan planNode }
	if err := json.Unmarshal([]byte(plans[0]), &out); err != nil {
		t.Fatal(err)
	}
	return plans[0], out[0].Plan
}

// BenchmarkList compares the first page and one in the middle of lists of a large
// catalogue, with and without a filter, with the first of lists of ten thousand products.
//
//	LISTS_PRODUCTS=1000000 go test -run '^$' -bench List -count 6 . | tee list.txt && benchstat list.txt
func BenchmarkList(b *testing.B) {
	open := func(size int) *store {
		s, db := postgresStore(b)
		fillCatalogue(b, db, size)
		return s
	}
	size := catalogueSize(b)
	small, large := open(smallCatalogueSize), open(size)
	for _, sort := range []sortOrder{"id", "-product_price", "created_at", "-product_name"} {
		for _, page := range []struct {
			name  string
			store *store
			after *cursor
		}{{"first-of-10k", small, nil}, {"first", large, nil}, {"middle", large, middle(b, large, sort, size)}} {
			for _, name := range []string{"", "shoe", "boot"} { // none, all, a fifth; boots are last by -product_name
				b.Run(fmt.Sprintf("%s/name=%s/%s", sort, name, page.name), func(b *testing.B) {
					for b.Loop() {
						got, err := page.store.Products(b.Context(), productFilter{Name: name, Sort: sort, Limit: 50, After: page.after})
						if err != nil || len(got) != 50 {
							b.Fatal(len(got), err)
						}
					}
				})
			}
		}
	}
}
