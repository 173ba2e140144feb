package main

import (
	"errors"
	"fmt"
	"strings"
	"time"
)

// The errors of the store, which every other part tests for with errors.Is.
// Driver errors become one of these in postgres.go and embedded.go and nowhere else.
var (
	errNotFound    = errors.New("not found")
	errUnknownUser = errors.New("unknown user")
	errStale       = errors.New("version does not match")
	errUnavailable = errors.New("database unavailable")
)

// wrap says what went wrong, if anything did.
func wrap(err error, format string, args ...any) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%s: %w", fmt.Sprintf(format, args...), err) // a form in which go vet checks the arguments of wrap
}

// Product is a shop's product. Its version grows with every change, the
// pipeline's too, and is what ETag, cache and If-Match are made from.
type Product struct {
	ID          int64
	UserID      int64
	Name        string
	Description string
	Price       Price
	Images      []Image // in the order of product_images
	Version     int64
	CreatedAt   time.Time // whole milliseconds, UTC, as all times in the store
	UpdatedAt   time.Time
}

// imageStatus is what has become of an image.
type imageStatus string

const (
	imagePending imageStatus = "pending" // waits, is in work, or will be tried again
	imageReady   imageStatus = "ready"   // compressed and stored
	imageFailed  imageStatus = "failed"  // in the dead-letter queue
)

// Image is one entry of a product's product_images and at once the job that
// makes its compressed form: the row is the job, and its id the job id.
type Image struct {
	ID          int64
	Position    int
	Source      string
	Status      imageStatus
	Attempts    int    // failed tries so far
	ErrorCode   string // of the last failed try, "" when there was none
	ErrorDetail string
	Key         string // of the stored object, "" until ready for the first time
	Width       int
	Height      int
	Bytes       int64 // of the stored object
	SourceBytes int64 // of what was downloaded
	Variants    variants
}

// Job is what the queue carries for one image. It is a hint: a worker reads
// the image's row before it does anything, since the row is the truth.
type Job struct {
	ID        int64 `json:"job"`
	ProductID int64 `json:"product"`
	origin
	Starts int `json:"-"` // counted in its row when it was claimed: see poison.go
}

// imageError is why an image could not be made. It is the image's failure and
// travels with it; a failure of our own parts (database, S3, broker) is an
// ordinary error and never counts as an attempt.
type imageError struct {
	Code       string        // stable and documented, for instance "http_404"
	Detail     string        // for a person
	Permanent  bool          // another try cannot help
	RetryAfter time.Duration // the least wait that the origin asked for, or 0
}

func (e *imageError) Error() string { return e.Code + ": " + e.Detail }

// permanent makes the imageError of a failure that another try cannot mend.
func permanent(code, format string, args ...any) *imageError {
	e := transient(code, format, args...)
	e.Permanent = true
	return e
}

// transient makes the imageError of a failure that may pass. Its text can be
// stored whatever an origin had in it: one that PostgreSQL refuses would look like
// an outage, which is waited for without end.
func transient(code, format string, args ...any) *imageError {
	detail := strings.ToValidUTF8(fmt.Sprintf(format, args...), "\uFFFD")
	return &imageError{Code: code, Detail: strings.ReplaceAll(detail, "\x00", "\uFFFD")}
}
