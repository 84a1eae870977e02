package crashfs

import (
	"bytes"
	"errors"
	"io"
	"io/fs"
	"math/rand/v2"
	"slices"
	"sync"
	"syscall"
	"testing"

	"github.com/vdisk/vdisk/internal/storage"
)

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func create(t *testing.T, f *FS, name string, size int64) storage.File {
	t.Helper()
	h, err := f.Create(name, size)
	must(t, err)
	return h
}

func write(t *testing.T, h storage.File, s string, off int64) {
	t.Helper()
	if n, err := h.WriteAt([]byte(s), off); n != len(s) || err != nil {
		t.Fatal(n, err)
	}
}

// durable makes a file whose name and content are durable.
func durable(t *testing.T, f *FS, name, content string) storage.File {
	t.Helper()
	h := create(t, f, name, 0)
	write(t, h, content, 0)
	must(t, h.Sync())
	must(t, f.SyncDir())
	return h
}

// read returns the content of a file, or "-" if there is no file of that name.
func read(t *testing.T, f *FS, name string) string {
	t.Helper()
	h, err := f.Open(name)
	if errors.Is(err, fs.ErrNotExist) {
		return "-"
	}
	must(t, err)
	defer h.Close()
	size, err := h.Size()
	must(t, err)
	b := make([]byte, size)
	if _, err := h.ReadAt(b, 0); err != nil && err != io.EOF {
		t.Fatal(err)
	}
	return string(b)
}

func want(t *testing.T, f *FS, name, content string) {
	t.Helper()
	if got := read(t, f, name); got != content {
		t.Errorf("%s holds %.40q, want %.40q", name, got, content)
	}
}

func TestUnsyncedWriteIsLost(t *testing.T) {
	f := New()
	h := durable(t, f, "a", "old")
	write(t, h, "new", 0)
	want(t, f, "a", "new")
	want(t, f.Crash(Choice{}), "a", "old")
	want(t, f.Crash(Choice{Prefix: 1}), "a", "new")
	must(t, h.Sync())
	want(t, f.Crash(Choice{}), "a", "new")
}

func TestUnsyncedDirectoryIsLost(t *testing.T) {
	f := New()
	h := create(t, f, "a", 0)
	write(t, h, "content", 0)
	must(t, h.Sync()) // syncs the content, not the name
	want(t, f.Crash(Choice{}), "a", "-")
	want(t, f.Crash(Everything), "a", "content")
	must(t, f.SyncDir())
	want(t, f.Crash(Choice{}), "a", "content")

	must(t, f.Remove("a"))
	want(t, f, "a", "-")
	want(t, f.Crash(Choice{}), "a", "content")
	want(t, f.Crash(Everything), "a", "-")
	must(t, f.SyncDir())
	want(t, f.Crash(Choice{}), "a", "-")
}

func TestCreateReservesAndReadsAsZeros(t *testing.T) {
	f := New()
	h := create(t, f, "a", 3*pageSize)
	must(t, f.SyncDir())
	want(t, f, "a", string(make([]byte, 3*pageSize)))
	want(t, f.Crash(Choice{}), "a", "") // the size was not durable
	must(t, h.Sync())
	want(t, f.Crash(Choice{}), "a", string(make([]byte, 3*pageSize)))
}

func TestPrefixKeepsTheOrderOverFiles(t *testing.T) {
	f := New()
	a, b := durable(t, f, "a", "0"), durable(t, f, "b", "0")
	write(t, a, "1", 0)
	write(t, b, "1", 0)
	write(t, a, "2", 0)
	must(t, b.Truncate(0))
	if n := f.Unsynced(); n != 4 {
		t.Fatal(n, "operations")
	}
	for n, s := range []string{"00", "10", "11", "21", "2"} {
		image := f.Crash(Choice{Prefix: n})
		if got := read(t, image, "a") + read(t, image, "b"); got != s {
			t.Errorf("after %d: %q, want %q", n, got, s)
		}
	}
}

// TestChoicesReachEveryState counts the states that the choices leave of three writes to three files and two directory
// operations.
func TestChoicesReachEveryState(t *testing.T) {
	f := New()
	state := func(f *FS) (s string) {
		for _, name := range []string{"a", "b", "c", "d", "e"} {
			s += read(t, f, name)
		}
		return s
	}
	var files []storage.File
	for _, name := range []string{"a", "b", "c", "d"} {
		files = append(files, durable(t, f, name, "0"))
	}
	for _, h := range files[:3] {
		write(t, h, "1", 0)
	}
	must(t, f.Remove("d"))
	create(t, f, "e", 0)
	seen := map[string]bool{}
	choices := f.Choices(1, 200)
	for _, c := range choices {
		seen[state(f.Crash(c))] = true
	}
	if len(seen) != 32 {
		t.Errorf("%d states, want 2^5", len(seen))
	}
	if again := f.Choices(1, 200); !slices.Equal(choices, again) {
		t.Error("the same seed chose differently")
	}
	if got := state(f.Crash(choices[50])); got != state(f.Crash(choices[50])) {
		t.Error("the same choice left something else")
	}
}

func TestTornWrite(t *testing.T) {
	f := New()
	old, now := bytes.Repeat([]byte("o"), 8*sectorSize), bytes.Repeat([]byte("n"), 4*sectorSize)
	h := durable(t, f, "a", string(old))
	const off = 100 // sectors begin at multiples of 512 in the file, not in the write
	write(t, h, string(now), off)
	masks := map[int]bool{}
	for _, c := range f.Choices(1, 400) {
		got := []byte(read(t, f.Crash(c), "a"))
		mask := 0
		for s := 0; s < len(got); s += sectorSize {
			sector := got[s : s+sectorSize]
			expect := slices.Clone(old[s : s+sectorSize])
			if bytes.IndexByte(sector, 'n') >= 0 {
				mask |= 1 << (s / sectorSize)
				for i := range sector {
					if s+i >= off && s+i < off+len(now) {
						expect[i] = 'n'
					}
				}
			}
			if !bytes.Equal(sector, expect) {
				t.Fatalf("%v: sector %d is torn within", c, s/sectorSize)
			}
		}
		masks[mask] = true
	}
	if len(masks) != 32 {
		t.Errorf("%d of 2^5 sets of sectors", len(masks))
	}
}

// TestFailedSyncLosesData checks that the FS behaves like the kernel: after a failed fsync, lost data counts as clean.
// A program must not mistake that for success.
func TestFailedSyncLosesData(t *testing.T) {
	f := New()
	h := durable(t, f, "a", "00")
	write(t, h, "1", 0)
	f.FailAt(OpSync, 1, syscall.EIO)
	if err := h.Sync(); !errors.Is(err, syscall.EIO) {
		t.Fatal(err)
	}
	want(t, f.Crash(Everything), "a", "10") // it may have been written
	write(t, h, "2", 1)
	must(t, h.Sync())
	want(t, f, "a", "12")
	want(t, f.Crash(Everything), "a", "02")
	write(t, h, "3", 1)
	must(t, h.Sync())
	want(t, f.Crash(Choice{}), "a", "03")
}

func TestFaults(t *testing.T) {
	f := New()
	h := durable(t, f, "a", "")
	f.FailAt(OpWrite, 2, syscall.EIO)
	f.FailAt(OpCreate, 1, syscall.ENOSPC)
	f.FailAt(OpRemove, 1, syscall.EIO)
	f.FailAt(OpSyncDir, 1, syscall.EIO)
	f.FailAt(OpTruncate, 1, syscall.EIO)
	write(t, h, "1", 0)
	page := bytes.Repeat([]byte("p"), 3*sectorSize)
	if n, err := h.WriteAt(page, 0); n != sectorSize || !errors.Is(err, syscall.EIO) {
		t.Error("write:", n, err)
	}
	want(t, f, "a", string(page[:sectorSize]))
	if _, err := f.Create("b", 1); !errors.Is(err, storage.ErrNoSpace) {
		t.Error("create:", err)
	}
	f.FailAt(OpOpen, 1, syscall.EMFILE)
	if _, err := f.Open("a"); !errors.Is(err, syscall.EMFILE) {
		t.Error("open:", err)
	}
	for name, err := range map[string]error{"remove": f.Remove("a"), "syncdir": f.SyncDir(), "truncate": h.Truncate(0)} {
		if !errors.Is(err, syscall.EIO) {
			t.Error(name, err)
		}
	}
	must(t, h.Truncate(0))
	must(t, f.SyncDir())
	if n := f.Count(OpWrite); n != 3 {
		t.Error(n, "writes")
	}
}

func TestCapacity(t *testing.T) {
	f := New()
	f.SetCapacity(10 * pageSize)
	h := create(t, f, "a", 8*pageSize)
	if _, err := f.Create("b", 3*pageSize); !errors.Is(err, storage.ErrNoSpace) {
		t.Error("create:", err)
	}
	want(t, f, "b", "-")
	write(t, h, "within", 8*pageSize-6)
	if _, err := h.WriteAt(make([]byte, pageSize), 10*pageSize); !errors.Is(err, storage.ErrNoSpace) {
		t.Error("write beyond:", err)
	}
	must(t, h.Truncate(pageSize))
	if n, _ := f.Free(); n != 9*pageSize {
		t.Error(n, "free")
	}
	must(t, f.SyncDir())
	must(t, f.Remove("a"))
	if n, _ := f.Free(); n != 10*pageSize {
		t.Error(n, "free after the removal")
	}
	if n, _ := f.Crash(Choice{}).Free(); n != 9*pageSize {
		t.Error(n, "free after the removal was lost")
	}
}

func TestImagesAreIndependent(t *testing.T) {
	f := New()
	h := durable(t, f, "a", "0")
	write(t, h, "1", 0)
	image, clone := f.Crash(Everything), f.Clone()
	write(t, h, "2", 0)
	must(t, h.Sync())
	ih, err := image.Open("a")
	must(t, err)
	write(t, ih, "3", 0)
	want(t, f, "a", "2")
	want(t, image, "a", "3")
	want(t, image.Crash(Choice{}), "a", "1") // in the image, everything was durable
	want(t, clone, "a", "1")
	want(t, clone.Crash(Choice{}), "a", "0") // the clone is as unsynced as the original
}

func TestMisuse(t *testing.T) {
	f := New()
	h := create(t, f, "a", 0)
	if _, err := f.Create("a", 0); !errors.Is(err, fs.ErrExist) {
		t.Error("create:", err)
	}
	if _, err := f.Create("x/y", 0); !errors.Is(err, fs.ErrInvalid) {
		t.Error("create:", err)
	}
	if err := f.Remove("b"); !errors.Is(err, fs.ErrNotExist) {
		t.Error("remove:", err)
	}
	if n, err := h.ReadAt(make([]byte, 1), 0); n != 0 || err != io.EOF {
		t.Error("read:", n, err)
	}
	must(t, h.Close())
	_, werr := h.WriteAt([]byte("x"), 0)
	_, rerr := h.ReadAt(make([]byte, 1), 0)
	for _, err := range []error{werr, rerr, h.Sync(), h.Truncate(0), h.Close()} {
		if !errors.Is(err, fs.ErrClosed) {
			t.Error("closed:", err)
		}
	}
	if n := f.Handles(); n != 0 {
		t.Error(n, "handles")
	}
}

func TestHookCutsPowerAroundASync(t *testing.T) {
	f := New()
	h := durable(t, f, "a", "0")
	write(t, h, "1", 0)
	var seen []string
	f.OnSync(func(name string) { seen = append(seen, name+read(t, f.Crash(Choice{}), "a")) })
	must(t, h.Sync())
	must(t, f.SyncDir())
	if !slices.Equal(seen, []string{"a0", "a1", ".1", ".1"}) {
		t.Error(seen)
	}
}

// TestAgainstModel compares a file and its images with plain slices.
func TestAgainstModel(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	f := New()
	h := durable(t, f, "a", "")
	var now, synced []byte
	var states [][]byte // content after each operation since the last sync
	for range 3000 {
		switch rng.IntN(12) {
		case 0:
			must(t, h.Sync())
			synced, states = slices.Clone(now), nil
			continue
		case 1:
			size := rng.IntN(5 * pageSize)
			must(t, h.Truncate(int64(size)))
			now = append(slices.Clone(now[:min(size, len(now))]), make([]byte, max(0, size-len(now)))...)
		default:
			p := make([]byte, 1+rng.IntN(2*pageSize))
			for i := range p {
				p[i] = byte(rng.Uint32())
			}
			off := rng.IntN(4 * pageSize)
			write(t, h, string(p), int64(off))
			now = append(now, make([]byte, max(0, off+len(p)-len(now)))...)
			copy(now[off:], p)
		}
		states = append(states, slices.Clone(now))
		want(t, f, "a", string(now))
		want(t, f.Crash(Choice{}), "a", string(synced))
		i := rng.IntN(len(states))
		want(t, f.Crash(Choice{Prefix: i + 1}), "a", string(states[i]))
	}
}

func TestConcurrentUse(t *testing.T) {
	f := New()
	h := durable(t, f, "a", "")
	var wg sync.WaitGroup
	for g := range 4 {
		wg.Go(func() {
			for i := range 200 {
				_, _ = h.WriteAt([]byte{byte(i)}, int64(g*pageSize+i))
				_, _ = h.ReadAt(make([]byte, 10), 0)
				image := f.Crash(Choice{Seed: uint64(i + 1)})
				ih, err := image.Open("a")
				if err != nil {
					t.Error(err)
					return
				}
				_, _ = ih.WriteAt([]byte{1}, 0)
				if i%10 == g {
					_ = h.Sync()
				}
			}
		})
	}
	wg.Wait()
}

func BenchmarkCrash(b *testing.B) {
	f := New()
	for _, name := range []string{"a", "b", "c"} {
		h, _ := f.Create(name, 64<<20)
		_, _ = h.WriteAt(make([]byte, 1<<20), 0)
		_ = h.Sync()
		for i := range int64(20) {
			_, _ = h.WriteAt(make([]byte, pageSize), 1<<20+i*pageSize)
		}
	}
	_ = f.SyncDir()
	for b.Loop() {
		f.Crash(Choice{Prefix: 10, Seed: 7, Torn: true})
	}
}
