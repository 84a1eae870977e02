//go:build !race

package cow

const (
	raceEnabled        = false
	defaultCrashStates = 20_500
)
