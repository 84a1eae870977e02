package owner

import (
	"context"
	"errors"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vdisk/vdisk/cow"
	"github.com/vdisk/vdisk/internal/localhttp"
	"github.com/vdisk/vdisk/internal/storage"
	"github.com/vdisk/vdisk/internal/testwatch"
)

// dialPath connects to the socket at path.
func dialPath(ctx context.Context, path string) (net.Conn, error) {
	in, err := storage.OpenFolder(filepath.Dir(path), true)
	if err != nil {
		return nil, err
	}
	defer in.Close()
	c, err := dial(ctx, in, filepath.Base(path))
	if err != nil {
		return nil, err
	}
	return c, nil
}

// asNobody calls f as another user, on a thread that is not used again.
func asNobody(t *testing.T, f func()) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("only root can become another user")
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread()
		if _, _, e := unix.RawSyscall(unix.SYS_SETRESUID, 65534, 65534, 65534); e != 0 {
			t.Error("becoming nobody:", e)
			return
		}
		f()
	}()
	<-done
}

// reachable makes a test's folder accessible to all users.
func reachable(t *testing.T, dir string) {
	t.Helper()
	for range 3 { // newStore's folder, and two of t.TempDir
		if err := os.Chmod(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		dir = filepath.Dir(dir)
	}
}

// A process of another user that listens in a store's folder is not trusted, and gets no request.
func TestForeignOwnerIsRefused(t *testing.T) {
	dir := newStore(t)
	reachable(t, dir)
	if err := os.Chmod(dir, 0o777); err != nil {
		t.Fatal(err)
	}
	var l net.Listener
	asNobody(t, func() {
		var err error
		if l, err = net.Listen("unix", filepath.Join(dir, controlName)); err != nil {
			t.Error(err)
		}
	})
	if t.Failed() {
		t.FailNow()
	}
	defer l.Close()
	if err := os.Chmod(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	heard := make(chan int, 1)
	go func() {
		c, err := l.Accept()
		if err != nil {
			heard <- -1
			return
		}
		defer c.Close()
		b, _ := io.ReadAll(c)
		heard <- len(b)
	}()
	for _, foreign := range []bool{false, true} { // in a folder of ours, nobody's process is nobody's
		if _, err := Open(t.Context(), dir, Options{Foreign: foreign}); !errors.Is(err, cow.ErrForeign) {
			t.Errorf("foreign %v: %v", foreign, err)
		}
		if _, _, err := OpenLasting(t.Context(), dir, Options{Foreign: foreign}, nil); !errors.Is(err, cow.ErrForeign) {
			t.Errorf("foreign %v: %v", foreign, err)
		}
	}
	if n := <-heard; n != 0 {
		t.Errorf("it was told %d bytes", n)
	}
}

// A process of another user that can connect to the control socket is not served.
func TestForeignClientIsRefused(t *testing.T) {
	dir := newStore(t)
	offer(t, dir)
	reachable(t, dir)
	path := filepath.Join(dir, controlName)
	if err := os.Chmod(path, 0o666); err != nil {
		t.Fatal(err)
	}
	ask := func() error {
		c, err := net.Dial("unix", path)
		if err != nil {
			return err
		}
		defer c.Close()
		if _, err := io.WriteString(c, "POST /v1/status HTTP/1.1\r\nHost: vdisk\r\nContent-Length: 2\r\n\r\n{}"); err != nil {
			return err
		}
		_, err = io.ReadFull(c, make([]byte, 12))
		return err
	}
	if err := ask(); err != nil {
		t.Fatal("its own user:", err)
	}
	var err error
	asNobody(t, func() { err = ask() })
	if !errors.Is(err, io.EOF) && !errors.Is(err, unix.ECONNRESET) && !errors.Is(err, unix.EPIPE) {
		t.Error("nobody:", err)
	}
}

// TestSocketIsPrivate: only its owner may connect to a socket. An NBD server asks nobody who it is.
func TestSocketIsPrivate(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	l, remove, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	defer remove()
	defer l.Close()
	if st, err := os.Stat(path); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("the socket has the mode %v (%v)", st.Mode(), err)
	}
}

// TestRemoveLeavesOthers: an owner that ends late leaves the socket of the next one.
func TestRemoveLeavesOthers(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	l, remove, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	_ = l.Close()
	next, removeNext, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	defer next.Close()
	remove()
	if _, err := os.Stat(path); err != nil {
		t.Error("the socket of the next owner is gone: ", err)
	}
	removeNext()
	if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
		t.Error("an owner leaves its socket: ", err)
	}
}

// If many processes want the name of a dead process's socket, one of them gets it, and can be reached until it ends.
func TestListenTogether(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	for range 20 {
		if l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"}); err != nil {
			t.Fatal(err)
		} else {
			l.SetUnlinkOnClose(false)
			_ = l.Close()
		}
		var mu sync.Mutex // guards won and remove
		var won []*net.UnixListener
		var removes []func()
		var wg sync.WaitGroup
		for range 8 {
			wg.Go(func() {
				l, remove, err := Listen(path)
				mu.Lock()
				defer mu.Unlock()
				switch {
				case err == nil:
					won, removes = append(won, l), append(removes, remove)
				case !errors.Is(err, os.ErrExist):
					t.Error(err)
				}
			})
		}
		wg.Wait()
		if len(won) != 1 {
			t.Fatalf("%d listen", len(won))
		}
		c, err := dialPath(t.Context(), path)
		if err != nil {
			t.Fatal(err)
		}
		got, err := won[0].Accept()
		if err != nil {
			t.Fatal(err)
		}
		_ = errors.Join(c.Close(), got.Close(), won[0].Close())
		removes[0]()
		if in, err := os.ReadDir(filepath.Dir(path)); err != nil || len(in) > 0 {
			t.Fatal(in, err)
		}
	}
}

// failingAccept is a listener whose first accept fails.
type failingAccept struct {
	net.Listener
	err error
}

func (l *failingAccept) Accept() (net.Conn, error) {
	if err := l.err; err != nil {
		l.err = nil
		return nil, localhttp.AcceptError(&net.OpError{Op: "accept", Net: "unix", Err: os.NewSyscallError("accept4", err)})
	}
	return l.Listener.Accept()
}

// TestFaultAtAcceptOfControl: an http.Server goes on after an error of accept that passes, as too many open files or no
// memory, and ends after another one.
func TestFaultAtAcceptOfControl(t *testing.T) {
	for errno, passes := range map[syscall.Errno]bool{
		syscall.EMFILE: true, syscall.ENFILE: true, syscall.ENOMEM: true, syscall.ENOBUFS: true, syscall.EBADF: false,
	} {
		l, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
		if err != nil {
			t.Fatal(err)
		}
		s := &http.Server{Handler: http.NotFoundHandler(), ErrorLog: log.New(io.Discard, "", 0)}
		ended := make(chan error, 1)
		go func() { ended <- s.Serve(&failingAccept{l, errno}) }()
		if !passes {
			if err := testwatch.Wait(t, testwatch.Long, "Serve", ended); !errors.Is(err, errno) {
				t.Errorf("%v: Serve returned %v", errno, err)
			}
			continue
		}
		c, err := net.Dial("unix", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		_ = c.SetDeadline(time.Now().Add(testwatch.Long))
		_, werr := io.WriteString(c, "GET / HTTP/1.0\r\n\r\n")
		answer, rerr := io.ReadAll(c)
		if werr != nil || rerr != nil || len(answer) == 0 {
			t.Errorf("%v: no answer: %v, %v", errno, werr, rerr)
		}
		_, _ = c.Close(), s.Close()
		_ = testwatch.Wait(t, testwatch.Long, "Serve", ended)
	}
}
