package e2e

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/vdisk/vdisk/internal/nbdclient"
)

// TestUpgradeNBD upgrades a daemon again and again while NBD clients write, flush, and verify what they read. No request
// fails, no client connects again, and nothing that was written is lost. VDISK_UPGRADES is the number of upgrades (4).
func TestUpgradeNBD(t *testing.T) {
	upgrades := 4
	if text := os.Getenv("VDISK_UPGRADES"); text != "" {
		if _, err := fmt.Sscan(text, &upgrades); err != nil {
			t.Fatal(err)
		}
	}
	s := newStore(t)
	s.run("create", "v", "--size", "64M")
	daemon := s.command("daemon")
	var log bytes.Buffer
	daemon.Stderr = &log
	if err := daemon.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = daemon.Process.Kill() }) // of a test that failed; else it is gone
	dial := func() (c *nbdclient.Client, err error) {
		for range 600 {
			if c, err = nbdclient.Dial(filepath.Join(s.dir, "nbd.sock"), "v"); err == nil {
				break
			}
			time.Sleep(20 * time.Millisecond)
		}
		return c, err
	}
	var stop atomic.Bool
	var wg sync.WaitGroup
	var writers []*upgradeWriter
	for i := range 3 {
		c, err := dial()
		if err != nil {
			t.Fatal(err)
		}
		w := &upgradeWriter{c: c, base: int64(i) * 16 << 20, r: rand.New(rand.NewPCG(uint64(i), 15))}
		writers = append(writers, w)
		for range 4 { // requests in flight
			wg.Go(func() { w.run(t, &stop) })
		}
	}
	for i := range upgrades {
		before := writers[0].done.Load()
		s.run("upgrade")
		for writers[0].done.Load() < before+20 && !t.Failed() {
			s.run("clients") // it goes on
		}
		if n := strings.Count(s.run("clients"), "nbd:"); n != len(writers) {
			t.Errorf("after upgrade %d, %d clients are connected", i, n)
		}
	}
	stop.Store(true)
	wg.Wait()
	for _, w := range writers {
		w.verify(t)
		if err := w.c.Close(); err != nil {
			t.Error(err)
		}
	}
	if err := daemon.Process.Signal(os.Interrupt); err != nil {
		t.Fatal(err)
	}
	if err := daemon.Wait(); err != nil {
		t.Error(err)
	}
	if text := log.String(); strings.Contains(text, "level=ERROR") {
		t.Error(text)
	}
	s.run("check", "--read-data")
}

// upgradeWriter writes blocks of its own range, and knows what it has written.
type upgradeWriter struct {
	c    *nbdclient.Client
	base int64
	done atomic.Int64

	mu      sync.Mutex // guards the fields below
	r       *rand.Rand
	version [256]uint64
	busy    [256]bool
}

const upgradeBlock = 48 << 10 // more than the server writes from its input

func (w *upgradeWriter) content(block int, version uint64) []byte {
	text := fmt.Sprintf("%d %d %d\n", w.base, block, version)
	return bytes.Repeat([]byte(text), upgradeBlock/len(text)+1)[:w.length(block)]
}

// length makes every second block so short that the server writes it from its input.
func (w *upgradeWriter) length(block int) int {
	if block%2 == 1 {
		return 4096
	}
	return upgradeBlock
}

func (w *upgradeWriter) run(t *testing.T, stop *atomic.Bool) {
	for !stop.Load() && !t.Failed() {
		w.mu.Lock()
		block, what := w.r.IntN(len(w.version)), w.r.IntN(8)
		if w.busy[block] {
			w.mu.Unlock()
			continue
		}
		w.busy[block] = true
		version := w.version[block]
		w.mu.Unlock()
		var err error
		switch {
		case what == 0:
			err = w.c.Sync()
		case what < 4 && version > 0:
			err = w.check(block, version)
		default:
			version++
			err = w.c.Write(w.content(block, version), w.base+int64(block)*upgradeBlock, 0)
		}
		if err != nil {
			t.Errorf("block %d at %d: %v", block, w.base, err)
		}
		w.mu.Lock()
		w.version[block], w.busy[block] = version, false
		w.mu.Unlock()
		w.done.Add(1)
	}
}

func (w *upgradeWriter) check(block int, version uint64) error {
	p := make([]byte, w.length(block))
	if _, err := w.c.ReadAt(p, w.base+int64(block)*upgradeBlock); err != nil {
		return err
	}
	if want := w.content(block, version); !bytes.Equal(p, want) {
		return fmt.Errorf("it has %.20q, and %.20q was written", p, want)
	}
	return nil
}

func (w *upgradeWriter) verify(t *testing.T) {
	for block, version := range w.version {
		if version == 0 {
			continue
		}
		if err := w.check(block, version); err != nil {
			t.Errorf("block %d at %d, at the end: %v", block, w.base, err)
		}
	}
}
