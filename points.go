package main

// proof is what the tests do to the program at its named points. It is nil in
// the program as it is shipped, where nothing can set it: only test files do,
// before run starts. See crash_test.go and control_test.go.
var proof func(name string) bool

// point names a step after which a crash must lose nothing. The tests kill the
// process at each in turn.
func point(name string) {
	if proof != nil {
		proof(name)
	}
}

// leftOut says whether a safeguard is to be left out, so that the tests can show
// that its want is noticed.
func leftOut(safeguard string) bool { return proof != nil && proof("without "+safeguard) }
