package main

import (
	"bytes"
	"encoding/json"
	"strconv"
	"time"
)

// productJSON is a product on the wire.
type productJSON struct {
	ID               int64       `json:"id"`
	UserID           int64       `json:"user_id"`
	Name             string      `json:"product_name"`
	Description      string      `json:"product_description"`
	Price            Price       `json:"product_price"`
	Sources          []string    `json:"product_images"`
	CompressedImages []*string   `json:"compressed_product_images"` // lines up with Sources; null until ready
	Images           []imageJSON `json:"images"`
	Version          int64       `json:"version"`
	CreatedAt        jsonTime    `json:"created_at"`
	UpdatedAt        jsonTime    `json:"updated_at"`
}

type imageJSON struct {
	Source      string        `json:"source"`
	Status      imageStatus   `json:"status"`
	URL         *string       `json:"url,omitempty"`
	Width       int           `json:"width,omitempty"`
	Height      int           `json:"height,omitempty"`
	Bytes       int64         `json:"bytes,omitempty"`
	SourceBytes int64         `json:"source_bytes,omitempty"`
	Variants    []variantJSON `json:"variants,omitempty"`
	Attempts    int           `json:"attempts,omitempty"`
	Error       *errorJSON    `json:"error,omitempty"`
}

type variantJSON struct {
	Width int    `json:"width"`
	URL   string `json:"url"`
	Bytes int64  `json:"bytes"`
}

type errorJSON struct {
	Code   string `json:"code"`
	Detail string `json:"detail"`
}

// jsonTime is written in UTC with milliseconds (RFC 3339).
type jsonTime time.Time

func (t jsonTime) MarshalJSON() ([]byte, error) { return t.append(nil), nil }

func (t jsonTime) append(to []byte) []byte {
	return time.Time(t).UTC().AppendFormat(to, `"2006-01-02T15:04:05.000Z"`)
}

// encoder makes what clients read of what the store holds.
type encoder struct {
	objectURL func(key string) string
}

// product encodes one product.
func (e encoder) product(p Product) document {
	var room [2048]byte // for most; append takes more for the others
	return document{ID: p.ID, Version: p.Version, Body: bytes.Clone(appendProduct(room[:0], e.productJSON(p)))}
}

func (e encoder) productJSON(p Product) productJSON {
	out := productJSON{
		ID: p.ID, UserID: p.UserID, Name: p.Name, Description: p.Description, Price: p.Price, Version: p.Version,
		Sources:          make([]string, len(p.Images)),
		CompressedImages: make([]*string, len(p.Images)),
		Images:           make([]imageJSON, len(p.Images)),
		CreatedAt:        jsonTime(p.CreatedAt), UpdatedAt: jsonTime(p.UpdatedAt),
	}
	for n, image := range p.Images {
		out.Images[n] = e.imageJSON(image)
		out.Sources[n] = image.Source
		out.CompressedImages[n] = out.Images[n].URL
	}
	return out
}

func (e encoder) imageJSON(i Image) imageJSON {
	out := imageJSON{
		Source: i.Source, Status: i.Status, Attempts: i.Attempts, Error: imageErrorJSON(i),
		Width: i.Width, Height: i.Height, Bytes: i.Bytes, SourceBytes: i.SourceBytes,
	}
	if i.Key != "" {
		out.URL = new(e.objectURL(i.Key))
	}
	for _, v := range i.Variants {
		out.Variants = append(out.Variants, variantJSON{v.Width, e.objectURL(v.Key), v.Bytes})
	}
	return out
}

func imageErrorJSON(i Image) *errorJSON {
	if i.ErrorCode == "" {
		return nil
	}
	return &errorJSON{Code: i.ErrorCode, Detail: i.ErrorDetail}
}

// appendProduct is encodeJSON of a product without reflection, in half the time:
// that was a tenth of what a read costs which no cache answers. A test holds the
// two to the same bytes.
func appendProduct(to []byte, p productJSON) []byte {
	to = appendNumber(to, `{"id":`, p.ID)
	to = appendNumber(to, `,"user_id":`, p.UserID)
	to = appendText(to, `,"product_name":`, p.Name)
	to = appendText(to, `,"product_description":`, p.Description)
	to = p.Price.append(append(to, `,"product_price":`...))
	to = appendArray(to, `,"product_images":`, p.Sources, appendString)
	to = appendArray(to, `,"compressed_product_images":`, p.CompressedImages, appendURL)
	to = appendArray(to, `,"images":`, p.Images, appendImage)
	to = appendNumber(to, `,"version":`, p.Version)
	to = p.CreatedAt.append(append(to, `,"created_at":`...))
	to = p.UpdatedAt.append(append(to, `,"updated_at":`...))
	return append(to, "}\n"...)
}

func appendImage(to []byte, i imageJSON) []byte {
	to = appendText(to, `{"source":`, i.Source)
	to = appendText(to, `,"status":`, string(i.Status))
	if i.URL != nil {
		to = appendText(to, `,"url":`, *i.URL)
	}
	to = appendNumberIfAny(to, `,"width":`, int64(i.Width))
	to = appendNumberIfAny(to, `,"height":`, int64(i.Height))
	to = appendNumberIfAny(to, `,"bytes":`, i.Bytes)
	to = appendNumberIfAny(to, `,"source_bytes":`, i.SourceBytes)
	if len(i.Variants) > 0 {
		to = appendArray(to, `,"variants":`, i.Variants, appendVariant)
	}
	to = appendNumberIfAny(to, `,"attempts":`, int64(i.Attempts))
	if i.Error != nil {
		to = appendText(to, `,"error":{"code":`, i.Error.Code)
		to = appendText(to, `,"detail":`, i.Error.Detail)
		to = append(to, '}')
	}
	return append(to, '}')
}

func appendVariant(to []byte, v variantJSON) []byte {
	to = appendNumber(to, `{"width":`, int64(v.Width))
	to = appendText(to, `,"url":`, v.URL)
	to = appendNumber(to, `,"bytes":`, v.Bytes)
	return append(to, '}')
}

func appendNumber(to []byte, name string, n int64) []byte {
	return strconv.AppendInt(append(to, name...), n, 10)
}

func appendNumberIfAny(to []byte, name string, n int64) []byte {
	if n == 0 {
		return to
	}
	return appendNumber(to, name, n)
}

func appendArray[T any](to []byte, name string, all []T, appendOne func([]byte, T) []byte) []byte {
	to = append(append(to, name...), '[')
	for n, one := range all {
		if n > 0 {
			to = append(to, ',')
		}
		to = appendOne(to, one)
	}
	return append(to, ']')
}

func appendURL(to []byte, url *string) []byte {
	if url == nil {
		return append(to, "null"...)
	}
	return appendString(to, *url)
}

func appendText(to []byte, name, text string) []byte {
	return appendString(append(to, name...), text)
}

// appendString leaves a text that has anything to escape to encoding/json.
func appendString(to []byte, text string) []byte {
	for n := range len(text) {
		if c := text[n]; c < ' ' || c > '~' || c == '"' || c == '\\' {
			return append(to, bytes.TrimSpace(encodeJSON(text))...)
		}
	}
	to = append(to, '"')
	to = append(to, text...)
	return append(to, '"')
}

// deadLetterJSON is a dead letter on the wire.
type deadLetterJSON struct {
	ID        int64         `json:"id"`
	ProductID int64         `json:"product_id"`
	Position  int           `json:"position"`
	Source    string        `json:"source"`
	Attempts  int           `json:"attempts"`
	Error     *errorJSON    `json:"error"`
	FailedAt  jsonTime      `json:"failed_at"`
	History   []attemptJSON `json:"history,omitempty"`
}

type attemptJSON struct {
	FailedAt   jsonTime  `json:"failed_at"`
	DurationMS int64     `json:"duration_ms"`
	Error      errorJSON `json:"error"`
}

func (d deadLetter) json() deadLetterJSON {
	out := deadLetterJSON{
		ID: d.ID, ProductID: d.ProductID, Position: d.Position, Source: d.Source,
		Attempts: d.Attempts, Error: imageErrorJSON(d.Image), FailedAt: jsonTime(d.FailedAt),
	}
	for _, a := range d.History {
		out.History = append(out.History, attemptJSON{
			FailedAt: jsonTime(a.FailedAt), DurationMS: a.Duration.Milliseconds(), Error: errorJSON{a.Code, a.Detail},
		})
	}
	return out
}

// encodeJSON encodes what cannot fail to be encoded, and leaves <, > and & as
// they are: they are no danger in application/json.
func encodeJSON(v any) []byte {
	var buf bytes.Buffer
	e := json.NewEncoder(&buf)
	e.SetEscapeHTML(false)
	if err := e.Encode(v); err != nil {
		panic(err) // a type of ours that JSON has no form for
	}
	return buf.Bytes()
}
