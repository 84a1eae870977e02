package cow

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"pgregory.net/rapid"
)

// ticking is a clock that a test moves.
type ticking struct{ time.Time }

func (c *ticking) now() time.Time { return c.Time }

// step moves the clock by a second.
func (c *ticking) step() { c.Time = c.Add(time.Second) }

func newClock() *ticking { return &ticking{time.Date(2026, 11, 30, 12, 51, 43, 7e6, time.UTC)} }

// TestSnapshotAuto takes snapshots by the time, of those volumes that have changed.
func TestSnapshotAuto(t *testing.T) {
	clock := newClock()
	s, dir := newStore(t, Options{now: clock.now})
	for _, name := range []string{"v", "w"} {
		_, err := s.CreateVolume(name, VolumeOptions{Size: 4 << 20})
		must(t, err)
	}
	auto := func(names ...string) string {
		t.Helper()
		r, err := s.SnapshotAuto(t.Context(), names...)
		must(t, err)
		clock.step()
		return fmt.Sprint(r.Taken, r.Unchanged)
	}
	is := func(got, want string) {
		t.Helper()
		if got != want {
			t.Errorf("%s, not %s", got, want)
		}
	}
	write := func(name string, off int64) {
		t.Helper()
		d, err := s.OpenDevice(Ref{Volume: name}, false)
		must(t, err)
		_, err = d.WriteAt(randomBytes(4096, uint64(off)), off)
		must(t, errors.Join(err, d.Close()))
	}
	is(auto("v", "w"), "[v@auto-20261130T125143Z w@auto-20261130T125143Z] []") // the first in any case
	is(auto("v", "w"), "[] [v@auto-20261130T125143Z w@auto-20261130T125143Z]")
	write("v", 0)
	is(auto("w", "v"), "[v@auto-20261130T125145Z] [w@auto-20261130T125143Z]")
	info, err := s.Volume("v")
	must(t, err)
	if sn := info.Snapshots[1]; !sn.Created.Equal(clock.Add(-time.Second)) || sn.Name != AutoName(sn.Created) {
		t.Errorf("%+v", sn)
	}

	// What the table alone knows, and what only the log knows.
	write("v", 1<<20)
	must(t, s.Close())
	s, err = Open(dir, Options{now: clock.now})
	must(t, err)
	is(auto("v", "w"), "[v@auto-20261130T125146Z] [w@auto-20261130T125143Z]")
	is(auto("v", "w"), "[] [v@auto-20261130T125146Z w@auto-20261130T125143Z]")

	write("v", 2<<20)
	dir = crashed(t, s, dir)
	s, err = Open(dir, Options{now: clock.now, checkpointInterval: -1})
	must(t, err)
	is(auto("v", "w"), "[v@auto-20261130T125148Z] [w@auto-20261130T125143Z]")

	// A snapshot of another name is the newest, too. When it goes, its change counts again.
	write("w", 0)
	must(t, s.Snapshot(Ref{"w", "a"}))
	is(auto("w"), "[] [w@a]")
	must(t, s.Remove(Ref{"w", "a"}, false))
	is(auto("w"), "[w@auto-20261130T125150Z] []")

	// Another size, and a rollback.
	must(t, s.Resize("w", 8<<20, false))
	is(auto("w"), "[w@auto-20261130T125151Z] []")
	must(t, s.Rollback(Ref{"w", "auto-20261130T125151Z"}))
	is(auto("w"), "[] [w@auto-20261130T125151Z]")
	must(t, s.Rollback(Ref{"w", "auto-20261130T125143Z"})) // not the newest
	is(auto("w"), "[w@auto-20261130T125153Z] []")
	must(t, s.Clone(Ref{"w", "auto-20261130T125153Z"}, "c"))
	is(auto("c"), "[c@auto-20261130T125154Z] []")

	// Twice in a second, and all or none.
	write("v", 0)
	is(auto("v"), "[v@auto-20261130T125155Z] []")
	clock.Time = clock.Add(-time.Second)
	write("v", 0)
	write("w", 0)
	for _, x := range []struct {
		names []string
		want  error
	}{{[]string{"w", "v"}, ErrExists}, {[]string{"w", "nope"}, ErrNotFound}, {[]string{"w", "w"}, ErrInvalid}} {
		if _, err := s.SnapshotAuto(t.Context(), x.names...); !errors.Is(err, x.want) {
			t.Errorf("%v: %v", x.names, err)
		}
	}
	clock.step()
	is(auto("w", "v"), "[w@auto-20261130T125156Z v@auto-20261130T125156Z] []")
	is(auto(), "[] []")
	mustCheck(t, s)
	must(t, s.Close())
}

// crashed returns a store as a kill would leave s, which is closed.
func crashed(t *testing.T, s *Store, dir string) string {
	t.Helper()
	to := filepath.Join(memoryDir(t), "store")
	err := errors.Join(s.wal.Sync(), os.CopyFS(to, os.DirFS(dir)), os.Chmod(to, 0o700), s.Close(), os.RemoveAll(dir))
	if err != nil {
		t.Fatal(err)
	}
	return to
}

// TestAutoNames tells names of automatic snapshots from others.
func TestAutoNames(t *testing.T) {
	at := time.Date(2027, 1, 1, 0, 30, 0, 999, time.FixedZone("", 3600))
	if name := AutoName(at); name != "auto-20261231T233000Z" || !IsAutoName(name) {
		t.Error(name)
	}
	for _, name := range []string{"", "auto", "auto-20261331T233000Z", "auto-20261231T243000Z", "auto-20261231T233000", "xauto-20261231T233000Z", "auto-20261231T233000.5Z", "auto-20261231T233000Z-a", "Auto-20261231T233000Z"} {
		if IsAutoName(name) {
			t.Error(name)
		}
	}
}

// TestUnchangedIsUnchanged does random things to two volumes, and then asks for automatic snapshots. A volume that gets
// none reads as its newest snapshot does. One that has been left alone since then gets none.
func TestUnchangedIsUnchanged(t *testing.T) {
	dir := filepath.Join(memoryDir(t), "store")
	must(t, Create(dir))
	made, outer := 0, t
	rapid.Check(t, func(t *rapid.T) {
		clock := newClock()
		o := Options{now: clock.now, checkpointInterval: -1, noTableSync: true, reapBatch: 2, chunkBytes: 1 << 20, Logger: slog.New(slog.DiscardHandler)}
		must := func(err error) {
			t.Helper()
			if err != nil {
				t.Fatal(err)
			}
		}
		s, err := Open(dir, o)
		must(err)
		defer func() { _ = s.Close() }()
		made++
		v := fmt.Sprint("v", made)
		_, err = s.CreateVolume(v, VolumeOptions{Size: 3 << 20})
		must(err)
		var snaps []string // in the order in which they were taken
		same := ""         // the snapshot that the volume certainly is as, because nothing was done since
		for range rapid.IntRange(1, 12).Draw(t, "n") {
			clock.step()
			switch rapid.SampledFrom([]string{"write", "write", "zero", "snapshot", "rollback", "remove", "checkpoint", "restart", "crash", "clean", "auto", "auto"}).Draw(t, "op") {
			case "write":
				at(t, s, v, func(d *Device) error {
					_, err := d.WriteAt(randomBytes(8192, uint64(clock.Unix())), rapid.Int64Range(0, 3<<20-8192).Draw(t, "off"))
					return err
				})
				same = ""
			case "zero":
				at(t, s, v, func(d *Device) error { return d.WriteZeroes(0, 1<<20, false) })
				same = ""
			case "snapshot":
				same = fmt.Sprint("s", clock.Unix())
				snaps = append(snaps, same)
				must(s.Snapshot(Ref{v, same}))
			case "rollback":
				if len(snaps) > 0 {
					to := rapid.SampledFrom(snaps).Draw(t, "to")
					must(s.Rollback(Ref{v, to}))
					same = to
				}
			case "remove":
				if len(snaps) > 0 {
					gone := rapid.SampledFrom(snaps).Draw(t, "gone")
					must(s.Remove(Ref{v, gone}, false))
					snaps = slices.DeleteFunc(snaps, func(name string) bool { return name == gone })
					if same == gone {
						same = ""
					}
				}
			case "checkpoint":
				must(s.Checkpoint())
			case "restart":
				must(s.Close())
				s, err = Open(dir, o)
				must(err)
			case "crash":
				dir = crashed(outer, s, dir)
				s, err = Open(dir, o)
				must(err)
			case "clean":
				_, err := s.Clean(context.Background(), 0.1)
				must(err)
			case "auto":
				newest := ""
				if len(snaps) > 0 {
					newest = snaps[len(snaps)-1]
				}
				r, err := s.SnapshotAuto(t.Context(), v)
				must(err)
				switch {
				case len(r.Unchanged) == 1 && r.Unchanged[0] == Ref{v, newest}:
					if !bytes.Equal(readAll(t, s, Ref{Volume: v}), readAll(t, s, Ref{v, newest})) {
						t.Fatalf("%s is not as %s", v, newest)
					}
				case len(r.Taken) == 1 && len(r.Unchanged) == 0:
					if same != "" && same == newest {
						t.Fatalf("%s is as %s, and got a snapshot", v, same)
					}
					same = r.Taken[0].Snapshot
					snaps = append(snaps, same)
				default:
					t.Fatalf("%+v, and the newest is %q", r, newest)
				}
			}
		}
		must(s.Remove(Ref{Volume: v}, true))
	})
}

// at calls fn with a volume that is open.
func at(t *rapid.T, s *Store, volume string, fn func(*Device) error) {
	d, err := s.OpenDevice(Ref{Volume: volume}, false)
	if err == nil {
		err = errors.Join(fn(d), d.Close())
	}
	if err != nil {
		t.Fatal(err)
	}
}

func readAll(t *rapid.T, s *Store, r Ref) []byte {
	d, err := s.OpenDevice(r, true)
	if err != nil {
		t.Fatal(err)
	}
	p := make([]byte, d.Size())
	if _, err := d.ReadAt(p, 0); err != nil {
		t.Fatal(err)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	return p
}

// TestPrune removes snapshots in one step, and leaves those that something needs.
func TestPrune(t *testing.T) {
	s, dir := newStore(t, Options{})
	_, err := s.CreateVolume("v", VolumeOptions{Size: 1 << 20})
	must(t, err)
	var refs []Ref
	for _, name := range []string{"free", "held", "cloned", "open", "back", "other"} {
		refs = append(refs, Ref{"v", name})
		must(t, s.Snapshot(refs[len(refs)-1]))
	}
	must(t, errors.Join(s.Hold("backup", refs[1]), s.Hold("audit", refs[1]), s.Clone(refs[2], "c2", "c1"), s.Rollback(refs[4])))
	d, err := s.OpenDevice(refs[3], true)
	must(t, err)
	const want = "{[v@free v@back] [{v@held hold audit, backup} {v@cloned clone c1, c2} {v@open in use}]}"
	before := s.wal.NextSeq()
	for _, dry := range []bool{true, false} {
		r, err := s.Prune(dry, targets(append(refs[:5:5], refs[0], Ref{"v", "nope"}, Ref{"nope", "nope"})...)...)
		if fmt.Sprint(r) != want || err != nil {
			t.Errorf("%v, %v", r, err)
		}
	}
	if n := s.wal.NextSeq() - before; n != 1 {
		t.Errorf("%d events", n)
	}
	if _, err := s.Prune(false, targets(refs[5], Ref{Volume: "v"})...); !errors.Is(err, ErrInvalid) {
		t.Error(err)
	}
	must(t, d.Close())
	must(t, errors.Join(s.Release("backup", refs[1]), s.Release("audit", refs[1])))
	if r, err := s.Prune(false, targets(refs...)...); fmt.Sprint(r) != "{[v@held v@open v@other] [{v@cloned clone c1, c2}]}" || err != nil {
		t.Errorf("%v, %v", r, err)
	}
	mustCheck(t, s)
	must(t, s.Close())

	// A store that can only be read says what would be removed.
	s, err = Open(dir, Options{AllowReadOnly: true, unwritable: ErrReadOnly})
	must(t, err)
	if r, err := s.Prune(true, targets(refs[2])...); fmt.Sprint(r) != "{[] [{v@cloned clone c1, c2}]}" || err != nil {
		t.Errorf("%v, %v", r, err)
	}
	if _, err := s.Prune(false, targets(refs[2])...); !errors.Is(err, ErrReadOnly) {
		t.Error(err)
	}
	must(t, s.Close())
}

func targets(refs ...Ref) (list []PruneTarget) {
	for _, r := range refs {
		list = append(list, PruneTarget{Ref: r})
	}
	return list
}

// TestPruneOther: of two volumes that have swapped their names, and of a snapshot that was made anew, nothing is removed.
func TestPruneOther(t *testing.T) {
	s, _ := newStore(t, Options{})
	var list []PruneTarget
	for _, v := range []string{"a", "b", "c"} {
		_, err := s.CreateVolume(v, VolumeOptions{Size: 1 << 20})
		must(t, errors.Join(err, s.Snapshot(Ref{v, "s"})))
		list = append(list, PruneTarget{Ref{v, "s"}, guid(t, s, Ref{v, "s"})})
	}
	must(t, errors.Join(s.Rename(Ref{Volume: "a"}, Ref{Volume: "x"}), s.Rename(Ref{Volume: "b"}, Ref{Volume: "a"}), s.Rename(Ref{Volume: "x"}, Ref{Volume: "b"})))
	must(t, errors.Join(s.Remove(Ref{"c", "s"}, false), s.Snapshot(Ref{"c", "s"})))
	for _, dry := range []bool{true, false} {
		if r, err := s.Prune(dry, list...); len(r.Removed) > 0 || len(r.Kept) != 3 || r.Kept[0].Why != another || err != nil {
			t.Errorf("%v, %v", r, err)
		}
	}
	if r, err := s.Prune(false, PruneTarget{Ref{"b", "s"}, list[0].GUID}); len(r.Removed) != 1 || err != nil {
		t.Errorf("%v, %v", r, err)
	}
	mustCheck(t, s)
	must(t, s.Close())
}

// TestPruneWhileSending: what a send has not come to yet is in use, and so is its base until the end.
func TestPruneWhileSending(t *testing.T) {
	s, _ := newStore(t, Options{})
	_, err := s.CreateVolume("v", VolumeOptions{Size: 1 << 20})
	must(t, err)
	var refs []Ref
	for _, name := range []string{"base", "one", "two", "three"} {
		refs = append(refs, Ref{"v", name})
		must(t, s.Snapshot(refs[len(refs)-1]))
	}
	w := writerFunc(func(p []byte) (int, error) {
		if r, err := s.Prune(false, targets(refs...)...); len(r.Removed) > 0 || len(r.Kept) != len(refs) || err != nil {
			t.Errorf("%v, %v", r, err)
		}
		return len(p), nil
	})
	list, err := s.Send(t.Context(), SendOptions{Snapshot: refs[3], Base: refs[0], Between: true}, w)
	if len(list) != 3 || err != nil {
		t.Errorf("%v, %v", list, err)
	}
	if _, err := s.Send(t.Context(), SendOptions{Snapshot: refs[3], Base: Ref{"v", "nope"}}, io.Discard); !errors.Is(err, ErrNotFound) {
		t.Error(err)
	}
	if r, err := s.Prune(false, targets(refs...)...); len(r.Removed) != len(refs) || err != nil {
		t.Errorf("%v, %v: something is left open", r, err)
	}
	must(t, s.Close())
}
