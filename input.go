package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf16"
	"unicode/utf8"
)

// The limits of a product's fields, in characters and images.
const (
	maxNameLength        = 200
	maxDescriptionLength = 10_000
	maxImages            = 20
)

// fieldError is one thing that is wrong with a request's values.
type fieldError struct {
	Field  string `json:"field"`
	Detail string `json:"detail"`
}

// invalidInput is all that is wrong with a request's values.
type invalidInput []fieldError

// unknownUser is what errUnknownUser means to a client.
var unknownUser = fieldError{"user_id", "there is no such user"}

func (e invalidInput) Error() string { return fmt.Sprintf("invalid input: %v", []fieldError(e)) }

// err is the error of all that was found wrong, or nil.
func (e invalidInput) err() error {
	if e == nil {
		return nil
	}
	return e
}

// check has a parameter read if the query has it, and notes what is wrong with it.
func (e *invalidInput) check(query url.Values, name string, read func(value string) error) {
	if query.Has(name) {
		if err := read(query.Get(name)); err != nil {
			*e = append(*e, fieldError{name, err.Error()})
		}
	}
}

// badJSON is a body that is not the JSON object that was asked for.
type badJSON struct {
	detail string
	fields []fieldError
}

func (e *badJSON) Error() string { return e.detail }

// parseObject takes a JSON object apart. It is strict where encoding/json is
// lenient and a client's mistake would go unseen: invalid UTF-8, a name that
// stands twice (anywhere in the body), half of a surrogate pair, and anything
// behind the object are errors.
func parseObject(body []byte) (map[string]json.RawMessage, error) {
	if !utf8.Valid(body) {
		return nil, &badJSON{detail: "the body is not valid UTF-8"}
	}
	if hasLoneSurrogate(body) {
		return nil, &badJSON{detail: "the body has an escape that is half of a surrogate pair"}
	}
	if err := checkNames(body); err != nil {
		return nil, err
	}
	var object map[string]json.RawMessage
	if err := json.Unmarshal(body, &object); err != nil || object == nil {
		return nil, &badJSON{detail: "the body must be a JSON object"}
	}
	return object, nil
}

// checkNames reads body as one JSON value, in which no object has two members
// of one name.
func checkNames(body []byte) error {
	d := json.NewDecoder(bytes.NewReader(body))
	d.UseNumber()
	if err := checkValue(d, 0); err != nil {
		return err
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return &badJSON{detail: "the body goes on behind its JSON object"}
	}
	return nil
}

// hasLoneSurrogate says whether a \u escape stands for half of a character
// outside the Basic Multilingual Plane (RFC 8259, section 8.2). encoding/json
// would put U+FFFD in its place.
func hasLoneSurrogate(body []byte) bool {
	for {
		at := bytes.IndexByte(body, '\\')
		if at < 0 {
			return false
		}
		body = body[at:]
		half, ok := escapedRune(body)
		if !ok { // an escape of one character, or none at all, which the parser finds
			body = body[min(2, len(body)):]
			continue
		}
		body = body[escapeLength:]
		if !utf16.IsSurrogate(half) {
			continue
		}
		other, ok := escapedRune(body)
		if !ok || utf16.DecodeRune(half, other) == unicode.ReplacementChar {
			return true
		}
		body = body[escapeLength:]
	}
}

// escapeLength is that of an escape such as \u20ac.
const escapeLength = 6

// escapedRune reads the \u escape that text begins with.
func escapedRune(text []byte) (rune, bool) {
	if len(text) < escapeLength || text[0] != '\\' || text[1] != 'u' {
		return 0, false
	}
	code, err := strconv.ParseUint(string(text[2:escapeLength]), 16, 16)
	return rune(code), err == nil
}

// maxDepth is far more than any body of ours has, and far less than the stack.
const maxDepth = 32

func checkValue(d *json.Decoder, depth int) error {
	token, err := d.Token()
	if err != nil {
		return notJSON(err)
	}
	delim, nested := token.(json.Delim)
	if !nested {
		return nil
	}
	if depth == maxDepth {
		return &badJSON{detail: "the body is nested too deeply"}
	}
	names := make(map[string]bool)
	for d.More() {
		if delim == '{' {
			name, err := d.Token()
			if err != nil {
				return notJSON(err)
			}
			text := name.(string)
			if names[text] {
				return &badJSON{detail: fmt.Sprintf("the body has the field %.*q twice", maxNameLength, text)}
			}
			names[text] = true
		}
		if err := checkValue(d, depth+1); err != nil {
			return err
		}
	}
	if _, err := d.Token(); err != nil {
		return notJSON(err)
	}
	return nil
}

func notJSON(err error) error {
	text := strings.TrimPrefix(err.Error(), "json: ")
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		text = "it ends too soon"
	}
	return &badJSON{detail: "the body is not valid JSON: " + text}
}

// bodyFields are the fields of a product, or of a webhook, in a body. It collects
// what is wrong with them while they are read.
type bodyFields struct {
	object map[string]json.RawMessage
	errors invalidInput
}

// maxUnknown is how many unknown fields are named: whoever sends more of them
// gets no answer that is as long as the request.
const maxUnknown = 20

// readFields takes apart the body of a request that may set the given fields and
// no others.
func readFields(body []byte, fields ...string) (*bodyFields, error) {
	object, err := parseObject(body)
	if err != nil {
		return nil, err
	}
	var unknown []fieldError
	for _, name := range slices.Sorted(maps.Keys(object)) {
		if !slices.Contains(fields, name) && len(unknown) < maxUnknown {
			unknown = append(unknown, fieldError{fmt.Sprintf("%.*s", maxNameLength, name), "is not a field that can be set here"})
		}
	}
	if unknown != nil {
		return nil, &badJSON{detail: "the body has a field that cannot be set: " + unknown[0].Field, fields: unknown}
	}
	return &bodyFields{object: object}, nil
}

// newProductFields are those that a product is created with, in the order in
// which an export has them.
var newProductFields = []string{"user_id", "product_name", "product_description", "product_price", "product_images"}

// neededProductFields are those of them that have no default.
var neededProductFields = []string{"user_id", "product_name", "product_price"}

// readNewProduct reads a product that is to be created.
func readNewProduct(body []byte) (Product, error) {
	in, err := readFields(body, newProductFields...)
	if err != nil {
		return Product{}, err
	}
	return in.newProduct()
}

func (in *bodyFields) newProduct() (Product, error) {
	in.require(neededProductFields...)
	p := Product{UserID: in.userID()}
	in.apply(&p)
	return p, in.err()
}

// err is the error of all fields that were found wrong, or nil.
func (in *bodyFields) err() error { return in.errors.err() }

func (in *bodyFields) wrong(field, format string, args ...any) {
	in.errors = append(in.errors, fieldError{field, fmt.Sprintf(format, args...)})
}

// setting answers the JSON of a field that is to be set. A field may be absent
// or null; if it is required, null is an error.
func (in *bodyFields) setting(field string, required bool) (value json.RawMessage, null, ok bool) {
	value, ok = in.object[field]
	null = ok && string(value) == "null"
	if null && required {
		in.wrong(field, "must not be null")
		return nil, false, false
	}
	return value, null, ok
}

// require reports the fields that are absent.
func (in *bodyFields) require(fields ...string) {
	for _, field := range fields {
		if _, ok := in.object[field]; !ok {
			in.wrong(field, "is required")
		}
	}
}

// userID reads the field user_id.
func (in *bodyFields) userID() (id int64) {
	value, _, ok := in.setting("user_id", true)
	if ok && (json.Unmarshal(value, &id) != nil || id <= 0) {
		in.wrong("user_id", "must be the id of a user, a whole number above 0")
	}
	return id
}

// apply sets p's writable fields to those that the body has. Null sets an
// optional field to its default, as in a merge patch (RFC 7396).
func (in *bodyFields) apply(p *Product) {
	if value, _, ok := in.setting("product_name", true); ok {
		in.text("product_name", value, &p.Name, 1, maxNameLength)
	}
	if value, null, ok := in.setting("product_description", false); null {
		p.Description = ""
	} else if ok {
		in.text("product_description", value, &p.Description, 0, maxDescriptionLength)
	}
	if value, _, ok := in.setting("product_price", true); ok {
		if err := p.Price.UnmarshalJSON(value); err != nil {
			in.wrong("product_price", "%v", err)
		}
	}
	if value, null, ok := in.setting("product_images", false); null {
		p.Images = nil
	} else if ok {
		p.Images = in.images(value)
	}
}

// text reads a string of min to max characters, which PostgreSQL must be able
// to hold: NUL it cannot.
func (in *bodyFields) text(field string, value json.RawMessage, to *string, min, max int) {
	var text string
	if json.Unmarshal(value, &text) != nil {
		in.wrong(field, "must be a string")
		return
	}
	switch n := utf8.RuneCountInString(text); {
	case n < min:
		in.wrong(field, "must not be empty")
	case n > max:
		in.wrong(field, "must have at most %d characters, has %d", max, n)
	case strings.Contains(text, "\x00"):
		in.wrong(field, "must not contain the character NUL")
	}
	*to = text
}

// images reads the list of image sources.
func (in *bodyFields) images(value json.RawMessage) []Image {
	var items []json.RawMessage
	if json.Unmarshal(value, &items) != nil {
		in.wrong("product_images", "must be a list of URLs")
		return nil
	}
	if len(items) > maxImages {
		in.wrong("product_images", "must have at most %d URLs, has %d", maxImages, len(items))
		return nil
	}
	images := make([]Image, len(items))
	for n, item := range items {
		field := fmt.Sprintf("product_images[%d]", n)
		var source *string
		if json.Unmarshal(item, &source) != nil || source == nil {
			in.wrong(field, "must be a string")
			continue
		}
		if _, err := parseURL(*source); err != nil {
			in.wrong(field, "%v", err)
		}
		images[n] = Image{Position: n, Source: *source}
	}
	return images
}
