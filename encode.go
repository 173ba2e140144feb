package main

import (
	"bytes"
	"encoding/json"
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

func (t jsonTime) MarshalJSON() ([]byte, error) {
	return time.Time(t).UTC().AppendFormat(nil, `"2006-01-02T15:04:05.000Z"`), nil
}

// encoder makes what clients read of what the store holds.
type encoder struct {
	objectURL func(key string) string
}

// product encodes one product.
func (e encoder) product(p Product) document {
	return document{ID: p.ID, Version: p.Version, Body: encodeJSON(e.productJSON(p))}
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
		url := e.objectURL(i.Key)
		out.URL = &url
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
