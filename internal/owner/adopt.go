package owner

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/vdisk/vdisk/cow"
	"github.com/vdisk/vdisk/ublk"
)

// adopt finds the devices that earlier owners left, after the store was opened and before anybody else gets at it.
// What is not in the kernel any more is dropped, what is dead is deleted, and what waits keeps its volume open.
func (o *Owner) adopt(ctx context.Context) error {
	r, err := readRecord(o.in)
	if err != nil {
		o.opts.Logger.Warn("devices of earlier owners are not known; 'vdisk devices' lists all of this machine", "err", err)
		return nil
	}
	if r.Heir != nil && *r.Heir != thisProcess() && r.Heir.alive() {
		return &cow.LockedError{Dir: o.dir, Holder: fmt.Sprintf("pid %d (which is being upgraded)", r.Heir.PID)}
	}
	if len(r.Devices) > 0 {
		o.sortOut(ctx, r.Devices)
	}
	if _, err := o.in.Lstat(recordName); err != nil {
		return nil // as it mostly is
	}
	if err := o.record(); err != nil {
		o.opts.Logger.Warn("writing down the devices", "err", err)
	}
	return nil
}

// sortOut fills o.disks and o.leftovers.
func (o *Owner) sortOut(ctx context.Context, recorded []deviceRecord) {
	infos, err := o.opts.driver.Devices(ctx)
	if errors.Is(err, ublk.ErrNoDriver) {
		return // so there is no device
	}
	unknown := err
	for _, rec := range recorded {
		if rec.Cookie.mark() != o.mark {
			continue // of the store that this one is a copy of
		}
		i := slices.IndexFunc(infos, func(i ublk.DeviceInfo) bool { return i.Cookie == uint64(rec.Cookie) })
		switch {
		case i < 0 && unknown != nil: // it may be there
			o.hold(rec, ublk.DeviceInfo{ID: -1}, unknown)
		case i < 0:
			o.opts.Logger.Info("a device of an earlier owner is gone", "what", rec.Ref)
		case infos[i].State == ublk.KernelDead:
			o.deleteDead(ctx, rec, infos[i])
		default:
			o.hold(rec, infos[i], nil)
		}
	}
}

// deleteDead deletes a device whose server died before it was started, or while it was stopped.
func (o *Owner) deleteDead(ctx context.Context, rec deviceRecord, info ublk.DeviceInfo) {
	err := o.opts.driver.Delete(ctx, info.ID, false)
	if err == nil || errors.Is(err, ublk.ErrNotFound) {
		o.opts.Logger.Info("deleted what an earlier owner left", "what", rec.Ref, "device", info.Path())
		return
	}
	o.opts.Logger.Warn("deleting what an earlier owner left", "what", rec.Ref, "device", info.Path(), "err", err)
	o.leftovers = append(o.leftovers, rec) // for the next owner to try
}

// hold keeps the volume of a device that waits.
func (o *Owner) hold(rec deviceRecord, info ublk.DeviceInfo, err error) {
	d := &disk{cookie: rec.Cookie, name: rec.Ref, readOnly: rec.ReadOnly, lost: rec.Lost || o.store.Forgot() && !rec.ReadOnly, id: info.ID, err: err}
	for _, name := range []string{rec.Ref, rec.Renaming} {
		r, perr := cow.ParseRef(name)
		if perr != nil {
			continue
		}
		dev, oerr := o.store.OpenDevice(r, rec.ReadOnly)
		if oerr == nil {
			d.dev, d.name, d.err = dev, name, err
			break
		}
		d.err = errors.Join(err, oerr)
	}
	o.disks = append(o.disks, d)
}
