package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// eachStore runs a test over both databases: what holds for one must hold for
// the other.
func eachStore(t *testing.T, test func(t *testing.T, s *store)) {
	t.Run("postgres", func(t *testing.T) {
		t.Parallel()
		s, _ := postgresStore(t)
		test(t, s)
	})
	t.Run("sqlite", func(t *testing.T) {
		t.Parallel()
		test(t, sqliteStore(t))
	})
}

// sqliteStore is a store on a database of its own: a copy of one that was
// migrated, which takes longer.
func sqliteStore(t testing.TB) *store {
	t.Helper()
	migrated, err := migratedFile()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "pms.db"), migrated, 0o600); err != nil {
		t.Fatal(err)
	}
	return storeIn(t, dir)
}

// storeIn is a store in the SQLite database of a directory.
func storeIn(t testing.TB, dir string) *store {
	t.Helper()
	db, err := openSQLite(dir)
	if err != nil {
		t.Fatal(err)
	}
	return migratedStore(t, db)
}

var migratedFile = sync.OnceValues(func() ([]byte, error) {
	dir, err := os.MkdirTemp("", "migrated")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	db, err := openSQLite(dir)
	if err != nil {
		return nil, err
	}
	err = db.Migrate(context.Background())
	db.Close()
	if err != nil {
		return nil, err
	}
	return os.ReadFile(filepath.Join(dir, "pms.db"))
})

// postgresStore is a store in a PostgreSQL database of its own.
func postgresStore(t testing.TB) (*store, *postgres) {
	t.Helper()
	db, err := openPostgres(t.Context(), testDatabase(t))
	if err != nil {
		t.Fatal(err)
	}
	return migratedStore(t, db), db
}

// storeAway is a store whose database is away.
func storeAway(t *testing.T) *store {
	t.Helper()
	db, err := openPostgres(t.Context(), "postgres://nobody@127.0.0.1:1/none")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(db.Close)
	return newStore(db)
}

// migratedStore is a store whose database has the schema and user 1.
func migratedStore(t testing.TB, db database) *store {
	t.Helper()
	t.Cleanup(db.Close)
	s := newStore(db)
	if err := s.Migrate(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, ok := db.(*postgres); ok {
		addUser(t, s)
	}
	return s
}

func addUser(t testing.TB, s *store) int64 {
	t.Helper()
	id, err := s.AddUser(t.Context(), "Ann", fmt.Sprintf("ann%d@example.com", rand.Int64()))
	if err != nil {
		t.Fatal(err)
	}
	return id
}

// create stores a product of user 1 with the given images.
func create(t *testing.T, s *store, sources ...string) Product {
	t.Helper()
	p := Product{UserID: 1, Name: "Trail shoe", Description: "Light.", Price: 8990, Images: sourcesOf(sources...)}
	p, err := s.CreateProduct(t.Context(), p, origin{RequestID: "req-1"}, nil)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func sourcesOf(sources ...string) []Image {
	images := make([]Image, len(sources))
	for n, source := range sources {
		images[n] = Image{Position: n, Source: source}
	}
	return images
}

func always(Product) error { return nil }

func setSources(sources ...string) func(*Product) {
	return func(p *Product) { p.Images = sourcesOf(sources...) }
}

// publishDue dispatches everything that is due and answers the jobs.
func publishDue(t *testing.T, s *store) []Job {
	t.Helper()
	var all []Job
	_, err := s.DispatchDue(t.Context(), 1000, func(_ context.Context, jobs []Job) ([]Job, error) {
		all = append(all, jobs...)
		return nil, nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

// finish has the image of a job made, with variants under the keys after the first,
// as a worker would.
func finish(t *testing.T, s *store, job Job, keys ...string) int64 {
	t.Helper()
	reserve(t, s, job, keys...)
	version, err := s.SettleReady(t.Context(), job, imageWith(keys...))
	if err != nil {
		t.Fatal(err)
	}
	return version
}

func reserve(t testing.TB, s *store, job Job, keys ...string) {
	t.Helper()
	if err := s.ReserveObject(t.Context(), job.ID, keys...); err != nil {
		t.Fatal(err)
	}
}

func deleteProduct(t *testing.T, s *store, id int64) {
	t.Helper()
	if err := s.DeleteProduct(t.Context(), id, always); err != nil {
		t.Fatal(err)
	}
}

// wantGarbage deletes the objects that are due, and fails the test unless they are
// those of these keys.
func wantGarbage(t *testing.T, s *store, when string, want ...string) {
	t.Helper()
	var keys []string
	_, err := s.CollectGarbage(t.Context(), 1000, func(_ context.Context, key string) error {
		keys = append(keys, key)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	slices.Sort(keys)
	if !slices.Equal(keys, want) {
		t.Errorf("%s: deleted %q, want %q", when, keys, want)
	}
}

// advance turns the store's clock forward.
func advance(s *store, by time.Duration) {
	now := s.now
	s.now = func() time.Time { return now().Add(by) }
}

func TestStoreKeepsProductsAsTheyWere(t *testing.T) {
	t.Parallel()
	eachStore(t, func(t *testing.T, s *store) {
		p := create(t, s, "https://a.example/1.jpg", "https://a.example/2.jpg", "https://a.example/1.jpg")
		got, err := s.Product(t.Context(), p.ID)
		if err != nil {
			t.Fatal(err)
		}
		if fmt.Sprint(got) != fmt.Sprint(p) {
			t.Errorf("read\n%v, stored\n%v", got, p)
		}
		if got.Version != 1 || got.CreatedAt.IsZero() || !got.CreatedAt.Equal(got.UpdatedAt) {
			t.Errorf("a new product has version %d, created %v, updated %v", got.Version, got.CreatedAt, got.UpdatedAt)
		}
		if _, err := s.Product(t.Context(), p.ID+1); !errors.Is(err, errNotFound) {
			t.Errorf("reading a product that is not there: %v", err)
		}
	})
}

func TestStoreKeepsEveryAmountToTheCent(t *testing.T) {
	t.Parallel()
	eachStore(t, func(t *testing.T, s *store) {
		for _, price := range []Price{0, 1, 29, 8990, 450359962737, maxPrice} {
			p, err := s.CreateProduct(t.Context(), Product{UserID: 1, Name: "x", Price: price}, origin{}, nil)
			if err != nil {
				t.Fatal(err)
			}
			if got, err := s.Product(t.Context(), p.ID); err != nil || got.Price != price {
				t.Errorf("stored %s, read %s, %v", price, got.Price, err)
			}
		}
	})
}

func TestStoreRefusesProductsOfUnknownUsers(t *testing.T) {
	t.Parallel()
	eachStore(t, func(t *testing.T, s *store) {
		_, err := s.CreateProduct(t.Context(), Product{UserID: 4711, Name: "x", Images: sourcesOf("https://a.example/1")}, origin{}, nil)
		if !errors.Is(err, errUnknownUser) {
			t.Errorf("a product of an unknown user: %v", err)
		}
		if jobs := publishDue(t, s); len(jobs) != 0 {
			t.Errorf("its images were queued all the same: %v", jobs)
		}
	})
}

func TestStoreSchemaIsCreatedOnceByManyInstances(t *testing.T) {
	t.Parallel()
	open := map[string]func(t *testing.T) func() (database, error){
		"postgres": func(t *testing.T) func() (database, error) {
			url := testDatabase(t)
			return func() (database, error) { return openPostgres(t.Context(), url) }
		},
		"sqlite": func(t *testing.T) func() (database, error) {
			dir := t.TempDir()
			return func() (database, error) { return openSQLite(dir) }
		},
	}
	for name, opener := range open {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			open := opener(t)
			var group sync.WaitGroup
			for range 10 {
				group.Go(func() {
					db, err := open()
					if err != nil {
						t.Error(err)
						return
					}
					defer db.Close()
					if err := db.Migrate(t.Context()); err != nil {
						t.Error(err)
					}
				})
			}
			group.Wait()
			db, err := open()
			if err != nil {
				t.Fatal(err)
			}
			defer db.Close()
			if _, err := db.Exec(t.Context(), `UPDATE schema_version SET version = $1`, schemaVersion+1); err != nil {
				t.Fatal(err)
			}
			if err := db.Migrate(t.Context()); !errors.Is(err, errSchemaNewer) {
				t.Errorf("a schema from the future: %v", err)
			}
		})
	}
}

func TestStoreUpdateKeepsImagesWhoseSourceStays(t *testing.T) {
	t.Parallel()
	type change struct{ before, after, queued, garbage string }
	changes := map[string]change{
		"unchanged":              {"a b", "a b", "", ""},
		"one more":               {"a", "a b", "b", ""},
		"one less":               {"a b", "b", "", "a0"},
		"none left":              {"a b", "", "", "a0 b1"},
		"another order":          {"a b c", "c a b", "", ""},
		"replaced":               {"a b", "a c", "c", "b1"},
		"twice from once":        {"a", "a a", "a", ""},
		"once from twice":        {"a a", "a", "", "a1"},
		"twice stays twice":      {"a b a", "a a b", "", ""},
		"all new":                {"a b", "c d", "c d", "a0 b1"},
		"from none":              {"", "a", "a", ""},
		"turned around and more": {"a b", "c b a", "c", ""},
	}
	eachStore(t, func(t *testing.T, s *store) {
		for name, c := range changes {
			t.Run(name, func(t *testing.T) {
				p := create(t, s, strings.Fields(c.before)...)
				for _, job := range publishDue(t, s) {
					image, _ := s.PendingImage(t.Context(), job.ID)
					finish(t, s, job, fmt.Sprintf("%s%d", image.Source, image.Position))
				}
				before, _ := s.Product(t.Context(), p.ID)
				after, err := s.UpdateProduct(t.Context(), p.ID, origin{}, always, setSources(strings.Fields(c.after)...))
				if err != nil {
					t.Fatal(err)
				}
				read, _ := s.Product(t.Context(), p.ID)
				if fmt.Sprint(read) != fmt.Sprint(after) {
					t.Errorf("answered\n%v, stored\n%v", after, read)
				}
				if together, _ := s.ProductsByID(t.Context(), []int64{p.ID}); fmt.Sprint(together) != fmt.Sprint([]Product{read}) {
					t.Errorf("read with others\n%v, alone\n%v", together, read)
				}
				if wantVersion := before.Version + 1; c.before == c.after && read.Version != before.Version || c.before != c.after && read.Version != wantVersion {
					t.Errorf("version %d after %d", read.Version, before.Version)
				}
				var sources, queued []string
				for n, image := range read.Images {
					sources = append(sources, image.Source)
					if image.Position != n {
						t.Errorf("image %d stands at position %d", n, image.Position)
					}
					if image.Status == imagePending {
						queued = append(queued, image.Source)
					} else if image.Key[:1] != image.Source {
						t.Errorf("source %s has the object %s", image.Source, image.Key)
					}
				}
				if got := strings.Join(sources, " "); got != c.after {
					t.Errorf("sources %q, want %q", got, c.after)
				}
				if got := strings.Join(queued, " "); got != c.queued {
					t.Errorf("queued %q, want %q", got, c.queued)
				}
				wantGarbage(t, s, "of what was dropped", strings.Fields(c.garbage)...)
				if err := s.DeleteProduct(t.Context(), p.ID, always); err != nil {
					t.Error(err)
				}
				if _, err := s.Exec(t.Context(), "DELETE FROM garbage"); err != nil {
					t.Error(err)
				}
			})
		}
	})
}

func TestStoreUpdateObeysItsCondition(t *testing.T) {
	t.Parallel()
	eachStore(t, func(t *testing.T, s *store) {
		p := create(t, s)
		refuse := func(Product) error { return errStale }
		if _, err := s.UpdateProduct(t.Context(), p.ID, origin{}, refuse, setSources("x")); !errors.Is(err, errStale) {
			t.Errorf("update: %v", err)
		}
		if err := s.DeleteProduct(t.Context(), p.ID, refuse); !errors.Is(err, errStale) {
			t.Errorf("delete: %v", err)
		}
		if got, err := s.Product(t.Context(), p.ID); err != nil || got.Version != 1 {
			t.Errorf("the product was changed: %v, %v", got, err)
		}
		if _, err := s.UpdateProduct(t.Context(), 4711, origin{}, always, setSources()); !errors.Is(err, errNotFound) {
			t.Errorf("update of nothing: %v", err)
		}
	})
}

// Of writers that all start from the version they read, each version's change
// must be made by one.
func TestStoreConcurrentConditionalUpdatesLoseNothing(t *testing.T) {
	t.Parallel()
	eachStore(t, func(t *testing.T, s *store) {
		p := create(t, s)
		const writers, each = 8, 10
		var group sync.WaitGroup
		for range writers {
			group.Go(func() {
				for done := 0; done < each; {
					before, err := s.Product(t.Context(), p.ID)
					if err != nil {
						t.Error(err)
						return
					}
					_, err = s.UpdateProduct(t.Context(), p.ID, origin{},
						func(now Product) error {
							if now.Version != before.Version {
								return errStale
							}
							return nil
						},
						func(p *Product) { p.Price = before.Price + 1 })
					if err == nil {
						done++
					} else if !errors.Is(err, errStale) {
						t.Error(err)
						return
					}
				}
			})
		}
		group.Wait()
		got, _ := s.Product(t.Context(), p.ID)
		if want := p.Price + writers*each; got.Price != want || got.Version != 1+writers*each {
			t.Errorf("price %d and version %d after %d updates from %d", got.Price, got.Version, writers*each, p.Price)
		}
	})
}

func TestStoreDeleteLeavesNothing(t *testing.T) {
	t.Parallel()
	eachStore(t, func(t *testing.T, s *store) {
		p := create(t, s, "a", "b")
		jobs := publishDue(t, s)
		finish(t, s, jobs[0], "object")
		deleteProduct(t, s, p.ID)
		if _, err := s.Product(t.Context(), p.ID); !errors.Is(err, errNotFound) {
			t.Errorf("after its deletion: %v", err)
		}
		if err := s.DeleteProduct(t.Context(), p.ID, always); !errors.Is(err, errNotFound) {
			t.Errorf("second deletion: %v", err)
		}
		wantGarbage(t, s, "with the product", "object")
		if _, err := s.PendingImage(t.Context(), jobs[1].ID); !errors.Is(err, errNotFound) {
			t.Errorf("its pending image: %v", err)
		}
	})
}

func TestStoreListsByEveryFilterAndSort(t *testing.T) {
	t.Parallel()
	eachStore(t, func(t *testing.T, s *store) {
		all := seedProducts(t, s, addUser(t, s))
		for _, sort := range allSorts() {
			for name, f := range map[string]productFilter{
				"everything":    {},
				"user":          {UserID: new(int64(1))},
				"unknown user":  {UserID: new(int64(99))},
				"least price":   {MinPrice: new(Price(300))},
				"most price":    {MaxPrice: new(Price(300))},
				"one price":     {MinPrice: new(Price(300)), MaxPrice: new(Price(300))},
				"no price":      {MinPrice: new(Price(301)), MaxPrice: new(Price(300))},
				"name":          {Name: "shoe"},
				"name in caps":  {Name: "SHOE"},
				"name, greek":   {Name: "ΣΊΣΥΦΟΣ"},
				"name, percent": {Name: "50%"},
				"name, under":   {Name: "a_b"},
				"name, slash":   {Name: `c\d`},
				"name, nowhere": {Name: "zzz"},
				"all of them":   {UserID: new(int64(1)), Name: "e", MinPrice: new(Price(100)), MaxPrice: new(Price(400))},
			} {
				f.Sort = sort
				want := expectedList(all, f)
				for _, limit := range []int{1, 3, 200} {
					f.Limit = limit
					if got := readPages(t, s, f); fmt.Sprint(got) != fmt.Sprint(want) {
						t.Errorf("%s by %s, %d a page:\n%v, want\n%v", name, sort, limit, got, want)
					}
				}
			}
		}
	})
}

// Products that pass a filter are listed as they are wherever they lie in the order, and
// it is known when they lie far.
func TestStoreListsWhatLiesFar(t *testing.T) {
	t.Parallel()
	eachStore(t, func(t *testing.T, s *store) {
		const near, boots, nearBoots = 200, 13, 3 // near are those that are looked at
		var entries []batchEntry
		for n := range near - nearBoots + boots {
			e := entry(fmt.Sprintf("Axe %03d", n))
			e.Price = Price(n)
			if n >= near-nearBoots {
				e.Name, e.Images = fmt.Sprintf("Boot %d", n), sourcesOf("a", "b")
			}
			entries = append(entries, e)
		}
		var ids []int64
		for _, e := range createBatch(t, s, entries) {
			ids = append(ids, e.ID)
		}
		all, err := s.ProductsByID(t.Context(), ids)
		if err != nil || len(all) != len(entries) {
			t.Fatal(len(all), err)
		}
		for _, sort := range allSorts() {
			for least := Price(near - 1); least <= near+1; least++ {
				for _, f := range []productFilter{{MinPrice: &least}, {Name: "boot", MinPrice: &least}, {Name: fmt.Sprintf("boot %d", least)}, {UserID: new(int64(1)), Name: "boot", MinPrice: &least}, {Name: "none"}} {
					f.Sort, f.Limit = sort, 8
					if got, want := readPages(t, s, f), expectedList(all, f); fmt.Sprint(got) != fmt.Sprint(want) {
						t.Errorf("%+v: %v, want %v", f, got, want)
					}
				}
			}
		}
		far := productFilter{Name: "boot", Sort: "-id", Limit: 2 * boots}
		if got, want := readPages(t, s, far), expectedList(all, far); fmt.Sprint(got) != fmt.Sprint(want) {
			t.Errorf("%+v: %v, want %v", far, got, want)
		}
		for _, c := range []struct {
			f    productFilter
			want bool
		}{
			{far, true}, // the last page
			{productFilter{Name: "boot", Sort: "-id", Limit: boots}, false},
			{productFilter{Name: "boot", Sort: "id", Limit: 8}, false},
			{productFilter{MinPrice: new(Price(near - nearBoots + 1)), Sort: "id", Limit: 8}, true}, // two are few
			{productFilter{Name: "boot 200", Sort: "id", Limit: 8}, true},
			{productFilter{Name: "none", Sort: "id", Limit: 8}, true},
			{productFilter{Name: "none", Sort: "id", Limit: 8, After: cursorAfter(all[boots], "id")}, false}, // few are left
			{productFilter{MinPrice: new(Price(near)), Sort: "product_price", Limit: 8}, false},
			{productFilter{UserID: new(int64(1)), Sort: "product_name", Limit: 8}, false},
		} {
			if got, err := s.matchesLieFar(t.Context(), listQueryOf(t, c.f)); got != c.want || err != nil {
				t.Errorf("%+v: the matches lie far: %v, %v", c.f, got, err)
			}
		}
	})
}

// seedProducts stores products with many equal sort keys and names that a
// careless filter or collation gets wrong.
func seedProducts(t *testing.T, s *store, otherUser int64) []Product {
	t.Helper()
	names := []string{"Trail shoe", "trail SHOE", "Zebra", "apple", "Äpfel", "50% off", "500 off", "a_b", "aXb", `c\d`, "Σίσυφος", "σίσυφος", "𝄞 clef", "\uffee halfwidth", "apple"}
	clock := s.now()
	s.now = func() time.Time { return clock }
	var all []Product
	for n, name := range names {
		if n%3 == 0 {
			clock = clock.Add(time.Millisecond)
		}
		user := int64(1)
		if n%4 == 3 {
			user = otherUser
		}
		p, err := s.CreateProduct(t.Context(), Product{UserID: user, Name: name, Price: Price(n%5) * 100, Images: sourcesOf("a", "b")[:n%3]}, origin{}, nil)
		if err != nil {
			t.Fatal(err)
		}
		stored, err := s.Product(t.Context(), p.ID)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, stored)
	}
	return all
}

// expectedList filters and sorts in plain Go what the store should list.
func expectedList(all []Product, f productFilter) (kept []Product) {
	for _, p := range all {
		if (f.UserID == nil || p.UserID == *f.UserID) &&
			(f.MinPrice == nil || p.Price >= *f.MinPrice) && (f.MaxPrice == nil || p.Price <= *f.MaxPrice) &&
			strings.Contains(strings.ToLower(strings.ToUpper(p.Name)), strings.ToLower(strings.ToUpper(f.Name))) {
			kept = append(kept, p)
		}
	}
	slices.SortFunc(kept, func(a, b Product) int {
		order := 0
		switch f.Sort.key() {
		case "product_price":
			order = int(a.Price - b.Price)
		case "created_at":
			order = a.CreatedAt.Compare(b.CreatedAt)
		case "product_name":
			order = slices.Compare([]rune(a.Name), []rune(b.Name))
		}
		if order == 0 {
			order = int(a.ID - b.ID)
		}
		if f.Sort.descending() {
			order = -order
		}
		return order
	})
	return kept
}

// readPages reads a list from page to page, over the cursor's text form.
func readPages(t *testing.T, s *store, f productFilter) (all []Product) {
	t.Helper()
	for {
		page, err := s.Products(t.Context(), f)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, page...)
		if len(page) < f.Limit {
			return all
		}
		if f.After, err = parseCursor(cursorAfter(page[len(page)-1], f.Sort).String(), f.Sort); err != nil {
			t.Fatal(err)
		}
	}
}

func TestStoreIdempotencyKeys(t *testing.T) {
	t.Parallel()
	eachStore(t, func(t *testing.T, s *store) {
		other := addUser(t, s)
		post := func(user int64, key, body string) (Product, *idempotency, error) {
			once := &idempotency{Key: key, Fingerprint: []byte(body), Render: func(p Product) []byte {
				data, _ := json.Marshal(p.ID)
				return data
			}}
			p, err := s.CreateProduct(t.Context(), Product{UserID: user, Name: body}, origin{}, once)
			return p, once, err
		}
		keys := func() (n int) {
			if err := queryRow(t.Context(), s, []any{&n}, `SELECT count(*) FROM idempotency_keys`); err != nil {
				t.Error(err)
			}
			return n
		}
		first, once, err := post(1, "k", "body")
		if err != nil || once.Answer != nil {
			t.Fatalf("first: %v, %q", err, once.Answer)
		}
		if _, once, err := post(1, "k", "body"); err != nil || string(once.Answer) != fmt.Sprint(first.ID) || once.ProductID != first.ID {
			t.Errorf("again: %q, product %d, %v", once.Answer, once.ProductID, err)
		}
		if _, _, err := post(1, "k", "another"); !errors.Is(err, errKeyReused) {
			t.Errorf("another body: %v", err)
		}
		if p, once, err := post(other, "k", "body"); err != nil || once.Answer != nil || p.ID == first.ID {
			t.Errorf("another user: %v, %v", p, err)
		}
		if _, _, err := post(4711, "k", "body"); !errors.Is(err, errUnknownUser) {
			t.Errorf("an unknown user: %v", err)
		}
		advance(s, 24*time.Hour-time.Minute)
		if _, once, err := post(1, "k", "body"); err != nil || once.ProductID != first.ID {
			t.Errorf("a minute before the day is over: product %d, %v", once.ProductID, err)
		}
		if err := s.ForgetIdempotencyKeys(t.Context()); err != nil {
			t.Error(err)
		}
		if n := keys(); n != 2 {
			t.Errorf("%d keys are remembered, want 2", n)
		}
		advance(s, time.Minute+time.Second)
		if p, once, err := post(1, "k", "another"); err != nil || once.Answer != nil || p.ID == first.ID {
			t.Errorf("after a day: %v, %v", p, err)
		}
		advance(s, 24*time.Hour)
		if err := s.ForgetIdempotencyKeys(t.Context()); err != nil {
			t.Error(err)
		}
		if n := keys(); n != 0 {
			t.Errorf("%d keys are remembered after a day", n)
		}
	})
}

func TestStoreIdempotencyHoldsForRequestsAtOnce(t *testing.T) {
	t.Parallel()
	eachStore(t, func(t *testing.T, s *store) {
		var mu sync.Mutex
		answers := make(map[int64]int)
		var group sync.WaitGroup
		for range 16 {
			group.Go(func() {
				once := &idempotency{Key: "k", Fingerprint: []byte("f"), Render: func(p Product) []byte { return []byte("x") }}
				p, err := s.CreateProduct(t.Context(), Product{UserID: 1, Name: "x"}, origin{}, once)
				if err != nil {
					t.Error(err)
				}
				mu.Lock()
				defer mu.Unlock()
				answers[max(p.ID, once.ProductID)]++
			})
		}
		group.Wait()
		if len(answers) != 1 {
			t.Errorf("16 requests with one key made the products %v", answers)
		}
	})
}

func TestStoreTokens(t *testing.T) {
	t.Parallel()
	eachStore(t, func(t *testing.T, s *store) {
		token, err := s.CreateToken(t.Context(), caller{UserID: 1, Admin: true})
		if err != nil || !strings.HasPrefix(token, tokenPrefix) || len(token) != len(tokenPrefix)+43 {
			t.Fatalf("token %q, %v", token, err)
		}
		if who, err := s.TokenCaller(t.Context(), sumOf(token)); err != nil || who != (caller{1, true}) {
			t.Errorf("its caller: %v, %v", who, err)
		}
		if _, err := s.TokenCaller(t.Context(), sumOf(token+"x")); !errors.Is(err, errNotFound) {
			t.Errorf("a wrong token: %v", err)
		}
		if _, err := s.CreateToken(t.Context(), caller{UserID: 4711}); !errors.Is(err, errUnknownUser) {
			t.Errorf("a token of an unknown user: %v", err)
		}
		if _, err := s.AddUser(t.Context(), "Bob", "bob@example.com"); err != nil {
			t.Error(err)
		}
		if _, err := s.AddUser(t.Context(), "Bob", "bob@example.com"); !errors.Is(err, errEmailTaken) {
			t.Errorf("the same email twice: %v", err)
		}
	})
}

func TestStoreSaysWhenTheDatabaseIsAway(t *testing.T) {
	t.Parallel()
	server := startPostgres(t)
	db, err := openPostgres(t.Context(), server.URL)
	if err != nil {
		t.Fatal(err)
	}
	s := migratedStore(t, db)
	p := create(t, s, "a")
	server.Kill(t)
	if _, err := s.Product(t.Context(), p.ID); !errors.Is(err, errUnavailable) {
		t.Errorf("read from a killed server: %v", err)
	}
	server.Start(t)
	if got, err := s.Product(t.Context(), p.ID); err != nil || fmt.Sprint(got) != fmt.Sprint(p) {
		t.Errorf("after the restart: %v, %v", got, err)
	}
	server.Freeze(t)
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	if _, err := s.Product(ctx, p.ID); !errors.Is(err, errUnavailable) {
		t.Errorf("read from a hung server: %v", err)
	}
	server.Thaw(t)
}

// What a deadline interrupts in SQLite, or a client who goes away, is no error in our
// SQL, wherever it is met.
func TestStoreSaysThatSQLiteWasInterrupted(t *testing.T) {
	t.Parallel()
	const endless = `(WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n)`
	s := sqliteStore(t)
	ends := map[string]func(context.Context) (context.Context, context.CancelFunc){
		"by its deadline": func(ctx context.Context) (context.Context, context.CancelFunc) {
			return context.WithTimeout(ctx, 50*time.Millisecond)
		},
		"by its client": func(ctx context.Context) (context.Context, context.CancelFunc) {
			ctx, cancel := context.WithCancel(ctx)
			time.AfterFunc(50*time.Millisecond, cancel)
			return ctx, cancel
		},
	}
	calls := map[string]func(context.Context) error{
		"a statement": func(ctx context.Context) error {
			_, err := s.Exec(ctx, `DELETE FROM products WHERE id = `+endless)
			return err
		},
		"a query": func(ctx context.Context) error { return queryRow(ctx, s, []any{new(any)}, `SELECT `+endless) },
		"a query for once": func(ctx context.Context) error {
			_, err := scanProducts(s.QueryOnce(ctx, `SELECT `+endless))
			return err
		},
		"a transaction": func(ctx context.Context) error {
			return s.InTx(ctx, func(tx querier) error { return queryRow(ctx, tx, []any{new(any)}, `SELECT `+endless) })
		},
		"a commit": func(ctx context.Context) error {
			return s.InTx(ctx, func(tx querier) error {
				for { // until the transaction knows of the end too
					if _, err := tx.Exec(context.WithoutCancel(ctx), `DELETE FROM products WHERE id = 0`); err != nil {
						return nil
					}
				}
			})
		},
	}
	for how, end := range ends {
		for what, call := range calls {
			ctx, cancel := end(t.Context())
			if err := call(ctx); problemOf(err).Status != 503 {
				t.Errorf("%s, ended %s: %v", what, how, err)
			}
			cancel()
		}
	}
}

// batchedDB notes how many rows statements change at most, and all together.
type batchedDB struct {
	database
	most, all int64
}

func (d *batchedDB) Exec(ctx context.Context, sql string, args ...any) (int64, error) {
	return batchedTx{d.database, d}.Exec(ctx, sql, args...)
}

func (d *batchedDB) InTx(ctx context.Context, do func(querier) error) error {
	return d.database.InTx(ctx, func(tx querier) error { return do(batchedTx{tx, d}) })
}

type batchedTx struct {
	querier
	noted *batchedDB
}

func (tx batchedTx) Exec(ctx context.Context, sql string, args ...any) (int64, error) {
	n, err := tx.querier.Exec(ctx, sql, args...)
	tx.noted.most, tx.noted.all = max(tx.noted.most, n), tx.noted.all+n
	return n, err
}

// However much there is to clear up or to replay, no statement is at it for long:
// others can write in between.
func TestStoreChangesManyRowsInBatches(t *testing.T) {
	t.Parallel()
	const many = 2*changeBatch + 1
	eachStore(t, func(t *testing.T, s *store) {
		hook := hookOn(t, s, "http://a.example")
		db := &batchedDB{database: s.database}
		batched := newStore(db)
		insert := func(sql string, args ...any) {
			t.Helper()
			sql = `WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 2001) ` + sql
			if n, err := s.Exec(t.Context(), sql, args...); err != nil || n != many {
				t.Fatalf("%d rows, %v", n, err)
			}
		}
		count := func(what string, want int) {
			t.Helper()
			var n int
			if err := queryRow(t.Context(), s, []any{&n}, `SELECT count(*) FROM `+what); err != nil || n != want {
				t.Errorf("%d %s, %v, want %d", n, what, err, want)
			}
		}
		batchwise := func(what string, call func(context.Context) error) {
			t.Helper()
			db.most, db.all = 0, 0
			if err := call(t.Context()); err != nil || db.most > changeBatch || db.all < many {
				t.Errorf("%s: %v, %d rows, %d at once", what, err, db.all, db.most)
			}
		}
		gone := func(ctx context.Context) error {
			why := failure{imageError: permanent("http_410", "410 Gone")}
			return errors.Join(batched.SettleUndelivered(ctx, hook.ID, delivery{ID: 1}, why, true), batched.ForgetDeliveries(ctx))
		}
		insertDeliveries := func() {
			t.Helper()
			insert(`INSERT INTO deliveries (webhook_id, event_id, product_id, body, run_at) SELECT $1, i, 1, '', $2 FROM n`, hook.ID, s.now())
		}

		insert(`INSERT INTO images (product_id, user_id, position, source, host, port, published_at) SELECT $1, 1, i, '', '', 0, $2 FROM n`, create(t, s).ID, s.now())
		requeue := func(call func(context.Context) (int64, error)) func(context.Context) error {
			return func(ctx context.Context) error {
				n, err := call(ctx)
				if n != many {
					t.Errorf("%d requeued", n)
				}
				return err
			}
		}
		batchwise("filling a queue", requeue(batched.RequeueAll))
		if _, err := s.Exec(t.Context(), `UPDATE images SET run_at = NULL`); err != nil {
			t.Fatal(err)
		}
		batchwise("publishing again what was lost", requeue(func(ctx context.Context) (int64, error) { return batched.RequeuePublished(ctx, 0) }))

		insert(`INSERT INTO idempotency_keys (user_id, key, fingerprint, response, product_id, created_at) SELECT 1, 'k' || i, '', '', 1, $1 FROM n`, s.now().Add(-2*idempotencyTime))
		batchwise("forgetting keys", batched.ForgetIdempotencyKeys)
		count("idempotency_keys", 0)

		insertDeliveries()
		batchwise("giving up those of a webhook that is gone", gone)
		count("deliveries WHERE run_at IS NULL AND failed_at IS NOT NULL AND error_code = 'http_410'", many)
		batchwise("replaying", func(ctx context.Context) error {
			n, err := batched.ReplayDeliveries(ctx, hook.ID)
			if n != many {
				t.Errorf("%d replayed", n)
			}
			return err
		})
		count("deliveries WHERE run_at IS NOT NULL AND error_code = ''", many)

		batchwise("giving up again", gone)
		advance(batched, 2*failedDeliveryTime)
		batchwise("forgetting what was given up", batched.ForgetDeliveries)
		count("deliveries", 0)

		insertDeliveries()
		batchwise("deleting a webhook", func(ctx context.Context) error { return batched.DeleteWebhook(ctx, hook.ID) })
		count("deliveries", 0)
		count("webhooks", 0)
	})
}

// cutRows are those of a connection that breaks after some.
type cutRows struct {
	rows
	left int
}

var errCut = errors.New("the connection is broken")

func (r *cutRows) Next() bool {
	r.left--
	return r.left >= 0 && r.rows.Next()
}

func (r *cutRows) Err() error { return errCut }

// What was read before the connection broke is no answer: the last product may
// lack images, and would be cached like that.
func TestStoreAnswersNoPartOfAResult(t *testing.T) {
	t.Parallel()
	s := sqliteStore(t)
	create(t, s, "a", "b", "c")
	r, err := s.Query(t.Context(), selectProduct, 1)
	if products, err := scanProducts(&cutRows{r, 2}, err); products != nil || !errors.Is(err, errCut) {
		t.Errorf("answered %+v, %v", products, err)
	}
	r, err = s.Query(t.Context(), `SELECT id FROM images`)
	if ids, err := collect(&cutRows{r, 2}, err, scanOne[int64]); ids != nil || !errors.Is(err, errCut) {
		t.Errorf("answered %v, %v", ids, err)
	}
}
