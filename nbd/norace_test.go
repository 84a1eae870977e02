//go:build !race

package nbd

const allocsAllowed = 0.1
