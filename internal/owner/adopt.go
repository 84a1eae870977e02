package owner

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/vdisk/vdisk/cow"
	"github.com/vdisk/vdisk/ublk"
)

// adopt finds the devices that earlier owners left. It runs after the store was opened and before anyone else can use
// the store. A device that waits for a server keeps its volume open. A lasting owner drops devices that the kernel no
// longer has, and deletes dead ones; a short-lived owner leaves both to the next lasting owner. If the state of a
// device cannot be determined, adopt leaves it as it is.
func (o *Owner) adopt(ctx context.Context) error {
	r, err := readRecord(o.in)
	if err != nil {
		return o.adoptUnread(ctx, err)
	}
	if r.Successor != nil && *r.Successor != thisProcess() && r.Successor.alive() {
		return &cow.LockedError{Dir: o.dir, Holder: fmt.Sprintf("pid %d (which is being upgraded)", r.Successor.PID)}
	}
	if len(r.Devices) > 0 {
		o.sortOut(ctx, r.Devices)
	}
	if _, err := o.in.Lstat(recordName); err != nil {
		return nil // the usual case
	}
	// A loss must be recorded now: the next owner finds no trace of it.
	if !o.opts.lasts() && !o.store.LostAcknowledged() {
		return nil
	}
	if err := o.record(); err != nil {
		o.opts.Logger.Warn("writing down the devices", "err", err)
	}
	return nil
}

// adoptUnread continues if the file of devices cannot be read. That is harmless if the kernel has no device that the
// file could list. Otherwise a lasting owner fails; any other owner can look at the store, and its volumes stay as they
// are.
func (o *Owner) adoptUnread(ctx context.Context, cause error) error {
	infos, err := o.opts.driver.Devices(ctx)
	if errors.Is(err, ublk.ErrNoDriver) {
		err = nil
	}
	var waiting []string
	for _, i := range infos {
		if cookie(i.Cookie).mark() == o.mark && i.State != ublk.KernelDead {
			waiting = append(waiting, i.Path())
		}
	}
	if err == nil && len(waiting) == 0 {
		o.opts.Logger.Warn("the file of devices is not readable; the kernel has none of this store", "err", cause)
		if !o.opts.lasts() {
			return nil
		}
		return o.record()
	}
	o.unread = fmt.Errorf("%w: %w: a device of this store may be waiting (%s): it is given up with 'vdisk devices --prune --force DEVICE'",
		cause, cow.ErrBusy, orElse(strings.Join(waiting, ", "), fmt.Sprint(err)))
	if o.opts.lasts() {
		return o.unread
	}
	o.opts.Logger.Warn("it is not known which volumes are attached", "err", o.unread)
	return nil
}

func orElse(text, other string) string {
	if text == "" {
		return other
	}
	return text
}

// sortOut fills o.disks and o.leftovers from the recorded devices.
func (o *Owner) sortOut(ctx context.Context, recorded []deviceRecord) {
	infos, unknown := o.opts.driver.Devices(ctx)
	if errors.Is(unknown, ublk.ErrNoDriver) {
		infos, unknown = nil, nil // without a driver there are no devices
	}
	for _, rec := range recorded {
		if rec.Cookie.mark() != o.mark {
			continue // a device of the store that this one is a copy of
		}
		i := slices.IndexFunc(infos, func(i ublk.DeviceInfo) bool { return i.Cookie == uint64(rec.Cookie) })
		switch {
		case i < 0 && unknown != nil: // the device may exist
			o.hold(rec, ublk.DeviceInfo{ID: -1}, unknown)
		case i < 0 && o.opts.lasts():
			o.opts.Logger.Info("a device of an earlier owner is gone", "what", rec.Ref)
		case i < 0:
			o.leftovers = append(o.leftovers, rec)
		case rec.Dev != 0 && infos[i].State != ublk.KernelDead && startOf(infos[i].ServerPID) != "":
			o.leftovers = append(o.leftovers, rec) // served by the owner of the store that this is a copy of
		case infos[i].State == ublk.KernelDead && o.opts.lasts() && rec.Dev == 0:
			o.deleteDead(ctx, rec, infos[i])
		case infos[i].State == ublk.KernelDead:
			o.leftovers = append(o.leftovers, rec)
		default:
			o.hold(rec, infos[i], nil)
		}
	}
}

// deleteDead deletes a device whose server died before the device was started, or while it was being stopped.
func (o *Owner) deleteDead(ctx context.Context, rec deviceRecord, info ublk.DeviceInfo) {
	err := o.opts.driver.Delete(ctx, info.ID, false)
	if err == nil || errors.Is(err, ublk.ErrNotFound) {
		o.opts.Logger.Info("deleted what an earlier owner left", "what", rec.Ref, "device", info.Path())
		return
	}
	o.opts.Logger.Warn("deleting what an earlier owner left", "what", rec.Ref, "device", info.Path(), "err", err)
	o.leftovers = append(o.leftovers, rec) // the next owner tries again
}

// hold keeps the volume of a waiting device open.
func (o *Owner) hold(rec deviceRecord, info ublk.DeviceInfo, err error) {
	d := &disk{cookie: rec.Cookie, name: rec.Ref, readOnly: rec.ReadOnly, id: info.ID, elsewhere: rec.Dev}
	d.lost = rec.Lost || o.store.LostAcknowledged() && !rec.ReadOnly
	err = errors.Join(err, d.mayBeAnothers(o.dir))
	d.err = err
	for _, name := range []string{rec.Ref, rec.Renaming} {
		r, perr := cow.ParseRef(name)
		if perr != nil {
			continue
		}
		dev, oerr := o.store.OpenAtOnce(r, rec.ReadOnly) // its clients wait, as do those of all devices after it
		if oerr == nil {
			d.dev, d.name, d.err = dev, name, err
			break
		}
		d.err = errors.Join(err, oerr)
	}
	o.disks = append(o.disks, d)
}
