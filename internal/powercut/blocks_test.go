package powercut

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"io"
	"math/rand/v2"
	"os"
	"slices"
	"sync"
	"syscall"
	"unsafe"
)

const blockSize = 4096

// blocks is a writer's region of a block device, and the versions of it that may be there after a power cut: for each
// block, not before the last one that was synced, and not after the last one that was sent. Versions never come again.
type blocks struct {
	first  int64
	run    int64 // the longest write, in blocks
	writes int   // between two syncs, at most
	buf    []byte
	rng    *rand.Rand

	mu           sync.Mutex // guards what follows
	sent, synced []uint64
	now          []uint64 // what the device holds: the last version that was sent, if no power cut has taken it
	syncs        int      // since the last cut
}

func newBlocks(first, n, run int64, writes int, rng *rand.Rand) *blocks {
	b := make([]byte, (run+1)*blockSize)
	skip := blockSize - int(uintptr(unsafe.Pointer(&b[0]))%blockSize) // O_DIRECT wants aligned memory
	return &blocks{
		first: first, run: run, writes: writes, buf: b[skip:][: run*blockSize : run*blockSize], rng: rng,
		sent: make([]uint64, n), synced: make([]uint64, n), now: make([]uint64, n),
	}
}

// fill makes the content of a version of a block. A fourth of the versions can be compressed.
func fill(p []byte, block int64, version uint64) {
	x := uint64(block)<<32 ^ version ^ 0x9e3779b97f4a7c15
	n := blockSize
	if version%4 == 0 {
		n /= 2
		clear(p[n:])
	}
	for i := 24; i < n; i += 8 { // xorshift64
		x ^= x << 13
		x ^= x >> 7
		x ^= x << 17
		binary.LittleEndian.PutUint64(p[i:], x)
	}
	binary.LittleEndian.PutUint64(p[8:], uint64(block))
	binary.LittleEndian.PutUint64(p[16:], version)
	binary.LittleEndian.PutUint64(p, uint64(crc32.ChecksumIEEE(p[8:])))
}

// versionOf returns the version of a block's content, 0 if it was never written.
func versionOf(p []byte, block int64) (uint64, error) {
	sum, at, version := binary.LittleEndian.Uint64(p), binary.LittleEndian.Uint64(p[8:]), binary.LittleEndian.Uint64(p[16:])
	switch {
	case sum == 0 && at == 0 && version == 0 && !slices.ContainsFunc(p, func(b byte) bool { return b != 0 }):
		return 0, nil
	case sum != uint64(crc32.ChecksumIEEE(p[8:])):
		return 0, fmt.Errorf("block %d is garbled", block)
	case at != uint64(block):
		return 0, fmt.Errorf("block %d holds block %d", block, at)
	}
	return version, nil
}

// write writes a random run of blocks.
func (b *blocks) write(dev *os.File) error {
	n := 1 + b.rng.Int64N(b.run)
	at := b.rng.Int64N(int64(len(b.sent)) - n + 1)
	b.mu.Lock()
	for i := range n {
		b.sent[at+i]++
		b.now[at+i] = b.sent[at+i]
		fill(b.buf[i*blockSize:][:blockSize], b.first+at+i, b.sent[at+i])
	}
	b.mu.Unlock()
	_, err := dev.WriteAt(b.buf[:n*blockSize], (b.first+at)*blockSize)
	return err
}

// sync syncs what was written.
func (b *blocks) sync(dev *os.File) error {
	if err := dev.Sync(); err != nil {
		return err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	copy(b.synced, b.now)
	b.syncs++
	return nil
}

// load writes and syncs until the device fails.
func (b *blocks) load(path string) error {
	dev, err := openDevice(path)
	if err != nil {
		return err
	}
	defer dev.Close()
	for {
		for range 1 + b.rng.IntN(b.writes) {
			if err := b.write(dev); err != nil {
				return err
			}
		}
		if err := b.sync(dev); err != nil {
			return err
		}
	}
}

func openDevice(path string) (*os.File, error) {
	return os.OpenFile(path, os.O_RDWR|syscall.O_DIRECT, 0)
}

func (b *blocks) count() int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.syncs
}

// promise returns the versions that must be there at least.
func (b *blocks) promise() []uint64 {
	b.mu.Lock()
	defer b.mu.Unlock()
	return slices.Clone(b.synced)
}

// check reads the whole device, and compares the region with what may be there. From then on it expects what is there.
func (b *blocks) check(r io.ReaderAt, promise []uint64) error {
	found := make([]uint64, len(b.sent))
	for at := int64(0); at < int64(len(found)); at += b.run {
		p := b.buf[:min(b.run, int64(len(found))-at)*blockSize]
		if _, err := r.ReadAt(p, (b.first+at)*blockSize); err != nil {
			return fmt.Errorf("read at block %d: %w", b.first+at, err)
		}
		for i := range int64(len(p) / blockSize) {
			v, err := versionOf(p[i*blockSize:][:blockSize], b.first+at+i)
			if err != nil {
				return err
			}
			found[at+i] = v
		}
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if err := within(found, promise, b.sent, b.first); err != nil {
		return err
	}
	b.synced = found
	copy(b.now, found)
	return nil
}

// within reports the first block whose version is not between low and high.
func within(found, low, high []uint64, first int64) error {
	for i, v := range found {
		if v < low[i] || v > high[i] {
			return fmt.Errorf("block %d has version %d; %d was synced, %d sent", first+int64(i), v, low[i], high[i])
		}
	}
	return nil
}
