package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/s3"
)

// blobsUnderTest is what all blob stores have in common.
type blobsUnderTest interface {
	Put(ctx context.Context, key string, data []byte) error
	Delete(ctx context.Context, key string) error
	Ping(ctx context.Context) error
	URL(key string) string
}

func openFileBlobs(t *testing.T) *fileBlobs {
	t.Helper()
	blobs, err := newFileBlobs(filepath.Join(t.TempDir(), "media"), "http://shop.example/")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { blobs.Close() })
	return blobs
}

// storedBlob is an object as a client gets it.
type storedBlob struct {
	data                      []byte
	contentType, cacheControl string
}

// eachBlobs runs a test over every blob store. get returns a stored object,
// nil if there is none.
func eachBlobs(t *testing.T, test func(t *testing.T, blobs blobsUnderTest, get func(key string) *storedBlob)) {
	t.Run("files", func(t *testing.T) {
		t.Parallel()
		blobs := openFileBlobs(t)
		test(t, blobs, func(key string) *storedBlob {
			r, err := serveFile(blobs, httptest.NewRequest("GET", mediaPrefix, nil), key)
			if errors.Is(err, errNotFound) {
				return nil
			}
			if err != nil {
				t.Fatal(err)
			}
			return &storedBlob{r.Body.Bytes(), r.Header().Get("Content-Type"), r.Header().Get("Cache-Control")}
		})
	})
	t.Run("S3", func(t *testing.T) {
		t.Parallel()
		env := testS3(t)
		blobs, err := newS3Blobs(t.Context(), env.Bucket, "", env.getenv)
		if err != nil {
			t.Fatal(err)
		}
		test(t, blobs, func(key string) *storedBlob {
			object, err := blobs.client.GetObject(t.Context(), &s3.GetObjectInput{Bucket: aws.String(env.Bucket), Key: aws.String(key)})
			if err != nil && strings.Contains(err.Error(), "NoSuchKey") {
				return nil
			}
			if err != nil {
				t.Fatal(err)
			}
			defer object.Body.Close()
			data, err := io.ReadAll(object.Body)
			if err != nil {
				t.Fatal(err)
			}
			return &storedBlob{data, aws.ToString(object.ContentType), aws.ToString(object.CacheControl)}
		})
	})
}

func TestBlobs(t *testing.T) {
	t.Parallel()
	eachBlobs(t, func(t *testing.T, blobs blobsUnderTest, get func(string) *storedBlob) {
		if err := blobs.Ping(t.Context()); err != nil {
			t.Fatalf("ping: %v", err)
		}
		large := bytes.Repeat([]byte("pixel"), 300_000)
		contents := map[string][]byte{"image/jpeg jpg": []byte("one"), "image/png png": {}, "image/webp webp": large, "image/gif gif": {0, 255}}
		for typeAndExt, data := range contents {
			contentType, ext, _ := strings.Cut(typeAndExt, " ")
			key := blobKey(7, 41, data, ext)
			if get(key) != nil {
				t.Fatalf("%s is there before it was put", key)
			}
			for range 2 { // a job may be done twice
				if err := blobs.Put(t.Context(), key, data); err != nil {
					t.Fatalf("put: %v", err)
				}
			}
			got := get(key)
			if got == nil || !bytes.Equal(got.data, data) || got.contentType != contentType || got.cacheControl != blobCacheControl {
				t.Errorf("%s: got %.60v, want %d bytes of %s", key, got, len(data), contentType)
			}
			for range 2 { // absent is fine
				if err := blobs.Delete(t.Context(), key); err != nil {
					t.Errorf("delete: %v", err)
				}
			}
			if get(key) != nil {
				t.Errorf("%s is there after it was deleted", key)
			}
		}
	})
}

func TestBlobsPutReplaces(t *testing.T) {
	t.Parallel()
	eachBlobs(t, func(t *testing.T, blobs blobsUnderTest, get func(string) *storedBlob) {
		key := "products/7/41-0.jpg"
		for _, data := range []string{"first", "second"} {
			if err := blobs.Put(t.Context(), key, []byte(data)); err != nil {
				t.Fatal(err)
			}
			if got := get(key); got == nil || string(got.data) != data {
				t.Errorf("got %v, want %s", got, data)
			}
		}
	})
}

func TestBlobsOfACancelledContext(t *testing.T) {
	t.Parallel()
	eachBlobs(t, func(t *testing.T, blobs blobsUnderTest, get func(string) *storedBlob) {
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if err := blobs.Put(ctx, "products/7/41-0.jpg", []byte("x")); !errors.Is(err, context.Canceled) {
			t.Errorf("put: %v", err)
		}
		if err := blobs.Delete(ctx, "products/7/41-0.jpg"); !errors.Is(err, context.Canceled) {
			t.Errorf("delete: %v", err)
		}
	})
}

func TestBlobKey(t *testing.T) {
	t.Parallel()
	// printf abc | sha256sum
	const want = "products/7/41-ba7816bf8f01cfea.jpg"
	if got := blobKey(7, 41, []byte("abc"), "jpg"); got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}

func TestS3URL(t *testing.T) {
	t.Parallel()
	tests := map[string]struct {
		bucket, publicURL string
		env               map[string]string
		want              string // or the error
	}{
		"the bucket's own": {"photos", "", map[string]string{"AWS_REGION": "eu-central-1"},
			"https://photos.s3.eu-central-1.amazonaws.com/products/7/a.jpg"},
		"default region variable": {"photos", "", map[string]string{"AWS_DEFAULT_REGION": "eu-west-1"},
			"https://photos.s3.eu-west-1.amazonaws.com/products/7/a.jpg"},
		"a bucket with a dot, which no certificate covers": {"photos.example.com", "", map[string]string{"AWS_REGION": "eu-west-1"},
			"https://s3.eu-west-1.amazonaws.com/photos.example.com/products/7/a.jpg"},
		"another partition": {"photos", "", map[string]string{"AWS_REGION": "cn-north-1"},
			"https://photos.s3.cn-north-1.amazonaws.com.cn/products/7/a.jpg"},
		"an endpoint": {"photos", "", map[string]string{"AWS_ENDPOINT_URL_S3": "http://127.0.0.1:9000/"},
			"http://127.0.0.1:9000/photos/products/7/a.jpg"},
		"an endpoint for all services": {"photos", "", map[string]string{"AWS_ENDPOINT_URL": "http://127.0.0.1:9000"},
			"http://127.0.0.1:9000/photos/products/7/a.jpg"},
		"an endpoint that could have host names for buckets": {"photos", "", map[string]string{"AWS_ENDPOINT_URL_S3": "https://storage.example.com"},
			"https://storage.example.com/photos/products/7/a.jpg"},
		"a public base": {"photos", "https://cdn.example.com/i/", map[string]string{"AWS_REGION": "eu-west-1"},
			"https://cdn.example.com/i/products/7/a.jpg"},
		"no region":  {"photos", "", nil, "AWS_REGION is not set"},
		"half a key": {"photos", "", map[string]string{"AWS_ACCESS_KEY_ID": "key"}, "AWS_ACCESS_KEY_ID is set but AWS_SECRET_ACCESS_KEY is not"},
		"the other half": {"photos", "", map[string]string{"AWS_SECRET_ACCESS_KEY": "secret"},
			"AWS_SECRET_ACCESS_KEY is set but AWS_ACCESS_KEY_ID is not"},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			blobs, err := newS3Blobs(t.Context(), test.bucket, test.publicURL, func(name string) string { return test.env[name] })
			if err != nil {
				if err.Error() != test.want {
					t.Errorf("error %q, want %q", err, test.want)
				}
				return
			}
			if got := blobs.URL("products/7/a.jpg"); got != test.want {
				t.Errorf("got %s, want %s", got, test.want)
			}
		})
	}
}

func TestS3Unusable(t *testing.T) {
	t.Parallel()
	env := testS3(t)
	port, err := freePort()
	if err != nil {
		t.Fatal(err)
	}
	tests := map[string]struct {
		bucket string
		env    map[string]string
	}{
		"no such bucket": {"paintings", nil},
		"wrong secret":   {env.Bucket, map[string]string{"AWS_SECRET_ACCESS_KEY": "guess"}},
		"nobody there":   {env.Bucket, map[string]string{"AWS_ENDPOINT_URL_S3": fmt.Sprintf("http://127.0.0.1:%d", port)}},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			blobs, err := newS3Blobs(t.Context(), test.bucket, "", func(name string) string {
				if value, ok := test.env[name]; ok {
					return value
				}
				return env.getenv(name)
			})
			if err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
			defer cancel()
			if err := blobs.Ping(ctx); err == nil {
				t.Error("ping succeeded")
			}
			if err := blobs.Put(ctx, "products/1/1-a.jpg", []byte("x")); err == nil {
				t.Error("put succeeded")
			}
		})
	}
}

// serveFile lets the blobs answer a request for a key. A refusal comes as its status,
// without the problem document.
func serveFile(blobs *fileBlobs, r *http.Request, key string) (*httptest.ResponseRecorder, error) {
	w := httptest.NewRecorder()
	r.SetPathValue("key", key)
	err := blobs.serve(w, r)
	var refusal *httpError
	if errors.As(err, &refusal) {
		w.Code, err = refusal.status, nil
	}
	return w, err
}

func TestFileBlobsServe(t *testing.T) {
	t.Parallel()
	const key = "products/7/41-ba7816bf8f01cfea.jpg"
	blobs := openFileBlobs(t)
	if err := blobs.Put(t.Context(), key, []byte("0123456789")); err != nil {
		t.Fatal(err)
	}
	tests := map[string]struct {
		method, header, value string
		status                int
		body                  string
	}{
		"the whole":               {"GET", "", "", 200, "0123456789"},
		"head":                    {"HEAD", "", "", 200, ""},
		"a range":                 {"GET", "Range", "bytes=2-4", 206, "234"},
		"a range that is not":     {"GET", "Range", "bytes=20-", 416, ""},
		"a client that has it":    {"GET", "If-None-Match", `"41-ba7816bf8f01cfea.jpg"`, 304, ""},
		"a client with another":   {"GET", "If-None-Match", `"42-ba7816bf8f01cfea.jpg"`, 200, "0123456789"},
		"not modified since then": {"GET", "If-Modified-Since", time.Now().Add(time.Hour).UTC().Format(http.TimeFormat), 304, ""},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := httptest.NewRequest(test.method, mediaPrefix, nil)
			if test.header != "" {
				r.Header.Set(test.header, test.value)
			}
			w, err := serveFile(blobs, r, key)
			if err != nil {
				t.Fatal(err)
			}
			if w.Code != test.status || w.Body.String() != test.body {
				t.Errorf("got %d %q, want %d %q", w.Code, w.Body, test.status, test.body)
			}
			if w.Code == 200 {
				h := w.Header()
				if h.Get("Content-Type") != "image/jpeg" ||
					h.Get("Cache-Control") != blobCacheControl || h.Get("Last-Modified") == "" || h.Get("Content-Length") != "10" {
					t.Errorf("header is %v", h)
				}
			}
		})
	}
}

func TestFileBlobsServeNothingElse(t *testing.T) {
	t.Parallel()
	blobs := openFileBlobs(t)
	dir := blobs.root.Name()
	outside := filepath.Join(filepath.Dir(dir), "secret.jpg")
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(blobs.Put(t.Context(), "products/7/a.jpg", []byte("x")))
	must(os.WriteFile(outside, []byte("secret"), 0o600))
	must(os.WriteFile(filepath.Join(dir, fileTempDir, "b.jpg"), []byte("half"), 0o600))
	must(os.WriteFile(filepath.Join(dir, "notes.txt"), []byte("notes"), 0o600))
	must(os.Mkdir(filepath.Join(dir, "album.jpg"), 0o700))
	must(os.Symlink(outside, filepath.Join(dir, "absolute.jpg")))
	must(os.Symlink("../secret.jpg", filepath.Join(dir, "relative.jpg")))
	must(os.Symlink("products/7/a.jpg", filepath.Join(dir, "inside.jpg")))
	must(os.Symlink("..", filepath.Join(dir, "up")))
	paths := []string{
		"", "/", ".", "..", "../secret.jpg", "products/../../secret.jpg", "/secret.jpg", "products//7/a.jpg", "products/7/", "products/7",
		"products", "products/7/a.jpg/", "products/7/a.jpg/b.jpg", "products/7/b.jpg", ".tmp/b.jpg", "./.tmp/b.jpg", "products/../.tmp/b.jpg",
		"notes.txt", "album.jpg", "absolute.jpg", "relative.jpg", "inside.jpg", "up/secret.jpg", "products\\7\\a.jpg", "a\x00.jpg",
		strings.Repeat("x", 5000) + ".jpg",
	}
	for _, p := range paths {
		w, err := serveFile(blobs, httptest.NewRequest("GET", mediaPrefix, nil), p)
		if !errors.Is(err, errNotFound) || w.Body.Len() != 0 || len(w.Header()) != 0 {
			t.Errorf("%.60q: got %q, error %.80v", p, w.Body, err)
		}
	}
}

func TestFileBlobsRefuseBadKeys(t *testing.T) {
	t.Parallel()
	blobs := openFileBlobs(t)
	for _, key := range []string{"", ".", "..", "../a.jpg", "/a.jpg", "products/../../a.jpg", "products//a.jpg", ".tmp/a.jpg", ".tmp"} {
		if err := blobs.Put(t.Context(), key, nil); err == nil {
			t.Errorf("put %q succeeded", key)
		}
		if err := blobs.Delete(t.Context(), key); !errors.Is(err, fs.ErrInvalid) {
			t.Errorf("delete %q: %v", key, err)
		}
	}
	if err := blobs.Put(t.Context(), "products/7/a.html", nil); err == nil {
		t.Error("put of a page succeeded")
	}
	if left := filesUnder(t, blobs); len(left) != 0 {
		t.Errorf("left behind: %v", left)
	}
}

func TestFileBlobsLeaveNothingBehind(t *testing.T) {
	t.Parallel()
	blobs := openFileBlobs(t)
	// Puts race with deletes, which remove the directory whenever it is empty.
	done := make(chan struct{})
	var deletes sync.WaitGroup
	for range 2 {
		deletes.Go(func() {
			for {
				select {
				case <-done:
					return
				default:
				}
				if err := blobs.Delete(t.Context(), "products/7/0-0.jpg"); err != nil {
					t.Errorf("delete: %v", err)
				}
			}
		})
	}
	key := blobKey(7, 41, nil, "jpg")
	for range 100 {
		if err := blobs.Put(t.Context(), key, []byte("x")); err != nil {
			t.Errorf("put: %v", err)
			break
		}
		if err := blobs.Delete(t.Context(), key); err != nil {
			t.Errorf("delete: %v", err)
		}
	}
	close(done)
	deletes.Wait()
	if err := blobs.Put(t.Context(), "a.jpg", nil); err != nil {
		t.Fatal(err)
	}
	if err := blobs.Put(t.Context(), "a.jpg/b.jpg", nil); err == nil {
		t.Error("put below a file succeeded")
	}
	if left := filesUnder(t, blobs); len(left) != 1 || left[0] != "a.jpg" {
		t.Errorf("left behind: %v", left)
	}
	if _, err := blobs.root.Stat("products/7"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("directory of a product without images: %v", err)
	}
}

func TestFileBlobsClearWhatACrashLeft(t *testing.T) {
	t.Parallel()
	blobs := openFileBlobs(t)
	dir := blobs.root.Name()
	stale, recent := filepath.Join(dir, fileTempDir, "stale"), filepath.Join(dir, fileTempDir, "recent")
	for _, name := range []string{stale, recent} {
		if err := os.WriteFile(name, []byte("half"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	long := time.Now().Add(-2 * fileTempAge)
	if err := os.Chtimes(stale, long, long); err != nil {
		t.Fatal(err)
	}
	again, err := newFileBlobs(dir, "")
	if err != nil {
		t.Fatal(err)
	}
	defer again.Close()
	if left := filesUnder(t, blobs); len(left) != 1 || left[0] != ".tmp/recent" {
		t.Errorf("left: %v", left)
	}
}

func TestFileBlobsURLLeadsToTheFile(t *testing.T) {
	t.Parallel()
	blobs := openFileBlobs(t)
	if got, want := blobs.URL("products/7/a.jpg"), "http://shop.example/media/products/7/a.jpg"; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}

func TestFileBlobsPingFailsWhenTheDirectoryIsGone(t *testing.T) {
	t.Parallel()
	blobs := openFileBlobs(t)
	if err := os.RemoveAll(blobs.root.Name()); err != nil {
		t.Fatal(err)
	}
	if err := blobs.Ping(t.Context()); err == nil {
		t.Error("ping succeeded")
	}
}

func filesUnder(t *testing.T, blobs *fileBlobs) []string {
	t.Helper()
	var files []string
	err := fs.WalkDir(blobs.root.FS(), ".", func(name string, entry fs.DirEntry, err error) error {
		if err == nil && !entry.IsDir() {
			files = append(files, name)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return files
}
