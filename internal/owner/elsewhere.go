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

// The data that a killed owner had acknowledged may be in the shared memory of another container (cow.ErrElsewhere). A
// waiting disk needs that data, because its users have seen the acknowledgements. While there is such a disk, the store
// may be opened only in that container.

// openElsewhere opens a store whose last owner's memory is elsewhere, if no waiting disk needs that memory. cause is
// the error of the first attempt.
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

// needMemory lists the writable disks that wait, or that may wait because the driver's devices could not all be listed.
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

// GiveUp does what Detach with force does to a waiting disk, for a store that Open refuses with cow.ErrElsewhere. It
// needs only the file of devices. The shared memory stays, because other disks may need it.
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
		case d.Dev != 0: // it may belong to a store that this one is a copy of
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

// deleteWaiting deletes a device. An error is ignored if the driver no longer lists the device: something still holds
// it, but it is deleted.
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
