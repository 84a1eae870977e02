package main

import "testing"

// TestArgumentOf: the arguments of a command are found between its flags.
func TestArgumentOf(t *testing.T) {
	a := &app{}
	for _, c := range []struct {
		command string
		n       int
		want    string
	}{
		{"clone", 0, "VOL@SNAP"},
		{"clone", 1, "NEW..."},
		{"rename", 2, ""},
		{"export", 0, "VOL[@SNAP]"},
		{"export", 1, "FILE|-"},
		{"snapshot", 3, "VOL@SNAP..."},
		{"ls", 5, "[VOL[@SNAP]...]"},
		{"hold", 0, "TAG"},
		{"hold", 2, "VOL@SNAP..."},
		{"send", 0, "VOL@SNAP"},
		{"serve", 0, "[VOL[@SNAP]...]"},
		{"rename", 0, "VOL"},
		{"rename", 1, "NEW"},
		{"compare", 1, "B"},
		{"gc", 0, ""},
		{"diff", 1, "[VOL2[@B]]"},
		{"flatten", 4, "VOL..."},
	} {
		if got := argumentOf(a.program().Command(c.command).UsageText, c.n); got != c.want {
			t.Errorf("%s, argument %d: %q, want %q", c.command, c.n, got, c.want)
		}
	}
}
