//go:build points

package main

import "os"

// With this tag the program does as the tests tell it by environment variables.

// point kills the process, as kill -9 does, if PMS_CRASH_AT names it.
func point(name string) {
	if os.Getenv("PMS_CRASH_AT") != name {
		return
	}
	self, err := os.FindProcess(os.Getpid())
	if err == nil {
		err = self.Kill()
	}
	if err != nil {
		panic(err)
	}
	select {} // the signal is on its way
}

// leftOut says whether PMS_WITHOUT names the safeguard, which is left out then.
func leftOut(safeguard string) bool { return os.Getenv("PMS_WITHOUT") == safeguard }
