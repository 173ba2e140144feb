package main

// Price is an amount in cents.
type Price int64
