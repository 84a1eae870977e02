package owner

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/vdisk/vdisk/format"
	"github.com/vdisk/vdisk/internal/storage"
	"github.com/vdisk/vdisk/ublk"
)

// MachineDevice is a ublk device of the machine, of whatever program.
type MachineDevice struct {
	ID        int
	Path      string
	Size      int64
	ReadOnly  bool
	State     string // dead, live, quiesced, fail-io
	ServerPID int    // 0: none
	Command   string // of the server
	Name      string // volume or snapshot of the store that was asked about; empty: not of that store
	Abandoned string // why nobody can want it any more; empty: somebody may
}

// MachineDevices lists the ublk devices of the machine, and what the store at dir has on them, if there is one.
func MachineDevices(ctx context.Context, dir string) ([]MachineDevice, error) {
	infos, err := ublk.Devices(ctx)
	if err != nil {
		return nil, ublkError(err)
	}
	recorded, own := storeDevices(ctx, dir)
	list := []MachineDevice{}
	for _, i := range infos {
		d := MachineDevice{ID: i.ID, Path: i.Path(), Size: i.Size, ReadOnly: i.ReadOnly, State: i.State.String(), Name: recorded[cookie(i.Cookie)]}
		if i.ServerPID > 0 && startOf(i.ServerPID) != "" {
			d.ServerPID, d.Command = i.ServerPID, commandOf(i.ServerPID)
		}
		d.Abandoned = abandoned(i, d, own)
		list = append(list, d)
	}
	return list, nil
}

// abandoned says why nobody can want a device any more.
func abandoned(i ublk.DeviceInfo, d MachineDevice, own mark) string {
	switch {
	case d.ServerPID != 0, i.State == ublk.KernelLive:
		return ""
	case i.State == ublk.KernelDead && !opened(fmt.Sprintf("/dev/ublkc%d", i.ID)):
		return "it is dead, and has no server"
	case own != 0 && cookie(i.Cookie).mark() == own && d.Name == "":
		return "it is this store's, which does not know it any more"
	}
	return ""
}

// storeDevices returns what the store has attached by cookie, and the store's mark; both empty without a store that can
// be looked at.
func storeDevices(ctx context.Context, dir string) (map[cookie]string, mark) {
	if refuseWaiting(ctx, dir, Options{}.withDefaults()) != nil {
		return nil, 0
	}
	in, err := storage.OpenFolder(dir, false)
	if err != nil {
		return nil, 0
	}
	defer in.Close()
	b, err := in.Read("format")
	var info format.StoreInfo
	if err != nil || json.Unmarshal(b, &info) != nil {
		return nil, 0
	}
	m, err := markOf(in, info.UUID)
	r, rerr := readRecord(in)
	if errors.Join(err, rerr) != nil {
		return nil, 0
	}
	names := map[cookie]string{}
	for _, d := range r.Devices {
		names[d.Cookie] = d.Ref
	}
	return names, m
}

// commandOf is a process's command line.
func commandOf(pid int) string {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	if err != nil {
		return ""
	}
	return strings.TrimSpace(strings.ReplaceAll(string(b), "\x00", " "))
}

// opened tells whether a process has the file open.
func opened(path string) bool {
	links, _ := filepath.Glob("/proc/[0-9]*/fd/*")
	return slices.ContainsFunc(links, func(l string) bool {
		to, err := os.Readlink(l)
		return err == nil && to == path
	})
}

// pruneDelay is how long a device must be seen dead: one that is being made is that, too, for some milliseconds.
const pruneDelay = time.Second

// Prune deletes the devices of the machine that nobody can want any more, and returns those that it deleted.
func Prune(ctx context.Context, dir string) (deleted []MachineDevice, err error) {
	first, err := MachineDevices(ctx, dir)
	if err != nil || !slices.ContainsFunc(first, func(d MachineDevice) bool { return d.Abandoned != "" }) {
		return nil, err
	}
	select {
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	case <-time.After(pruneDelay):
	}
	second, err := MachineDevices(ctx, dir)
	if err != nil {
		return nil, err
	}
	var errs []error
	for _, d := range second {
		if d.Abandoned == "" || !slices.Contains(first, d) {
			continue
		}
		if err := ublk.Delete(ctx, d.ID, d.State != ublk.KernelDead.String()); err != nil && !errors.Is(err, ublk.ErrNotFound) {
			errs = append(errs, ublkError(fmt.Errorf("deleting %s: %w", d.Path, err)))
			continue
		}
		deleted = append(deleted, d)
	}
	return deleted, errors.Join(errs...)
}
