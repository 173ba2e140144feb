package main

import (
	"sync"
	"time"
)

const (
	// maxUnsent bounds the markers kept while the backend is away. Whatever is
	// written beyond it is covered on this instance by its floor, and on others
	// by the TTL of what they have.
	maxUnsent = 100_000

	// maxSeen bounds the floors that are kept because of reads: about 5 MB.
	maxSeen = 100_000

	// maxAbsent is how many of these may be of products that were not found, so
	// that whoever asks for random ids does not take the place of all others.
	maxAbsent = maxSeen / 2
)

// floors holds the least version of a product that this instance may serve:
// what it wrote itself, since its marker reaches the backend later and an
// invalidation reaches the client-side cache later still; and what it served,
// since a backend that lost its memory may be filled by a load that is old.
//
// A floor is needed for as long as something older may turn up: until a load
// that began before the write has ended and what it stored has expired, which
// is keep. To forget in time without a clock for each entry there are two
// generations: rotate, called every keep, drops the older one. A version whose
// marker has not been sent is kept until it was.
type floors struct {
	keep time.Duration

	mu         sync.RWMutex
	young, old map[int64]int64
	unsent     map[int64]marker
}

// marker is a version whose marker has not been sent.
type marker struct {
	version int64
	since   time.Time // of the oldest write that nobody has been told of
}

func newFloors(keep time.Duration) *floors {
	return &floors{
		keep:   keep,
		young:  make(map[int64]int64),
		old:    make(map[int64]int64),
		unsent: make(map[int64]marker),
	}
}

// get returns the floor of a product: 0 if it has none, absent if all that is
// known is that it was not found.
func (f *floors) get(id int64) int64 {
	f.mu.RLock()
	defer f.mu.RUnlock()
	return f.least(id)
}

// least is get for a caller that holds mu.
func (f *floors) least(id int64) int64 {
	floor := max(f.young[id], f.old[id], f.unsent[id].version)
	if floor == 0 && (f.young[id] == absent || f.old[id] == absent) {
		return absent
	}
	return floor
}

// see raises the floor because version was read, or because the product was
// absent. Beyond maxSeen it does nothing, and only the backend keeps versions
// from going backwards.
func (f *floors) see(id, version int64) {
	if floor := f.get(id); floor != 0 && floor >= version { // readers do not wait for each other here
		return
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	room := maxSeen
	if version == absent {
		room = maxAbsent
	}
	if floor := f.least(id); (floor == 0 || version > floor) && len(f.young) < room {
		f.young[id] = version
	}
}

// write raises the floor because version was committed, and queues its marker.
// It reports false if too many markers wait already.
func (f *floors) write(id, version int64) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.young[id] = max(f.young[id], version)
	waits, queued := f.unsent[id]
	if !queued {
		if len(f.unsent) >= maxUnsent {
			return false
		}
		waits.since = time.Now()
	}
	waits.version = max(waits.version, version)
	f.unsent[id] = waits
	return true
}

// waiting returns up to limit of the markers that have not been sent.
func (f *floors) waiting(limit int) map[int64]marker {
	f.mu.RLock()
	defer f.mu.RUnlock()
	batch := make(map[int64]marker)
	for id, m := range f.unsent {
		if len(batch) == limit {
			break
		}
		batch[id] = m
	}
	return batch
}

// sent says that the marker of a version was stored. The floor's time begins
// anew: until now others may have stored what is older.
func (f *floors) sent(id, version int64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.unsent[id].version == version {
		delete(f.unsent, id)
	}
	f.young[id] = max(f.young[id], version)
}

func (f *floors) rotate() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.old, f.young = f.young, make(map[int64]int64)
}
