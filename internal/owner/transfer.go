package owner

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"

	"github.com/vdisk/vdisk/cow"
	"github.com/vdisk/vdisk/internal/journal"
	"github.com/vdisk/vdisk/internal/owner/sparse"
)

// importingSuffix ends the name of a volume while it is being filled. A killed process leaves the volume with that
// name.
const importingSuffix = ".importing"

// firstSize is the initial size of a volume if the length of its content is unknown.
const firstSize = 1 << 30

// Import makes a volume from src. It fills the volume under another name, and renames it in one step once it is
// durable.
func (o *Owner) Import(ctx context.Context, name string, v cow.VolumeOptions, src sparse.Source, progress func(int64)) (cow.VolumeInfo, error) {
	if _, err := o.store.Volume(name); err == nil {
		return cow.VolumeInfo{}, fmt.Errorf("volume %s: %w", name, cow.ErrExists)
	} else if !errors.Is(err, cow.ErrNotFound) {
		return cow.VolumeInfo{}, err
	}
	im := &importing{store: o.store, name: importName(name), fixed: v.Size > 0, opts: v}
	created, err := o.addUnfinished(im.name, false)
	if err != nil {
		return cow.VolumeInfo{}, err
	}
	im.opts.Created = created
	ended := o.begun(ctx, journal.Entry{Kind: "import", Names: []string{name}})
	err = im.run(ctx, name, src, progress)
	o.noLonger(im.name, created)
	ended(map[string]any{"size": im.size}, err)
	if err != nil {
		return cow.VolumeInfo{}, err
	}
	return o.store.Volume(name)
}

// run makes, fills and finishes the volume. If it fails, it removes the volume.
func (im *importing) run(ctx context.Context, name string, src sparse.Source, progress func(int64)) error {
	if _, err := im.create(src.Size()); err != nil {
		return err
	}
	err := im.fill(ctx, src, progress)
	if err == nil {
		err = im.finish(name, src.Size())
	}
	if err != nil {
		err = errors.Join(err, im.store.Remove(im.ref(), true))
	}
	return err
}

// importName returns the volume's name while it is filled. It has no more than the 63 characters that a name may have.
func importName(name string) string {
	return name[:min(len(name), 63-len(importingSuffix))] + importingSuffix
}

// importing is a volume that is being filled.
type importing struct {
	store *cow.Store
	name  string
	opts  cow.VolumeOptions
	fixed bool // the size was given, and does not follow the source
	size  int64
}

func (im *importing) ref() cow.Ref { return cow.Ref{Volume: im.name} }

// roundUp returns the size of a volume that holds n bytes, or n if no volume is that large.
func (im *importing) roundUp(n int64) int64 {
	if n > cow.MaxVolume {
		return n
	}
	block := int64(max(im.opts.LogicalBlock, 512))
	return max(block, (n+block-1)/block*block)
}

func (im *importing) create(known int64) (cow.VolumeInfo, error) {
	im.size = im.opts.Size
	if !im.fixed {
		if im.size = im.roundUp(known); known < 0 {
			im.size = firstSize
		} else if known > cow.MaxVolume {
			return cow.VolumeInfo{}, tooLarge(known)
		}
	}
	opts := im.opts
	opts.Size = im.size
	v, err := im.store.CreateVolume(im.name, opts)
	if errors.Is(err, cow.ErrExists) {
		err = fmt.Errorf("volume %s is there from an interrupted or running import: %w: if none is running, remove it with 'vdisk rm %[1]s'",
			im.name, cow.ErrBusy)
	}
	return v, err
}

func (im *importing) fill(ctx context.Context, src sparse.Source, progress func(int64)) (err error) {
	if known := src.Size(); known > im.size {
		return im.tooSmall(known)
	}
	dev, err := im.store.OpenDevice(im.ref(), false)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, dev.Close()) }()
	if _, err := sparse.Copy(ctx, dev, src, im.grow, progress); err != nil {
		return fromStream(err)
	}
	switch {
	case src.Size() > im.size: // the content ends in zeros
		if err := im.grow(src.Size()); err != nil {
			return err
		}
	case src.Size() == 0 && !im.fixed:
		return fmt.Errorf("the content is empty, and a volume has at least one block: %w: give --size with 'vdisk create'", cow.ErrInvalid)
	}
	return dev.Flush()
}

func (im *importing) tooSmall(need int64) error {
	return fmt.Errorf("the content has %d bytes or more, the volume %d: %w: give a larger --size", need, im.size, cow.ErrInvalid)
}

func tooLarge(n int64) error {
	return fmt.Errorf("the content has %d bytes or more, and the largest volume has 64 TiB: %w", n, cow.ErrInvalid)
}

// grow grows the volume to at least end bytes.
func (im *importing) grow(end int64) error {
	if end <= im.size {
		return nil
	}
	if im.fixed {
		return im.tooSmall(end)
	}
	if end > cow.MaxVolume {
		return tooLarge(end)
	}
	size := min(max(2*im.size, im.roundUp(end)), cow.MaxVolume)
	if err := im.store.Resize(im.name, size, false); err != nil {
		return err
	}
	im.size = size
	return nil
}

// finish gives the volume its final size and name.
func (im *importing) finish(name string, size int64) error {
	if want := im.roundUp(size); !im.fixed && want != im.size {
		if err := im.store.Resize(im.name, want, true); err != nil {
			return err
		}
	}
	return im.store.Rename(im.ref(), cow.Ref{Volume: name})
}

// Export calls use with the content of a snapshot, or of a volume that is not open for writing.
func (o *Owner) Export(ctx context.Context, r cow.Ref, use func(sparse.Source) error) (err error) {
	dev, err := o.still(r)
	if err != nil {
		return err
	}
	ended := o.begun(ctx, journal.Entry{Kind: "export", Names: []string{r.String()}})
	defer func() { ended(nil, err) }()
	defer func() { err = errors.Join(err, dev.Close()) }()
	return use(&deviceSource{dev: dev})
}

// still opens a snapshot, or a volume that nobody writes to while it is open.
func (o *Owner) still(r cow.Ref) (*cow.Device, error) {
	// Opening a volume for writing ensures that nobody else writes to it while it is read. In a store that can only be
	// read, nobody can.
	dev, err := o.store.OpenDevice(r, r.Snapshot != "" || o.ReadOnly() != nil)
	if errors.Is(err, cow.ErrBusy) {
		err = o.inUse(r.Volume, fmt.Errorf("%w: take a snapshot and use that", err))
	}
	return dev, err
}

// deviceSource is a Source over an open volume or snapshot.
type deviceSource struct {
	dev  *cow.Device
	at   int64 // extents before it have been looked up
	runs []run // data not yet handed out
	mem  [256]run
	once sync.Once
	size int64
	lost func(off, length int64) // is told what cannot be read; nil: that is an error
}

type run struct{ off, length int64 }

func (s *deviceSource) Size() int64 {
	s.once.Do(func() { s.size = s.dev.Size() })
	return s.size
}

func (s *deviceSource) Next(p []byte) (int, int64, error) {
	if len(s.runs) == 0 {
		if err := s.look(); err != nil {
			return 0, 0, err
		}
		if len(s.runs) == 0 {
			return 0, 0, io.EOF
		}
	}
	r := &s.runs[0]
	off := r.off
	n := int(min(int64(len(p)), r.length))
	if err := s.read(p[:n], off); err != nil {
		return 0, 0, fmt.Errorf("reading %v at %d: %w", s.dev.Ref(), off, err)
	}
	r.off, r.length = off+int64(n), r.length-int64(n)
	if r.length == 0 {
		s.runs = s.runs[1:]
	}
	return n, off, nil
}

// look finds the next runs of data and puts them in s.runs.
func (s *deviceSource) look() error {
	s.runs = s.mem[:0]
	for s.at < s.Size() && len(s.runs) == 0 {
		from := s.at
		err := s.dev.Extents(s.at, s.Size()-s.at, func(off, length int64, hole bool) bool {
			s.at = off + length
			if !hole {
				s.runs = append(s.runs, run{off, length})
			}
			return len(s.runs) < len(s.mem)
		})
		if err != nil {
			if err := s.skipLeaf(err); err != nil {
				return fmt.Errorf("looking for data in %v: %w", s.dev.Ref(), err)
			}
			continue
		}
		if s.at == from { // Extents reported nothing more, so the rest has to be read
			s.runs = append(s.runs, run{from, s.Size() - from})
			s.at = s.Size()
		}
	}
	return nil
}
