package main

import (
	"bytes"
	"context"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// browserTime is several times what the walk through the console takes, on a
// machine that is slow, and busy with other tests too.
const browserTime = 12 * time.Minute

func TestConsoleIsServed(t *testing.T) {
	t.Parallel()
	a := newAPI(t)
	a.authOn = true // the page is for everybody: it asks for the token itself
	page := a.do(t, "GET", "/", "")
	if page.Code != http.StatusOK || page.Header().Get("Content-Type") != "text/html; charset=utf-8" {
		t.Fatalf("the page: %d, %v", page.Code, page.Header())
	}
	policy := page.Header().Get("Content-Security-Policy")
	for _, wanted := range []string{"default-src 'none'", "script-src 'self';", "style-src 'self';", "connect-src 'self';", "frame-ancestors 'none'"} {
		if !strings.Contains(policy, wanted) {
			t.Errorf("the policy %q lacks %q", policy, wanted)
		}
	}
	if again := a.do(t, "GET", "/", "", "If-None-Match", page.Header().Get("Etag")); again.Code != http.StatusNotModified || again.Body.Len() != 0 {
		t.Errorf("the page asked for again: %d, %d bytes", again.Code, again.Body.Len())
	}
	files, err := consoleFiles.ReadDir("console")
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range files {
		path := "/console/" + file.Name()
		got := a.do(t, "GET", path, "")
		if got.Code != http.StatusOK || got.Header().Get("Content-Type") == "" || got.Body.Len() == 0 {
			t.Errorf("%s: %d, type %q, %d bytes", path, got.Code, got.Header().Get("Content-Type"), got.Body.Len())
		}
		if file.Name() != "index.html" && !strings.Contains(page.Body.String(), path) {
			t.Errorf("the page does not load %s with its first requests", path)
		}
		again := a.do(t, "GET", path, "", "If-None-Match", got.Header().Get("Etag"))
		if again.Code != http.StatusNotModified || again.Body.Len() != 0 {
			t.Errorf("%s asked for again: %d, %d bytes", path, again.Code, again.Body.Len())
		}
	}
	a.do(t, "GET", "/console/none.js", "").wantProblem(t, http.StatusNotFound)
	a.do(t, "POST", "/", "").wantProblem(t, http.StatusMethodNotAllowed)
}

// The whole console in a real browser, at the width of a phone and of a desk, in
// light and dark: console_test.mjs walks through it.
func TestConsoleInABrowser(t *testing.T) {
	t.Parallel()
	node, chromium := browser(t)
	photos := newPhotoServer(t)
	servePhotos(t, photos)
	held := map[string]func(){"/slow.jpg": photos.holdBack("/slow.jpg"), "/guarded.jpg": photos.holdBack("/guarded.jpg")}
	control := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { held[r.URL.Path]() }))
	t.Cleanup(func() {
		control.Close()
		for _, release := range held {
			release()
		}
	})

	// A photo that is held back fails for now after headerTimeout, and is asked for again.
	patient := map[string]string{"RETRY_ATTEMPTS": "50"}
	open := startBinary(t, environment(patient, map[string]string{"DATA_DIR": t.TempDir()}))
	guardedEnv := environment(patient, map[string]string{"DATA_DIR": t.TempDir(), "AUTH": "on"})
	admin, user := createToken(t, guardedEnv, "-admin"), createToken(t, guardedEnv)
	guarded := startBinary(t, guardedEnv)
	degraded := startBinary(t, environment(map[string]string{"DATA_DIR": t.TempDir(), "REDIS_URL": "redis://" + closedAddr(t)}))

	ctx, cancel := context.WithTimeout(t.Context(), browserTime)
	defer cancel()
	cmd := exec.CommandContext(ctx, node, "--test-reporter=spec", "console_test.mjs")
	cmd.Env = append(os.Environ(),
		"CHROMIUM="+chromium, "CONSOLE="+open.url, "GUARDED="+guarded.url, "DEGRADED="+degraded.url,
		"ADMIN_TOKEN="+admin, "USER_TOKEN="+user, "PHOTOS="+photos.URL, "RELEASE="+control.URL)
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	cmd.WaitDelay = 10 * time.Second
	output, err := cmd.CombinedOutput()
	if err != nil {
		t.Errorf("%v\n%s", err, output)
		return
	}
	t.Logf("%s", output)
}

// browser answers where node and Chromium are, and skips or fails the test if
// one of them or playwright-core is missing.
func browser(t *testing.T) (node, chromium string) {
	t.Helper()
	node, err := exec.LookPath("node")
	if err != nil {
		skipOrFail(t, &missingError{"node", installHint})
	}
	if _, err := os.Stat(filepath.Join(".cache", "console", "node_modules", "playwright-core")); err != nil {
		skipOrFail(t, &missingError{"playwright-core", installHint})
	}
	for _, name := range []string{os.Getenv("CHROMIUM"), "chromium", "chromium-browser", "google-chrome", "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome"} {
		if path, err := exec.LookPath(name); err == nil {
			return node, path
		}
	}
	skipOrFail(t, &missingError{"chromium", installHint})
	return "", ""
}

// servePhotos offers real photographs, where there are any, and images that fail.
func servePhotos(t *testing.T, photos *photoServer) {
	t.Helper()
	for name, like := range map[string]string{
		"brushes": "Picture_1A_by_*", "bowl": "Picture_0B_by_*", "lamp": "free_by_*", "clock": "greentock_by_*",
		"mountains": "aitzgorri_by_*", "stream": "life_by_*", "dogs": "friends_by_*",
	} {
		photo := jpegPhoto(t, 900, 600)
		if found, _ := filepath.Glob(filepath.Join(".cache", "photos", like)); len(found) > 0 {
			var err error
			if photo, err = os.ReadFile(found[0]); err != nil {
				t.Fatal(err)
			}
		}
		photos.serve("/"+name+".jpg", photo)
	}
	small := jpegPhoto(t, 640, 480)
	photos.serve("/slow.jpg", small)
	photos.serve("/guarded.jpg", small)
	photos.serve("/back.jpg", small, http.StatusNotFound)  // there when it is replayed
	photos.serve("/again.jpg", small, http.StatusNotFound) // likewise
	photos.serve("/late.jpg", small, http.StatusNotFound)
	photos.serve("/shaky.jpg", small, http.StatusServiceUnavailable)
	photos.serve("/notes.txt", []byte("no image at all"))
}

// createToken makes a token as an operator would.
func createToken(t *testing.T, env map[string]string, flags ...string) string {
	t.Helper()
	var out bytes.Buffer
	args := append([]string{"token", "create", "-user", "1"}, flags...)
	if err := run(t.Context(), args, func(name string) string { return env[name] }, &out, io.Discard); err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(out.String())
}

// closedAddr is a loopback address at which nobody listens.
func closedAddr(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}
