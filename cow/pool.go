package cow

import (
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/vdisk/vdisk/internal/storage"
)

const (
	// poolSize is the number of files that the pool keeps: as many chunks as are filled between two
	// checkpoints.
	poolSize = 4
	// poolIdle is how long the files are kept while no chunk is made.
	poolIdle = 30 * time.Second
)

// chunkPool keeps the files of dead chunks to be the next chunks: docs/engine.md, Blocks under the log. The
// files stay in the slot table as the dead chunks that they were.
type chunkPool struct {
	fs    storage.FS
	slots *slotTable

	mu      *sync.Mutex // Store.mu; guards the fields below
	spares  []*chunk    // oldest first
	touched time.Time   // when a file last came or went
	reused  int         // files reused over the life of the process
}

// keep takes the file of a dead chunk that no new read can reach. It reports whether it took the file: the
// file must be fit to become a chunk of size bytes.
func (p *chunkPool) keep(c *chunk, size int64) bool {
	p.mu.Lock()
	fit := len(p.spares) < poolSize && !c.gone && !c.hasMoved && !c.damaged
	p.mu.Unlock()
	if !fit || !p.fs.Overwrites() {
		return false
	}
	f, err := c.handle()
	if err != nil {
		return false // the deletion that follows will report what is wrong
	}
	if n, err := f.Size(); err != nil || n != size {
		return false
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	c.size = uint32(size)
	p.slots.recount(c)
	p.spares = append(p.spares, c)
	p.touched = time.Now()
	return true
}

// take returns a spare that nobody reads any more, or nil. The chunk has no references left: its file and
// slot are the caller's.
func (p *chunkPool) take() *chunk {
	p.mu.Lock()
	defer p.mu.Unlock()
	for i, c := range p.spares {
		if c.refs.CompareAndSwap(1, 0) { // the slot table's reference is the last
			p.spares = slices.Delete(p.spares, i, i+1)
			p.touched = time.Now()
			p.reused++
			p.slots.removed += int64(c.end)
			return c
		}
	}
	return nil
}

// empty deletes the spares, and returns the number deleted. A reader of a spare still has its file open.
func (p *chunkPool) empty() (deleted int, err error) {
	p.mu.Lock()
	spares := p.spares
	p.spares = nil
	p.mu.Unlock()
	var errs []error
	for _, c := range spares {
		err := p.fs.Remove(c.name())
		p.mu.Lock()
		if err == nil {
			p.slots.removed += int64(c.end)
			p.slots.remove(c.slot)
		} else {
			errs = append(errs, fmt.Errorf("delete chunk %s: %w", c.name(), err))
			p.spares = append(p.spares, c)
		}
		p.mu.Unlock()
		if err == nil {
			c.release()
			deleted++
		}
	}
	return deleted, errors.Join(errs...)
}

// emptyIdle empties the pool if it was not used for poolIdle.
func (p *chunkPool) emptyIdle() error {
	p.mu.Lock()
	idle := len(p.spares) > 0 && time.Since(p.touched) > poolIdle
	p.mu.Unlock()
	if !idle {
		return nil
	}
	_, err := p.empty()
	return err
}

// bytes returns the size of the spares. The caller holds mu.
func (p *chunkPool) bytes() (n int64) {
	for _, c := range p.spares {
		n += int64(c.size)
	}
	return n
}
