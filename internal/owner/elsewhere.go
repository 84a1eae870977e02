package owner

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/vdisk/vdisk/cow"
	"github.com/vdisk/vdisk/internal/storage"
	"github.com/vdisk/vdisk/ublk"
)

// What a killed owner had answered may be in the shared memory of another container (cow.ErrElsewhere). Disks that wait
// need it: their users have seen the answers. As long as there is such a disk the store is opened nowhere else.

// openElsewhere opens a store whose last owner's memory is elsewhere, if nobody needs that.
func openElsewhere(ctx context.Context, dir string, o Options, opts cow.Options, cause error) (*cow.Store, error) {
	need, err := needMemory(ctx, dir, o)
	if err != nil {
		return nil, errors.Join(cause, err)
	}
	if len(need) > 0 {
		return nil, fmt.Errorf("%w: a disk waits there (%s), which 'vdisk detach --force' gives up", cause, strings.Join(need, ", "))
	}
	opts.ForgetElsewhere = true
	return openStore(dir, o, opts)
}

// needMemory lists what waits as a writable disk, as far as it is not known that there is none.
func needMemory(ctx context.Context, dir string, o Options) (need []string, err error) {
	in, err := storage.OpenFolder(dir, o.Foreign)
	if err != nil {
		return nil, err
	}
	defer in.Close()
	r, err := readRecord(in)
	if err != nil {
		return nil, err
	}
	infos, unknown := o.driver.Devices(ctx)
	if errors.Is(unknown, ublk.ErrNoDriver) {
		infos, unknown = nil, nil
	}
	for _, d := range r.Devices {
		there := slices.ContainsFunc(infos, func(i ublk.DeviceInfo) bool { return i.Cookie == uint64(d.Cookie) && i.State != ublk.KernelDead })
		if !d.ReadOnly && !d.Lost && (there || unknown != nil) {
			need = append(need, d.Ref)
		}
	}
	return need, nil
}

// GiveUp is Detach with force of a disk that waits, for a store that Open refuses with cow.ErrElsewhere: it needs only
// the file of devices. What the other disks need stays.
func GiveUp(ctx context.Context, dir, what string, o Options) error {
	o = o.withDefaults()
	ctx, cancel := context.WithTimeout(ctx, stopTimeout)
	defer cancel()
	in, err := storage.OpenFolder(dir, o.Foreign)
	if err != nil {
		return err
	}
	defer in.Close()
	lock, err := cow.LockFolder(in, o.LockTimeout, o.Command)
	if err != nil {
		return err
	}
	defer lock.Close()
	r, err := readRecord(in)
	if err != nil {
		return err
	}
	infos, unknown := o.driver.Devices(ctx)
	if errors.Is(unknown, ublk.ErrNoDriver) {
		unknown = nil
	}
	for n, d := range r.Devices {
		i := slices.IndexFunc(infos, func(i ublk.DeviceInfo) bool { return i.Cookie == uint64(d.Cookie) })
		if what != d.Ref && (i < 0 || what != infos[i].Path()) {
			continue
		}
		switch {
		case d.Dev != 0: // it may be of a store that this is a copy of
		case i < 0 && unknown != nil:
			return ublkError(fmt.Errorf("giving up %s: looking for its device: %w", d.Ref, unknown))
		case i >= 0:
			if err := deleteWaiting(ctx, o.driver, infos[i]); err != nil {
				return ublkError(fmt.Errorf("giving up %s, %s: %w", d.Ref, infos[i].Path(), err))
			}
		}
		r.Devices = slices.Delete(r.Devices, n, n+1)
		return r.write(in)
	}
	return fmt.Errorf("%s is not attached: %w", what, cow.ErrNotFound)
}

// deleteWaiting deletes a device. That it is held by somebody is no failure if the driver does not list it any more.
func deleteWaiting(ctx context.Context, k driver, info ublk.DeviceInfo) error {
	err := k.Delete(ctx, info.ID, true)
	if err == nil || errors.Is(err, ublk.ErrNotFound) {
		return nil
	}
	infos, lerr := k.Devices(ctx)
	if lerr == nil && !slices.ContainsFunc(infos, func(i ublk.DeviceInfo) bool { return i.Cookie == info.Cookie }) {
		return nil
	}
	return err
}
