package storage

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"testing"

	"golang.org/x/sys/unix"
)

func openFolder(t *testing.T, path string) *Folder {
	t.Helper()
	d, err := OpenFolder(path, true)
	must(t, err)
	t.Cleanup(func() { must(t, d.Close()) })
	return d
}

// TestFolderFollowsNothing checks that nothing in the place of a file can lead to another file, or make the process
// wait.
func TestFolderFollowsNothing(t *testing.T) {
	path := t.TempDir()
	must(t, os.Chmod(path, 0o700))
	d := openFolder(t, path)
	outside := filepath.Join(t.TempDir(), "outside")
	must(t, os.WriteFile(outside, []byte("precious"), 0o600))
	put := map[string]func(name string) error{
		"link":     func(n string) error { return os.Symlink(outside, n) },
		"dangling": func(n string) error { return os.Symlink(outside+"2", n) },
		"fifo":     func(n string) error { return unix.Mkfifo(n, 0o600) },
		"folder":   func(n string) error { return os.Mkdir(n, 0o700) },
		"socket":   func(n string) error { return unix.Mknod(n, unix.S_IFSOCK|0o600, 0) },
	}
	for what, make := range put {
		must(t, make(d.Join(what)))
		for _, flags := range []int{os.O_RDONLY, os.O_RDWR | os.O_CREATE, os.O_WRONLY | os.O_CREATE | os.O_TRUNC, os.O_WRONLY | os.O_APPEND} {
			if f, err := d.Open(what, flags); !errors.Is(err, ErrIrregular) {
				t.Errorf("%s, flags %#x: %v, %v", what, flags, f, err)
			}
		}
		if _, err := d.Read(what); !errors.Is(err, ErrIrregular) {
			t.Errorf("%s: %v", what, err)
		}
		if what == "folder" {
			continue
		}
		if _, err := d.Sub(what); !errors.Is(err, ErrIrregular) {
			t.Errorf("%s as a folder: %v", what, err)
		}
		must(t, make(d.Join("new.tmp")))
		must(t, d.Replace("new", []byte(what), true))
		must(t, make(d.Join(what+"2")))
		must(t, d.Replace(what+"2", []byte(what), false))
		for _, name := range []string{"new", what + "2"} {
			if b, err := d.Read(name); string(b) != what || err != nil {
				t.Errorf("%s: %q, %v", name, b, err)
			}
		}
	}
	if b, err := os.ReadFile(outside); string(b) != "precious" || err != nil {
		t.Errorf("outside: %q, %v", b, err)
	}
	if _, err := os.Lstat(outside + "2"); !errors.Is(err, fs.ErrNotExist) {
		t.Error("made through a link:", err)
	}
	if _, err := d.Open("../outside", os.O_RDONLY); !errors.Is(err, fs.ErrInvalid) {
		t.Error(err)
	}
}

// TestFolderIsOurs checks that the owner and the mode of a folder decide whether it is opened without foreign.
func TestFolderIsOurs(t *testing.T) {
	for _, mode := range []os.FileMode{0o700, 0o755, 0o770, 0o702} {
		path := filepath.Join(t.TempDir(), "folder")
		must(t, os.Mkdir(path, 0o700))
		must(t, os.Chmod(path, mode))
		d, err := OpenFolder(path, false)
		if ours := mode&0o022 == 0; ours != (err == nil) || !ours && !errors.Is(err, ErrForeign) {
			t.Errorf("mode %o: %v", mode, err)
		}
		if err == nil {
			must(t, d.Close())
		}
		d = openFolder(t, path)
		must(t, d.Own(false))
		if again, err := OpenFolder(path, false); err != nil {
			t.Errorf("mode %o, made ours: %v", mode, err)
		} else {
			must(t, again.Close())
		}
	}
}

// TestFolderOfAnother checks what one user may open of another's.
func TestFolderOfAnother(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root can make files of other users")
	}
	base := t.TempDir()
	path := filepath.Join(base, "theirs")
	must(t, os.Mkdir(path, 0o700))
	must(t, os.Chown(path, 65534, 65534))
	if _, err := OpenFolder(path, false); !errors.Is(err, ErrForeign) {
		t.Error("root, of nobody's:", err)
	}
	d := openFolder(t, path)
	if err := d.Own(false); !errors.Is(err, ErrForeign) {
		t.Error(err)
	}
	must(t, os.WriteFile(d.Join("theirs"), nil, 0o600))
	must(t, os.Chown(d.Join("theirs"), 65534, 65534))
	must(t, os.WriteFile(d.Join("roots"), nil, 0o600))
	must(t, os.WriteFile(filepath.Join(base, "secret"), []byte("s"), 0o600))
	must(t, os.Link(filepath.Join(base, "secret"), d.Join("link")))
	must(t, os.WriteFile(d.Join("third"), nil, 0o600))
	must(t, os.Chown(d.Join("third"), 1234, 1234))
	for name, want := range map[string]error{"theirs": nil, "roots": nil, "link": ErrIrregular, "third": ErrIrregular} {
		f, err := d.Open(name, os.O_RDWR)
		if !errors.Is(err, want) {
			t.Errorf("%s: %v", name, err)
		}
		if err == nil {
			must(t, f.Close())
		}
	}
	must(t, os.Mkdir(d.Join("sub"), 0o700))
	must(t, os.Chown(d.Join("sub"), 1234, 1234))
	if _, err := d.Sub("sub"); !errors.Is(err, ErrForeign) {
		t.Error("a third user's folder:", err)
	}
	// A folder of root's is as good as one's own: root can do anything anyway.
	must(t, os.Chmod(base, 0o755))
	must(t, os.Chmod(filepath.Dir(base), 0o755))
	asNobody(t, func() {
		d, err := OpenFolder(base, false)
		if err != nil {
			t.Error("nobody, of root's:", err)
			return
		}
		must(t, d.Close())
	})
}

// asNobody calls f as another user, on a thread of its own that is not used again.
func asNobody(t *testing.T, f func()) {
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

// TestFilesForAnotherUser checks that files that root makes in a user's folder belong to that user.
func TestFilesForAnotherUser(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root can give files away")
	}
	path := t.TempDir()
	must(t, os.Chown(path, 65534, 65533))
	in, err := OpenFolder(path, true)
	must(t, err)
	defer in.Close()
	must(t, in.Replace("format", []byte("x"), true))
	sub, err := in.Sub("chunks")
	must(t, err)
	d := sub.Files()
	defer d.Close()
	f, err := d.Create("00000000", 4096)
	must(t, err)
	must(t, f.Close())
	must(t, os.WriteFile(filepath.Join(path, "lock"), nil, 0o600)) // left by an older program, run by root
	l, err := in.Open("lock", unix.O_RDWR|unix.O_CREAT)
	must(t, err)
	must(t, l.Close())
	for _, name := range []string{"format", "chunks", "chunks/00000000", "lock"} {
		var st unix.Stat_t
		must(t, unix.Lstat(filepath.Join(path, name), &st))
		if st.Uid != 65534 || st.Gid != 65533 {
			t.Errorf("%s belongs to %d:%d", name, st.Uid, st.Gid)
		}
	}
	// A file of another user, or one with a second name, is not given away.
	must(t, os.WriteFile(filepath.Join(path, "linked"), nil, 0o600))
	must(t, os.Link(filepath.Join(path, "linked"), filepath.Join(path, "other")))
	if _, err := in.Open("linked", unix.O_RDWR|unix.O_CREAT); !errors.Is(err, ErrIrregular) {
		t.Error(err)
	}
	var st unix.Stat_t
	must(t, unix.Lstat(filepath.Join(path, "linked"), &st))
	if st.Uid != 0 {
		t.Error("a file with two names was given away")
	}
}
