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

// commandTimeout bounds the commands that the driver answers without waiting for a handler or a user of a
// disk.
const commandTimeout = 20 * time.Second

// commander executes control commands: controlRing, or a double in tests.
type commander interface {
	// run executes one command and waits for its result, or for ctx. The kernel may write to buf until run
	// returns nil.
	run(ctx context.Context, op uint32, cmd ctrlCmd, buf unsafe.Pointer) (int32, error)
}

// control speaks the driver's control protocol, in the dialect of the running kernel.
//
// Commands that change the set of devices are serialised, for the driver's sake. Those that only ask are not,
// nor those whose length depends on a handler or on the users of a disk (START, STOP): one slow disk does not
// hold up the others.
type control struct {
	commander
	serial chan struct{}

	mu      sync.Mutex // guards dialect; held while the driver is asked for it
	dialect dialect
}

// dialect is how the running kernel is spoken to.
type dialect struct {
	known         bool
	features      Feature // what GET_FEATURES said
	asked         bool    // there is GET_FEATURES (6.5)
	legacyOpcodes bool    // commands are opcodes of one byte, as up to 6.3
	noInfo2       bool    // there is no GET_DEV_INFO2, as up to 6.2
}

var (
	controlMu  sync.Mutex // guards theControl
	theControl *control
)

// openControl returns the process's control connection, making it on first use. A failure is not remembered:
// the driver may be loaded later.
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

// learn finds out the dialect. A kernel before 6.5 takes GET_FEATURES for a command to a device that is not
// there. It knows the legacy opcodes, unless it is a 6.4 that was built without them (see exec).
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

// exec runs one command in the kernel's dialect.
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

// target is the device that a command is for. The driver wants the char device's path with every command to
// an unprivileged device, and checks the caller's right to that.
type target struct {
	id     int
	byPath bool
}

// charPathSize is the room for a char device's path before a command's payload.
const charPathSize = 32

// send runs a command to a device; payload goes to the driver and comes back from it.
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

// ask sends a command that the driver answers by itself.
func (c *control) ask(ctx context.Context, op uint32, to target, data uint64, payload []byte) error {
	ctx, cancel := context.WithTimeout(ctx, commandTimeout)
	defer cancel()
	return c.send(ctx, op, to, data, payload)
}

// change sends a command that the driver executes by itself, one at a time.
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

// lockChanges waits until no other command changes the set of devices. end is for the next one, and may be called
// twice.
func (c *control) lockChanges(ctx context.Context) (end func(), err error) {
	select {
	case c.serial <- struct{}{}:
		return sync.OnceFunc(func() { <-c.serial }), nil
	case <-ctx.Done():
		return nil, fmt.Errorf("another command to the driver does not end: %w", ctx.Err())
	}
}

// bytesOf is the memory of a structure without pointers.
func bytesOf[T any](p *T) []byte { return unsafe.Slice((*byte)(unsafe.Pointer(p)), unsafe.Sizeof(*p)) }

// offered returns what the kernel's driver can do. Before 6.5 only ADD tells, so every feature may be asked
// for.
func (c *control) offered(ctx context.Context) (Feature, error) {
	d, err := c.learn(ctx)
	if err == nil && !d.asked {
		return ^Feature(0), nil
	}
	return d.features, err
}

// add makes a device; the driver's answer (id, queues, flags, sizes) replaces info.
func (c *control) add(ctx context.Context, info *devInfo) error {
	// The id is said twice. There is no path yet, not even for an unprivileged device.
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

// setParams sets the parameters and reads them back: what the driver does not know it drops without a word.
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

// getInfo asks with the path, as it is not known yet whether the device is an unprivileged one. That the
// driver does not find the path says nothing of the device: in a container's /dev there may be no such node,
// or another file. Then it asks without, which is enough for a privileged device.
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

// target is how the device is spoken to.
func (i *devInfo) target() target {
	return target{id: int(i.devID), byPath: Feature(i.flags)&FeatureUnprivileged != 0}
}

// deviceError gives a command's error its meaning: ENODEV is the driver's for a device that is not there, and
// ENOENT for a path that is not.
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

// start makes the block device appear. The driver waits for the fetches of all tags, and before 6.19 reads
// the partition table, which the handler serves. The command carries the process that opened the char device.
func (c *control) start(ctx context.Context, to target) error {
	if err := c.send(ctx, cmdStartDev, to, uint64(os.Getpid()), nil); err != nil {
		return deviceError("start", to.id, err)
	}
	return nil
}

// stop removes the block device after its dirty data is written and its requests are answered. Once the
// driver has begun it cannot be called back, so it takes no context.
func (c *control) stop(to target) error { return c.send(context.Background(), cmdStopDev, to, 0, nil) }

// tryStop is stop that fails with EBUSY while the block device is open (7.0).
func (c *control) tryStop(to target) error {
	return c.send(context.Background(), cmdTryStopDev, to, 0, nil)
}

const (
	// deleteTimeout bounds the wait for those who hold a device that is deleted.
	deleteTimeout = 5 * time.Second
	// deleteHold is how long a deletion keeps others waiting: the driver does its work first, and then waits
	// without a lock.
	deleteHold = time.Second
)

// errHeld: the device is deleted, and goes by itself as soon as those who hold it open close it.
var errHeld = errors.New("ublk: the device is held open")

// del removes the device. It waits a while until nobody holds the char device or the block device.
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
	// The signal that cancels a command can meet the next one of the kernel's worker thread, which has not
	// waited to its end then.
	for errors.Is(err, unix.EINTR) && bounded.Err() == nil {
		err = c.send(bounded, cmdDelDev, to, 0, nil)
	}
	if err != nil && bounded.Err() != nil {
		return fmt.Errorf("%w (%w)", errHeld, err)
	}
	return err
}

// startRecovery and endRecovery frame the fetches of a new server. END waits for them, and has the requests
// that wait issued again.
func (c *control) startRecovery(ctx context.Context, to target) error {
	return c.change(ctx, cmdStartUserRecovery, to, nil)
}

func (c *control) endRecovery(ctx context.Context, to target) error {
	return c.send(ctx, cmdEndUserRecovery, to, uint64(os.Getpid()), nil)
}

// quiesce has the driver hand out nothing more. It waits up to timeout for a command of each queue that it
// can give back (0: without end), and takes nothing back when there is none.
func (c *control) quiesce(ctx context.Context, to target, timeout time.Duration) error {
	return c.send(ctx, cmdQuiesceDev, to, uint64(max(timeout.Milliseconds(), 1)), nil)
}

// resize sets the number of 512-byte sectors.
func (c *control) resize(ctx context.Context, to target, sectors uint64) error {
	return c.ask(ctx, cmdUpdateSize, to, sectors, nil)
}

// affinity returns the CPUs whose requests come to a queue.
func (c *control) affinity(ctx context.Context, to target, queue int) (*unix.CPUSet, error) {
	set := new(unix.CPUSet)
	return set, c.ask(ctx, cmdGetQueueAffinity, to, uint64(queue), bytesOf(set))
}
