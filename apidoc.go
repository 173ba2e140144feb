package main

import (
	_ "embed"
	"net/http"
	"strconv"
)

// apiDocument is the API in the words of OpenAPI 3.1. The tests hold what the
// program answers against it.
//
//go:embed openapi.yaml
var apiDocument []byte

// apiDescription serves the document, under its own type (RFC 9512).
func (s *server) apiDescription(w http.ResponseWriter, r *http.Request) error {
	header := w.Header()
	header.Set("Content-Type", "application/yaml")
	header.Set("Content-Length", strconv.Itoa(len(apiDocument)))
	w.Write(apiDocument)
	return nil
}
