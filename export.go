package main

import "context"

// exportPage is how many products an export reads at once. The largest take 8 MB.
const exportPage = 100

// exportProducts writes the products that f selects, by ascending id. It reads
// page by page, so that no transaction waits for a slow client: of what changes
// meanwhile each product is as it was when its page was read.
func exportProducts(ctx context.Context, db *store, f productFilter, out rowWriter) error {
	f.Sort, f.Limit = defaultSort, exportPage
	for {
		page, err := productPage(ctx, db, f)
		if err != nil {
			return err
		}
		for _, p := range page {
			if err := ctx.Err(); err != nil { // a slow client may take an hour for a page
				return err
			}
			if err := out.write(p); err != nil {
				return err
			}
		}
		if err := out.flush(); err != nil {
			return err
		}
		if len(page) < f.Limit {
			return nil
		}
		f.After = cursorAfter(page[len(page)-1], f.Sort)
	}
}

func productPage(ctx context.Context, db *store, f productFilter) ([]Product, error) {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	return db.Products(ctx, f)
}
