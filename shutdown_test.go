package main

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// halfRequest is a request whose end is yet to be sent.
type halfRequest struct {
	conn net.Conn
	rest string
}

func beginRequest(t *testing.T, i *instance, request string, rest string) *halfRequest {
	t.Helper()
	conn, err := net.Dial("tcp", strings.TrimPrefix(i.url, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	if _, err := io.WriteString(conn, request); err != nil {
		t.Fatal(err)
	}
	return &halfRequest{conn, rest}
}

// send sends the rest, if it has not been sent.
func (h *halfRequest) send(t *testing.T) {
	t.Helper()
	if _, err := io.WriteString(h.conn, h.rest); err != nil {
		t.Fatal(err)
	}
	h.rest = ""
}

func (h *halfRequest) finish(t *testing.T) (status int, body string) {
	t.Helper()
	h.send(t)
	h.conn.SetReadDeadline(time.Now().Add(settleTime))
	response, err := http.ReadResponse(bufio.NewReader(h.conn), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	data, err := io.ReadAll(response.Body)
	if err != nil {
		t.Fatal(err)
	}
	return response.StatusCode, string(data)
}

// SIGTERM to a real process: it is no longer ready, then takes no more
// connections, answers the requests that it has, and ends well.
func TestStopAnswersTheRequestsInHand(t *testing.T) {
	t.Parallel()
	api := startBinary(t, environment(map[string]string{"DATA_DIR": t.TempDir(), "SHUTDOWN_DELAY": "2s"}))
	body := `{"user_id":1,"product_name":"Shoe","product_price":"1"}`
	post := beginRequest(t, api, fmt.Sprintf("POST /products HTTP/1.1\r\nHost: pms\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s", len(body), body[:10]), body[10:])
	if err := syscall.Kill(api.pid, syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	api.log.await(t, `"msg":"stopping"`)
	if response := api.call(t, "GET", "/readyz", nil, nil); response.StatusCode != 503 {
		t.Errorf("readyz: %s", response.Status)
	}
	if response := api.call(t, "GET", "/products", nil, nil); response.StatusCode != 200 {
		t.Errorf("a request after the signal: %s", response.Status)
	}
	eventually(t, "no more connections are taken", func() bool {
		conn, err := net.Dial("tcp", strings.TrimPrefix(api.url, "http://"))
		if err == nil {
			conn.Close()
		}
		return err != nil
	})
	if status, body := post.finish(t); status != 201 {
		t.Errorf("the product: %d %s", status, body)
	}
	if err := api.wait(); err != nil {
		t.Errorf("exit: %v", err)
	}
}

// Ctrl-C at "pms serve 2>&1 | tee log" ends tee first: the program's log has no
// reader any more, and it ends as well as ever.
func TestStopWithNobodyToReadTheLog(t *testing.T) {
	t.Parallel()
	fifo := filepath.Join(t.TempDir(), "log")
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	program := launchProgram(t, "/bin/sh", environment(map[string]string{"DATA_DIR": t.TempDir(), "LOG": fifo}), "-c", `exec "$0" serve 2>"$LOG"`, programPath(t))
	reader, err := os.Open(fifo)
	if err != nil {
		t.Fatal(err)
	}
	for lines := bufio.NewScanner(reader); lines.Scan() && !strings.Contains(lines.Text(), `"msg":"listening"`); {
	}
	reader.Close()
	if err := program.stop(); err != nil {
		t.Errorf("exit: %v", err)
	}
}

// What is not finished within the grace period goes back unharmed, the exit is
// clean, and the next process makes it.
func TestStopGivesBackWhatIsNotFinished(t *testing.T) {
	t.Parallel()
	deployments := map[string]func(t *testing.T) map[string]string{
		"embedded": func(t *testing.T) map[string]string { return map[string]string{"DATA_DIR": t.TempDir()} },
		"servers":  serverEnv,
	}
	for name, settings := range deployments {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			env := environment(settings(t), map[string]string{"SHUTDOWN_GRACE": "300ms", "IMAGE_WORKERS": "1"})
			photos := newPhotoServer(t)
			release := photos.holdBack("/held")
			defer release()
			photos.serve("/held", jpegPhoto(t, 40, 40))
			first := startBinary(t, env)
			p := first.post(t, slices.Repeat([]string{photos.URL + "/held"}, maxImages)...)
			eventually(t, "images are in work", func() bool { return photos.requests("/held") == maxHostDownloads })
			begun := time.Now()
			if err := first.stop(); err != nil {
				t.Errorf("exit: %v", err)
			}
			if took := time.Since(begun); took > 15*time.Second {
				t.Errorf("the end took %v", took)
			}
			if n := photos.requests("/held"); n != maxHostDownloads {
				t.Errorf("%d more images were begun", n-maxHostDownloads)
			}
			first.log.await(t, "image given back unfinished")
			release()
			second := startBinary(t, env)
			for n, image := range second.settled(t, p.ID).Images {
				if image.Status != "ready" || image.Attempts != 0 {
					t.Errorf("image %d: %+v", n, image)
				}
			}
			if err := second.stop(); err != nil {
				t.Errorf("exit: %v", err)
			}
		})
	}
}

// A second signal does not wait for anything.
func TestSecondSignalEndsAtOnce(t *testing.T) {
	t.Parallel()
	photos := newPhotoServer(t)
	release := photos.holdBack("/held")
	defer release()
	photos.serve("/held", jpegPhoto(t, 40, 40))
	env := environment(map[string]string{"DATA_DIR": t.TempDir(), "SHUTDOWN_GRACE": "1h"})
	i := startBinary(t, env)
	i.post(t, photos.URL+"/held")
	eventually(t, "the image is in work", func() bool { return photos.requests("/held") == 1 })
	if err := syscall.Kill(i.pid, syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	i.log.await(t, `"msg":"stopping"`)
	ended := make(chan error, 1)
	go func() { ended <- i.stop() }()
	if err := receive(t, ended); err == nil || err.Error() != "signal: terminated" {
		t.Errorf("the second signal: %v", err)
	}
}
