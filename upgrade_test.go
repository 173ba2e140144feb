package main

import (
	"bytes"
	"context"
	"errors"
	"os/exec"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5"
)

// alter changes a program's database behind its back, as a newer program would.
func alter(t *testing.T, env map[string]string, sql string) {
	t.Helper()
	if url := env["DATABASE_URL"]; url != "" {
		db, err := openPostgres(t.Context(), url)
		if err != nil {
			t.Fatal(err)
		}
		defer db.Close()
		if _, err := db.pool.Exec(t.Context(), sql, pgx.QueryExecModeSimpleProtocol); err != nil {
			t.Fatal(err)
		}
		return
	}
	db, err := openSQLite(env["DATA_DIR"])
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	for statement := range strings.SplitSeq(sql, ";") {
		if _, err := db.writer.ExecContext(t.Context(), statement); err != nil {
			t.Fatal(err)
		}
	}
}

const newerSchema = `ALTER TABLE products ADD COLUMN colour text NOT NULL DEFAULT 'red';
ALTER TABLE images ADD COLUMN alt text NOT NULL DEFAULT '';
UPDATE schema_version SET version = version + 1`

func eachDatabase(t *testing.T, test func(t *testing.T, env map[string]string)) {
	t.Run("embedded", func(t *testing.T) {
		t.Parallel()
		test(t, environment(map[string]string{"DATA_DIR": t.TempDir()}))
	})
	t.Run("servers", func(t *testing.T) {
		t.Parallel()
		test(t, environment(serverEnv(t)))
	})
}

// A program that is older than the schema does not start, nor does a command of
// it touch anything: exit code 1, and a line that says what to do.
func TestOldProgramIsRefusedByANewerSchema(t *testing.T) {
	t.Parallel()
	eachDatabase(t, func(t *testing.T, env map[string]string) {
		first := start(t, env)
		first.post(t)
		if err := first.stop(); err != nil {
			t.Fatal(err)
		}
		alter(t, env, newerSchema)
		for _, args := range [][]string{{"serve"}, {"dead", "list"}, {"user", "add", "-name", "x", "-email", "x@example.com"}} {
			ctx, cancel := context.WithTimeout(t.Context(), settleTime)
			defer cancel()
			cmd := exec.CommandContext(ctx, programPath(t), args...)
			var stderr bytes.Buffer
			cmd.Stderr, cmd.Dir = &stderr, t.TempDir()
			for name, value := range env {
				cmd.Env = append(cmd.Env, name+"="+value)
			}
			err := cmd.Run()
			var exit *exec.ExitError
			lines := strings.Split(strings.TrimSpace(stderr.String()), "\n")
			last := lines[len(lines)-1]
			if !errors.As(err, &exit) || exit.ExitCode() != 1 || !strings.Contains(last, "schema is newer than this program") ||
				!strings.Contains(last, "upgrade the program") || !strings.Contains(last, "(2, this program knows 1)") {
				t.Errorf("%v ended with %v and %q", args, err, last)
			}
		}
	})
}

// While a newer program has extended the schema, the old one that still runs
// beside it does all its work.
func TestOldProgramRunsOnBesideANewerSchema(t *testing.T) {
	t.Parallel()
	eachDatabase(t, func(t *testing.T, env map[string]string) {
		photos := newPhotoServer(t)
		api := start(t, env)
		before := api.settled(t, api.post(t, photos.serve("/a", jpegPhoto(t, 40, 40)), photos.URL+"/missing").ID)
		api.call(t, "GET", "/products?name=trail", nil, &struct{ Items []shown }{})
		alter(t, env, newerSchema)

		p := api.settled(t, api.post(t, photos.serve("/b", jpegPhoto(t, 50, 50))).ID)
		if p.Images[0].Status != "ready" {
			t.Errorf("a new product: %+v", p.Images[0])
		}
		photos.serve("/missing", jpegPhoto(t, 30, 30))
		api.call(t, "POST", "/dead-letters/replay", nil, &replayedJSON{})
		if got := api.settled(t, before.ID); got.Images[1].Status != "ready" {
			t.Errorf("a replayed image: %+v", got.Images[1])
		}
		var list struct{ Items []shown }
		api.call(t, "GET", "/products?name=trail", nil, &list)
		if len(list.Items) != 2 {
			t.Errorf("listed %d products", len(list.Items))
		}
		api.call(t, "PATCH", "/products/1", map[string]any{"product_price": "1.50"}, &p)
		if response := api.call(t, "DELETE", "/products/1", nil, nil); response.StatusCode != 204 {
			t.Errorf("delete: %s", response.Status)
		}
	})
}
