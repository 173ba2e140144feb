//go:build unix

package main

import (
	"os"
	"os/user"
	"strconv"
	"syscall"
)

const (
	sigFreeze = syscall.SIGSTOP
	sigThaw   = syscall.SIGCONT
)

// credential is a user and group that a process runs as.
type credential = syscall.Credential

// groupAttr starts a process as the leader of a group of its own, so that a
// terminal's ctrl-C does not reach it and one signal reaches all of it. With
// owner it runs as that user.
func groupAttr(owner *credential) *syscall.SysProcAttr {
	return &syscall.SysProcAttr{Setpgid: true, Credential: owner}
}

// signalPID sends sig to a process, or to a whole group if pid is negative.
func signalPID(pid int, sig syscall.Signal) error { return syscall.Kill(pid, sig) }

// unprivileged is whom a server runs as that refuses root: nil, meaning
// ourselves, unless we are root.
func unprivileged() (*credential, error) {
	if os.Geteuid() != 0 {
		return nil, nil
	}
	account, err := user.Lookup("postgres")
	if err != nil {
		account, err = user.Lookup("nobody")
	}
	if err != nil {
		return nil, err
	}
	uid, err := strconv.ParseUint(account.Uid, 10, 32)
	if err != nil {
		return nil, err
	}
	gid, err := strconv.ParseUint(account.Gid, 10, 32)
	if err != nil {
		return nil, err
	}
	return &credential{Uid: uint32(uid), Gid: uint32(gid)}, nil
}

// chownTo gives a path to the user whom a server will run as.
func chownTo(path string, owner *credential) error {
	if owner == nil {
		return nil
	}
	return os.Chown(path, int(owner.Uid), int(owner.Gid))
}
