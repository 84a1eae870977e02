package cow

import (
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"github.com/vdisk/vdisk/cow/internal/audit"
	"github.com/vdisk/vdisk/cow/internal/leafcache"
	"github.com/vdisk/vdisk/cow/internal/wal"
	"github.com/vdisk/vdisk/format"
)

// TestCheckKeepsNoSpace stops a check, in its first part or while it reads data. The stopped check must take no room
// from a writer on a limited store. When it goes on, it must not report a problem in data that has gone meanwhile.
func TestCheckKeepsNoSpace(t *testing.T) {
	for _, readsData := range []bool{false, true} {
		s, _ := newStore(t, Options{MaxBytes: 64 << 20, chunkBytes: 2 << 20})
		const leaves, blocks = 256, 24 << 20 / format.BlockSize // enough leaves that the check reports progress
		_, err := s.CreateVolume("v", VolumeOptions{Size: leaves << 20, Codec: format.Raw})
		must(t, err)
		d, err := s.OpenDevice(Ref{Volume: "v"}, false)
		must(t, err)
		p := randomBytes(format.BlockSize, 7)
		write := func(i int64) error {
			_, err := d.WriteAt(p, i%leaves<<20+i/leaves*format.BlockSize)
			return err
		}
		for i := range int64(blocks) {
			must(t, write(i))
		}
		in, out, done := make(chan bool), make(chan bool), make(chan error, 1)
		waits := true
		stand := func(n, total int64) {
			if waits && n > total/2 == readsData {
				waits = false
				close(in)
				<-out
			}
		}
		go func() {
			_, err := s.Check(t.Context(), CheckOptions{ReadData: true, Progress: stand}, func(p Problem) { t.Errorf("%+v", p) })
			done <- err
		}()
		<-in
		r := rand.New(rand.NewPCG(1, 1))
		for i := range 3 * blocks {
			if err := write(r.Int64N(blocks)); err != nil {
				close(out)
				t.Fatalf("after %d writes beside a check (which reads data: %v): %v", i, readsData, err)
			}
		}
		close(out)
		must(t, <-done)
		mustEnd(t, s, d)
	}
}

// TestCheckInSlices: a check that reads data in many states of the table has the same result as one that reads it in a
// single state, and it finds damage.
func TestCheckInSlices(t *testing.T) {
	dir := setup(t, 256<<20, format.S2)
	s := open(t, dir, Options{checkpointInterval: -1})
	d, err := s.OpenDevice(Ref{Volume: "v"}, false)
	must(t, err)
	for i := range int64(200) {
		_, err := d.WriteAt(randomBytes(3*format.BlockSize, uint64(i)), i<<20)
		must(t, err)
		if i == 100 {
			must(t, s.Snapshot(Ref{"v", "a"}))
			_, err = d.WriteAt(randomBytes(format.BlockSize, 1), 5<<20)
			must(t, err)
		}
	}
	whole := mustCheck(t, s)
	check := func() (CheckReport, []Problem) {
		var ps []Problem
		c := audit.NewChecker(checkedStore{s, t.Context()}, audit.CheckOptions{ReadData: true}, func(p audit.Problem) { ps = append(ps, Problem{Kind: p.Kind, Where: p.Where, What: p.What}) })
		c.Slice = 0
		report, err := c.Run()
		must(t, err)
		return CheckReport(report), ps
	}
	if rep, ps := check(); rep != whole || len(ps) > 0 {
		t.Errorf("in slices %+v, and whole %+v; %+v", rep, whole, ps)
	}
	var e format.Entry
	must(t, s.cache.View(d.b.leaf(180, head), func(lf *leafcache.Leaf) { e = lf.Entry(1) }))
	f, err := os.OpenFile(filepath.Join(dir, chunksDir, wal.ChunkName(e.Slot())), os.O_WRONLY, 0)
	must(t, err)
	_, err = f.WriteAt([]byte("rot"), int64(e.Offset())+100)
	must(t, errors.Join(err, f.Close()))
	if rep, ps := check(); rep.Corrupt != 1 || len(ps) != 1 {
		t.Errorf("%+v of one rotten record: %+v", rep, ps)
	}
	must(t, errors.Join(d.Close(), s.Close()))
}
