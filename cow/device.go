package cow

import (
	"fmt"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/vdisk/vdisk/format"
	"github.com/vdisk/vdisk/internal/ratelimit"
)

// Ref names a volume (Snapshot empty) or one of its snapshots: VOL or VOL@SNAP.
type Ref struct{ Volume, Snapshot string }

// ParseRef parses VOL or VOL@SNAP. It returns ErrInvalid if a name is not allowed.
func ParseRef(text string) (Ref, error) {
	v, sn, at := strings.Cut(text, "@")
	r := Ref{v, sn}
	if err := format.CheckName(v); err != nil {
		return r, fmt.Errorf("volume name in %q: %v: %w", text, err, ErrInvalid)
	}
	if at {
		if err := format.CheckSnapshotName(sn); err != nil {
			return r, fmt.Errorf("snapshot name in %q: %v: %w", text, err, ErrInvalid)
		}
	}
	return r, nil
}

func (r Ref) String() string {
	if r.Snapshot == "" {
		return r.Volume
	}
	return r.Volume + "@" + r.Snapshot
}

// Device is an open volume or snapshot. Its methods may be called concurrently, but Close only after all other uses
// have ended.
type Device struct {
	s        *Store
	ref      Ref // the name when it was opened, for messages
	b        *branch
	asOf     uint32 // head, or the snapshot's epoch
	v        *volume
	snap     *snapshot // nil for a volume
	snapSize int64     // the snapshot's size; snap's row may be replaced under Store.mu
	readOnly bool
	noQuota  bool // it gives space back, or mends content that is there, so that no quota holds it up
	block    int
	closed   atomic.Bool
}

// OpenDevice opens a volume, or a snapshot, which is always read-only. A volume has at most one writable device at a
// time (else ErrBusy), and any number of read-only ones. It waits as AwaitCount does.
func (s *Store) OpenDevice(r Ref, readOnly bool) (*Device, error) {
	d, err := s.OpenAtOnce(r, readOnly)
	if err == nil {
		d.AwaitCount()
	}
	return d, err
}

// OpenAtOnce is OpenDevice for callers that may not wait: for those that hold a lock, and while clients are kept waiting.
func (s *Store) OpenAtOnce(r Ref, readOnly bool) (*Device, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	d, err := s.openDevice(r, readOnly)
	if err == nil && !d.readOnly {
		s.countQuota(d.v)
	}
	return d, err
}

// AwaitCount waits, at most for two seconds, until it is known what a volume with a quota holds: before that, the quota
// does not hold.
func (d *Device) AwaitCount() {
	if !d.readOnly {
		d.s.counted(d.v)
	}
}

// openDevice is OpenDevice. The caller holds mu.
func (s *Store) openDevice(r Ref, readOnly bool) (*Device, error) {
	if s.closed {
		return nil, ErrClosed
	}
	v, sn, err := s.lookup(r)
	if err != nil {
		return nil, err
	}
	if err := v.received(); err != nil {
		return nil, err
	}
	d := &Device{s: s, ref: r, v: v, b: v.branch, asOf: head, readOnly: readOnly || sn != nil, block: v.LogicalBlock}
	switch {
	case !d.readOnly && s.readOnly != nil:
		return nil, fmt.Errorf("open %s to write: %w", r, s.readOnly)
	case sn != nil:
		d.snap, d.b, d.asOf, d.snapSize = sn, sn.branch, sn.Epoch, sn.Size
		sn.open++
		v.readers++
	case readOnly:
		v.readers++
	case v.writer:
		return nil, fmt.Errorf("volume %s is open for writing already: %w", v.Name, ErrBusy)
	default:
		v.writer = true
	}
	return d, nil
}

// Close closes the device. It does not flush.
func (d *Device) Close() error {
	if d.closed.Swap(true) {
		return ErrClosed
	}
	d.s.mu.Lock()
	defer d.s.mu.Unlock()
	switch {
	case d.snap != nil:
		d.snap.open--
		d.v.readers--
	case d.readOnly:
		d.v.readers--
	default:
		d.v.writer = false
	}
	return nil
}

// Alone reports whether no other device has the present content of the volume open. Devices of its snapshots do not
// count.
func (d *Device) Alone() bool {
	d.s.mu.Lock()
	defer d.s.mu.Unlock()
	heads := d.v.readers - d.s.openSnapshots(d.v)
	if d.v.writer {
		heads++
	}
	return heads == 1 && d.snap == nil
}

// Size returns the present size in bytes. A volume may be resized while it is open.
func (d *Device) Size() int64 {
	if d.snap != nil {
		return d.snapSize
	}
	return d.v.size.Load()
}

// ReadOnly reports whether writes are refused.
func (d *Device) ReadOnly() bool { return d.readOnly }

// LogicalBlock returns the volume's logical block size in bytes, 512 or 4096.
func (d *Device) LogicalBlock() int { return d.block }

// Limiter limits the requests of all clients of a volume together, by its properties (ratelimit.Of), as they are now. It
// is nil for a snapshot. The methods of Device do not ask it, since not all uses are a client's.
func (d *Device) Limiter() *ratelimit.Limiter {
	if d.snap != nil {
		return nil
	}
	return &d.v.limiter
}

// Ref returns the present name of the volume or snapshot that was opened.
func (d *Device) Ref() Ref {
	d.s.mu.Lock()
	defer d.s.mu.Unlock()
	r := Ref{Volume: d.v.Name}
	if d.snap != nil {
		r.Snapshot = d.snap.Name
	}
	return r
}

// checkRange returns ErrInvalid if the range does not lie in the device, and ErrClosed if the device is closed.
func (d *Device) checkRange(off, length int64) error {
	size := d.Size()
	switch {
	case d.closed.Load():
		return ErrClosed
	case off < 0 || length < 0 || off > size || length > size-off:
		return fmt.Errorf("%d bytes at %d of %d: %w", length, off, size, ErrInvalid)
	}
	return nil
}

func (d *Device) checkWrite(off, length int64) error {
	if err := d.checkRange(off, length); err != nil {
		return err
	}
	if d.readOnly {
		return ErrReadOnly
	}
	return nil
}

// codecPool holds the compressors of a volume.
type codecPool struct {
	codec format.Codec
	level int
	pool  sync.Pool
}

func newCodecPool(c format.Codec, level int) (*codecPool, error) {
	first, err := format.NewCompressor(c, level) // also checks codec and level
	if err != nil {
		return nil, err
	}
	p := &codecPool{codec: c, level: level}
	p.pool.Put(first)
	return p, nil
}

func (p *codecPool) get() *format.Compressor {
	if c, ok := p.pool.Get().(*format.Compressor); ok {
		return c
	}
	c, err := format.NewCompressor(p.codec, p.level)
	if err != nil {
		c, _ = format.NewCompressor(format.Raw, 0) // cannot happen: newCodecPool made one
	}
	return c
}

func (p *codecPool) put(c *format.Compressor) { p.pool.Put(c) }
