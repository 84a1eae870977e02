package cow

import (
	"bytes"
	"errors"
	"fmt"
	"math"
	"testing"

	"github.com/vdisk/vdisk/cow/internal/wal"
	"github.com/vdisk/vdisk/format"
)

// TestIDsAreUsedUp: IDs are never reused. When they are used up, operations that need one are refused, and no row of
// another is overwritten.
func TestIDsAreUsedUp(t *testing.T) {
	s, dir := newStore(t, Options{checkpointInterval: -1})
	_, err := s.CreateVolume("v", VolumeOptions{Size: 1 << 20, Codec: format.Raw})
	must(t, err)
	must(t, s.Snapshot(Ref{"v", "a"}))
	s.catalog.nextID = lastID - 4
	made := 0
	for i := range 5 {
		if _, err = s.CreateVolume(fmt.Sprint("n", i), VolumeOptions{Size: 1 << 20}); err == nil {
			made++
		} else if !errors.Is(err, ErrExhausted) {
			t.Error(err)
		}
	}
	if made != 2 { // two IDs each, of five
		t.Errorf("%d volumes were made", made)
	}
	must(t, s.Snapshot(Ref{"v", "last"})) // the fifth
	for range 2 {
		for what, err := range map[string]error{
			"snapshot": s.Snapshot(Ref{"v", "b"}),
			"clone":    s.Clone(Ref{"v", "a"}, "c"),
			"rollback": s.Rollback(Ref{"v", "a"}),
		} {
			if !errors.Is(err, ErrExhausted) {
				t.Errorf("%s: %v", what, err)
			}
		}
		must(t, s.Rename(Ref{Volume: "v"}, Ref{Volume: "w"})) // needs none
		must(t, s.Rename(Ref{Volume: "w"}, Ref{Volume: "v"}))
		mustEnd(t, s)
		s = open(t, dir, Options{checkpointInterval: -1})
	}
	must(t, s.Remove(Ref{Volume: "v"}, true))
	killStore(s) // so that the IDs come from the log
	s = open(t, dir, Options{checkpointInterval: -1})
	if _, err := s.CreateVolume("v", VolumeOptions{Size: 1 << 20}); !errors.Is(err, ErrExhausted) {
		t.Error(err)
	}
	if got := len(s.Volumes()); got != 2 {
		t.Errorf("%d volumes", got)
	}
	mustEnd(t, s)
}

// TestRefusedUsesNoID: a refused operation uses up no ID.
func TestRefusedUsesNoID(t *testing.T) {
	s, _ := newStore(t, Options{checkpointInterval: -1})
	_, err := s.CreateVolume("v", VolumeOptions{Size: 1 << 20})
	must(t, err)
	before := s.catalog.nextID
	for range 3 {
		if err := s.Snapshot(Ref{"v", "a"}, Ref{"nobody", "a"}); !errors.Is(err, ErrNotFound) {
			t.Error(err)
		}
	}
	if s.catalog.nextID != before {
		t.Errorf("the next id went from %d to %d", before, s.catalog.nextID)
	}
	mustEnd(t, s)
}

// TestEpochsAreUsedUp: at a branch's last epoch, its volume can have no further snapshot. A clone can go on.
func TestEpochsAreUsedUp(t *testing.T) {
	s, dir := newStore(t, Options{checkpointInterval: -1})
	_, err := s.CreateVolume("v", VolumeOptions{Size: 1 << 20, Codec: format.Raw})
	must(t, err)
	s.catalog.byName["v"].branch.Epoch = lastEpoch - 1
	d, err := s.OpenDevice(Ref{Volume: "v"}, false)
	must(t, err)
	write := func(n uint64) {
		_, err := d.WriteAt(randomBytes(4096, n), 0)
		must(t, err)
	}
	write(1)
	must(t, s.Snapshot(Ref{"v", "last"}))
	write(2)
	if err := s.Snapshot(Ref{"v", "more"}); !errors.Is(err, ErrExhausted) {
		t.Error(err)
	}
	must(t, d.Close())
	mustEnd(t, s)
	s = open(t, dir, Options{checkpointInterval: -1})
	for r, n := range map[Ref]uint64{{Volume: "v"}: 2, {"v", "last"}: 1} {
		d, err := s.OpenDevice(r, true)
		must(t, err)
		got := make([]byte, 4096)
		_, err = d.ReadAt(got, 0)
		must(t, errors.Join(err, d.Close()))
		if !bytes.Equal(got, randomBytes(4096, n)) {
			t.Errorf("%v reads otherwise", r)
		}
	}
	must(t, s.Clone(Ref{"v", "last"}, "c"))
	must(t, s.Snapshot(Ref{"c", "more"}))
	must(t, s.Rollback(Ref{"v", "last"}))
	must(t, s.Snapshot(Ref{"v", "more"}))
	mustEnd(t, s)
}

// TestSlotsAreUsedUp: when all slots are taken, writes are refused before they are acknowledged. Deleting data gives
// slots back.
func TestSlotsAreUsedUp(t *testing.T) {
	s, _ := newStore(t, Options{checkpointInterval: -1, chunkBytes: 1 << 20})
	_, err := s.CreateVolume("v", VolumeOptions{Size: 64 << 20, Codec: format.Raw})
	must(t, err)
	d, err := s.OpenDevice(Ref{Volume: "v"}, false)
	must(t, err)
	s.wal.WaitIdle()
	s.mu.Lock()
	others := format.MaxSlots - 64 - s.slots.taken - 3 // 64 are kept for deletes and the cleaner
	s.slots.taken += others                            // as if these chunks existed
	s.mu.Unlock()
	written := int64(0)
	for ; written < 64; written++ {
		if _, err = d.WriteAt(randomBytes(1<<20, uint64(written+1)), written<<20); err != nil {
			break
		}
	}
	if !errors.Is(err, ErrNoSpace) || written < 3 || written > 8 {
		t.Errorf("%d MiB were written: %v", written, err)
	}
	must(t, d.Flush())
	for i := range written {
		got := make([]byte, 1<<20)
		if _, err := d.ReadAt(got, i<<20); err != nil || !bytes.Equal(got, randomBytes(1<<20, uint64(i+1))) {
			t.Errorf("MiB %d, which was acknowledged: %v", i, err)
		}
	}
	must(t, s.Snapshot(Ref{"v", "a"})) // events may use the slots that are kept for them
	must(t, s.Remove(Ref{"v", "a"}, false))
	must(t, d.Discard(0, 64<<20))
	for range 3 {
		must(t, s.Checkpoint())
	}
	if _, err := d.WriteAt(randomBytes(1<<20, 99), 0); err != nil {
		t.Errorf("after all was discarded: %v", err)
	}
	s.mu.Lock()
	s.slots.taken -= others
	s.mu.Unlock()
	mustEnd(t, s, d)
}

// TestLogNumbersAreUsedUp: the sequence numbers of chunks and records do not begin again either.
func TestLogNumbersAreUsedUp(t *testing.T) {
	for what, set := range map[string]func(*wal.Log){
		"chunks":            func(l *wal.Log) { l.Resume(1, wal.LastChunkSeq+1) },
		"chunks to the end": func(l *wal.Log) { l.UsedChunk(math.MaxUint64) },
		"records":           func(l *wal.Log) { l.Resume(wal.LastRecordSeq+1, 1) },
	} {
		t.Run(what, func(t *testing.T) {
			s, _ := newStore(t, Options{checkpointInterval: -1})
			set(s.wal)
			if _, err := s.CreateVolume("v", VolumeOptions{Size: 1 << 20}); !errors.Is(err, ErrExhausted) {
				t.Error(err)
			}
			killStore(s)
		})
	}
}
