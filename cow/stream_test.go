package cow

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"path/filepath"
	"testing"

	"github.com/vdisk/vdisk/format"
	"github.com/vdisk/vdisk/internal/stream"
)

// memoryOptions are for small stores that no other goroutine works on.
var memoryOptions = Options{chunkBytes: 512 << 10, checkpointInterval: -1, noTableSync: true}

func newMemoryStore(t testing.TB) (*Store, string) {
	t.Helper()
	dir := filepath.Join(memoryDir(t), "store")
	must(t, Create(dir))
	s, err := Open(dir, memoryOptions)
	must(t, err)
	return s, dir
}

// streamStore is a store with a volume v that has everything a stream meets: snapshots s0 to s3, units that later
// writes have cut, holes, records that were moved, a size that changes, and a clone c of v@s1 with the snapshot t.
func streamStore(t *testing.T, rng *rand.Rand, size int64) *Store {
	t.Helper()
	s, _ := newMemoryStore(t)
	_, err := s.CreateVolume("v", VolumeOptions{Size: size, Codec: format.S2})
	must(t, err)
	scribble := func(name string, n int) {
		d, err := s.OpenDevice(Ref{Volume: name}, false)
		must(t, err)
		for range n {
			length := 1 + rng.Int64N(60<<10)
			off := rng.Int64N(d.Size() - length)
			if rng.IntN(4) == 0 {
				must(t, d.Discard(off, length))
				continue
			}
			p := make([]byte, length)
			for i := 0; i < len(p); i += 8 + rng.IntN(8)*rng.IntN(2) { // some of it compresses
				p[i] = byte(rng.Uint32())
			}
			_, err := d.WriteAt(p, off)
			must(t, err)
		}
		must(t, d.Close())
	}
	for i, resize := range []int64{size, size - 601*512, size + 600*512, size} {
		must(t, s.Resize("v", resize, true))
		scribble("v", 60)
		must(t, s.Snapshot(Ref{"v", fmt.Sprint("s", i)}))
		if i == 1 {
			must(t, s.Clone(Ref{"v", "s1"}, "c"))
			scribble("c", 20)
			must(t, s.Snapshot(Ref{"c", "t"}))
		}
		if i == 2 {
			_, err := s.Cold(t.Context())
			must(t, err)
		}
		_, err := s.Clean(t.Context(), 0.01)
		must(t, err)
	}
	return s
}

// allOf reads all of a volume or snapshot.
func allOf(t testing.TB, s *Store, r Ref) []byte {
	t.Helper()
	d, err := s.OpenDevice(r, true)
	must(t, err)
	defer d.Close()
	p := make([]byte, d.Size())
	_, err = d.ReadAt(p, 0)
	must(t, err)
	return p
}

// mustBeSame proves that two stores hold the same, under these names.
func mustBeSame(t testing.TB, a *Store, ra Ref, b *Store, rb Ref) {
	t.Helper()
	if x, y := allOf(t, a, ra), allOf(t, b, rb); !bytes.Equal(x, y) {
		n := 0
		for n < min(len(x), len(y)) && x[n] == y[n] {
			n++
		}
		t.Fatalf("%v has %d bytes, %v has %d; they differ at %d", ra, len(x), rb, len(y), n)
	}
}

func guid(t testing.TB, s *Store, r Ref) format.GUID {
	t.Helper()
	in, err := s.Volume(r.Volume)
	must(t, err)
	for _, sn := range in.Snapshots {
		if sn.Name == r.Snapshot {
			return sn.GUID
		}
	}
	t.Fatal(r, "is not there")
	return format.GUID{}
}

// sent sends to memory.
func sent(t testing.TB, s *Store, o SendOptions) []byte {
	t.Helper()
	var out bytes.Buffer
	_, err := s.Send(t.Context(), o, &out)
	must(t, err)
	return out.Bytes()
}

func receive(s *Store, file []byte, o ReceiveOptions) error {
	_, err := s.Receive(context.Background(), bytes.NewReader(file), o)
	return err
}

// TestSendReceive sends all kinds of streams to another store, which then has the same: content, sizes, names and GUIDs.
func TestSendReceive(t *testing.T) {
	a := streamStore(t, rand.New(rand.NewPCG(7, 7)), 3<<20+512)
	b, dir := newMemoryStore(t)
	to := ReceiveOptions{Target: Ref{Volume: "v"}}
	must(t, receive(b, sent(t, a, SendOptions{Snapshot: Ref{"v", "s0"}}), to))
	must(t, receive(b, sent(t, a, SendOptions{Snapshot: Ref{"v", "s1"}, Base: Ref{"v", "s0"}}), to))
	must(t, receive(b, sent(t, a, SendOptions{Snapshot: Ref{"v", "s3"}, Base: Ref{"v", "s1"}, Between: true}), to))
	must(t, receive(b, sent(t, a, SendOptions{Snapshot: Ref{"c", "t"}, Base: Ref{"v", "s1"}}), ReceiveOptions{Target: Ref{"d", "u"}}))
	// Back to an older state, and one volume from another: a difference goes between any two states.
	must(t, receive(b, sent(t, a, SendOptions{Snapshot: Ref{"v", "s0"}, Base: Ref{"c", "t"}}), ReceiveOptions{Target: Ref{Volume: "d"}}))
	for _, r := range [][2]Ref{
		{{"v", "s0"}, {"v", "s0"}},
		{{"v", "s1"}, {"v", "s1"}},
		{{"v", "s2"}, {"v", "s2"}},
		{{"v", "s3"}, {"v", "s3"}},
		{{"v", "s3"}, {Volume: "v"}},
		{{"c", "t"}, {"d", "u"}},
		{{"v", "s0"}, {"d", "s0"}},
		{{"v", "s0"}, {Volume: "d"}},
	} {
		mustBeSame(t, a, r[0], b, r[1])
		if r[1].Snapshot != "" && guid(t, a, r[0]) != guid(t, b, r[1]) {
			t.Error(r, "GUIDs differ")
		}
	}
	v := b.catalog.byName["v"]
	for _, sn := range v.snapshots {
		if sn.branch != v.branch {
			t.Errorf("%s is on another branch: once it is deleted, it would stay", sn.Name)
		}
	}
	if in, err := b.Volume("d"); err != nil || in.Origin != "v@s1" {
		t.Error(in, err)
	}
	// What was cut off is not there when the volume grows.
	must(t, b.Resize("v", 8<<20, false))
	if p := allOf(t, b, Ref{Volume: "v"}); !format.IsZero(p[3<<20+512:]) {
		t.Error("something has come back")
	}
	must(t, b.Close())
	b, err := Open(dir, memoryOptions)
	must(t, err)
	mustBeSame(t, a, Ref{"v", "s2"}, b, Ref{"v", "s2"})
	mustEnd(t, a)
	mustEnd(t, b)
}

// TestSendAsStored holds a stream to the units that the store has: nothing but parts of units is compressed again, and
// what is read is hardly more than what is sent.
func TestSendAsStored(t *testing.T) {
	a := streamStore(t, rand.New(rand.NewPCG(8, 8)), 3<<20)
	defer mustEnd(t, a)
	for _, o := range []SendOptions{
		{Snapshot: Ref{"v", "s3"}}, {Snapshot: Ref{"v", "s3"}, Base: Ref{"v", "s2"}}, {Snapshot: Ref{"v", "s1"}, Base: Ref{"v", "s0"}},
	} {
		var out bytes.Buffer
		done := int64(0)
		o.Progress = func(n, _ int64) { done = n }
		got, err := a.Send(t.Context(), o, &out)
		must(t, err)
		o.Estimate = true
		est, err := a.Send(t.Context(), o, nil)
		must(t, err)
		r := stream.NewReader(&out)
		_, err = r.Next()
		must(t, err)
		for err == nil {
			_, err = r.Frame()
		}
		totals := r.Totals()
		if err != io.EOF || totals.Units != got[0].Units || totals.Holes != got[0].Holes || totals.Blocks != got[0].Blocks || totals.Length != got[0].Length {
			t.Error(err, totals, got)
		}
		if est[0].Units != got[0].Units || est[0].Holes != got[0].Holes || est[0].Blocks != got[0].Blocks || est[0].Read != 0 {
			t.Error(est, got)
		}
		// A record that was moved has become smaller, if some of its blocks were dead, and its entries do not say so.
		if lo, hi := got[0].Length*8/10, got[0].Length*2; est[0].Length < lo || est[0].Length > hi {
			t.Errorf("estimated %d, sent %d", est[0].Length, got[0].Length)
		}
		if got[0].Read > 2*got[0].Bytes || done == 0 {
			t.Errorf("%d bytes read, %d sent, progress %d", got[0].Read, got[0].Bytes, done)
		}
	}
}

// TestReceiveRefuses tries what must be refused. It changes nothing.
func TestReceiveRefuses(t *testing.T) {
	a := streamStore(t, rand.New(rand.NewPCG(9, 9)), 1<<20)
	b, _ := newMemoryStore(t)
	full := sent(t, a, SendOptions{Snapshot: Ref{"v", "s0"}})
	next := sent(t, a, SendOptions{Snapshot: Ref{"v", "s1"}, Base: Ref{"v", "s0"}})
	far := sent(t, a, SendOptions{Snapshot: Ref{"v", "s3"}, Base: Ref{"v", "s2"}})
	part := sent(t, a, SendOptions{Snapshot: Ref{"v", "s0"}, From: 40})
	to := ReceiveOptions{Target: Ref{Volume: "v"}}
	must(t, receive(b, full, to))
	refused := func(what string, err, want error) {
		t.Helper()
		if !errors.Is(err, want) || err == nil {
			t.Errorf("%s: %v, not %v", what, err, want)
		}
		if n := len(b.Volumes()); n != 1 {
			t.Errorf("%s: %d volumes", what, n)
		}
	}
	named := ReceiveOptions{Target: Ref{"v", "x"}}
	refused("full again", receive(b, full, to), ErrExists)
	refused("full under another name", receive(b, full, named), ErrExists)
	refused("full into nothing named twice", receive(b, append(bytes.Clone(next), next...), named), ErrInvalid)
	must(t, b.Remove(Ref{"v", "x"}, false))
	must(t, b.Rollback(Ref{"v", "s0"}))
	refused("no base", receive(b, far, to), ErrNotFound)
	refused("no base for a new volume", receive(b, far, ReceiveOptions{Target: Ref{Volume: "w"}}), ErrNotFound)
	refused("a part of nothing", receive(b, part, ReceiveOptions{Target: Ref{Volume: "w"}}), ErrInvalid)
	refused("nothing", receive(b, nil, to), io.ErrUnexpectedEOF)
	refused("no stream", receive(b, []byte("no stream, but long enough for a header"), to), stream.ErrDamaged)
	d, err := b.OpenDevice(Ref{Volume: "v"}, true)
	must(t, err)
	refused("open", receive(b, next, to), ErrBusy)
	must(t, d.Close())
	refused("a dry run of what is refused", receive(b, far, ReceiveOptions{Target: Ref{Volume: "v"}, DryRun: true}), ErrNotFound)
	must(t, receive(b, next, ReceiveOptions{Target: Ref{Volume: "v"}, DryRun: true}))
	must(t, b.Snapshot(Ref{"v", "same"})) // changes nothing of the content
	must(t, b.Remove(Ref{"v", "same"}, false))
	d, err = b.OpenDevice(Ref{Volume: "v"}, false)
	must(t, err)
	_, err = d.WriteAt([]byte{1}, 4711)
	must(t, errors.Join(err, d.Close()))
	refused("changed", receive(b, next, to), ErrBusy)
	must(t, b.Checkpoint())
	refused("changed, in the table", receive(b, next, to), ErrBusy)
	to.Force = true
	must(t, receive(b, next, to))
	mustBeSame(t, a, Ref{"v", "s1"}, b, Ref{Volume: "v"})
	_, err = a.Send(t.Context(), SendOptions{Snapshot: Ref{"v", "s0"}, Base: Ref{"v", "s0"}}, io.Discard)
	refused("send the base", err, ErrInvalid)
	_, err = a.Send(t.Context(), SendOptions{Snapshot: Ref{Volume: "v"}}, io.Discard)
	refused("send a head", err, ErrInvalid)
	_, err = a.Send(t.Context(), SendOptions{Snapshot: Ref{"v", "s0"}, From: 1000}, io.Discard)
	refused("send from behind the end", err, ErrInvalid)
	_, err = a.Send(t.Context(), SendOptions{Snapshot: Ref{"c", "t"}, Base: Ref{"v", "s2"}, Between: true}, io.Discard)
	refused("send what is not between", err, ErrInvalid)
	_, err = a.Send(t.Context(), SendOptions{Snapshot: Ref{"v", "s9"}}, io.Discard)
	refused("send nothing", err, ErrNotFound)
	mustEnd(t, a)
	mustEnd(t, b)
}

var cuts = flag.Int("stream.cuts", 10, "cuts of TestCuts")

// TestCuts cuts a reception at random places, each time several times, with the store opened anew now and then. It goes
// on from what the receiver names, and ends with the same content. What is sent again is at most what lies between two
// marks, and the frame that was cut. -stream.cuts=1000 is the large form.
func TestCuts(t *testing.T) {
	rng := rand.New(rand.NewPCG(uint64(*cuts), 11))
	a := streamStore(t, rng, 3<<20+512)
	b, dir := newMemoryStore(t)
	must(t, receive(b, sent(t, a, SendOptions{Snapshot: Ref{"v", "s0"}}), ReceiveOptions{Target: Ref{Volume: "v"}}))
	o := SendOptions{Snapshot: Ref{"v", "s3"}, Base: Ref{"v", "s0"}, frameBytes: 16 << 10, markBytes: 64 << 10}
	const again = 64<<10 + 2*(16<<10) + format.UnitSize // at most
	for n := 0; n < *cuts; {
		o.From = 0
		whole := int64(len(sent(t, a, o)))
		total, times := int64(0), int64(0)
		for {
			file := sent(t, a, o)
			at := rng.IntN(len(file) + len(file)/4)
			cut := at < len(file)
			if cut {
				file = file[:at]
			}
			total += int64(len(file))
			_, err := b.Receive(t.Context(), bytes.NewReader(file), ReceiveOptions{Target: Ref{Volume: "v"}})
			if !cut {
				must(t, err)
				break
			}
			n, times = n+1, times+1
			var resumable *ReceiveError
			if !errors.Is(err, stream.ErrCut) && !errors.Is(err, io.ErrUnexpectedEOF) {
				t.Fatal(err)
			}
			if errors.As(err, &resumable) {
				o.From = resumable.Mark
			}
			if rng.IntN(4) == 0 {
				must(t, b.Close())
				b, err = Open(dir, memoryOptions)
				must(t, err)
			}
			if in, err := b.Volume(receivingName("v")); err == nil {
				o.From = in.Receiving.Mark // which is what a command prints
			} else if o.From != 0 {
				t.Fatal(o.From, err)
			}
		}
		if most := whole + times*(again+1000); total > most {
			t.Errorf("%d bytes were sent for %d after %d cuts, at most %d are wanted", total, whole, times, most)
		}
		mustBeSame(t, a, Ref{"v", "s3"}, b, Ref{"v", "s3"})
		must(t, b.Rollback(Ref{"v", "s0"}))
		must(t, b.Remove(Ref{"v", "s3"}, false))
	}
	mustEnd(t, a)
	mustEnd(t, b)
}

// TestHiddenVolume cuts a reception, and tries what a hidden volume, its target and its base refuse meanwhile.
func TestHiddenVolume(t *testing.T) {
	a := streamStore(t, rand.New(rand.NewPCG(10, 10)), 1<<20)
	b, dir := newMemoryStore(t)
	must(t, receive(b, sent(t, a, SendOptions{Snapshot: Ref{"v", "s0"}}), ReceiveOptions{Target: Ref{Volume: "v"}}))
	next := SendOptions{Snapshot: Ref{"v", "s1"}, Base: Ref{"v", "s0"}, frameBytes: 1 << 10, markBytes: 4 << 10}
	file := sent(t, a, next)
	hidden := Ref{Volume: "v.receiving"}
	for _, dropped := range []bool{false, true} {
		err := receive(b, file[:len(file)/2], ReceiveOptions{Target: Ref{Volume: "v"}})
		var resumable *ReceiveError
		if !errors.As(err, &resumable) || resumable.Mark == 0 || resumable.Source != "v@s1" || resumable.Base != "v@s0" {
			t.Fatal(err)
		}
		must(t, b.Close())
		b, err = Open(dir, memoryOptions)
		must(t, err)
		in, err := b.Volume(hidden.Volume)
		if err != nil || in.Receiving == nil || in.Receiving.Mark != resumable.Mark || in.Receiving.Volume != "v" {
			t.Fatal(in, err)
		}
		mustBeSame(t, a, Ref{"v", "s0"}, b, Ref{Volume: "v"}) // the target is as it was
		_, open := b.OpenDevice(hidden, true)
		_, create := b.CreateVolume(hidden.Volume, VolumeOptions{Size: 512})
		for what, err := range map[string]error{
			"open": open, "snapshot": b.Snapshot(Ref{hidden.Volume, "x"}), "clone": b.Clone(Ref{hidden.Volume, "x"}, "y"), "roll back": b.Rollback(Ref{hidden.Volume, "x"}),
			"resize": b.Resize(hidden.Volume, 4<<20, false), "rename": b.Rename(hidden, Ref{Volume: "y"}), "rename the target": b.Rename(Ref{Volume: "v"}, Ref{Volume: "y"}),
			"remove the target": b.Remove(Ref{Volume: "v"}, true), "remove the base": b.Remove(Ref{"v", "s0"}, false),
			"receive something else": receive(b, sent(t, a, SendOptions{Snapshot: Ref{"v", "s3"}, Base: Ref{"v", "s0"}}), ReceiveOptions{Target: Ref{Volume: "v"}}),
		} {
			if !errors.Is(err, ErrBusy) {
				t.Errorf("%s: %v", what, err)
			}
		}
		if !errors.Is(create, ErrExists) {
			t.Error(create)
		}
		if dropped {
			must(t, b.Abort("v"))
			if err := b.Abort("v"); !errors.Is(err, ErrNotFound) {
				t.Error(err)
			}
			mustBeSame(t, a, Ref{"v", "s0"}, b, Ref{Volume: "v"})
			break
		}
		// A part that begins behind the mark is refused, and one that begins before it does no harm.
		next.From = resumable.Mark + 1
		if err := receive(b, sent(t, a, next), ReceiveOptions{Target: Ref{Volume: "v"}}); !errors.Is(err, ErrInvalid) {
			t.Error(err)
		}
		next.From = resumable.Mark / 2
		must(t, receive(b, sent(t, a, next), ReceiveOptions{Target: Ref{Volume: "v"}}))
		mustBeSame(t, a, Ref{"v", "s1"}, b, Ref{Volume: "v"})
		must(t, b.Rollback(Ref{"v", "s0"}))
		must(t, b.Remove(Ref{"v", "s1"}, false))
	}
	if _, err := b.Volume(hidden.Volume); !errors.Is(err, ErrNotFound) {
		t.Error(err)
	}
	must(t, receive(b, file, ReceiveOptions{Target: Ref{Volume: "v"}}))
	mustBeSame(t, a, Ref{"v", "s1"}, b, Ref{Volume: "v"})
	mustEnd(t, a)
	mustEnd(t, b)
}
