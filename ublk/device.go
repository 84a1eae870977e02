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

// Device is one live block device, served by this process.
type Device struct {
	id       int
	opts     Options // with defaults, and with what the driver made of them
	control  *control
	kernel   Feature // what the driver offers
	features Feature // what the device has
	locked   bool
	charFD   int
	queues   []*queueThread

	started  chan struct{}  // closed when every queue thread has reported whether it started
	ending   sync.WaitGroup // queue threads
	stopping sync.WaitGroup // stop attempts
	done     chan struct{}

	mu      sync.Mutex // guards what follows
	state   State
	err     error // why the device ended, nil for Stop and Close
	delErr  error // what DEL said
	attempt *stopAttempt
}

// State is where a device is in its life; see the package documentation.
type State int

// The states of a device of this process.
const (
	StateStarting State = iota
	StateLive
	StateStopping
	StateDead
	StateRecovering
	StateQuiescing
	StateQuiesced
)

// String names the state.
func (s State) String() string {
	return [...]string{"starting", "live", "stopping", "dead", "recovering", "quiescing", "quiesced"}[s]
}

func charPath(id int) string  { return fmt.Sprintf("/dev/ublkc%d", id) }
func blockPath(id int) string { return fmt.Sprintf("/dev/ublkb%d", id) }

// Create makes a block device that h serves. When it returns, the device is live: /dev/ublkbN can be opened. Requests
// may reach h before that, because the kernel reads the partition table. When ctx ends first, everything is undone.
func Create(ctx context.Context, o Options, h Handler) (*Device, error) {
	o = o.withDefaults()
	if err := o.validate(); err != nil {
		return nil, err
	}
	c, err := openControl()
	if err != nil {
		return nil, err
	}
	offered, err := c.getFeatures(ctx)
	if err != nil {
		return nil, err
	}
	info := o.info()
	if info.flags, err = o.flags(Feature(offered)); err != nil {
		return nil, err
	}
	if err := c.add(ctx, info); err != nil {
		return nil, err
	}
	o.Queues, o.Depth, o.MaxIOBytes = int(info.queues), int(info.depth), int(info.maxIOBytes)
	d := &Device{
		id:       int(info.devID),
		opts:     o,
		control:  c,
		kernel:   Feature(offered),
		features: Feature(info.flags),
		charFD:   -1,
		started:  make(chan struct{}),
		done:     make(chan struct{}),
	}
	if missing := o.required() &^ d.features; missing != 0 { // the driver drops what it does not know without a word
		return nil, d.undo(&FeatureError{Missing: missing, Kernel: kernelRelease()})
	}
	if err := d.start(ctx, h); err != nil {
		return nil, d.undo(err)
	}
	return d, nil
}

// start takes an added device to live. The order is the driver's: parameters, char device, a fetch for every tag, and
// START from another thread than the queues'.
func (d *Device) start(ctx context.Context, h Handler) error {
	if err := d.control.setParams(ctx, d.id, d.opts.params()); err != nil {
		return err
	}
	if err := d.openChar(ctx); err != nil {
		return err
	}
	if err := d.makeQueues(h); err != nil {
		return err
	}
	if err := d.startQueues(); err != nil {
		return err
	}
	if err := d.control.start(ctx, d.id); err != nil {
		return err
	}
	if err := waitForNode(ctx, blockPath(d.id)); err != nil {
		return err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.state != StateStarting {
		return fmt.Errorf("ublk: device %d ended while it started: %w", d.id, errors.Join(d.err, ErrStopped))
	}
	d.state = StateLive
	return nil
}

// nodeTimeout is how long device nodes may take to appear, and the char device to be left alone by udev.
const nodeTimeout = 10 * time.Second

// openChar opens the char device. It has one opener, and udev may be that for a moment.
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
			return fmt.Errorf("ublk: open %s: %w (is /dev a devtmpfs?)", charPath(d.id), err)
		}
	}
}

// waitForNode waits until devtmpfs shows the block device. A plain file of that name, which a program has made that was
// late to open a device that went, stays in the way of devtmpfs: what is written to it goes nowhere.
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
			return fmt.Errorf("ublk: %s is not a block device but a file that somebody has made; remove it and try again", path)
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

// fail ends a device that cannot go on: it kills every queue, and the closing of the rings and of the char device makes
// the driver fail what is open and remove the block device.
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

// superviseRoutine waits for the end of the queues, whoever caused it, and releases everything in the driver's order:
// rings (by the queue threads), mappings, char device, device.
func (d *Device) superviseRoutine() {
	d.ending.Wait()
	d.release()
	d.stopping.Wait() // a stop holds the block device open until here
	err := d.remove(context.Background())
	d.mu.Lock()
	if d.err == nil && d.state == StateLive && d.attempt == nil {
		d.err = ErrStopped
	}
	d.state, d.delErr = StateDead, err
	d.mu.Unlock()
	close(d.done)
}

// release gives back all but the device itself.
func (d *Device) release() {
	for _, t := range d.queues {
		if t.descs != nil {
			_ = unix.Munmap(t.descs)
		}
		if t.buf != nil && (t.queue == nil || t.owned == 0 && t.reading == 0) {
			_ = unix.Munmap(t.buf)
		}
		if t.queue != nil {
			t.settleWakes()
		}
		if t.efd >= 0 {
			_ = unix.Close(t.efd)
		}
	}
	if d.charFD >= 0 {
		_ = unix.Close(d.charFD)
		d.charFD = -1
	}
}

// deleteTimeout bounds the wait for those who hold the device open. The driver then deletes it when they are gone.
const deleteTimeout = 5 * time.Second

// remove deletes the device.
func (d *Device) remove(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, deleteTimeout)
	defer cancel()
	err := d.control.del(ctx, d.id)
	switch {
	case err == nil, errors.Is(err, unix.ENODEV):
		return nil
	case ctx.Err() != nil:
		return fmt.Errorf("ublk: device %d is stopped, and goes when its last user closes it (%s): %w",
			d.id, describeUsers(users(d.id)), ErrBusy)
	}
	return deviceError("delete", d.id, err)
}

// undo ends a device that did not start, and returns why, with what went wrong in undoing it.
func (d *Device) undo(cause error) error {
	if !d.hasThreads() {
		d.release()
		return errors.Join(cause, d.remove(context.Background()))
	}
	// STOP gives back the fetches of a device that is not started, too.
	ctx, cancel := context.WithTimeout(context.Background(), undoTimeout)
	defer cancel()
	d.mu.Lock()
	d.err = cause
	d.mu.Unlock()
	if err := d.Close(ctx); err != nil && !errors.Is(err, cause) {
		return errors.Join(cause, err)
	}
	return cause
}

const undoTimeout = 30 * time.Second

// hasThreads tells whether startQueues got to run.
func (d *Device) hasThreads() bool {
	select {
	case <-d.started:
		return true
	default:
		return false
	}
}

// ID is the N of /dev/ublkbN.
func (d *Device) ID() int { return d.id }

// Path is the block device's path.
func (d *Device) Path() string { return blockPath(d.id) }

// Options are the options in force: with defaults filled in, and with the queues that the driver gave.
func (d *Device) Options() Options { return d.opts }

// Features are what the driver granted the device.
func (d *Device) Features() Feature { return d.features }

// MemoryLocked tells whether the I/O buffers are locked in memory. If not (RLIMIT_MEMLOCK), a machine short of memory
// may page them out, and writing back to this device then waits for itself.
func (d *Device) MemoryLocked() bool { return d.locked }

// State is where the device is in its life.
func (d *Device) State() State {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.state
}

// Done is closed when the device is gone: no more requests come, and nothing of it is left in this process.
func (d *Device) Done() <-chan struct{} { return d.done }

// Err is nil until Done is closed. Afterwards it is nil if Stop or Close ended the device, ErrStopped if something
// outside did, and otherwise what broke.
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

// gone tells the driver's answer to a command to a device that has no disk any more, or is deleted.
func gone(err error) bool { return errors.Is(err, syscall.ENODEV) }
