package leafcache

import (
	"strings"
	"sync"
	"testing"

	"github.com/vdisk/vdisk/format"
	"github.com/vdisk/vdisk/internal/testwatch"
)

// newEmpty returns a cache for a table without leaves.
func newEmpty(t *testing.T) *Cache {
	t.Helper()
	c, err := New(MinBytes, func(Key, *format.Leaf) (uint32, error) { return 0, nil })
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	})
	return c
}

// put changes the first entry of a leaf in an epoch, so that its offset is n pages.
func put(t *testing.T, c *Cache, k Key, epoch, n uint32) {
	t.Helper()
	l, err := c.LockLoaded(k)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Unlock()
	content, err := l.MakeWritable(epoch)
	if err != nil {
		t.Fatal(err)
	}
	content.Entries[0] = format.MakeEntry(0, n*4096, 4112, 1, 0)
}

// value returns what put has put.
func value(l *format.Leaf) uint32 { return l.Entries[0].Offset() / 4096 }

// TestNewestState: of several versions of a leaf in memory, and of several states of one of them, the newest in the
// range is found.
func TestNewestState(t *testing.T) {
	c, k := newEmpty(t), Key{&Branch{ID: 1}, 0, Head}
	for n, epoch := range []uint32{1, 2, 2, 3} { // those of epoch 2 in two generations, since a checkpoint fails
		put(t, c, k, epoch, uint32(n+1))
		if n == 1 {
			g := c.Begin()
			put(t, c, k, epoch, 9)
			g.Abort()
		}
	}
	l := c.Lock(k)
	defer l.Unlock()
	for _, want := range []struct{ from, to, value uint32 }{{1, 1, 1}, {1, 2, 3}, {2, 2, 3}, {1, 9, 3}} {
		if v := l.Preimage(want.from, want.to); v == nil || value(v) != want.value {
			t.Errorf("between the epochs %d and %d the newest state is %v, want %d", want.from, want.to, v, want.value)
		}
	}
}

// TestOneLoader: who wants a leaf that another goroutine is loading waits for it.
func TestOneLoader(t *testing.T) {
	var mu sync.Mutex
	loads, second := 0, make(chan struct{})
	waiting := func() bool { // for the end of the other's load
		for g := range strings.SplitSeq(testwatch.Stacks(), "\n\n") {
			if strings.Contains(g, "[chan receive") && strings.Contains(g, "leafcache.(*Cache).fetch(") {
				return true
			}
		}
		return false
	}
	c, err := New(MinBytes, func(Key, *format.Leaf) (uint32, error) {
		mu.Lock()
		loads++
		n := loads
		mu.Unlock()
		if n == 2 {
			close(second)
		}
		for n == 1 && !waiting() {
			select {
			case <-second:
				return 0, nil
			default:
			}
		}
		return 0, nil
	})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	k := Key{&Branch{ID: 1}, 0, Head}
	testwatch.Do(t, testwatch.Long, "two loads of a leaf", func() {
		var wg sync.WaitGroup
		for range 2 {
			wg.Go(func() {
				if err := c.Ensure(k); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
	})
	if loads != 1 {
		t.Errorf("a leaf was loaded %d times at once", loads)
	}
}

// TestShrinkKeepsChanges: a shard that has grown gives its memory back only when it has nothing to be written.
func TestShrinkKeepsChanges(t *testing.T) {
	c, b := newEmpty(t), &Branch{ID: 1}
	k := Key{b, 0, Head}
	if err := c.Grow(k); err != nil {
		t.Fatal(err)
	}
	put(t, c, k, 1, 1)
	g := c.Begin()
	put(t, c, k, 1, 2)
	g.Finish()
	if l := c.Lock(k); l.Leaf() == nil || value(&l.Leaf().open().content.Leaf) != 2 {
		t.Error("a change that no checkpoint has written is gone")
		l.Unlock()
	} else {
		l.Unlock()
	}
	if !c.Grown() {
		t.Error("the memory was given back too early")
	}
	g = c.Begin()
	g.Finish()
	if c.Grown() {
		t.Error("the memory is not given back")
	}
}

// TestBranchesInOneBucket: leaves of two branches that share a bucket are told apart.
func TestBranchesInOneBucket(t *testing.T) {
	c := newEmpty(t)
	k, other := Key{&Branch{ID: 1}, 0, Head}, Key{&Branch{ID: 2}, 0, Head}
	put(t, c, k, 1, 1)
	s := c.shard(1, 0)
	for c.shard(other.Branch.ID, 0) != s || s.bucket(other.Branch.ID, 0) != s.bucket(1, 0) {
		other.Branch.ID++
	}
	if l := c.Lock(other); l.Leaf() != nil {
		t.Error("a leaf of another branch is found")
		l.Unlock()
	} else {
		l.Unlock()
	}
	put(t, c, other, 1, 2)
	for n, k := range []Key{k, other} {
		l := c.Lock(k)
		if got := value(&l.Leaf().open().content.Leaf); got != uint32(n+1) {
			t.Errorf("branch %d has %d", k.Branch.ID, got)
		}
		l.Unlock()
	}
}
