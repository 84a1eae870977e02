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

// disk is a block device of the store. This process serves it, or it waits for a server that recovers it: either way
// its volume is open, so that nobody changes that behind the disk's back.
type disk struct {
	cookie   cookie
	name     string // of the volume or snapshot, as recorded
	readOnly bool
	lost     bool // see deviceRecord
	// elsewhere is deviceRecord.Dev. As long as it is not 0 the disk may be one of a store that this is a copy of: it is
	// neither served nor deleted. Guarded by Owner.mu.
	elsewhere uint64
	dev       *cow.Device // nil: the volume is gone, and the disk cannot be served again

	// Guarded by Owner.mu.
	id     int   // -1 until the kernel has given one
	block  block // nil: it waits
	target *target
	end    *ending // of block
	busy   bool    // it is being attached, recovered or given up
	err    error   // why it still waits
}

// ending is the end of one server of a disk.
type ending struct {
	done chan struct{} // closed when the server has ended and all that follows from it is done
	err  error         // what could not be done at the end, above all the last flush; valid once done is closed
}

// wait returns when the end is complete, with its error, or when ctx ends.
func (e *ending) wait(ctx context.Context) error {
	select {
	case <-e.done:
		return e.err
	case <-ctx.Done():
		return fmt.Errorf("the volume is still closing: %w", ctx.Err())
	}
}

// ref is the present name of what the disk shows.
func (d *disk) ref() cow.Ref {
	if d.dev != nil {
		return d.dev.Ref()
	}
	r, _ := cow.ParseRef(d.name) // adopt has parsed it already
	return r
}

func pathOf(id int) string {
	if id < 0 {
		return "a device that the kernel does not tell of"
	}
	return fmt.Sprintf("/dev/ublkb%d", id)
}

// listed reports whether others are told of the disk, which they are not while it is being made. Owner.mu is held.
func (d *disk) listed() bool { return d.id >= 0 || !d.busy }

// info is what others are told. Owner.mu is held.
func (d *disk) info() Device {
	i := Device{Ref: d.ref(), ID: d.id, Path: pathOf(d.id), ReadOnly: d.readOnly, Waits: d.block == nil}
	if d.err != nil && i.Waits && !d.busy { // else it is being tried again
		i.Error = oneLine(d.err)
	}
	return i
}

func oneLine(err error) string { return strings.ReplaceAll(err.Error(), "\n", "; ") }

// waits is the error of whoever wants to use the volume of a disk that waits.
func (d Device) waits() error {
	return fmt.Errorf("%w: %s", cow.ErrBusy, d.waitsText())
}

func (d Device) waitsText() string {
	return fmt.Sprintf("%v waits as %s for its server: run 'vdisk recover', or 'vdisk detach --force %[1]v' to give it up", d.Ref, d.Path)
}

// devicesOf lists the devices of a volume and its snapshots, of all volumes for an empty name.
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

// find returns the disk at a path, or of a volume or snapshot. Owner.mu is held.
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

// claim keeps others from attaching, recovering or giving up a disk until release. Owner.mu is held.
func (d *disk) claim() error {
	if d.busy {
		return fmt.Errorf("%v: another command is at it: %w", d.ref(), cow.ErrBusy)
	}
	d.busy = true
	return nil
}

// release ends a claim; err is why the disk still waits, if it does.
func (o *Owner) release(d *disk, err error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	d.busy, d.err = false, err
	o.notifyLocked()
}

// forget removes a disk that is not in the kernel any more.
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

// record writes down the disks there are.
func (o *Owner) record() error { return o.recordRenaming(cow.Ref{}, cow.Ref{}) }

// recordRenaming is record before from, a volume or snapshot, is renamed to to.
func (o *Owner) recordRenaming(from, to cow.Ref) error {
	o.recording.Lock()
	defer o.recording.Unlock()
	if o.unread != nil {
		return o.unread // or what is in the file would be forgotten
	}
	r := record{Devices: slices.Clone(o.leftovers), Heir: o.heirProcess()}
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

// watch waits for the end of a block device, whoever caused it, and closes what is behind it, or keeps that for the
// next server where the disk stays. What goes wrong is the result of whatever command ended the device; if none did, it
// is the result of the owner's end.
func (o *Owner) watch(d *disk, b block, t *target, end *ending) {
	defer close(end.done)
	since := time.Now()
	<-b.Done()
	t.close()
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
	if err != nil && !o.stopping && time.Since(since) > again {
		o.repairs.Go(func() { _, _ = o.Recover(o.life, d.ref().String()) }) // it logs what comes of it
	}
	o.notifyLocked()
}

// again is how long a disk must have been served for a server that broke to be followed by another at once. One that
// breaks sooner would break again.
const again = 30 * time.Second

// flushWritten makes durable what a client wrote and did not flush before it went.
func flushWritten(dev *cow.Device) error {
	if dev.ReadOnly() {
		return nil
	}
	if err := dev.Flush(); err != nil {
		return fmt.Errorf("what was written to %v and not flushed is not known to be durable: %w", dev.Ref(), err)
	}
	return nil
}

// flushWithin is flushWritten for those who cannot wait for ever. The flush goes on after ctx has ended.
func flushWithin(ctx context.Context, dev *cow.Device) error {
	flushed := make(chan error, 1)
	go func() { flushed <- flushWritten(dev) }() // which ends when the store's disk answers, before its store can close
	select {
	case err := <-flushed:
		return err
	case <-ctx.Done():
		return fmt.Errorf("what was written to %v is still being flushed: %w", dev.Ref(), ctx.Err())
	}
}

// servedDisks lists the disks that this process serves, with their block devices.
func (o *Owner) servedDisks() (disks []*disk, blocks []block) {
	disks, blocks, _ = o.servedUntil()
	return disks, blocks
}

// servedUntil is servedDisks with the block devices' ends.
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

// endServing calls end for each block device, in parallel, and waits until those that it ended are gone. Its error has
// also what could not be made durable.
func (o *Owner) endServing(ctx context.Context, end func(block) error) error {
	disks, blocks, ends := o.servedUntil()
	errs := make([]error, len(disks))
	var wg sync.WaitGroup
	for i, d := range disks {
		wg.Go(func() {
			err := end(blocks[i])
			if err != nil && !errors.Is(err, ublk.ErrNotFlushed) { // which a device says that has ended
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

// closeDisks ends all devices, also those in use, or leaves them to the next owner. Those that wait go on waiting.
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
			return d.waits()
		}
	}
	return nil
}
