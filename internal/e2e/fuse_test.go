package e2e

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestNBDFuse puts a real file system on a volume on a machine without any network or user-space block driver: NBD
// socket, nbdfuse, loop device, mkfs, mount.
func TestNBDFuse(t *testing.T) {
	if inGuest {
		return // /dev/ublkbN is tested there
	}
	for _, path := range []string{"/dev/fuse", "/dev/loop-control"} {
		if _, err := os.Stat(path); err != nil || os.Getuid() != 0 {
			t.Skipf("needs root and %s (uid %d, %v)", path, os.Getuid(), err)
		}
	}
	s := newStore(t)
	s.run("create", "v", "--size", "300M")
	o := startNBD(s).(*nbdOwner)
	dir := t.TempDir()
	file, mount := filepath.Join(dir, "fuse", "nbd"), filepath.Join(dir, "mnt")
	sh(t, "mkdir", filepath.Dir(file), mount)

	fuse := exec.Command("nbdfuse", filepath.Dir(file), "nbd+unix:///v?socket="+o.socket)
	fuse.Stderr = os.Stderr
	if err := fuse.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = exec.Command("fusermount3", "-u", filepath.Dir(file)).Run() // fails when the test did it
		_ = fuse.Wait()
	})
	for range 500 {
		if _, err := os.Stat(file); err == nil {
			break
		}
		time.Sleep(20 * time.Millisecond)
	}
	loop := sh(t, "losetup", "-f", "--show", file)
	t.Cleanup(func() { _ = exec.Command("losetup", "-d", loop).Run() })
	sh(t, "mkfs.ext4", "-q", loop)
	sh(t, "mount", loop, mount)
	unmount := func() { sh(t, "umount", mount) }
	t.Cleanup(func() {
		if unmount != nil {
			_ = exec.Command("umount", mount).Run()
		}
	})
	sh(t, "cp", "-a", "../../ublk", "../../cow", mount)
	sh(t, "sync", "-f", mount)
	s.run("snapshot", "v@tree")
	sh(t, "diff", "-r", "../../cow", filepath.Join(mount, "cow"))
	sh(t, "rm", "-r", filepath.Join(mount, "cow"))
	unmount()
	unmount = nil
	sh(t, "e2fsck", "-fn", loop)
	sh(t, "losetup", "-d", loop)
	sh(t, "fusermount3", "-u", filepath.Dir(file))
	o.stop()

	// The snapshot has the tree that the volume lost.
	image := filepath.Join(dir, "image")
	s.run("export", "v@tree", image)
	// As after a power cut, synced data may be only in the journal, which debugfs does not read.
	if out, err := exec.Command("/usr/sbin/e2fsck", "-fp", image).CombinedOutput(); err != nil {
		var exit *exec.ExitError
		if !errors.As(err, &exit) || exit.ExitCode() != 1 { // 1: the journal was replayed
			t.Fatalf("e2fsck of the snapshot's image: %v\n%s", err, out)
		}
	}
	listing := sh(t, "debugfs", "-R", "ls -p /cow", image)
	if !strings.Contains(listing, "store.go") {
		t.Errorf("the snapshot's image lacks the tree:\n%s", listing)
	}
	s.run("check", "--read-data")
}

// sh runs a program of the system and returns what it printed.
func sh(t *testing.T, name string, args ...string) string {
	t.Helper()
	cmd := exec.Command(name, args...)
	cmd.Env = append(os.Environ(), "PATH="+os.Getenv("PATH")+":/usr/sbin:/sbin")
	if path, err := exec.LookPath("/usr/sbin/" + name); err == nil {
		cmd.Path, cmd.Err = path, nil
	}
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s%s", name, strings.Join(args, " "), err, out, stderr.String())
	}
	return strings.TrimSpace(string(out))
}
