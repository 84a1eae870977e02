//go:build !race

package owner

const raceEnabled = false
