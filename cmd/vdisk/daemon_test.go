package main

import (
	"fmt"
	"strings"
	"testing"

	"github.com/vdisk/vdisk/cow"
	"github.com/vdisk/vdisk/internal/owner"
)

// TestRecoveredOnce: devices that the new daemon recovered before it was ready, and those that the command recovered,
// are reported once each.
func TestRecoveredOnce(t *testing.T) {
	var devices []owner.Device
	for i, name := range []string{"a", "b", "c", "d"} {
		devices = append(devices, owner.Device{Ref: cow.Ref{Volume: name}, ID: i, Path: fmt.Sprintf("/dev/ublkb%d", i), Waits: name == "d"})
	}
	outcome := []owner.Recovery{{Device: devices[1]}, {Device: devices[3], Error: &owner.Error{Message: "no"}}}
	for what, want := range map[string]string{"": "b d a c", "c": "b d c", "/dev/ublkb0": "b d a", "b": "b d"} {
		var got []string
		for _, r := range withServed(outcome[:2:2], devices, what) {
			got = append(got, r.Device.Ref.String())
		}
		if strings.Join(got, " ") != want {
			t.Errorf("%q: %v, want %s", what, got, want)
		}
	}
}
