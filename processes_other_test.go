//go:build !unix

package main

import (
	"errors"
	"syscall"
)

// Without process groups no private server is started: what needs one is
// skipped, unless a TEST_… variable names a server that is there already.

const (
	sigFreeze = syscall.SIGKILL
	sigThaw   = syscall.SIGKILL
)

type credential struct{}

func groupAttr(*credential) *syscall.SysProcAttr { return nil }

func signalPID(int, syscall.Signal) error { return errors.ErrUnsupported }

func unprivileged() (*credential, error) { return nil, errors.ErrUnsupported }

func chownTo(string, *credential) error { return errors.ErrUnsupported }
