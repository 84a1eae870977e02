package ublk

import (
	"errors"
	"math/rand/v2"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// behaviour is what the handler does with a request of a program.
type behaviour uint8

const (
	answerNow behaviour = iota
	answerError
	answerPanic
	answerLaterFirst // Complete before ErrAsync is returned
	answerLaterElsewhere
	answerHeld // until an event releases it
	answerTwice
	answerFetch
	answerFetchError
	answerFetchPanic
	answerFetchLater
	behaviours
)

// wants returns the result of a request that the handler treats in this way.
func (b behaviour) wants(size int32) int32 {
	switch b {
	case answerError, answerFetchError:
		return -int32(syscall.ENOSPC)
	case answerPanic, answerFetchPanic:
		return -int32(syscall.EIO)
	}
	return size
}

// programDisk is the handler of a program. plan[idx] is its behaviour for the request at idx × fakeIOMax.
type programDisk struct {
	t    testing.TB
	plan [256]behaviour
	// mayFail: a fetch that fails is not a fault of the loop, and fails its request.
	mayFail bool

	mu   sync.Mutex // guards what follows
	held []*Request
	seen map[int64]bool // offsets of the requests that it was called with
	runs sync.WaitGroup // goroutines that answer
}

func (d *programDisk) planOf(r *Request) behaviour { return d.plan[r.Offset/fakeIOMax&255] }

func (d *programDisk) ServeUBLK(r *Request) error {
	want := byte(r.Offset/fakeIOMax) + 1
	d.mu.Lock()
	if d.seen[r.Offset] {
		d.t.Errorf("the request at %d was served twice", r.Offset)
	}
	d.seen[r.Offset] = true
	d.mu.Unlock()
	if r.Op == OpWrite && !allAre(r.Buf, want) {
		d.t.Errorf("the write at %d brought other bytes than %d", r.Offset, want)
	}
	b := d.planOf(r)
	if b >= answerFetch && r.Op == OpRead {
		half := r.Length / 2
		r.Fetch(1, r.Buf[:half], r.Offset)
		r.Fetch(1, r.Buf[half:], r.Offset+int64(half))
		return ErrFetch
	}
	set(r.Buf, want)
	return d.answer(r, b)
}

func (d *programDisk) FetchedUBLK(r *Request, err error) error {
	if err != nil && d.mayFail {
		return err
	}
	if err != nil || !allAre(r.Buf, byte(r.Offset/fakeIOMax)+1) {
		d.t.Errorf("the fetch at %d brought other bytes (%v)", r.Offset, err)
	}
	return d.answer(r, d.planOf(r))
}

func (d *programDisk) answer(r *Request, b behaviour) error {
	switch b {
	case answerError, answerFetchError:
		return syscall.ENOSPC
	case answerPanic, answerFetchPanic:
		panic("as planned")
	case answerLaterFirst:
		r.Complete(nil)
		return ErrAsync
	case answerLaterElsewhere, answerFetchLater:
		d.runs.Go(func() { r.Complete(nil) })
		return ErrAsync
	case answerHeld:
		d.mu.Lock()
		d.held = append(d.held, r)
		d.mu.Unlock()
		return ErrAsync
	case answerTwice:
		r.Complete(nil)
		return syscall.ENOSPC // too late
	}
	return nil
}

// release answers what is held, the youngest first.
func (d *programDisk) release(n int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for ; n > 0 && len(d.held) > 0; n-- {
		r := d.held[len(d.held)-1]
		d.held = d.held[:len(d.held)-1]
		r.Complete(nil)
	}
}

// programFile is what the fetches read: fill for every part of the disk.
var programFile = sync.OnceValue(func() []byte {
	file := make([]byte, 256*fakeIOMax)
	for i := range file {
		file[i] = byte(i/fakeIOMax) + 1
	}
	return file
})

// program is one run of FuzzLoop: a queue on the fake kernel, controlled by bytes of input.
type program struct {
	t      *testing.T
	code   []byte
	q      *fakeQueue
	disk   *programDisk
	killed bool
	ended  bool // stopped, killed or broken: there are no more requests
	leaves bool // told to leave, and not to stay after all

	mu       sync.Mutex // guards faults
	faults   []error    // of the next enters
	expected map[uint64]int32
	answered map[uint64]bool
}

func (p *program) next() byte {
	if len(p.code) == 0 {
		return 0
	}
	b := p.code[0]
	p.code = p.code[1:]
	return b
}

// FuzzLoop runs the real loop and the real transport of each mode against the fake kernel. The input chooses mode and
// depth, then requests, the handler's behaviours, and the actions of driver and kernel. Every request must be answered
// exactly once, with the right result and the right bytes; no tag is lost; the loop ends.
func FuzzLoop(f *testing.F) {
	onHost(f)
	for mode := range byte(3) {
		for _, depth := range []byte{0, 3, 39} {
			var everything []byte
			for b := range byte(behaviours) {
				for op := range byte(4) {
					everything = append(everything, 0, b, op, b*16+op)
				}
				everything = append(everything, 2, 3)
			}
			f.Add(append([]byte{mode, depth}, everything...))
			f.Add(append([]byte{mode, depth, 7, 0, 8, 0, 4, 1, 6, 0}, everything...))
			f.Add(append([]byte{mode, depth, 6, 1, 6, 2}, append(everything[:40:40], 1)...))
			f.Add(append([]byte{mode, depth}, append(everything[20:60:60], 5)...))
			f.Add(append([]byte{mode, depth}, append(everything[30:70:70], 9)...))
			f.Add(append([]byte{mode, depth}, append(everything[:60:60], 10, 0, 0, 0, 1, 1, 0, 5, 0, 1, 2, 3, 10, 1, 0, 2, 0, 3)...))
			f.Add(append([]byte{mode, depth}, append(everything[:60:60], 10, 0, 0, 0, 1, 1, 2, 3, 0, 0, 0, 3, 10, 6)...))
			f.Add(append([]byte{mode, depth}, append(everything[:60:60], 10, 7, 2, 3)...))
			rng := rand.New(rand.NewPCG(uint64(mode), uint64(depth)))
			for range 20 {
				random := []byte{mode, depth}
				for range 300 {
					random = append(random, byte(rng.Uint32()))
				}
				f.Add(random)
			}
		}
	}
	f.Fuzz(func(t *testing.T, code []byte) {
		if len(code) < 2 || len(code) > 2000 {
			return
		}
		p := &program{t: t, code: code, disk: &programDisk{t: t, seen: map[int64]bool{}}, expected: map[uint64]int32{}, answered: map[uint64]bool{}}
		mode, depth := CopyPlain+CopyMode(p.next()%3), 1+int(p.next())%40
		p.q = startFake(t, mode, depth, p.disk, func(error) {})
		p.q.holds = true
		p.q.kernel.files[1] = programFile()
		p.q.kernel.enterErr = p.fault
		go p.q.loop()
		for len(p.code) > 0 {
			p.event(p.next())
			p.collect()
		}
		p.finish()
	})
}

// event performs one instruction.
func (p *program) event(op byte) {
	k := p.q.kernel
	arg := byte(0)
	if op%12 > 0 {
		arg = p.next()
	}
	switch op % 12 {
	default:
		p.request()
	case 1:
		if arg%4 == 0 { // not at once in every program
			k.stop()
			p.ended = true
		}
	case 2:
		p.disk.release(1 + int(arg)%4)
	case 3:
		k.interrupt()
	case 4:
		k.mu.Lock()
		k.hold = arg%2 == 1
		k.mu.Unlock()
		if arg%2 == 0 {
			k.release()
		}
	case 5:
		if arg%4 == 0 {
			p.q.kill()
			p.killed, p.ended = true, true
		}
	case 6:
		p.mu.Lock()
		p.faults = append(p.faults, []error{unix.EINTR, unix.EBUSY, unix.EAGAIN}[arg%3])
		p.mu.Unlock()
	case 7:
		k.mu.Lock()
		k.takes = func(nth, n int) (int, unix.Errno) { return 1 + (nth+int(arg))%n, 0 }
		k.copyRes = shortCopies
		k.mu.Unlock()
	case 8:
		k.mu.Lock()
		k.readRes = func(nth, n int) int {
			if (nth+int(arg))%3 == 0 {
				return -int(unix.EAGAIN)
			}
			return min(n, 512*(1+nth%9))
		}
		k.mu.Unlock()
	case 9:
		if arg%4 == 0 {
			k.complete(completeIO, 0, -int32(unix.EINVAL))
			p.killed, p.ended = true, true
		}
	case 10:
		p.tell([]leave{leaveSoon, leaveNot, leaveSoon, leaveNot, leaveSoon, leaveNot, leaveNow, leaveDrop}[arg%8])
	}
}

// tell commands the queue to leave or to stay. The command to end is the last one.
func (p *program) tell(l leave) {
	if !p.leaves {
		p.q.leaveAs(l)
		p.leaves = l >= leaveNow
	}
}

func shortCopies(nth, n int) (int, error) {
	if nth%3 == 1 {
		return 0, unix.EINTR
	}
	return min(n, 512+nth%5*1000), nil
}

// request dispatches a request, if a tag is idle and the place it is for has none yet.
func (p *program) request() {
	plan, kind, size := behaviour(p.next())%behaviours, p.next(), p.next()
	idx := len(p.expected)
	if p.ended || idx > 255 {
		return
	}
	op := []Op{OpRead, OpWrite, OpFlush, OpDiscard}[kind%4]
	bytes := 512 * (1 + int(size)%(fakeIOMax/512))
	d := desc(op, 0, int64(idx)*fakeIOMax, bytes)
	p.disk.plan[idx] = plan
	want := int32(bytes)
	if op == OpFlush || op == OpDiscard {
		want = 0
	}
	p.q.kernel.mu.Lock()
	defer p.q.kernel.mu.Unlock()
	if _, ok := p.q.kernel.tryDispatch(d); ok {
		p.expected[d.startSector] = plan.wants(want)
	}
}

// fault returns the outcome of an enter. At most two in a row fail.
func (p *program) fault(nth int) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.faults) == 0 || nth%3 == 0 {
		return nil
	}
	err := p.faults[0]
	p.faults = p.faults[1:]
	return err
}

// collect checks the answers so far.
func (p *program) collect() {
	for {
		select {
		case r := <-p.q.kernel.results:
			want, ok := p.expected[r.d.startSector]
			if !ok || p.answered[r.d.startSector] || r.res != want || r.bad {
				p.t.Errorf("request %d: answered with %d, want %d (right bytes: %v, again: %v)",
					r.d.startSector<<sectorShift/fakeIOMax, r.res, want, !r.bad, p.answered[r.d.startSector])
			}
			p.answered[r.d.startSector] = true
		default:
			return
		}
	}
}

// finish ends the loop and checks that nothing is left.
func (p *program) finish() {
	p.tell(leaveNot)
	if !p.leaves {
		p.q.kernel.stop()
	}
	p.q.kernel.release()
	deadline := time.After(20 * time.Second)
	for {
		p.disk.release(1 << 20)
		select {
		case err := <-p.q.end:
			p.collect()
			p.disk.runs.Wait()
			if err != nil && !p.killed || err != nil && !errors.Is(err, errKilled) && !errors.Is(err, unix.EINVAL) {
				p.t.Errorf("the loop ended with %v", err)
			}
			p.check(err)
			p.unmap()
			return
		case <-deadline:
			p.t.Fatalf("the loop does not end: %d of %d answered", len(p.answered), len(p.expected))
		case <-time.After(100 * time.Microsecond):
			p.collect()
		}
	}
}

// unmap gives back the memory of a queue that has ended, also where a real server would leave it to the kernel. Otherwise
// a long run would come to the limit of mappings.
func (p *program) unmap() {
	p.q.queue.transport.free()
	pool := p.q.pool
	if pool == nil {
		return
	}
	pool.drop()
	for i, chunk := range pool.chunks {
		if chunk != nil { // lent when the queue was killed
			_ = unix.Munmap(chunk)
			pool.chunks[i] = nil
		}
	}
	pool.lender.leave(poolBlock(fakeIOMax))
}

// check compares the outcome of the requests with the way in which the loop ended.
func (p *program) check(err error) {
	q := p.q
	switch {
	case !p.killed && !q.left && len(p.answered) != len(p.expected):
		p.t.Errorf("%d of %d requests were answered", len(p.answered), len(p.expected))
	case !p.killed && len(p.answered) != len(p.disk.seen): // what the loop left behind, nobody has seen
		p.t.Errorf("%d requests were answered, and %d served", len(p.answered), len(p.disk.seen))
	}
	if err != nil {
		return
	}
	if q.owned != 0 || q.reading != 0 || q.queue.ended != q.depth && !q.left {
		p.t.Errorf("%d requests and %d reads open, %d tags ended", q.owned, q.reading, q.queue.ended)
	}
	if q.left && !q.kernel.stopping && q.kernel.commands() == 0 {
		p.t.Error("the driver has no command of a queue that left")
	}
}
