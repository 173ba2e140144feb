package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"strconv"
	"text/tabwriter"
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

func deadListCommand(p *program, ctx context.Context, flags *flag.FlagSet, args []string) error {
	if _, err := parse(flags, args, 0); err != nil {
		return err
	}
	return p.withStore(ctx, func(db *store) error {
		table := tabwriter.NewWriter(p.stdout, 0, 0, 2, ' ', 0)
		fmt.Fprintln(table, "ID\tPRODUCT\tATTEMPTS\tFAILED AT\tERROR\tSOURCE")
		for after := int64(0); ; {
			letters, err := db.DeadLetters(ctx, after, maxLimit)
			if err != nil || len(letters) == 0 {
				return errors.Join(err, table.Flush())
			}
			for _, d := range letters {
				after = d.ID
				fmt.Fprintf(table, "%d\t%d\t%d\t%s\t%s\t%s\n", d.ID, d.ProductID, d.Attempts,
					d.FailedAt.UTC().Format("2006-01-02T15:04:05Z"), d.ErrorCode, d.Source)
			}
		}
	})
}

func deadShowCommand(p *program, ctx context.Context, flags *flag.FlagSet, args []string) error {
	ids, err := parseIDs(flags, args)
	if err != nil {
		return err
	}
	return p.withStore(ctx, func(db *store) error {
		for _, id := range ids {
			letter, err := db.DeadLetter(ctx, id)
			if err != nil {
				return err
			}
			p.stdout.Write(encodeJSON(letter.json()))
		}
		return nil
	})
}

// deadReplayCommand leaves the rest to the running processes: a dispatcher
// publishes what is due, and caches learn of the new version when their copy
// expires.
func deadReplayCommand(p *program, ctx context.Context, flags *flag.FlagSet, args []string) error {
	all := flags.Bool("all", false, "replay every dead letter")
	words, err := parse(flags, args, -1)
	if err != nil {
		return err
	}
	if *all && len(words) > 0 {
		return usagef("dead replay: either -all or ids")
	}
	return p.withStore(ctx, func(db *store) error {
		return p.withInvalidation(ctx, func(invalidate func(id, version int64)) error {
			if *all {
				n, err := replayAll(ctx, db, invalidate)
				fmt.Fprintf(p.stdout, "replayed %d\n", n)
				return err
			}
			ids, err := wordIDs(flags.Name(), words)
			if err != nil {
				return err
			}
			for _, id := range ids {
				productID, version, err := db.ReplayDead(ctx, id)
				if err != nil {
					return err
				}
				invalidate(productID, version)
				fmt.Fprintf(p.stdout, "replayed %d\n", id)
			}
			return nil
		})
	})
}

func deadDiscardCommand(p *program, ctx context.Context, flags *flag.FlagSet, args []string) error {
	ids, err := parseIDs(flags, args)
	if err != nil {
		return err
	}
	return p.withStore(ctx, func(db *store) error {
		for _, id := range ids {
			if err := db.DiscardDead(ctx, id); err != nil {
				return err
			}
			fmt.Fprintf(p.stdout, "discarded %d\n", id)
		}
		return nil
	})
}

func parseIDs(flags *flag.FlagSet, args []string) ([]int64, error) {
	words, err := parse(flags, args, -1)
	if err != nil {
		return nil, err
	}
	return wordIDs(flags.Name(), words)
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
