package cow

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/vdisk/vdisk/format"
)

// failTableSync lets all that this process writes to the file go nowhere, and its syncs fail, until undo is called.
func failTableSync(t *testing.T, path string) (undo func()) {
	t.Helper()
	names, err := os.ReadDir("/proc/self/fd")
	must(t, err)
	fd := -1
	for _, n := range names {
		if to, err := os.Readlink(filepath.Join("/proc/self/fd", n.Name())); err == nil && to == path {
			fd = 0
			for _, d := range n.Name() {
				fd = 10*fd + int(d-'0')
			}
		}
	}
	if fd < 0 {
		t.Fatalf("%s is not open", path)
	}
	kept, err := unix.Dup(fd)
	must(t, err)
	null, err := unix.Open("/dev/null", unix.O_RDWR|unix.O_CLOEXEC, 0)
	must(t, err)
	must(t, errors.Join(unix.Dup3(null, fd, unix.O_CLOEXEC), unix.Close(null)))
	return func() { must(t, errors.Join(unix.Dup3(kept, fd, unix.O_CLOEXEC), unix.Close(kept))) }
}

// TestFailedSyncOfTheTableIsFinal lets a sync fail in a checkpoint's commit. No other commit may follow, since it could
// write over pages that the table on the disk refers to. What was flushed is in the log.
func TestFailedSyncOfTheTableIsFinal(t *testing.T) {
	hook := func() {}
	noticed := make(chan Notice, 10)
	s, dir := newStore(t, Options{checkpointInterval: -1, Notice: func(n Notice) { noticed <- n }, onCommit: func(done bool) error {
		if !done {
			hook()
		}
		return nil
	}})
	_, err := s.CreateVolume("v", VolumeOptions{Size: 64 << 20, Codec: format.Raw})
	must(t, err)
	d, err := s.OpenDevice(Ref{Volume: "v"}, false)
	must(t, err)
	write := func(at int64, seed uint64) []byte {
		t.Helper()
		p := randomBytes(4096, seed)
		_, err := d.WriteAt(p, at)
		must(t, err)
		return p
	}
	for range 2 { // the second one leaves pages that the next commit can use: the file need not grow
		for i := range int64(64) {
			write(i<<20, uint64(i))
		}
		must(t, s.Checkpoint())
	}
	want := write(0, 1000)
	must(t, d.Flush())
	undo := func() {}
	hook = func() { undo = failTableSync(t, filepath.Join(dir, tableFile)) }
	err = s.Checkpoint()
	undo()
	hook = func() { t.Error("another commit was begun") }
	if !errors.Is(err, ErrFailed) || !errors.Is(err, unix.EINVAL) || s.wal.Err() == nil { // the errno of a file without fdatasync
		t.Fatalf("the checkpoint whose sync failed: %v", err)
	}
	for what, err := range map[string]error{"checkpoint": s.Checkpoint(), "flush": d.Flush(), "snapshot": s.Snapshot(Ref{"v", "late"})} {
		if !errors.Is(err, ErrFailed) {
			t.Errorf("%s after that: %v", what, err)
		}
	}
	if n := <-noticed; n.Kind != NoticeFailed || !errors.Is(n.Err, unix.EINVAL) {
		t.Errorf("noticed: %+v", n)
	}
	sound := func() {
		t.Helper()
		_, err := s.Check(t.Context(), CheckOptions{ReadData: true}, func(p Problem) { t.Errorf("%s: %s: %s", p.Kind, p.Where, p.What) })
		must(t, err)
	}
	sound() // the copy of the table has what the commit would have added: that is no damage
	must(t, d.Close())
	if err := s.Close(); !errors.Is(err, ErrFailed) {
		t.Error("close:", err)
	}
	s, err = Open(dir, Options{})
	must(t, err)
	sound()
	d, err = s.OpenDevice(Ref{Volume: "v"}, false)
	must(t, err)
	got := make([]byte, 4096)
	_, err = d.ReadAt(got, 0)
	must(t, err)
	if string(got) != string(want) {
		t.Error("what was flushed is lost")
	}
	mustEnd(t, s, d)
}
