package cow

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"testing"

	"github.com/vdisk/vdisk/format"
)

// flat writes to a volume, takes a snapshot, and changes a clone of it in places. It returns what the clone holds.
func flat(t *testing.T, s *Store) []byte {
	t.Helper()
	_, err := s.CreateVolume("v", VolumeOptions{Size: 3 << 20, Codec: format.S2})
	must(t, err)
	want := make([]byte, 3<<20)
	for i := 0; i < 2<<20; i += 8 {
		copy(want[i:], "flatten"+string(rune('a'+i/4096%26)))
	}
	put := func(name string, p []byte, off int64) {
		t.Helper()
		d, err := s.OpenDevice(Ref{Volume: name}, false)
		must(t, err)
		_, err = d.WriteAt(p, off)
		must(t, errors.Join(err, d.Close()))
	}
	put("v", want[:2<<20], 0)
	must(t, errors.Join(s.Snapshot(Ref{"v", "a"}), s.Clone(Ref{"v", "a"}, "c")))
	for _, off := range []int64{4096, 70_000, 1 << 20} { // parts of units
		p := bytes.Repeat([]byte{'x'}, 5000)
		copy(want[off:], p)
		put("c", p, off)
	}
	put("v", make([]byte, 64<<10), 0)
	return want
}

func wholeOf(t *testing.T, s *Store, r Ref) []byte {
	t.Helper()
	d, err := s.OpenDevice(r, true)
	must(t, err)
	p := make([]byte, d.Size())
	_, err = d.ReadAt(p, 0)
	must(t, errors.Join(err, d.Close()))
	return p
}

// TestFlatten flattens a clone: it keeps its content, its origin can go, and the origin's space comes back.
func TestFlatten(t *testing.T) {
	s, dir := newStore(t, Options{checkpointInterval: -1})
	want := flat(t, s)
	rep, err := s.Flatten(context.Background(), "c")
	must(t, err)
	if rep.Origin != "v@a" || rep.Blocks == 0 || rep.Blocks > 512 {
		t.Errorf("%+v", rep)
	}
	info, err := s.Volume("c")
	must(t, err)
	if info.Origin != "" || info.Open != 0 {
		t.Errorf("%+v", info)
	}
	if again, err := s.Flatten(context.Background(), "c"); err != nil || again != (FlattenReport{}) {
		t.Error(again, err)
	}
	must(t, errors.Join(s.Remove(Ref{Volume: "v"}, true), s.reclaimDeleted(context.Background())))
	if s.mu.Lock(); len(s.catalog.branches) != 1 || len(s.catalog.snapshots) != 0 {
		t.Errorf("%d branches and %d points are left", len(s.catalog.branches), len(s.catalog.snapshots))
	}
	s.mu.Unlock()
	for range 2 {
		if !bytes.Equal(wholeOf(t, s, Ref{Volume: "c"}), want) {
			t.Error("the clone has another content")
		}
		_, err := s.Check(context.Background(), CheckOptions{ReadData: true}, func(p Problem) { t.Error(p) })
		must(t, err)
		must(t, s.Close())
		s, err = Open(dir, Options{checkpointInterval: -1})
		must(t, err)
	}
	must(t, s.Close())
}

// TestFlattenIsRefused: snapshots of a clone share with its origin, too.
func TestFlattenIsRefused(t *testing.T) {
	s, _ := newStore(t, Options{checkpointInterval: -1})
	flat(t, s)
	flatten := func() error { _, err := s.Flatten(context.Background(), "c"); return err }
	must(t, errors.Join(s.Snapshot(Ref{"c", "mine"}), s.Clone(Ref{"c", "mine"}, "d")))
	if err := flatten(); !errors.Is(err, ErrBusy) {
		t.Error(err)
	}
	must(t, s.Remove(Ref{"c", "mine"}, false))
	if err := flatten(); !errors.Is(err, ErrBusy) { // d needs it
		t.Error(err)
	}
	if _, err := s.Flatten(context.Background(), "nope"); !errors.Is(err, ErrNotFound) {
		t.Error(err)
	}
	_, err := s.Flatten(context.Background(), "d")
	must(t, errors.Join(err, flatten()))
}

// countdown is a context that ends when it has been asked a number of times.
type countdown struct {
	context.Context
	left int
}

func (c *countdown) Err() error {
	if c.left--; c.left < 0 {
		return context.Canceled
	}
	return nil
}

// flatten flattens a volume, whole or in part.
func (w *modelStore) flatten(o op, name string) error {
	ctx := context.Background()
	if o.b%2 == 0 {
		ctx = &countdown{ctx, int(o.b / 2 % 8)}
	}
	// A difference names what was copied, and need not: to the model these are other blocks with the same content.
	v := w.m.now()[name]
	v.blocks = slices.Clone(v.blocks)
	for i, b := range v.blocks {
		if b != nil && b != solid {
			same := *b
			v.blocks[i] = &same
		}
	}
	w.m.states[len(w.m.states)-1] = w.m.now().with(name, v)
	before, err := w.s.Volume(name)
	if err != nil {
		return err
	}
	_, err = w.s.Flatten(ctx, name)
	w.catchUp()
	switch {
	case errors.Is(err, ErrBusy), errors.Is(err, context.Canceled):
		return nil
	case err != nil:
		return err
	}
	if after, err := w.s.Volume(name); err != nil || after.Origin != "" {
		return fmt.Errorf("the origin was %q and is %q: %v", before.Origin, after.Origin, err)
	}
	return w.event(nil)
}

// TestFlattenGoesOn ends a flattening early, again and again. What was copied is not copied again.
func TestFlattenGoesOn(t *testing.T) {
	s, dir := newStore(t, Options{checkpointInterval: -1})
	want := flat(t, s)
	blocks := uint64(0)
	for n := 0; ; n++ {
		rep, err := s.Flatten(&countdown{context.Background(), n + 1}, "c")
		blocks += rep.Blocks
		if err == nil {
			break
		}
		if !errors.Is(err, context.Canceled) || n > 9 {
			t.Fatal(err)
		}
		must(t, s.Close())
		s, err = Open(dir, Options{checkpointInterval: -1})
		must(t, err)
	}
	if blocks == 0 || blocks > 512 {
		t.Error(blocks, "blocks were copied")
	}
	if !bytes.Equal(wholeOf(t, s, Ref{Volume: "c"}), want) {
		t.Error("the clone has another content")
	}
	must(t, s.Close())
}

// TestFlattenBesideWrites writes to a clone while it is flattened. No write is lost.
func TestFlattenBesideWrites(t *testing.T) {
	s, _ := newStore(t, Options{checkpointInterval: -1})
	want := flat(t, s)
	d, err := s.OpenDevice(Ref{Volume: "c"}, false)
	must(t, err)
	flattened := make(chan error)
	go func() {
		_, err := s.Flatten(context.Background(), "c")
		flattened <- err
	}()
	for n := 0; ; n++ {
		p, off := bytes.Repeat([]byte{byte('A' + n%20)}, 3000), int64(n*7919%700)*4096
		copy(want[off:], p)
		_, err := d.WriteAt(p, off)
		must(t, err)
		select {
		case err = <-flattened:
		default:
			continue
		}
		must(t, errors.Join(err, d.Close()))
		break
	}
	must(t, errors.Join(s.Remove(Ref{Volume: "v"}, true), s.reclaimDeleted(context.Background())))
	if !bytes.Equal(wholeOf(t, s, Ref{Volume: "c"}), want) {
		t.Error("the clone has another content")
	}
	_, err = s.Check(context.Background(), CheckOptions{ReadData: true}, func(p Problem) { t.Error(p) })
	must(t, errors.Join(err, s.Close()))
}

// TestFlattenKeepsAWrite writes to a block of a clone between the look at a leaf and the copy of it.
func TestFlattenKeepsAWrite(t *testing.T) {
	s, _ := newStore(t, Options{checkpointInterval: -1})
	want := flat(t, s)
	d, err := s.beginFlatten("c")
	must(t, err)
	f := &flattener{s: s, d: d, rep: new(FlattenReport)}
	if wanted, err := f.look(0); !wanted || err != nil {
		t.Fatal(wanted, err)
	}
	w, err := s.OpenDevice(Ref{Volume: "c"}, false)
	must(t, err)
	p := bytes.Repeat([]byte{'y'}, 4096)
	copy(want[40<<12:], p)
	_, err = w.WriteAt(p, 40<<12)
	must(t, errors.Join(err, w.Close()))
	if err := f.copyLeaf(0); !errors.Is(err, errChanged) {
		t.Error(err)
	}
	if err := s.Rollback(Ref{"v", "a"}); err != nil {
		t.Error(err)
	}
	if _, err := s.Flatten(context.Background(), "c"); !errors.Is(err, ErrBusy) { // there is one already
		t.Error(err)
	}
	if err := s.Remove(Ref{Volume: "c"}, false); !errors.Is(err, ErrBusy) {
		t.Error(err)
	}
	s.endFlatten(d)
	_, err = s.Flatten(context.Background(), "c")
	must(t, err)
	if !bytes.Equal(wholeOf(t, s, Ref{Volume: "c"}), want) {
		t.Error("the clone has another content")
	}
}
