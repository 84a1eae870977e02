package ublk

import (
	"errors"
	"os"
	"runtime"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vdisk/vdisk/internal/testwatch"
)

// allFaults reports whether the tests of faults run at their long size: every call, with every kind of fault.
func allFaults() bool { return os.Getenv("VDISK_FAULTS") == "all" }

// faultStep returns the distance of the calls that fail, and the first of them.
func faultStep(step, seed int) (every, first int) {
	switch {
	case allFaults():
		return 1, 1
	case testing.Short():
		step *= 4
	}
	return step, 1 + seed%step
}

// ringCall is the kind of call at which a queue meets a fault.
type ringCall int

const (
	callEnter      ringCall = iota // io_uring_enter
	callCompletion                 // a completion of another kind than the next
	callRead                       // the completion of a read
	callCopy                       // pread and pwrite of CopyUser
	callCommit                     // a COMMIT of CopyBatch
)

// ringFault is what happens at one such call.
type ringFault struct {
	name string
	call ringCall
	err  unix.Errno
	late bool
	part bool // the call does only a part
	none bool // the call does nothing, and returns 0
}

func ringFaults() []ringFault {
	faults := []ringFault{
		{name: "late", call: callCompletion, late: true},
		{name: "late", call: callRead, late: true},
		{name: "short", call: callRead, part: true},
		{name: "nothing", call: callRead, none: true},
		{name: "short", call: callCopy, part: true},
		{name: "nothing", call: callCopy, none: true},
		{name: "in part", call: callCommit, part: true},
	}
	for _, errno := range []unix.Errno{
		unix.EINTR, unix.EAGAIN, unix.EBUSY, unix.EIO, unix.ENOMEM, unix.ENODEV, unix.ETIMEDOUT, unix.EINVAL, unix.EFAULT,
	} {
		for _, call := range []ringCall{callEnter, callCompletion, callRead, callCopy, callCommit} {
			faults = append(faults, ringFault{name: errno.Error(), call: call, err: errno})
		}
	}
	return faults
}

// outcome is what a fault leads to.
type outcome int

const (
	unnoticed outcome = iota
	failsOne          // one request fails
	loses             // the driver takes one request back, which it then fails itself
	breaks            // the queue ends, and the driver fails what it has
)

// ringRun is a run of one queue with one fault.
type ringRun struct {
	*program
	ringFault
	nth   int
	fired bool
	want  outcome
	errno unix.Errno // of the request or of the queue
}

// due reports whether a call of the kind is the one that fails: the nth, or the first after it that can fail so.
func (r *ringRun) due(nth int) bool { return !r.fired && nth >= r.nth }

// hit notes that the fault has come, and what it leads to.
func (r *ringRun) hit(o outcome) { r.fired, r.want, r.errno = true, o, r.err }

// prepare makes the kernel fail at the call.
func (r *ringRun) prepare() {
	k := r.q.kernel
	switch r.call {
	case callEnter:
		k.enterErr = func(nth int) error {
			if !r.due(nth) {
				return nil
			}
			r.hit(breaks)
			if r.err == unix.EINTR || r.err == unix.EAGAIN || r.err == unix.EBUSY {
				r.hit(unnoticed)
			}
			return r.err
		}
	case callCompletion, callRead:
		k.alter = r.alter
		k.readRes = r.readRes
	case callCopy:
		k.copyRes = func(nth, n int) (int, error) {
			if !r.due(nth + 1) {
				return n, nil
			}
			r.hit(failsOne)
			switch {
			case r.part:
				r.hit(unnoticed)
				return (n + 1) / 2, nil
			case r.none:
				r.errno = unix.EIO
				return 0, nil
			case r.err == unix.EINTR:
				r.hit(unnoticed)
			case r.err == unix.EAGAIN: // which a handler's error does not become
				r.errno = unix.EIO
			}
			return 0, r.err
		}
	case callCommit:
		k.takes = func(nth, n int) (int, unix.Errno) {
			if !r.due(nth+1) || r.part && n < 2 {
				return n, 0
			}
			r.hit(breaks)
			switch {
			case r.part:
				r.hit(unnoticed)
				return n / 2, 0
			case r.err == unix.ENODEV: // would mean the end of a tag
				r.errno = unix.EIO
			}
			return 0, r.err
		}
	}
}

// readRes is the fault at a read.
func (r *ringRun) readRes(nth, n int) int {
	if r.call != callRead || r.late || !r.due(nth+1) || r.part && n < 2 {
		return n
	}
	r.hit(failsOne)
	switch {
	case r.part:
		r.hit(unnoticed)
		return n / 2
	case r.none:
		r.errno = unix.EIO
		return 0
	case r.err == unix.EINTR || r.err == unix.EAGAIN:
		r.hit(unnoticed)
	}
	return -int(r.err)
}

// alter is the fault at a completion.
func (r *ringRun) alter(nth int, c *cqe) (late bool) {
	kind := completionKind(c.userData >> 32)
	if !r.due(nth) || (kind == completeRead) != (r.call == callRead) {
		return false
	}
	switch {
	case r.late:
		r.hit(unnoticed)
		return true
	case r.call == callRead, c.res < 0 || c.flags&cqeBuffer != 0: // done in readRes; an end, or a list of tags
		return false
	case kind == completeWake:
		r.hit(unnoticed)
	case kind == completeIO && r.err == unix.ENODEV:
		r.hit(loses)
		r.q.kernel.owner[uint32(c.userData)] = tagEnded
	default:
		r.hit(breaks)
		if r.err == unix.ENODEV {
			r.errno = unix.EIO
		}
	}
	c.res = -int32(r.err)
	return false
}

// ringScript has each behaviour of the handler with each operation.
func ringScript() (script [][3]byte) {
	for b := range byte(behaviours) {
		for op := range byte(4) {
			script = append(script, [3]byte{b, op, b*16 + op*5})
		}
	}
	return script
}

// TestFaultAtEveryRingCall: at the nth call of a queue's ring, or the nth completion, or the nth copy of a payload, the
// kernel fails, does a part, or is late, for every n and each copy mode, with many requests under way. Every request is
// answered once and rightly, or with the error, or is left to the driver when the queue ends with that error.
// VDISK_FAULTS=all runs every n with every kind of fault.
func TestFaultAtEveryRingCall(t *testing.T) {
	onHost(t)
	seed := int(time.Now().UnixNano() >> 10 & 0xffff)
	t.Logf("seed %d", seed)
	a, kept := newArena(1<<30), 0
	goroutines, maps, count := runtime.NumGoroutine(), mappings(t), 0
	for mode := CopyPlain; mode <= CopyBatch; mode++ {
		for i, fault := range ringFaults() {
			if fault.call == callCopy && mode != CopyUser || fault.call == callCommit && mode != CopyBatch {
				continue
			}
			every := 12
			switch {
			case fault.call == callRead:
				every = 3 // there are few
			case fault.call == callCommit || fault.part:
				every = 4
			}
			step, first := faultStep(every, seed+i)
			for nth := first; runRing(t, a, mode, fault, nth, &kept); nth += step {
				count++
			}
			if t.Failed() {
				return
			}
		}
	}
	nothingRuns(t, goroutines)
	if n := mappings(t); n > maps+kept+40 { // the heap's own
		t.Errorf("%d mappings, %d before, and %d kept", n, maps, kept)
	}
	t.Logf("proof: faults in ublk rings: %d", count)
}

// runRing runs the script once, and reports whether the fault came. It adds to kept the chunks that a broken queue keeps
// for the requests that its handler may still have.
func runRing(t *testing.T, a *arena, mode CopyMode, fault ringFault, nth int, kept *int) bool {
	t.Helper()
	r := &ringRun{ringFault: fault, nth: nth}
	r.program = &program{t: t, disk: &programDisk{t: t, mayFail: true, seen: map[int64]bool{}}, expected: map[uint64]int32{}, answered: map[uint64]bool{}}
	const depth = 24
	var buf []byte
	if mode != CopyUser {
		buf = make([]byte, depth*fakeIOMax)
	} else if _, err := a.join(poolBlock(fakeIOMax)); err != nil {
		t.Fatal(err)
	}
	r.q = &fakeQueue{kernel: newFakeKernel(t, mode, depth, buf), end: make(chan error, 1)}
	r.q.queue = newQueue(mode, 3, depth, fakeIOMax, buf, a, r.disk, func(error) {})
	r.q.kernel.files[1] = programFile()
	r.prepare()
	p := r.q.kernel.transport()
	err := r.q.start(p)
	if err == nil {
		go r.q.loop()
		err = r.play()
	} else {
		p.close(false)
	}
	r.check(err)
	if t.Failed() {
		t.Fatalf("mode %v, %s at call %d of kind %d (came: %v)", mode, fault.name, nth, fault.call, r.fired)
	}
	p.free()
	if r.q.pool != nil {
		r.q.pool.drop()
		*kept += r.q.pool.have
		a.leave(poolBlock(fakeIOMax))
	}
	return r.fired
}

// play dispatches the script, and ends the queue. It returns why the loop ended.
func (r *ringRun) play() error {
	answers := map[uint64][]fakeResult{}
	over, ending := error(nil), false
	collect := func() {
		for {
			select {
			case res := <-r.q.kernel.results:
				answers[res.d.startSector] = append(answers[res.d.startSector], res)
			default:
				return
			}
		}
	}
	script := ringScript()
	for began, turn := time.Now(), 0; ; turn++ {
		for len(script) > 0 && r.give(script[0]) {
			script = script[1:]
		}
		collect()
		if turn%8 == 0 { // several together
			r.disk.release(6)
		}
		if turn%16 == 5 {
			r.q.kernel.interrupt()
		}
		if turn%64 == 63 { // what is late has been so for long enough
			r.q.kernel.release()
		}
		lost := 0
		if r.q.kernel.lost(r) {
			lost = 1
		}
		if len(script) == 0 && !ending && len(answers)+lost == len(r.expected) {
			ending = true
			r.q.kernel.stop()
		}
		select {
		case over = <-r.q.end:
			r.q.kernel.release()
			r.disk.release(1 << 20) // answers that come after the end
			r.disk.runs.Wait()
			collect()
			r.compare(answers, over)
			return over
		case <-time.After(20 * time.Microsecond):
		}
		if time.Since(began) > testwatch.Long {
			r.t.Fatalf("the loop does not end: %d of %d answered\n%s", len(answers), len(r.expected), testwatch.Stacks())
		}
	}
}

// lost reports whether the fault took a request back.
func (k *fakeKernel) lost(r *ringRun) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	return r.fired && r.want == loses
}

// give dispatches a request if a tag is idle.
func (r *ringRun) give(c [3]byte) bool {
	before := len(r.expected)
	r.code = c[:]
	r.request()
	return len(r.expected) > before
}

// compare checks the answers.
func (r *ringRun) compare(answers map[uint64][]fakeResult, over error) {
	failed, missing, planned := 0, 0, false
	for sector, want := range r.expected {
		got := answers[sector]
		planned = planned || want == -int32(r.errno)
		switch {
		case len(got) > 1:
			r.t.Errorf("the request at sector %d was answered %d times", sector, len(got))
		case len(got) == 0:
			missing++
		case got[0].res != want && r.want == failsOne && got[0].res == -int32(r.errno):
			failed++
		case got[0].res != want, want > 0 && got[0].bad:
			r.t.Errorf("the request at sector %d was answered with %d, want %d (wrong content: %v)", sector, got[0].res, want, got[0].bad)
		}
	}
	switch {
	case r.want == failsOne && failed != 1 && !(failed == 0 && planned): // it may have hit one that fails anyway
		r.t.Errorf("%d requests failed", failed)
	case r.want == loses && missing != 1, r.want < loses && missing != 0:
		r.t.Errorf("%d requests were not answered", missing)
	}
}

// check compares the end of the queue with the fault.
func (r *ringRun) check(err error) {
	k := r.q.kernel
	k.mu.Lock()
	defer k.mu.Unlock()
	switch {
	case r.want != breaks && err != nil:
		r.t.Errorf("the queue ended with %v", err)
	case r.want == breaks && !errors.Is(err, r.errno):
		r.t.Errorf("the queue ended with %v, want %v", err, r.errno)
	case !k.closed:
		r.t.Error("the ring is open")
	case err == nil && (r.q.owned != 0 || r.q.reading != 0 || !r.q.starved.empty()):
		r.t.Errorf("%d requests and %d reads are open", r.q.owned, r.q.reading)
	}
	if err == nil && r.q.pool != nil {
		r.q.pool.drop()
		if r.q.pool.lent != 0 || r.q.pool.have != 0 {
			r.t.Errorf("the pool has %d chunks, and has lent %d pieces", r.q.pool.have, r.q.pool.lent)
		}
	}
}
