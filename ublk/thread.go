package ublk

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// queueThread is a queue with the memory and the eventfd that its thread uses.
type queueThread struct {
	*queue
	descs []byte
	buf   []byte
	efd   int

	cpus    *unix.CPUSet // where the thread runs; nil: anywhere
	flusher atomic.Bool  // the thread is marked as an I/O flusher
	tid     atomic.Int64 // of the thread
	behind  transport    // set if the queue has not drained: release closes it when the thread is gone
}

// copyMode returns the copy mode of a device with the features that the driver granted.
func copyMode(features Feature) CopyMode {
	switch {
	case features&FeatureBatchIO != 0:
		return CopyBatch
	case features&FeatureUserCopy != 0:
		return CopyUser
	}
	return CopyPlain
}

// makeQueues makes the queues with their buffers and eventfds. It only reserves memory for the descriptors, because the
// driver lets a process map them only when every tag is fetched (see mapDescs).
func (d *Device) makeQueues(ctx context.Context, h Handler) error {
	mode := copyMode(d.features)
	d.locked = true
	if mode == CopyUser {
		var err error
		if d.locked, err = buffers().join(poolBlock(d.opts.MaxIOBytes)); err != nil {
			return err
		}
		d.joined = true
	}
	for id := range d.opts.Queues {
		t := &queueThread{efd: -1}
		d.queues = append(d.queues, t)
		var err error
		t.descs, err = unix.Mmap(-1, 0, descBytes(d.opts.Depth), unix.PROT_NONE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
		if err != nil {
			return fmt.Errorf("ublk: reserve the descriptors of queue %d: %w", id, err)
		}
		if mode != CopyUser {
			var locked bool
			if t.buf, locked, err = mapAnonymous(d.opts.Depth * d.opts.MaxIOBytes); err != nil {
				return err
			}
			d.locked = d.locked && locked
		}
		if t.efd, err = unix.Eventfd(0, unix.EFD_CLOEXEC); err != nil {
			return fmt.Errorf("ublk: make an eventfd: %w", err)
		}
		t.queue = newQueue(mode, id, d.opts.Depth, d.opts.MaxIOBytes, t.buf, buffers(), h, d.opts.Report)
		t.holds = d.features&FeatureRecoveryReissue != 0
		t.early = true
		t.cpus = d.queueCPUs(ctx, id)
	}
	return nil
}

func descBytes(depth int) int { return roundUp(depth*descSize, os.Getpagesize()) }

// errMapRefused: the driver believes that another process has the descriptors.
var errMapRefused = errors.New("ublk: the driver does not let this process map the descriptors")

// mapDescs maps the driver's descriptors over the memory that makeQueues reserved. The descriptors of queue n are at n
// times a stride that does not depend on the depth. The mapping must have exactly the length of the depth, and be
// read-only. Requests may arrive before this, and are held: since 6.15 the driver lifts FAIL_IO from a queue as soon as
// its last tag is fetched.
func (d *Device) mapDescs() error {
	stride := int64(roundUp(descArea, os.Getpagesize()))
	for id, t := range d.queues {
		_, err := unix.MmapPtr(d.charFD, int64(id)*stride, unsafe.Pointer(unsafe.SliceData(t.descs)), uintptr(len(t.descs)),
			unix.PROT_READ, unix.MAP_SHARED|unix.MAP_POPULATE|unix.MAP_FIXED)
		if err == unix.EINVAL {
			err = errMapRefused
		}
		if err != nil {
			return fmt.Errorf("ublk: map the descriptors of queue %d of device %d: %w", id, d.id, err)
		}
	}
	return nil
}

// newTransport makes the transport of a queue on its thread.
func (d *Device) newTransport(t *queueThread) (transport, error) {
	c := transportConfig{
		mode:          copyMode(d.features),
		queue:         t.id,
		depth:         d.opts.Depth,
		ioMax:         d.opts.MaxIOBytes,
		descs:         t.descs,
		buf:           t.buf,
		char:          charFiles{char: d.charFD, event: t.efd},
		legacyOpcodes: d.features&FeatureIoctlEncode == 0,
	}
	return newTransport(c, d.charFD)
}

// startQueues starts a thread for every queue, and waits until each has fetched all its tags. From here on
// superviseRoutine does what is needed at the end of the device.
func (d *Device) startQueues() error {
	ready := make(chan error, len(d.queues))
	for _, t := range d.queues {
		d.ending.Add(1)
		go d.queueRoutine(t, ready)
	}
	go d.superviseRoutine()
	var errs error
	for range d.queues {
		err := <-ready
		if errors.Is(err, errRefused) {
			d.refused++
		}
		errs = errors.Join(errs, err)
	}
	if errs == nil {
		errs = d.mapDescs()
	}
	d.mapped = errs == nil
	close(d.started)
	return errs
}

// queueRoutine is the thread of one queue. It never unlocks the thread, so the thread ends with it, and passes neither
// its name nor its ring registration on to other goroutines.
func (d *Device) queueRoutine(t *queueThread, ready chan<- error) {
	if !lockThread() {
		other := make(chan struct{})
		go func() {
			lockThread()
			close(other)
			d.serveQueue(t, ready)
		}()
		<-other
		runtime.UnlockOSThread()
		return
	}
	d.serveQueue(t, ready)
}

// lockThread keeps the goroutine on its thread, and reports whether the thread ends with the goroutine. The main thread
// does not, and the driver waits for the end of a queue's thread.
func lockThread() bool {
	runtime.LockOSThread()
	return unix.Gettid() != unix.Getpid()
}

// serveQueue is queueRoutine after it has got a thread of its own.
func (d *Device) serveQueue(t *queueThread, ready chan<- error) {
	nameThread(fmt.Sprintf("ublk%dq%d", d.id, t.id))
	pinThread(t.cpus)
	t.flusher.Store(markFlusher())
	t.tid.Store(int64(unix.Gettid()))
	defer d.ending.Done()
	p, err := d.newTransport(t)
	if err != nil {
		ready <- err
		return
	}
	// Deferred, because a handler may end the goroutine (runtime.Goexit), and the device must then end too.
	finished := false
	defer func() {
		drained := t.ended == t.depth
		if !t.idle() {
			keepForever(t)
		}
		t.rests.Store(restsForGood)
		if drained {
			p.close(true)
		} else {
			t.behind = p
		}
		if !finished {
			d.fail(fmt.Errorf("ublk: the handler ended the thread of queue %d", t.id))
		}
	}()
	if err = t.start(p); err != nil {
		err = fmt.Errorf("ublk: fetch for queue %d of device %d: %w", t.id, d.id, err)
		finished = true
		ready <- err
		return
	}
	ready <- nil
	<-d.started
	if !d.mapped { // without descriptors it is not known which requests have arrived
		finished = true
		return
	}
	t.early = false
	if err = t.run(); err != nil && !errors.Is(err, errKilled) {
		d.fail(err)
	}
	finished = true
}

// nameThread sets the name that top and ps show. Failing to do so is harmless.
func nameThread(name string) {
	b, err := unix.ByteSliceFromString(name)
	if err == nil {
		_ = unix.Prctl(unix.PR_SET_NAME, uintptr(unsafe.Pointer(&b[0])), 0, 0, 0)
	}
}

// abandoned keeps the memory of queues that ended with open requests or reads, because a handler or the kernel may
// still write to it, and of queues whose thread does not end.
var abandoned struct {
	sync.Mutex
	queues []*queueThread
}

// threadTimeout bounds the wait for the thread of a queue that has not drained.
const threadTimeout = 5 * time.Second

// gone waits until the thread of an ended queue has ended too, and reports whether it has. Until then the driver may
// copy to the queue's memory, and treats the queue as one that is still served.
func (t *queueThread) gone() bool {
	for end := time.Now().Add(threadTimeout); time.Now().Before(end); time.Sleep(time.Millisecond) {
		if unix.Tgkill(unix.Getpid(), int(t.tid.Load()), 0) == unix.ESRCH {
			return true
		}
	}
	return false
}

func keepForever(t *queueThread) {
	abandoned.Lock()
	defer abandoned.Unlock()
	abandoned.queues = append(abandoned.queues, t)
	t.buf = nil // so that release does not unmap it
}
