package cow

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"time"

	"github.com/vdisk/vdisk/format"
	"github.com/vdisk/vdisk/internal/stream"
)

// SendOptions say what Send sends.
type SendOptions struct {
	// Snapshot is sent.
	Snapshot Ref
	// Base is the snapshot from which the stream says the difference. If it names nothing, the stream is full.
	Base Ref
	// Between sends the snapshots of the volume that lie between Base and Snapshot, too, each in a stream of its own.
	Between bool
	// From is the block at which the first stream begins. A receiver that was cut has named it.
	From uint64
	// Estimate reads no data and writes nothing.
	Estimate bool
	// Progress, unless nil, is called with the bytes of the snapshot that have been gone through, and its size.
	Progress func(done, size int64) `json:"-"`

	frameBytes, markBytes int // those of the writer, if tests set them
}

// Sent describes a stream that was sent, or would be.
type Sent struct {
	Snapshot Ref         `json:"snapshot"`
	Base     Ref         `json:"base,omitzero"`
	GUID     format.GUID `json:"guid"`
	Units    uint64      `json:"units"`
	Holes    uint64      `json:"holes"`
	Blocks   uint64      `json:"blocks"` // in units
	Bytes    int64       `json:"bytes"`  // of units, as stored
	Length   int64       `json:"length"` // of the stream; an estimate if nothing was written
	Read     int64       `json:"read"`   // bytes of records that were read
}

// Send writes a snapshot to w as a stream: docs/streams.md, Sending. It returns what was sent, also if there is an error.
// A record that does not verify is an error that matches ErrCorrupt: a stream never has a block that was not proved.
func (s *Store) Send(ctx context.Context, o SendOptions, w io.Writer) (list []Sent, err error) {
	if o.Snapshot.Snapshot == "" || o.Base.Volume != "" && o.Base.Snapshot == "" {
		return nil, fmt.Errorf("send %s: a stream goes from snapshot to snapshot, VOL@SNAP: %w", o.Snapshot, ErrInvalid)
	}
	base, series, err := s.openSeries(o)
	defer func() {
		for _, d := range series {
			err = errors.Join(err, d.Close())
		}
		if base != nil {
			err = errors.Join(err, base.Close())
		}
	}()
	if err != nil {
		return nil, fmt.Errorf("send %s: %w", o.Snapshot, err)
	}
	from := base
	for _, d := range series {
		r := d.ref
		o.Snapshot = r
		one, err := s.sendOne(ctx, o, from, d, w)
		if one != nil {
			list = append(list, *one)
		}
		if err != nil {
			return list, fmt.Errorf("send %s: %w", r, err)
		}
		o.Base, o.From, from = r, 0, d
	}
	return list, nil
}

// openSeries opens all snapshots that are sent, and the base, if there is one, in one step: what is open is not
// removed before its stream begins. If there is an error, the caller closes what it returns, too.
func (s *Store) openSeries(o SendOptions) (base *Device, series []*Device, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	refs := []Ref{o.Snapshot}
	if o.Between {
		if refs, err = s.between(o.Base, o.Snapshot); err != nil {
			return nil, nil, err
		}
	}
	for _, r := range refs {
		d, err := s.openDevice(r, true)
		if err != nil {
			return nil, series, err
		}
		series = append(series, d)
	}
	if o.Base.Volume != "" {
		base, err = s.openDevice(o.Base, true)
	}
	return base, series, err
}

// between returns the snapshots of to's volume on the line of to, from the one behind base up to to. The caller holds
// mu.
func (s *Store) between(base, to Ref) ([]Ref, error) {
	_, first, err := s.lookupSnapshot(base)
	if err != nil {
		return nil, err
	}
	v, last, err := s.lookupSnapshot(to)
	if err != nil {
		return nil, err
	}
	var refs []Ref
	for b, epoch := last.branch, last.Epoch; b != nil; b, epoch = b.origin, b.OriginEpoch {
		n, found := b.search(epoch)
		if found {
			n++
		}
		for _, sn := range slices.Backward(b.points[:n]) {
			if sn == first {
				if len(refs) == 0 {
					return nil, fmt.Errorf("%s is the base itself: %w", to, ErrInvalid)
				}
				slices.Reverse(refs)
				return refs, nil
			}
			if sn.Volume == v.ID {
				refs = append(refs, Ref{to.Volume, sn.Name})
			}
		}
	}
	return nil, fmt.Errorf("%s does not come before %s: %w", base, to, ErrInvalid)
}

// sender sends one snapshot.
type sender struct {
	s        *Store
	d        *Device // the snapshot
	from     uint64  // the block to begin at
	out      *stream.Writer
	sent     Sent
	progress func(done, size int64)
	leaf     sendLeaf
}

// sendOne sends one stream, from base, which may be nil, to d.
func (s *Store) sendOne(ctx context.Context, o SendOptions, base, d *Device, w io.Writer) (sent *Sent, err error) {
	h := s.streamHeader(d, base)
	switch h.From = o.From; {
	case h.GUID == h.Base:
		return nil, fmt.Errorf("%s is the base itself: %w", o.Snapshot, ErrInvalid)
	case h.From > h.Blocks():
		return nil, fmt.Errorf("there is no block %d: it has %d: %w", h.From, h.Blocks(), ErrInvalid)
	}
	x, err := s.Difference(ctx, base, d)
	if err != nil {
		return nil, err
	}
	sd := &sender{s: s, d: d, from: o.From, progress: o.Progress, sent: Sent{Snapshot: o.Snapshot, Base: o.Base, GUID: h.GUID}}
	if !o.Estimate {
		if sd.out, err = stream.NewWriter(w, h); err != nil {
			return &sd.sent, err
		}
		if o.markBytes > 0 {
			sd.out.FrameBytes, sd.out.MarkBytes = o.frameBytes, o.markBytes
		}
	}
	err = x.leaves(ctx, uint32(o.From/format.LeafBlocks), x.limit(), sd.sendLeaf)
	return &sd.sent, errors.Join(err, sd.end(h, err == nil))
}

// end ends the stream, if it is whole.
func (sd *sender) end(h *format.StreamHeader, whole bool) (err error) {
	if sd.out == nil {
		sd.sent.Length = stream.Estimate(h, sd.sent.Units+sd.sent.Holes, sd.sent.Bytes)
		return nil
	}
	if whole {
		err = sd.out.End()
	}
	sd.sent.Length = sd.out.Length()
	return err
}

// streamHeader describes the stream from base, which may be nil, to d.
func (s *Store) streamHeader(d, base *Device) *format.StreamHeader {
	s.mu.Lock()
	defer s.mu.Unlock()
	v := d.v
	h := &format.StreamHeader{
		Features: []string{format.FeatureZstd}, Volume: v.Name, Snapshot: d.snap.Name, GUID: s.guidOf(d.snap),
		Size: d.snapSize, LogicalBlock: v.LogicalBlock, Codec: v.Codec, Level: v.Level, Created: d.snap.Created.UTC().Round(time.Millisecond),
		Properties: v.Properties,
	}
	if base != nil {
		h.Base, h.BaseName = s.guidOf(base.snap), Ref{base.v.Name, base.snap.Name}.String()
	}
	return h
}

// sendLeaf sends what differs in one leaf.
func (sd *sender) sendLeaf(index uint32, from, to *format.Leaf) error {
	first := uint64(index) * format.LeafBlocks
	l := &sd.leaf
	l.split(from, to, first, sd.from, blocksOf(sd.d.snapSize))
	if sd.out == nil {
		sd.estimate(l)
		return nil
	}
	defer l.release()
	n, err := l.read(sd.s)
	sd.sent.Read += n
	if err != nil {
		return fmt.Errorf("bytes %d to %d: %w", first*format.BlockSize, (first+format.LeafBlocks)*format.BlockSize, err)
	}
	for i := range l.parts {
		if err := sd.sendPart(&l.parts[i]); err != nil {
			return err
		}
	}
	if sd.progress != nil {
		sd.progress(min(int64(first+format.LeafBlocks)*format.BlockSize, sd.d.snapSize), sd.d.snapSize)
	}
	return nil
}

// sendPart sends holes, or blocks of a unit.
func (sd *sender) sendPart(p *sendPart) (err error) {
	it := format.StreamItem{First: p.first, Blocks: p.blocks}
	if p.record >= 0 {
		if it.Unit, it.Codec, err = sd.leaf.encoded(p, sd.d.v.codec); err != nil {
			return err
		}
	}
	sd.count(it.Blocks, len(it.Unit), it.IsHole())
	return sd.out.Put(&it)
}

func (sd *sender) count(blocks, bytes int, hole bool) {
	if hole {
		sd.sent.Holes++
		return
	}
	sd.sent.Units++
	sd.sent.Blocks += uint64(blocks)
	sd.sent.Bytes += int64(bytes)
}

// estimate counts what a leaf would send: a part of a unit takes its share.
func (sd *sender) estimate(l *sendLeaf) {
	for _, p := range l.parts {
		if p.record < 0 {
			sd.count(p.blocks, 0, true)
			continue
		}
		e := l.records[p.record].e
		sd.count(p.blocks, (e.Size()-format.RecordHeaderSize)*p.blocks/e.Blocks(), false)
	}
}
