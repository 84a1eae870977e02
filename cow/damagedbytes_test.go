package cow

import (
	"bytes"
	"flag"
	"fmt"
	"maps"
	"math/rand/v2"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/vdisk/vdisk/format"
)

var damageSeed = flag.Uint64("damage.seed", uint64(time.Now().UnixNano()), "of TestDamagedBytes and TestDamagedFiles, to repeat a run")

var damageFlips = flag.Int("damage.flips", 150, "bytes that TestDamagedBytes damages")

var damageFiles = flag.Int("damage.files", 60, "damages of whole files that TestDamagedFiles makes")

var damageEvery = flag.Bool("damage.every", false, "TestDamagedBytes damages every byte of every structure, and TestDamagedFiles cuts at every boundary")

// flipped returns the damage of some bits of a byte.
func flipped(x *specimen, r stretch, at int, bits byte) *damage {
	file := r.file
	change := func(p []byte) []byte {
		p = bytes.Clone(p)
		p[at] ^= bits
		return p
	}
	d := &damage{
		what: fmt.Sprintf("bits %02x of byte %d of %s, byte %d of a %s", bits, at, file, at-r.off, r.what), file: file, harmless: r.free,
		files: func(img image) image {
			img = maps.Clone(img)
			img[file] = change(img[file])
			return img
		},
	}
	if filepath.Dir(file) == chunksDir {
		head := x.files[file][:format.ChunkHeaderSize]
		d.undo = func(now []byte) ([]byte, bool) {
			if at >= len(now) {
				return nil, false // the file is gone, or its end was given back
			}
			now = change(now)
			return now, bytes.Equal(now[:format.ChunkHeaderSize], head) // otherwise it was recycled
		}
	}
	return d
}

// try proves n damages on all processors, and prints what became of them. It returns how many there were: fewer if the
// limit of a test (half of -timeout) is near.
func try(t *testing.T, n int, next func(i int) (*specimen, *damage, string)) (done int64) {
	t.Helper()
	defer debug.SetGCPercent(debug.SetGCPercent(400)) // each opening takes 16 MiB for a moment
	start := time.Now()
	end, limited := t.Deadline()
	end = start.Add(end.Sub(start) * 3 / 8)
	o := &outcomes{counts: map[string]*[4]int{}}
	var taken, failures, proved atomic.Int64
	var wg sync.WaitGroup
	for range runtime.GOMAXPROCS(0) {
		tr := &trial{dir: filepath.Join(memoryDir(t), "store"), buf: make([]byte, 64<<10)}
		wg.Go(func() {
			for failures.Load() < 30 && (!limited || time.Now().Before(end)) {
				i := int(taken.Add(1)) - 1
				if i >= n {
					return
				}
				x, d, what := next(i)
				outcome, err := tr.run(x, d)
				if err != nil {
					failures.Add(1)
					t.Error(err)
					continue
				}
				proved.Add(1)
				o.add(what, outcome)
			}
		})
	}
	wg.Wait()
	if proved.Load() == 0 {
		t.Error("no damage was made")
	}
	t.Logf("%d of %d damages in %v:%v", proved.Load(), n, time.Since(start).Round(time.Millisecond), o)
	return proved.Load()
}

// TestDamagedBytes damages single bytes of every structure of a store: the store is refused, or each block is right or
// an error that names the place, and nothing else is lost by going on. The long size, -damage.every,
// takes all bytes of all structures.
func TestDamagedBytes(t *testing.T) {
	seed := *damageSeed
	t.Logf("-damage.seed=%d", seed)
	rng := rand.New(rand.NewPCG(seed, 14))
	x := newSpecimens(t, seed)
	type place struct {
		x  *specimen
		r  stretch
		at int
	}
	var all []place
	for _, s := range []*specimen{x.killed, x.closed} {
		for _, r := range s.files.regions(t) {
			n := r.n
			if r.data {
				n = min(n, 2)
			}
			for i := range n {
				at := r.off + i
				if r.data {
					at = r.off + rng.IntN(r.n)
				}
				all = append(all, place{s, r, at})
			}
		}
	}
	rng.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
	n := len(all)
	if !*damageEvery {
		n = min(n, *damageFlips)
	}
	bits := make([]byte, n)
	for i := range bits {
		bits[i] = 1 << rng.IntN(8)
	}
	done := try(t, n, func(i int) (*specimen, *damage, string) {
		p := all[i]
		return p.x, flipped(p.x, p.r, p.at, bits[i]), p.r.what
	})
	t.Logf("proof: flips: %d", done)
}
