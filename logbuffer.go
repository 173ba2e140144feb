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
	w         io.Writer
	out       *bufio.Writer // to w
	scheduled bool          // a flush will come
}

func newLogBuffer(w io.Writer) *logBuffer {
	return &logBuffer{w: w, out: bufio.NewWriterSize(w, logBufferSize)}
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
	return b.out.Write(lines)
}

// Flush writes what has gathered.
func (b *logBuffer) Flush() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.scheduled = false
	b.flush()
}

// flush drops what cannot be written, since there is nobody to tell, and not what
// comes after it: a disk that was full has room again.
func (b *logBuffer) flush() {
	if b.out.Flush() != nil {
		b.out.Reset(b.w)
	}
}
