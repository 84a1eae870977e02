package ublk

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Device is one block device that this process serves.
type Device struct {
	id       int
	control  *control
	target   target  // for control commands
	kernel   Feature // features that the driver offers
	features Feature // features that the device has
	locked   bool    // the buffers are locked in memory
	joined   bool    // arena.join was called for the device
	charFD   int
	queues   []*queueThread

	refused  int            // queues whose fetches the driver refused; set before started
	started  chan struct{}  // closed when every queue thread has reported whether it started
	over     chan struct{}  // closed, with mu held, when the queues have ended: no further attempt begins, and the disk may go
	mapped   bool           // the descriptors are mapped; valid once started is closed
	ending   sync.WaitGroup // queue threads
	stopping sync.WaitGroup // attempts
	done     chan struct{}
	sizing   chan struct{} // holds a token while the disk's size is changed

	mu       sync.Mutex // guards the fields below
	opts     Options    // with defaults, and as the driver has adjusted them
	state    State
	err      error // why the device ended, nil for Stop, Close and Quiesce
	delErr   error // the error of DEL
	flushErr error // why Close could not make the kernel write dirty data back
	drop     bool  // the disk must not outlive the server: Stop or Close was called, or the start failed
	attempt  *attempt
}

func charPath(id int) string  { return fmt.Sprintf("/dev/ublkc%d", id) }
func blockPath(id int) string { return fmt.Sprintf("/dev/ublkb%d", id) }

// Create makes a block device that h serves. When it returns, the device is live and /dev/ublkbN can be opened.
// Requests may reach h earlier, because the kernel reads the partition table. If ctx ends first, everything is undone.
func Create(ctx context.Context, o Options, h Handler) (*Device, error) {
	o = o.withDefaults()
	if err := o.validate(); err != nil {
		return nil, err
	}
	c, err := openControl()
	if err != nil {
		return nil, err
	}
	return create(ctx, c, o, h)
}

func create(ctx context.Context, c *control, o Options, h Handler) (*Device, error) {
	offered, err := c.offered(ctx)
	if err != nil {
		return nil, err
	}
	info, err := o.info(offered)
	if err != nil {
		return nil, err
	}
	if err := c.add(ctx, info); err != nil {
		return nil, err
	}
	o.Queues, o.Depth, o.MaxIOBytes = int(info.queues), int(info.depth), int(info.maxIOBytes)
	d := newDevice(c, info, offered, o, StateStarting)
	// The driver silently drops features that it does not know.
	if missing := o.required() &^ FeatureUnprivileged &^ d.features; missing != 0 {
		return nil, d.undo(&FeatureError{Missing: missing, Kernel: kernelRelease()})
	}
	if err := d.start(ctx, h); err != nil {
		return nil, d.undo(err)
	}
	return d, nil
}

func newDevice(c *control, info *devInfo, offered Feature, o Options, s State) *Device {
	return &Device{
		id:       int(info.devID),
		opts:     o,
		state:    s,
		control:  c,
		target:   info.target(),
		kernel:   offered,
		features: Feature(info.flags),
		charFD:   -1,
		started:  make(chan struct{}),
		over:     make(chan struct{}),
		done:     make(chan struct{}),
		sizing:   make(chan struct{}, 1),
	}
}

// start makes an added device live. The driver requires this order: char device, parameters, a fetch for every tag, and
// START from a thread that is not a queue's.
func (d *Device) start(ctx context.Context, h Handler) error {
	// An unprivileged user may send no commands before udev has made it the owner of the char device. So open that
	// first.
	if err := d.openChar(ctx); err != nil {
		return err
	}
	if err := d.control.setParams(ctx, d.target, d.opts.params()); err != nil {
		return err
	}
	if err := d.makeQueues(ctx, h); err != nil {
		return err
	}
	if err := d.startQueues(); err != nil {
		return err
	}
	if err := d.control.start(ctx, d.target); err != nil {
		return err
	}
	if err := waitForNode(ctx, blockPath(d.id)); err != nil {
		return err
	}
	return d.goLive()
}

func (d *Device) goLive() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if !d.moveLocked(StateLive) {
		return fmt.Errorf("ublk: device %d ended while it started: %w", d.id, errors.Join(d.err, ErrStopped))
	}
	return nil
}

// nodeTimeout bounds how long device nodes may take to appear, and how long udev may hold the char device.
const nodeTimeout = 10 * time.Second

// openChar opens the char device. Only one process can have it open, and for a moment that may be udev.
func (d *Device) openChar(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, nodeTimeout)
	defer cancel()
	for {
		fd, err := openRetry(charPath(d.id), unix.O_RDWR)
		if err == nil {
			d.charFD = fd
			return nil
		}
		if err != unix.EBUSY && err != unix.ENOENT && err != unix.EACCES {
			return deviceError("open the char device of", d.id, err)
		}
		if sleep(ctx, 2*time.Millisecond) != nil {
			return charOpenError(d.id, err)
		}
	}
}

func charOpenError(id int, err error) error {
	switch err {
	case unix.EBUSY:
		return fmt.Errorf("ublk: open %s: %w: another process serves the device (%w)", charPath(id), ErrBusy, err)
	case unix.EACCES:
		return fmt.Errorf("ublk: open %s: %w (%w; udev has to give an unprivileged device to its owner)",
			charPath(id), ErrPermission, err)
	}
	return fmt.Errorf("ublk: open %s: %w (%w)", charPath(id), ErrNoNode, err)
}

// waitForNode waits until devtmpfs shows the block device. A plain file may have its name: a program makes one if it
// opens a device for writing after the device has gone. Data that is written to such a file is lost.
func waitForNode(ctx context.Context, path string) error {
	ctx, cancel := context.WithTimeout(ctx, nodeTimeout)
	defer cancel()
	for {
		var st unix.Stat_t
		err := unix.Stat(path, &st)
		if err == nil && st.Mode&unix.S_IFMT == unix.S_IFBLK {
			return nil
		}
		if err == nil {
			return fmt.Errorf("ublk: %s is not a block device but a file that some program has made; remove it and try again", path)
		}
		if sleep(ctx, 2*time.Millisecond) != nil {
			return fmt.Errorf("ublk: %s did not appear: %w (is /dev a devtmpfs?)", path, err)
		}
	}
}

func sleep(ctx context.Context, t time.Duration) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(t):
		return nil
	}
}

// fail ends a device that cannot go on. It kills every queue. When the rings and the char device are closed, the driver
// fails the open requests and removes the block device.
func (d *Device) fail(err error) {
	d.mu.Lock()
	if d.err == nil {
		d.err = err
	}
	d.mu.Unlock()
	<-d.started
	for _, t := range d.queues {
		t.kill()
	}
}

// superviseRoutine waits for the end of the queues, for whatever reason, and then releases everything in the driver's
// order: the rings (which the queue threads close, or superviseRoutine for queues that left), the mappings, the char
// device, and the device itself unless it outlives its server.
func (d *Device) superviseRoutine() {
	d.ending.Wait()
	d.mu.Lock()
	close(d.over)
	d.mu.Unlock()
	d.waitResize()
	d.release()       // even if a STOP is under way, because it may be waiting for this
	d.stopping.Wait() // a stop may hold the block device open until here
	end, err := StateQuiesced, error(nil)
	stays := d.outlivesServer()
	d.mu.Lock()
	stays = stays && !d.drop
	d.mu.Unlock()
	if !stays {
		end, err = StateDead, d.remove(context.Background())
	}
	d.mu.Lock()
	if d.err == nil && d.state == StateLive && d.attempt == nil {
		d.err = ErrStopped
	}
	d.delErr = err
	d.moveLocked(end) // every state that has queues has transitions to both ends
	d.mu.Unlock()
	close(d.done)
}

// settleDriver bounds the wait until the driver has noticed that its server is gone. Before Linux 6.15 that may take up
// to 30 seconds (the block layer's timeout) if the server held every tag of a queue; a recovery waits for that.
const settleDriver = 5 * time.Second

// outlivesServer reports whether the disk stays. It waits until the driver sees that there is no server.
func (d *Device) outlivesServer() bool {
	if d.features&FeatureUserRecovery == 0 {
		return false
	}
	ctx, cancel := context.WithTimeout(context.Background(), settleDriver)
	defer cancel()
	for {
		info, err := d.control.getInfo(ctx, d.id)
		switch {
		case errors.Is(err, ErrNotFound):
			return false
		case err != nil:
			return true // the state is not known, and a disk that may have users must not be deleted on a guess
		case KernelState(info.state) != KernelLive:
			return KernelState(info.state) != KernelDead
		}
		if sleep(ctx, 5*time.Millisecond) != nil {
			return true
		}
	}
}

// release gives back everything except the device itself.
func (d *Device) release() {
	for _, t := range d.queues {
		if t.descs != nil {
			_ = unix.Munmap(t.descs)
		}
		gone := t.tid.Load() == 0 || d.features&FeatureUserRecovery == 0 && t.ended == t.depth || t.gone()
		if !gone {
			keepForever(t) // the kernel may still write to it
		}
		// Only now: if the ring of a living thread is closed while requests wait to be handed out, the driver of 6.12
		// loses them, and the device never becomes quiesced.
		if t.behind != nil {
			t.behind.close(false)
		}
		if gone && t.queue != nil && t.transport != nil {
			t.transport.free()
		}
		if t.buf != nil {
			_ = unix.Munmap(t.buf)
		}
		switch {
		case t.queue == nil || t.pool == nil:
		case gone:
			t.pool.drop()
		default:
			t.pool.lender.forget(t.queue)
		}
		if t.queue != nil {
			t.settleWakes()
		}
		if t.efd >= 0 {
			_ = unix.Close(t.efd)
		}
	}
	if d.joined {
		buffers().leave(poolBlock(d.opts.MaxIOBytes))
		d.joined = false
	}
	if d.charFD >= 0 {
		_ = unix.Close(d.charFD)
		d.charFD = -1
	}
}

// remove deletes the device.
func (d *Device) remove(ctx context.Context) error {
	err := d.control.del(ctx, d.target)
	switch {
	case err == nil, errors.Is(err, unix.ENODEV):
		return nil
	case errors.Is(err, errHeld):
		return fmt.Errorf("ublk: device %d is stopped, and goes when its last user closes it (%s): %w",
			d.id, describeUsers(users(d.id)), ErrBusy)
	}
	return deviceError("delete", d.id, err)
}

// undo ends a device that did not start. It returns the cause, joined with errors of undoing.
func (d *Device) undo(cause error) error {
	if !d.hasThreads() {
		d.release()
		return errors.Join(cause, d.remove(context.Background()))
	}
	// STOP gives back the fetches even of a device that is not started.
	ctx, cancel := context.WithTimeout(context.Background(), undoTimeout)
	defer cancel()
	d.mu.Lock()
	d.err, d.drop = cause, true
	d.mu.Unlock()
	if err := d.Close(ctx); err != nil && !errors.Is(err, cause) {
		return errors.Join(cause, err)
	}
	return cause
}

const undoTimeout = 30 * time.Second

// hasThreads reports whether startQueues has run.
func (d *Device) hasThreads() bool {
	select {
	case <-d.started:
		return true
	default:
		return false
	}
}

// isOver reports whether the queues have ended, even if the device has not.
func (d *Device) isOver() bool {
	select {
	case <-d.over:
		return true
	default:
		return false
	}
}

// ID returns the N of /dev/ublkbN.
func (d *Device) ID() int { return d.id }

// Path returns the path of the block device.
func (d *Device) Path() string { return blockPath(d.id) }

// Options returns the options in force: with defaults filled in, and with the number of queues that the driver granted.
func (d *Device) Options() Options {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.opts
}

// Features returns the features that the driver granted the device.
func (d *Device) Features() Feature { return d.features }

// MemoryLocked reports whether the I/O buffers are locked in memory. If they are not (RLIMIT_MEMLOCK), a machine that
// is short of memory may page them out, and writing back to this device then waits for itself.
func (d *Device) MemoryLocked() bool { return d.locked }

// IOFlusher reports whether the queue threads are marked as I/O flushers (PR_SET_IO_FLUSHER), so that the kernel does
// not make them wait for memory to be written back. If they are not (CAP_SYS_RESOURCE is missing), they may wait for
// themselves when the machine is short of memory.
func (d *Device) IOFlusher() bool {
	for _, t := range d.queues {
		if !t.flusher.Load() {
			return false
		}
	}
	return true
}

// State returns the state that the device is in.
func (d *Device) State() State {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.state
}

// Done returns a channel that is closed when the device is dead or quiesced. Then no more requests come, and nothing of
// the device is left in this process.
func (d *Device) Done() <-chan struct{} { return d.done }

// Err returns nil until Done is closed. After that, it returns nil if Stop, Close or Quiesce ended the device,
// ErrStopped if something outside did, and otherwise the error that ended it.
func (d *Device) Err() error {
	select {
	case <-d.done:
	default:
		return nil
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.err
}

// gone reports whether err is the driver's answer to a command for a device that has no disk any more, or that is
// deleted.
func gone(err error) bool { return errors.Is(err, syscall.ENODEV) }
