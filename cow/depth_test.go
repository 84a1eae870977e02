package cow

import (
	"fmt"
	"strings"
	"testing"

	"github.com/vdisk/vdisk/format"
)

// TestDepths holds the depth of a block to be how many clones ago it was written, whatever else its leaf maps.
func TestDepths(t *testing.T) {
	f := newFamily(t)
	write := func(name string, blocks ...int64) {
		d, err := f.s.OpenDevice(Ref{Volume: name}, false)
		must(t, err)
		defer d.Close()
		for _, b := range blocks {
			f.writes++
			_, err := d.WriteAt(randomBytes(format.BlockSize, f.writes), b*format.BlockSize)
			must(t, err)
		}
	}
	f.create("a", 4*leafSize)
	write("a", 0, 1, 2, 3, 300)
	f.snapshot("a@s")
	write("a", 0, 5)
	f.clone("a@s", "b")
	write("b", 1, 600)
	f.snapshot("b@s")
	f.clone("b@s", "c")
	write("c", 2)
	f.snapshot("c@s")
	write("c", 3)
	f.clone("c@s", "d")
	f.discard("d", 2)

	for _, x := range []struct{ name, want string }{
		{"a", "0+4:1 5+1:1 300+1:1"},
		{"a@s", "0+4:1 300+1:1"},
		{"b", "0+1:2 1+1:1 2+2:2 300+1:2 600+1:1"},
		{"c", "0+1:3 1+1:2 2+2:1 300+1:3 600+1:2"},
		{"c@s", "0+1:3 1+1:2 2+1:1 3+1:3 300+1:3 600+1:2"},
		{"d", "0+1:4 1+1:3 2+1:2 3+1:4 300+1:4"},
	} {
		for _, again := range []string{"", " after a restart"} {
			d := f.open(x.name)
			var got []string
			at := int64(0)
			must(t, d.Depths(0, d.Size(), func(off, length int64, depth int) bool {
				if off != at {
					t.Errorf("%s%s: an extent at %d, want %d", x.name, again, off, at)
				}
				if at = off + length; depth > 0 {
					got = append(got, fmt.Sprintf("%d+%d:%d", off/format.BlockSize, length/format.BlockSize, depth))
				}
				return true
			}))
			if s := strings.Join(got, " "); s != x.want || at != d.Size() {
				t.Errorf("%s%s: %s up to %d, want %s", x.name, again, s, at, x.want)
			}
			must(t, d.Close())
			if again == "" {
				must(t, f.s.Checkpoint())
			}
		}
	}
	d := f.open("c")
	calls := 0
	must(t, d.Depths(format.BlockSize, format.BlockSize+10, func(off, length int64, depth int) bool {
		calls++
		if off != format.BlockSize || length != format.BlockSize || depth != 2 {
			t.Errorf("a part of the range: %d bytes at %d, depth %d", length, off, depth)
		}
		return false
	}))
	if calls != 1 {
		t.Errorf("%d calls after fn wanted no more", calls)
	}
}
