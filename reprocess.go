package main

import (
	"context"
	"fmt"
)

// Images that have been made are made again, since a setting has changed (or what
// is at their URL). Until that is done they keep what they have: an image that is
// pending and refers to objects shows these. When it is settled its old objects
// become garbage, see SettleReady; when it fails it keeps them.

// isMade is what makes an image one that can be made again, in SQL: it has been
// made, and is not in work. That includes one that failed when it was made again,
// which is a dead letter too or was discarded.
const isMade = `status <> 'pending' AND object_key <> ''`

// madeFilter selects images that have been made; its zero value selects all.
type madeFilter struct {
	deadFilter         // by host, port and user alone
	Products   []int64 // nil: of any
}

func (f madeFilter) where() conditions {
	c := f.deadFilter.where(isMade)
	if f.Products != nil {
		c.add("i.product_id = ANY(?)", f.Products)
	}
	return c
}

// MadeImages reads a page of the ids of the images that f selects, after the
// given one.
func (s *store) MadeImages(ctx context.Context, f madeFilter, after int64, limit int) ([]int64, error) {
	c := f.where()
	c.add("i.id > ?", after)
	r, err := s.QueryOnce(ctx, fmt.Sprintf("SELECT i.id FROM images i WHERE %s ORDER BY i.id LIMIT %d", c, limit), c.args...)
	ids, err := collect(r, err, scanOne[int64])
	return ids, wrap(err, "list images")
}

// CountMade answers how many images f selects.
func (s *store) CountMade(ctx context.Context, f madeFilter) (int, error) {
	n, err := s.countImages(ctx, f.where())
	return n, wrap(err, "count images")
}

const (
	selectMadeProducts = `SELECT DISTINCT product_id FROM images WHERE id = ANY($1) AND ` + isMade

	reprocessMade = setAnew + `
WHERE id = ANY($1) AND ` + isMade + `
RETURNING product_id`

	reprocessProduct = setAnew + `
WHERE product_id = $1 AND ` + isMade
)

// Reprocess queues those of the images anew that have been made and are not in
// work. It answers how many they were, and the new versions of their products, these
// also with an error: see versionsNow.
func (s *store) Reprocess(ctx context.Context, ids []int64, from origin) (queued int, changed []productVersion, err error) {
	queued, changed, err = s.queueAnew(ctx, ids, from, selectMadeProducts, reprocessMade)
	return queued, changed, wrap(err, "reprocess %d images", len(ids))
}

// ReprocessProduct is Reprocess for all images of a product. If there are none
// its version stays, and is 0 here. For allow see UpdateProduct.
func (s *store) ReprocessProduct(ctx context.Context, id int64, from origin, allow func(Product) error) (queued, version int64, err error) {
	err = s.InTx(ctx, func(tx querier) error {
		p, err := lockedProduct(ctx, tx, id)
		if err != nil {
			return err
		}
		if err := allow(p); err != nil {
			return err
		}
		now := s.now()
		queued, err = tx.Exec(ctx, reprocessProduct, id, now, from.RequestID, from.Traceparent)
		if err != nil || queued == 0 {
			return err
		}
		version = p.Version + 1
		_, err = tx.Exec(ctx, `UPDATE products SET version = $2, updated_at = $3 WHERE id = $1`, id, version, now)
		return err
	})
	return queued, version, wrap(err, "reprocess product %d", id)
}

// reprocess queues every image anew that the filter selects, each once; as replay
// does with dead letters.
func reprocess(ctx context.Context, db *store, f madeFilter, from origin, rate int, invalidate func(id, version int64)) (queued int, err error) {
	page := func(after int64, limit int) ([]int64, error) { return db.MadeImages(ctx, f, after, limit) }
	return eachPage(ctx, rate, page, func(ids []int64) (int, error) {
		n, changed, err := db.Reprocess(ctx, ids, from)
		tell(changed, invalidate)
		return n, err
	})
}

// checkProducts answers an error if one of some products is not there.
func checkProducts(ctx context.Context, db *store, ids []int64) error {
	for _, id := range ids {
		if _, err := db.Product(ctx, id); err != nil {
			return err
		}
	}
	return nil
}
