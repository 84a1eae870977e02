//go:build !race

package cow

const (
	raceEnabled        = false
	defaultCrashStates = 10_500
)
