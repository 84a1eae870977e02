package e2e

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"math/rand/v2"
	"sync/atomic"
	"unsafe"
)

const blockSize = 4096

// oracle is one writer's region of a disk, and the content that it must have after a crash. Every block has its place,
// a version and a checksum. After a kill, a block has a version from the last one that was answered, synced or not, to
// the last one that was sent.
type oracle struct {
	name           string
	first, blocks  int64
	sent, answered []uint64 // by block
	rounds         atomic.Int64
	lazy           bool // it writes far more than it syncs
	rng            *rand.Rand
	buf            []byte
}

func newOracle(name string, first, blocks int64, seed uint64) *oracle {
	return &oracle{
		name: name, first: first, blocks: blocks, sent: make([]uint64, blocks), answered: make([]uint64, blocks),
		rng: rand.New(rand.NewPCG(seed, 1)), buf: aligned(16 * blockSize),
	}
}

// aligned returns memory that is suitable for O_DIRECT.
func aligned(n int) []byte {
	b := make([]byte, n+blockSize)
	skip := blockSize - int(uintptr(unsafe.Pointer(&b[0]))%blockSize)
	return b[skip:][:n:n]
}

// fill makes the content of a block: one half is noise that depends on the version, the other half is zeros.
func (o *oracle) fill(p []byte, block int64, version uint64) {
	clear(p)
	r := rand.New(rand.NewPCG(uint64(block), version))
	for i := 24; i < blockSize/2; i += 8 {
		binary.LittleEndian.PutUint64(p[i:], r.Uint64())
	}
	binary.LittleEndian.PutUint64(p[4:], uint64(o.first+block))
	binary.LittleEndian.PutUint64(p[12:], version)
	binary.LittleEndian.PutUint32(p, crc32.ChecksumIEEE(p[4:]))
}

// run writes a few runs of blocks, syncs, and again, until the disk fails.
func (o *oracle) run(d disk) error {
	for {
		n := 1 + o.rng.IntN(4)
		if o.lazy {
			n *= 100
		}
		for range n {
			n := 1 + o.rng.Int64N(8)
			at := o.rng.Int64N(o.blocks - n)
			for i := range n {
				o.sent[at+i]++
				o.fill(o.buf[i*blockSize:][:blockSize], at+i, o.sent[at+i])
			}
			if _, err := d.WriteAt(o.buf[:n*blockSize], (o.first+at)*blockSize); err != nil {
				return err
			}
			for b := at; b < at+n; b++ {
				o.answered[b] = o.sent[b]
			}
		}
		if err := d.Sync(); err != nil {
			return err
		}
		o.rounds.Add(1)
	}
}

// verify reads everything back and checks it. From then on it expects the content that it found.
func (o *oracle) verify(d disk) error {
	const atOnce = 16
	for b := int64(0); b < o.blocks; b += atOnce {
		p := o.buf[:atOnce*blockSize]
		if _, err := d.ReadAt(p, (o.first+b)*blockSize); err != nil {
			return fmt.Errorf("%s: read from block %d: %w", o.name, o.first+b, err)
		}
		for i := range int64(atOnce) {
			if err := o.verifyBlock(b+i, p[i*blockSize:][:blockSize]); err != nil {
				return err
			}
		}
	}
	return nil
}

func (o *oracle) verifyBlock(b int64, p []byte) error {
	version := binary.LittleEndian.Uint64(p[12:])
	switch {
	case version == 0 && crc32.ChecksumIEEE(p) == crc32.ChecksumIEEE(make([]byte, blockSize)): // never written
	case binary.LittleEndian.Uint32(p) != crc32.ChecksumIEEE(p[4:]):
		return fmt.Errorf("%s: block %d is garbled", o.name, o.first+b)
	case binary.LittleEndian.Uint64(p[4:]) != uint64(o.first+b):
		return fmt.Errorf("%s: block %d holds block %d", o.name, o.first+b, binary.LittleEndian.Uint64(p[4:]))
	}
	if version < o.answered[b] || version > o.sent[b] {
		return fmt.Errorf("%s: block %d has version %d; %d was answered, %d sent", o.name, o.first+b, version, o.answered[b], o.sent[b])
	}
	o.answered[b], o.sent[b] = version, version
	return nil
}
