package main

import (
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"testing"
)

func TestBuildIsReadFromWhatTheLinkerNoted(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		info debug.BuildInfo
		want build
	}{
		"a release": {
			debug.BuildInfo{GoVersion: "go1.26.0", Main: debug.Module{Version: "v1.2.3"}, Settings: []debug.BuildSetting{
				{Key: "vcs.revision", Value: "abc"}, {Key: "vcs.time", Value: "2026-01-02T03:04:05Z"}, {Key: "vcs.modified", Value: "false"},
				{Key: "GOOS", Value: "linux"}, {Key: "GOARCH", Value: "arm64"}}},
			build{version: "v1.2.3", revision: "abc", time: "2026-01-02T03:04:05Z", goBuild: "go1.26.0 linux/arm64"},
		},
		"with changes": {
			debug.BuildInfo{Main: debug.Module{Version: "v1.2.4-0.2026+dirty"}, Settings: []debug.BuildSetting{{Key: "vcs.modified", Value: "true"}}},
			build{version: "v1.2.4-0.2026+dirty", revision: "unknown", time: "unknown", modified: true, goBuild: " /"},
		},
		"nothing noted": {debug.BuildInfo{}, build{version: "unknown", revision: "unknown", time: "unknown", goBuild: " /"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			if got := buildOf(&c.info); got != c.want {
				t.Errorf("read %+v, want %+v", got, c.want)
			}
		})
	}
}

func TestProgramTellsItsBuild(t *testing.T) {
	t.Parallel()
	out, err := exec.Command(programPath(t), "version").CombinedOutput()
	if err != nil {
		t.Fatalf("pms version: %v\n%s", err, out)
	}
	wanted := []string{"pms       ", "revision  ", "time      ", fmt.Sprintf("go        %s %s/%s\n", runtime.Version(), runtime.GOOS, runtime.GOARCH)}
	// The go command notes the commit in a repository's own work tree only.
	commit, err := exec.Command("git", "rev-parse", "HEAD").Output()
	flags, _ := exec.Command("go", "env", "GOFLAGS").Output()
	if info, statErr := os.Stat(".git"); err == nil && statErr == nil && info.IsDir() && !strings.Contains(string(flags), "buildvcs") {
		wanted = append(wanted, strings.TrimSpace(string(commit)))
	}
	for _, want := range wanted {
		if !strings.Contains(string(out), want) {
			t.Errorf("pms version says nothing of %q:\n%s", want, out)
		}
	}
}

// A worker answers the machines that watch it, if it is told where, and nobody else.
func TestWorkerListensForThoseWhoWatch(t *testing.T) {
	t.Parallel()
	worker := start(t, environment(serverEnv(t), map[string]string{"WORKER_LISTEN_ADDR": "127.0.0.1:0"}), "worker")
	worker.awaitStart(t, nil) // the line with the address
	for path, want := range map[string]int{
		"/healthz": 200, "/metrics": 200, "/debug/pprof/": 200, "/products": 404, "/dead-letters": 404, "/": 404,
	} {
		if got := statusOf(worker.url + path); got != want {
			t.Errorf("a worker answers GET %s with %d, want %d", path, got, want)
		}
	}
	eventually(t, "the worker is ready", func() bool { return statusOf(worker.url+"/readyz") == http.StatusOK })
	eventually(t, "the workload is among the worker's metrics", func() bool {
		there := readSeries(textOf(t, worker.url+"/metrics"))
		return !slices.ContainsFunc(append([]string{"pms_build_info"}, workloadMetrics...), func(name string) bool { return there[name] == nil })
	})
}

func TestWorkerThatOthersReachAsksForTokens(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		listen, worker string
		auth           bool
	}{
		"nothing but loopback":      {"127.0.0.1:1", "127.0.0.1:2", false},
		"no worker":                 {"127.0.0.1:1", "", false},
		"the worker on any":         {"127.0.0.1:1", ":2", true},
		"the API on any":            {":1", "127.0.0.1:2", true},
		"the API on any, no worker": {":1", "", true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			env := map[string]string{"LISTEN_ADDR": c.listen, "WORKER_LISTEN_ADDR": c.worker}
			config, err := loadConfig(func(name string) string { return env[name] }, false)
			if err != nil || config.Auth != c.auth {
				t.Errorf("AUTH is %t, want %t (%v)", config.Auth, c.auth, err)
			}
		})
	}
}
