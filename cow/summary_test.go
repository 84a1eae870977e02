package cow

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/vdisk/vdisk/format"
)

// longLog makes a store with a log of several chunks, ends it as SIGKILL does, and returns its chunk files.
func longLog(t *testing.T) (dir string, content []byte, chunks []string) {
	t.Helper()
	s, dir := newStore(t, Options{checkpointInterval: -1, chunkBytes: 256 << 10})
	if _, err := s.CreateVolume("v", VolumeOptions{Size: 4 << 20, Codec: format.Raw}); err != nil {
		t.Fatal(err)
	}
	d, err := s.OpenDevice(Ref{Volume: "v"}, false)
	must(t, err)
	content = make([]byte, 2<<20)
	for i := range content {
		content[i] = byte(i>>12) | 1
	}
	for off := 0; off < len(content); off += 16 << 10 {
		_, err := d.WriteAt(content[off:][:16<<10], int64(off))
		must(t, errors.Join(err, d.Flush())) // so that the headers say that much is durable
	}
	must(t, errors.Join(d.Discard(1<<20, 64<<10), s.Snapshot(Ref{"v", "s"}), d.Flush()))
	clear(content[1<<20:][:64<<10])
	s.abandon(t)
	replayed(t, dir, content) // it removes the chunk that was made in advance, and with it what its header says
	for _, name := range files(t, filepath.Join(dir, chunksDir)) {
		chunks = append(chunks, filepath.Join(dir, chunksDir, name))
	}
	if len(chunks) < 6 {
		t.Fatalf("%d chunks", len(chunks))
	}
	return dir, content, chunks
}

// replayed opens the store, and returns what it replayed and how many blocks cannot be read; the others must be right.
// It ends it as SIGKILL does.
func replayed(t *testing.T, dir string, content []byte) (r Recovery, bad int) {
	t.Helper()
	s, err := Open(dir, Options{checkpointInterval: -1})
	must(t, err)
	defer s.abandon(t)
	for _, ref := range []Ref{{Volume: "v"}, {"v", "s"}} {
		d, err := s.OpenDevice(ref, true)
		must(t, err)
		bad = 0
		p := make([]byte, format.BlockSize)
		for off := 0; off < len(content); off += len(p) {
			_, err := d.ReadAt(p, int64(off))
			if err != nil && !errors.Is(err, ErrCorrupt) {
				t.Fatal(err)
			}
			if err != nil {
				bad++
			} else if !bytes.Equal(p, content[off:][:len(p)]) {
				t.Fatalf("%v: block at %d is wrong", ref, off)
			}
		}
		must(t, d.Close())
	}
	return s.Recovery(), bad
}

// change changes the n bytes at off of a file, from its end if off is negative.
func change(t *testing.T, path string, off int64, fn func(p []byte), n int) {
	t.Helper()
	p, err := os.ReadFile(path)
	must(t, err)
	if off < 0 {
		off += int64(len(p))
	}
	fn(p[off:][:n])
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	must(t, err)
	_, err = f.WriteAt(p[off:][:n], off)
	must(t, errors.Join(err, f.Close()))
}

func flip(p []byte) { p[0] ^= 0x10 }

// What a summary stands for is the records as they were made durable: damage to one of them is that one's.
func TestSummaryStandsForRecords(t *testing.T) {
	dir, content, chunks := longLog(t)
	whole, bad := replayed(t, dir, content)
	if bad != 0 || whole.Summaries < len(chunks)-3 || whole.Lost != 0 || whole.DroppedBytes != 0 {
		t.Fatalf("%d chunks, %d bad blocks, %+v", len(chunks), bad, whole)
	}
	again, _ := replayed(t, dir, content)
	if again != whole {
		t.Errorf("the next replay found %+v, the first %+v", again, whole)
	}
	change(t, chunks[1], 100<<10, flip, 1)
	if r, bad := replayed(t, dir, content); r != whole || bad != 1 { // of blocks that do not compress each has a record
		t.Errorf("with a damaged record: %d bad blocks, %+v", bad, r)
	}
	// So it is without its summary: the record's header says what is damaged, and that it was durable.
	change(t, chunks[1], -1<<10, func(p []byte) { clear(p) }, 1<<10)
	if r, bad := replayed(t, dir, content); r.Records != whole.Records || r.Damaged != 1 || bad != 1 {
		t.Errorf("without its summary: %d bad blocks, %+v", bad, r)
	}
}

// A chunk whose summary is damaged, and a store from before there were any, are replayed from records.
func TestReplayWithoutSummaries(t *testing.T) {
	for name, c := range map[string]struct {
		do    func(t *testing.T, chunks []string)
		fewer int
	}{
		"footer":  {func(t *testing.T, chunks []string) { change(t, chunks[2], -format.SummaryFooterSize, flip, 1) }, 1},
		"entries": {func(t *testing.T, chunks []string) { change(t, chunks[2], -format.SummaryFooterSize-20, flip, 1) }, 1},
		"cut":     {func(t *testing.T, chunks []string) { must(t, os.Truncate(chunks[2], 256<<10-16)) }, 1},
		"longer":  {func(t *testing.T, chunks []string) { must(t, os.Truncate(chunks[2], 512<<10)) }, 1},
		"headers without it": {func(t *testing.T, chunks []string) {
			for _, path := range chunks {
				change(t, path, 44, func(p []byte) { clear(p) }, 12)
			}
			forgetMark(t, filepath.Dir(filepath.Dir(chunks[0])))
		}, -1},
	} {
		t.Run(name, func(t *testing.T) {
			dir, content, chunks := longLog(t)
			whole, _ := replayed(t, dir, content)
			c.do(t, chunks)
			r, bad := replayed(t, dir, content)
			want := whole.Summaries - c.fewer
			if c.fewer < 0 {
				want = 0
			}
			if bad != 0 || r.Records != whole.Records || r.Summaries != want || r.Lost != 0 {
				t.Errorf("%d bad blocks, %+v, was %+v", bad, r, whole)
			}
		})
	}
}

// A summary may list records that a crash took. It must not be trusted when later records have their numbers.
func TestSummaryOfDroppedRecords(t *testing.T) {
	dir, content, chunks := longLog(t)
	change(t, chunks[len(chunks)-2], 150<<10, flip, 1)                    // full, and no header says yet that it is durable:
	change(t, chunks[len(chunks)-1], 44, func(p []byte) { clear(p) }, 12) // one that was made late could
	forgetMark(t, dir)
	s, err := Open(dir, Options{checkpointInterval: -1, chunkBytes: 256 << 10})
	must(t, err)
	if r := s.Recovery(); r.Lost != 0 || r.DroppedBytes == 0 {
		t.Fatalf("%+v", r)
	}
	d, err := s.OpenDevice(Ref{Volume: "v"}, false)
	must(t, err)
	for i := range content {
		content[i] = byte(i>>12)*3 | 1
	}
	for off := 0; off < len(content); off += 16 << 10 {
		_, err := d.WriteAt(content[off:][:16<<10], int64(off))
		must(t, errors.Join(err, d.Flush()))
	}
	s.abandon(t)
	s, err = Open(dir, Options{checkpointInterval: -1})
	must(t, err)
	defer s.abandon(t)
	if r := s.Recovery(); r.Lost != 0 || r.DroppedBytes != 0 {
		t.Errorf("then: %+v", r)
	}
	d, err = s.OpenDevice(Ref{Volume: "v"}, true)
	must(t, err)
	got := make([]byte, len(content))
	if _, err := d.ReadAt(got, 0); err != nil || !bytes.Equal(got, content) {
		t.Errorf("what was flushed since is gone (%v)", err)
	}
	must(t, d.Close())
}
