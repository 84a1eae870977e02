package cow

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/vdisk/vdisk/cow/internal/leafcache"
	"github.com/vdisk/vdisk/format"
)

// scrubbed returns a store with a volume of some leaves, a snapshot that shares some of them, and records in several
// chunks; and what opens it again.
func scrubbed(t *testing.T, o Options) (s *Store, h *hookFS, again func() *Store) {
	dir := filepath.Join(t.TempDir(), "store")
	must(t, Create(dir))
	h = newHook(t, dir)
	o.fs, o.checkpointInterval, o.chunkBytes, o.Logger = h, -1, 1<<20, slog.New(slog.DiscardHandler)
	s = open(t, dir, o)
	_, err := s.CreateVolume("v", VolumeOptions{Size: 64 << 20, Codec: format.S2})
	must(t, err)
	d, err := s.OpenDevice(Ref{Volume: "v"}, false)
	must(t, err)
	for i := range int64(6) {
		_, err := d.WriteAt(randomBytes(1<<20, uint64(i+1)), i<<20)
		must(t, err)
		if i == 2 {
			must(t, s.Snapshot(Ref{"v", "a"}))
			_, err := d.WriteAt(randomBytes(100<<10, 77), 1<<20)
			must(t, err)
		}
	}
	must(t, errors.Join(d.Close(), s.Checkpoint()))
	return s, h, func() *Store { return open(t, dir, o) }
}

// rot damages the record of a block of a volume or snapshot, on the disk.
func rot(t *testing.T, s *Store, r Ref, block uint64) {
	t.Helper()
	d, err := s.OpenDevice(r, true)
	must(t, err)
	defer d.Close()
	_, c, e, err := s.resolve(entryAt(t, s, d, block))
	must(t, err)
	defer c.Release()
	flipByte(t, filepath.Join(s.dir, chunksDir, c.Name()), int64(e.Offset())+int64(e.Size())/2)
}

// entryAt returns the entry of a block.
func entryAt(t *testing.T, s *Store, d *Device, block uint64) (e format.Entry) {
	t.Helper()
	must(t, s.cache.View(d.b.leaf(uint32(block/format.LeafBlocks), d.asOf), func(lf *leafcache.Leaf) {
		e = lf.Entry(int(block % format.LeafBlocks))
	}))
	return e
}

func flipByte(t *testing.T, path string, at int64) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	must(t, err)
	var b [1]byte
	_, err = f.ReadAt(b[:], at)
	must(t, err)
	b[0] ^= 0x10
	_, err = f.WriteAt(b[:], at)
	must(t, errors.Join(err, f.Close()))
}

func checkData(t *testing.T, s *Store) CheckReport {
	t.Helper()
	r, err := s.Check(context.Background(), CheckOptions{ReadData: true}, func(Problem) {})
	must(t, err)
	return r
}

// A scrub reads each live record once, from the disk, and finds what a check finds. Its result stays.
func TestScrub(t *testing.T) {
	t.Parallel()
	s, h, again := scrubbed(t, Options{})
	var reads, disk atomic.Int64
	h.onRead = func(string) error { reads.Add(1); return nil }
	h.onReadDisk = func(string) error { disk.Add(1); return nil }
	run, err := s.Scrub(context.Background(), ScrubOptions{Rate: -1})
	must(t, err)
	if reads.Load() > 0 || disk.Load() == 0 {
		t.Errorf("%d reads through the page cache, %d around it", reads.Load(), disk.Load())
	}
	if most := run.Bytes / (100 << 10); disk.Load() > most {
		t.Errorf("%d reads of %d bytes in order", disk.Load(), run.Bytes)
	}
	want := checkData(t, s)
	if run.Bytes != want.DataBytes || run.Leaves != want.Versions || run.Total != want.Versions || run.Damaged != 0 || run.Unreadable != 0 {
		t.Errorf("%+v, and a check says %+v", run, want)
	}
	rot(t, s, Ref{Volume: "v"}, 300)
	rot(t, s, Ref{"v", "a"}, 259)
	rot(t, s, Ref{"v", "a"}, 2)
	run, err = s.Scrub(context.Background(), ScrubOptions{Rate: -1})
	must(t, err)
	if want := checkData(t, s); run.Damaged != 3 || want.Corrupt != 3 || run.Bytes != want.DataBytes {
		t.Errorf("%+v, and a check says %+v", run, want)
	}
	must(t, s.Close())
	s = again()
	if st := s.ScrubStatus(); st.Now != nil || st.Last == nil || *st.Last != run || !st.Next.IsZero() {
		t.Errorf("the next owner knows %+v", st)
	}
	must(t, s.Close())
}

// A scrub that an owner does not end goes on in the next, where it was.
func TestScrubGoesOn(t *testing.T) {
	t.Parallel()
	for what, end := range map[string]func(*Store) error{
		"close": func(*Store) error { return nil },
		"pause": (*Store).PauseScrub,
	} {
		t.Run(what, func(t *testing.T) {
			s, _, again := scrubbed(t, Options{ScrubEvery: -1})
			want := checkData(t, s)
			must(t, s.StartScrub(ScrubOptions{Rate: 1})) // one step, and then it rests for ever
			for s.ScrubStatus().Now.Leaves == 0 {
				time.Sleep(time.Millisecond)
			}
			must(t, end(s))
			must(t, within(t, "close", s.Close))
			s = again()
			st := s.ScrubStatus()
			if st.Now == nil || st.Now.Leaves == 0 || st.Now.Leaves >= want.Versions || st.Now.Bytes >= want.DataBytes || st.Paused != (what == "pause") || st.Active != (what == "close") {
				t.Fatalf("%+v of %+v", st, want)
			}
			run, err := s.Scrub(context.Background(), ScrubOptions{Rate: -1})
			must(t, err)
			if run.Bytes != want.DataBytes || run.Leaves != want.Versions {
				t.Errorf("%+v, and a check says %+v", run, want)
			}
			must(t, s.Close())
		})
	}
}

// The store closes within a step: the rest of the step is not read, and the next owner makes the step again.
func TestScrubIsCut(t *testing.T) {
	t.Parallel()
	s, h, again := scrubbed(t, Options{ScrubEvery: -1})
	want := checkData(t, s)
	entered := make(chan struct{})
	h.onReadDisk = func(string) error {
		select {
		case <-entered:
		default:
			close(entered)
		}
		<-s.quit
		return nil
	}
	must(t, s.StartScrub(ScrubOptions{Rate: -1}))
	<-entered
	must(t, within(t, "close", s.Close))
	h.onReadDisk = nil
	s = again()
	run, err := s.Scrub(context.Background(), ScrubOptions{Rate: -1})
	must(t, err)
	if run.Bytes != want.DataBytes || run.Leaves != want.Versions {
		t.Errorf("%+v, and a check says %+v", run, want)
	}
	must(t, s.Close())
}

// A scrub that is given up is forgotten, and a caller that waits for it gets an error.
func TestStopScrub(t *testing.T) {
	t.Parallel()
	s, _, _ := scrubbed(t, Options{})
	if err := errors.Join(s.StopScrub()); !errors.Is(err, ErrNotFound) {
		t.Error("without a scrub:", err)
	}
	begun := func() {
		for st := s.ScrubStatus(); st.Now == nil || st.Now.Leaves == 0; st = s.ScrubStatus() {
			time.Sleep(time.Millisecond)
		}
	}
	must(t, s.StartScrub(ScrubOptions{Rate: 1}))
	begun()
	must(t, s.StopScrub())
	if st := s.ScrubStatus(); st.Now != nil || st.Last != nil {
		t.Errorf("%+v", st)
	}
	var wg sync.WaitGroup
	waited := make(chan error, 1)
	wg.Go(func() {
		_, err := s.Scrub(context.Background(), ScrubOptions{Rate: 1})
		waited <- err
	})
	begun()
	must(t, s.StopScrub())
	run, err := s.Scrub(context.Background(), ScrubOptions{Rate: -1})
	must(t, err)
	if want := checkData(t, s); run.Bytes != want.DataBytes {
		t.Errorf("after one that was given up: %+v, and a check says %+v", run, want)
	}
	wg.Wait()
	if err := <-waited; !errors.Is(err, ErrBusy) {
		t.Error(err)
	}
	must(t, s.Close())
}

// A disk that cannot read some places does not stop a store, nor the scrub.
func TestScrubOfBadDisk(t *testing.T) {
	t.Parallel()
	s, h, _ := scrubbed(t, Options{})
	bad := s.slots.get(1).Name()
	h.onReadDisk = func(name string) error {
		if name == bad {
			return syscall.EIO
		}
		return nil
	}
	run, err := s.Scrub(context.Background(), ScrubOptions{Rate: -1})
	must(t, err)
	if want := checkData(t, s); run.Unreadable == 0 || run.Damaged != 0 || run.Bytes == 0 || run.Bytes >= want.DataBytes {
		t.Errorf("%+v, and a check says %+v", run, want)
	}
	d, err := s.OpenDevice(Ref{Volume: "v"}, false)
	must(t, err)
	_, err = d.WriteAt(randomBytes(8192, 5), 0)
	must(t, errors.Join(err, d.Flush(), d.Close(), s.Close()))
}

// An owner that lasts begins a scrub when it is due: a while after the last began, or after the store was made.
func TestScrubIsDue(t *testing.T) {
	t.Parallel()
	s, _, _ := scrubbed(t, Options{ScrubEvery: time.Hour})
	made := s.info.Created
	due := func(after time.Duration, want bool) {
		t.Helper()
		if got := s.scrubDue(made.Add(after)); got != want {
			t.Errorf("due %v after the store was made: %t", after, got)
		}
	}
	due(time.Hour-1, false)
	due(time.Hour, true)
	run, err := s.Scrub(context.Background(), ScrubOptions{Rate: -1})
	must(t, err)
	since := run.Started.Sub(made)
	due(since+time.Hour-1, false)
	due(since+time.Hour, true)
	must(t, s.StartScrub(ScrubOptions{Rate: 1}))
	due(100*time.Hour, false)
	must(t, s.Close())
}

// What is in the file of the progress is a hint: a store opens whatever it holds.
func TestScrubFileIsDamaged(t *testing.T) {
	t.Parallel()
	s, _, again := scrubbed(t, Options{})
	must(t, s.Close())
	for _, text := range []string{"", "{", `{"now":{"leaves":5},"branch":4294967295,"leaf":4294967295,"epoch":0}`, `{"branch":-1}`, "\x00"} {
		must(t, os.WriteFile(filepath.Join(s.dir, scrubFile), []byte(text), 0o600))
		s = again()
		_, err := s.Scrub(context.Background(), ScrubOptions{Rate: -1})
		must(t, errors.Join(err, s.Close()))
	}
}
