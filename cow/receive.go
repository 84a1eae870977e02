package cow

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/vdisk/vdisk/cow/internal/wal"
	"github.com/vdisk/vdisk/format"
	"github.com/vdisk/vdisk/internal/stream"
)

// ReceiveOptions say what Receive does with what it reads.
type ReceiveOptions struct {
	// Target is the volume that gets the snapshots. Its Snapshot, unless empty, is the name that the snapshot gets
	// instead of its own.
	Target Ref
	// Force gives up what has changed in the target since the base of an incremental stream.
	Force bool
	// DryRun changes nothing: it finds out whether the streams are sound, and whether they would be accepted.
	DryRun bool
	// Progress, unless nil, is called with the bytes of the snapshot that have been gone through, and its size.
	Progress func(done, size int64) `json:"-"`
}

// Received describes a snapshot that was received, or would be.
type Received struct {
	Snapshot Ref         `json:"snapshot"`
	Base     Ref         `json:"base,omitzero"` // here
	GUID     format.GUID `json:"guid"`
	From     uint64      `json:"from"` // the block at which the stream began
	Units    uint64      `json:"units"`
	Holes    uint64      `json:"holes"`
	Blocks   uint64      `json:"blocks"` // in units
	Length   int64       `json:"length"` // of the stream
}

// ReceiveError is the error of a reception that can be resumed.
type ReceiveError struct {
	Target Ref
	Source string // the snapshot, by the name that it has where it comes from
	Base   string // that of the base, or empty
	Mark   uint64 // the block to resume at
	Blocks uint64 // of the snapshot
	Err    error
}

func (e *ReceiveError) Error() string {
	base := ""
	if e.Base != "" {
		base = "-i " + e.Base + " "
	}
	return fmt.Sprintf("%v; %s has been received up to block %d of %d: go on with 'vdisk send %s%s --resume %d', or give it up with 'vdisk receive --abort %s'",
		e.Err, e.Target, e.Mark, e.Blocks, base, e.Source, e.Mark, e.Target.Volume)
}

// Unwrap returns what ended the reception.
func (e *ReceiveError) Unwrap() error { return e.Err }

// Receive reads the streams in r and makes a snapshot of each: docs/streams.md, Receiving. Each stream is received as a
// whole, and is durable, or leaves what a ReceiveError says: a hidden volume, with which another call for the same
// target goes on. Receive returns what was received, also if there is an error. It reads r to its end. A read of r must
// end with ctx.
func (s *Store) Receive(ctx context.Context, r io.Reader, o ReceiveOptions) (list []Received, err error) {
	if err := s.beginTask(); err != nil {
		return nil, fmt.Errorf("receive %s: %w", o.Target, err)
	}
	defer s.tasks.Done()
	if s.readOnly != nil && !o.DryRun {
		return nil, fmt.Errorf("receive %s: %w", o.Target, s.readOnly)
	}
	for in := stream.NewReader(r); ; {
		h, err := in.Next()
		switch {
		case errors.Is(err, io.EOF) && len(list) > 0:
			return list, nil
		case errors.Is(err, io.EOF):
			err = fmt.Errorf("there is no stream: %w", io.ErrUnexpectedEOF)
		case err == nil && len(list) > 0 && o.Target.Snapshot != "":
			err = fmt.Errorf("a second stream follows, and only one can get the name %s: %w", o.Target, ErrInvalid)
		}
		if err != nil {
			return list, fmt.Errorf("receive %s: %w", o.Target, err)
		}
		one, err := s.receiveOne(ctx, in, &h, o, list)
		if err != nil {
			return list, fmt.Errorf("receive %s: %w", o.Target, err)
		}
		list = append(list, one)
	}
}

// receiveOne receives the stream that begins with h. done are those before it.
func (s *Store) receiveOne(ctx context.Context, in *stream.Reader, h *format.StreamHeader, o ReceiveOptions, done []Received) (Received, error) {
	rc := &reception{s: s, h: h, target: o.Target, force: o.Force}
	if rc.target.Snapshot == "" {
		rc.target.Snapshot = h.Snapshot
	}
	one := Received{Snapshot: rc.target, GUID: h.GUID, From: h.From}
	var err error
	if o.DryRun {
		err = rc.try(done)
	} else if err = rc.begin(); err == nil {
		defer rc.close()
	}
	if err == nil {
		one.Base = rc.base
		err = rc.run(ctx, in, o.Progress)
	}
	t := in.Totals()
	one.Units, one.Holes, one.Blocks, one.Length = t.Units, t.Holes, t.Blocks, t.Length
	if err == nil || rc.d == nil {
		return one, err
	}
	return one, &ReceiveError{
		Target: rc.target, Source: Ref{h.Volume, h.Snapshot}.String(), Base: h.BaseName, Mark: rc.marked(), Blocks: h.Blocks(), Err: err,
	}
}

// run reads the frames of a stream and applies them.
func (rc *reception) run(ctx context.Context, in *stream.Reader, progress func(done, size int64)) error {
	for {
		if err := rc.s.interrupted(ctx); err != nil {
			return err
		}
		f, err := in.Frame()
		if err != nil {
			return err
		}
		at := f.Mark.Block
		switch {
		case f.Kind == format.FrameUnits:
			at = f.Items[len(f.Items)-1].End()
			err = rc.put(f.Items)
		case f.Kind == format.FrameMark:
			err = rc.mark(at)
		default:
			if err = rc.mark(at); err == nil {
				err = rc.end()
			}
		}
		if err != nil {
			return err
		}
		if progress != nil {
			progress(min(int64(at)*format.BlockSize, rc.h.Size), rc.h.Size)
		}
		if f.Kind == format.FrameEnd {
			return nil
		}
	}
}

// put writes the items of a frame to the hidden volume. Their units have been decoded, so they are written as they are.
func (rc *reception) put(items []format.StreamItem) error {
	if rc.d == nil {
		return nil
	}
	for i := range items {
		it := &items[i]
		var err error
		if it.IsHole() {
			err = rc.s.putHole(rc.d, it.First, it.Blocks, nil)
		} else {
			h := rc.d.dataHeader(it.First, it.Blocks, it.Codec, it.Unit)
			err = rc.s.writeRecord(rc.d, &h, it.Unit, it.Blocks, nil, false)
		}
		if err != nil {
			return fmt.Errorf("block %d: %w", it.First, err)
		}
	}
	return nil
}

// Abort gives up what has been received of a volume.
func (s *Store) Abort(name string) error {
	err := s.transact(func() (*format.Event, error) {
		v := s.catalog.receiving[name]
		if v == nil {
			return nil, fmt.Errorf("nothing of it is being received: %w", ErrNotFound)
		}
		if v.writer {
			return nil, fmt.Errorf("a 'vdisk receive' is at work on it: end that first: %w", ErrBusy)
		}
		return &format.Event{Op: "abort", DropVolumes: []uint32{v.ID}}, nil
	})
	if err == nil {
		wal.Poke(s.checkpoints.work)
	}
	return wrapIf(err, "abort the reception of %s", name)
}

// ReceivingInfo describes a volume that is being received.
type ReceivingInfo struct {
	Volume   string      `json:"volume"`
	Snapshot string      `json:"snapshot"`
	GUID     format.GUID `json:"guid"`
	Base     format.GUID `json:"base,omitzero"`
	Size     int64       `json:"size"`
	Created  time.Time   `json:"created"`
	Mark     uint64      `json:"mark"`   // the block to resume at
	Blocks   uint64      `json:"blocks"` // of the snapshot
}

func receivingInfo(r *format.Receiving) *ReceivingInfo {
	if r == nil {
		return nil
	}
	return &ReceivingInfo{
		Volume: r.Volume, Snapshot: r.Snapshot, GUID: r.GUID, Base: r.Base, Size: r.Size, Created: r.Created, Mark: r.Block, Blocks: blocksOf(r.Size),
	}
}
