package main

import (
	"container/list"
	"context"
	"sync"
	"time"
)

// memoryEntryBytes is what an entry costs beside its body: the map's slot, the
// list element and the entry itself, rounded up.
const memoryEntryBytes = 192

// memoryCache is the cacheBackend in the process: the least recently used
// entries go when the bound is reached. It is safe for concurrent use.
type memoryCache struct {
	ttl   time.Duration
	limit int64 // bytes

	mu      sync.Mutex
	entries map[int64]*list.Element
	recent  *list.List // of *memoryEntry, the most recently used in front
	size    int64      // bytes
}

type memoryEntry struct {
	id, version int64
	body        []byte // nil in a marker
	expires     time.Time
}

func (e *memoryEntry) size() int64 { return int64(len(e.body)) + memoryEntryBytes }

// newMemoryCache returns a backend of at most limit bytes in which bodies live
// for ttl.
func newMemoryCache(ttl time.Duration, limit int64) *memoryCache {
	return &memoryCache{
		ttl:     ttl,
		limit:   limit,
		entries: make(map[int64]*list.Element),
		recent:  list.New(),
	}
}

// Run implements cacheBackend. Memory has nothing to do and nothing to close.
func (m *memoryCache) Run(ctx context.Context) error {
	<-ctx.Done()
	return nil
}

// Get implements cacheBackend.
func (m *memoryCache) Get(id int64) (cacheEntry, error) {
	now := time.Now()
	m.mu.Lock()
	defer m.mu.Unlock()
	if entry := m.current(id, now); entry != nil {
		m.recent.MoveToFront(m.entries[id])
		return cacheEntry{version: entry.version, body: entry.body, local: true}, nil
	}
	return cacheEntry{local: true}, nil
}

// Put implements cacheBackend. A body larger than the whole cache is kept as a
// marker.
func (m *memoryCache) Put(id, version int64, body []byte) error {
	if int64(len(body))+memoryEntryBytes > m.limit {
		body = nil
	}
	now := time.Now()
	expires := now.Add(entryTTL(version, body, m.ttl))
	m.mu.Lock()
	defer m.mu.Unlock()
	if have := m.current(id, now); have != nil {
		if have.version > version || have.version == version && (have.body != nil || body == nil) {
			return nil
		}
		m.remove(m.entries[id])
	}
	entry := &memoryEntry{id: id, version: version, body: body, expires: expires}
	m.entries[id] = m.recent.PushFront(entry)
	m.size += entry.size()
	for m.size > m.limit {
		m.remove(m.recent.Back())
	}
	return nil
}

// current returns the entry of a product unless it has expired; then it is
// removed. The caller holds mu.
func (m *memoryCache) current(id int64, now time.Time) *memoryEntry {
	element := m.entries[id]
	if element == nil {
		return nil
	}
	entry := element.Value.(*memoryEntry)
	if now.Before(entry.expires) {
		return entry
	}
	m.remove(element)
	return nil
}

// remove drops an entry. The caller holds mu.
func (m *memoryCache) remove(element *list.Element) {
	entry := m.recent.Remove(element).(*memoryEntry)
	delete(m.entries, entry.id)
	m.size -= entry.size()
}
