package e2e

import (
	"net"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"
)

// TestServiceManager: a daemon under systemd tells it when the store is open (sd_notify(3)), also after an upgrade, and
// that it stops.
func TestServiceManager(t *testing.T) {
	s := newStore(t)
	s.run("create", "v", "--size", "1M")
	path := filepath.Join(t.TempDir(), "notify")
	l, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	told := func(want string) {
		t.Helper()
		if err := l.SetReadDeadline(time.Now().Add(time.Minute)); err != nil {
			t.Fatal(err)
		}
		b := make([]byte, 256)
		n, err := l.Read(b)
		if err != nil || string(b[:n]) != want {
			t.Fatalf("told %q, want %q (%v)", b[:n], want, err)
		}
	}
	daemon := s.command("daemon")
	daemon.Env = append(daemon.Env, "NOTIFY_SOCKET="+path)
	daemon.Stderr = os.Stderr
	if err := daemon.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = daemon.Process.Kill() }) // of a test that failed; else it is gone
	told("READY=1")
	s.run("upgrade")
	told("READY=1")
	if err := daemon.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	told("STOPPING=1")
	if err := daemon.Wait(); err != nil {
		t.Error(err)
	}
}
