//go:build !points

package main

// point names a step after which a crash must lose nothing, and leftOut a
// safeguard whose absence the auditor must notice. Here they are nothing at all,
// and the compiler leaves them out: no setting and no environment variable makes
// the program as it is shipped stop at a point. points_armed.go is the other
// half.
func point(string) {}

func leftOut(string) bool { return false }
