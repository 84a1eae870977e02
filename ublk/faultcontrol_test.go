package ublk

import (
	"context"
	"errors"
	"os"
	"runtime"
	"sync"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/vdisk/vdisk/internal/testwatch"
)

// controlKernel is the other side of a control ring, with a fakeDriver behind it.
type controlKernel struct {
	ring   *ring
	driver *fakeDriver
	event  int // signalled for every completion

	mu       sync.Mutex // guards what follows
	fault    controlFault
	nth      int
	entered  int
	answered int
	fired    bool
	full     bool  // until all completions are taken, enter fails with EBUSY
	late     []cqe // completions that are held back
	arrived  chan struct{}
}

// controlFault is what happens at the nth enter or completion of a control ring.
type controlFault struct {
	name  string
	enter bool // at an enter; otherwise at a completion
	err   unix.Errno
	after bool // the enter has taken the entries
	late  bool // the completion comes when the test lets it
	never bool // it comes when the command is cancelled
	full  bool // enter fails until the completions are taken
}

func controlFaults() (faults []controlFault) {
	faults = []controlFault{
		{name: "late", late: true}, {name: "never", never: true}, {name: "too many completions", enter: true, full: true},
	}
	for _, errno := range []unix.Errno{
		unix.EIO, unix.ENOMEM, unix.EINTR, unix.EBUSY, unix.ENODEV, unix.ETIMEDOUT, unix.EAGAIN, unix.EPERM, unix.EINVAL,
	} {
		faults = append(faults,
			controlFault{name: errno.Error(), err: errno},
			controlFault{name: errno.Error() + " of an enter", enter: true, err: errno},
			controlFault{name: errno.Error() + " after an enter", enter: true, err: errno, after: true})
	}
	return faults
}

func newControlKernel(t *testing.T, fault controlFault, nth int) (*controlKernel, *controlRing) {
	t.Helper()
	efd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		t.Fatal(err)
	}
	fd, err := unix.Open("/dev/null", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	k := &controlKernel{driver: driverOf("7.3"), event: efd, fault: fault, nth: nth, arrived: make(chan struct{})}
	k.ring = &ring{kernel: k}
	const head, entries = 256, 64
	p := &ringParams{sqEntries: entries, cqEntries: 4 * entries}
	p.sq = sqOffsets{head: 0, tail: 4, mask: 8, array: head}
	p.cq = cqOffsets{head: 16, tail: 20, mask: 24, cqes: head + 4*entries}
	k.ring.ringMem = fakeMemory(t, int(p.cq.cqes+p.cqEntries*cqeSize))
	k.ring.sqeMem = fakeMemory(t, entries*sqeSize)
	*(*uint32)(unsafe.Pointer(&k.ring.ringMem[p.sq.mask])) = entries - 1
	*(*uint32)(unsafe.Pointer(&k.ring.ringMem[p.cq.mask])) = 4*entries - 1
	k.ring.attach(p)
	c := &controlRing{
		fd: fd, events: os.NewFile(uintptr(efd), "events"), jobs: make(chan *controlJob), ring: k.ring, pending: make(map[uint64]*ctrlCall),
	}
	go c.submitRoutine()
	go c.answerRoutine()
	return k, c
}

func (k *controlKernel) register(int, unsafe.Pointer, int) error { return nil }
func (k *controlKernel) close()                                  {}

func (k *controlKernel) enter(submit, _, _ uint32) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.entered++
	hit := k.fault.enter && k.entered == k.nth
	if hit {
		k.fired = true
	}
	switch {
	case hit && k.fault.full:
		k.post(cqe{userData: 1 << 40}) // nobody waits for it
		k.full = true
	case hit && !k.fault.after:
		return k.fault.err
	}
	if k.full && *k.ring.cqHead != *k.ring.cqTail {
		return unix.EBUSY
	}
	k.full = false
	for range submit {
		head := *k.ring.sqHead
		e := (*sqe)(unsafe.Pointer(&k.ring.sqeMem[(head&k.ring.sqMask)*sqeSize]))
		*k.ring.sqHead = head + 1
		k.take(e)
		*e = sqe{opcode: 0xff}
	}
	if hit && k.fault.after {
		return k.fault.err
	}
	return nil
}

// take executes an entry.
func (k *controlKernel) take(e *sqe) {
	if e.opcode == opAsyncCancel {
		for i, c := range k.late {
			if c.userData == e.addr {
				k.late = append(k.late[:i], k.late[i+1:]...)
				k.post(cqe{userData: e.addr, res: -int32(unix.ECANCELED)})
				break
			}
		}
		k.post(cqe{userData: e.userData})
		return
	}
	cmd := *(*ctrlCmd)(unsafe.Pointer(&e.cmd))
	k.answered++
	c := cqe{userData: e.userData}
	if k.fault.enter || k.answered != k.nth {
		c.res = -int32(k.answer(uint32(e.off), cmd, pointer(cmd.addr)))
		k.post(c)
		return
	}
	k.fired = true
	switch {
	case k.fault.late, k.fault.never:
		c.res = -int32(k.answer(uint32(e.off), cmd, pointer(cmd.addr)))
		k.late = append(k.late, c)
		close(k.arrived)
	default:
		c.res = -int32(k.fault.err)
		k.post(c)
	}
}

// answer is the driver's, which has disks here.
func (k *controlKernel) answer(op uint32, cmd ctrlCmd, buf unsafe.Pointer) unix.Errno {
	errno := k.driver.answer(op, cmd, buf)
	switch op {
	case cmdStartDev, cmdStopDev, cmdTryStopDev, cmdUpdateSize, cmdQuiesceDev, cmdStartUserRecovery, cmdEndUserRecovery, cmdGetQueueAffinity:
		if errno == unix.EOPNOTSUPP {
			return 0
		}
	}
	return errno
}

func (k *controlKernel) post(c cqe) {
	*(*cqe)(unsafe.Add(k.ring.cqes, uintptr(*k.ring.cqTail&k.ring.cqMask)*cqeSize)) = c
	*k.ring.cqTail++
	_, _ = unix.Write(k.event, []byte{1, 0, 0, 0, 0, 0, 0, 0})
}

// letLate delivers what is late.
func (k *controlKernel) letLate() {
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, c := range k.late {
		k.post(c)
	}
	k.late = nil
}

// controlScript is the life of a device, as far as its commands go.
func controlScript(ctx context.Context, c *control, did func(step string, err error)) {
	o := Options{Size: 1 << 20, Recovery: RecoverReissue, Cookie: 7}.withDefaults()
	offered, err := c.offered(ctx)
	did("features", err)
	info, err := o.info(offered)
	if err != nil { // without the features
		info, err = o.info(^Feature(0))
	}
	if err != nil {
		panic(err)
	}
	err = c.add(ctx, info)
	did("add", err)
	if err != nil {
		return
	}
	to := info.target()
	did("set", c.setParams(ctx, to, o.params()))
	did("start", c.start(ctx, to))
	_, err = c.affinity(ctx, to, 0)
	did("affinity", err)
	got, err := c.getInfo(ctx, to.id)
	did("info", err)
	if err == nil && got.serverFlags != 7 {
		did("cookie", errors.New("another one"))
	}
	did("resize", c.resize(ctx, to, 4096))
	did("quiesce", c.quiesce(ctx, to, time.Second))
	did("recover", startRetry(ctx, c, to))
	did("end of the recovery", c.endRecovery(ctx, to))
	did("try to stop", c.tryStop(to))
	did("stop", c.stop(to))
	err = c.del(ctx, to)
	did("delete", err)
	if err != nil {
		did("delete again", c.del(ctx, to))
	}
}

// TestFaultAtEveryControlCommand: the nth enter of the control ring, or the nth command, fails, is late, or has no answer
// until it is cancelled, for every n of a device's life. The caller gets that error and no other one does, other commands
// go on, and nothing is left.
func TestFaultAtEveryControlCommand(t *testing.T) {
	onHost(t)
	goroutines, maps, count := runtime.NumGoroutine(), mappings(t), 0
	for _, fault := range controlFaults() {
		for nth := 1; runControl(t, fault, nth); nth++ {
			count++
		}
		if t.Failed() {
			return
		}
	}
	nothingRuns(t, goroutines)
	if n := mappings(t); n > maps+40 {
		t.Errorf("%d mappings, %d before", n, maps)
	}
	t.Logf("proof: faults of ublk control commands: %d", count)
}

func runControl(t *testing.T, fault controlFault, nth int) bool {
	t.Helper()
	files := openFDs(t)
	k, ring := newControlKernel(t, fault, nth)
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	ended := make(chan struct{})
	var failed []error
	c := newControl(ring)
	go func() {
		defer close(ended)
		controlScript(ctx, c, func(step string, err error) {
			if err == nil {
				return
			}
			failed = append(failed, err)
			if step == "delete" && errors.Is(err, unix.EINTR) && !fault.enter {
				t.Error("the deletion was not tried again")
			}
			if fault.err == 0 && !errors.Is(err, context.Canceled) || fault.err != 0 && !errors.Is(err, fault.err) {
				t.Errorf("%s: %v", step, err)
			}
		})
	}()
	select {
	case <-k.arrived: // other commands go on
		testwatch.Do(t, testwatch.Long, "another command", func() {
			_, _ = ring.run(context.Background(), cmdGetDevInfo, ctrlCmd{devID: 99, queueID: noQueue}, unsafe.Pointer(new(devInfo)))
		})
		if fault.never {
			cancel()
			select { // STOP cannot be cancelled
			case <-ended:
			case <-time.After(20 * time.Millisecond):
			}
		}
		k.letLate()
	case <-ended:
	}
	testwatch.Wait(t, testwatch.Long, "the script", ended)
	k.mu.Lock()
	fired := k.fired
	k.mu.Unlock()
	if (!fired || fault.late || fault.full) && len(failed) > 0 || len(failed) > 1 && !fault.never {
		t.Errorf("failed: %v", failed)
	}
	if !fault.never && len(k.driver.devices) != 0 {
		t.Errorf("%d devices are left", len(k.driver.devices))
	}
	ring.mu.Lock()
	if len(ring.pending) != 0 || ring.ring.unsubmitted() != 0 {
		t.Errorf("%d commands are pending, %d not submitted", len(ring.pending), ring.ring.unsubmitted())
	}
	close(ring.jobs)
	ring.release()
	ring.mu.Unlock()
	if n := openFDs(t); n > files {
		t.Errorf("%d open files, %d before", n, files)
	}
	if t.Failed() {
		t.Fatalf("%s, %d", fault.name, nth)
	}
	return fired
}

func openFDs(t testing.TB) int {
	t.Helper()
	names, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(names)
}

// nothingRuns waits until there are no more goroutines than before.
func nothingRuns(t testing.TB, before int) {
	t.Helper()
	for end := time.Now().Add(testwatch.Long); runtime.NumGoroutine() > before+2; time.Sleep(time.Millisecond) { // the runtime's
		if time.Now().After(end) {
			t.Fatalf("%d goroutines, %d before\n%s", runtime.NumGoroutine(), before, testwatch.Stacks())
		}
	}
}

func mappings(t testing.TB) (n int) {
	t.Helper()
	text, err := os.ReadFile("/proc/self/maps")
	if err != nil {
		t.Fatal(err)
	}
	for _, b := range text {
		if b == '\n' {
			n++
		}
	}
	return n
}
