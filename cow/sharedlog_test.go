package cow

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"io/fs"
	"log/slog"
	"math/rand/v2"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// sharing are options for a store whose owner is to be killed.
func sharing(t *testing.T) Options {
	return Options{Outlive: true, SharedMemory: t.TempDir(), checkpointInterval: -1}
}

// abandon ends a store as SIGKILL does.
func (s *Store) abandon(t testing.TB) {
	t.Helper()
	close(s.quit)
	s.wg.Wait()
	s.wal.Stop()
	if err := s.release(); err != nil {
		t.Fatal(err)
	}
}

func files(t *testing.T, dir string) (names []string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

// answered makes a store, writes a block without a flush and ends it.
func answered(t *testing.T, o Options) (dir string, content []byte) {
	t.Helper()
	s, dir := newStore(t, o)
	if !s.SurvivesKill() {
		t.Fatal("the store has no shared memory")
	}
	if _, err := s.CreateVolume("v", VolumeOptions{Size: 1 << 20}); err != nil {
		t.Fatal(err)
	}
	d, err := s.OpenDevice(Ref{Volume: "v"}, false)
	if err != nil {
		t.Fatal(err)
	}
	content = bytes.Repeat([]byte("answered"), 512)
	if _, err := d.WriteAt(content, 8192); err != nil {
		t.Fatal(err)
	}
	s.abandon(t)
	return dir, content
}

// found reports whether the next owner has the block; it closes the store. An owner that has not knows whether it
// should.
func found(t *testing.T, dir string, o Options, content []byte) bool {
	t.Helper()
	s, err := Open(dir, o)
	if err != nil {
		t.Fatal(err)
	}
	d, err := s.OpenDevice(Ref{Volume: "v"}, false)
	if err != nil {
		t.Fatal(err)
	}
	got := make([]byte, len(content))
	if _, err := d.ReadAt(got, 8192); err != nil {
		t.Fatal(err)
	}
	mustCheck(t, s)
	if s.LostAcknowledged() == bytes.Equal(got, content) && !foreign(t) {
		t.Errorf("forgot: %v", s.LostAcknowledged())
	}
	if err := errors.Join(d.Close(), s.Close()); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(dir, ownerFile)); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a store that was closed has an owner file (%v)", err)
	}
	if !bytes.Equal(got, content) && !bytes.Equal(got, make([]byte, len(got))) {
		t.Error("the block holds neither the old nor the new content")
	}
	return bytes.Equal(got, content)
}

// foreign tells the tests in which what was answered is none of the next owner's business.
func foreign(t *testing.T) bool {
	switch path.Base(t.Name()) {
	case "other_boot", "copied":
		return true
	}
	return false
}

func TestAnsweredOutlivesTheOwner(t *testing.T) {
	for _, next := range []string{"lasting", "temporary"} {
		t.Run(next, func(t *testing.T) {
			o := sharing(t)
			dir, content := answered(t, o)
			if len(files(t, o.SharedMemory)) != 1 {
				t.Fatalf("the shared memory holds %v", files(t, o.SharedMemory))
			}
			o.Outlive = next == "lasting"
			if !found(t, dir, o, content) {
				t.Error("what was answered is lost")
			}
			if left := files(t, o.SharedMemory); len(left) != 0 {
				t.Errorf("left in the shared memory: %v", left)
			}
		})
	}
}

// What is of another boot, of a copy of the store, of another user or another program is not touched.
func TestForeignBuffersAreIgnored(t *testing.T) {
	for name, damage := range map[string]func(t *testing.T, dir, buffers string){
		"other boot":  changeOwner(func(r *ownerRecord) { r.Boot = "00000000-0000-0000-0000-000000000000" }),
		"copied":      changeOwner(func(r *ownerRecord) { r.Ino++ }),
		"path":        changeOwner(func(r *ownerRecord) { r.Buffers = "../../etc/passwd" }),
		"empty":       func(t *testing.T, dir, _ string) { must(t, os.WriteFile(filepath.Join(dir, ownerFile), nil, 0o600)) },
		"gone":        func(t *testing.T, _, buffers string) { must(t, os.Remove(buffers)) },
		"short":       func(t *testing.T, _, buffers string) { must(t, os.Truncate(buffers, 4096)) },
		"other store": changeHead(30),
		"version":     changeHead(8),
		"other user":  func(t *testing.T, _, buffers string) { must(t, os.Chown(buffers, 12345, 0)) },
		"link": func(t *testing.T, _, buffers string) {
			must(t, os.Rename(buffers, buffers+".real"))
			must(t, os.Symlink(buffers+".real", buffers))
		},
	} {
		t.Run(name, func(t *testing.T) {
			if name == "other user" && os.Geteuid() != 0 {
				t.Skip("needs root")
			}
			o := sharing(t)
			dir, content := answered(t, o)
			damage(t, dir, filepath.Join(o.SharedMemory, files(t, o.SharedMemory)[0]))
			if found(t, dir, o, content) {
				t.Error("foreign buffers were used")
			}
		})
	}
}

func changeOwner(change func(*ownerRecord)) func(t *testing.T, dir, _ string) {
	return func(t *testing.T, dir, _ string) {
		path := filepath.Join(dir, ownerFile)
		text, err := os.ReadFile(path)
		must(t, err)
		var r ownerRecord
		must(t, json.Unmarshal(text, &r))
		change(&r)
		r.Sum = r.sum()
		text, err = json.Marshal(r)
		must(t, err)
		must(t, os.WriteFile(path, text, 0o600))
	}
}

// TestDamagedOwnerFile flips each byte of the file that says where a killed owner's buffers are, and cuts it anywhere.
// What was answered is found, or the store says that it may be lost: damage never looks like another boot.
func TestDamagedOwnerFile(t *testing.T) {
	o := Options{Outlive: true, SharedMemory: memoryDir(t), checkpointInterval: -1, chunkBytes: 2 << 20, Logger: slog.New(slog.DiscardHandler)}
	dir, content := filepath.Join(memoryDir(t), "store"), randomBytes(4096, 1)
	must(t, Create(dir))
	first := open(t, dir, o)
	filledVolume(t, first, "v", 1, 2)
	d, err := first.OpenDevice(Ref{Volume: "v"}, false)
	must(t, err)
	_, err = d.WriteAt(content, 8192)
	must(t, err)
	first.abandon(t)
	o.Outlive = false // it takes over what it finds, all the same
	img, buffers := readImage(t, dir), filepath.Join(o.SharedMemory, files(t, o.SharedMemory)[0])
	memory, err := os.ReadFile(buffers)
	must(t, err)
	text := img[ownerFile]
	step := 1 + rand.IntN(10) // a sample, unless it is the long size (-damage.every)
	if *damageEvery {
		step = 1
	}
	for at := 0; at < 2*len(text); at += step {
		damaged := bytes.Clone(text[:at/2])
		if at%2 == 0 {
			damaged = bytes.Clone(text)
			damaged[at/2] ^= 1 << rand.IntN(8)
		}
		must(t, lay(dir, img.with(image{ownerFile: damaged})))
		if _, err := os.Stat(buffers); err != nil { // otherwise nobody has touched it
			must(t, os.WriteFile(buffers, memory, 0o600))
		}
		s, err := Open(dir, o)
		must(t, err)
		if !s.LostAcknowledged() && !holdsAt(t, s, "v", 8192, content) {
			t.Errorf("with %q what was answered is lost, and nothing says so", damaged)
		}
		must(t, s.Close())
	}
}

func changeHead(at int64) func(t *testing.T, _, buffers string) {
	return func(t *testing.T, _, buffers string) {
		f, err := os.OpenFile(buffers, os.O_RDWR, 0)
		must(t, err)
		_, err = f.WriteAt([]byte{0xee}, at)
		must(t, errors.Join(err, f.Close()))
	}
}

// What a killed owner left is found after the store's file system was mounted anew. As that may be a copy, the memory
// stays for the other; the copy of a store whose owner lives has nothing to do with it.
func TestMovedOrCopied(t *testing.T) {
	o := sharing(t)
	dir, content := answered(t, o)
	changeOwner(func(r *ownerRecord) { r.Dev++ })(t, dir, "")
	if !found(t, dir, o, content) {
		t.Error("what was answered is lost")
	}
	if left := files(t, o.SharedMemory); len(left) != 1 {
		t.Errorf("left in the shared memory: %v", left)
	}

	o = sharing(t)
	s, dir := newStore(t, o)
	twin := filepath.Join(t.TempDir(), "twin")
	must(t, os.CopyFS(twin, os.DirFS(dir)))
	var st unix.Stat_t
	must(t, unix.Stat(twin, &st))
	changeOwner(func(r *ownerRecord) { r.Dev, r.Ino = r.Dev+1, st.Ino })(t, twin, "")
	c, err := Open(twin, o)
	must(t, err)
	if c.LostAcknowledged() {
		t.Error("the copy of a store whose owner lives misses its memory")
	}
	must(t, c.Close())
	if left := files(t, o.SharedMemory); len(left) != 1 {
		t.Errorf("left in the shared memory: %v", left)
	}
	must(t, s.Close())
}

// In another shared memory than the last owner's nothing can be known: nothing changes, and where that memory is the
// store is opened as if nobody had tried.
func TestElsewhere(t *testing.T) {
	for name, shm := range map[string]func(uint64) uint64{"another": func(n uint64) uint64 { return n + 1 }, "not known": func(uint64) uint64 { return 0 }} {
		t.Run(name, func(t *testing.T) {
			o := sharing(t)
			dir, content := answered(t, o)
			changeOwner(func(r *ownerRecord) { r.Shm = shm(r.Shm) })(t, dir, "")
			before, err := os.ReadFile(filepath.Join(dir, ownerFile))
			must(t, err)
			there := o.SharedMemory
			o.SharedMemory = t.TempDir()
			for range 2 {
				if _, err := Open(dir, o); !errors.Is(err, ErrElsewhere) || !errors.Is(err, ErrBusy) {
					t.Fatal(err)
				}
			}
			if after, err := os.ReadFile(filepath.Join(dir, ownerFile)); err != nil || !bytes.Equal(after, before) {
				t.Errorf("%s became %s (%v)", before, after, err)
			}
			if name == "another" {
				o.SharedMemory = there
				if !found(t, dir, o, content) {
					t.Error("what was answered is lost")
				}
				return
			}
			o.ForgetElsewhere = true
			if found(t, dir, o, content) {
				t.Error("it was found elsewhere")
			}
		})
	}
}

// Memory that cannot be looked at is not gone.
func TestMemoryInUse(t *testing.T) {
	o := sharing(t)
	dir, content := answered(t, o)
	path := filepath.Join(o.SharedMemory, files(t, o.SharedMemory)[0])
	f, err := os.Open(path)
	must(t, err)
	must(t, unix.Flock(int(f.Fd()), unix.LOCK_EX))
	was := dyingTime
	defer func() { dyingTime = was }()
	dyingTime = 50 * time.Millisecond
	if _, err := Open(dir, o); err == nil {
		t.Fatal("memory that somebody has was taken")
	}
	must(t, f.Close())
	// The last owner may be dying still.
	dyingTime = was
	f, err = os.Open(path)
	must(t, err)
	must(t, unix.Flock(int(f.Fd()), unix.LOCK_EX))
	time.AfterFunc(100*time.Millisecond, func() { _ = f.Close() })
	if !found(t, dir, o, content) {
		t.Error("what was answered is lost")
	}
}

// Buffers whose chunk has gone, or whose slot another chunk has, have nothing to add.
func TestBuffersOfAGoneChunk(t *testing.T) {
	o := sharing(t)
	dir, content := answered(t, o)
	path := filepath.Join(o.SharedMemory, files(t, o.SharedMemory)[0])
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	must(t, err)
	for i, h := range []struct {
		seq       uint64
		slot, off uint32
	}{{99, 0, 4096}, {1, 77, 4096}} {
		head := binary.NativeEndian.AppendUint64(nil, h.seq)
		for _, v := range []uint32{h.slot, h.off, 4096} {
			head = binary.NativeEndian.AppendUint32(head, v)
		}
		_, err := f.WriteAt(head, sharedTable+int64(i+1)*32) // of buffers that were not used: the first is taken from the end
		must(t, err)
	}
	must(t, f.Close())
	if !found(t, dir, o, content) {
		t.Error("what was answered is lost")
	}
}

// Without shared memory what is answered outlives the owner as well: writes, zeros and discards are in the chunk files
// before they are.
func TestNoSharedMemory(t *testing.T) {
	o := sharing(t)
	o.SharedMemory = filepath.Join(o.SharedMemory, "missing")
	dir, content := answered(t, o)
	if _, err := os.Stat(filepath.Join(dir, ownerFile)); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("there is an owner file (%v)", err)
	}
	if !found(t, dir, o, content) {
		t.Fatal("what was answered is lost")
	}
	for name, erase := range map[string]func(d *Device) error{
		"discard": func(d *Device) error { return d.Discard(8192, 4096) },
		"zeros":   func(d *Device) error { return d.WriteZeroes(8192, 4096, false) },
	} {
		s, err := Open(dir, o)
		must(t, err)
		d, err := s.OpenDevice(Ref{Volume: "v"}, false)
		must(t, err)
		_, err = d.WriteAt(content, 8192)
		must(t, errors.Join(err, d.Flush(), erase(d)))
		s.abandon(t)
		if !found(t, dir, o, make([]byte, len(content))) {
			t.Errorf("%s: what was answered is lost", name)
		}
	}
}

// TestWriteThroughTogether: a writer whose turn to write out comes late finds that another has done it, and still
// nothing that was answered is only in memory.
func TestWriteThroughTogether(t *testing.T) {
	o := sharing(t)
	o.SharedMemory = filepath.Join(o.SharedMemory, "missing")
	s, dir := newStore(t, o)
	const writers, each = 8, 40
	_, err := s.CreateVolume("v", VolumeOptions{Size: writers * each * 4096})
	must(t, err)
	d, err := s.OpenDevice(Ref{Volume: "v"}, false)
	must(t, err)
	block := func(i int) []byte { return bytes.Repeat([]byte{byte(i), byte(i >> 8), 1, 2}, 1024) }
	var wg sync.WaitGroup
	for w := range writers {
		wg.Go(func() {
			for i := w * each; i < (w+1)*each; i++ {
				if _, err := d.WriteAt(block(i), int64(i)*4096); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	s.abandon(t)
	s, err = Open(dir, o)
	must(t, err)
	d, err = s.OpenDevice(Ref{Volume: "v"}, false)
	must(t, err)
	got := make([]byte, 4096)
	for i := range writers * each {
		if _, err := d.ReadAt(got, int64(i)*4096); err != nil || !bytes.Equal(got, block(i)) {
			t.Fatalf("block %d is lost (%v)", i, err)
		}
	}
	must(t, errors.Join(d.Close(), s.Close()))
}

// TestBuffersGoLast watches the removal of the buffers: the file that names them goes first. Between the two, the next
// owner would look for buffers that are gone, and report lost writes.
func TestBuffersGoLast(t *testing.T) {
	o := sharing(t)
	dir, content := answered(t, o) // a killed owner leaves both files
	names := removals(t, dir, o.SharedMemory)
	if !found(t, dir, o, content) { // takes them over, makes its own, and removes those at its end
		t.Error("the write is lost")
	}
	var order []string
	for _, n := range names() {
		if n == ownerFile || strings.HasPrefix(n, "vdisk-") {
			order = append(order, n[:5])
		}
	}
	if want := []string{"owner", "vdisk", "owner", "vdisk"}; !slices.Equal(order, want) {
		t.Errorf("removed were %v, not %v", order, want)
	}
}

// removals watches two folders, and returns a function that returns the names that were removed, in order.
func removals(t *testing.T, dirs ...string) func() []string {
	t.Helper()
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	must(t, err)
	t.Cleanup(func() { unix.Close(fd) })
	for _, dir := range dirs {
		_, err := unix.InotifyAddWatch(fd, dir, unix.IN_DELETE)
		must(t, err)
	}
	return func() (names []string) {
		p := make([]byte, 64<<10)
		n, err := unix.Read(fd, p)
		must(t, err)
		for p = p[:n]; len(p) > 0; { // struct inotify_event, inotify(7)
			size := unix.SizeofInotifyEvent + int(binary.NativeEndian.Uint32(p[12:]))
			names = append(names, string(bytes.TrimRight(p[unix.SizeofInotifyEvent:size], "\x00")))
			p = p[size:]
		}
		return names
	}
}
