package ublk

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"sync/atomic"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// needNullCommands skips a test if io_uring is switched off, or if /dev/null does not answer commands. If it answers
// them, every command succeeds at once, so it acts as a driver that dispatches a request for every commit.
func needNullCommands(t testing.TB) {
	t.Helper()
	r, err := newRing(8, 16, 0)
	if err != nil {
		t.Skipf("no io_uring here: %v", err)
	}
	defer r.close()
	fd, err := unix.Open("/dev/null", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	e := r.get()
	e.opcode, e.fd = opURingCmd, int32(fd)
	for {
		if err := r.enter(1); err != nil {
			t.Fatal(err)
		}
		if _, res, ok := r.next(); ok {
			if res != 0 {
				t.Skipf("/dev/null answers no commands here: %v", unix.Errno(-res))
			}
			return
		}
	}
}

// nullQueue is a real ring on /dev/null, run on a locked thread until kill.
func nullQueue(t testing.TB, depth int, h Handler) (q *queue, end chan error) {
	t.Helper()
	needNullCommands(t)
	buf, _, err := mapAnonymous(depth * fakeIOMax)
	if err != nil {
		t.Fatal(err)
	}
	descs := make([]byte, depth*descSize)
	for tag := range depth {
		*(*ioDesc)(unsafe.Pointer(&descs[tag*descSize])) = desc(OpRead, 0, int64(tag)*8192, 4096)
	}
	fd, err := unix.Open("/dev/null", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	efd, err := unix.Eventfd(0, unix.EFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	q = newQueue(CopyPlain, 0, depth, fakeIOMax, buf, nil, h, nil)
	end = make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		p, err := newTransport(transportConfig{
			mode: CopyPlain, depth: depth, ioMax: fakeIOMax, descs: descs, buf: buf,
			char: charFiles{event: efd},
		}, fd)
		if err == nil {
			if err = q.start(p); err == nil {
				err = q.run()
			}
			p.close(false)
		}
		end <- err
	}()
	t.Cleanup(func() { _ = unix.Close(fd); _ = unix.Close(efd); _ = unix.Munmap(buf) })
	return q, end
}

func waitEnd(t testing.TB, q *queue, end chan error) {
	t.Helper()
	q.kill()
	select {
	case err := <-end:
		if !errors.Is(err, errKilled) {
			t.Fatalf("the loop ended with %v", err)
		}
	case <-time.After(10 * time.Second):
		t.Fatal("the loop does not end")
	}
}

func TestRingServesLater(t *testing.T) {
	work := make(chan *Request, 64)
	var served atomic.Int64
	enough := make(chan struct{})
	q, end := nullQueue(t, 8, handlerFunc(func(r *Request) error {
		if n := served.Add(1); n == 20000 {
			close(enough)
		} else if n > 20000 {
			return ErrAsync // never: the kill must cope
		}
		work <- r
		return ErrAsync
	}))
	for range 2 {
		go func() {
			for r := range work {
				r.Complete(nil)
			}
		}()
	}
	select {
	case <-enough:
	case <-time.After(20 * time.Second):
		t.Fatalf("stuck after %d requests", served.Load())
	}
	waitEnd(t, q, end)
	close(work)
}

func TestRingFetches(t *testing.T) {
	content := make([]byte, 64<<10)
	for i := range content {
		content[i] = byte(i >> 5)
	}
	name := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(name, content, 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var good, bad atomic.Int64
	enough := make(chan struct{})
	q, end := nullQueue(t, 8, fetchHandler{
		func(r *Request) error {
			for i := 0; i < r.Length; i += 256 { // more reads in a turn than the ring has room for
				r.Fetch(int(f.Fd()), r.Buf[i:i+256], r.Offset+int64(i))
			}
			return ErrFetch
		},
		func(r *Request, err error) error {
			if err != nil || !bytes.Equal(r.Buf, content[r.Offset:r.Offset+4096]) {
				bad.Add(1)
			}
			clear(r.Buf)
			if good.Add(1) == 2000 {
				close(enough)
			}
			return nil
		},
	})
	select {
	case <-enough:
	case <-time.After(20 * time.Second):
		t.Fatalf("stuck after %d requests", good.Load())
	}
	waitEnd(t, q, end)
	if bad.Load() > 0 {
		t.Errorf("%d of %d requests got wrong bytes", bad.Load(), good.Load())
	}
}

// TestRingSetupFallback: every flag set that a queue may end up with works.
func TestRingSetupFallback(t *testing.T) {
	runtime.LockOSThread() // a ring with one issuer refuses all other threads
	defer runtime.UnlockOSThread()
	for i := range queueSetup {
		r, err := newRing(8, 16, append([]uint32{1 << 31}, queueSetup[i:]...)...) // no kernel knows bit 31
		if err != nil {
			t.Skipf("no io_uring here: %v", err)
		}
		e := r.get()
		e.opcode, e.userData = 0, 7 // NOP
		if err := r.enter(1); err != nil {
			t.Errorf("flags %#x: %v", queueSetup[i], err)
		}
		if ud, res, ok := r.next(); !ok || ud != 7 || res != 0 {
			t.Errorf("flags %#x: completion %d %d %v", queueSetup[i], ud, res, ok)
		}
		r.close()
		r.close() // harmless
	}
}

// BenchmarkLoop measures the cost of a request without the driver: the loop, its ring, and a commit to /dev/null.
func BenchmarkLoop(b *testing.B) {
	for name, answer := range map[string]func(*Request) error{
		"inline": func(*Request) error { return nil },
		"later":  func(r *Request) error { r.Complete(nil); return ErrAsync },
	} {
		for _, depth := range []int{1, 32} {
			b.Run(fmt.Sprintf("%s/depth%d", name, depth), func(b *testing.B) {
				done := make(chan struct{})
				n := 0
				b.ReportAllocs()
				before := cpuTime()
				q, end := nullQueue(b, depth, handlerFunc(func(r *Request) error {
					if n++; n == b.N {
						close(done)
					}
					return answer(r)
				}))
				<-done
				b.StopTimer()
				b.ReportMetric(float64(cpuTime()-before)/float64(b.N), "cpu-ns/op")
				waitEnd(b, q, end)
			})
		}
	}
}

// cpuTime returns the processor time that the process has used so far.
func cpuTime() time.Duration {
	var u unix.Rusage
	_ = unix.Getrusage(unix.RUSAGE_SELF, &u)
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
