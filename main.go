// Command pms keeps a shop's products: a REST service that answers at once and
// downloads, compresses and stores the products' images in the background.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"text/tabwriter"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second signal ends the program at once
	code := exitCode(run(ctx, os.Args[1:], os.Getenv, os.Stdout, os.Stderr), os.Stderr)
	stop()
	os.Exit(code)
}

// usageError is a mistake in how the program was called.
type usageError struct{ error }

func (e usageError) Unwrap() error { return e.error }

func usagef(format string, args ...any) error { return usageError{fmt.Errorf(format, args...)} }

// exitCode prints the error, if there is one, and answers 2 for a mistake of
// the caller, 1 for any other failure.
func exitCode(err error, stderr io.Writer) int {
	if err == nil {
		return 0
	}
	fmt.Fprintf(stderr, "pms: %v\n", err)
	if _, ok := errors.AsType[usageError](err); ok {
		fmt.Fprintln(stderr, `"pms help" shows the manual.`)
		return 2
	}
	return 1
}

// program is what the commands share.
type program struct {
	config
	stdout, stderr io.Writer
	log            *slog.Logger
}

// command is one word of the command line.
type command struct {
	name string
	args string // as help shows them
	help string
	run  func(p *program, ctx context.Context, flags *flag.FlagSet, args []string) error
}

// commands is the command line's table of contents.
func commands() []command {
	return []command{
		{"serve", "", "API and image pipeline in one process (the default)", serveCommand},
		{"api", "", "the API alone; needs DATABASE_URL and AMQP_URL", serveCommand},
		{"worker", "", "the image pipeline alone; needs DATABASE_URL and AMQP_URL", serveCommand},
		{"user add", "-name NAME -email EMAIL", "adds a user, prints its id", addUserCommand},
		{"token create", "-user ID [-admin]", "creates an API token, prints it once", createTokenCommand},
		{"token list", "", "lists the tokens with their last use", listTokensCommand},
		{"token revoke", "ID...", "takes tokens back, within 5 seconds everywhere (while the database is away, 10 minutes)", revokeTokenCommand},
		{"dead list", "[-code C] [-host H] [-user ID] [-since TIME]", "lists the dead letters, or those selected", deadListCommand},
		{"dead show", "ID", "shows one with the history of its attempts", deadShowCommand},
		{"dead replay", "ID... | -all | -code C -host H -user ID -since TIME  [-rate N] [-dry-run]", "queues dead letters anew: some, all, or those selected; at most N a second", deadReplayCommand},
		{"dead discard", "ID...", "gives dead letters up for good", deadDiscardCommand},
		{"reprocess", "PRODUCT... | -all | -host H -user ID  [-rate N] [-dry-run]", "makes images again after a setting changed: those of some products, all, or those selected; at most N a second", reprocessCommand},
		{"import", "[-format ndjson|csv] [-user ID] [-key KEY] [-errors FILE] FILE|-", "creates a product of each row; prints the result lines of rows that were refused", importCommand},
		{"export", "[-format ndjson|csv] [FILE|-]", "writes all products as an import takes them", exportCommand},
		{"version", "", "tells which build this is", versionCommand},
	}
}

// run is the program: it finds the command, reads the settings and does it.
func run(ctx context.Context, args []string, getenv func(string) string, stdout, stderr io.Writer) error {
	if len(args) == 0 {
		args = []string{"serve"}
	}
	if args[0] == "help" || wantsHelp(args) {
		printManual(stdout)
		return nil
	}
	cmd, rest, err := findCommand(args)
	if err != nil {
		return err
	}
	getenv, err = withDotEnv(getenv)
	if err != nil {
		return usageError{err}
	}
	config, err := loadConfig(getenv, isTerminal(stderr))
	if err != nil {
		return usageError{err}
	}
	logs := newLogBuffer(stderr)
	defer logs.Flush()
	p := &program{config: config, stdout: stdout, stderr: stderr, log: newLogger(config, logs)}
	flags := flag.NewFlagSet(cmd.name, flag.ContinueOnError)
	flags.SetOutput(io.Discard)
	return cmd.run(p, ctx, flags, rest)
}

// findCommand takes the words of a command off the arguments.
func findCommand(args []string) (command, []string, error) {
	for _, cmd := range commands() {
		if words := strings.Fields(cmd.name); slices.Equal(args[:min(len(words), len(args))], words) {
			return cmd, args[len(words):], nil
		}
	}
	return command{}, nil, usagef("unknown command %q", strings.Join(args[:min(2, len(args))], " "))
}

// wantsHelp finds any of the ways in which package flag is asked for help.
func wantsHelp(args []string) bool {
	return slices.ContainsFunc(args, func(arg string) bool {
		return arg == "-h" || arg == "--h" || arg == "-help" || arg == "--help"
	})
}

// parse reads a command's flags and answers the words behind them, of which there
// may be most; a negative number is no bound.
func parse(flags *flag.FlagSet, args []string, most int) ([]string, error) {
	if err := flags.Parse(args); err != nil {
		return nil, usageError{fmt.Errorf("%s: %w", flags.Name(), err)}
	}
	if most >= 0 && flags.NArg() > most {
		return nil, usagef("%s: unexpected argument %q", flags.Name(), flags.Arg(most))
	}
	return flags.Args(), nil
}

func printManual(w io.Writer) {
	fmt.Fprint(w, "pms keeps a shop's products and compresses their images.\n\nCommands:\n")
	table := newTable(w)
	for _, cmd := range commands() {
		fmt.Fprintf(table, "  %s\t%s\n", strings.TrimSpace(cmd.name+" "+cmd.args), cmd.help)
	}
	fmt.Fprint(table, "  help\tthis manual\n")
	table.Flush()
	fmt.Fprint(w, "\nSettings, from the environment or from the file .env:\n")
	table = newTable(w)
	for _, s := range new(config).settings() {
		fmt.Fprintf(table, "  %s\t%s\t%s\n", s.name, s.fallback, s.help)
	}
	table.Flush()
}

// newTable lines up columns that are written with tabs between them.
func newTable(w io.Writer) *tabwriter.Writer { return tabwriter.NewWriter(w, 0, 0, 2, ' ', 0) }

func newLogger(c config, w io.Writer) *slog.Logger {
	options := &slog.HandlerOptions{Level: c.LogLevel}
	if c.LogText {
		return slog.New(slog.NewTextHandler(w, options))
	}
	return slog.New(slog.NewJSONHandler(w, options))
}

func isTerminal(w io.Writer) bool {
	file, ok := w.(*os.File)
	if !ok {
		return false
	}
	info, err := file.Stat()
	return err == nil && info.Mode()&os.ModeCharDevice != 0
}
