package cow

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/vdisk/vdisk/cow/internal/audit"
	"github.com/vdisk/vdisk/format"
	"github.com/vdisk/vdisk/internal/workload"
)

// space deletes something, and compares what that frees with what was said that it would.
func (w *modelStore) space(o op, name string) error {
	if err := w.abort(); err != nil { // it keeps its base
		return err
	}
	if err := w.reclaim(); err != nil {
		return err
	}
	said, err := w.usage()
	if err != nil {
		return err
	}
	u := said[Ref{Volume: name}]
	before := w.s.Info().LiveBytes
	want, err := w.giveUp(o, name, said)
	if err != nil {
		return err
	}
	// Some of it may still be deleted and not reaped: that changes nothing of what the others would free.
	if o.c%2 == 0 {
		if _, err := w.usage(); err != nil {
			return err
		}
	}
	if err := w.reclaim(); err != nil {
		return err
	}
	if freed := before - w.s.Info().LiveBytes; freed != want {
		return fmt.Errorf("%d bytes were freed, and not %d, of %+v", freed, want, u)
	}
	return nil
}

// giveUp deletes something of a volume, and returns what that should free.
func (w *modelStore) giveUp(o op, name string, said map[Ref]Usage) (want int64, err error) {
	v := Ref{Volume: name}
	snaps := slices.Sorted(maps.Keys(w.m.now()[name].snaps))
	remove := func(r Ref) error {
		if err := w.release(r); err != nil {
			return err
		}
		w.m.remove(r)
		return w.event(w.s.Remove(r, true))
	}
	one := Ref{Volume: name}
	if len(snaps) > 0 {
		one.Snapshot = snaps[mix(o.b)%uint64(len(snaps))]
	}
	switch kind := o.c % 8; {
	case kind == 0 || len(snaps) == 0:
		w.closeDevice(name)
		return said[v].Used, remove(v)
	case kind == 1:
		for _, sn := range snaps {
			err = errors.Join(err, remove(Ref{name, sn}))
		}
		return said[v].UsedBySnapshots, err
	case kind < 4: // what only the head has is lost
		w.closeDevice(name)
		w.m.rollback(one)
		return said[v].Exclusive, w.event(w.s.Rollback(one))
	default:
		return said[one].Exclusive, remove(one)
	}
}

// reclaim has everything reaped that is deleted.
func (w *modelStore) reclaim() error { return w.event(w.s.reclaimDeleted(context.Background())) }

// usage is what the store says of all there is, after a comparison with the model and with the live bytes.
func (w *modelStore) usage() (map[Ref]Usage, error) {
	// A store that cannot make a checkpoint answers as of the last one, which is not what the model has.
	tx, all, err := w.s.readTable()
	if err == nil {
		err = tx.Close()
	}
	if err == nil && !all {
		err = errors.Join(w.s.wal.Err(), w.s.checkpoints.failure)
	}
	if err != nil {
		return nil, err
	}
	us, err := w.s.Usage(context.Background())
	if w.event(err) != nil {
		return nil, err
	}
	said := map[Ref]Usage{}
	for _, u := range us {
		said[u.Ref] = u
	}
	n := 0
	for name, v := range w.m.now() {
		disks := map[Ref]disk{{Volume: name}: v.disk}
		for sn, d := range v.snaps {
			disks[Ref{name, sn}] = d
		}
		for r, d := range disks {
			n++
			u := said[r]
			switch {
			case u.Mapped != d.mapped():
				err = fmt.Errorf("%v: %d bytes are mapped, not %d", r, d.mapped(), u.Mapped)
			case u.Shared < 0 || u.Shared > u.Referenced || u.Exclusive+u.Shared < u.Referenced || u.Used < u.Exclusive+u.UsedBySnapshots:
				err = fmt.Errorf("that cannot be: %+v", u)
			}
		}
	}
	if len(said) != n {
		err = fmt.Errorf("%d things take space, not %d", n, len(said))
	}
	return said, errors.Join(err, w.sameAlone(us), w.sameLive(us), w.sameCounts())
}

// sameCounts compares what was counted of the heads, with all changes since, with a new count, and begins to count those
// that are not counted yet.
func (w *modelStore) sameCounts() error {
	w.s.mu.Lock()
	volumes := slices.Collect(maps.Values(w.s.catalog.volumes))
	w.s.mu.Unlock()
	for _, v := range volumes {
		b, now := v.branch, &headCount{}
		was := b.count
		b.count = now
		if err := w.s.countHead(b, now); w.event(err) != nil {
			return err
		}
		if was.isKnown() && now.known && was.holding != now.holding {
			return fmt.Errorf("%s was counted to hold %+v, and holds %+v", v.Name, was.holding, now.holding)
		}
	}
	return nil
}

// sameAlone asks for each by itself: then a snapshot is answered for in another way.
func (w *modelStore) sameAlone(us []Usage) error {
	for _, u := range us {
		alone, err := w.s.Usage(context.Background(), u.Ref)
		if w.event(err) != nil {
			return err
		}
		u.Family, u.FamilyID = 0, 0
		if len(alone) != 1 || alone[0] != u {
			return fmt.Errorf("%+v by itself is %+v", u, alone)
		}
	}
	return nil
}

func (d disk) mapped() (n int64) {
	for _, b := range d.blocks {
		if b != nil {
			n += format.BlockSize
		}
	}
	return n
}

// sameLive compares what all references together keep, and what all families take, with the live bytes: the rest is
// deleted and not reaped.
func (w *modelStore) sameLive(us []Usage) error {
	tx, _, err := w.s.readTable()
	if err != nil {
		return err
	}
	defer tx.Close()
	scan, err := audit.NewUsageScan(tx, func() error { return nil })
	if err != nil {
		return err
	}
	kept, err := scan.Kept()
	if err != nil {
		return err
	}
	families := int64(0)
	seen := map[uint32]bool{}
	for _, u := range us {
		if u.Family < u.Used && u.Ref.Snapshot == "" || (u.FamilyID != 0) != (u.Ref.Snapshot == "") {
			return fmt.Errorf("that cannot be: %+v", u)
		}
		if !seen[u.FamilyID] {
			seen[u.FamilyID] = true
			families += u.Family
		}
	}
	if families != kept {
		return fmt.Errorf("%d bytes are kept, and all families take %d: %+v", kept, families, us)
	}
	w.s.mu.Lock()
	waits := w.s.reapable()
	w.s.mu.Unlock()
	if live := w.s.Info().LiveBytes; kept > live || kept < live && !waits {
		return fmt.Errorf("%d bytes are kept, %d live (deleted things wait: %v)", kept, live, waits)
	}
	return nil
}

// TestUsage goes through what each figure means, with records of one block.
func TestUsage(t *testing.T) {
	s, _ := newStore(t, Options{checkpointInterval: -1})
	_, err := s.CreateVolume("v", VolumeOptions{Size: 4 << 20, Codec: format.Raw})
	must(t, err)
	const record = format.RecordHeaderSize + format.BlockSize
	write := func(volume string, blocks ...int64) {
		t.Helper()
		d, err := s.OpenDevice(Ref{Volume: volume}, false)
		must(t, err)
		for _, b := range blocks {
			_, err := d.WriteAt(randomBytes(format.BlockSize, uint64(b)), b*format.BlockSize)
			must(t, err)
		}
		must(t, d.Close())
	}
	// In blocks: mapped, referenced, exclusive, shared, used by snapshots, used.
	check := func(r Ref, want [6]int64) {
		t.Helper()
		us, err := s.Usage(t.Context(), r)
		must(t, err)
		if len(us) != 1 {
			t.Fatalf("%v: %+v", r, us)
		}
		u := us[0]
		got := [6]int64{u.Mapped / format.BlockSize, u.Referenced / record, u.Exclusive / record, u.Shared / record, u.UsedBySnapshots / record, u.Used / record}
		if got != want || u.Ref != r {
			t.Errorf("%v: %v, want %v", r, got, want)
		}
	}
	v, a, b, c := Ref{Volume: "v"}, Ref{"v", "a"}, Ref{"v", "b"}, Ref{Volume: "c"}
	check(v, [6]int64{})
	write("v", 0, 1, 2, 300)
	check(v, [6]int64{4, 4, 4, 0, 0, 4})
	must(t, s.Snapshot(a))
	check(v, [6]int64{4, 4, 0, 4, 0, 4})
	write("v", 0, 3)
	check(v, [6]int64{5, 5, 2, 3, 1, 6})
	check(a, [6]int64{4, 4, 1, 3, 0, 1})
	must(t, s.Snapshot(b))
	write("v", 1, 3)
	check(v, [6]int64{5, 5, 2, 3, 3, 8}) // 0 of a, 1 of both, 3 of b
	check(a, [6]int64{4, 4, 1, 3, 0, 1})
	check(b, [6]int64{5, 5, 1, 4, 0, 1})
	must(t, s.Clone(a, "c"))
	check(a, [6]int64{4, 4, 0, 4, 0, 0}) // what the clone keeps, nobody frees
	check(v, [6]int64{5, 5, 2, 3, 1, 4}) // 1 of b is kept, too
	check(c, [6]int64{4, 4, 0, 4, 0, 0})
	write("c", 0, 301)
	check(c, [6]int64{5, 5, 2, 3, 0, 2})
	families(t, s, record, map[string]int64{"v": 10, "c": 10}) // all that v has ever had, and the two
	_, err = s.CreateVolume("w", VolumeOptions{Size: 4 << 20, Codec: format.Raw})
	must(t, err)
	write("w", 7)
	families(t, s, record, map[string]int64{"v": 10, "c": 10, "w": 1})
	must(t, s.Remove(Ref{Volume: "w"}, false))
	must(t, s.Remove(a, false))
	check(c, [6]int64{5, 5, 3, 3, 0, 3}) // a's 0 goes with it, and is not its own
	must(t, s.Remove(v, true))
	check(c, [6]int64{5, 5, 6, 0, 0, 6})

	us, err := s.Usage(t.Context())
	if err != nil || len(us) != 1 {
		t.Errorf("%+v, %v", us, err)
	}
	if us, err = s.Usage(t.Context(), a, v); err != nil || len(us) != 0 {
		t.Errorf("of what is not there: %+v, %v", us, err)
	}
	must(t, s.Close())
	if _, err := s.Usage(t.Context()); !errors.Is(err, ErrClosed) {
		t.Errorf("after Close: %v", err)
	}
}

// families compares what families take, in blocks. Those that take the same are one.
func families(t *testing.T, s *Store, record int64, want map[string]int64) {
	t.Helper()
	us, err := s.Usage(t.Context())
	must(t, err)
	got, ids := map[string]int64{}, map[int64]uint32{}
	for _, u := range us {
		if u.Ref.Snapshot != "" {
			continue
		}
		got[u.Ref.Volume] = u.Family / record
		if id, ok := ids[u.Family]; ok && id != u.FamilyID {
			t.Errorf("%v is of another family: %+v", u.Ref, us)
		}
		ids[u.Family] = u.FamilyID
	}
	if !maps.Equal(got, want) {
		t.Errorf("families take %v, want %v", got, want)
	}
}

// TestRoundsLeaveNoSpace fills, snapshots, overwrites and deletes, twenty times, or four in the short form. Once
// cleaned, the store takes what it took after the first round, and when all is deleted next to nothing.
func TestRoundsLeaveNoSpace(t *testing.T) {
	t.Parallel()
	const size, chunk = 16 << 20, 512 << 10
	s, _ := newStore(t, Options{checkpointInterval: -1, chunkBytes: chunk})
	_, err := s.CreateVolume("v", VolumeOptions{Size: size, Codec: format.S2})
	must(t, err)
	d, err := s.OpenDevice(Ref{Volume: "v"}, false)
	must(t, err)
	r := rand.New(rand.NewPCG(1, 2))
	rounds := 20
	if testing.Short() {
		rounds = 4
	}
	var first StoreInfo
	for round := range rounds {
		turn(t, s, d, r, size)
		_, err := s.Clean(t.Context(), worthwhile)
		must(t, err)
		in := s.Info()
		if round == 0 {
			first = in
			continue
		}
		// The last chunk is not full, and of each of the others less than worthwhile is dead.
		if most := in.LiveBytes + in.LiveBytes/16 + 2*chunk; in.ChunkBytes > most || in.LiveBytes > first.LiveBytes+first.LiveBytes/100 || in.MetaBytes > 2*first.MetaBytes {
			t.Fatalf("round %d: %+v\nround 0: %+v", round, in, first)
		}
	}
	if rep := mustCheck(t, s); rep.Versions != size>>20 || rep.Branches != 1 {
		t.Errorf("what is left: %+v", rep)
	}
	must(t, errors.Join(d.Close(), s.Remove(Ref{Volume: "v"}, true)))
	_, err = s.Clean(t.Context(), worthwhile)
	must(t, err)
	if in := s.Info(); in.LiveBytes != 0 || in.Chunks > 2 || in.ChunkBytes > chunk {
		t.Errorf("after everything is deleted: %+v", in)
	}
	must(t, s.Close())
}

// turn is one round: a fill, a snapshot and a clone of it, all blocks overwritten in any order, and the deletion of
// both. The cleaner works in between, so that what is deleted has been moved.
func turn(t *testing.T, s *Store, d *Device, r *rand.Rand, size int64) {
	t.Helper()
	p := make([]byte, 1<<20)
	for off := int64(0); off < size; off += int64(len(p)) {
		workload.HalfCompressible(r, p)
		_, err := d.WriteAt(p, off)
		must(t, err)
	}
	sn := Ref{"v", "s"}
	must(t, errors.Join(s.Snapshot(sn), s.Clone(sn, "c")))
	c, err := s.OpenDevice(Ref{Volume: "c"}, false)
	must(t, err)
	for i, b := range r.Perm(int(size / format.BlockSize)) {
		at := int64(b) * format.BlockSize
		_, err := d.WriteAt(p[at%int64(len(p)):][:format.BlockSize], at)
		if i%3 == 0 {
			_, cerr := c.WriteAt(p[:format.BlockSize], at)
			err = errors.Join(err, cerr)
		}
		must(t, err)
	}
	_, err = s.Clean(t.Context(), 0.3)
	must(t, errors.Join(err, c.Close(), s.Remove(Ref{Volume: "c"}, true), s.Remove(sn, false)))
}
