package ublk

import (
	"errors"
	"strings"
	"syscall"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// TestLongMountLines: a line of mountinfo that is longer than any buffer hides neither itself nor what follows.
func TestLongMountLines(t *testing.T) {
	long := "21 1 0:30 / /merged rw - overlay overlay rw,lowerdir=" + strings.Repeat("/l:", 50000) + "/l,upperdir=/up\n"
	mountinfo := "20 1 8:1 / / rw - ext4 /dev/sda1 rw\n" + long + "22 1 259:3 / /mnt/a\\040b\\033[2J rw - ext4 /dev/ublkb0 rw\n"
	got := mountsOf(map[string]bool{"259:3": true}, mountinfo)
	if len(got) != 1 || !strings.HasPrefix(got[0], "/mnt/a b") {
		t.Errorf("mounted on %q", got)
	}
	if got := mountsOf(map[string]bool{"0:30": true}, mountinfo); len(got) != 1 || got[0] != "/merged" {
		t.Errorf("mounted on %q", got)
	}
	if got := sourcesOf("/merged/store", mountinfo); len(got) != 50002 {
		t.Errorf("%d sources of an overlay", len(got))
	}
	if got := sourcesOf("/mnt/a b\\033[2J/store", mountinfo); len(got) != 1 || got[0] != "/dev/ublkb0" {
		t.Errorf("sources %q", got)
	}
}

// TestSwapOnOthers: the swap on device 10 is none on device 1.
func TestSwapOnOthers(t *testing.T) {
	const swaps = "Filename\tType\tSize\tUsed\tPriority\n/dev/ublkb10 partition 1 0 -2\n/dev/ublkb3p2 partition 1 0 -2\n"
	for name, want := range map[string]bool{"ublkb1": false, "ublkb10": true, "ublkb3": true, "ublkb2": false} {
		if got := swapsOn(name, swaps); got != want {
			t.Errorf("%s: %v", name, got)
		}
	}
}

// TestForeignNames: what another program calls itself does not reach a terminal as it is.
func TestForeignNames(t *testing.T) {
	for _, c := range []struct{ name, want string }{
		{"sshd", "sshd"},
		{"größer \"x\"", "größer \"x\""},
		{"\x1b[2J\x1b[H", `\x1b[2J\x1b[H`},
		{"a\nb\tc\r", `a\nb\tc\r`},
		{"\u009b31m", `\u009b31m`},
		{"\xff\x9b", `\xff\x9b`},
		{"\u202egnp", `\u202egnp`},
	} {
		if got := (process{7, c.name}).String(); got != "process 7 ("+c.want+")" {
			t.Errorf("%q is shown as %s", c.name, got)
		}
	}
}

// stubbornKernel takes as many entries as it is told, and then fails.
type stubbornKernel struct {
	ring  *ring
	takes uint32
	err   error
}

func (k *stubbornKernel) enter(uint32, uint32, uint32) error {
	*k.ring.sqHead += min(k.takes, k.ring.unsubmitted())
	return k.err
}
func (k *stubbornKernel) register(int, unsafe.Pointer, int) error { return nil }
func (k *stubbornKernel) close()                                  {}

// TestBrokenSubmit: a command that could not be handed over is not handed over later, when its memory is not its own
// any more; one that the kernel has taken stays known, whatever the call said.
func TestBrokenSubmit(t *testing.T) {
	r := newFakeKernel(t, CopyPlain, 4, nil).ring
	k := &stubbornKernel{ring: r, err: unix.EBADF}
	r.kernel = k
	c := &controlRing{ring: r, pending: map[uint64]*ctrlCall{}}
	submit := func(op uint8) (uint64, error) {
		return c.submit(&ctrlCall{done: make(chan int32, 1)}, func(e *sqe) { e.opcode = op })
	}
	if _, err := submit(101); !errors.Is(err, syscall.EBADF) || len(c.pending) != 0 || r.unsubmitted() != 0 {
		t.Fatalf("%v; %d commands are pending, %d entries published", err, len(c.pending), r.unsubmitted())
	}
	k.takes, k.err = 8, nil
	id, err := submit(102)
	if err != nil || len(c.pending) != 1 || *r.sqHead != 1 {
		t.Fatalf("%v; %d commands are pending, the kernel took %d", err, len(c.pending), *r.sqHead)
	}
	if e := (*sqe)(unsafe.Pointer(&r.sqeMem[0])); e.opcode != 102 || e.userData != id {
		t.Errorf("the kernel got operation %d", e.opcode)
	}
	k.err = unix.EBADF
	if id, err := submit(103); err != nil || c.pending[id] == nil {
		t.Errorf("a command that was taken is forgotten: %v", err)
	}
}
