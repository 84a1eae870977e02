package owner

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/vdisk/vdisk/cow"
	"github.com/vdisk/vdisk/format"
	"github.com/vdisk/vdisk/internal/storage"
	"github.com/vdisk/vdisk/ublk"
)

// MachineDevice is a ublk device of the machine, of any program.
type MachineDevice struct {
	ID        int
	Path      string
	Size      int64
	ReadOnly  bool
	State     string // dead, live, quiesced or fail-io
	ServerPID int    // 0: it has no server
	Command   string // the server's command line
	Name      string // volume or snapshot of the given store; empty: not a device of that store
	Abandoned string // why nobody can need it any more; empty: somebody may
}

// MachineDevices lists the ublk devices of the machine, and names those of the store at dir, if there is one. If it
// cannot list all devices, it returns those that it can, and an error.
func MachineDevices(ctx context.Context, dir string) ([]MachineDevice, error) {
	return machineDevices(ctx, kernel{}, dir)
}

func machineDevices(ctx context.Context, k driver, dir string) ([]MachineDevice, error) {
	infos, err := k.Devices(ctx)
	if err != nil {
		err = ublkError(err)
	}
	recorded := storeDevices(ctx, k, dir)
	list := []MachineDevice{}
	for _, i := range infos {
		d := MachineDevice{ID: i.ID, Path: i.Path(), Size: i.Size, ReadOnly: i.ReadOnly, State: i.State.String(), Name: recorded[cookie(i.Cookie)]}
		if i.ServerPID > 0 && startOf(i.ServerPID) != "" {
			d.ServerPID, d.Command = i.ServerPID, commandOf(i.ServerPID)
		}
		if i.State == ublk.KernelDead {
			if pid, sure := k.Server(i.ID); pid == 0 && sure {
				d.Abandoned = "it is dead, and has no server"
			}
		}
		list = append(list, d)
	}
	return list, err
}

// storeDevices returns the names of the volumes and snapshots that the store has attached, by cookie. It returns
// nothing if the store cannot be read, and leaves out devices that may belong to a store that this one is a copy of.
func storeDevices(ctx context.Context, k driver, dir string) map[cookie]string {
	if refuseWaiting(ctx, dir, Options{driver: k}.withDefaults()) != nil {
		return nil
	}
	in, err := storage.OpenFolder(dir, false)
	if err != nil {
		return nil
	}
	defer in.Close()
	b, err := in.Read("format")
	var info format.StoreInfo
	if err != nil || json.Unmarshal(b, &info) != nil {
		return nil
	}
	own, err := markOf(in, info.UUID)
	r, rerr := readRecord(in)
	if errors.Join(err, rerr) != nil {
		return nil
	}
	names := map[cookie]string{}
	for _, d := range r.Devices {
		if d.Dev == 0 && d.Cookie.mark() == own {
			names[d.Cookie] = d.Ref
		}
	}
	return names
}

// commandOf returns a process's command line.
func commandOf(pid int) string {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	if err != nil {
		return ""
	}
	return strings.TrimSpace(strings.ReplaceAll(string(b), "\x00", " "))
}

// pruneDelay is how long a device must be seen dead before it is deleted: a device that is being made is dead, too, for
// some milliseconds.
const pruneDelay = time.Second

// Prune deletes the devices of the machine that nobody can need any more, and returns the deleted ones. It keeps
// waiting devices, whatever the store's file of devices says: a store and a block-level copy of it have the same mark
// in their devices.
func Prune(ctx context.Context, dir string) (deleted []MachineDevice, err error) {
	return prune(ctx, kernel{}, dir)
}

func prune(ctx context.Context, k driver, dir string) (deleted []MachineDevice, err error) {
	first, err := machineDevices(ctx, k, dir)
	if err != nil || !slices.ContainsFunc(first, func(d MachineDevice) bool { return d.Abandoned != "" }) {
		return nil, err
	}
	select {
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	case <-time.After(pruneDelay):
	}
	second, err := machineDevices(ctx, k, dir)
	if err != nil {
		return nil, err
	}
	var errs []error
	for _, d := range second {
		if d.Abandoned == "" || !slices.Contains(first, d) {
			continue
		}
		if err := k.Delete(ctx, d.ID, false); err != nil && !errors.Is(err, ublk.ErrNotFound) {
			errs = append(errs, ublkError(fmt.Errorf("deleting %s: %w", d.Path, err)))
			continue
		}
		deleted = append(deleted, d)
	}
	return deleted, errors.Join(errs...)
}

// DeleteDevice deletes the device at a path, of any program. With force it deletes a device that waits for its server,
// too. It refuses a device of the store at dir, which is left to Detach; a served device is left to its server.
func DeleteDevice(ctx context.Context, dir, path string, force bool) (MachineDevice, error) {
	return deleteDevice(ctx, kernel{}, dir, path, force)
}

func deleteDevice(ctx context.Context, k driver, dir, path string, force bool) (MachineDevice, error) {
	list, err := machineDevices(ctx, k, dir)
	i := slices.IndexFunc(list, func(d MachineDevice) bool { return d.Path == path })
	if i < 0 {
		return MachineDevice{}, errors.Join(fmt.Errorf("%s is no ublk device: %w", path, cow.ErrNotFound), err)
	}
	d := list[i]
	if d.Name != "" {
		return d, fmt.Errorf("%s is the store's, for %s: %w: 'vdisk detach --force %[2]s' gives it up", path, d.Name, cow.ErrBusy)
	}
	if err := k.Delete(ctx, d.ID, force); err != nil {
		err = ublkError(fmt.Errorf("deleting %s: %w", path, err))
		if !force && d.State != ublk.KernelDead.String() {
			err = fmt.Errorf("%w; --force deletes one that waits, and its users see I/O errors", err)
		}
		return d, err
	}
	d.Abandoned = "as was asked for"
	return d, nil
}
