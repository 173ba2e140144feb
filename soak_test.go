package main

import (
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"testing"
	"time"
)

// soakDurationVar is how long TestSoak goes on. Unset, it has as few rounds as
// tell a leak from noise.
const soakDurationVar = "SOAK_DURATION"

const (
	// soakWarmup is how much of a soak passes before anything counts: pools fill,
	// connections that idle come to be as many as there can be, and what is
	// remembered for a minute or two is as much as a minute or two bring.
	soakWarmup = 0.2
	// soakWindow is how many rounds are looked at together: the first after the
	// warm-up, and the last.
	soakWindow = 2
	// soakBetween is how many rounds lie between those at least: so many of a thing
	// are there more that leaks once a round, and one.
	soakBetween = 2
	// soakPatience is how long things have after the last round for coming down to
	// what they were: dead letters' copies are looked at every ten seconds.
	soakPatience = 15 * time.Second
)

// soakNone are the things of which there are none when the program has nothing
// left to do, though rounds that are not waited for may end with some.
var soakNone = []string{"messages in queue", "messages in queue.dead", "open transactions", "keys that never expire", "keys that live too long", "temporary files"}

// soakSlack is by how much the things of a kind may grow from the first rounds to
// the last, in which there are more rounds than that. What is not here may not.
var soakSlack = map[string]float64{
	"goroutines":  soakBetween,
	"open files":  soakBetween,
	"connections": soakBetween,
	"heap, MB":    2, // what is in use at the moment of a collection differs
}

// soakKept are the things that are kept for a time by design. They are as many as
// the last rounds made, and must be gone when it is over: see soakWorld.letGo. The
// keys in Redis are counted by how long they have yet, and those that it tracks
// for its clients are bounded by itself (tracking-table-max-keys).
var soakKept = []string{"events", "idempotency_keys", "failed deliveries", "garbage not due", "keys that expire", "keys tracked"}

// soakSample is what there is of everything when a round has settled: by whose
// and what it is, such as "api: goroutines".
type soakSample map[string]float64

// Nothing grows with what the program has done: clients do all that they can do to
// an API and a worker, in rounds that each leave the shop as it was, and after each
// everything is counted that could be left over, in the processes and on all
// servers. See README for the long form.
func TestSoak(t *testing.T) {
	t.Parallel()
	length := readSoakDuration(t)
	w := newSoakWorld(t, length > 0)
	began := time.Now()
	w.rounds(t, 1, began.Add(time.Duration(soakWarmup*float64(length))))
	first := w.rounds(t, soakWindow, began)
	w.sampleBroker(t, first[0])
	middle := w.rounds(t, soakBetween, began.Add(length))
	last := w.rounds(t, soakWindow, began)
	took := time.Since(began)
	w.sampleBroker(t, last[0])
	grown := soakGrown(first, last)
	pollUntil(time.Now().Add(soakPatience), func() bool {
		if len(grown) > 0 {
			later := w.sample(t)
			if slices.ContainsFunc(grown, func(what string) bool { return strings.HasPrefix(what, "rabbitmq: ") }) {
				w.sampleBroker(t, later)
			}
			last[0].lower(later, grown)
			grown = soakGrown(first, last)
		}
		return len(grown) == 0
	})
	t.Logf("%d rounds of %d requests in %v\n%s", w.count, w.sent/w.count, took.Round(time.Second), soakTable(first, middle, last))
	for _, what := range grown {
		t.Errorf("%s: in each of the last %d rounds there are more than in any of the first", what, soakWindow)
	}
	w.letGo(t)
}

func readSoakDuration(t *testing.T) (length time.Duration) {
	t.Helper()
	if value := os.Getenv(soakDurationVar); value != "" {
		if err := duration(&length, 0, 7*24*time.Hour)(value); err != nil {
			t.Fatalf("%s: %v", soakDurationVar, err)
		}
	}
	return length
}

// rounds goes on for some rounds, and until a time.
func (w *soakWorld) rounds(t *testing.T, least int, until time.Time) (samples []soakSample) {
	t.Helper()
	for len(samples) < least || time.Now().Before(until) {
		for _, program := range w.programs {
			program.log.forget("") // a failed test shows the last round's
		}
		w.round(t)
		w.settle(t)
		samples = append(samples, w.sample(t))
		w.storage.letTimePass(t, soakStep)
	}
	return samples
}

// soakThing is what a thing is of, without whose.
func soakThing(what string) string {
	_, thing, _ := strings.Cut(what, ": ")
	return thing
}

// soakMost is the most that there was of each thing.
func soakMost(samples []soakSample) soakSample {
	most := make(soakSample)
	for _, sample := range samples {
		for what, n := range sample {
			most[what] = max(most[what], n)
		}
	}
	return most
}

// soakLeast is the least that there was of each thing.
func soakLeast(samples []soakSample) soakSample {
	least := make(soakSample)
	for _, sample := range samples {
		least.least(sample)
	}
	return least
}

// lower takes over which of some things have become less.
func (s soakSample) lower(later soakSample, some []string) {
	for _, what := range some {
		if n, counted := later[what]; counted {
			s[what] = min(s[what], n)
		}
	}
}

// least takes over what is less, or new.
func (s soakSample) least(other soakSample) {
	for what, n := range other {
		if old, known := s[what]; !known || n < old {
			s[what] = n
		}
	}
}

// soakLimits is how many of each thing there may be in the end, for what is not
// kept by design.
func soakLimits(first []soakSample) soakSample {
	limits := soakMost(first)
	for what := range limits {
		switch thing := soakThing(what); {
		case slices.Contains(soakKept, thing):
			delete(limits, what)
		case slices.Contains(soakNone, thing):
			limits[what] = 0
		default:
			limits[what] += soakSlack[thing]
		}
	}
	return limits
}

// soakAbove are the things of which a sample has more than the limits allow.
func soakAbove(sample, limits soakSample) (above []string) {
	for what, limit := range limits {
		if sample[what] > limit {
			above = append(above, what)
		}
	}
	slices.Sort(above)
	return above
}

// soakGrown are the things of which there are more in each of the last rounds than
// in any of the first. So what merely goes up and down is not one of them, and
// what leaks once a round is.
func soakGrown(first, last []soakSample) []string {
	return soakAbove(soakLeast(last), soakLimits(first))
}

// soakTable shows what is compared: the most of the first rounds, one round in the
// middle, the least of the last.
func soakTable(first, middle, last []soakSample) string {
	limits, most, least := soakLimits(first), soakMost(first), soakLeast(last)
	lines := []string{fmt.Sprintf("%-38s %9s %9s %9s %9s", "", "first", "middle", "last", "allowed")}
	for _, what := range slices.Sorted(maps.Keys(most)) {
		allowed := "kept"
		if limit, ok := limits[what]; ok {
			allowed = fmt.Sprintf("%.4g", limit)
		}
		between := "-" // counted at the ends alone
		if n, counted := middle[len(middle)/2][what]; counted {
			between = fmt.Sprintf("%.4g", n)
		}
		lines = append(lines, fmt.Sprintf("%-38s %9.4g %9s %9.4g %9s", what, most[what], between, least[what], allowed))
	}
	return strings.Join(lines, "\n")
}

// What grows by one a round is found, however short the soak; what has grown
// before it began to count, what goes up and down, and what is kept for a time are not.
func TestSoakFindsWhatGrows(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		what  string
		count func(round int) float64
		grows bool
	}{
		"a goroutine a round":             {"api: goroutines", func(round int) float64 { return float64(30 + round) }, true},
		"an object a round":               {"s3: objects", func(round int) float64 { return float64(round) }, true},
		"a row, once":                     {"postgres: rows of images", func(round int) float64 { return float64(round / 4) }, true},
		"goroutines up and down":          {"api: goroutines", func(round int) float64 { return float64(30 + 20*(round%2)) }, false},
		"connections, until there are 10": {"postgres: connections", func(round int) float64 { return float64(min(10, 7+round)) }, false},
		"the heap by a little":            {"api: heap, MB", func(round int) float64 { return 10 + float64(round)/10 }, false},
		"the heap by much":                {"api: heap, MB", func(round int) float64 { return 10 + float64(round) }, true},
		"events":                          {"postgres: events", func(round int) float64 { return float64(100 * round) }, false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var samples []soakSample
			for round := range 2*soakWindow + soakBetween {
				samples = append(samples, soakSample{c.what: c.count(round)})
			}
			got := soakGrown(samples[:soakWindow], samples[soakWindow+soakBetween:])
			if (len(got) > 0) != c.grows {
				t.Errorf("grown are %q", got)
			}
		})
	}
}
