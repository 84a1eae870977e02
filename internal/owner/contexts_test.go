package owner

import (
	"context"
	"errors"
	"io/fs"
	"strings"
	"testing"

	"github.com/vdisk/vdisk/cow"
	"github.com/vdisk/vdisk/nbd"
)

// A snapshot is in use as long as a client has selected its dirty bitmap, and what clients select is bounded.
func TestContexts(t *testing.T) {
	w := newFakeMachine(t)
	o := w.own(true)
	x := &catalog{exports: o.exports}
	s := cow.Ref{Volume: "v", Snapshot: "s"}
	if err := o.Snapshot(t.Context(), s); err != nil {
		t.Fatal(err)
	}
	if err := o.Resize(t.Context(), "v", 16<<40, false); err != nil {
		t.Fatal(err)
	}
	client, gone := context.WithCancel(t.Context())
	defer gone()
	e, err := x.ForClient(client, nil).Open("v")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := e.Device.WriteAt([]byte("data"), 0); err != nil {
		t.Fatal(err)
	}
	dev := e.Device.(nbd.ContextOpener)
	var open []nbd.Context
	for {
		c, err := dev.OpenContext(dirtyContext + "s")
		if err != nil {
			if !errors.Is(err, cow.ErrBusy) || len(open) != maxDifferences/(2<<20) {
				t.Errorf("%d dirty bitmaps of 2 MiB each, then: %v", len(open), err)
			}
			break
		}
		open = append(open, c)
	}
	if err := o.Remove(t.Context(), s, false); !errors.Is(err, cow.ErrBusy) || !strings.Contains(err.Error(), "NBD client") {
		t.Errorf("removing a snapshot that is selected: %v", err)
	}
	gone()
	if err := open[0].Status(0, 1<<20, func(int64, int64, uint32) bool { return true }); !errors.Is(err, context.Canceled) {
		t.Errorf("the search for a difference of a client that has gone: %v", err)
	}
	for _, c := range open {
		if err := c.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if err := o.Remove(t.Context(), s, false); err != nil {
		t.Errorf("removing a snapshot that is selected no longer: %v", err)
	}
	for _, name := range []string{dirtyContext + "s", dirtyContext, dirtyContext + "../x", "qemu:other"} {
		if _, err := dev.OpenContext(name); !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, cow.ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if o.exports.differences != 0 {
		t.Errorf("%d bytes of differences stay reserved", o.exports.differences)
	}
	if err := e.Close(); err != nil {
		t.Fatal(err)
	}
}
