package owner

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/vdisk/vdisk/cow"
	"github.com/vdisk/vdisk/ublk"
)

// TestAloneInNamespace: only a process that sees all others can know that none of them is in its mount namespace.
func TestAloneInNamespace(t *testing.T) {
	const all, none = "CapEff:\t000001ffffffffff\n", "CapEff:\t0000000000000000\n"
	self := filepath.Join(filepath.Base(mustReadlink(t, "/proc/self")), "ns/mnt")
	for name, c := range map[string]struct {
		status string
		links  map[string]string // "": a file that cannot be read as a link
		alone  bool
		known  bool
	}{
		"alone":                    {all, map[string]string{"1/ns/mnt": "mnt:[1]"}, true, true},
		"another process":          {all, map[string]string{"1/ns/mnt": "mnt:[1]", "9/ns/mnt": "mnt:[2]"}, false, true},
		"one that cannot be seen":  {all, map[string]string{"9/ns/mnt": ""}, false, false},
		"no right to see the rest": {none, map[string]string{"1/ns/mnt": "mnt:[1]"}, false, false},
	} {
		proc := t.TempDir()
		c.links["self/ns/mnt"], c.links[self] = "mnt:[2]", "mnt:[2]"
		for link, to := range c.links {
			path := filepath.Join(proc, link)
			err := os.MkdirAll(filepath.Dir(path), 0o700)
			if to == "" {
				err = errors.Join(err, os.WriteFile(path, nil, 0o600))
			} else {
				err = errors.Join(err, os.Symlink(to, path))
			}
			if err != nil {
				t.Fatal(err)
			}
		}
		if err := os.WriteFile(filepath.Join(proc, "self/status"), []byte(c.status), 0o600); err != nil {
			t.Fatal(err)
		}
		if alone, err := aloneInNamespace(proc); alone != c.alone || (err == nil) != c.known {
			t.Errorf("%s: alone %v, %v", name, alone, err)
		}
	}
}

func mustReadlink(t *testing.T, path string) string {
	t.Helper()
	to, err := os.Readlink(path)
	if err != nil {
		t.Fatal(err)
	}
	return to
}

// TestLongMountLine: a line of mountinfo that is longer than any buffer does not hide the lines after it.
func TestLongMountLine(t *testing.T) {
	mountinfo := "21 1 0:30 / /m rw - overlay overlay rw,lowerdir=" + strings.Repeat("/l:", 50000) + "/l\n" +
		"22 1 259:3 / /mnt/a\\040b rw - ext4 /dev/ublkb0 rw\n"
	if got := mountPoints(map[string]bool{"259:3": true}, mountinfo); len(got) != 1 || got[0] != "/mnt/a b" {
		t.Errorf("%q", got)
	}
}

// TestPartScan: the kernel reads the partition tables of volumes and snapshots as AttachOptions.PartScan selects.
func TestPartScan(t *testing.T) {
	w := newFakeMachine(t)
	o := w.own(true)
	snapshot := cow.Ref{Volume: "v", Snapshot: "s"}
	if err := o.Snapshot(t.Context(), snapshot); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		ref           cow.Ref
		ask           string
		scans, needed bool
	}{
		{cow.Ref{Volume: "v"}, "", true, false},
		{cow.Ref{Volume: "v"}, "no", false, true},
		{snapshot, "", false, false},
		{snapshot, "yes", true, false},
		{snapshot, "no", false, true},
	} {
		d, err := o.Attach(t.Context(), AttachOptions{Ref: c.ref, PartScan: c.ask})
		if err != nil {
			t.Fatal(err)
		}
		got := w.d.devices[d.ID].server.opts
		if got.NoPartitionScan == c.scans || (got.Require == ublk.FeatureNoAutoPartScan) != c.needed {
			t.Errorf("%+v: no scan %v, needs %v", c, got.NoPartitionScan, got.Require)
		}
		if err := o.Detach(t.Context(), c.ref.String(), false); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := o.Attach(t.Context(), AttachOptions{Ref: snapshot, PartScan: "maybe"}); !errors.Is(err, cow.ErrInvalid) {
		t.Error(err)
	}
	w.close(o)
}
