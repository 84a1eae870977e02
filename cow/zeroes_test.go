package cow

import (
	"bytes"
	"fmt"
	"testing"

	"github.com/vdisk/vdisk/format"
)

// Zeros that are to be no hole take their space, at the ends of the range too, and keep it: in a cold pass, in the
// cleaner, and when the store is opened again. What they replaced in part stays.
func TestZerosThatAreNoHole(t *testing.T) {
	const b = format.BlockSize
	dir := setup(t, 4<<20, format.S2)
	s := open(t, dir, Options{checkpointInterval: -1})
	d, err := s.OpenDevice(Ref{Volume: "v"}, false)
	must(t, err)
	edge := bytes.Repeat([]byte("edge"), b/2) // two blocks
	_, err = d.WriteAt(edge, 300*b)
	must(t, err)
	want := make([]byte, 4<<20)
	copy(want[300*b:], edge)
	clear(want[301*b-100:][:100+b]) // covers the second block
	must(t, d.WriteZeroes(301*b-100, 100+b, true))
	must(t, d.WriteZeroes(10*b+5, 250*b, true))       // 251 blocks in part or whole, over a leaf's end
	must(t, d.WriteZeroes(1000*b+7, 9, true))         // within one
	must(t, d.WriteZeroes(4<<20-3*b, 3*b, true))      // the last ones
	must(t, d.WriteZeroes(4<<20-2*b-10, b+10, false)) // one is a hole again, and so is one that was all zeros
	const solid = 251 + 1 + 1 + 1
	look := func() string {
		t.Helper()
		got := make([]byte, 4<<20)
		_, err := d.ReadAt(got, 0)
		must(t, err)
		if !bytes.Equal(got, want) {
			t.Error("content differs")
		}
		text := ""
		must(t, d.Extents(0, 4<<20, func(off, length int64, hole bool) bool {
			if !hole {
				text += fmt.Sprintf("%d+%d ", off/b, length/b)
			}
			return true
		}))
		us, err := s.Usage(t.Context(), Ref{Volume: "v"})
		must(t, err)
		if us[0].Referenced < solid*b {
			t.Errorf("%d blocks of zeros take %d bytes", solid, us[0].Referenced)
		}
		return text
	}
	const extents = "10+246 256+5 300+2 1000+1 1023+1 " // a leaf ends at 256
	for _, pass := range []func(){
		func() {},
		func() { _, err := s.Cold(t.Context()); must(t, err) },
		func() { _, err := s.Clean(t.Context(), 0.05); must(t, err) },
		func() {
			mustEnd(t, s, d)
			s = open(t, dir, Options{checkpointInterval: -1})
			d, err = s.OpenDevice(Ref{Volume: "v"}, false)
			must(t, err)
		},
		func() { _, err := s.Cold(t.Context()); must(t, err) },
	} {
		pass()
		if got := look(); got != extents {
			t.Errorf("data at %s, want %s", got, extents)
		}
	}
	// What they take comes back with them.
	must(t, d.WriteZeroes(0, 4<<20, false))
	clear(want)
	us, err := s.Usage(t.Context(), Ref{Volume: "v"})
	must(t, err)
	if us[0].Referenced != 0 {
		t.Errorf("%d bytes are taken by nothing", us[0].Referenced)
	}
	mustEnd(t, s, d)
}

// Zero keeps the space that there is, and takes no more.
func TestZeroKeepsSpace(t *testing.T) {
	const b = format.BlockSize
	s, _ := newStore(t, Options{checkpointInterval: -1})
	_, err := s.CreateVolume("v", VolumeOptions{Size: 8 << 20, Codec: format.S2})
	must(t, err)
	d, err := s.OpenDevice(Ref{Volume: "v"}, false)
	must(t, err)
	want := ""
	for block := int64(0); block < 1300; block += 4 { // more runs than are looked at together
		_, err := d.WriteAt(bytes.Repeat([]byte("data"), b/4), block*b)
		must(t, err)
		want += fmt.Sprint(block, " ")
	}
	must(t, d.Zero(0, 8<<20))
	got := ""
	must(t, d.Extents(0, 8<<20, func(off, length int64, hole bool) bool {
		if !hole {
			got += fmt.Sprint(off/b, " ")
		}
		return true
	}))
	if got != want {
		t.Errorf("mapped are %s, want %s", got, want)
	}
	p := make([]byte, 8<<20)
	_, err = d.ReadAt(p, 0)
	must(t, err)
	if !format.IsZero(p) {
		t.Error("not zero")
	}
	mustEnd(t, s, d)
}
