package owner

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/vdisk/vdisk/cow"
	"github.com/vdisk/vdisk/internal/nbdclient"
	"github.com/vdisk/vdisk/nbd"
)

// connectTo makes the program of the tests only connect to that socket (TestMain).
const connectTo = "VDISK_TEST_CONNECT"

// connectAndEnd connects twice to a socket, gives the connections to the process at the other end of descriptor 3, and
// returns the exit status.
func connectAndEnd(path string) int {
	to := unix.SockaddrUnix{Name: path}
	var fds []int
	var err error
	for range 2 {
		fd, serr := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM, 0)
		err = errors.Join(err, serr, unix.Connect(fd, &to))
		fds = append(fds, fd)
	}
	if err = errors.Join(err, unix.Sendmsg(3, []byte{0}, unix.UnixRights(fds...), nil, 0)); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

// orphans returns two connections to a socket that were made by a process which has ended.
func orphans(t *testing.T, path string) (conns []net.Conn) {
	t.Helper()
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	theirs := os.NewFile(uintptr(pair[1]), "theirs")
	child := exec.Command(os.Args[0])
	child.Env, child.ExtraFiles, child.Stderr = append(os.Environ(), connectTo+"="+path), []*os.File{theirs}, os.Stderr
	err = child.Run()
	rights := make([]byte, unix.CmsgSpace(2*4))
	_, n, _, _, rerr := unix.Recvmsg(pair[0], make([]byte, 1), rights, unix.MSG_CMSG_CLOEXEC)
	if err := errors.Join(err, rerr, theirs.Close(), unix.Close(pair[0])); err != nil {
		t.Fatal(err)
	}
	messages, err := unix.ParseSocketControlMessage(rights[:n])
	if err != nil {
		t.Fatal(err)
	}
	fds, err := unix.ParseUnixRights(&messages[0])
	if err != nil {
		t.Fatal(err)
	}
	for _, fd := range fds {
		f := os.NewFile(uintptr(fd), "orphan")
		c, err := net.FileConn(f)
		if err := errors.Join(err, f.Close()); err != nil {
			t.Fatal(err)
		}
		conns = append(conns, c)
	}
	return conns
}

// TestOrphansGoOn: a process that made two connections has ended, and others have them, as the kernel has those of
// nbd-client. Both write, and an upgrade hands both over.
func TestOrphansGoOn(t *testing.T) {
	w := newFakeMachine(t)
	own := daemons(t, w)
	o := own(nil)
	o.GoOn(nil)
	path := filepath.Join(t.TempDir(), "s")
	l, _, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	o.ServeOwn(l, ServeOptions{Socket: path}, func() {})
	if _, err := o.Volumes(t.Context()); err != nil {
		t.Fatal(err)
	}
	var clients []*nbdclient.Client
	for _, c := range orphans(t, path) {
		d, err := nbdclient.Over(c, "v")
		if err != nil {
			t.Fatal(err)
		}
		clients = append(clients, d)
	}
	for round := range 3 {
		for i, c := range clients {
			text := make([]byte, 4096)
			copy(text, fmt.Sprint(round, i))
			if err := c.Write(text, int64(i)*4096, 0); err != nil {
				t.Errorf("connection %d after %d upgrades: %v", i, round, err)
			}
			got := make([]byte, len(text))
			if _, err := clients[1-i].ReadAt(got, int64(i)*4096); err != nil || string(got) != string(text) {
				t.Errorf("connection %d after %d upgrades: %v, %.10q", 1-i, round, err, got)
			}
		}
		if other, err := nbdclient.Dial(path, "v"); err != nil {
			t.Error(err)
		} else {
			if err := other.Write(make([]byte, 4096), 0, 0); err == nil {
				t.Errorf("another process writes, too, after %d upgrades", round)
			}
			_ = other.Close()
		}
		h := handOver(t, o)
		o = own(h)
		if _, err := o.exports.acquireAsWas(cow.Ref{Volume: "v"}, client{process: thisProcess()}, nil, false); !errors.Is(err, cow.ErrBusy) {
			t.Errorf("another writer while the connections are held: %v", err)
		}
		o.GoOn(h)
		h.Done()
	}
	for _, c := range clients {
		_ = c.Close()
	}
	o.wait(func() bool { return o.services[0].listener.open.Load() == 0 })
	if err := o.Snapshot(t.Context(), cow.Ref{Volume: "v", Snapshot: "s"}); err != nil {
		t.Error(err)
	}
	o.kill()
	w.close(o)
}

// TestCommandOfAnOrphan: a process that made a connection has ended, and another one has its number now.
func TestCommandOfAnOrphan(t *testing.T) {
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	mine, err := net.Dial("unix", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer mine.Close()
	c, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	for _, x := range []struct {
		by    process
		known bool
	}{{process{}, true}, {thisProcess(), true}, {process{os.Getpid(), "1"}, false}} {
		d := new(service).describe(nbd.Client{Conn: &countedUnixConn{c.(*net.UnixConn), connection{by: x.by}}})
		if d.PID != os.Getpid() || (d.Command != "") != x.known {
			t.Errorf("made by %v: %d, %q", x.by, d.PID, d.Command)
		}
	}
}
