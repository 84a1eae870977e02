package main

import "os"

// How a terminal is told to change what follows (ECMA-48, SGR).
const (
	bold  = "\x1b[1m"
	red   = "\x1b[31m"
	plain = "\x1b[0m"
)

// The values of --color.
const (
	colorAuto   = "auto"
	colorAlways = "always"
	colorNever  = "never"
)

// colored reports whether the output has colours: on a terminal, unless NO_COLOR is set (https://no-color.org), or as
// --color says.
func (a *app) colored() bool {
	switch a.color {
	case colorAlways:
		return true
	case colorNever:
		return false
	}
	return os.Getenv("NO_COLOR") == "" && os.Getenv("TERM") != "dumb" && isTerminal(rawOf(a.stdout))
}
