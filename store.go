package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"time"
	"unicode"
)

// querier runs SQL in PostgreSQL's dialect, of which the store uses what SQLite
// has too. postgres.go and embedded.go implement it, and turn driver errors into
// the errors of product.go.
type querier interface {
	// Exec answers how many rows it changed.
	Exec(ctx context.Context, sql string, args ...any) (int64, error)
	Query(ctx context.Context, sql string, args ...any) (rows, error)
}

// database is a querier that has transactions. Outside of one it only reads, or
// writes with a single statement.
type database interface {
	querier
	// QueryOnce is Query for SQL that is put together for the occasion.
	QueryOnce(ctx context.Context, sql string, args ...any) (rows, error)
	// InTx commits what do has done if it returns nil, else nothing of it.
	InTx(ctx context.Context, do func(tx querier) error) error
	Migrate(ctx context.Context) error
	Ping(ctx context.Context) error
	Close()
}

// rows are a query's result. Close may be called more than once, Err is to be
// asked after the last Next.
type rows interface {
	Next() bool
	Scan(dest ...any) error
	Err() error
	Close()
}

// store keeps products, their images and everything else that must not be lost.
//
// Each method is one transaction. All of them lock a product before its images,
// and images by id, so that no two can wait for each other.
type store struct {
	database
	now func() time.Time
}

func newStore(db database) *store {
	return &store{database: db, now: func() time.Time { return time.Now().UTC().Truncate(time.Millisecond) }}
}

// schemaVersion is what this program's schema files describe.
const schemaVersion = 1

// errSchemaNewer stops a program that is older than its database.
var errSchemaNewer = errors.New("the database's schema is newer than this program: upgrade the program")

// migrate creates the schema in an empty database and refuses one from the
// future. The caller sees to it that one process at a time does this.
func migrate(ctx context.Context, tx querier, create func() error) error {
	if _, err := tx.Exec(ctx, `CREATE TABLE IF NOT EXISTS schema_version (version integer NOT NULL)`); err != nil {
		return err
	}
	var version int
	err := queryRow(ctx, tx, []any{&version}, `SELECT version FROM schema_version`)
	switch {
	case errors.Is(err, errNotFound):
		if err := create(); err != nil {
			return err
		}
		_, err := tx.Exec(ctx, `INSERT INTO schema_version (version) VALUES ($1)`, schemaVersion)
		return err
	case err != nil:
		return err
	case version > schemaVersion:
		return fmt.Errorf("%w (%d, this program knows %d)", errSchemaNewer, version, schemaVersion)
	}
	return nil
}

// queryRow scans the first row into dest, or answers errNotFound.
func queryRow(ctx context.Context, q querier, dest []any, sql string, args ...any) error {
	r, err := q.Query(ctx, sql, args...)
	if err != nil {
		return err
	}
	defer r.Close()
	if !r.Next() {
		if err := r.Err(); err != nil {
			return err
		}
		return errNotFound
	}
	if err := r.Scan(dest...); err != nil {
		return err
	}
	r.Close()
	return r.Err()
}

// query scans every row of a result.
func query[T any](ctx context.Context, q querier, scan func(rows) (T, error), sql string, args ...any) ([]T, error) {
	r, err := q.Query(ctx, sql, args...)
	return collect(r, err, scan)
}

// collect scans every row of a result. Of one that ended in an error nothing is
// answered: nobody must take a part for the whole.
func collect[T any](r rows, err error, scan func(rows) (T, error)) ([]T, error) {
	if err != nil {
		return nil, err
	}
	defer r.Close()
	var all []T
	for r.Next() {
		one, err := scan(r)
		if err != nil {
			return nil, err
		}
		all = append(all, one)
	}
	if err := r.Err(); err != nil {
		return nil, err
	}
	return all, nil
}

// scanOne scans a row of one column.
func scanOne[T any](r rows) (one T, err error) {
	err = r.Scan(&one)
	return one, err
}

// only is the one row of a result, or errNotFound if there is none.
func only[T any](all []T, err error) (one T, _ error) {
	if err == nil && len(all) == 0 {
		err = errNotFound
	}
	if err != nil {
		return one, err
	}
	return all[0], nil
}

// updateReturning runs an UPDATE in a transaction of its own and scans what it returns.
func updateReturning[T any](ctx context.Context, s *store, scan func(rows) (T, error), sql string, args ...any) (all []T, err error) {
	err = s.InTx(ctx, func(tx querier) error {
		all, err = query(ctx, tx, scan, sql, args...)
		return err
	})
	return all, err
}

// productColumns are those of a product p joined with one of its images i, if
// it has any. The description comes with the first image only: it may be long.
const productColumns = `p.id, p.user_id, p.product_name,
	CASE WHEN coalesce(i.position, 0) = 0 THEN p.product_description ELSE '' END,
	p.price_cents, p.version, p.created_at, p.updated_at, ` + imageColumns

const imageColumns = `coalesce(i.id, 0), coalesce(i.position, 0), coalesce(i.source, ''), coalesce(i.status, ''),
	coalesce(i.attempts, 0), coalesce(i.error_code, ''), coalesce(i.error_detail, ''), coalesce(i.object_key, ''),
	coalesce(i.width, 0), coalesce(i.height, 0), coalesce(i.bytes, 0), coalesce(i.source_bytes, 0),
	coalesce(i.variants, '')`

// scanTargets are where a row of productColumns goes.
func scanTargets(p *Product, i *Image) []any {
	return append([]any{&p.ID, &p.UserID, &p.Name, &p.Description, &p.Price, &p.Version, &p.CreatedAt, &p.UpdatedAt},
		imageTargets(i)...)
}

func imageTargets(i *Image) []any {
	return []any{&i.ID, &i.Position, &i.Source, &i.Status, &i.Attempts, &i.ErrorCode, &i.ErrorDetail, &i.Key,
		&i.Width, &i.Height, &i.Bytes, &i.SourceBytes, &i.Variants}
}

// scanProducts puts products together from rows of productColumns, in which a
// product's images stand next to each other and in order.
func scanProducts(r rows, err error) ([]Product, error) {
	if err != nil {
		return nil, err
	}
	defer r.Close()
	var products []Product
	var p Product
	var i Image
	targets := scanTargets(&p, &i) // each row sets all of them anew
	for r.Next() {
		if err := r.Scan(targets...); err != nil {
			return nil, err
		}
		if n := len(products); n == 0 || products[n-1].ID != p.ID {
			p.CreatedAt, p.UpdatedAt = p.CreatedAt.UTC(), p.UpdatedAt.UTC()
			products = append(products, p)
		}
		if i.ID != 0 {
			last := &products[len(products)-1]
			last.Images = append(last.Images, i)
		}
	}
	if err := r.Err(); err != nil {
		return nil, err // the last product may lack images
	}
	return products, nil
}

const selectProducts = `
SELECT ` + productColumns + `
FROM products p LEFT JOIN images i ON i.product_id = p.id
WHERE p.id = ANY($1)
ORDER BY p.id, i.position`

// ProductsByID reads the products that there are of some ids.
func (s *store) ProductsByID(ctx context.Context, ids []int64) ([]Product, error) {
	products, err := scanProducts(s.Query(ctx, selectProducts, ids))
	return products, wrap(err, "read products")
}

const selectProduct = `
SELECT ` + productColumns + `
FROM products p LEFT JOIN images i ON i.product_id = p.id
WHERE p.id = $1
ORDER BY i.position`

// Product reads one product.
func (s *store) Product(ctx context.Context, id int64) (Product, error) {
	return product(ctx, s, id)
}

func product(ctx context.Context, q querier, id int64) (Product, error) {
	p, err := only(scanProducts(q.Query(ctx, selectProduct, id)))
	return p, wrap(err, "read product %d", id)
}

// origin is where a change came from: it goes with the images that it queues,
// so that the pipeline's log lines name it.
type origin struct {
	RequestID   string `json:"request_id,omitempty"`
	Traceparent string `json:"traceparent,omitempty"`
}

// on has every line of a log name the origin, as far as it is known.
func (from origin) on(log *slog.Logger) *slog.Logger {
	if from.RequestID != "" {
		log = log.With("request_id", from.RequestID)
	}
	if from.Traceparent != "" {
		log = log.With("traceparent", from.Traceparent)
	}
	return log
}

const insertProduct = `
INSERT INTO products (user_id, product_name, name_folded, product_description, price_cents, created_at, updated_at)
VALUES ($1, $2, $3, $4, $5, $6, $6)
RETURNING id`

// CreateProduct stores a new product of p's user, name, description, price and
// image sources, and queues the images. If once is not nil, it happens only
// once: see idempotency.
func (s *store) CreateProduct(ctx context.Context, p Product, from origin, once *idempotency) (Product, error) {
	now := s.now()
	p.Version, p.CreatedAt, p.UpdatedAt = 1, now, now
	err := s.InTx(ctx, func(tx querier) error {
		if done, err := once.claim(ctx, tx, p.UserID, now); done || err != nil {
			return err
		}
		err := queryRow(ctx, tx, []any{&p.ID}, insertProduct,
			p.UserID, p.Name, foldCase(p.Name), p.Description, p.Price, now)
		if err != nil {
			return err
		}
		p.Images, _, _ = matchImages(nil, p.Images) // all new, and the caller's slice stays as it is
		if err := insertImages(ctx, tx, p, from, now); err != nil {
			return err
		}
		return once.record(ctx, tx, p)
	})
	if err != nil {
		return Product{}, fmt.Errorf("create product: %w", err)
	}
	point("product created")
	return p, nil
}

// insertImages queues those of a product's images that are new, due at once, and
// sets their ids.
func insertImages(ctx context.Context, tx querier, p Product, from origin, now time.Time) error {
	var values []string
	args := []any{p.ID, p.UserID, now, from.RequestID, from.Traceparent}
	for _, image := range p.Images {
		if image.ID != 0 {
			continue
		}
		host, port := sourceHost(image.Source)
		n := len(args)
		values = append(values, fmt.Sprintf("($1,$2,$3,$4,$5,$%d,$%d,$%d,$%d)", n+1, n+2, n+3, n+4))
		args = append(args, image.Position, image.Source, host, port)
	}
	if values == nil {
		return nil
	}
	sql := `INSERT INTO images (product_id, user_id, run_at, request_id, traceparent, position, source, host, port) VALUES ` +
		strings.Join(values, ",") + ` RETURNING id, position`
	inserted, err := query(ctx, tx, scanInserted, sql, args...)
	for _, image := range inserted {
		p.Images[image.Position].ID, p.Images[image.Position].Status = image.ID, imagePending
	}
	return err
}

func scanInserted(r rows) (i Image, err error) {
	err = r.Scan(&i.ID, &i.Position)
	return i, err
}

const lockProduct = `SELECT version FROM products WHERE id = $1 FOR UPDATE`

const updateProduct = `
UPDATE products
SET product_name = $2, name_folded = $3, product_description = $4, price_cents = $5, version = $6, updated_at = $7
WHERE id = $1`

// UpdateProduct lets change alter the product's writable fields and stores the
// result, unless nothing differs. allow, called first, says whether the product
// may be changed as it is: its error ends the update.
//
// An image whose source stays keeps what it has; sources that are new are
// queued; what is left over is dropped and its object deleted in time.
func (s *store) UpdateProduct(ctx context.Context, id int64, from origin, allow func(Product) error, change func(*Product)) (Product, error) {
	var p Product
	err := s.InTx(ctx, func(tx querier) error {
		before, err := lockedProduct(ctx, tx, id)
		if err != nil {
			return err
		}
		if err := allow(before); err != nil {
			return err
		}
		p = before
		change(&p)
		images, moved, dropped := matchImages(before.Images, p.Images)
		p.Images = images
		if p.Name == before.Name && p.Description == before.Description && p.Price == before.Price &&
			len(images) == len(before.Images) && len(moved) == 0 && len(dropped) == 0 {
			p = before
			return nil
		}
		p.Version, p.UpdatedAt = before.Version+1, s.now()
		if _, err := tx.Exec(ctx, updateProduct, id, p.Name, foldCase(p.Name), p.Description, p.Price, p.Version, p.UpdatedAt); err != nil {
			return err
		}
		if len(dropped)+len(moved) > 0 {
			if _, err := queryIDs(ctx, tx, lockImages, id); err != nil {
				return err
			}
		}
		if err := dropImages(ctx, tx, dropped, p.UpdatedAt); err != nil {
			return err
		}
		if err := moveImages(ctx, tx, moved); err != nil {
			return err
		}
		return insertImages(ctx, tx, p, from, p.UpdatedAt)
	})
	if err != nil {
		return Product{}, fmt.Errorf("update product %d: %w", id, err)
	}
	point("product changed")
	return p, nil
}

// lockedProduct reads a product and keeps every other writer from it until the
// transaction ends. The lock comes first: what is read after it is current.
func lockedProduct(ctx context.Context, tx querier, id int64) (Product, error) {
	var version int64
	if err := queryRow(ctx, tx, []any{&version}, lockProduct, id); err != nil {
		return Product{}, err
	}
	return product(ctx, tx, id)
}

// matchImages is want with what is known of each source; what is new has no id. A
// source that stands twice is matched twice, in order. moved are those that have got
// another position, dropped is what is left over.
func matchImages(have, want []Image) (images, moved, dropped []Image) {
	dropped = slices.Clone(have)
	for position, wanted := range want {
		image := Image{Position: position, Source: wanted.Source}
		at := slices.IndexFunc(dropped, func(i Image) bool { return i.Source == wanted.Source })
		if at >= 0 {
			image = dropped[at]
			dropped = slices.Delete(dropped, at, at+1)
		}
		if image.Position != position {
			image.Position = position
			moved = append(moved, image)
		}
		images = append(images, image)
	}
	return images, moved, dropped
}

func moveImages(ctx context.Context, tx querier, moved []Image) error {
	for _, image := range moved {
		if _, err := tx.Exec(ctx, `UPDATE images SET position = $2 WHERE id = $1`, image.ID, image.Position); err != nil {
			return err
		}
	}
	return nil
}

// lockImages locks a product's images in the order in which all lock them, those
// too who lock many without their products. Who changes a single one need not.
const lockImages = `SELECT id FROM images WHERE product_id = $1 ORDER BY id FOR UPDATE`

// dropImages deletes image rows, and their objects in time. A worker that is
// at one of them finds the row gone and its upload is deleted too.
func dropImages(ctx context.Context, tx querier, dropped []Image, now time.Time) error {
	for _, image := range dropped {
		if err := discardObjects(ctx, tx, image.keys(), now); err != nil {
			return err
		}
		if _, err := tx.Exec(ctx, `DELETE FROM images WHERE id = $1`, image.ID); err != nil {
			return err
		}
	}
	return nil
}

// DeleteProduct deletes a product, and its objects in time. For allow see
// UpdateProduct.
func (s *store) DeleteProduct(ctx context.Context, id int64, allow func(Product) error) error {
	err := s.InTx(ctx, func(tx querier) error {
		p, err := lockedProduct(ctx, tx, id)
		if err != nil {
			return err
		}
		if err := allow(p); err != nil {
			return err
		}
		if _, err := queryIDs(ctx, tx, lockImages, id); err != nil {
			return err
		}
		if err := dropImages(ctx, tx, p.Images, s.now()); err != nil {
			return err
		}
		_, err = tx.Exec(ctx, `DELETE FROM products WHERE id = $1`, id)
		return err
	})
	if err != nil {
		return fmt.Errorf("delete product %d: %w", id, err)
	}
	point("product deleted")
	return nil
}

// changeBatch is how many rows one statement of inBatches changes.
const changeBatch = 1000

// inBatches runs a statement that changes as many rows at most as its last parameter
// says until it changes none, and answers how many they were. A batch may be smaller
// because somebody else was at some of its rows: it is not the last. Each time is a
// transaction of its own, so that others can write in between, and that what was done
// stays done if ctx ends.
func (s *store) inBatches(ctx context.Context, sql string, args ...any) (changed int64, err error) {
	for args = append(args, changeBatch); ; {
		n, err := s.Exec(ctx, sql, args...)
		changed += n
		if err != nil || n == 0 {
			return changed, err
		}
	}
}

// inChunks runs a statement, whose first parameter is ids, for so many of them at a
// time as inBatches changes rows.
func (s *store) inChunks(ctx context.Context, sql string, ids []int64, args ...any) (changed int64, err error) {
	for chunk := range slices.Chunk(ids, changeBatch) {
		n, err := s.Exec(ctx, sql, append([]any{chunk}, args...)...)
		changed += n
		if err != nil {
			return changed, err
		}
	}
	return changed, nil
}

// foldCase makes names comparable without regard to case, in any script: every
// letter becomes the first of those that differ from it by case alone
// (Unicode's simple folding, as regexp's (?i) does it).
func foldCase(s string) string {
	return strings.Map(func(r rune) rune {
		first := r
		for other := unicode.SimpleFold(r); other != r; other = unicode.SimpleFold(other) {
			first = min(first, other)
		}
		return unicode.ToLower(first)
	}, s)
}
