package owner

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"

	"github.com/vdisk/vdisk/cow"
	"github.com/vdisk/vdisk/ublk"
)

// attached is a block device of this process. watch ends it: it waits for the end of the ublk device, whoever caused
// it, and closes what is behind it.
type attached struct {
	dev    *cow.Device
	block  *ublk.Device
	target *target
	gone   chan struct{} // closed when all is closed and the owner does not list it any more
}

func (a *attached) info() Device {
	return Device{Ref: a.dev.Ref(), Path: a.block.Path(), ReadOnly: a.dev.ReadOnly()}
}

// maxQueues is how many queues a device gets by default where there are as many CPUs; each takes a thread and locked
// memory, and from there on the engine is what limits.
const maxQueues = 4

// Attach makes a block device of a volume or snapshot.
func (o *Owner) Attach(ctx context.Context, a AttachOptions) (Device, error) {
	if err := o.lasting(); err != nil {
		return Device{}, err
	}
	for _, d := range o.devicesOf(a.Ref.Volume) {
		if d.Ref == a.Ref {
			return Device{}, fmt.Errorf("%v is attached already, as %s: %w", a.Ref, d.Path, cow.ErrBusy)
		}
	}
	dev, err := o.store.OpenDevice(a.Ref, a.ReadOnly)
	if err != nil {
		return Device{}, o.inUse(a.Ref.Volume, err)
	}
	if err := o.sweep(ctx); err != nil {
		o.opts.Logger.Warn("devices of an earlier owner", "err", err) // the new one does not depend on them
	}
	t := newTarget(dev)
	block, err := ublk.Create(ctx, blockOptions(dev, a, o.report), t)
	if errors.Is(err, ublk.ErrNoDriver) && loadDriver(ctx) {
		block, err = ublk.Create(ctx, blockOptions(dev, a, o.report), t)
	}
	if err != nil {
		t.close()
		return Device{}, errors.Join(ublkError(fmt.Errorf("attaching %v: %w", a.Ref, err)), dev.Close())
	}
	d := &attached{dev: dev, block: block, target: t, gone: make(chan struct{})}
	o.mu.Lock()
	o.devices = append(o.devices, d)
	o.notifyLocked()
	o.mu.Unlock()
	o.noteDevices()
	o.opts.Logger.Info("attached", "what", a.Ref.String(), "device", block.Path(), "queues", block.Options().Queues,
		"readonly", dev.ReadOnly(), "locked", block.MemoryLocked())
	go o.watch(d)
	return d.info(), nil
}

// blockOptions is how a volume looks as a block device.
func blockOptions(dev *cow.Device, a AttachOptions, report func(error)) ublk.Options {
	if a.Queues == 0 {
		a.Queues = min(maxQueues, runtime.NumCPU())
	}
	writable := !dev.ReadOnly()
	return ublk.Options{
		Size:          dev.Size(),
		Queues:        a.Queues,
		Depth:         a.Depth,
		LogicalBlock:  dev.LogicalBlock(),
		PhysicalBlock: 4096,     // the engine's unit of redirection: smaller writes are merged with what is there
		IOOpt:         64 << 10, // its largest unit of compression
		ReadOnly:      !writable,
		VolatileCache: writable,
		FUA:           writable,
		Discard:       writable,
		Report:        report,
	}
}

// report is told by a device's queues what it survives.
func (o *Owner) report(err error) { o.opts.Logger.Error("a request failed inside", "err", err) }

// watch waits for the end of a device and closes what is behind it.
func (o *Owner) watch(d *attached) {
	defer close(d.gone)
	<-d.block.Done()
	d.target.close()
	log := o.opts.Logger.With("what", d.dev.Ref().String(), "device", d.block.Path())
	if err := d.block.Err(); err != nil {
		log.Error("the device ended", "err", err)
	} else {
		log.Info("detached")
	}
	if err := errors.Join(flushWritten(d.dev), d.dev.Close()); err != nil {
		log.Error("closing the volume", "err", err)
	}
	o.mu.Lock()
	o.devices = slices.DeleteFunc(o.devices, func(x *attached) bool { return x == d })
	o.mu.Unlock()
	o.noteDevices()
	o.notify() // last, so that an owner that ends with it has its books in order
}

// noteDevices is recordDevices where nobody can do anything about an error.
func (o *Owner) noteDevices() {
	if err := o.recordDevices(); err != nil {
		o.opts.Logger.Warn("writing down the devices", "err", err)
	}
}

// flushWritten makes durable what a client wrote and did not flush before it went.
func flushWritten(dev *cow.Device) error {
	if dev.ReadOnly() {
		return nil
	}
	return dev.Flush()
}

// Detach removes a block device that nobody has open.
func (o *Owner) Detach(ctx context.Context, what string) error {
	d, err := o.find(what)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, stopTimeout)
	defer cancel()
	if err := d.block.Stop(ctx); err != nil {
		return ublkError(fmt.Errorf("detaching %v: %w", d.dev.Ref(), err))
	}
	select {
	case <-d.gone:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("detaching %v: %s is gone, but the volume is still closing: %w", d.dev.Ref(), d.block.Path(), ctx.Err())
	}
}

// find returns the device at a path, or of a volume or snapshot.
func (o *Owner) find(what string) (*attached, error) {
	name := what
	if strings.HasPrefix(what, "/") {
		if real, err := filepath.EvalSymlinks(what); err == nil {
			name = real
		}
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	for _, d := range o.devices {
		if d.block.Path() == name || d.dev.Ref().String() == name {
			return d, nil
		}
	}
	return nil, fmt.Errorf("%s is not attached: %w", what, cow.ErrNotFound)
}

// devicesOf lists the devices of a volume and its snapshots.
func (o *Owner) devicesOf(volume string) []Device {
	o.mu.Lock()
	defer o.mu.Unlock()
	list := []Device{}
	for _, d := range o.devices {
		if d.dev.Ref().Volume == volume {
			list = append(list, d.info())
		}
	}
	return list
}

// stopDevices ends all devices, also those in use.
func (o *Owner) stopDevices(ctx context.Context) error {
	o.mu.Lock()
	devices := slices.Clone(o.devices)
	o.mu.Unlock()
	errs := make([]error, len(devices))
	var wg sync.WaitGroup
	for i, d := range devices {
		wg.Go(func() {
			errs[i] = d.block.Close(ctx)
			select {
			case <-d.gone:
			case <-ctx.Done():
			}
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}

// inUse adds to an error about a busy volume who uses it.
func (o *Owner) inUse(volume string, err error) error {
	if !errors.Is(err, cow.ErrBusy) {
		return err
	}
	var users []string
	for _, d := range o.devicesOf(volume) {
		users = append(users, fmt.Sprintf("%v is attached as %s", d.Ref, d.Path))
	}
	users = append(users, o.exports.users(volume)...)
	if len(users) == 0 {
		return err
	}
	return fmt.Errorf("%w (%s)", err, strings.Join(users, ", "))
}

// ublkError gives an error of the driver its meaning for commands.
func ublkError(err error) error {
	for _, m := range []struct{ from, to error }{
		{ublk.ErrNoDriver, ErrUnsupported},
		{ublk.ErrPermission, ErrUnsupported},
		{ublk.ErrKernelTooOld, ErrUnsupported},
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

// kindError is an error that also matches kind, without saying so.
type kindError struct {
	error
	kind error
}

func (e *kindError) Unwrap() []error { return []error{e.error, e.kind} }
