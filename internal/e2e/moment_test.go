package e2e

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// moments are the ways to choose when a server is killed. Most aim at a moment at which something is half done. Each
// returns when it is time.
var moments = []struct {
	name string
	wait func(t *testing.T, o *nbdOwner, r *rand.Rand)
}{
	{"at any time", func(_ *testing.T, _ *nbdOwner, r *rand.Rand) { within(r, 300*time.Millisecond) }},
	{"a chunk is made", onEvent("chunks", "", unix.IN_CREATE|unix.IN_MOVED_TO)},
	{"a chunk is removed", onEvent("chunks", "", unix.IN_DELETE|unix.IN_MOVED_FROM)},
	{"a chunk is written", onEvent("chunks", "", unix.IN_MODIFY)},
	{"the table is written", onEvent("", "meta.db", unix.IN_MODIFY)},
	{"the durable mark is written", onEvent("", "durable", unix.IN_MODIFY)},
	{"a snapshot is taken", beside("snapshot", "v@dying")},
	{"a snapshot is removed", beside("rm", "v@dying")},
	{"it cleans", beside("gc", "--waste", "5")},
	{"it recompresses", beside("gc", "--cold")},
	{"it is checked", beside("check")},
	{"it ends", func(t *testing.T, o *nbdOwner, r *rand.Rand) {
		within(r, 100*time.Millisecond)
		if err := o.cmd.Process.Signal(syscall.SIGTERM); err != nil {
			t.Error(err)
		}
		within(r, 20*time.Millisecond)
	}},
}

func within(r *rand.Rand, d time.Duration) { time.Sleep(time.Duration(r.Int64N(int64(d)))) }

// beside runs a command, and is over soon after that began.
func beside(args ...string) func(*testing.T, *nbdOwner, *rand.Rand) {
	return func(t *testing.T, o *nbdOwner, r *rand.Rand) {
		within(r, 150*time.Millisecond)
		cmd := o.s.command(append([]string{"-q"}, args...)...)
		if err := cmd.Start(); err != nil {
			t.Error(err)
			return
		}
		o.beside = cmd
		within(r, 30*time.Millisecond)
	}
}

// onEvent waits, from some time on, until a file of the store has the event. An empty name stands for every file.
func onEvent(folder, name string, mask uint32) func(*testing.T, *nbdOwner, *rand.Rand) {
	return func(t *testing.T, o *nbdOwner, r *rand.Rand) {
		within(r, 200*time.Millisecond)
		if err := awaitEvent(filepath.Join(o.s.dir, folder), name, mask, 500*time.Millisecond); err != nil {
			t.Error(err)
		}
		if r.IntN(2) == 0 { // or at once
			within(r, 2*time.Millisecond)
		}
	}
}

// awaitEvent waits for an event of inotify, but not longer than patience.
func awaitEvent(folder, name string, mask uint32, patience time.Duration) error {
	fd, err := unix.InotifyInit1(unix.IN_NONBLOCK | unix.IN_CLOEXEC)
	if err != nil {
		return err
	}
	f := os.NewFile(uintptr(fd), "inotify")
	defer f.Close()
	if _, err := unix.InotifyAddWatch(fd, folder, mask); err != nil {
		return err
	}
	if err := f.SetReadDeadline(time.Now().Add(patience)); err != nil {
		return err
	}
	for buf := make([]byte, 16<<10); ; {
		n, err := f.Read(buf)
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return nil // it did not happen, and this moment is as good as any
		}
		if err != nil {
			return err
		}
		for p := buf[:n]; len(p) >= unix.SizeofInotifyEvent; {
			e := (*unix.InotifyEvent)(unsafe.Pointer(&p[0]))
			end := unix.SizeofInotifyEvent + int(e.Len)
			if name == "" || strings.TrimRight(string(p[unix.SizeofInotifyEvent:end]), "\x00") == name {
				return nil
			}
			p = p[end:]
		}
	}
}

// killNBD kills a server of v at one of the moments, and sometimes the next one, too, while it opens the store. It
// returns how many it killed.
func killNBD(t *testing.T, o *nbdOwner, r *rand.Rand, done map[string]int) (kills int) {
	t.Helper()
	m := moments[r.IntN(len(moments))]
	m.wait(t, o, r)
	o.kill()
	if o.beside != nil { // it was cut off, or became the owner itself, and is killed as such if that takes long
		limit := time.AfterFunc(time.Duration(r.Int64N(int64(500*time.Millisecond))), func() { _ = o.beside.Process.Kill() })
		_ = o.beside.Wait()
		limit.Stop()
	}
	done[m.name]++
	kills++
	for r.IntN(4) == 0 {
		next := o.s.command("-q", "serve", "--socket", o.socket, "v")
		if err := next.Start(); err != nil {
			t.Fatal(err)
		}
		within(r, 60*time.Millisecond)
		_ = next.Process.Kill()
		_ = next.Wait() // its error is that it was killed
		done["it opens the store"]++
		kills++
	}
	return kills
}

// TestKill over NBD: see killAgain. `make kill-test KILLS=n` kills it n times.
func TestKill(t *testing.T) {
	if inGuest {
		t.Skip("TestKillUblk kills the server of a block device")
	}
	n := *kills
	if testing.Short() {
		n = max(1, n/5) // vdisk is built without the race detector, so that the long form has all of it
	}
	seed := uint64(time.Now().UnixNano())
	r := rand.New(rand.NewPCG(seed, 0))
	done := map[string]int{}
	k := &killing{t: t, s: newStore(t), start: startNBD, check: func() bool { return r.IntN(2) == 0 }, fio: func() bool { return r.IntN(4) == 0 }}
	k.s.limit = "256M" // so that chunks are small, and are made, cleaned and removed
	k.begin()
	for k.kills < n {
		k.life(func(o owner) int {
			return killNBD(t, o.(*nbdOwner), r, done)
		})
		if k.lives%5 == 0 {
			k.s.tidy(r)
		}
		if k.lives%100 == 0 {
			t.Logf("%d kills", k.kills)
		}
	}
	k.end()
	t.Logf("seed %d: %v", seed, done)
	if !t.Failed() {
		t.Logf("proof: kills over NBD: %d", k.kills)
	}
}

// tidy takes a snapshot and removes another, while nothing runs.
func (s *store) tidy(r *rand.Rand) {
	s.t.Helper()
	list := strings.Fields(s.run("ls", "-H", "-t", "snap", "-o", "name"))
	for len(list) > 3 {
		i := r.IntN(len(list))
		s.run("rm", list[i])
		list = append(list[:i], list[i+1:]...)
	}
	for i := range 10 {
		if name := fmt.Sprintf("v@t%d", i); !strings.Contains(strings.Join(list, " "), name) {
			s.run("snapshot", name)
			return
		}
	}
}

// TestKillUblk kills the server of a block device, in the guest.
func TestKillUblk(t *testing.T) {
	if !inGuest {
		t.Skip("needs ublk: the guest runs it")
	}
	n := max(1, *kills/10)
	if testing.Short() {
		n = min(n, 2)
	}
	loadDriver(t)
	always := func() bool { return true }
	k := &killing{t: t, s: newStore(t), start: startUblk, check: always, fio: always}
	k.begin()
	for i := range n {
		k.life(func(o owner) int {
			if i%3 == 0 { // some deaths come with a fresh snapshot
				k.s.run("snapshot", fmt.Sprintf("v@s%d", i))
			}
			time.Sleep(10 * time.Duration(100+i*37%400) * time.Millisecond) // everything is emulated there
			o.kill()
			return 1
		})
	}
	k.end()
}

func loadDriver(t *testing.T) {
	t.Helper()
	if out, err := exec.Command("modprobe", "ublk_drv").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
}
