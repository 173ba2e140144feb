package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"os"
	"path"
	"strconv"
	"strings"
	"sync"
	"time"
)

const (
	// mediaPrefix is the path under which the files are served.
	mediaPrefix = "/media/"

	// fileTempDir holds files that are being written, in the same file system
	// so that they can be renamed to their place.
	fileTempDir = ".tmp"

	// fileTempAge is when a file in fileTempDir must be left from a crash.
	fileTempAge = time.Hour
)

// mediaType returns the content type of a key by its extension, "" for what is
// no image of ours: that is neither stored nor served.
func mediaType(key string) string {
	switch path.Ext(key) {
	case ".jpg":
		return "image/jpeg"
	case ".png":
		return "image/png"
	case ".webp":
		return "image/webp"
	case ".gif":
		return "image/gif"
	}
	return ""
}

// fileBlobs keeps images as files under a directory, which no key can leave,
// be it by "..", by an absolute path or by a symbolic link.
type fileBlobs struct {
	root *os.Root
	base string // of URLs, without a slash at its end

	mu sync.Mutex // held while directories come and go
}

// newFileBlobs returns the blobs under dir, which it makes if need be.
// publicURL is the base of the URLs for clients, such as http://127.0.0.1:8080.
// Close must be called at the end.
func newFileBlobs(dir, publicURL string) (*fileBlobs, error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, fmt.Errorf("make blob directory: %w", err)
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, fmt.Errorf("open blob directory: %w", err)
	}
	b := &fileBlobs{root: root, base: strings.TrimRight(publicURL, "/")}
	if err := b.clearTemp(); err != nil {
		root.Close()
		return nil, err
	}
	return b, nil
}

// clearTemp makes the directory of temporary files and removes what a crash
// left in it.
func (b *fileBlobs) clearTemp() error {
	if err := b.root.MkdirAll(fileTempDir, 0o755); err != nil {
		return fmt.Errorf("make %s: %w", fileTempDir, err)
	}
	entries, err := fs.ReadDir(b.root.FS(), fileTempDir)
	if err != nil {
		return fmt.Errorf("list %s: %w", fileTempDir, err)
	}
	for _, entry := range entries {
		info, err := entry.Info()
		if err != nil || time.Since(info.ModTime()) < fileTempAge {
			continue
		}
		if err := b.root.Remove(path.Join(fileTempDir, entry.Name())); err != nil {
			return fmt.Errorf("remove temporary file: %w", err)
		}
	}
	return nil
}

// Close closes the directory.
func (b *fileBlobs) Close() error { return b.root.Close() }

// Put stores a file. When it returns the file is complete and on the disk; until
// then there is nothing under its key, or what was there before.
func (b *fileBlobs) Put(ctx context.Context, key string, data []byte) error {
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("put blob %s: %w", key, err)
	}
	if !isFileKey(key) || mediaType(key) == "" {
		return fmt.Errorf("put blob %s: %w", key, fs.ErrInvalid)
	}
	temp, err := b.writeTemp(data)
	if err != nil {
		return fmt.Errorf("put blob %s: %w", key, err)
	}
	if err := b.place(temp, key); err != nil {
		return fmt.Errorf("put blob %s: %w", key, errors.Join(err, b.root.Remove(temp)))
	}
	return nil
}

// isFileKey reports whether a key names a file inside the directory, and not a
// temporary one.
func isFileKey(key string) bool {
	return fs.ValidPath(key) && !strings.HasPrefix(key, ".")
}

// writeTemp writes a temporary file to the disk and returns its name.
func (b *fileBlobs) writeTemp(data []byte) (string, error) {
	name := path.Join(fileTempDir, rand.Text())
	file, err := b.root.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
	if err != nil {
		return "", err
	}
	_, err = file.Write(data)
	if err == nil {
		err = file.Sync()
	}
	if err = errors.Join(err, file.Close()); err != nil {
		return "", errors.Join(err, b.root.Remove(name))
	}
	return name, nil
}

// place moves a temporary file to its key. The rename is on the disk only when
// the directory is, and a new directory only when the one above it is.
func (b *fileBlobs) place(temp, key string) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	dir := path.Dir(key)
	if err := b.root.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	if err := b.root.Rename(temp, key); err != nil {
		return err
	}
	for ; ; dir = path.Dir(dir) {
		if err := b.syncDir(dir); err != nil {
			return err
		}
		if dir == "." {
			return nil
		}
	}
}

func (b *fileBlobs) syncDir(name string) error {
	dir, err := b.root.Open(name)
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}

// Delete removes a file, and its directory if that was the last one in it. That
// it is not there is fine.
func (b *fileBlobs) Delete(ctx context.Context, key string) error {
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("delete blob %s: %w", key, err)
	}
	if !isFileKey(key) {
		return fmt.Errorf("delete blob %s: %w", key, fs.ErrInvalid)
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if err := b.root.Remove(key); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("delete blob %s: %w", key, err)
	}
	if dir := path.Dir(key); dir != "." {
		_ = b.root.Remove(dir) // fails as long as something is in it, as it should
	}
	return nil
}

// Ping reports whether files can be written.
func (b *fileBlobs) Ping(context.Context) error {
	name, err := b.writeTemp(nil)
	if err == nil {
		err = b.root.Remove(name)
	}
	return wrap(err, "write to blob directory")
}

// URL returns where clients get a file.
func (b *fileBlobs) URL(key string) string { return b.base + mediaPrefix + key }

// serve answers GET and HEAD for the file that the path's {key} names, with ranges
// and conditions. For anything that is not a stored image it writes nothing and
// returns errNotFound, so that the caller can say so in its own way.
func (b *fileBlobs) serve(w http.ResponseWriter, r *http.Request) error {
	key := r.PathValue("key")
	if !isFileKey(key) {
		return fmt.Errorf("serve %s: %w", r.URL.Path, errNotFound)
	}
	file, info, err := b.open(key)
	if err != nil {
		return err
	}
	defer file.Close()
	header := w.Header()
	header.Set("Content-Type", mediaType(key))
	header.Set("Cache-Control", blobCacheControl)
	header.Set("ETag", strconv.Quote(path.Base(key))) // the name has the content's hash
	refusal := refusedContent{ResponseWriter: w}
	http.ServeContent(&refusal, r, "", info.ModTime(), file)
	return refusal.err()
}

// refusedContent keeps the plain-text errors of http.ServeContent back, so that
// they can be rendered like all others.
type refusedContent struct {
	http.ResponseWriter
	status int // 0: not refused
}

func (c *refusedContent) WriteHeader(status int) {
	if status >= http.StatusBadRequest {
		c.status = status
		for _, name := range []string{"Cache-Control", "Etag", "Last-Modified"} { // they are the image's
			c.Header().Del(name)
		}
		return
	}
	c.ResponseWriter.WriteHeader(status)
}

func (c *refusedContent) Write(data []byte) (int, error) {
	if c.status != 0 {
		return len(data), nil
	}
	return c.ResponseWriter.Write(data)
}

func (c *refusedContent) err() error {
	switch c.status {
	case 0:
		return nil
	case http.StatusPreconditionFailed:
		return &httpError{c.status, "the image is not the one that the condition names"}
	case http.StatusRequestedRangeNotSatisfiable:
		return &httpError{c.status, "the image has no such part"}
	}
	return fmt.Errorf("serve a file: status %d", c.status)
}

// open opens a stored image. It looks before it opens: opening what is no
// regular file could block, and following links is not for clients.
func (b *fileBlobs) open(key string) (*os.File, fs.FileInfo, error) {
	info, err := b.root.Lstat(key)
	if err == nil && (!info.Mode().IsRegular() || mediaType(key) == "") {
		err = errNotFound
	}
	var file *os.File
	if err == nil {
		file, err = b.root.Open(key)
	}
	switch {
	case errors.Is(err, fs.ErrPermission): // ours to mend
		return nil, nil, fmt.Errorf("open blob %s: %w", key, err)
	case err != nil: // no such file, too long a name, a file where a directory should be
		return nil, nil, fmt.Errorf("open blob %s: %w: %w", key, errNotFound, err)
	}
	return file, info, nil
}
