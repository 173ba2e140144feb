package main

import (
	"bufio"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// importOptions are what an import command is to do.
type importOptions struct {
	file   string // "-" is the standard input
	format rowFormat
	user   int64 // 0: anybody's
	key    string
	errors string // a file for what was refused; "": the standard output
}

func readImportOptions(flags *flag.FlagSet, args []string) (o importOptions, err error) {
	format := formatFlag(flags)
	flags.Int64Var(&o.user, "user", 0, "refuse the rows of other users")
	flags.StringVar(&o.key, "key", "", "import each row once, however often the command runs within 24 hours")
	flags.StringVar(&o.errors, "errors", "", "the file for what was refused")
	words, err := parse(flags, args, 1)
	switch {
	case err != nil:
		return o, err
	case len(words) == 0:
		return o, usagef("import: a file is needed, or - for the standard input")
	case o.user < 0:
		return o, usagef("import: -user must be above 0")
	case o.key != "" && !isPrintable(o.key, maxKeyLength):
		return o, usagef("import: -key must have at most %d printable ASCII characters", maxKeyLength)
	}
	o.file, o.format = words[0], format(words[0])
	return o, nil
}

// formatFlag is the flag -format. A file's name tells its form where the flag
// does not.
func formatFlag(flags *flag.FlagSet) (of func(file string) rowFormat) {
	var given rowFormat
	flags.Func("format", "ndjson or csv; else as the file's name has it", func(v string) (err error) {
		given, err = readRowFormat(v)
		return err
	})
	return func(file string) rowFormat {
		switch {
		case given != "":
			return given
		case strings.EqualFold(filepath.Ext(file), ".csv"):
			return csvRows
		}
		return ndjsonRows
	}
}

// importCommand leaves the images to the running processes, as deadReplayCommand does.
func importCommand(p *program, ctx context.Context, flags *flag.FlagSet, args []string) error {
	o, err := readImportOptions(flags, args)
	if err != nil {
		return err
	}
	in, size, err := openSource(o.file)
	if err != nil {
		return err
	}
	defer in.Close()
	return p.withStore(ctx, func(db *store) (err error) {
		refused := p.stdout
		if o.errors != "" { // only now, since an earlier import's would be gone for nothing
			file, err := os.Create(o.errors)
			if err != nil {
				return err
			}
			defer func() { err = errors.Join(err, file.Close()) }()
			refused = file
		}
		return p.withInvalidation(ctx, func(invalidate func(id, version int64)) error {
			return p.importFile(ctx, db, o, in, size, refused, invalidate)
		})
	})
}

// openSource opens a file. Its size is 0 where that is not known.
func openSource(name string) (file *os.File, size int64, err error) {
	if name == "-" {
		return os.Stdin, 0, nil
	}
	if file, err = os.Open(name); err != nil {
		return nil, 0, err
	}
	if info, err := file.Stat(); err == nil && info.Mode().IsRegular() {
		size = info.Size()
	}
	return file, size, nil
}

func (p *program) importFile(ctx context.Context, db *store, o importOptions, in io.Reader, size int64, refused io.Writer, invalidate func(id, version int64)) error {
	bar := p.newProgress(size)
	defer bar.end()
	out := bufio.NewWriter(refused)
	im := &importer{
		store:  db,
		rows:   newRowReader(io.TeeReader(in, bar), o.format),
		allow:  o.allow,
		await:  func() {},
		flush:  out.Flush,
		stored: func(id int64) { invalidate(id, 1) },
		from:   commandOrigin(),
		key:    o.key,
	}
	im.write = func(result any) error {
		to := io.Writer(out)
		if row, ok := result.(importResult); !ok {
			to = p.stdout // the summary; all others are flushed by now
		} else if bar.addRow(); row.Error == nil {
			return nil
		}
		_, err := to.Write(encodeJSON(result))
		return err
	}
	if err := im.run(ctx); err != nil {
		return fmt.Errorf("import %s: %w", o.file, err)
	}
	if n := im.summary.refused(); n > 0 {
		return fmt.Errorf("import %s: %d of %d rows were refused", o.file, n, im.summary.Rows)
	}
	return nil
}

// allow is what a token of the user would allow.
func (o importOptions) allow(user int64) error {
	if o.user != 0 && user != o.user {
		return &httpError{http.StatusForbidden, "the row is another user's"}
	}
	return nil
}

func exportCommand(p *program, ctx context.Context, flags *flag.FlagSet, args []string) error {
	format := formatFlag(flags)
	words, err := parse(flags, args, 1)
	if err != nil {
		return err
	}
	name := "-"
	if len(words) > 0 {
		name = words[0]
	}
	return p.withExistingStore(ctx, func(db *store) error {
		if name == "-" {
			return exportProducts(ctx, db, productFilter{}, newRowWriter(p.stdout, format(name)))
		}
		return p.exportFile(ctx, db, name, format(name))
	})
}

// exportFile gives the file its name when it is whole, so that no part is taken
// for it.
func (p *program) exportFile(ctx context.Context, db *store, name string, format rowFormat) error {
	part := name + ".part"
	file, err := os.Create(part)
	if err != nil {
		return err
	}
	defer os.Remove(part) // which is not there any more if all is well
	bar := p.newProgress(0)
	defer bar.end()
	err = exportProducts(ctx, db, productFilter{}, countingWriter{newRowWriter(file, format), bar})
	if err := errors.Join(err, file.Sync(), file.Close()); err != nil {
		return fmt.Errorf("export to %s: %w", name, err)
	}
	return os.Rename(part, name)
}

// progress shows on a terminal how far an import or an export is.
type progress struct {
	out          io.Writer // nil: nobody looks
	size, read   int64     // of the file, in bytes; a size of 0 is not known
	rows         int
	began, shown time.Time
}

// progressInterval is how often it is drawn anew.
const progressInterval = 200 * time.Millisecond

func (p *program) newProgress(size int64) *progress {
	bar := &progress{size: size, began: time.Now()}
	if isTerminal(p.stderr) {
		bar.out = p.stderr
	}
	return bar
}

func (b *progress) addRow() {
	b.rows++
	if b.out != nil && time.Since(b.shown) >= progressInterval {
		b.shown = time.Now()
		b.draw(b.shown)
	}
}

// progressWidth is that of the bar, in characters.
const progressWidth = 30

// draw overwrites the line that it drew before.
func (b *progress) draw(now time.Time) {
	line := fmt.Sprintf("%d rows, %.0f a second", b.rows, float64(b.rows)/max(now.Sub(b.began).Seconds(), 0.001))
	if b.size > 0 {
		share := float64(b.read) / float64(b.size)
		full := min(int(share*progressWidth), progressWidth) // the file may have grown
		line = fmt.Sprintf("[%s%s] %3.0f %%  %s", strings.Repeat("#", full), strings.Repeat(".", progressWidth-full), share*100, line)
	}
	fmt.Fprintf(b.out, "\r%s\x1b[K", line)
}

// end leaves the last state on the screen.
func (b *progress) end() {
	if b.out != nil {
		b.draw(time.Now())
		fmt.Fprintln(b.out)
	}
}

// Write counts what is read of the file.
func (b *progress) Write(data []byte) (int, error) {
	b.read += int64(len(data))
	return len(data), nil
}

// countingWriter shows the progress of an export.
type countingWriter struct {
	rowWriter
	bar *progress
}

func (w countingWriter) write(p Product) error {
	w.bar.addRow()
	return w.rowWriter.write(p)
}
