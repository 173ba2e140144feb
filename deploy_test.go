package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"go.yaml.in/yaml/v4"
)

// The dashboard and the alerts ask for nothing but what a running program
// answers at /metrics, with the labels that it has there.
func TestDashboardAndAlertsUseMetricsThatExist(t *testing.T) {
	t.Parallel()
	program := startBinary(t, environment(serverEnv(t)))
	photos := newPhotoServer(t)
	program.settled(t, program.post(t, photos.serve("/a", jpegPhoto(t, 20, 20))).ID)
	var there series
	eventually(t, "the workload is among the metrics", func() bool {
		there = readSeries(textOf(t, program.url+"/metrics"))
		return !slices.ContainsFunc(workloadMetrics, func(name string) bool { return there[name] == nil })
	})
	for file, queries := range map[string][]string{
		"deploy/prometheus-alerts.yaml": alertQueries(t, "deploy/prometheus-alerts.yaml"),
		"deploy/grafana-dashboard.json": dashboardQueries(t, "deploy/grafana-dashboard.json"),
	} {
		if len(queries) < 5 {
			t.Errorf("%s has the queries %q only", file, queries)
		}
		for _, query := range queries {
			if err := there.answers(query); err != nil {
				t.Errorf("%s: %v in %s", file, err, query)
			}
		}
	}
}

// What promtool is told to expect of the alerts (make deploy-check) is what they say.
func TestAlertsSayWhatTheirTestsExpect(t *testing.T) {
	t.Parallel()
	annotation := regexp.MustCompile(`(?m)^ +(?:summary|description): ["']?(.*?)["']?$`)
	template := regexp.MustCompile(`\{\{.*?\}\}`)
	var said []string
	for _, text := range annotation.FindAllStringSubmatch(string(readFile(t, "deploy/prometheus-alerts.yaml")), -1) {
		fixed := template.Split(text[1], -1)
		for n := range fixed {
			fixed[n] = regexp.QuoteMeta(fixed[n])
		}
		said = append(said, strings.Join(fixed, ".*"))
	}
	alerts := regexp.MustCompile("^(?:" + strings.Join(said, "|") + ")$")
	expected := annotation.FindAllStringSubmatch(string(readFile(t, "deploy/prometheus-alerts_test.yaml")), -1)
	if len(expected) == 0 {
		t.Error("nothing is expected")
	}
	for _, text := range expected {
		if !alerts.MatchString(text[1]) {
			t.Errorf("no alert says %q", text[1])
		}
	}
}

// series are the metrics at /metrics: by name, each with its label pairs.
type series map[string][]string

var seriesLine = regexp.MustCompile(`(?m)^([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{(.*)\})? `)

func readSeries(text string) series {
	s := make(series)
	for _, line := range seriesLine.FindAllStringSubmatch(text, -1) {
		s[line[1]] = append(s[line[1]], line[2])
	}
	return s
}

var (
	selector     = regexp.MustCompile(`([a-zA-Z_:][a-zA-Z0-9_:]*)\{([^}]*)\}`)
	labelMatcher = regexp.MustCompile(`([a-z_]+)(!?[=~]~?)"((?:[^"\\]|\\.)*)"`)
)

// answers says which selector of a query, if any, matches no series.
func (s series) answers(query string) error {
	selectors := selector.FindAllStringSubmatch(query, -1)
	if selectors == nil {
		return errors.New("there is no selector")
	}
	for _, found := range selectors {
		name, matchers := found[1], labelMatcher.FindAllStringSubmatch(found[2], -1)
		if name == "up" {
			continue
		}
		if !slices.ContainsFunc(s[name], func(labels string) bool { return matchesLabels(labels, matchers) }) {
			return fmt.Errorf("nothing is %s", found[0])
		}
	}
	return nil
}

// matchesLabels applies a selector's matchers, but for that of the job, which
// Prometheus adds.
func matchesLabels(labels string, matchers [][]string) bool {
	have := make(map[string]string)
	for _, pair := range labelMatcher.FindAllStringSubmatch(labels, -1) {
		have[pair[1]] = pair[3]
	}
	return !slices.ContainsFunc(matchers, func(m []string) bool {
		value, ok := have[m[1]]
		if m[1] == "job" {
			return false
		}
		matched := value == m[3]
		if strings.HasSuffix(m[2], "~") {
			matched = regexp.MustCompile("^(?:" + m[3] + ")$").MatchString(value)
		}
		return !ok || matched == strings.HasPrefix(m[2], "!")
	})
}

func alertQueries(t *testing.T, file string) (queries []string) {
	t.Helper()
	var rules struct {
		Groups []struct {
			Rules []struct{ Alert, Expr string }
		}
	}
	readYAML(t, file, func(decode func(any) error) error { return decode(&rules) })
	for _, group := range rules.Groups {
		for _, rule := range group.Rules {
			queries = append(queries, rule.Expr)
		}
	}
	return queries
}

func dashboardQueries(t *testing.T, file string) (queries []string) {
	t.Helper()
	var board struct {
		Panels []struct{ Targets []struct{ Expr string } }
	}
	data, err := os.ReadFile(file)
	if err == nil {
		err = json.Unmarshal(data, &board)
	}
	if err != nil {
		t.Fatal(err)
	}
	for _, panel := range board.Panels {
		for _, target := range panel.Targets {
			queries = append(queries, target.Expr)
		}
	}
	return queries
}

// readYAML reads each document of a file.
func readYAML(t *testing.T, file string, read func(decode func(any) error) error) {
	t.Helper()
	data := readFile(t, file)
	decoder := yaml.NewDecoder(bytes.NewReader(data))
	for n := 1; ; n++ {
		err := read(decoder.Decode)
		if errors.Is(err, io.EOF) && n > 1 {
			return
		}
		if err != nil {
			t.Fatalf("%s, document %d: %v", file, n, err)
		}
	}
}

// container is how a manifest runs the program: its command and its settings.
type container struct {
	where    string
	command  []string
	settings map[string]string
	grace    time.Duration // after which it is killed, where the manifest says so
}

// Compose, Kubernetes and systemd start commands that there are, with settings
// that there are and values that the program takes.
func TestManifestsStartTheProgram(t *testing.T) {
	t.Parallel()
	containers := allContainers(t)
	if len(containers) != 5 {
		t.Errorf("there are %d containers: %v", len(containers), containers)
	}
	for _, c := range containers {
		cmd, rest, err := findCommand(c.command)
		if err != nil || len(rest) > 0 {
			t.Errorf("%s: %v %v", c.where, err, rest)
		}
		for _, name := range slices.Sorted(maps.Keys(c.settings)) {
			known := slices.ContainsFunc(new(config).settings(), func(s setting) bool { return s.name == name })
			if !known && !strings.HasPrefix(name, "AWS_") && name != "GOMEMLIMIT" {
				t.Errorf("%s: there is no setting %s", c.where, name)
			}
		}
		loaded, err := loadConfig(func(name string) string { return c.settings[name] }, false)
		if err != nil {
			t.Errorf("%s: %v", c.where, err)
		}
		if missing := (&program{config: loaded}).missingFor(cmd.name); missing != nil {
			t.Errorf("%s: %s needs %v", c.where, cmd.name, missing)
		}
	}
}

func allContainers(t *testing.T) []container {
	t.Helper()
	return slices.Concat(composeContainers(t), kubernetesContainers(t), []container{systemdService(t)})
}

// stopsWithin is how long the program may take to end after SIGTERM.
func (c container) stopsWithin(t *testing.T) time.Duration {
	t.Helper()
	loaded, err := loadConfig(func(name string) string { return c.settings[name] }, false)
	if err != nil {
		t.Fatalf("%s: %v", c.where, err)
	}
	return loaded.ShutdownDelay + loaded.ShutdownGrace
}

func composeContainers(t *testing.T) (found []container) {
	t.Helper()
	var file struct {
		Services map[string]struct {
			Build       string
			Command     []string
			Environment map[string]string
			Grace       time.Duration `yaml:"stop_grace_period"`
		}
	}
	readYAML(t, "compose.yaml", func(decode func(any) error) error { return decode(&file) })
	for name, service := range file.Services {
		if service.Build == "" {
			continue
		}
		settings := map[string]string{"LISTEN_ADDR": ":8080"} // as the Dockerfile has it
		for name, value := range service.Environment {
			settings[name] = regexp.MustCompile(`\$\{[A-Z0-9_]+:-([^}]*)\}`).ReplaceAllString(value, "$1")
		}
		found = append(found, container{"compose.yaml: " + name, service.Command, settings, service.Grace})
	}
	return found
}

// manifest is what the tests read of a Kubernetes object.
type manifest struct {
	Kind     string
	Metadata struct{ Name string }
	Data     map[string]string
	Spec     struct {
		Template struct {
			Spec struct {
				Grace      int `yaml:"terminationGracePeriodSeconds"`
				Containers []podContainer
			}
		}
		Triggers []struct{ Metadata map[string]string }
		Fewest   int `yaml:"minReplicaCount"`
	}
}

type podContainer struct {
	Args  []string
	Env   []struct{ Name, Value string }
	Ports []struct {
		ContainerPort int `yaml:"containerPort"`
	}
	Liveness  probe `yaml:"livenessProbe"`
	Readiness probe `yaml:"readinessProbe"`
}

type probe struct {
	HTTPGet struct{ Path string } `yaml:"httpGet"`
}

func readManifests(t *testing.T) (all []manifest) {
	t.Helper()
	files, err := filepath.Glob("deploy/kubernetes/*.yaml")
	if err != nil || len(files) < 2 {
		t.Fatalf("manifests: %q, %v", files, err)
	}
	for _, file := range files {
		readYAML(t, file, func(decode func(any) error) error {
			var m manifest
			err := decode(&m)
			if err == nil {
				all = append(all, m)
			}
			return err
		})
	}
	return all
}

func kubernetesContainers(t *testing.T) (found []container) {
	t.Helper()
	manifests := readManifests(t)
	shared := make(map[string]string)
	for _, m := range manifests {
		maps.Copy(shared, m.Data)
	}
	secret, err := readDotEnv(bytes.NewReader(readFile(t, "deploy/kubernetes/pms.env.example")))
	if err != nil {
		t.Fatal(err)
	}
	maps.Copy(shared, secret)
	for _, m := range manifests {
		for _, c := range m.Spec.Template.Spec.Containers {
			settings := maps.Clone(shared)
			for _, variable := range c.Env {
				settings[variable.Name] = variable.Value
			}
			found = append(found, container{"kubernetes: " + m.Metadata.Name, c.Args, settings, time.Duration(m.Spec.Template.Spec.Grace) * time.Second})
		}
	}
	return found
}

func systemdService(t *testing.T) container {
	t.Helper()
	unit := readUnit(t)
	name, value, _ := strings.Cut(unit["Environment"], "=")
	seconds, err := strconv.Atoi(unit["TimeoutStopSec"])
	if err != nil {
		t.Fatal(err)
	}
	return container{"pms.service", strings.Fields(unit["ExecStart"])[1:], map[string]string{name: value}, time.Duration(seconds) * time.Second}
}

// readUnit reads the systemd unit; of a name that stands twice, the last line.
func readUnit(t *testing.T) map[string]string {
	t.Helper()
	data := readFile(t, "deploy/pms.service")
	unit := make(map[string]string)
	for line := range strings.Lines(string(data)) {
		if name, value, ok := strings.Cut(strings.TrimSpace(line), "="); ok && !strings.HasPrefix(line, "#") {
			unit[name] = value
		}
	}
	return unit
}

// Probes ask where the program answers, nobody kills it before it has finished,
// and workers are counted by the queue that there is.
func TestManifestsFitTheProgram(t *testing.T) {
	t.Parallel()
	for _, c := range allContainers(t) {
		if needed := c.stopsWithin(t); c.grace < needed {
			t.Errorf("%s: is killed after %v, and takes %v", c.where, c.grace, needed)
		}
	}
	var queues []string
	for _, m := range readManifests(t) {
		for _, c := range m.Spec.Template.Spec.Containers {
			if c.Liveness.HTTPGet.Path != "/healthz" || c.Readiness.HTTPGet.Path != "/readyz" {
				t.Errorf("%s: probes %+v, %+v", m.Metadata.Name, c.Liveness, c.Readiness)
			}
			settings := make(map[string]string)
			for _, variable := range c.Env {
				settings[variable.Name] = variable.Value
			}
			port := fmt.Sprintf(":%d", c.Ports[0].ContainerPort)
			if settings["LISTEN_ADDR"] != port && settings["WORKER_LISTEN_ADDR"] != port {
				t.Errorf("%s: nothing listens on %s", m.Metadata.Name, port)
			}
		}
		for _, trigger := range m.Spec.Triggers {
			queues = append(queues, trigger.Metadata["queueName"])
			if m.Spec.Fewest < 1 {
				t.Errorf("%s: nobody sends webhooks when there are %d workers", m.Metadata.Name, m.Spec.Fewest)
			}
		}
	}
	if !slices.Equal(queues, []string{workQueueName}) {
		t.Errorf("scaled by the queues %q", queues)
	}
}

// The image is built from all that git tracks: the build would else be stamped as
// one of a changed tree, or lack what the program embeds.
func TestImageIsBuiltFromTheWholeTree(t *testing.T) {
	t.Parallel()
	ignore := readFile(t, ".dockerignore")
	tracked, err := exec.Command("git", "ls-files").Output()
	if err != nil {
		t.Skipf("needs git and a checkout: %v", err)
	}
	for line := range strings.Lines(string(ignore)) {
		pattern := strings.TrimPrefix(strings.TrimSpace(line), "/")
		for file := range strings.Lines(string(tracked)) {
			for part := strings.TrimSpace(file); part != "."; part = path.Dir(part) {
				if matched, _ := path.Match(pattern, part); matched {
					t.Errorf("%s is left out by %q", part, pattern)
				}
			}
		}
	}
}
