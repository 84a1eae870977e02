package cow

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"github.com/vdisk/vdisk/format"
)

// rawRecord is what a block takes that does not compress.
const rawRecord = format.RecordHeaderSize + format.BlockSize

// quotaVolume is a volume, open to write, whose blocks are not compressed.
type quotaVolume struct {
	*testing.T
	s *Store
	d *Device
	n uint64
}

func newQuotaVolume(t *testing.T) *quotaVolume {
	s, _ := newStore(t, Options{checkpointInterval: -1})
	_, err := s.CreateVolume("v", VolumeOptions{Size: 4 << 20, Codec: format.Raw})
	must(t, err)
	q := &quotaVolume{T: t, s: s}
	q.open()
	return q
}

func (q *quotaVolume) open() {
	q.Helper()
	var err error
	q.d, err = q.s.OpenDevice(Ref{Volume: "v"}, false)
	must(q.T, err)
}

func (q *quotaVolume) set(key, value string) {
	q.Helper()
	must(q.T, q.s.SetProperties("v", map[string]string{key: value}))
}

// write writes n blocks from block on, and checks whether that is refused, with nothing changed then.
func (q *quotaVolume) write(block, n int64, refusal string) {
	q.Helper()
	q.n++
	before, p := make([]byte, n*format.BlockSize), randomBytes(int(n)*format.BlockSize, q.n)
	_, err := q.d.ReadAt(before, block*format.BlockSize)
	must(q.T, err)
	wrote, err := q.d.WriteAt(p, block*format.BlockSize)
	switch {
	case refusal == "" && err != nil:
		q.Fatalf("%d blocks at %d: %v", n, block, err)
	case refusal == "":
		return
	case !errors.Is(err, ErrNoSpace) || !strings.Contains(err.Error(), refusal):
		q.Fatalf("%d blocks at %d: %v", n, block, err)
	case wrote != 0:
		q.Errorf("%d bytes of a write that is refused are written", wrote)
	}
	after := make([]byte, len(before))
	if _, err := q.d.ReadAt(after, block*format.BlockSize); err != nil || !bytes.Equal(before, after) {
		q.Errorf("a refused write has changed something (%v)", err)
	}
}

func (q *quotaVolume) reopen() {
	q.Helper()
	must(q.T, q.d.Close())
	q.open()
}

// TestMappedQuota checks what a volume that has mapped all that it may still takes: what maps no more.
func TestMappedQuota(t *testing.T) {
	q := newQuotaVolume(t)
	q.write(0, 8, "")
	q.set("limit.mapped", "64K")
	q.write(8, 9, "limit.mapped")
	q.write(8, 8, "")
	q.write(16, 1, "limit.mapped")
	q.write(15, 2, "limit.mapped") // one of the two is there already
	q.write(0, 16, "")
	must(t, q.s.Snapshot(Ref{"v", "s"}))
	q.write(0, 4, "") // not a byte more is mapped
	if _, err := q.d.WriteAt(make([]byte, 64<<10), 64<<10); err != nil {
		t.Errorf("zeros, which map nothing: %v", err)
	}
	if err := q.d.WriteZeroes(64<<10+512, 8<<10, false); err != nil {
		t.Errorf("zeros for a part of a hole: %v", err)
	}
	if err := q.d.WriteZeroes(64<<10, 4096, true); !errors.Is(err, ErrNoSpace) {
		t.Errorf("zeros that take space: %v", err)
	}
	if _, err := q.d.WriteAt([]byte{1}, 64<<10); !errors.Is(err, ErrNoSpace) {
		t.Errorf("a byte of a block: %v", err)
	}
	must(t, q.d.Discard(0, 8<<12))
	q.write(100, 8, "")
	q.write(200, 1, "limit.mapped")
	q.reopen()
	q.write(200, 1, "limit.mapped")
	q.set("limit.mapped", "68K")
	q.write(200, 1, "")
	q.set("limit.mapped", "4K") // less than it has
	q.write(201, 1, "limit.mapped")
	q.write(200, 1, "")
	q.set("limit.mapped", "")
	q.write(201, 50, "")
	must(t, q.d.Close())
	must(t, q.s.Rollback(Ref{"v", "s"})) // 16 blocks
	q.set("limit.mapped", "68K")
	q.open()
	q.write(16, 2, "limit.mapped")
	q.write(16, 1, "")
}

// TestExclusiveQuota checks that what a snapshot holds does not count, and counts again when the snapshot is gone.
func TestExclusiveQuota(t *testing.T) {
	q := newQuotaVolume(t)
	q.set("limit.exclusive", fmt.Sprint(8*rawRecord+100))
	q.write(0, 8, "")
	q.write(8, 1, "limit.exclusive")
	q.write(7, 2, "limit.exclusive")
	q.write(0, 8, "") // its own
	must(t, q.s.Snapshot(Ref{"v", "s"}))
	q.write(0, 9, "limit.exclusive")
	q.write(4, 8, "")
	q.write(0, 1, "limit.exclusive") // it would be copied
	must(t, q.s.Remove(Ref{"v", "s"}, false))
	must(t, q.s.reclaimDeleted(t.Context()))
	q.write(0, 1, "") // its own again: it holds 12
	q.write(12, 1, "limit.exclusive")
	must(t, q.d.Discard(0, 4<<12))
	q.write(12, 1, "limit.exclusive")
	must(t, q.d.Discard(4<<12, 1<<12))
	q.write(12, 1, "")
	q.reopen()
	q.write(13, 1, "limit.exclusive")

	// A clone has nothing of its own, until it is flattened.
	must(t, q.s.Snapshot(Ref{"v", "t"}))
	must(t, q.s.Clone(Ref{"v", "t"}, "c"))
	must(t, q.s.SetProperties("c", map[string]string{"limit.exclusive": fmt.Sprint(7 * rawRecord)}))
	if _, err := q.s.Flatten(t.Context(), "c"); !errors.Is(err, ErrNoSpace) {
		t.Errorf("a clone is flattened: %v", err)
	}
	if in, err := q.s.Usage(t.Context(), Ref{Volume: "c"}); err != nil || in[0].Exclusive != 0 {
		t.Errorf("a refused flatten has copied %+v, %v", in, err)
	}
	must(t, q.s.SetProperties("c", map[string]string{"limit.exclusive": fmt.Sprint(8 * rawRecord)}))
	_, err := q.s.Flatten(t.Context(), "c")
	must(t, err)
}

// TestQuotaLetsVolumesShrink makes a volume smaller that is over its quota. Of the block at the new end, which a snapshot
// has, too, a part becomes zeros.
func TestQuotaLetsVolumesShrink(t *testing.T) {
	q := newQuotaVolume(t)
	q.write(0, 8, "")
	must(t, q.s.Snapshot(Ref{"v", "s"}))
	q.set("limit.exclusive", "4K")
	q.set("limit.mapped", "4K")
	q.write(3, 1, "limit.exclusive")
	must(t, q.d.Close())
	must(t, q.s.Resize("v", 3*format.BlockSize+512, true))
}

// TestQuotaLetsRepair repairs a block of a volume that is over its quota. A snapshot has the block, too.
func TestQuotaLetsRepair(t *testing.T) {
	q := newQuotaVolume(t)
	q.write(0, 8, "")
	must(t, q.s.Snapshot(Ref{"v", "s"}))
	q.set("limit.exclusive", "4K")
	q.write(3, 1, "limit.exclusive")
	must(t, q.d.Flush())
	rot(t, q.s, Ref{Volume: "v"}, 3)
	rep, err := q.s.Repair(t.Context(), "v", &imageSource{p: randomBytes(4<<20, 99)}) // not what there was
	if err != nil || rep.Bytes != format.BlockSize {
		t.Errorf("%+v, %v", rep, err)
	}
}

// TestQuotaIsCountedAnew opens the store anew, with changes that the table does not have.
func TestQuotaIsCountedAnew(t *testing.T) {
	q := newQuotaVolume(t)
	q.set("limit.mapped", "32K")
	q.write(0, 8, "")
	must(t, q.s.Checkpoint())
	must(t, q.d.Discard(0, 8<<12))
	q.write(10, 7, "")
	must(t, q.d.Flush())
	dir := q.s.dir
	killStore(q.s)
	q.s = open(t, dir, Options{checkpointInterval: -1})
	q.open()
	q.write(20, 2, "limit.mapped")
	q.write(20, 1, "")
	must(t, q.d.Close())
}

// TestOpenAtOnce opens a volume while nothing can be counted.
func TestOpenAtOnce(t *testing.T) {
	q := newQuotaVolume(t)
	must(t, q.d.Close())
	q.set("limit.mapped", "4K")
	q.s.opts.countWait = time.Hour
	opened, err := make(chan struct{}), error(nil)
	q.s.checkpoints.mu.Lock()
	go func() {
		q.d, err = q.s.OpenAtOnce(Ref{Volume: "v"}, false)
		close(opened)
	}()
	select {
	case <-opened:
	case <-time.After(20 * time.Second):
		t.Error("it waits")
	}
	q.s.checkpoints.mu.Unlock()
	<-opened
	must(t, err)
	q.d.AwaitCount()
	q.write(0, 2, "limit.mapped")
}

// TestCountedWhileWritten counts the head of a volume again and again while it is written, has snapshots, and loses them,
// and compares that with a count at the end.
func TestCountedWhileWritten(t *testing.T) {
	s, _ := newStore(t, Options{checkpointInterval: -1, chunkBytes: 1 << 20})
	_, err := s.CreateVolume("v", VolumeOptions{Size: 16 << 20, Codec: format.S2})
	must(t, err)
	d, err := s.OpenDevice(Ref{Volume: "v"}, false)
	must(t, err)
	defer d.Close()
	r := rand.New(rand.NewPCG(5, 5))
	change := func() {
		off, n := r.Int64N(4000)*format.BlockSize, 1+r.Int64N(8)*format.BlockSize
		switch r.IntN(12) {
		case 0:
			must(t, d.Discard(off, 10*n))
		case 1:
			err := s.Snapshot(Ref{"v", fmt.Sprint(r.IntN(4))})
			if err != nil && !errors.Is(err, ErrExists) {
				t.Fatal(err)
			}
		case 2:
			err := s.Remove(Ref{"v", fmt.Sprint(r.IntN(4))}, false)
			if err != nil && !errors.Is(err, ErrNotFound) {
				t.Fatal(err)
			}
			if r.IntN(2) == 0 {
				must(t, s.reclaimDeleted(t.Context()))
			}
		default:
			p := make([]byte, n)
			fill(p, r.IntN(4), r)
			_, err := d.WriteAt(p, off)
			must(t, err)
		}
	}
	for range 16 {
		for range r.IntN(20) {
			change()
		}
		c := &headCount{}
		s.mu.Lock()
		d.b.count = c
		s.mu.Unlock()
		tx, err := s.beginCount(d.b, c)
		must(t, err)
		for range r.IntN(20) { // which the table, as it is counted, does not have
			change()
		}
		must(t, s.countTable(tx, d.b, c))
		for range r.IntN(20) {
			change()
		}
		now := &headCount{}
		d.b.count = now
		must(t, s.countHead(d.b, now))
		if c.holding != now.holding {
			t.Fatalf("it was counted to hold %+v, and holds %+v", c.holding, now.holding)
		}
	}
}
