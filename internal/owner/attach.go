package owner

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"strings"

	"github.com/vdisk/vdisk/cow"
	"github.com/vdisk/vdisk/internal/journal"
	"github.com/vdisk/vdisk/ublk"
)

// maxQueues is the default number of queues of a device on machines with at least as many CPUs. Each queue takes a
// thread and locked memory, and with more queues the engine is the bottleneck.
const maxQueues = 4

// defaultDepth is the default number of requests that one queue of a device handles at once.
const defaultDepth = 64

// Attach makes a block device for a volume or snapshot.
func (o *Owner) Attach(ctx context.Context, a AttachOptions) (Device, error) {
	d, err := o.attachNoted(ctx, a)
	if err == nil {
		o.opts.names.wait(ctx, diskName{id: d.ID, store: o.uuid, ref: d.Ref.String()}, d.Path)
	}
	return d, err
}

// attachNoted is Attach, and does not wait for links in /dev/disk.
func (o *Owner) attachNoted(ctx context.Context, a AttachOptions) (Device, error) {
	d, err := o.attach(ctx, a)
	if err == nil {
		o.tellNames(d.Ref.Volume)
	}
	return d, o.did(ctx, journal.Entry{Kind: "attach", Names: []string{a.Ref.String()}, Details: map[string]any{"device": d.Path, "read_only": d.ReadOnly}}, err)
}

func (o *Owner) attach(ctx context.Context, a AttachOptions) (Device, error) {
	if err := cmp.Or(o.ReadOnly(), o.lasting()); err != nil {
		return Device{}, err
	}
	if !slices.Contains([]string{"", "yes", "no"}, a.PartScan) {
		return Device{}, fmt.Errorf("a partition scan %q: %w", a.PartScan, cow.ErrInvalid)
	}
	o.mu.Lock()
	err := o.shown(a.Ref)
	o.mu.Unlock()
	if err != nil {
		return Device{}, err
	}
	if err := o.notOnItself(); err != nil {
		return Device{}, err
	}
	dev, err := o.store.OpenDevice(a.Ref, a.ReadOnly)
	if err != nil {
		return Device{}, o.inUse(a.Ref.Volume, err)
	}
	d := &disk{cookie: o.mark.newCookie(), name: a.Ref.String(), readOnly: dev.ReadOnly(), dev: dev, id: -1, busy: true}
	if err := o.admit(d); err != nil {
		return Device{}, errors.Join(err, dev.Close())
	}
	// The record with the cookie is written before the device is made, so every device is known.
	if err := o.record(); err != nil {
		return Device{}, errors.Join(fmt.Errorf("attaching %v: writing it down: %w", a.Ref, err), o.forget(d))
	}
	o.prepareOnce.Do(o.prepareForReclaim)
	report := o.reporter(d.name)
	opts := blockOptions(dev, a, d.cookie, report)
	t := newTarget(dev, o.exports.meters.of(a.Ref), opts.Queues*opts.Depth, report)
	b, err := o.create(ctx, opts, t)
	if err != nil {
		t.close()
		return Device{}, errors.Join(ublkError(fmt.Errorf("attaching %v: %w", a.Ref, err)), o.forget(d))
	}
	o.opts.Logger.Info("attached", "what", a.Ref.String(), "device", b.Path(), "queues", b.Options().Queues,
		"readonly", dev.ReadOnly(), "locked", b.MemoryLocked())
	return o.serving(d, b, t), nil
}

// admit adds a disk that is about to be made, unless the same volume or snapshot has one. It checks and adds in one
// step, so that of two concurrent attaches only one succeeds.
func (o *Owner) admit(d *disk) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	if err := o.shown(d.ref()); err != nil {
		return err
	}
	o.disks = append(o.disks, d)
	return nil
}

// shown returns an error if a disk shows the volume or snapshot, or is about to: two disks of the same data would not
// know of each other. The caller holds Owner.mu.
func (o *Owner) shown(r cow.Ref) error {
	for _, d := range o.disks {
		switch {
		case d.ref() != r:
		case !d.listed():
			return fmt.Errorf("%v is being attached by another command: %w", r, cow.ErrBusy)
		case d.block == nil:
			return d.info().waitingError()
		default:
			return fmt.Errorf("%v is attached already, as %s: %w", r, pathOf(d.id), cow.ErrBusy)
		}
	}
	return nil
}

// create makes the device, and loads the driver if it is missing. A driver that cannot leave copying to its server
// (before Linux 6.5) needs a buffer for every request in advance.
func (o *Owner) create(ctx context.Context, opts ublk.Options, t *target) (block, error) {
	b, err := o.createAs(ctx, opts, t)
	if errors.Is(err, ublk.ErrNoDriver) && loadDriver(ctx) {
		b, err = o.createAs(ctx, opts, t)
	}
	var missing *ublk.FeatureError
	if errors.As(err, &missing) && missing.Missing&ublk.FeatureUserCopy != 0 {
		opts.Copy = ublk.CopyPlain
		b, err = o.createAs(ctx, opts, t)
	}
	return b, err
}

func (o *Owner) createAs(ctx context.Context, opts ublk.Options, t *target) (block, error) {
	if err := errors.Join(o.hasMemoryFor(opts), o.hasThreadsFor(opts)); err != nil {
		return nil, err
	}
	return o.opts.driver.Create(ctx, opts, t)
}

// serving records that a claimed disk is served from now on, ends the claim, and starts watch.
func (o *Owner) serving(d *disk, b block, t *target) Device {
	end := &ending{done: make(chan struct{})}
	o.mu.Lock()
	d.id, d.block, d.target, d.end, d.busy, d.err = b.ID(), b, t, end, false, nil
	o.notifyLocked()
	info := d.info()
	o.mu.Unlock()
	go o.watchRoutine(d, b, t, end)
	return info
}

// blockOptions returns the options of the block device that shows a volume or snapshot.
func blockOptions(dev *cow.Device, a AttachOptions, c cookie, report func(error)) ublk.Options {
	if a.Queues == 0 {
		a.Queues = min(maxQueues, runtime.NumCPU())
	}
	if a.Depth == 0 {
		a.Depth = defaultDepth
	}
	writable := !dev.ReadOnly()
	var need ublk.Feature
	if a.PartScan == "no" {
		need = ublk.FeatureNoAutoPartScan
	}
	return ublk.Options{
		Size:          dev.Size(),
		Queues:        a.Queues,
		Depth:         a.Depth,
		LogicalBlock:  dev.LogicalBlock(),
		PhysicalBlock: 4096,     // the engine's unit of redirection: smaller writes are merged into it
		IOOpt:         64 << 10, // the engine's largest unit of compression
		ReadOnly:      !writable,
		VolatileCache: writable,
		FUA:           writable,
		Discard:       writable,
		Recovery:      ublk.RecoverReissue,
		Copy:          ublk.CopyUser, // most disks are mostly idle, and take no buffers then
		Cookie:        uint64(c),
		// A snapshot has the same partitions as its volume, with the same names.
		NoPartitionScan: a.PartScan == "no" || a.PartScan == "" && a.Ref.Snapshot != "",
		Require:         need,
		Report:          report,
	}
}

// reporter returns a function that logs the failed requests of a disk. The function takes no lock of the store, because
// a request may fail while one is held.
func (o *Owner) reporter(name string) func(error) {
	return func(err error) {
		log := o.opts.Logger.With("what", name)
		var p *ublk.PanicError
		if errors.As(err, &p) {
			log = log.With("stack", string(p.Stack))
		}
		log.Error("a request failed", "err", err)
	}
}

// Detach removes a block device. Without force it refuses a device that is in use or waits for its server.
func (o *Owner) Detach(ctx context.Context, what string, force bool) error {
	ctx, cancel := context.WithTimeout(ctx, stopTimeout)
	defer cancel()
	if err := o.ReadOnly(); err != nil {
		return err // a read-only owner knows nothing of its devices
	}
	o.mu.Lock()
	d, err := o.find(what)
	if err == nil && d.block == nil && !force {
		err = d.info().waitingError()
	}
	if err == nil {
		err = d.claim()
	}
	if err != nil {
		o.mu.Unlock()
		return err
	}
	b, end := d.block, d.end
	o.mu.Unlock()
	if b == nil {
		err = o.giveUp(ctx, d)
	} else {
		err = o.stop(ctx, d, b, end, force)
	}
	o.release(d, err)
	return o.did(ctx, journal.Entry{Kind: "detach", Names: []string{d.ref().String()}, Details: map[string]any{"device": pathOf(d.id)}}, err)
}

// stop ends a device that is served. If its volume cannot be flushed, the device stays unless force is set: while it
// exists, its users can still save its content.
func (o *Owner) stop(ctx context.Context, d *disk, b block, end *ending, force bool) error {
	how, ref := b.Close, d.ref()
	if !force {
		how = b.Stop
		if err := flushWithin(ctx, d.dev); err != nil {
			return fmt.Errorf("%v stays attached as %s: %w ('vdisk detach --force %[1]v' removes it even so)", ref, b.Path(), err)
		}
	}
	defer o.hurry([]*disk{d})()
	err := how(ctx)
	lost := force && errors.Is(err, ublk.ErrNotFlushed) // the device has ended, but could not be flushed
	if err != nil && !lost && !(force && o.removed(ctx, d)) {
		return ublkError(fmt.Errorf("detaching %v: %w", ref, err))
	}
	if !lost {
		err = nil
	}
	if err := errors.Join(err, end.wait(ctx)); err != nil {
		return fmt.Errorf("%v is detached, %s is gone: %w", ref, b.Path(), err)
	}
	return nil
}

// giveUp deletes a waiting device; the requests of its users fail. It finds the device by its cookie, since its number
// may belong to another device by now. A device that may belong to the store that this one is a copy of is only
// forgotten.
func (o *Owner) giveUp(ctx context.Context, d *disk) error {
	info, err := o.lookFor(ctx, d)
	o.mu.Lock()
	elsewhere := d.elsewhere != 0
	o.mu.Unlock()
	if elsewhere {
		o.opts.Logger.Warn("a device was forgotten, and not deleted, as it may be of a store that this is a copy of; "+
			"'vdisk devices --prune --force DEVICE' deletes it", "what", d.ref().String(), "device", pathOf(d.id))
		return o.forget(d)
	}
	if err == nil {
		if err = o.opts.driver.Delete(ctx, info.ID, true); err != nil && o.removed(ctx, d) {
			err = nil
		}
	}
	if err != nil && !errors.Is(err, ublk.ErrNotFound) {
		return ublkError(fmt.Errorf("giving up %v, %s: %w", d.ref(), pathOf(d.id), err))
	}
	o.opts.Logger.Warn("a device that waited was given up", "what", d.ref().String(), "device", pathOf(d.id))
	return o.forget(d)
}

// removed reports whether the kernel no longer lists the disk. Its number stays taken while anything, such as a mounted
// file system, holds the rest of it; such users only get errors.
func (o *Owner) removed(ctx context.Context, d *disk) bool {
	_, err := o.lookFor(ctx, d)
	return errors.Is(err, ublk.ErrNotFound)
}

// inUse adds the users of a busy volume to err.
func (o *Owner) inUse(volume string, err error) error {
	if !errors.Is(err, cow.ErrBusy) {
		return err
	}
	var users []string
	for _, d := range o.devicesOf(volume) {
		if d.Waits {
			users = append(users, d.waitingText())
		} else {
			users = append(users, fmt.Sprintf("%v is attached as %s", d.Ref, d.Path))
		}
	}
	users = append(users, o.exports.users(volume)...)
	if len(users) == 0 {
		return err
	}
	return fmt.Errorf("%w (%s)", err, strings.Join(users, ", "))
}

// notOnItself refuses to serve a store that lies on one of its own devices: a write would wait for itself.
func (o *Owner) notOnItself() error {
	ids, err := o.opts.driver.BackingDevices(o.dir)
	if err != nil {
		return nil // the devices under the folder cannot be determined, as on network file systems
	}
	for _, d := range o.devicesOf("") {
		if slices.Contains(ids, d.ID) {
			return fmt.Errorf("the store %s lies on %s, which is a disk of its own: %w", o.dir, d.Path, cow.ErrInvalid)
		}
	}
	return nil
}

// ublkError maps an error of the driver to the error that commands know.
func ublkError(err error) error {
	for _, m := range []struct{ from, to error }{
		{ublk.ErrNoDriver, ErrUnsupported},
		{ublk.ErrPermission, ErrUnsupported},
		{ublk.ErrKernelTooOld, ErrUnsupported},
		{ublk.ErrNoNode, ErrUnsupported},
		{ublk.ErrUnlisted, ErrUnsupported},
		{ublk.ErrNoFreeDevice, cow.ErrBusy},
		{ublk.ErrBusy, cow.ErrBusy},
		{ublk.ErrInvalid, cow.ErrInvalid},
		{ublk.ErrNotFound, cow.ErrNotFound},
	} {
		if errors.Is(err, m.from) {
			return &kindError{err, m.to}
		}
	}
	return err
}

// kindError is an error that also matches kind, without mentioning it in its text.
type kindError struct {
	error
	kind error
}

func (e *kindError) Unwrap() []error { return []error{e.error, e.kind} }
