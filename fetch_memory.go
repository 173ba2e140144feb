package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"time"
)

// What the bodies that were downloaded hold is counted from the moment when room
// is made for them until they are released, by capacity. A body grows with what
// arrives and not with what its origin promises, so a slow host takes no room from
// others. Whoever finds none has to let go of what it has, and comes again later:
// bodies that wait for each other's room would wait for ever.

// freeBytes of each body are not counted, so that small images never wait for
// large ones. There are only so many downloads.
const freeBytes = 1 << 20

// roomPatience is how long a body may wait for room at most.
const roomPatience = 2 * time.Second

func counted(capacity int) int64 { return max(0, int64(capacity)-freeBytes) }

var errNoRoom = fmt.Errorf("%w: downloads hold all the memory that they may", errPutOff)

// readBody reads all of r, of which at most limit bytes may come. The caller must
// release the body.
func (f *fetcher) readBody(ctx context.Context, r io.Reader, limit int64) (body []byte, err error) {
	for {
		if len(body) == cap(body) {
			if err := f.grow(ctx, &body, min(max(2*int64(cap(body)), 64<<10), limit)); err != nil {
				f.Release(body)
				return nil, err
			}
		}
		n, err := r.Read(body[len(body):cap(body)])
		body = body[:len(body)+n]
		switch {
		case errors.Is(err, io.EOF), err == nil && int64(len(body)) == limit:
			return body, nil
		case err != nil:
			f.Release(body)
			return nil, err
		}
	}
}

// grow gives a body more capacity. How long it waits for the room is random, so
// that of bodies that wait for each other one gives up first and the others go on.
// The old capacity is garbage then and no longer counted.
func (f *fetcher) grow(ctx context.Context, body *[]byte, capacity int64) error {
	if more := counted(int(capacity)) - counted(cap(*body)); more > 0 {
		ctx, cancel := context.WithTimeout(ctx, rand.N(roomPatience))
		defer cancel()
		if f.room.Acquire(ctx, more) != nil {
			return errNoRoom
		}
	}
	*body = append(make([]byte, 0, capacity), *body...)
	return nil
}

// Release says that a body which Fetch returned is no longer held.
func (f *fetcher) Release(body []byte) { f.room.Release(counted(cap(body))) }
