//go:build !linux

package main

// lowerPriority does nothing where a thread has no priority of its own.
func lowerPriority() {}
