package cow

import (
	"errors"
	"slices"
	"sync"
	"testing"
)

// TestDamageIsNoticed once for each place, with all that lose by it.
func TestDamageIsNoticed(t *testing.T) {
	x := newDamaging(t)
	var mu sync.Mutex // guards list
	var list []Notice
	x.s.opts.Notice = func(n Notice) {
		mu.Lock()
		defer mu.Unlock()
		list = append(list, n)
	}
	x.rot(t, 0)
	for range 2 {
		if _, err := x.d.ReadAt(make([]byte, 4096), 0); !errors.Is(err, ErrCorrupt) {
			t.Errorf("damage reads: %v", err)
		}
		x.known(t)
	}
	mu.Lock()
	defer mu.Unlock()
	if len(list) != 1 {
		t.Fatalf("%d notices: %+v", len(list), list)
	}
	var lost []string
	for _, l := range list[0].Lost {
		lost = append(lost, l.String())
	}
	slices.Sort(lost)
	want := []string{"c 0+16384", "v 0+4096", "v 8192+8192", "v@a 0+16384"}
	if n := list[0]; n.Kind != NoticeDamage || n.Where == "" || !errors.Is(n.Err, ErrCorrupt) || !slices.Equal(lost, want) {
		t.Errorf("%+v", n)
	}
	must(t, errors.Join(x.d.Close(), x.s.Close()))
}
