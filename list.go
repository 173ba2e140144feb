package main

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"
	"unicode/utf8"
)

// productFilter says which products a list holds, in which order, and where
// its page begins.
type productFilter struct {
	UserID   *int64
	Name     string // substring, in any case; "" is no filter
	MinPrice *Price
	MaxPrice *Price
	Sort     sortOrder
	Limit    int
	After    *cursor // the last product of the page before
}

// sortOrder is the sort parameter: a key, with "-" before it for descending.
type sortOrder string

const defaultSort sortOrder = "id"

// sortColumns are the columns behind the sort keys.
var sortColumns = map[string]string{
	"id":            "id",
	"product_price": "price_cents",
	"created_at":    "created_at",
	"product_name":  "product_name",
}

func (o sortOrder) key() string { return strings.TrimPrefix(string(o), "-") }

func (o sortOrder) column() string { return sortColumns[o.key()] }

func (o sortOrder) valid() bool { return o.column() != "" }

func (o sortOrder) descending() bool { return strings.HasPrefix(string(o), "-") }

// cursor marks a place in a list: after the product ID with the sort key Key.
// A client gets it as an opaque string and may use it with the same sort only.
type cursor struct {
	Sort sortOrder       `json:"s"`
	Key  json.RawMessage `json:"k,omitempty"`
	ID   int64           `json:"i"`
}

var errCursor = errors.New("is not a cursor of this list")

// cursorAfter marks the place after p.
func cursorAfter(p Product, sort sortOrder) *cursor {
	c := cursor{Sort: sort, ID: p.ID}
	switch sort.key() {
	case "product_price":
		c.Key, _ = json.Marshal(int64(p.Price))
	case "created_at":
		c.Key, _ = json.Marshal(p.CreatedAt.UnixMilli())
	case "product_name":
		c.Key, _ = json.Marshal(p.Name)
	}
	return &c
}

// value is the cursor's key as the database compares it.
func (c *cursor) value() (any, error) {
	var number int64
	var text string
	switch c.Sort.key() {
	case "product_price":
		err := json.Unmarshal(c.Key, &number)
		return number, err
	case "created_at":
		err := json.Unmarshal(c.Key, &number)
		at := time.UnixMilli(number).UTC()
		if at.Year() < 1 || at.Year() > 9999 { // beyond what databases take for a time
			err = errCursor
		}
		return at, err
	default:
		err := json.Unmarshal(c.Key, &text)
		return text, err
	}
}

// id is the id to go on after, from the beginning if there is no cursor.
func (c *cursor) id() int64 {
	if c == nil {
		return 0
	}
	return c.ID
}

func (c *cursor) String() string {
	data, _ := json.Marshal(c)
	return base64.RawURLEncoding.EncodeToString(data)
}

// parseCursor reads what String wrote, for a list with the given sort.
func parseCursor(s string, sort sortOrder) (*cursor, error) {
	var c cursor
	data, err := base64.RawURLEncoding.DecodeString(s)
	if err != nil || json.Unmarshal(data, &c) != nil || c.Sort != sort || c.ID <= 0 {
		return nil, errCursor
	}
	if sort.key() == "id" {
		return &c, nil
	}
	value, err := c.value()
	if text, isText := value.(string); err != nil || isText && strings.Contains(text, "\x00") {
		return nil, errCursor
	}
	return &c, nil
}

// Products reads one page of a list. The page is found by keyset, which costs
// the same however far the list has been read.
func (s *store) Products(ctx context.Context, f productFilter) ([]Product, error) {
	q, err := f.query()
	if err != nil {
		return nil, err
	}
	far, err := s.matchesLieFar(ctx, q)
	if err != nil {
		return nil, wrap(err, "list products")
	}
	products, err := scanProducts(s.QueryOnce(ctx, q.page(far), q.args...))
	return products, wrap(err, "list products")
}

// matchesLieFar says whether the page cannot be filled from the next products in the
// list's order, and not soon from those that come then: at most one in a hundred passes,
// or none of the latter half. It is a hint for PostgreSQL, which takes matches to lie
// evenly in every order: where they lie at its end, or have come to theirs, as boots do
// in a list by name, it would walk through most of it.
func (s *store) matchesLieFar(ctx context.Context, q listQuery) (bool, error) {
	if len(q.filters()) == 0 {
		return false, nil
	}
	r, err := s.QueryOnce(ctx, q.near(), q.args...)
	passed, err := collect(r, err, scanOne[bool])
	if err != nil || len(passed) < q.nearby() { // a range of fewer is walked in no time
		return false, err
	}
	matches := 0
	for _, match := range passed {
		if match {
			matches++
		}
	}
	few := matches*100 <= len(passed)
	return matches < q.Limit && (few || !slices.Contains(passed[len(passed)/2:], true)), nil
}

// listQuery is a list with its conditions as the database has them. The first, ranged
// in number, pick a range of the list's order, which an index finds; the others, its
// filters, may pass products anywhere in that.
type listQuery struct {
	productFilter
	conditions
	ranged int
}

func (q listQuery) filters() []string { return q.all[q.ranged:] }

// nearby is how many of the next products are looked at: two pages, or 200.
func (q listQuery) nearby() int { return 2 * max(q.Limit, 100) }

// near is the query for which of the next products pass the filters.
func (q listQuery) near() string {
	return fmt.Sprintf(`SELECT %s FROM (SELECT * FROM products %s ORDER BY %s LIMIT %d) near`,
		and(q.filters()), where(q.all[:q.ranged]), q.order(""), q.nearby())
}

// page is the query for the list's page. Values go in as parameters, but the limit,
// which is a number, stands in the text, where the planner sees it.
//
// A user's list is ordered by the user first, and the user is given as an array of
// one. PostgreSQL then does not see that the user is the same in all rows, and has
// to read the user's own products, by the index on user and order. Else it might
// read everybody's in the order of the list until the page is full, which looks
// cheap and has no bound.
//
// If matches lie far, OFFSET 0 hides the limit from the planner, which then takes the
// plan by which reading all that match is cheapest.
func (q listQuery) page(far bool) string {
	matches := "products " + where(q.all)
	if far {
		matches = fmt.Sprintf("(SELECT * FROM %s ORDER BY %s OFFSET 0) matches", matches, q.order(""))
	}
	return fmt.Sprintf(`
SELECT %s
FROM (SELECT * FROM %s ORDER BY %s LIMIT %d) p LEFT JOIN images i ON i.product_id = p.id
ORDER BY %s, i.position`, productColumns, matches, q.order(""), q.Limit, q.order("p."))
}

// query puts the list's conditions together.
func (f productFilter) query() (listQuery, error) {
	q := listQuery{productFilter: f}
	tooLong := utf8.RuneCountInString(f.Name) > maxNameLength
	if tooLong { // no name is, and SQLite refuses a pattern of so many
		q.add("false")
	}
	if f.UserID != nil {
		q.add("user_id = ANY(?)", []int64{*f.UserID})
	}
	if err := f.addAfter(&q.conditions); err != nil {
		return q, err
	}
	byPrice := f.Sort.key() == "product_price"
	if byPrice {
		f.addPrices(&q.conditions)
	}
	q.ranged = len(q.all)
	if !byPrice {
		f.addPrices(&q.conditions)
	}
	if f.Name != "" && !tooLong {
		q.add(`name_folded LIKE ? ESCAPE '\'`, "%"+likeEscaper.Replace(foldCase(f.Name))+"%")
	}
	return q, nil
}

func (f productFilter) addPrices(c *conditions) {
	if f.MinPrice != nil {
		c.add("price_cents >= ?", int64(*f.MinPrice))
	}
	if f.MaxPrice != nil {
		c.add("price_cents <= ?", int64(*f.MaxPrice))
	}
}

// addAfter adds that a product lies beyond the cursor.
func (f productFilter) addAfter(c *conditions) error {
	if f.After == nil {
		return nil
	}
	column, beyond := f.Sort.column(), ">"
	if f.Sort.descending() {
		beyond = "<"
	}
	if column == "id" {
		c.add("id "+beyond+" ?", f.After.ID)
		return nil
	}
	value, err := f.After.value()
	c.add("("+column+", id) "+beyond+" (?, ?)", value, f.After.ID)
	return err
}

// order is the list's order by columns of a table, such as "p.".
func (f productFilter) order(table string) string {
	columns := []string{"id"}
	if column := f.Sort.column(); column != "id" {
		columns = []string{column, "id"}
	}
	if f.UserID != nil {
		columns = slices.Insert(columns, 0, "user_id")
	}
	direction := " ASC"
	if f.Sort.descending() {
		direction = " DESC"
	}
	return table + strings.Join(columns, direction+", "+table) + direction
}

// conditions are those of a query, all of which have to be met, with its arguments.
type conditions struct {
	all  []string
	args []any
}

// add adds a condition, in which a ? stands for each of the values.
func (c *conditions) add(condition string, values ...any) {
	for _, value := range values {
		c.args = append(c.args, value)
		condition = strings.Replace(condition, "?", fmt.Sprintf("$%d", len(c.args)), 1)
	}
	c.all = append(c.all, condition)
}

func (c conditions) String() string { return and(c.all) }

func and(conditions []string) string { return strings.Join(conditions, " AND ") }

// where is the WHERE clause of conditions, or nothing if there are none.
func where(conditions []string) string {
	if len(conditions) == 0 {
		return ""
	}
	return "WHERE " + and(conditions)
}

// likeEscaper makes LIKE take a text literally.
var likeEscaper = strings.NewReplacer(`\`, `\\`, `%`, `\%`, `_`, `\_`)
