package main

import (
	"cmp"
	"context"
	"flag"
	"fmt"
	"runtime/debug"
	"text/tabwriter"

	"github.com/VictoriaMetrics/metrics"
)

// build tells which build of the program runs, as far as the go command noted it
// when it linked: "go run" and "go test" note no revision.
type build struct {
	version  string // of the module: a tag, a pseudo-version, or "(devel)"
	revision string // the commit; "unknown" without version control
	time     string // of the commit, RFC 3339; "unknown" likewise
	modified bool   // files were changed since the commit
	goBuild  string // Go's version, and what it was built for
}

func readBuild() build {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		info = new(debug.BuildInfo)
	}
	return buildOf(info)
}

// buildOf reads what the linker noted.
func buildOf(info *debug.BuildInfo) build {
	settings := make(map[string]string)
	for _, s := range info.Settings {
		settings[s.Key] = s.Value
	}
	return build{
		version:  cmp.Or(info.Main.Version, "unknown"),
		revision: cmp.Or(settings["vcs.revision"], "unknown"),
		time:     cmp.Or(settings["vcs.time"], "unknown"),
		modified: settings["vcs.modified"] == "true",
		goBuild:  fmt.Sprintf("%s %s/%s", info.GoVersion, settings["GOOS"], settings["GOARCH"]),
	}
}

// expose makes the build a metric that is always 1, for its labels.
func (b build) expose() {
	name := fmt.Sprintf(`pms_build_info{version=%q,revision=%q,go=%q}`, b.version, b.revision, b.goBuild)
	metrics.GetOrCreateGauge(name, func() float64 { return 1 })
}

func versionCommand(p *program, ctx context.Context, flags *flag.FlagSet, args []string) error {
	if _, err := parse(flags, args, 0); err != nil {
		return err
	}
	b := readBuild()
	changes := ""
	if b.modified {
		changes = ", with changes"
	}
	table := tabwriter.NewWriter(p.stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintf(table, "pms\t%s\nrevision\t%s%s\ntime\t%s\ngo\t%s\n", b.version, b.revision, changes, b.time, b.goBuild)
	return table.Flush()
}
