package owner

import (
	"context"
	"fmt"
	"io/fs"
	"strings"
	"sync"
	"time"

	"github.com/vdisk/vdisk/cow"
	"github.com/vdisk/vdisk/nbd"
)

// Names of metadata contexts, as QEMU defines them: docs/nbd.md, Metadata contexts.
const (
	dirtyContext = "qemu:dirty-bitmap:" // and the name of a snapshot
	depthContext = "qemu:allocation-depth"

	stateDirty = 1
)

// contextNames returns the names of the metadata contexts of a volume and its snapshots.
func contextNames(v cow.VolumeInfo) []string {
	names := []string{depthContext}
	for _, s := range v.Snapshots {
		names = append(names, dirtyContext+s.Name)
	}
	return names
}

// exportedDevice is a device as NBD clients see it.
type exportedDevice struct {
	*cow.Device
	c      *catalog
	client context.Context // of one client, until it has gone
	meter  *meter
}

// Observe is that of nbd.Observer.
func (d exportedDevice) Observe(op nbd.Op, length int64, took time.Duration, err error) {
	d.meter.observe(op, length, took, err)
}

// Admit is that of nbd.Admitter.
func (d exportedDevice) Admit(write bool, bytes int64) nbd.Turn {
	if turn := d.Limiter().Admit(write, bytes); turn != nil {
		return turn
	}
	return nil
}

// OpenContext is that of nbd.ContextOpener.
func (d exportedDevice) OpenContext(name string) (nbd.Context, error) {
	if name == depthContext {
		return depths{d.Device}, nil
	}
	snapshot, ok := strings.CutPrefix(name, dirtyContext)
	if !ok || snapshot == "" {
		return nil, fs.ErrNotExist
	}
	memory := d.Size() / differenceShare
	if err := d.c.reserve(memory); err != nil {
		return nil, err
	}
	from, err := d.c.acquire(cow.Ref{Volume: d.Ref().Volume, Snapshot: snapshot}, true)
	if err != nil {
		d.c.unreserve(memory)
		return nil, notExist(err)
	}
	return &dirtyBlocks{x: d.c.exports, client: d.client, from: from, to: d.Device, memory: memory}, nil
}

// depths is the context allocation-depth.
type depths struct{ dev *cow.Device }

// Status is that of nbd.Context.
func (c depths) Status(off, length int64, fn func(off, length int64, flags uint32) bool) error {
	return c.dev.Depths(off, length, func(off, length int64, depth int) bool { return fn(off, length, uint32(depth)) })
}

// Close is that of nbd.Context.
func (c depths) Close() error { return nil }

// A difference takes one byte of memory for differenceShare bytes of the disk. All that clients have selected take
// maxDifferences at most.
const (
	differenceShare = 8 << 20
	maxDifferences  = 64 << 20
)

// reserve takes memory for a difference.
func (x *exports) reserve(memory int64) error {
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.differences+memory > maxDifferences {
		return fmt.Errorf("NBD clients have selected dirty bitmaps that take %d MiB of memory, and another one would take more than %d MiB: %w",
			x.differences>>20, maxDifferences>>20, cow.ErrBusy)
	}
	x.differences += memory
	return nil
}

func (x *exports) unreserve(memory int64) {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.differences -= memory
}

// dirtyBlocks is the context dirty-bitmap of a snapshot. It is one more user of the snapshot, which therefore cannot be
// removed, and which others see to be in use.
//
// The difference is made when it is asked for first, so that a client that selects everything and asks nothing costs
// nothing.
type dirtyBlocks struct {
	x      *exports
	client context.Context // the search for the difference ends with it
	from   *handle
	to     *cow.Device
	memory int64

	mu   sync.Mutex // guards diff, and is held while it is made
	diff *cow.Difference
}

// Status is that of nbd.Context.
func (c *dirtyBlocks) Status(off, length int64, fn func(off, length int64, flags uint32) bool) error {
	diff, err := c.difference()
	if err != nil {
		return err
	}
	return diff.Extents(c.client, off, length, func(off, length int64, _ bool) bool { return fn(off, length, stateDirty) })
}

func (c *dirtyBlocks) difference() (_ *cow.Difference, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.diff == nil {
		c.diff, err = c.x.store.Difference(c.client, c.from.dev, c.to)
	}
	return c.diff, err
}

// Close is that of nbd.Context.
func (c *dirtyBlocks) Close() error {
	c.x.unreserve(c.memory)
	return c.x.release(c.from)
}
