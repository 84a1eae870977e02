package wal

import (
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/vdisk/vdisk/cow/internal/lockorder"
	"github.com/vdisk/vdisk/internal/storage"
)

const (
	// PoolSize is the number of files that the pool keeps: as many chunks as are filled between two checkpoints.
	PoolSize = 4
	// PoolIdle is how long the files are kept while no chunk is made.
	PoolIdle = 30 * time.Second
)

// Pool keeps the files of dead chunks to be the next chunks: docs/engine.md, Blocks under the log. The files keep their
// slots, as the dead chunks that they were.
type Pool struct {
	fs    storage.FS
	space Space

	mu      *lockorder.Mutex[lockorder.Store] // Log.mu; guards the fields below
	spares  []*Chunk                          // oldest first
	touched time.Time                         // when a file last came or went
	reused  int                               // files reused over the life of the process
}

// Keep takes the file of a dead chunk that no new read can reach, and whose records are sound. It reports whether it
// took the file: the file must be fit to become a chunk of size bytes.
func (p *Pool) Keep(c *Chunk, size int64) bool {
	p.mu.Lock()
	fit := len(p.spares) < PoolSize
	p.mu.Unlock()
	if !fit || !p.fs.Overwrites() {
		return false
	}
	f, err := c.Handle()
	if err != nil {
		return false // the deletion that follows will report what is wrong
	}
	if n, err := f.Size(); err != nil || n != size {
		return false
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	c.Size = uint32(size)
	p.space.Changed(c)
	p.spares = append(p.spares, c)
	p.touched = time.Now()
	return true
}

// take returns a spare that nobody reads any more, or nil. The chunk has no references left: its file and slot are the
// caller's.
func (p *Pool) take() *Chunk {
	p.mu.Lock()
	defer p.mu.Unlock()
	for i, c := range p.spares {
		if c.refs.CompareAndSwap(1, 0) { // the store's reference is the last
			p.spares = slices.Delete(p.spares, i, i+1)
			p.touched = time.Now()
			p.reused++
			p.space.Freed(int64(c.End))
			return c
		}
	}
	return nil
}

// Empty deletes the spares, and returns the number deleted. A reader of a spare still has its file open.
func (p *Pool) Empty() (deleted int, err error) {
	p.mu.Lock()
	spares := p.spares
	p.spares = nil
	p.mu.Unlock()
	var errs []error
	for _, c := range spares {
		err := p.fs.Remove(c.Name())
		p.mu.Lock()
		if err == nil {
			p.space.Freed(int64(c.End))
			p.space.Drop(c.Slot)
		} else {
			errs = append(errs, fmt.Errorf("delete chunk %s: %w", c.Name(), err))
			p.spares = append(p.spares, c)
		}
		p.mu.Unlock()
		if err == nil {
			c.Release()
			deleted++
		}
	}
	return deleted, errors.Join(errs...)
}

// EmptyIdle empties the pool if it was not used for PoolIdle.
func (p *Pool) EmptyIdle() error {
	p.mu.Lock()
	idle := len(p.spares) > 0 && time.Since(p.touched) > PoolIdle
	p.mu.Unlock()
	if !idle {
		return nil
	}
	_, err := p.Empty()
	return err
}

// Bytes returns the size of the spares. The caller holds mu.
func (p *Pool) Bytes() (n int64) {
	for _, c := range p.spares {
		n += int64(c.Size)
	}
	return n
}
