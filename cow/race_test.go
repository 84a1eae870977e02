//go:build race

package cow

// The race detector makes everything about ten times slower.
const (
	raceEnabled        = true
	defaultCrashStates = 150
)
