//go:build !race

package cow

const (
	raceEnabled        = false
	defaultCrashStates = 30_000
)
