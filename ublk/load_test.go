package ublk_test

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"os"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// rounds returns how often a test repeats itself: $VDISK_UBLK_ROUNDS if it is set, otherwise short.
func rounds(short int) int {
	if n, err := strconv.Atoi(os.Getenv("VDISK_UBLK_ROUNDS")); err == nil && n > 0 {
		return n
	}
	return short
}

// load writes to a disk from several threads, each to blocks of its own, and knows what each block may hold: the last
// value whose write was answered, or one that was written after it and failed or was not answered.
type load struct {
	path   string
	blocks int // 4 KiB, of each thread
	quit   atomic.Bool
	wg     sync.WaitGroup
	done   atomic.Int64 // writes that succeeded
	failed atomic.Int64
	may    []map[uint64]bool // by block; each thread has its own part
}

const loadThreads = 4

// startLoad writes until stop, or the end of the test.
func startLoad(t testing.TB, path string, size int64) *load {
	t.Helper()
	l := &load{path: path, blocks: int(size) / 4096 / loadThreads, may: make([]map[uint64]bool, size/4096)}
	for thread := range loadThreads {
		fd, err := unix.Open(path, unix.O_RDWR|unix.O_DIRECT|unix.O_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		l.wg.Go(func() {
			defer unix.Close(fd)
			l.write(fd, thread)
		})
	}
	t.Cleanup(func() { l.quit.Store(true) })
	return l
}

func (l *load) write(fd, thread int) {
	buf := aligned(4096)
	for n := uint64(1); !l.quit.Load(); n++ {
		block := thread*l.blocks + rand.IntN(l.blocks)
		fill(buf, block, n)
		if _, err := unix.Pwrite(fd, buf, int64(block)*4096); err != nil {
			l.failed.Add(1)
			if l.may[block] == nil {
				l.may[block] = map[uint64]bool{0: true}
			}
			l.may[block][n] = true
			time.Sleep(time.Millisecond)
			continue
		}
		l.may[block] = map[uint64]bool{n: true}
		l.done.Add(1)
	}
}

func (l *load) failures() int { return int(l.failed.Load()) }

// advance waits until n more writes have succeeded.
func (l *load) advance(t testing.TB, n int64) {
	t.Helper()
	target := l.done.Load() + n
	within(t, stepLimit, "writes that succeed", func() error {
		if done := l.done.Load(); done < target {
			return fmt.Errorf("%d of %d, %d failed", done, target, l.failed.Load())
		}
		return nil
	})
}

func (l *load) stop(t testing.TB) {
	t.Helper()
	l.quit.Store(true)
	bounded(t, &l.wg, "the writes")
}

// check reads every block that was written.
func (l *load) check(t testing.TB) {
	t.Helper()
	fd, err := unix.Open(l.path, unix.O_RDONLY|unix.O_DIRECT|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	buf := aligned(4096)
	for block, may := range l.may {
		if may == nil {
			continue
		}
		if _, err := unix.Pread(fd, buf, int64(block)*4096); err != nil {
			t.Fatal(err)
		}
		if value, whole := value(buf, block); !whole || !may[value] {
			t.Errorf("block %d holds %d (whole: %v), may hold %v", block, value, whole, may)
		}
	}
}

// fill writes a value into a block, so that every word of it identifies the value and the block.
func fill(buf []byte, block int, value uint64) {
	word := value<<16 | uint64(block)&0xffff
	if value == 0 {
		word = 0 // as after a discard
	}
	for i := 0; i < len(buf); i += 8 {
		binary.LittleEndian.PutUint64(buf[i:], word)
	}
}

// value reads a value that fill wrote. whole is false if the words differ or belong to another block.
func value(buf []byte, block int) (v uint64, whole bool) {
	word := binary.LittleEndian.Uint64(buf)
	for i := 8; i < len(buf); i += 8 {
		if binary.LittleEndian.Uint64(buf[i:]) != word {
			return word, false
		}
	}
	return word >> 16, word == 0 || word&0xffff == uint64(block)&0xffff
}
