package faulty

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// once returns a judge of the calls on a file: the first one of a name has a fault.
func once(path, name string, f Fault) Judge {
	return func(c Call) Fault {
		if c.Path != path || c.Name != name {
			return Fault{}
		}
		path = ""
		return f
	}
}

func TestRun(t *testing.T) {
	path := filepath.Join(t.TempDir(), "f")
	if err := os.WriteFile(path, []byte("abcdefgh"), 0o600); err != nil {
		t.Fatal(err)
	}
	var n int
	p := make([]byte, 8)
	for _, c := range []struct {
		name string
		f    Fault
		do   func(fd int) error
		want error
		n    int
		file string
	}{
		{"read", Fault{Err: unix.EIO}, func(fd int) (err error) { n, err = unix.Pread(fd, p, 0); return err }, unix.EIO, -1, "abcdefgh"},
		{"read", Fault{Half: true}, func(fd int) (err error) { n, err = unix.Read(fd, p); return err }, nil, 4, "abcdefgh"},
		{"write", Fault{Half: true}, func(fd int) (err error) { n, err = unix.Pwrite(fd, []byte("1234"), 2); return err }, nil, 2, "ab12efgh"},
		{"write", Fault{Half: true, Err: unix.EINTR}, func(fd int) (err error) { n, err = unix.Write(fd, []byte("5678")); return err }, unix.EINTR, -1, "5612efgh"},
		{"sync", Fault{Err: unix.ENOSPC}, unix.Fdatasync, unix.ENOSPC, -1, "5612efgh"},
		{"sync", Fault{}, unix.Fsync, nil, -1, "5612efgh"},
	} {
		var got error
		n = -1
		err := Run(once(path, c.name, c.f), func() {
			fd, err := unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC, 0)
			if err != nil {
				got = err
				return
			}
			got = c.do(fd)
			_ = unix.Close(fd)
		})
		text, rerr := os.ReadFile(path)
		if err != nil || rerr != nil || !errors.Is(got, c.want) || n != c.n || string(text) != c.file {
			t.Errorf("%s with %+v: %v; the call: %d, %v; the file has %s, %v", c.name, c.f, err, n, got, text, rerr)
		}
		if c.n > 0 && c.name == "read" && string(p[:n]) != "abcd" {
			t.Errorf("read %q", p[:n])
		}
	}
}

// TestRunWaits lets a call wait, and its process do other things.
func TestRunWaits(t *testing.T) {
	path := filepath.Join(t.TempDir(), "f")
	release, opened := make(chan struct{}), make(chan error, 1)
	asked := make(chan struct{})
	go func() {
		opened <- Run(func(c Call) Fault {
			if c.Path != path || c.Name != "create" {
				return Fault{}
			}
			close(asked)
			return Fault{Wait: release}
		}, func() { _ = os.WriteFile(path, nil, 0o600) })
	}()
	<-asked
	if _, err := os.Stat(path); err == nil {
		t.Error("it did not wait")
	}
	close(release)
	if err := <-opened; err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(path); err != nil {
		t.Error(err)
	}
}

func TestStart(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "f")
	for _, c := range []struct {
		f     Fault
		fails bool
		file  string
	}{
		{Fault{}, false, "hello\n"},
		{Fault{Err: syscall.ENOSPC}, true, ""},
		{Fault{Half: true}, false, "hello\n"}, // the shell goes on with the rest
	} {
		var text strings.Builder
		cmd := exec.Command("sh", "-c", "echo hello > "+path)
		cmd.Stderr = &text
		wait, err := Start(cmd, once(path, "write", c.f))
		if err != nil {
			t.Fatal(err)
		}
		err = wait()
		got, rerr := os.ReadFile(path)
		if (err != nil) != c.fails || string(got) != c.file {
			t.Errorf("%+v: %v, %s; the file has %q, %v", c.f, err, text.String(), got, rerr)
		}
	}
	wait, err := Start(exec.Command(filepath.Join(dir, "none")), func(Call) Fault { return Fault{} })
	if err != nil {
		t.Fatal(err)
	}
	if wait() == nil {
		t.Error("a program that is not there was started")
	}
}
