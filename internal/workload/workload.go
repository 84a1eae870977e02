// Package workload makes the content that benchmarks and tests write.
package workload

import "math/rand/v2"

// HalfCompressible fills p so that each 4 KiB of it compresses to about a half, as fio's buffer_compress_percentage=50
// does: 2 KiB of random bytes, then zeros.
func HalfCompressible(r *rand.Rand, p []byte) {
	for i := 0; i+8 <= len(p); i += 8 {
		var x uint64
		if i%4096 < 2048 {
			x = r.Uint64()
		}
		for j := range 8 {
			p[i+j] = byte(x >> (8 * j))
		}
	}
}
