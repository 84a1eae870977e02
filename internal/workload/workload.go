// Package workload makes the content that benchmarks and tests write.
package workload

import (
	"encoding/binary"
	"math/rand/v2"
)

// source returns a source of random bytes that r determines. It uses its own generator, ChaCha8, because that fills a
// slice with a fifth of the work under the race detector, which looks at each byte that is stored here.
func source(r *rand.Rand) *rand.ChaCha8 {
	var seed [32]byte
	binary.LittleEndian.PutUint64(seed[:], r.Uint64())
	return rand.NewChaCha8(seed)
}

// Random fills p with bytes that no codec makes smaller.
func Random(r *rand.Rand, p []byte) {
	_, _ = source(r).Read(p) // it never fails
}

// HalfCompressible fills p so that each 4 KiB of it compresses to about half, as with fio's
// buffer_compress_percentage=50: 2 KiB of random bytes, then zeros.
func HalfCompressible(r *rand.Rand, p []byte) {
	src := source(r)
	for len(p) > 0 {
		block := p[:min(4096, len(p))]
		random := block[:min(2048, len(block))]
		_, _ = src.Read(random) // it never fails
		clear(block[len(random):])
		p = p[len(block):]
	}
}
