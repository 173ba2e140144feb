package main

import (
	"crypto/sha256"
	"embed"
	"encoding/hex"
	"net/http"
	"path"
	"strconv"
)

//go:embed console
var consoleFiles embed.FS

// console is the web page at / and the files that it is made of: static ones,
// which use the same API as everybody else.
type console map[string]consoleFile

type consoleFile struct {
	contentType []string
	etag        string
	body        []byte
}

// consolePolicy lets the page run and load nothing but its own files, and talk
// to nobody but this program.
//
// Images are the exception, since the stored ones may be on the bucket's origin
// or a CDN's. The sources are on anybody's: the console shows one only when a
// person asks for that comparison, because loading it tells its host who looks at
// the product and when. It then sends no referrer and, being another site's, no
// credentials of ours. A proxy here would hide the person, but would have
// the API fetch whole photographs at every look.
const consolePolicy = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' http: https:; " +
	"base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"

// consoleTypes are the types of the console's files, whatever the machine's MIME
// tables say.
var consoleTypes = map[string]string{
	".html": "text/html; charset=utf-8",
	".css":  "text/css; charset=utf-8",
	".js":   "text/javascript; charset=utf-8",
	".svg":  "image/svg+xml",
}

func newConsole() console {
	c := make(console)
	entries, _ := consoleFiles.ReadDir("console") // never fails: the build put it there
	for _, entry := range entries {
		body, _ := consoleFiles.ReadFile("console/" + entry.Name())
		sum := sha256.Sum256(body)
		c[entry.Name()] = consoleFile{
			contentType: []string{consoleTypes[path.Ext(entry.Name())]},
			etag:        `"` + hex.EncodeToString(sum[:8]) + `"`,
			body:        body,
		}
	}
	return c
}

// page answers with the page itself.
func (c console) page(w http.ResponseWriter, r *http.Request) error {
	header := w.Header()
	header.Set("Content-Security-Policy", consolePolicy)
	header.Set("Referrer-Policy", "no-referrer")
	header.Set("Cross-Origin-Opener-Policy", "same-origin")
	return c.serve(w, r, "index.html")
}

// file answers with one of the files that the page names.
func (c console) file(w http.ResponseWriter, r *http.Request) error {
	return c.serve(w, r, r.PathValue("file"))
}

// serve answers with a file, which a browser asks about each time, so that a
// page never runs with the modules of another version of the program.
func (c console) serve(w http.ResponseWriter, r *http.Request, name string) error {
	file, ok := c[name]
	if !ok {
		return errNotFound
	}
	header := w.Header()
	header.Set("Cache-Control", "no-cache")
	header.Set("Etag", file.etag)
	if r.Header.Get("If-None-Match") == file.etag {
		w.WriteHeader(http.StatusNotModified)
		return nil
	}
	header["Content-Type"] = file.contentType
	header.Set("Content-Length", strconv.Itoa(len(file.body)))
	w.WriteHeader(http.StatusOK)
	w.Write(file.body)
	return nil
}
