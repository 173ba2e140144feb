package main

import (
	"bufio"
	"io"
	"sync"
	"time"
)

const (
	// logDelay is how long a log line may wait for others, with which it is
	// written at once: a write for each line would cost a cached read a sixth.
	logDelay = 100 * time.Millisecond
	// logBufferSize is how much may wait.
	logBufferSize = 64 << 10
)

// logBuffer gathers log lines. What it was given is written within logDelay,
// and when Flush is called at the end.
type logBuffer struct {
	mu        sync.Mutex
	to        io.Writer
	out       *bufio.Writer
	scheduled bool // a flush will come
}

func newLogBuffer(w io.Writer) *logBuffer {
	return &logBuffer{to: w, out: bufio.NewWriterSize(w, logBufferSize)}
}

// Write takes one or more whole lines.
func (b *logBuffer) Write(lines []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if len(lines) > b.out.Available() {
		b.flush() // so that no line is written in two parts
	}
	if !b.scheduled {
		b.scheduled = true
		time.AfterFunc(logDelay, b.Flush)
	}
	n, err := b.out.Write(lines)
	if err != nil {
		b.out.Reset(b.to)
	}
	return n, err
}

// Flush writes what has gathered. Where it cannot be written there is nobody to
// tell.
func (b *logBuffer) Flush() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.scheduled = false
	b.flush()
}

// flush drops what cannot be written, a full disk's lines, say: a bufio.Writer
// that has failed once takes nothing any more.
func (b *logBuffer) flush() {
	if b.out.Flush() != nil {
		b.out.Reset(b.to)
	}
}
