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

const (
	controlPath = "/dev/ublk-control"
	// controlEntries bounds the commands of a process that are under way at once.
	controlEntries = 64
	// commandTimeout bounds the commands that the driver answers without waiting for a handler or a user of a disk.
	commandTimeout = 20 * time.Second
	// cancelGrace is how long a cancelled command may take to come back before it is given up. Commands have been
	// seen to hang in the driver under create/delete churn (6.18.40, 7.0).
	cancelGrace = 3 * time.Second
)

// control is the process's one connection to /dev/ublk-control. Every command goes through one ring that lives as long
// as the process, and is answered by one goroutine that sleeps in the runtime's poller.
//
// Commands that change the set of devices are serialised, for the driver's sake. Those whose length depends on a
// handler or on the users of a disk (START, STOP) are not, so that one slow disk does not hold up the others.
type control struct {
	fd     int      // /dev/ublk-control
	events *os.File // eventfd, signalled by the ring for every completion
	serial chan struct{}

	mu      sync.Mutex // guards what follows; never held over a wait
	ring    *ring
	nextID  uint64
	pending map[uint64]*ctrlCall
}

// ctrlCall is one command under way. It stays in control.pending until the kernel has answered, because the kernel may
// write to buf until then.
type ctrlCall struct {
	buf  unsafe.Pointer
	done chan int32 // gets the result; has room for it
}

var (
	controlMu  sync.Mutex // guards theControl
	theControl *control
)

// openControl returns the process's control connection, making it on first use. A failure is not remembered: the
// driver may be loaded later.
func openControl() (*control, error) {
	controlMu.Lock()
	defer controlMu.Unlock()
	if theControl != nil {
		return theControl, nil
	}
	c, err := newControl(controlPath)
	if err != nil {
		return nil, err
	}
	theControl = c
	return c, nil
}

func newControl(path string) (_ *control, err error) {
	fd, err := openRetry(path, unix.O_RDWR)
	if err != nil {
		return nil, controlOpenError(path, err)
	}
	c := &control{fd: fd, serial: make(chan struct{}, 1), pending: make(map[uint64]*ctrlCall)}
	defer func() {
		if err != nil {
			c.release()
		}
	}()
	// No DEFER_TASKRUN and no SINGLE_ISSUER: any goroutine submits, and nobody waits in the ring.
	if c.ring, err = newRing(controlEntries, 4*controlEntries, 0); err != nil {
		return nil, err
	}
	efd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("ublk: make an eventfd: %w", err)
	}
	c.events = os.NewFile(uintptr(efd), "ublk control events")
	n := int32(efd)
	if err := c.ring.register(registerEventfd, unsafe.Pointer(&n), 1); err != nil {
		return nil, fmt.Errorf("ublk: register an eventfd with the control ring: %w", err)
	}
	go c.answerRoutine()
	return c, nil
}

func (c *control) release() {
	if c.events != nil {
		_ = c.events.Close()
	}
	if c.ring != nil {
		c.ring.close()
	}
	_ = unix.Close(c.fd)
}

func controlOpenError(path string, err error) error {
	switch {
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENXIO), errors.Is(err, unix.ENODEV):
		return fmt.Errorf("ublk: open %s: %w (%w)", path, ErrNoDriver, err)
	case errors.Is(err, unix.EACCES), errors.Is(err, unix.EPERM):
		return fmt.Errorf("ublk: open %s: %w (%w)", path, ErrPermission, err)
	}
	return fmt.Errorf("ublk: open %s: %w", path, err)
}

func openRetry(path string, flags int) (int, error) {
	for {
		fd, err := unix.Open(path, flags|unix.O_CLOEXEC, 0)
		if err != unix.EINTR {
			return fd, err
		}
	}
}

// answerRoutine delivers results; it runs as long as the process.
func (c *control) answerRoutine() {
	var count [8]byte
	for {
		if _, err := c.events.Read(count[:]); err != nil {
			return
		}
		c.mu.Lock()
		for {
			id, res, ok := c.ring.next()
			if !ok {
				break
			}
			if call := c.pending[id]; call != nil {
				delete(c.pending, id)
				call.done <- res
			}
		}
		c.mu.Unlock()
	}
}

// submit queues and hands over one entry; fill gets it cleared.
func (c *control) submit(call *ctrlCall, fill func(*sqe)) (id uint64, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	e := c.ring.get()
	if e == nil {
		return 0, fmt.Errorf("ublk: the control ring is full")
	}
	c.nextID++
	id = c.nextID
	fill(e)
	e.userData = id
	if call != nil {
		c.pending[id] = call
	}
	for c.ring.unsubmitted() > 0 {
		if err := c.ring.enter(0); err != nil && !transient(err) {
			delete(c.pending, id)
			return 0, fmt.Errorf("ublk: submit a control command: %w", err)
		}
	}
	return id, nil
}

// run executes one command and waits for its result, or for ctx. A command that is given up is cancelled, and when the
// driver does not even answer that, left to the kernel.
func (c *control) run(ctx context.Context, op uint32, cmd ctrlCmd, buf unsafe.Pointer) (int32, error) {
	if err := ctx.Err(); err != nil {
		return 0, err
	}
	cmd.addr = uint64(uintptr(buf))
	call := &ctrlCall{buf: buf, done: make(chan int32, 1)}
	id, err := c.submit(call, func(e *sqe) {
		e.opcode = opURingCmd
		e.fd = int32(c.fd)
		e.off = uint64(op)
		*(*ctrlCmd)(unsafe.Pointer(&e.cmd)) = cmd
	})
	if err != nil {
		return 0, err
	}
	select {
	case res := <-call.done:
		return res, nil
	case <-ctx.Done():
	}
	if _, err := c.submit(nil, func(e *sqe) { e.opcode, e.fd, e.addr = opAsyncCancel, -1, id }); err != nil {
		return 0, errors.Join(ctx.Err(), err)
	}
	select {
	case res := <-call.done:
		if res >= 0 {
			return res, nil
		}
		return 0, ctx.Err()
	case <-time.After(cancelGrace):
		return 0, fmt.Errorf("ublk: the driver does not answer a control command: %w", ctx.Err())
	}
}

// quick runs a command that the driver answers by itself, one at a time. A negative result is returned as its errno.
func (c *control) quick(ctx context.Context, op uint32, cmd ctrlCmd, buf unsafe.Pointer) error {
	ctx, cancel := context.WithTimeout(ctx, commandTimeout)
	defer cancel()
	select {
	case c.serial <- struct{}{}:
		defer func() { <-c.serial }()
	case <-ctx.Done():
		return ctx.Err()
	}
	return asError(c.run(ctx, op, cmd, buf))
}

// slow runs a command whose length is not the driver's.
func (c *control) slow(ctx context.Context, op uint32, cmd ctrlCmd) error {
	return asError(c.run(ctx, op, cmd, nil))
}

func asError(res int32, err error) error {
	if err == nil && res < 0 {
		return unix.Errno(-res)
	}
	return err
}

func command(id int) ctrlCmd { return ctrlCmd{devID: uint32(id), queueID: noQueue} }

// add makes a device; the driver's answer (id, queues, flags, sizes) replaces info.
func (c *control) add(ctx context.Context, info *devInfo) error {
	cmd := ctrlCmd{devID: info.devID, queueID: noQueue, len: uint16(unsafe.Sizeof(*info))}
	err := c.quick(ctx, cmdAddDev, cmd, unsafe.Pointer(info))
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
func (c *control) setParams(ctx context.Context, id int, p *params) error {
	p.len = uint32(unsafe.Sizeof(*p))
	cmd := command(id)
	cmd.len = uint16(p.len)
	if err := c.quick(ctx, cmdSetParams, cmd, unsafe.Pointer(p)); err != nil {
		return fmt.Errorf("ublk: set the parameters of device %d: %w", id, err)
	}
	got, err := c.getParams(ctx, id)
	if err != nil {
		return err
	}
	if got.types&p.types != p.types || got.basic != p.basic || got.discard != p.discard {
		return fmt.Errorf("ublk: device %d: the driver changed the parameters from %+v to %+v: %w", id, *p, *got, ErrKernelTooOld)
	}
	return nil
}

func (c *control) getParams(ctx context.Context, id int) (*params, error) {
	p := &params{len: uint32(unsafe.Sizeof(params{}))}
	cmd := command(id)
	cmd.len = uint16(p.len)
	if err := c.quick(ctx, cmdGetParams, cmd, unsafe.Pointer(p)); err != nil {
		return nil, deviceError("read the parameters of", id, err)
	}
	return p, nil
}

// infoQuery is the buffer of GET_DEV_INFO2: the char device's path, then the answer. The driver checks the caller's
// rights on that path for unprivileged devices.
type infoQuery struct {
	path [32]byte
	info devInfo
}

func (c *control) getInfo(ctx context.Context, id int) (*devInfo, error) {
	q := new(infoQuery)
	copy(q.path[:], charPath(id))
	cmd := command(id)
	cmd.len, cmd.pathLen = uint16(unsafe.Sizeof(*q)), uint16(len(q.path))
	err := c.quick(ctx, cmdGetDevInfo2, cmd, unsafe.Pointer(q))
	if err != nil {
		return nil, deviceError("look at", id, err)
	}
	return &q.info, nil
}

func deviceError(what string, id int, err error) error {
	switch {
	case errors.Is(err, unix.ENODEV), errors.Is(err, unix.ENOENT):
		return fmt.Errorf("ublk: %s device %d: %w (%w)", what, id, ErrNotFound, err)
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.EACCES):
		return fmt.Errorf("ublk: %s device %d: %w (%w)", what, id, ErrPermission, err)
	}
	return fmt.Errorf("ublk: %s device %d: %w", what, id, err)
}

func (c *control) getFeatures(ctx context.Context) (uint64, error) {
	f := new(uint64)
	err := c.quick(ctx, cmdGetFeatures, ctrlCmd{devID: kernelPicks, queueID: noQueue, len: featuresSize}, unsafe.Pointer(f))
	switch {
	case err == nil:
		return *f, nil
	case errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.EINVAL), errors.Is(err, unix.ENODEV):
		// A driver without GET_FEATURES takes it for a command to a device.
		return 0, fmt.Errorf("ublk: ask the driver for its features: %w (%w)", ErrKernelTooOld, err)
	}
	return 0, fmt.Errorf("ublk: ask the driver for its features: %w", err)
}

// start makes the block device appear. The driver waits for the fetches of all tags, and before 6.19 reads the
// partition table, which the handler serves.
func (c *control) start(ctx context.Context, id int) error {
	cmd := command(id)
	cmd.data = uint64(os.Getpid()) // the process that opened the char device
	if err := c.slow(ctx, cmdStartDev, cmd); err != nil {
		return deviceError("start", id, err)
	}
	return nil
}

// stop removes the block device after its dirty data is written and its requests are answered. Once the driver
// has begun it cannot be called back, so it takes no context.
func (c *control) stop(id int) error {
	return c.slow(context.Background(), cmdStopDev, command(id))
}

// tryStop is stop that fails with EBUSY while the block device is open (7.0).
func (c *control) tryStop(id int) error {
	return c.slow(context.Background(), cmdTryStopDev, command(id))
}

// del removes the device. It waits until nobody holds the char device or the block device; when ctx ends first, the
// device goes by itself as soon as they are closed.
func (c *control) del(ctx context.Context, id int) error {
	return c.quick(ctx, cmdDelDev, command(id), nil)
}
