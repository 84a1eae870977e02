package owner

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/vdisk/vdisk/cow"
	"github.com/vdisk/vdisk/ublk"
)

// disk is a block device of the store. Either this process serves it, or it waits for a server to recover it. In both
// cases its volume is open, so that nobody changes the volume without the disk's knowledge.
type disk struct {
	cookie   cookie
	name     string // of the volume or snapshot, as recorded
	readOnly bool
	lost     bool // see deviceRecord
	// elsewhere is deviceRecord.Dev. While it is not 0, the disk may belong to a store that this one is a copy of, and
	// is neither served nor deleted. Guarded by Owner.mu.
	elsewhere uint64
	dev       *cow.Device // nil: the volume is gone, and the disk cannot be served again

	// Guarded by Owner.mu.
	id     int   // -1 until the kernel has assigned one
	block  block // nil: the disk waits
	target *target
	end    *ending // the end of block
	busy   bool    // the disk is being attached, recovered or given up
	err    error   // why the disk still waits
}

// ending tracks the end of one server of a disk.
type ending struct {
	done chan struct{} // closed when the server has ended and everything after it is done
	err  error         // what failed at the end, above all the last flush; valid once done is closed
}

// wait waits until the end is complete and returns its error, or returns an error when ctx ends first.
func (e *ending) wait(ctx context.Context) error {
	select {
	case <-e.done:
		return e.err
	case <-ctx.Done():
		return fmt.Errorf("the volume is still closing: %w", ctx.Err())
	}
}

// ref returns the present name of the volume or snapshot that the disk shows.
func (d *disk) ref() cow.Ref {
	if d.dev != nil {
		return d.dev.Ref()
	}
	r, _ := cow.ParseRef(d.name) // adopt has parsed it before
	return r
}

func pathOf(id int) string {
	if id < 0 {
		return "a device whose number is not known"
	}
	return fmt.Sprintf("/dev/ublkb%d", id)
}

// listed reports whether the disk is shown to others. It is not while it is being made. The caller holds Owner.mu.
func (d *disk) listed() bool { return d.id >= 0 || !d.busy }

// info returns the disk's public description. The caller holds Owner.mu.
func (d *disk) info() Device {
	i := Device{Ref: d.ref(), ID: d.id, Path: pathOf(d.id), ReadOnly: d.readOnly, Waits: d.block == nil}
	if d.err != nil && i.Waits && !d.busy { // a busy disk is being tried again
		i.Error = oneLine(d.err)
	}
	return i
}

func oneLine(err error) string { return strings.ReplaceAll(err.Error(), "\n", "; ") }

// waitingError returns the error for an attempt to use the volume of a waiting disk.
func (d Device) waitingError() error {
	return fmt.Errorf("%w: %s", cow.ErrBusy, d.waitingText())
}

func (d Device) waitingText() string {
	return fmt.Sprintf("%v waits as %s for its server: run 'vdisk recover', or 'vdisk detach --force %[1]v' to give it up", d.Ref, d.Path)
}

// devicesOf lists the devices of a volume and its snapshots, or of all volumes if the name is empty.
func (o *Owner) devicesOf(volume string) []Device {
	o.mu.Lock()
	defer o.mu.Unlock()
	list := []Device{}
	for _, d := range o.disks {
		if d.listed() && (volume == "" || d.ref().Volume == volume) {
			list = append(list, d.info())
		}
	}
	return list
}

// find returns the disk at a path, or the disk that shows the named volume or snapshot. The caller holds Owner.mu.
func (o *Owner) find(what string) (*disk, error) {
	name := what
	if strings.HasPrefix(what, "/") {
		if real, err := filepath.EvalSymlinks(what); err == nil {
			name = real
		}
	}
	for _, d := range o.disks {
		if d.listed() && (pathOf(d.id) == name || d.ref().String() == name) {
			return d, nil
		}
	}
	return nil, fmt.Errorf("%s is not attached: %w", what, cow.ErrNotFound)
}

// claim prevents others from attaching, recovering or giving up a disk until release. The caller holds Owner.mu.
func (d *disk) claim() error {
	if d.busy {
		return fmt.Errorf("%v: another command is working on it: %w", d.ref(), cow.ErrBusy)
	}
	d.busy = true
	return nil
}

// release ends a claim. If the disk still waits, err is the reason.
func (o *Owner) release(d *disk, err error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	d.busy, d.err = false, err
	o.notifyLocked()
}

// forget removes a disk that the kernel no longer has, and flushes and closes its volume.
func (o *Owner) forget(d *disk) error {
	o.mu.Lock()
	o.disks = slices.DeleteFunc(o.disks, func(x *disk) bool { return x == d })
	o.notifyLocked()
	o.mu.Unlock()
	err := o.record()
	if d.dev != nil {
		err = errors.Join(err, flushWritten(d.dev), d.dev.Close())
	}
	return err
}

// record writes the present disks to the file of devices.
func (o *Owner) record() error { return o.recordRenaming(cow.Ref{}, cow.Ref{}) }

// recordRenaming is record for the time just before a volume or snapshot is renamed: for each affected disk it records
// the new name, too.
func (o *Owner) recordRenaming(from, to cow.Ref) error {
	o.recording.Lock()
	defer o.recording.Unlock()
	if o.unread != nil {
		return o.unread // writing would lose what the file lists
	}
	r := record{Devices: slices.Clone(o.leftovers), Successor: o.successorProcess()}
	o.mu.Lock()
	for _, d := range o.disks {
		ref := d.ref()
		one := deviceRecord{Cookie: d.cookie, Ref: ref.String(), ReadOnly: d.readOnly, Lost: d.lost, Dev: d.elsewhere}
		switch {
		case from.Volume == "" || from.Volume != ref.Volume:
		case from.Snapshot == "":
			one.Renaming = cow.Ref{Volume: to.Volume, Snapshot: ref.Snapshot}.String()
		case from == ref:
			one.Renaming = to.String()
		}
		r.Devices = append(r.Devices, one)
	}
	o.mu.Unlock()
	return r.write(o.in)
}

// watchRoutine waits for the end of a block device, whatever caused it. It then closes the volume behind the device, or
// keeps the volume open for the next server if the device stays. An error becomes the result of the command that ended
// the device, or of the owner's end if no command did.
func (o *Owner) watchRoutine(d *disk, b block, t *target, end *ending) {
	defer close(end.done)
	since := time.Now()
	<-b.Done()
	t.close()
	o.exports.meters.ended(t, b.Stats())
	quiesced := b.State() == ublk.StateQuiesced
	err := b.Err()
	log := o.opts.Logger.With("what", d.ref().String(), "device", b.Path())
	switch {
	case err != nil && quiesced:
		log.Error("the device has lost its server, and waits", "err", err)
	case err != nil:
		log.Error("the device ended", "err", err)
	case quiesced:
		log.Info("the device waits for its next server")
	default:
		log.Info("detached")
	}
	if quiesced {
		end.err = flushWritten(d.dev)
	} else {
		end.err = o.forget(d)
	}
	if end.err != nil {
		log.Error("closing the volume", "err", end.err)
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	if end.err != nil && !d.busy && !o.stopping {
		o.unheard = errors.Join(o.unheard, fmt.Errorf("%s ended by itself: %w", b.Path(), end.err))
	}
	if !quiesced {
		return
	}
	d.block, d.target, d.err = nil, nil, err
	if err != nil && !o.stopping && time.Since(since) > restartBackoff {
		o.repairs.Go(func() { _, _ = o.Recover(o.life, d.ref().String()) }) // Recover logs the outcome
	}
	o.notifyLocked()
}

// restartBackoff is how long a server must have served a disk for its failure to start another one at once. A server
// that fails sooner would fail again.
const restartBackoff = 30 * time.Second

// flushWritten makes durable what a client wrote and did not flush before it went.
func flushWritten(dev *cow.Device) error {
	if dev.ReadOnly() {
		return nil
	}
	if err := dev.Flush(); err != nil {
		return fmt.Errorf("it is not known whether the unflushed writes to %v are durable: %w", dev.Ref(), err)
	}
	return nil
}

// flushWithin is flushWritten with a time limit. The flush continues after ctx has ended.
func flushWithin(ctx context.Context, dev *cow.Device) error {
	flushed := make(chan error, 1)
	// The flush ends when the disk below the store answers. The store cannot close before that.
	go func() { flushed <- flushWritten(dev) }()
	select {
	case err := <-flushed:
		return err
	case <-ctx.Done():
		return fmt.Errorf("the writes to %v are still being flushed: %w", dev.Ref(), ctx.Err())
	}
}

// servedDisks returns the disks that this process serves, and their block devices.
func (o *Owner) servedDisks() (disks []*disk, blocks []block) {
	disks, blocks, _ = o.servedUntil()
	return disks, blocks
}

// servedUntil is servedDisks, and also returns the block devices' endings.
func (o *Owner) servedUntil() (disks []*disk, blocks []block, ends []*ending) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for _, d := range o.disks {
		if d.block != nil {
			disks, blocks, ends = append(disks, d), append(blocks, d.block), append(ends, d.end)
		}
	}
	return disks, blocks, ends
}

// endServing calls end for all block devices in parallel, and waits until the ones that it ended are gone. Its error
// includes data that could not be made durable.
func (o *Owner) endServing(ctx context.Context, end func(block) error) error {
	disks, blocks, ends := o.servedUntil()
	defer o.hurry(disks)()
	errs := make([]error, len(disks))
	var wg sync.WaitGroup
	for i, d := range disks {
		wg.Go(func() {
			err := end(blocks[i])
			if err != nil && !errors.Is(err, ublk.ErrNotFlushed) { // a device that has ended says so
				errs[i] = ublkError(fmt.Errorf("%v, %s: %w", d.ref(), blocks[i].Path(), err))
				return
			}
			if err := errors.Join(err, ends[i].wait(ctx)); err != nil {
				errs[i] = fmt.Errorf("%s has ended: %w", blocks[i].Path(), err)
			}
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}

// hurry lets the requests of disks begin that wait for their turn. The returned function ends that for the disks that go
// on being served.
func (o *Owner) hurry(disks []*disk) (stay func()) {
	var stays []func()
	o.mu.Lock()
	defer o.mu.Unlock()
	for _, d := range disks {
		if d.target != nil {
			stays = append(stays, d.target.waiting.hurry())
		}
	}
	return func() {
		for _, stay := range stays {
			stay()
		}
	}
}

// closeDisks ends all devices, even those in use, or leaves them to the next owner. Waiting devices keep waiting.
func (o *Owner) closeDisks(ctx context.Context) error {
	end := func(b block) error { return b.Close(ctx) }
	if _, blocks := o.servedDisks(); o.leaving() {
		end = func(b block) error { return b.Quiesce(ctx) }
	} else {
		for _, b := range blocks {
			if err := dropMountCopies(b.ID()); err != nil {
				o.opts.Logger.Warn("mounts of the device in this process's mount namespace hold it", "device", b.Path(), "err", err)
			}
		}
	}
	err := o.endServing(ctx, end)
	o.mu.Lock()
	defer o.mu.Unlock()
	for _, d := range o.disks {
		if d.block == nil && d.dev != nil {
			err = errors.Join(err, d.dev.Close())
		}
	}
	return err
}

// notWaiting refuses a volume whose disk waits.
func (o *Owner) notWaiting(r cow.Ref) error {
	for _, d := range o.devicesOf(r.Volume) {
		if d.Waits && d.Ref == r && r.Snapshot == "" {
			return d.waitingError()
		}
	}
	return nil
}
