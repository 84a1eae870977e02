package cow

import (
	"fmt"
	"slices"
	"testing"
)

// TestListsBesideChanges lists volumes and snapshots while others have the lock between two rows, and remove, rename and
// make some. What is removed before its row is described is not listed. The others are listed once.
func TestListsBesideChanges(t *testing.T) {
	const n = 8
	for at := 1; at <= 4*n; at += 3 {
		s, _ := newStore(t, Options{})
		must := func(err error) {
			if err != nil {
				t.Fatal(err)
			}
		}
		create := func(name string) {
			_, err := s.CreateVolume(name, VolumeOptions{Size: 1 << 20})
			must(err)
		}
		create("v")
		for i := range n {
			must(s.Snapshot(Ref{"v", fmt.Sprint("gone", i)}))
			must(s.Snapshot(Ref{"v", fmt.Sprint("kept", i)}))
			create(fmt.Sprint("gone", i))
			create(fmt.Sprint("kept", i))
		}
		must(s.Clone(Ref{"v", "kept1"}, "clone"))
		rows := 0
		list := s.list(func() {
			if rows++; rows != at {
				return
			}
			s.mu.Unlock()
			defer s.mu.Lock()
			for i := range n {
				must(s.Remove(Ref{"v", fmt.Sprint("gone", i)}, false))
				must(s.Remove(Ref{Volume: fmt.Sprint("gone", i)}, false))
			}
			must(s.Rename(Ref{"v", "kept0"}, Ref{"v", "renamed"}))
			must(s.Rename(Ref{Volume: "kept0"}, Ref{Volume: "renamed"}))
			must(s.Snapshot(Ref{"v", "new"}))
			create("new")
		})
		kept, gone := 0, 0
		see := func(name string, clones []string) {
			switch {
			case len(name) > 4 && name[:4] == "gone":
				gone++
			case name != "new":
				kept++
			}
			if want := map[bool]string{true: "[clone]", false: "[]"}[name == "kept1"]; clones != nil && fmt.Sprint(clones) != want {
				t.Errorf("clones of %s: %v", name, clones)
			}
		}
		for _, v := range list {
			see(v.Name, nil)
			for _, sn := range v.Snapshots {
				see(sn.Name, append([]string{}, sn.Clones...))
			}
		}
		if kept != 2*n+2 || gone > at {
			t.Errorf("removed before row %d: %d rows of what stays, want %d; %d rows of what was removed: %v", at, kept, 2*n+2, gone, list)
		}
		mustEnd(t, s)
	}
}

// TestForks makes clones of a snapshot, and removes two of them in each order. After each step the snapshot's clones are
// known. Once all are removed, no row is left.
func TestForks(t *testing.T) {
	for first := range 4 {
		for second := range 4 {
			s, _ := newStore(t, Options{checkpointInterval: -1})
			must := func(err error) {
				if err != nil {
					t.Fatal(err)
				}
			}
			_, err := s.CreateVolume("v", VolumeOptions{Size: 1 << 20})
			must(err)
			must(s.Snapshot(Ref{"v", "s"}))
			must(s.Clone(Ref{"v", "s"}, "c0", "c1", "c2", "c3"))
			left := []string{"c0", "c1", "c2", "c3"}
			leave := func(i int) {
				name := left[i%len(left)]
				left = slices.DeleteFunc(left, func(n string) bool { return n == name })
				must(s.Remove(Ref{Volume: name}, false))
				must(s.checkpoint())
				must(s.checkpoint())
				if v, err := s.Volume("v"); err != nil || !slices.Equal(v.Snapshots[0].Clones, left) {
					t.Errorf("clones: %v, want %v, %v", v.Snapshots[0].Clones, left, err)
				}
			}
			leave(first)
			leave(second)
			must(s.Remove(Ref{Volume: "v"}, true))
			for _, name := range left {
				must(s.Remove(Ref{Volume: name}, false))
			}
			for range 6 {
				must(s.checkpoint())
			}
			if n := len(s.catalog.branches) + len(s.catalog.snapshots) + len(s.catalog.waiting); n != 0 {
				t.Errorf("%d rows are left", n)
			}
			must(s.Close())
		}
	}
}
