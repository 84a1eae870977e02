//go:build !race

package metadata

const (
	raceEnabled = false
	damages     = 1500
)
