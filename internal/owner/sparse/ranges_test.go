package sparse

import (
	"math/rand/v2"
	"testing"
)

// TestRanges compares ranges with a set of bytes.
func TestRanges(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	for range 200 {
		var rs Ranges
		var set [100]bool
		for range rng.IntN(20) {
			off, n := rng.IntN(90), 1+rng.IntN(9)
			rs.Add(int64(off), int64(n))
			for i := off; i < off+n; i++ {
				set[i] = true
			}
		}
		got, before := [100]bool{}, int64(-1)
		for _, r := range rs {
			if r.Offset <= before {
				t.Fatalf("%v touch or are out of order", rs)
			}
			for i := r.Offset; i < r.end(); i++ {
				got[i] = true
			}
			before = r.end()
		}
		n := int64(0)
		for i := range set {
			after := i
			for after < 100 && set[after] {
				after++
			}
			if a := rs.After(int64(i)); a != int64(after) {
				t.Fatalf("after %d of %v comes %d, not %d", i, rs, a, after)
			}
			if set[i] {
				n++
			}
		}
		if got != set || rs.Bytes() != n {
			t.Fatalf("%v, %d bytes", rs, rs.Bytes())
		}
	}
}
