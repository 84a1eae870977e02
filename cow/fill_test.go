package cow

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/vdisk/vdisk/format"
)

// TestFillIsWatched fills a store and empties it. Each level is told once on the way up, in order and before data is
// refused, and once on the way down.
func TestFillIsWatched(t *testing.T) {
	s, _ := newStore(t, Options{MaxBytes: MinMaxBytes, checkpointInterval: -1})
	var told []FillChange
	s.fill.levels, s.fill.crossed = []int{50, 90}, func(c FillChange) { told = append(told, c) }
	look := func(want ...int) {
		t.Helper()
		told = nil
		if err := errors.Join(s.watchFill(), s.watchFill()); err != nil {
			t.Fatal(err)
		}
		var got []int
		for _, c := range told {
			if c.Above != c.reaches(c.Level) {
				t.Errorf("%+v is told", c)
			}
			got = append(got, c.Level)
		}
		if !slices.Equal(got, want) {
			t.Errorf("the levels %v are told, want %v", got, want)
		}
	}
	if _, err := s.CreateVolume("v", VolumeOptions{Size: 128 << 20}); err != nil {
		t.Fatal(err)
	}
	d, err := s.OpenDevice(Ref{Volume: "v"}, false)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	look()
	buf, rng, woken := make([]byte, 256<<10), rand.NewChaCha8([32]byte{}), 0
	for off := int64(0); ; off += int64(len(buf)) {
		_, _ = rng.Read(buf)
		_, err := d.WriteAt(buf, off)
		select {
		case <-s.fill.work: // a level is near
			woken++
			if f, _ := s.Fill(); woken == 1 {
				if f.Percent() < 45 || f.Percent() > 55 {
					t.Errorf("it is woken at %d %%", f.Percent())
				}
				_, _ = d.WriteAt(bytes.Repeat(buf[:1], 4096), off) // beyond the level for certain
			}
			if err := s.watchFill(); err != nil {
				t.Fatal(err)
			}
		default:
		}
		if errors.Is(err, ErrNoSpace) {
			break
		} else if err != nil || off > 100<<20 {
			t.Fatal(off, err)
		}
	}
	if len(told) != 2 || told[0].Level != 50 || told[1].Level != 90 {
		t.Errorf("on the way up it tells %+v", told)
	}
	if f, err := s.Fill(); err != nil || f.Percent() < 97 {
		t.Errorf("a full store is filled to %d %%, %v", f.Percent(), err)
	}
	look()
	if err := d.Discard(0, 128<<20); err != nil {
		t.Fatal(err)
	}
	look(90, 50)
	look()
}

// TestFillSlack checks that a fill around a level is told once, and again only when it has been clearly below.
func TestFillSlack(t *testing.T) {
	s, _ := newStore(t, Options{MaxBytes: MinMaxBytes, checkpointInterval: -1})
	_, err := s.CreateVolume("v", VolumeOptions{Size: 64 << 20, Codec: format.Raw})
	must(t, err)
	d, err := s.OpenDevice(Ref{Volume: "v"}, false)
	must(t, err)
	defer d.Close()
	_, err = d.WriteAt(randomBytes(16<<20, 1), 0)
	must(t, err)
	f, err := s.Fill()
	must(t, err)
	told := int64(0)
	s.fill.levels, s.fill.crossed = []int{f.Percent()}, func(FillChange) { told++ }
	step := f.FullAt / 100 / format.BlockSize * format.BlockSize
	for _, c := range []struct{ below, want int64 }{{0, 1}, {1, 1}, {4, 2}, {5, 2}} { // in percent, at least
		must(t, d.Discard(0, c.below*step))
		must(t, s.watchFill())
		if told != c.want {
			t.Fatalf("%d changes are told with %d %% less, want %d", told, c.below, c.want)
		}
	}
	_, err = d.WriteAt(randomBytes(16<<20, 1), 0)
	must(t, err)
	must(t, s.watchFill())
	if told != 3 {
		t.Errorf("reached again, %d changes are told", told)
	}
}

// TestFillLevels checks the arithmetic, and which levels are refused.
func TestFillLevels(t *testing.T) {
	f := Fill{Bytes: 899, FullAt: 1000}
	if f.Percent() != 89 || f.reaches(90) || !(Fill{Bytes: 900, FullAt: 1000}).reaches(90) {
		t.Errorf("%+v is %d %%", f, f.Percent())
	}
	for _, levels := range [][]int{{0}, {101}, {90, 80}, {80, 80}} {
		if err := CheckFillLevels(levels); !errors.Is(err, ErrInvalid) {
			t.Errorf("%v: %v", levels, err)
		}
	}
}
