package ublk

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// commandTimeout bounds commands that the driver answers without waiting for a handler or a user of a disk.
const commandTimeout = 20 * time.Second

// commander executes control commands: a controlRing, or a double in tests.
type commander interface {
	// run executes one command and waits until it has a result or ctx ends. If run returns an error, the kernel may
	// still write to buf later.
	run(ctx context.Context, op uint32, cmd ctrlCmd, buf unsafe.Pointer) (int32, error)
}

// control sends control commands to the driver, in the dialect of the running kernel.
//
// Commands that change the set of devices run one at a time, to spare the driver. Others do not: neither those that
// only ask, nor START and STOP, which may wait for a handler or for the users of a disk. So one slow disk does not hold
// up the others.
type control struct {
	commander
	serial chan struct{} // holds a token while a command changes the set of devices

	mu      sync.Mutex // guards dialect; held while learn asks the driver
	dialect dialect
}

// dialect describes the commands that the running kernel knows.
type dialect struct {
	known         bool
	features      Feature // the answer to GET_FEATURES
	asked         bool    // the driver has GET_FEATURES (6.5), so features is known
	legacyOpcodes bool    // commands are opcodes of one byte, as up to 6.3
	noInfo2       bool    // the driver has no GET_DEV_INFO2, as up to 6.2
}

var (
	controlMu  sync.Mutex // guards theControl
	theControl *control
)

// openControl returns the process's control connection, and makes it at the first use. After a failure the next call
// tries again, because the driver may have been loaded meanwhile.
func openControl() (*control, error) {
	controlMu.Lock()
	defer controlMu.Unlock()
	if theControl != nil {
		return theControl, nil
	}
	r, err := newControlRing(controlPath)
	if err != nil {
		return nil, err
	}
	theControl = newControl(r)
	return theControl, nil
}

func newControl(r commander) *control { return &control{commander: r, serial: make(chan struct{}, 1)} }

// learn asks the driver for its dialect, once. A kernel before 6.5 takes GET_FEATURES for a command to a device that
// does not exist. Such a kernel knows the legacy opcodes, unless it is a 6.4 that was built without them (see exec).
func (c *control) learn(ctx context.Context) (dialect, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.dialect.known {
		return c.dialect, nil
	}
	ctx, cancel := context.WithTimeout(ctx, commandTimeout)
	defer cancel()
	f := new(uint64)
	cmd := ctrlCmd{devID: kernelPicks, queueID: noQueue, len: featuresSize}
	err := asError(c.run(ctx, cmdGetFeatures, cmd, unsafe.Pointer(f)))
	switch {
	case err == nil:
		c.dialect = dialect{known: true, asked: true, features: Feature(*f)}
	case errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.EINVAL), errors.Is(err, unix.ENODEV):
		c.dialect = dialect{known: true, legacyOpcodes: true}
	default:
		return dialect{}, fmt.Errorf("ublk: ask the driver for its features: %w", err)
	}
	return c.dialect, nil
}

func (c *control) setDialect(change func(*dialect)) {
	c.mu.Lock()
	defer c.mu.Unlock()
	change(&c.dialect)
}

// exec runs one command in the kernel's dialect. If the kernel turns out not to know the legacy opcodes, exec corrects
// the dialect.
func (c *control) exec(ctx context.Context, op uint32, cmd ctrlCmd, buf unsafe.Pointer) error {
	d, err := c.learn(ctx)
	if err != nil {
		return err
	}
	if !d.legacyOpcodes {
		return asError(c.run(ctx, op, cmd, buf))
	}
	err = asError(c.run(ctx, op&opMask, cmd, buf))
	if !errors.Is(err, unix.EOPNOTSUPP) {
		return err
	}
	encoded := asError(c.run(ctx, op, cmd, buf))
	if errors.Is(encoded, unix.EOPNOTSUPP) {
		return err
	}
	c.setDialect(func(d *dialect) { d.legacyOpcodes = false })
	return encoded
}

func asError(res int32, err error) error {
	if err == nil && res < 0 {
		return unix.Errno(-res)
	}
	return err
}

// target is the device that a command is for. With every command to an unprivileged device, the driver needs the path
// of the char device, and checks the caller's permission for that.
type target struct {
	id     int
	byPath bool
}

// charPathSize is the room for a char device's path before a command's payload.
const charPathSize = 32

// send runs a command for a device. The driver reads payload and may change it.
func (c *control) send(ctx context.Context, op uint32, to target, data uint64, payload []byte) error {
	cmd := ctrlCmd{devID: uint32(to.id), queueID: noQueue, data: data}
	if !to.byPath {
		cmd.len = uint16(len(payload))
		return c.exec(ctx, op, cmd, unsafe.Pointer(unsafe.SliceData(payload)))
	}
	buf := make([]byte, charPathSize+len(payload))
	copy(buf, charPath(to.id))
	copy(buf[charPathSize:], payload)
	cmd.len, cmd.pathLen = uint16(len(buf)), charPathSize
	err := c.exec(ctx, op, cmd, unsafe.Pointer(unsafe.SliceData(buf)))
	if err == nil {
		copy(payload, buf[charPathSize:])
	}
	return err
}

// ask sends a command that the driver answers at once.
func (c *control) ask(ctx context.Context, op uint32, to target, data uint64, payload []byte) error {
	ctx, cancel := context.WithTimeout(ctx, commandTimeout)
	defer cancel()
	return c.send(ctx, op, to, data, payload)
}

// change sends a command that changes the set of devices, and that the driver executes at once.
func (c *control) change(ctx context.Context, op uint32, to target, payload []byte) error {
	ctx, cancel := context.WithTimeout(ctx, commandTimeout)
	defer cancel()
	end, err := c.lockChanges(ctx)
	if err != nil {
		return err
	}
	defer end()
	return c.send(ctx, op, to, 0, payload)
}

// lockChanges waits until no other command changes the set of devices. end lets the next one begin, and may be called
// twice.
func (c *control) lockChanges(ctx context.Context) (end func(), err error) {
	select {
	case c.serial <- struct{}{}:
		return sync.OnceFunc(func() { <-c.serial }), nil
	case <-ctx.Done():
		return nil, fmt.Errorf("another command to the driver has not ended: %w", ctx.Err())
	}
}

// bytesOf returns the memory of a structure, which must have no pointers.
func bytesOf[T any](p *T) []byte { return unsafe.Slice((*byte)(unsafe.Pointer(p)), unsafe.Sizeof(*p)) }

// offered returns the features that the driver offers. Before 6.5 only the answer to ADD shows them; then offered
// returns all bits, so that a device may ask for any.
func (c *control) offered(ctx context.Context) (Feature, error) {
	d, err := c.learn(ctx)
	if err == nil && !d.asked {
		return ^Feature(0), nil
	}
	return d.features, err
}

// add makes a device. The driver puts its decisions (id, queues, flags, sizes) into info.
func (c *control) add(ctx context.Context, info *devInfo) error {
	// The driver needs the id in the command and in info. An unprivileged device has no path yet.
	err := c.change(ctx, cmdAddDev, target{id: int(int32(info.devID))}, bytesOf(info))
	switch {
	case err == nil:
		return nil
	case errors.Is(err, unix.EACCES), errors.Is(err, unix.ENOSPC):
		return fmt.Errorf("ublk: add a device: %w (%w)", ErrNoFreeDevice, err)
	case errors.Is(err, unix.EEXIST):
		return fmt.Errorf("ublk: add device %d: %w (%w)", info.devID, ErrExists, err)
	case errors.Is(err, unix.EPERM):
		return fmt.Errorf("ublk: add a device: %w (%w)", ErrPermission, err)
	case errors.Is(err, unix.EOPNOTSUPP):
		return fmt.Errorf("ublk: add a device: %w (%w)", ErrKernelTooOld, err)
	}
	return fmt.Errorf("ublk: add a device of %d queues of depth %d and %d bytes an I/O: %w",
		info.queues, info.depth, info.maxIOBytes, err)
}

// setParams sets the parameters and reads them back, because the driver silently drops those that it does not know.
func (c *control) setParams(ctx context.Context, to target, p *params) error {
	p.len = uint32(unsafe.Sizeof(*p))
	if err := c.change(ctx, cmdSetParams, to, bytesOf(p)); err != nil {
		return fmt.Errorf("ublk: set the parameters of device %d: %w", to.id, err)
	}
	got, err := c.getParams(ctx, to)
	if err != nil {
		return err
	}
	if got.types&p.types != p.types || got.basic != p.basic || got.discard != p.discard {
		return fmt.Errorf("ublk: device %d: the driver changed the parameters from %+v to %+v: %w", to.id, *p, *got, ErrKernelTooOld)
	}
	return nil
}

func (c *control) getParams(ctx context.Context, to target) (*params, error) {
	p := &params{len: uint32(unsafe.Sizeof(params{}))}
	if err := c.ask(ctx, cmdGetParams, to, 0, bytesOf(p)); err != nil {
		return nil, deviceError("read the parameters of", to.id, err)
	}
	return p, nil
}

// getInfo asks with the path first, because the device may be an unprivileged one. If the driver does not find the
// path, the device may exist even so: a container's /dev may lack the node, or have another file there. Then getInfo
// asks without the path, which is enough for a privileged device.
func (c *control) getInfo(ctx context.Context, id int) (*devInfo, error) {
	d, err := c.learn(ctx)
	if err != nil {
		return nil, err
	}
	info := new(devInfo)
	if !d.noInfo2 {
		err = c.ask(ctx, cmdGetDevInfo2, target{id: id, byPath: true}, 0, bytesOf(info))
		if err == nil {
			return info, nil
		}
		if errors.Is(err, unix.ENODEV) || ctx.Err() != nil {
			return nil, deviceError("look at", id, err)
		}
	}
	plain := c.ask(ctx, cmdGetDevInfo, target{id: id}, 0, bytesOf(info))
	switch {
	case plain == nil && errors.Is(err, unix.EOPNOTSUPP):
		c.setDialect(func(d *dialect) { d.noInfo2 = true })
		return info, nil
	case plain == nil:
		return info, nil
	case errors.Is(plain, unix.ENODEV), err == nil:
		err = plain
	}
	return nil, deviceError("look at", id, err)
}

// target returns the target for commands to the device.
func (i *devInfo) target() target {
	return target{id: int(i.devID), byPath: Feature(i.flags)&FeatureUnprivileged != 0}
}

// deviceError turns a command's errno into an error that callers can match. The driver answers ENODEV if there is no
// such device, and ENOENT if there is no such path.
func deviceError(what string, id int, err error) error {
	kind := error(nil)
	switch {
	case errors.Is(err, unix.ENODEV):
		kind = ErrNotFound
	case errors.Is(err, unix.ENOENT):
		kind = ErrNoNode
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.EACCES):
		kind = ErrPermission
	default:
		return fmt.Errorf("ublk: %s device %d: %w", what, id, err)
	}
	return fmt.Errorf("ublk: %s device %d: %w (%w)", what, id, kind, err)
}

// start makes the block device appear. The driver waits until all tags are fetched. Before 6.19 it then reads the
// partition table, which takes the handler's answers. The command carries the id of the process that opened the char
// device.
func (c *control) start(ctx context.Context, to target) error {
	if err := c.send(ctx, cmdStartDev, to, uint64(os.Getpid()), nil); err != nil {
		return deviceError("start", to.id, err)
	}
	return nil
}

// stop removes the block device after its dirty data is written and its requests are answered. The driver cannot be
// interrupted once it has begun, so stop takes no context.
func (c *control) stop(to target) error { return c.send(context.Background(), cmdStopDev, to, 0, nil) }

// tryStop is stop, but fails with EBUSY while the block device is open (7.0).
func (c *control) tryStop(to target) error {
	return c.send(context.Background(), cmdTryStopDev, to, 0, nil)
}

const (
	// deleteTimeout bounds how long a deletion waits for processes that hold the device.
	deleteTimeout = 5 * time.Second
	// deleteHold is how long a deletion keeps other changes waiting. By then the driver has done its work, and only
	// waits, without a lock.
	deleteHold = time.Second
)

// errHeld: the device is deleted, and disappears when the last process closes it.
var errHeld = errors.New("ublk: the device is held open")

// del removes the device. It waits up to deleteTimeout until no process holds the char device or the block device.
func (c *control) del(ctx context.Context, to target) error {
	patient, cancel := context.WithTimeout(ctx, commandTimeout)
	defer cancel()
	end, err := c.lockChanges(patient)
	if err != nil {
		return err
	}
	defer end()
	defer time.AfterFunc(deleteHold, end).Stop()
	bounded, cancel := context.WithTimeout(ctx, deleteTimeout)
	defer cancel()
	err = c.send(bounded, cmdDelDev, to, 0, nil)
	// The signal that cancels one command may hit the next command of the same kernel worker thread, which then returns
	// EINTR too early.
	for errors.Is(err, unix.EINTR) && bounded.Err() == nil {
		err = c.send(bounded, cmdDelDev, to, 0, nil)
	}
	if err != nil && bounded.Err() != nil {
		return fmt.Errorf("%w (%w)", errHeld, err)
	}
	return err
}

// startRecovery and endRecovery come before and after the fetches of a new server. endRecovery waits for all fetches,
// and makes the driver issue the waiting requests again.
func (c *control) startRecovery(ctx context.Context, to target) error {
	return c.change(ctx, cmdStartUserRecovery, to, nil)
}

func (c *control) endRecovery(ctx context.Context, to target) error {
	return c.send(ctx, cmdEndUserRecovery, to, uint64(os.Getpid()), nil)
}

// quiesce makes the driver hand out no more requests. The driver waits up to timeout until each queue has a command
// that it can give back. If a queue has none by then, the driver returns an error, but hands out nothing even so. The
// driver takes 0 for no limit.
func (c *control) quiesce(ctx context.Context, to target, timeout time.Duration) error {
	return c.send(ctx, cmdQuiesceDev, to, uint64(max(timeout.Milliseconds(), 1)), nil)
}

// resize sets the number of 512-byte sectors.
func (c *control) resize(ctx context.Context, to target, sectors uint64) error {
	return c.ask(ctx, cmdUpdateSize, to, sectors, nil)
}

// affinity returns the CPUs whose requests go to a queue.
func (c *control) affinity(ctx context.Context, to target, queue int) (*unix.CPUSet, error) {
	set := new(unix.CPUSet)
	return set, c.ask(ctx, cmdGetQueueAffinity, to, uint64(queue), bytesOf(set))
}
