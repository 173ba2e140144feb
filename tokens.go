package main

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"flag"
	"fmt"
	"regexp"
	"time"
)

// caller is who a token belongs to.
type caller struct {
	UserID int64
	Admin  bool
}

// tokenPrefix makes a leaked token recognisable, to people and to scanners.
const tokenPrefix = "pms_"

// tokenPattern is what a token looks like: the prefix and 256 bits in base64url.
var tokenPattern = regexp.MustCompile(`^` + tokenPrefix + `[A-Za-z0-9_-]{43}$`)

// isToken says whether text may be a token. What does not look like one costs
// neither a hash nor a query.
func isToken(text string) bool { return tokenPattern.MatchString(text) }

// tokenSum is a token's SHA-256. Tokens are stored, looked up and compared in
// this form alone.
type tokenSum [sha256.Size]byte

// tokenKey is the part of a sum by which maps and indexes find what is known of a token.
// How long that takes may tell of it; whether the rest fits is decided by equal.
type tokenKey [8]byte

func (s tokenSum) key() tokenKey { return tokenKey(s[:8]) }

// equal takes the same time whatever it compares.
func (s tokenSum) equal(to []byte) bool { return subtle.ConstantTimeCompare(s[:], to) == 1 }

func sumOf(token string) tokenSum { return sha256.Sum256([]byte(token)) }

// apiToken is what is known of a token. Only its holder knows the token itself.
type apiToken struct {
	caller
	ID        int64
	UserName  string
	CreatedAt time.Time
	LastUsed  *time.Time // nil: never
}

// CreateToken makes an API token of 256 random bits. It is answered here once;
// what is stored is its SHA-256, which suffices for so random a secret.
func (s *store) CreateToken(ctx context.Context, of caller) (string, error) {
	secret := make([]byte, 32)
	rand.Read(secret) // never fails
	token := tokenPrefix + base64.RawURLEncoding.EncodeToString(secret)
	sum := sumOf(token)
	_, err := s.Exec(ctx, `INSERT INTO tokens (sha256, user_id, admin, created_at) VALUES ($1, $2, $3, $4)`,
		sum[:], of.UserID, of.Admin, s.now())
	return token, wrap(err, "create token")
}

// The last use of a token is noted in steps, so that not every look-up writes.
// A database that cannot note it is given little time for it.
const (
	lastUseStep    = time.Minute
	lastUseTimeout = time.Second
)

const selectToken = `
SELECT id, sha256, user_id, admin, last_used_at FROM tokens WHERE substr(sha256, 1, 8) = $1`

// TokenCaller answers whose token this is, or errNotFound, and notes its use.
func (s *store) TokenCaller(ctx context.Context, sum tokenSum) (caller, error) {
	var c caller
	var id int64
	var stored []byte
	var last *time.Time
	key := sum.key()
	err := queryRow(ctx, s, []any{&id, &stored, &c.UserID, &c.Admin, &last}, selectToken, key[:])
	if err == nil && !sum.equal(stored) {
		err = errNotFound
	}
	if err != nil {
		return caller{}, wrap(err, "look up token")
	}
	if now := s.now(); last == nil || last.Before(now.Add(-lastUseStep)) {
		s.noteTokenUse(ctx, id, now)
	}
	return c, nil
}

// noteTokenUse tells nobody when it fails: the token is as good as before, and
// its next look-up tries again.
func (s *store) noteTokenUse(ctx context.Context, id int64, now time.Time) {
	ctx, cancel := context.WithTimeout(ctx, lastUseTimeout)
	defer cancel()
	_, _ = s.Exec(ctx, `UPDATE tokens SET last_used_at = $2 WHERE id = $1 AND (last_used_at IS NULL OR last_used_at < $3)`,
		id, now, now.Add(-lastUseStep))
}

const selectTokens = `
SELECT t.id, t.user_id, u.name, t.admin, t.created_at, t.last_used_at
FROM tokens t JOIN users u ON u.id = t.user_id
ORDER BY t.id`

func scanToken(r rows) (t apiToken, err error) {
	err = r.Scan(&t.ID, &t.UserID, &t.UserName, &t.Admin, &t.CreatedAt, &t.LastUsed)
	return t, err
}

// Tokens answers what is known of every token.
func (s *store) Tokens(ctx context.Context) ([]apiToken, error) {
	tokens, err := query(ctx, s, scanToken, selectTokens)
	return tokens, wrap(err, "list tokens")
}

// RevokeToken deletes a token, or answers errNotFound. Running instances accept
// it until they look again: for tokenTime at most, see there.
func (s *store) RevokeToken(ctx context.Context, id int64) error {
	n, err := s.Exec(ctx, `DELETE FROM tokens WHERE id = $1`, id)
	if err == nil && n == 0 {
		err = errNotFound
	}
	return wrap(err, "revoke token %d", id)
}

func listTokensCommand(p *program, ctx context.Context, flags *flag.FlagSet, args []string) error {
	if _, err := parse(flags, args, 0); err != nil {
		return err
	}
	return p.withExistingStore(ctx, func(db *store) error {
		tokens, err := db.Tokens(ctx)
		if err != nil {
			return err
		}
		table := newTable(p.stdout)
		fmt.Fprintln(table, "ID\tUSER\tNAME\tROLE\tCREATED AT\tLAST USED")
		for _, t := range tokens {
			role, used := "user", "never"
			if t.Admin {
				role = "admin"
			}
			if t.LastUsed != nil {
				used = t.LastUsed.UTC().Format(time.RFC3339)
			}
			fmt.Fprintf(table, "%d\t%d\t%s\t%s\t%s\t%s\n", t.ID, t.UserID, t.UserName, role, t.CreatedAt.UTC().Format(time.RFC3339), used)
		}
		return table.Flush()
	})
}

func revokeTokenCommand(p *program, ctx context.Context, flags *flag.FlagSet, args []string) error {
	return p.forEachID(ctx, flags, args, func(db *store, id int64) error {
		err := db.RevokeToken(ctx, id)
		if err == nil {
			fmt.Fprintf(p.stdout, "token %d is revoked; running instances accept it for %v at most\n", id, tokenTime)
		}
		return err
	})
}
