//go:build race

package nbd

// The race detector makes sync.Pool drop at random.
const allocsAllowed = 20
