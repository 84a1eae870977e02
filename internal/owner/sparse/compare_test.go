package sparse

import (
	"bytes"
	"io"
	"math/rand/v2"
	"testing"
)

// pieces is a Source that hands out data in pieces of any size, some of them zeros.
type pieces struct {
	data []byte
	at   int
	rng  *rand.Rand
}

func (s *pieces) Size() int64 { return int64(len(s.data)) }

func (s *pieces) Next(p []byte) (int, int64, error) {
	for s.at < len(s.data) && s.data[s.at] == 0 && s.rng.IntN(50) > 0 {
		s.at++
	}
	if s.at == len(s.data) {
		return 0, 0, io.EOF
	}
	n := copy(p, s.data[s.at:min(len(s.data), s.at+1+s.rng.IntN(9000))])
	s.at += n
	return n, int64(s.at - n), nil
}

// TestCompare compares contents with what a comparison byte by byte finds.
func TestCompare(t *testing.T) {
	rng := rand.New(rand.NewPCG(4, 4))
	for i := range 300 {
		a := make([]byte, rng.IntN(20000))
		for range rng.IntN(4) {
			for k, n := rng.IntN(len(a)+1), rng.IntN(6000); k < len(a) && n > 0; k, n = k+1, n-1 {
				a[k] = byte(1 + rng.IntN(255))
			}
		}
		b := bytes.Clone(a)
		if b = append(b, make([]byte, rng.IntN(2)*rng.IntN(9000))...); rng.IntN(3) == 0 {
			b = b[:rng.IntN(len(b)+1)]
		}
		for range rng.IntN(3) {
			if len(b) > 0 {
				b[rng.IntN(len(b))] ^= byte(rng.IntN(2))
			}
		}
		var unread Ranges
		for range rng.IntN(3) {
			unread.Add(rng.Int64N(20000), 1+rng.Int64N(3000))
		}
		want := int64(-1)
		for k := range max(len(a), len(b)) {
			if unread.After(int64(k)) != int64(k) {
				continue
			}
			var x, y byte
			if k < len(a) {
				x = a[k]
			}
			if k < len(b) {
				y = b[k]
			}
			if x != y {
				want = int64(k)
				break
			}
		}
		at, differs, err := Compare(t.Context(), &pieces{a, 0, rng}, &pieces{b, 0, rng}, &unread, nil)
		if err != nil || differs != (want >= 0) || differs && at != want {
			t.Fatalf("%d: %d %v %v, not %d", i, at, differs, err, want)
		}
	}
}
