//go:build !linux

package main

// lowerPriority does nothing where a thread has no priority of its own.
func lowerPriority() {}

// stepBack leaves it to the system when others have their turn.
func stepBack() {}
