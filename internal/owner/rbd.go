package owner

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"

	"github.com/vdisk/vdisk/cow"
	"github.com/vdisk/vdisk/internal/journal"
	"github.com/vdisk/vdisk/internal/owner/sparse"
	"github.com/vdisk/vdisk/internal/rbddiff"
)

// ExportDiff calls use with the difference from one snapshot to another, or to a volume that is not open for writing, in
// the format of package rbddiff. Without from it is all data.
func (o *Owner) ExportDiff(ctx context.Context, from, to cow.Ref, use func(sparse.Source) error) (err error) {
	var a *cow.Device
	if from != (cow.Ref{}) {
		if from.Snapshot == "" {
			return fmt.Errorf("%v is a volume, and a difference goes from a snapshot: %w", from, cow.ErrInvalid)
		}
		if a, err = o.store.OpenDevice(from, true); err != nil {
			return err
		}
		defer func() { err = errors.Join(err, a.Close()) }()
	}
	b, err := o.still(to)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, b.Close()) }()
	x, err := o.store.Difference(ctx, a, b)
	if err != nil {
		return err
	}
	e := journal.Entry{Kind: "export-diff", Names: []string{to.String()}}
	if a != nil {
		e.From = from.String()
	}
	ended := o.begun(ctx, e)
	defer func() { ended(nil, err) }()
	h := rbddiff.Header{From: from.Snapshot, To: to.Snapshot, Size: x.Size()}
	r, w := io.Pipe()
	written := make(chan struct{})
	go func() {
		defer close(written)
		buffered := bufio.NewWriterSize(w, 256<<10)
		err := writeDiff(ctx, rbddiff.NewWriter(buffered, h), x, b)
		if err == nil {
			err = buffered.Flush()
		}
		_ = w.CloseWithError(err) // an error is met again by the reader
	}()
	err = use(sparse.FromStream(r))
	_ = r.Close() // ends the writer if it is still at work
	<-written
	return err
}

// writeDiff writes the content of a difference.
func writeDiff(ctx context.Context, w *rbddiff.Writer, x *cow.Difference, to *cow.Device) error {
	buf := make([]byte, sparse.Piece)
	var bad error
	err := x.Extents(ctx, 0, x.Size(), func(off, length int64, zero bool) bool {
		if zero {
			bad = w.Zero(off, length)
			return bad == nil
		}
		for end := off + length; off < end && bad == nil; {
			p := buf[:min(int64(len(buf)), end-off)]
			if _, bad = to.ReadAt(p, off); bad == nil {
				bad = w.Data(p, off)
			}
			off += int64(len(p))
		}
		return bad == nil
	})
	if err = errors.Join(err, bad); err != nil {
		return err
	}
	return w.End()
}

// ImportedDiff is the result of ImportDiff.
type ImportedDiff struct {
	Volume   cow.VolumeInfo
	Snapshot string // that was made, or empty
}

// ImportDiff applies a difference of package rbddiff to a volume, and takes the snapshot to which it goes. The volume
// must have the snapshot from which it goes, and be as that snapshot is; force gives up what has changed since. A full
// difference makes a new volume, with the options v. If ImportDiff fails, the volume is as the snapshot is, or not there.
func (o *Owner) ImportDiff(ctx context.Context, name string, v cow.VolumeOptions, force bool, src sparse.Source, progress func(int64)) (done ImportedDiff, err error) {
	r, w := io.Pipe()
	read := make(chan struct{})
	go func() {
		defer close(read)
		_ = w.CloseWithError(sparse.WriteTo(ctx, w, src, progress))
	}()
	defer func() {
		_ = r.Close() // ends the other goroutine if it is still at work
		<-read
		err = fromStream(err)
	}()
	d, err := rbddiff.NewReader(r)
	if err != nil {
		return done, badDiff(err)
	}
	h := d.Header()
	for _, sn := range []string{h.From, h.To} {
		if _, err := cow.ParseRef(name + "@" + sn); sn != "" && err != nil {
			return done, fmt.Errorf("the snapshots that the difference names: %w", err)
		}
	}
	ended := o.begun(ctx, journal.Entry{Kind: "import-diff", Names: []string{cow.Ref{Volume: name, Snapshot: h.To}.String()}})
	defer func() { ended(nil, err) }()
	if h.From == "" {
		err = o.newFromDiff(ctx, name, v, d)
	} else {
		err = o.onSnapshot(ctx, name, d, force)
	}
	if err != nil {
		return done, badDiff(err)
	}
	done.Snapshot = h.To
	done.Volume, err = o.store.Volume(name)
	return done, err
}

// badDiff makes an error about the format one that matches cow.ErrInvalid.
func badDiff(err error) error {
	if errors.Is(err, rbddiff.ErrFormat) {
		return fmt.Errorf("%w: %w", err, cow.ErrInvalid)
	}
	return err
}

// newFromDiff makes a volume from a full difference, as Import does.
func (o *Owner) newFromDiff(ctx context.Context, name string, v cow.VolumeOptions, d *rbddiff.Reader) error {
	if _, err := o.store.Volume(name); err == nil {
		return fmt.Errorf("volume %s: %w: the difference is a full one, and makes a new volume", name, cow.ErrExists)
	} else if !errors.Is(err, cow.ErrNotFound) {
		return err
	}
	im := &importing{store: o.store, name: importName(name), opts: v}
	created, err := o.addUnfinished(im.name, true)
	if err != nil {
		return err
	}
	im.opts.Created = created
	defer o.noLonger(im.name, created)
	if _, err := im.create(d.Header().Size); err != nil {
		return err
	}
	if err = o.applyDiff(ctx, im.name, d, nil); err == nil {
		err = o.store.Rename(im.ref(), cow.Ref{Volume: name})
	}
	if err != nil {
		err = errors.Join(err, o.store.Remove(im.ref(), true))
	}
	return err
}

// onSnapshot applies a difference to a volume that has the snapshot from which it goes. If that fails, the volume is
// rolled back to that snapshot, which is what it was, but for what force has given up.
func (o *Owner) onSnapshot(ctx context.Context, name string, d *rbddiff.Reader, force bool) error {
	base := cow.Ref{Volume: name, Snapshot: d.Header().From}
	if err := o.known(base); err != nil {
		return fmt.Errorf("the difference goes from the snapshot %s: %w", base.Snapshot, err)
	}
	if to := d.Header().To; to != "" {
		if err := o.known(cow.Ref{Volume: name, Snapshot: to}); err == nil {
			return fmt.Errorf("%s@%s: %w: the difference has been imported, or is another one", name, to, cow.ErrExists)
		} else if !errors.Is(err, cow.ErrNotFound) {
			return err
		}
	}
	if force {
		if err := o.Rollback(ctx, base); err != nil {
			return err
		}
	}
	begun := false
	err := o.applyDiff(ctx, name, d, func(dev *cow.Device) error {
		if !dev.Alone() {
			return o.inUse(name, fmt.Errorf("volume %s is open, and would change under its readers: %w", name, cow.ErrBusy))
		}
		if err := o.unchanged(ctx, dev, base); err != nil {
			return err
		}
		begun = true
		return nil
	})
	if err != nil && begun {
		if back := o.store.Rollback(base); back != nil {
			err = fmt.Errorf("%w; and the volume has a part of the difference: go back with 'vdisk rollback %v': %w", err, base, back)
		}
	}
	return err
}

// unchanged returns an error if the open head of a volume is not as its snapshot base is.
func (o *Owner) unchanged(ctx context.Context, dev *cow.Device, base cow.Ref) (err error) {
	a, err := o.store.OpenDevice(base, true)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, a.Close()) }()
	x, err := o.store.Difference(ctx, a, dev)
	if err != nil {
		return err
	}
	same := a.Size() == dev.Size()
	err = x.Extents(ctx, 0, x.Size(), func(int64, int64, bool) bool {
		same = false
		return false
	})
	if err == nil && !same {
		err = fmt.Errorf("volume %s has changed since %v: %w: --force gives up what has changed", base.Volume, base, cow.ErrBusy)
	}
	return err
}

// applyDiff writes a difference to a volume, sets the volume's size, and takes the snapshot. first, if not nil, is
// called before anything is changed.
func (o *Owner) applyDiff(ctx context.Context, name string, d *rbddiff.Reader, first func(*cow.Device) error) (err error) {
	dev, err := o.store.OpenDevice(cow.Ref{Volume: name}, false)
	if err != nil {
		return o.inUse(name, err)
	}
	closed := false
	defer func() {
		if !closed {
			err = errors.Join(err, dev.Close())
		}
	}()
	if first != nil {
		if err := first(dev); err != nil {
			return err
		}
	}
	block := int64(dev.LogicalBlock())
	size := max(block, (d.Header().Size+block-1)/block*block)
	if size > dev.Size() {
		if err := o.store.Resize(name, size, false); err != nil {
			return err
		}
	}
	if err := applyRecords(ctx, dev, d); err != nil {
		return err
	}
	if size < dev.Size() { // a volume that is open for writing does not shrink
		closed = true
		if err := errors.Join(dev.Close(), o.store.Resize(name, size, true)); err != nil {
			return err
		}
	}
	if to := d.Header().To; to != "" {
		return o.store.Snapshot(cow.Ref{Volume: name, Snapshot: to})
	}
	if closed {
		return nil
	}
	return dev.Flush()
}

func applyRecords(ctx context.Context, dev *cow.Device, d *rbddiff.Reader) error {
	p := make([]byte, sparse.Piece)
	for {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		off, length, zero, err := d.Next(p)
		if err == io.EOF {
			return nil
		}
		if err == nil && zero {
			err = dev.WriteZeroes(off, length, false)
		} else if err == nil {
			_, err = dev.WriteAt(p[:length], off)
		}
		if err != nil {
			return err
		}
	}
}

func (c *control) exportDiff(w http.ResponseWriter, r *http.Request) {
	c.sendStream(w, r, func(req request, use func(sparse.Source) error) error {
		return c.owner.ExportDiff(r.Context(), req.Ref, req.To, use)
	})
}

func (c *control) importDiff(w http.ResponseWriter, r *http.Request) {
	c.takeStream(w, r, func(req request, src sparse.Source) (any, error) {
		return c.owner.ImportDiff(r.Context(), req.Name, req.Volume, req.Flag, src, nil)
	})
}

// ExportDiff calls use with the difference from one snapshot to another.
func (c *Client) ExportDiff(ctx context.Context, from, to cow.Ref, use func(sparse.Source) error) error {
	return c.receive(ctx, "export-diff", &request{Ref: from, To: to}, use)
}

// ImportDiff applies a difference to a volume.
func (c *Client) ImportDiff(ctx context.Context, name string, v cow.VolumeOptions, force bool, src sparse.Source, progress func(int64)) (d ImportedDiff, err error) {
	return d, c.send(ctx, "import-diff", &request{Name: name, Volume: v, Flag: force, Size: src.Size()}, src, progress, &d)
}
