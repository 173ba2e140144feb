package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"net/mail"
	"net/url"
	"strconv"
)

func addUserCommand(p *program, ctx context.Context, flags *flag.FlagSet, args []string) error {
	name := flags.String("name", "", "the user's name")
	email := flags.String("email", "", "the user's email address")
	if _, err := parse(flags, args, 0); err != nil {
		return err
	}
	if *name == "" || *email == "" {
		return usagef("user add: -name and -email are needed")
	}
	if address, err := mail.ParseAddress(*email); err != nil || address.Address != *email {
		return usagef("user add: -email must be an address such as ann@example.com")
	}
	return p.withStore(ctx, func(db *store) error {
		id, err := db.AddUser(ctx, *name, *email)
		if err == nil {
			fmt.Fprintln(p.stdout, id)
		}
		return err
	})
}

func createTokenCommand(p *program, ctx context.Context, flags *flag.FlagSet, args []string) error {
	user := flags.Int64("user", 0, "id of the user whose token it is")
	admin := flags.Bool("admin", false, "the token may do everything")
	if _, err := parse(flags, args, 0); err != nil {
		return err
	}
	if *user <= 0 {
		return usagef("token create: -user is needed")
	}
	return p.withStore(ctx, func(db *store) error {
		token, err := db.CreateToken(ctx, caller{UserID: *user, Admin: *admin})
		if err == nil {
			fmt.Fprintln(p.stdout, token)
		}
		return err
	})
}

// filterReader reads flags that select images, once they are parsed. given says
// whether there were any.
type filterReader func() (f deadFilter, given bool, err error)

// deadFilterFlags are the flags that select dead letters.
func deadFilterFlags(flags *flag.FlagSet) filterReader {
	return filterFlags(flags, map[string]string{
		"code":  "only those with this error code",
		"host":  "only those whose source is on this host",
		"user":  "only those of this user's products",
		"since": "only those that failed at this time (RFC 3339) or later",
	})
}

// filterFlags are flags that select images, with their help. They are read as the
// query parameters of dead letters of the same meaning are.
func filterFlags(flags *flag.FlagSet, help map[string]string) filterReader {
	query := make(url.Values)
	for name, text := range help {
		parameter := name
		if name == "user" {
			parameter = "user_id"
		}
		flags.Func(name, text, func(v string) error { query.Set(parameter, v); return nil })
	}
	return func() (deadFilter, bool, error) {
		f, wrong := readDeadFilter(query)
		if wrong != nil {
			return f, false, usagef("%s: %s %s", flags.Name(), wrong[0].Field, wrong[0].Detail)
		}
		return f, len(query) > 0, nil
	}
}

func deadListCommand(p *program, ctx context.Context, flags *flag.FlagSet, args []string) error {
	readFilter := deadFilterFlags(flags)
	if _, err := parse(flags, args, 0); err != nil {
		return err
	}
	filter, _, err := readFilter()
	if err != nil {
		return err
	}
	return p.withExistingStore(ctx, func(db *store) error { return p.printDeadLetters(ctx, db, filter) })
}

func (p *program) printDeadLetters(ctx context.Context, db *store, filter deadFilter) error {
	table := newTable(p.stdout)
	fmt.Fprintln(table, "ID\tPRODUCT\tATTEMPTS\tFAILED AT\tERROR\tSOURCE")
	for after := int64(0); ; {
		letters, err := db.DeadLetters(ctx, filter, after, maxLimit)
		if err != nil || len(letters) == 0 {
			return errors.Join(err, table.Flush())
		}
		for _, d := range letters {
			after = d.ID
			fmt.Fprintf(table, "%d\t%d\t%d\t%s\t%s\t%s\n", d.ID, d.ProductID, d.Attempts,
				d.FailedAt.UTC().Format("2006-01-02T15:04:05Z"), d.ErrorCode, d.Source)
		}
	}
}

func deadShowCommand(p *program, ctx context.Context, flags *flag.FlagSet, args []string) error {
	return p.forEachID(ctx, flags, args, func(db *store, id int64) error {
		letter, err := db.DeadLetter(ctx, id)
		if err != nil {
			return err
		}
		_, err = p.stdout.Write(encodeJSON(letter.json()))
		return err
	})
}

// batchOptions are what dead replay or reprocess is to do.
type batchOptions struct {
	filter deadFilter
	ids    []int64 // in place of the filter
	rate   int     // a second; 0 is no limit
	dryRun bool
}

// readBatchOptions wants exactly one of ids, -all and a filter, so that nobody
// replays everything by leaving something out.
func readBatchOptions(flags *flag.FlagSet, args []string, readFilter filterReader) (o batchOptions, err error) {
	all := flags.Bool("all", false, "every one")
	flags.IntVar(&o.rate, "rate", 0, "at most so many a second")
	flags.BoolVar(&o.dryRun, "dry-run", false, "only say how many there are")
	words, err := parse(flags, args, -1)
	if err != nil {
		return o, err
	}
	filter, filtered, err := readFilter()
	switch {
	case err != nil:
		return o, err
	case o.rate < 0:
		return o, usagef("%s: -rate must not be negative", flags.Name())
	case len(words) > 0 && (*all || filtered), *all && filtered:
		return o, usagef("%s: either ids, or -all, or a selection", flags.Name())
	case *all || filtered:
		o.filter = filter
		return o, nil
	}
	o.ids, err = wordIDs(flags.Name(), words)
	return o, err
}

// deadReplayCommand leaves the rest to the running processes: their dispatchers
// find what is due, at the latest when they next poll.
func deadReplayCommand(p *program, ctx context.Context, flags *flag.FlagSet, args []string) error {
	o, err := readBatchOptions(flags, args, deadFilterFlags(flags))
	if err != nil {
		return err
	}
	return p.withExistingStore(ctx, func(db *store) error {
		if o.dryRun {
			return p.countReplay(ctx, db, o)
		}
		return p.withInvalidation(ctx, func(invalidate func(id, version int64)) error {
			if o.ids != nil {
				return p.replayIDs(ctx, db, o, invalidate)
			}
			n, err := replay(ctx, db, o.filter, commandOrigin(), o.rate, invalidate)
			fmt.Fprintf(p.stdout, "replayed %d\n", n)
			return err
		})
	})
}

// countReplay says what a replay would do.
func (p *program) countReplay(ctx context.Context, db *store, o batchOptions) error {
	n := len(o.ids)
	for _, id := range o.ids {
		if _, err := db.DeadLetter(ctx, id); err != nil {
			return err
		}
	}
	if o.ids == nil {
		var err error
		if n, err = db.CountDead(ctx, o.filter); err != nil {
			return err
		}
	}
	fmt.Fprintf(p.stdout, "would replay %d\n", n)
	return nil
}

// replayIDs replays one after the other, so that what it printed is done.
func (p *program) replayIDs(ctx context.Context, db *store, o batchOptions, invalidate func(id, version int64)) error {
	from := commandOrigin()
	for n, id := range o.ids {
		if n > 0 {
			if err := pauseFor(ctx, o.rate); err != nil {
				return err
			}
		}
		if _, err := replayOne(ctx, db, id, from, invalidate); err != nil {
			return err
		}
		fmt.Fprintf(p.stdout, "replayed %d\n", id)
	}
	return nil
}

// commandOrigin is that of what a command does: an id as a request has one, by
// which the workers' log lines belong together.
func commandOrigin() origin { return origin{RequestID: newRequestID()} }

// reprocessCommand leaves the rest to the running processes, as deadReplayCommand does.
func reprocessCommand(p *program, ctx context.Context, flags *flag.FlagSet, args []string) error {
	o, err := readBatchOptions(flags, args, filterFlags(flags, map[string]string{
		"host": "only those whose source is on this host",
		"user": "only those of this user's products",
	}))
	if err != nil {
		return err
	}
	f := madeFilter{deadFilter: o.filter, Products: o.ids}
	return p.withExistingStore(ctx, func(db *store) error {
		if err := checkProducts(ctx, db, o.ids); err != nil {
			return err
		}
		if o.dryRun {
			n, err := db.CountMade(ctx, f)
			if err == nil {
				fmt.Fprintf(p.stdout, "would reprocess %d\n", n)
			}
			return err
		}
		return p.withInvalidation(ctx, func(invalidate func(id, version int64)) error {
			n, err := reprocess(ctx, db, f, commandOrigin(), o.rate, invalidate)
			fmt.Fprintf(p.stdout, "reprocessed %d\n", n)
			return err
		})
	})
}

func deadDiscardCommand(p *program, ctx context.Context, flags *flag.FlagSet, args []string) error {
	return p.forEachID(ctx, flags, args, func(db *store, id int64) error {
		err := db.DiscardDead(ctx, id)
		if err == nil {
			fmt.Fprintf(p.stdout, "discarded %d\n", id)
		}
		return err
	})
}

// forEachID does something with each thing that the arguments name by its id, up
// to the first error.
func (p *program) forEachID(ctx context.Context, flags *flag.FlagSet, args []string, do func(db *store, id int64) error) error {
	words, err := parse(flags, args, -1)
	if err != nil {
		return err
	}
	ids, err := wordIDs(flags.Name(), words)
	if err != nil {
		return err
	}
	return p.withExistingStore(ctx, func(db *store) error {
		for _, id := range ids {
			if err := do(db, id); err != nil {
				return err
			}
		}
		return nil
	})
}

func wordIDs(command string, words []string) ([]int64, error) {
	if len(words) == 0 {
		return nil, usagef("%s: an id is needed", command)
	}
	ids := make([]int64, len(words))
	for n, word := range words {
		id, err := strconv.ParseInt(word, 10, 64)
		if err != nil || id <= 0 {
			return nil, usagef("%s: %q is not an id", command, word)
		}
		ids[n] = id
	}
	return ids, nil
}
