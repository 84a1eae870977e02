package cow

import (
	"bytes"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/vdisk/vdisk/format"
)

// TestWritersWaitForCheckpoints makes many times more leaves dirty than the smallest cache holds, from several
// goroutines.
func TestWritersWaitForCheckpoints(t *testing.T) {
	s, _ := newStore(t, Options{CacheBytes: MinCacheBytes})
	_, err := s.CreateVolume("v", VolumeOptions{Size: 1 << 40, Codec: format.Raw})
	must(t, err)
	d, err := s.OpenDevice(Ref{Volume: "v"}, false)
	must(t, err)
	var wg sync.WaitGroup
	var longest [4]time.Duration
	for w := range longest {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(uint64(w), 0))
			p := randomBytes(4096, uint64(w))
			for range 300 {
				start := time.Now()
				if _, err := d.WriteAt(p, rng.Int64N(1<<28)*4096); err != nil {
					t.Error(err)
					return
				}
				longest[w] = max(longest[w], time.Since(start))
			}
		})
	}
	wg.Wait()
	t.Logf("the longest writes took %v", longest)
	if got := s.checkpoints.committed.Load(); got < 1200/uint64(2*s.dirtyLimit) {
		t.Errorf("%d checkpoints for 1200 leaves, and %d of them fit", got, s.dirtyLimit)
	}
	must(t, d.Close())
	must(t, s.Close())
}

// TestReplayOfMoreThanFits opens a store whose log changes more leaves than the cache holds. When Open returns, the
// cache has its proper size again. A power cut before or after the commit that this takes loses nothing: the next Open,
// whose cache is also too small, finds all leaves.
func TestReplayOfMoreThanFits(t *testing.T) {
	dir := setup(t, 1<<30, format.Raw)
	o := Options{checkpointInterval: -1, chunkBytes: 1 << 20}
	s := open(t, dir, o)
	d, err := s.OpenDevice(Ref{Volume: "v"}, false)
	must(t, err)
	const leaves = 800
	for i := range int64(leaves) {
		_, err := d.WriteAt(randomBytes(4096, uint64(i)), i<<20)
		must(t, err)
		if i%100 == 50 {
			must(t, s.Snapshot(Ref{"v", string(rune('a' + i/100))}))
		}
	}
	must(t, d.Flush())
	killStore(s)

	o.CacheBytes = MinCacheBytes
	verify := func(s *Store) {
		if s.cache.Grown() {
			t.Error("after Open the cache has more memory than it was given")
		}
		d, err := s.OpenDevice(Ref{Volume: "v"}, true)
		must(t, err)
		got := make([]byte, 4096)
		for i := range int64(leaves) {
			_, err := d.ReadAt(got, i<<20)
			must(t, err)
			if !bytes.Equal(got, randomBytes(4096, uint64(i))) {
				t.Fatalf("block of leaf %d is lost", i)
			}
		}
		must(t, d.Close())
		mustEnd(t, s)
	}
	cut := o
	var left []string // copies of the store after a power cut
	cut.onCommit = func(bool) error {
		if len(left) < 2 {
			left = append(left, filepath.Join(t.TempDir(), "left"))
			must(t, os.CopyFS(left[len(left)-1], os.DirFS(dir)))
		}
		return nil
	}
	s = open(t, dir, cut)
	if len(left) != 2 {
		t.Fatalf("Open was at %d places around a commit", len(left))
	}
	verify(s)
	for i, dir := range left {
		s := open(t, dir, o)
		if replayed := s.Recovery().Records > 0; replayed != (i == 0) {
			t.Errorf("after a cut at place %d of a commit: %+v", i, s.Recovery())
		}
		verify(s)
	}
}
