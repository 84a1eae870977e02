//go:build !race

package cow

const (
	raceEnabled        = false
	defaultCrashStates = 50_500
)
