// Command peers is PocketBase as its documentation has it extended with Go, for
// make peers: nothing is added but that SYNCHRONOUS may ask of SQLite what it
// promises by default here, to have each commit on the disk before it is answered.
package main

import (
	"log"
	"os"
	"strings"

	"github.com/pocketbase/dbx"
	"github.com/pocketbase/pocketbase"
	"github.com/pocketbase/pocketbase/core"
)

func main() {
	app := pocketbase.NewWithConfig(pocketbase.Config{DBConnect: connect})
	if err := app.Start(); err != nil {
		log.Fatal(err)
	}
}

// connect is core.DefaultDBConnect, with its own settings but for the one.
func connect(path string) (*dbx.DB, error) {
	mode := os.Getenv("SYNCHRONOUS")
	if mode == "" {
		return core.DefaultDBConnect(path)
	}
	pragmas := []string{"busy_timeout(10000)", "journal_mode(WAL)", "journal_size_limit(200000000)", "synchronous(" + mode + ")",
		"foreign_keys(ON)", "temp_store(MEMORY)", "cache_size(-32000)"}
	return dbx.Open("sqlite", path+"?_pragma="+strings.Join(pragmas, "&_pragma="))
}
