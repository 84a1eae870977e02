package ublk

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime"
	"strings"
	"sync"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	controlPath = "/dev/ublk-control"
	// controlEntries bounds the commands of a process that are under way at once.
	controlEntries = 64
	// cancelGrace is how long a cancelled command may take to end before it is given up. Commands have been seen to
	// hang in the driver while devices were made and deleted at a high rate (6.18.40, 7.0).
	cancelGrace = 3 * time.Second
)

// controlRing is the process's only connection to /dev/ublk-control. All commands go through one ring, which lives as
// long as the process. One goroutine delivers the results; it sleeps in the runtime's poller.
type controlRing struct {
	fd     int      // /dev/ublk-control
	events *os.File // eventfd, signalled by the ring for every completion
	jobs   chan *controlJob

	mu      sync.Mutex // guards the fields below; never held while waiting
	ring    *ring
	nextID  uint64
	pending map[uint64]*ctrlCall
}

// ctrlCall is one command under way. It stays in controlRing.pending until the kernel has answered, because the kernel
// may write to buf until then.
type ctrlCall struct {
	buf  unsafe.Pointer
	done chan int32 // gets the result; has room for it
}

func newControlRing(path string) (_ *controlRing, err error) {
	fd, err := openRetry(path, unix.O_RDWR)
	if err != nil {
		return nil, controlOpenError(path, err)
	}
	c := &controlRing{fd: fd, pending: make(map[uint64]*ctrlCall)}
	defer func() {
		if err != nil {
			c.release()
		}
	}()
	// Neither DEFER_TASKRUN nor SINGLE_ISSUER: several goroutines use the ring, and none waits in it.
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
	c.jobs = make(chan *controlJob)
	go c.submitRoutine()
	go c.answerRoutine()
	return c, nil
}

func (c *controlRing) release() {
	if c.events != nil {
		_ = c.events.Close()
	}
	if c.ring != nil {
		c.ring.close()
	}
	_ = unix.Close(c.fd)
}

// miscDevices is the file that lists the kernel's miscellaneous devices, even in a container. It has "ublk-control" if
// the driver is loaded.
var miscDevices = "/proc/misc"

// driverLoaded reports whether the driver is loaded. It returns an error if that cannot be known.
func driverLoaded() (bool, error) {
	text, err := os.ReadFile(miscDevices)
	if err != nil {
		return false, fmt.Errorf("it cannot be determined whether the driver is loaded: %w", err)
	}
	for line := range strings.Lines(string(text)) {
		if f := strings.Fields(line); len(f) == 2 && f[1] == "ublk-control" {
			return true, nil
		}
	}
	return false, nil
}

// controlOpenError returns ErrNoDriver only if the kernel says that the driver is not loaded. A missing node alone does
// not prove that there is no device.
func controlOpenError(path string, err error) error {
	loaded, lerr := driverLoaded()
	switch {
	case errors.Is(err, unix.ENOENT) && lerr != nil:
		return fmt.Errorf("ublk: open %s: %w (%w; %w)", path, ErrPermission, err, lerr)
	case errors.Is(err, unix.ENOENT) && loaded:
		return fmt.Errorf("ublk: open %s: %w: the driver is loaded, but this /dev has no such node, as in a container (%w)",
			path, ErrPermission, err)
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

// controlJob is an entry on its way to submitRoutine.
type controlJob struct {
	call *ctrlCall
	fill func(*sqe)
	id   uint64
	err  error
	done chan struct{} // closed when id and err are set
}

// submitRoutine submits all entries, on one thread. It runs as long as the process. The driver's control commands
// block, so the kernel makes a worker thread for the submitting thread, and keeps it as long as that thread lives. If
// every caller submitted its own entries, nearly every thread would get a worker, and some of these threads would
// become threads of queues later.
func (c *controlRing) submitRoutine() {
	runtime.LockOSThread()
	for j := range c.jobs {
		j.id, j.err = c.submit(j.call, j.fill)
		close(j.done)
	}
}

// hand passes an entry to submitRoutine, and waits until it is submitted, but not until the command has ended.
func (c *controlRing) hand(call *ctrlCall, fill func(*sqe)) (id uint64, err error) {
	j := &controlJob{call: call, fill: fill, done: make(chan struct{})}
	c.jobs <- j
	<-j.done
	return j.id, j.err
}

// answerRoutine delivers results. It runs as long as the process.
func (c *controlRing) answerRoutine() {
	var count [8]byte
	for {
		if _, err := c.events.Read(count[:]); err != nil {
			return
		}
		c.mu.Lock()
		c.deliver()
		c.mu.Unlock()
	}
}

// deliver passes on the results that the ring has. c.mu is held.
func (c *controlRing) deliver() {
	for {
		id, res, ok := c.ring.next()
		if !ok {
			return
		}
		if call := c.pending[id]; call != nil {
			delete(c.pending, id)
			call.done <- res
		}
	}
}

// submit submits one entry, which it clears before it calls fill.
func (c *controlRing) submit(call *ctrlCall, fill func(*sqe)) (id uint64, err error) {
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
		err := c.ring.enter(0)
		switch {
		case err == nil, c.ring.unsubmitted() == 0:
			// If there is an error, the kernel has taken the command even so, and may write to buf; only a later step
			// failed.
		case !transient(err):
			// Otherwise a later enter would submit the entry, when buf may be other memory.
			c.ring.takeBack()
			delete(c.pending, id)
			return 0, fmt.Errorf("ublk: submit a control command: %w", err)
		case err != unix.EINTR: // no memory, or too many results that nobody has taken; answerRoutine waits for mu
			c.deliver()
			time.Sleep(time.Millisecond)
		}
	}
	return id, nil
}

// run executes one command and waits for its result. When ctx ends, run cancels the command. If the command does not
// end even then, it is left to the kernel.
func (c *controlRing) run(ctx context.Context, op uint32, cmd ctrlCmd, buf unsafe.Pointer) (int32, error) {
	if err := ctx.Err(); err != nil {
		return 0, err
	}
	cmd.addr = uint64(uintptr(buf))
	call := &ctrlCall{buf: buf, done: make(chan int32, 1)}
	id, err := c.hand(call, func(e *sqe) {
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
	if _, err := c.hand(nil, func(e *sqe) { e.opcode, e.fd, e.addr = opAsyncCancel, -1, id }); err != nil {
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
