package owner

import (
	"context"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/vdisk/vdisk/cow"
	"github.com/vdisk/vdisk/format"
	"github.com/vdisk/vdisk/internal/nbdclient"
)

// daemons returns a function that opens a machine's store as a daemon does, with what the one before has handed over. Its
// upgrades go to a program that only says what it is.
func daemons(t *testing.T, w *fakeMachine) func(*Handover) *Owner {
	opts := w.options(true)
	opts.Replaceable, opts.Starts = true, true
	opts.program = program(t, fmt.Sprintf(`echo '{"version":"2.0","store_format":%d,"handover":1,"handover_nbd":1}'`, format.StoreVersion))
	return func(h *Handover) *Owner {
		o := opts
		o.Handed = h
		s, err := Own(context.Background(), w.dir, o)
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
}

// handOver upgrades a daemon, and returns what the next one gets.
func handOver(t *testing.T, o *Owner) *Handover {
	t.Helper()
	if _, err := o.Upgrade(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := o.CloseWhenDone(); err != nil {
		t.Fatal(err)
	}
	return o.Successor().Undone("1.0")
}

// TestHandedClientsAreHeld: from the moment when others can use the store, nobody gets what a client that was handed over
// has open; and no upgrade begins before all services go on, which would lose them.
func TestHandedClientsAreHeld(t *testing.T) {
	w := newFakeMachine(t)
	own := daemons(t, w)
	o := own(nil)
	if _, err := o.Upgrade(t.Context()); !errors.Is(err, errStopping) {
		t.Error("an upgrade while the owner starts", err)
	}
	o.GoOn(nil)
	path := filepath.Join(t.TempDir(), "s")
	l, _, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	o.ServeOwn(l, ServeOptions{Socket: path}, func() {})
	to := cow.Ref{Volume: "v", Snapshot: "s"}
	if err := o.Snapshot(t.Context(), to); err != nil {
		t.Fatal(err)
	}
	c, err := nbdclient.Dial(path, "v")
	if err != nil {
		t.Fatal(err)
	}
	text := []byte("what the client wrote")
	text = append(text, make([]byte, 4096-len(text))...)
	if err := c.Write(text, 0, 0); err != nil {
		t.Fatal(err)
	}
	h := handOver(t, o)
	o = own(h)
	if err := o.Rollback(t.Context(), to); !errors.Is(err, cow.ErrBusy) {
		t.Error("a rollback under a client that is handed over:", err)
	}
	if _, err := o.exports.acquireAsWas(cow.Ref{Volume: "v"}, client{process: process{1, "1"}}, nil, false); !errors.Is(err, cow.ErrBusy) {
		t.Error("another writer:", err)
	}
	if s, err := o.Status(t.Context()); err != nil || !s.Starting {
		t.Error("the owner has started", err)
	}
	if _, err := o.Upgrade(t.Context()); !errors.Is(err, errStopping) {
		t.Error("an upgrade before the clients go on:", err)
	}
	o.GoOn(h)
	h.Done()
	got := make([]byte, len(text))
	if _, err := c.ReadAt(got, 0); err != nil || string(got) != string(text) {
		t.Errorf("%v, %.30q", err, got)
	}
	if s, err := o.Status(t.Context()); err != nil || s.Starting || len(s.Services) != 1 || s.Services[0].Clients != 1 {
		t.Errorf("%v, %+v", err, s)
	}
	if err := c.Close(); err != nil {
		t.Error(err)
	}
	o.wait(func() bool { return o.services[0].listener.open.Load() == 0 })
	if err := o.Rollback(t.Context(), to); err != nil {
		t.Error("nothing is held any more:", err)
	}
	o.kill()
	w.close(o)
}

// TestUnreadHandover: a hand-over that cannot be read fails the start if the program before can go on with it, and
// otherwise ends its connections.
func TestUnreadHandover(t *testing.T) {
	w := newFakeMachine(t)
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(pair[0])
	fd, err := unix.MemfdCreate("test", unix.MFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := unix.Write(fd, []byte(`{"Services":[`)); err != nil {
		t.Fatal(err)
	}
	was := startedFrom
	defer func() { startedFrom = was }()
	t.Setenv(handoverEnv, fmt.Sprintf(`{"From":"1.0","NBD":%d}`, fd))
	h := TakeHandover()
	if _, err := unix.FcntlInt(uintptr(pair[1]), unix.F_SETFD, 0); err != nil { // as another program leaves it
		t.Fatal(err)
	}
	opts := w.options(true)
	opts.Handed = h
	h.Back = 1 << 20
	if _, err := Own(t.Context(), w.dir, opts); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Fatal(err)
	}
	h.Back = 0
	o, err := Own(context.Background(), w.dir, opts)
	if err != nil {
		t.Fatal(err)
	}
	o.GoOn(h)
	if n, err := unix.Read(pair[0], make([]byte, 1)); n != 0 || err != nil {
		t.Errorf("%d, %v from a client's connection", n, err)
	}
	w.close(o)
}
