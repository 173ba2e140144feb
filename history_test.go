package main

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"
)

// operation is one read or write of a product through one instance, as a client
// saw it.
type operation struct {
	write      bool
	instance   int
	key        int64
	version    int64         // 0 is not found, tombstone a deletion
	body       uint64        // its hash, 0 for none
	misfit     bool          // the body names another product or version
	start, end time.Duration // since the run began
}

// outageSpan is a time in which Redis was away, or known not to be itself.
type outageSpan struct{ from, to time.Duration }

// judgement is what a history shows. All counts but the first two must be 0.
type judgement struct {
	reads, writes int

	ownWrites int // reads of what is older than this instance's own write
	backwards int // reads of what is older than this instance has shown
	undeleted int // reads of a product that this instance had deleted, or shown as deleted
	vanished  int // products that were there, not found though nobody had deleted them
	wrongBody int // bodies of another product or version, or two bodies of one version
	unequal   int // answers that differ from the database after rest; counted by the run

	examples []string
	calm     []time.Duration // how long a change stayed hidden from another instance, sorted
	rough    []time.Duration // the same for changes at the time of an outage
}

// maxExamples bounds how many violations a judgement describes.
const maxExamples = 10

func (v *judgement) violations() int {
	return v.ownWrites + v.backwards + v.undeleted + v.vanished + v.wrongBody + v.unequal
}

func (v *judgement) note(count *int, rule string, op operation, args ...any) {
	*count++
	if len(v.examples) < maxExamples {
		v.examples = append(v.examples, fmt.Sprintf("%s: instance %d, product %d, version %d, %v to %v %v",
			rule, op.instance, op.key, op.version, op.start, op.end, args))
	}
}

func (v *judgement) String() string {
	var out strings.Builder
	fmt.Fprintf(&out, "%d reads, %d writes\n", v.reads, v.writes)
	for _, line := range []struct {
		rule  string
		count int
	}{
		{"read older than the instance's own write", v.ownWrites},
		{"version went backwards on an instance", v.backwards},
		{"deleted product seen again", v.undeleted},
		{"product not found that nobody deleted", v.vanished},
		{"wrong body under a key", v.wrongBody},
		{"cache unequal to the database after rest", v.unequal},
	} {
		fmt.Fprintf(&out, "%6d  %s\n", line.count, line.rule)
	}
	fmt.Fprintf(&out, "lag of another instance, all well:      %s\n", percentiles(v.calm))
	fmt.Fprintf(&out, "lag of another instance, Redis hurt:    %s\n", percentiles(v.rough))
	for _, example := range v.examples {
		fmt.Fprintln(&out, example)
	}
	return out.String()
}

// percentiles describes sorted times.
func percentiles(sorted []time.Duration) string {
	if len(sorted) == 0 {
		return "none"
	}
	at := func(share float64) time.Duration {
		return sorted[int(share*float64(len(sorted)-1))].Round(time.Microsecond)
	}
	return fmt.Sprintf("p50 %v, p99 %v, max %v (%d)", at(.5), at(.99), at(1), len(sorted))
}

// judge checks a history. Two operations that overlap may be seen in either
// order, so a rule binds a read only to what had ended when it began.
func judge(history []operation, outages []outageSpan) *judgement {
	v := &judgement{}
	byKey := make(map[int64][]operation)
	for _, op := range history {
		byKey[op.key] = append(byKey[op.key], op)
		if op.write {
			v.writes++
		} else {
			v.reads++
		}
	}
	for _, key := range slices.Sorted(maps.Keys(byKey)) {
		ops := byKey[key]
		v.judgeBodies(ops)
		byInstance := make(map[int][]operation)
		for _, op := range ops {
			byInstance[op.instance] = append(byInstance[op.instance], op)
		}
		for _, instance := range slices.Sorted(maps.Keys(byInstance)) {
			v.judgeOrder(byInstance[instance], firstDeletion(ops))
		}
		v.measureLag(ops, outages)
	}
	slices.Sort(v.calm)
	slices.Sort(v.rough)
	return v
}

// never is later than any operation.
const never = time.Duration(1<<63 - 1)

// firstDeletion is when the first attempt to delete a product began.
func firstDeletion(ops []operation) time.Duration {
	first := never
	for _, op := range ops {
		if op.write && op.version == tombstone {
			first = min(first, op.start)
		}
	}
	return first
}

func (v *judgement) judgeBodies(ops []operation) {
	bodies := make(map[int64]uint64)
	for _, op := range ops {
		if op.body == 0 {
			continue
		}
		first, known := bodies[op.version]
		if !known {
			bodies[op.version] = op.body
		}
		if op.misfit || known && first != op.body {
			v.note(&v.wrongBody, "wrong body", op)
		}
	}
}

// known is what an instance must not fall behind.
type known struct{ wrote, shown int64 }

// judgeOrder goes through one product's operations on one instance in time.
func (v *judgement) judgeOrder(ops []operation, deletion time.Duration) {
	byStart, byEnd := make([]int, len(ops)), make([]int, len(ops))
	for n := range ops {
		byStart[n], byEnd[n] = n, n
	}
	slices.SortFunc(byStart, func(a, b int) int { return cmp.Compare(ops[a].start, ops[b].start) })
	slices.SortFunc(byEnd, func(a, b int) int { return cmp.Compare(ops[a].end, ops[b].end) })
	var now known
	then := make([]known, len(ops)) // what was known when each began
	for _, ending := range byEnd {
		for len(byStart) > 0 && ops[byStart[0]].start <= ops[ending].end {
			then[byStart[0]] = now
			byStart = byStart[1:]
		}
		op := ops[ending]
		if op.write {
			now.wrote = max(now.wrote, op.version)
			continue
		}
		now.shown = max(now.shown, v.judgeRead(op, then[ending], deletion))
	}
}

// judgeRead judges one read by what was known when it began, and returns the
// version that it has shown.
func (v *judgement) judgeRead(op operation, then known, deletion time.Duration) int64 {
	shown := op.version
	if shown == 0 && max(then.wrote, then.shown) > 0 { // it was there, so it is deleted
		shown = tombstone
		if op.end < deletion {
			v.note(&v.vanished, "vanished", op, then)
			return 0
		}
	}
	switch {
	case shown < tombstone && max(then.wrote, then.shown) == tombstone:
		v.note(&v.undeleted, "undeleted", op, then)
	case shown < then.wrote:
		v.note(&v.ownWrites, "own write", op, then)
	case shown < then.shown:
		v.note(&v.backwards, "backwards", op, then)
	}
	return shown
}

// change is when the first client knew of a version, and through which instance.
type change struct {
	version  int64
	at       time.Duration
	instance int
}

// measureLag finds, for each change and each instance that did not make it, the
// last read that began when some client knew of it and did not show it yet.
func (v *judgement) measureLag(ops []operation, outages []outageSpan) {
	changes := changesOf(ops)
	if len(changes) == 0 {
		return
	}
	type pair struct{ change, instance int }
	behind := make(map[pair]time.Duration)
	last := make(map[int]time.Duration) // when an instance's last read began
	for _, op := range ops {
		if op.write {
			continue
		}
		last[op.instance] = max(last[op.instance], op.start)
		for n := firstAfter(changes, op); n < len(changes) && changes[n].at < op.start; n++ {
			behind[pair{n, op.instance}] = max(behind[pair{n, op.instance}], op.start-changes[n].at)
		}
	}
	for n, c := range changes {
		for instance, start := range last {
			if instance == c.instance || start <= c.at {
				continue
			}
			lag := behind[pair{n, instance}]
			if slices.ContainsFunc(outages, func(o outageSpan) bool { return o.from <= c.at+lag && c.at <= o.to }) {
				v.rough = append(v.rough, lag)
			} else {
				v.calm = append(v.calm, lag)
			}
		}
	}
}

// firstAfter is the first of the changes that a read has not shown. Whether not
// found means "not yet" or "deleted" cannot be told from one read: once the
// deletion is known it is taken for the latter.
func firstAfter(changes []change, op operation) int {
	final := changes[len(changes)-1]
	if op.version == 0 && final.version == tombstone && op.end > final.at {
		return len(changes)
	}
	n, _ := slices.BinarySearchFunc(changes, op.version+1, func(c change, version int64) int { return cmp.Compare(c.version, version) })
	return n
}

// changesOf lists the versions of a product that anyone knew of, in order. Who
// knew of a version knew of those before it, so their times are in order too.
func changesOf(ops []operation) []change {
	first := make(map[int64]change)
	for _, op := range ops {
		if op.version == 0 {
			continue
		}
		if c, ok := first[op.version]; !ok || op.end < c.at {
			first[op.version] = change{op.version, op.end, op.instance}
		}
	}
	changes := slices.SortedFunc(maps.Values(first), func(a, b change) int { return cmp.Compare(a.version, b.version) })
	for n := len(changes) - 2; n >= 0; n-- {
		if later := changes[n+1]; later.at < changes[n].at {
			changes[n].at, changes[n].instance = later.at, later.instance
		}
	}
	return changes
}

func TestJudge(t *testing.T) {
	t.Parallel()
	read := func(instance int, version int64, start, end time.Duration) operation {
		return operation{instance: instance, key: 1, version: version, start: start, end: end}
	}
	write := func(instance int, version int64, start, end time.Duration) operation {
		return operation{write: true, instance: instance, key: 1, version: version, start: start, end: end}
	}
	body := func(op operation, hash uint64) operation { op.body = hash; return op }
	misfit := func(op operation) operation { op.misfit, op.body = true, 9; return op }
	tests := map[string]struct {
		history []operation
		want    judgement
	}{
		"nothing":                                  {nil, judgement{}},
		"reads its own write":                      {[]operation{write(0, 2, 1, 2), read(0, 2, 3, 4)}, judgement{}},
		"does not":                                 {[]operation{write(0, 2, 1, 2), read(0, 1, 3, 4)}, judgement{ownWrites: 1}},
		"a read that overlaps the write":           {[]operation{write(0, 2, 1, 3), read(0, 1, 2, 4)}, judgement{}},
		"a read that outlasts it":                  {[]operation{read(0, 1, 0, 9), write(0, 2, 1, 3), read(0, 2, 4, 5)}, judgement{}},
		"another's write may be late":              {[]operation{write(1, 2, 1, 2), read(0, 1, 3, 4)}, judgement{}},
		"goes backwards":                           {[]operation{read(0, 2, 1, 2), read(0, 1, 3, 4)}, judgement{backwards: 1}},
		"two instances differ":                     {[]operation{read(0, 2, 1, 2), read(1, 1, 3, 4)}, judgement{}},
		"overlapping reads in any order":           {[]operation{read(0, 2, 1, 3), read(0, 1, 2, 4)}, judgement{}},
		"deleted and gone":                         {[]operation{write(0, 1, 0, 1), write(0, tombstone, 2, 3), read(0, 0, 4, 5)}, judgement{}},
		"deleted and seen":                         {[]operation{write(0, 1, 0, 1), write(0, tombstone, 2, 3), read(0, 1, 4, 5)}, judgement{undeleted: 1}},
		"not found, then seen, deleted by another": {[]operation{read(0, 1, 0, 1), write(1, tombstone, 2, 9), read(0, 0, 3, 4), read(0, 1, 5, 6)}, judgement{undeleted: 1}},
		"not found before it was made":             {[]operation{read(0, 0, 0, 1), write(1, 1, 2, 3), read(0, 1, 4, 5)}, judgement{}},
		"made here and not found":                  {[]operation{write(0, 1, 0, 1), read(0, 0, 2, 3)}, judgement{vanished: 1}},
		"seen and not found":                       {[]operation{read(0, 1, 0, 1), read(0, 0, 2, 3), write(1, tombstone, 4, 5)}, judgement{vanished: 1}},
		"one body a version":                       {[]operation{body(read(0, 1, 0, 1), 7), body(read(1, 1, 0, 1), 7), body(read(1, 2, 2, 3), 8)}, judgement{}},
		"two bodies of a version":                  {[]operation{body(read(0, 1, 0, 1), 7), body(read(1, 1, 0, 1), 8)}, judgement{wrongBody: 1}},
		"a body that names another":                {[]operation{misfit(read(0, 1, 0, 1))}, judgement{wrongBody: 1}},
	}
	for name, test := range tests {
		got := judge(test.history, nil)
		counts := judgement{ownWrites: got.ownWrites, backwards: got.backwards, undeleted: got.undeleted, vanished: got.vanished, wrongBody: got.wrongBody}
		if fmt.Sprint(counts) != fmt.Sprint(test.want) {
			t.Errorf("%s:\n%s", name, got)
		}
	}
}

func TestJudgeMeasuresLag(t *testing.T) {
	t.Parallel()
	ops := []operation{
		{write: true, instance: 0, key: 1, version: 1, start: 0, end: 10},
		{write: true, instance: 0, key: 1, version: 2, start: 20, end: 30},
		{instance: 1, key: 1, version: 1, start: 25, end: 45}, // began before anyone knew of version 2
		{instance: 1, key: 1, version: 1, start: 40, end: 50}, // 10 behind
		{instance: 1, key: 1, version: 2, start: 60, end: 70},
		{instance: 2, key: 1, version: 2, start: 31, end: 70}, // not behind
		{instance: 0, key: 1, version: 2, start: 80, end: 90}, // made it
	}
	v := judge(ops, []outageSpan{{5, 12}})
	if fmt.Sprint(v.calm, v.rough) != "[0s 10ns] [0s 0s]" {
		t.Errorf("lags %v and, in the outage, %v", v.calm, v.rough)
	}
}
