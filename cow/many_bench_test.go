package cow

import (
	"fmt"
	"testing"
)

// BenchmarkMany measures what lists and opening take in a store with many snapshots that each have a clone. A row of the
// output is for one snapshot with its clone.
func BenchmarkMany(b *testing.B) {
	for _, n := range []int{1000, 4000, 16000} {
		s, dir := newStore(b, Options{})
		manyClones(b, s, n)
		each := func(b *testing.B) {
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/float64(n), "ns/row")
		}
		b.Run(fmt.Sprintf("volumes/%d", n), func(b *testing.B) {
			for b.Loop() {
				s.Volumes()
			}
			each(b)
		})
		b.Run(fmt.Sprintf("volume/%d", n), func(b *testing.B) {
			for b.Loop() {
				if _, err := s.Volume("c1"); err != nil {
					b.Fatal(err)
				}
			}
		})
		b.Run(fmt.Sprintf("usage/%d", n), func(b *testing.B) {
			for b.Loop() {
				if _, err := s.Usage(b.Context(), Ref{Volume: "c1"}); err != nil {
					b.Fatal(err)
				}
			}
		})
		if err := s.Close(); err != nil {
			b.Fatal(err)
		}
		b.Run(fmt.Sprintf("open/%d", n), func(b *testing.B) {
			for b.Loop() {
				s, err := Open(dir, Options{})
				if err != nil {
					b.Fatal(err)
				}
				b.StopTimer()
				if err := s.Close(); err != nil {
					b.Fatal(err)
				}
				b.StartTimer()
			}
			each(b)
		})
	}
}

// manyClones makes a volume with n snapshots that each have a clone.
func manyClones(b *testing.B, s *Store, n int) {
	if _, err := s.CreateVolume("v", VolumeOptions{Size: 1 << 30}); err != nil {
		b.Fatal(err)
	}
	for i := range n {
		at := Ref{Volume: "v", Snapshot: fmt.Sprint("s", i)}
		if err := s.Snapshot(at); err != nil {
			b.Fatal(err)
		}
		if err := s.Clone(at, fmt.Sprint("c", i)); err != nil {
			b.Fatal(err)
		}
	}
}
