package cow

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/vdisk/vdisk/format"
	"github.com/vdisk/vdisk/internal/storage"
)

// nobody is a user who is not root.
const nobody = 65534

// readOnlyEnv is the store for the process that TestReadOnlyStore starts; readOnlySays is what its Open has to say.
const (
	readOnlyEnv  = "VDISK_TEST_READ_ONLY"
	readOnlySays = "VDISK_TEST_READ_ONLY_SAYS"
	readOnlyBind = "VDISK_TEST_READ_ONLY_BIND"
)

// notRoot makes a store under a folder that every user can pass, as nobody's or this user's, who may read it only.
func notRoot(t *testing.T) (dir string) {
	t.Helper()
	top, err := os.MkdirTemp("", "vdisk-readonly-")
	must(t, err)
	t.Cleanup(func() {
		_ = os.Chmod(filepath.Join(top, "store"), 0o700)
		must(t, os.RemoveAll(top))
	})
	must(t, os.Chmod(top, 0o755))
	dir = filepath.Join(top, "store")
	must(t, Create(dir))
	return dir
}

// withhold takes away the right to change a store.
func withhold(t *testing.T, dir string) {
	t.Helper()
	if os.Geteuid() == 0 {
		must(t, filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
			return errors.Join(err, os.Lchown(path, nobody, nobody))
		}))
	}
	must(t, os.Chmod(dir, 0o500))
}

// stateOf is what is in a store's folder.
func stateOf(t *testing.T, dir string) string {
	t.Helper()
	var text strings.Builder
	must(t, filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		fmt.Fprintln(&text, path, info.Mode(), info.Size(), info.ModTime())
		if d.Type().IsRegular() {
			b, err := os.ReadFile(path)
			fmt.Fprintf(&text, "%x\n", sha256.Sum256(b))
			return err
		}
		return nil
	}))
	return text.String()
}

// content7 is what the test's volume holds.
func content7() []byte { return randomBytes(3<<20, 7) }

// unclean fills a store whose last owner neither made a checkpoint of all nor closed it.
func unclean(t *testing.T, dir string, o Options) {
	t.Helper()
	s := open(t, dir, o)
	_, err := s.CreateVolume("v", VolumeOptions{Size: 8 << 20, Codec: format.Raw})
	must(t, err)
	d, err := s.OpenDevice(Ref{Volume: "v"}, false)
	must(t, err)
	_, err = d.WriteAt(content7()[:2<<20], 0)
	must(t, err)
	must(t, s.Snapshot(Ref{"v", "a"}))
	must(t, s.Checkpoint())
	_, err = d.WriteAt(content7()[2<<20:], 2<<20)
	must(t, err)
	must(t, s.Snapshot(Ref{"v", "b"}))
	must(t, d.Flush())
	s.abandon(t)
}

// readerProcess runs this test once more, as a process that may not write to the store.
func readerProcess(t *testing.T, dir, says string, bind bool) {
	t.Helper()
	cmd := exec.Command("/proc/self/exe", "-test.run=^TestReadOnlyStore$", "-test.v")
	cmd.Env = append(os.Environ(), readOnlyEnv+"="+dir, readOnlySays+"="+says)
	cmd.Dir = "/"
	switch {
	case bind:
		cmd.Env = append(cmd.Env, readOnlyBind+"=1")
		cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS}
	case os.Geteuid() == 0:
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
	}
	out, err := cmd.CombinedOutput()
	if err != nil || !bytes.Contains(out, []byte("--- PASS: TestReadOnlyStore")) {
		t.Errorf("%v\n%s", err, out)
	}
}

// A store that cannot be written to is read, with all that its last owner made durable, and nothing in it changes.
func TestReadOnlyStore(t *testing.T) {
	if dir := os.Getenv(readOnlyEnv); dir != "" {
		if os.Getenv(readOnlyBind) != "" {
			must(t, unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""))
			must(t, unix.Mount(dir, dir, "", unix.MS_BIND, ""))
			must(t, unix.Mount("", dir, "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY, ""))
		}
		readOnly(t, dir, os.Getenv(readOnlySays))
		return
	}
	for name, bind := range map[string]bool{"folder": false, "file system": true} {
		t.Run(name, func(t *testing.T) {
			if bind && os.Geteuid() != 0 {
				t.Skip("mounting needs root; the other case is the same to the engine")
			}
			for _, lock := range []bool{true, false} {
				dir := notRoot(t)
				unclean(t, dir, Options{checkpointInterval: -1, chunkBytes: 1 << 20})
				if !lock {
					must(t, os.Remove(filepath.Join(dir, lockFile)))
				}
				if !bind {
					withhold(t, dir)
				}
				before := stateOf(t, dir)
				readerProcess(t, dir, "", bind)
				if after := stateOf(t, dir); after != before {
					t.Errorf("reading changed the store:\n%s\n%s", before, after)
				}
			}
		})
	}
	t.Run("left in memory", func(t *testing.T) {
		dir := notRoot(t)
		shared := filepath.Join(filepath.Dir(dir), "shm")
		must(t, os.Mkdir(shared, 0o755))
		unclean(t, dir, Options{checkpointInterval: -1, chunkBytes: 1 << 20, Outlive: true, SharedMemory: shared})
		withhold(t, dir)
		before := stateOf(t, dir)
		readerProcess(t, dir, "was killed", false)
		if after := stateOf(t, dir); after != before {
			t.Errorf("refusing changed the store:\n%s\n%s", before, after)
		}
	})
	t.Run("owner", func(t *testing.T) {
		dir := notRoot(t)
		s := open(t, dir, Options{checkpointInterval: -1})
		withhold(t, dir)
		readerProcess(t, dir, "in use by pid", false)
		must(t, s.Close())
	})
}

// readOnly is what a process finds that may not write to the store that unclean made.
func readOnly(t *testing.T, dir, says string) {
	o := Options{checkpointInterval: -1, AllowReadOnly: true, SharedMemory: filepath.Join(filepath.Dir(dir), "shm")}
	if _, err := Open(dir, Options{}); !errors.Is(err, ErrReadOnly) || errors.Is(err, ErrCorrupt) {
		t.Errorf("open to write: %v", err)
	}
	s, err := Open(dir, o)
	if says != "" {
		if err == nil || !strings.Contains(err.Error(), says) || errors.Is(err, ErrCorrupt) {
			t.Errorf("open: %v, want %q", err, says)
		}
		return
	}
	must(t, err)
	if err := s.ReadOnly(); !errors.Is(err, ErrReadOnly) {
		t.Errorf("it can be written to: %v", err)
	}
	must(t, open(t, dir, o).Close()) // another reader

	for _, r := range []Ref{{Volume: "v"}, {"v", "b"}} {
		d, err := s.OpenDevice(r, true)
		must(t, err)
		got := make([]byte, 3<<20)
		if _, err := d.ReadAt(got, 0); err != nil || !bytes.Equal(got, content7()) {
			t.Errorf("%v: %v", r, err)
		}
		must(t, d.Flush())
		if err := d.Discard(0, 4096); !errors.Is(err, ErrReadOnly) {
			t.Error("discard:", err)
		}
		must(t, d.Close())
	}
	rep, err := s.Check(context.Background(), CheckOptions{ReadData: true}, func(p Problem) { t.Errorf("%+v", p) })
	if err != nil || rep.DataBytes < 2<<20 {
		t.Errorf("check: %+v, %v", rep, err)
	}
	if us, err := s.Usage(context.Background()); err != nil || len(us) != 2 { // as of the last checkpoint: it has a
		t.Errorf("usage: %+v, %v", us, err)
	}
	if in := s.Info(); in.Volumes != 1 || in.Snapshots != 2 {
		t.Errorf("%+v", in)
	}
	d, err := s.OpenDevice(Ref{"v", "a"}, true)
	must(t, err)
	for what, call := range calls(s, d, d) {
		switch what {
		case "volume", "check", "usage", "close", "device read", "device try", "device plan", "device extents",
			"device flush", "device close", "snapshot read", "snapshot closed":
			continue
		}
		if err := within(t, what, call); !errors.Is(err, ErrReadOnly) || errors.Is(err, ErrFailed) {
			t.Errorf("%s: %v", what, err)
		}
	}
	must(t, errors.Join(d.Close(), s.Close()))
	if err := s.Snapshot(Ref{"v", "z"}); err == nil {
		t.Error("a snapshot after Close")
	}
}

// Those who read a store keep a writer away, who is told of what kind they are, and are kept away by one.
func TestReadersAndWriterExclude(t *testing.T) {
	dir := setup(t, 1<<20, format.Raw)
	in, err := storage.OpenFolder(dir, false)
	must(t, err)
	defer in.Close()
	first, err := lockToRead(in, 0)
	must(t, err)
	second, err := lockToRead(in, 0)
	must(t, err)
	var locked *LockedError
	if _, err := Open(dir, Options{}); !errors.As(err, &locked) || !strings.Contains(locked.Holder, "reads it") {
		t.Error(err)
	}
	must(t, errors.Join(first.Close(), second.Close()))
	s := open(t, dir, Options{Holder: "a test"})
	if _, err := lockToRead(in, 0); !errors.As(err, &locked) || !strings.Contains(locked.Holder, "a test") {
		t.Error(err)
	}
	must(t, s.Close())
}
