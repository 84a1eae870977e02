package owner

import (
	"context"
	"encoding/json"
	"errors"
	"net/http"

	"github.com/vdisk/vdisk/cow"
	"github.com/vdisk/vdisk/internal/owner/sparse"
)

// Extent is a part of a disk. Zero says that it is a hole, and reads as zeros.
type Extent struct {
	Offset int64 `json:"o"`
	Length int64 `json:"l"`
	Zero   bool  `json:"z,omitempty"`
}

// Difference calls each with the extents in which to may be other than from, in order, some at a time. Without from,
// these are all extents of data. It returns the sizes of both.
func (o *Owner) Difference(ctx context.Context, from, to cow.Ref, each func([]Extent) error) (sizes [2]int64, err error) {
	var a *cow.Device
	if from != (cow.Ref{}) {
		if a, err = o.store.OpenDevice(from, true); err != nil {
			return sizes, err
		}
		defer func() { err = errors.Join(err, a.Close()) }()
		sizes[0] = a.Size()
	}
	b, err := o.store.OpenDevice(to, true)
	if err != nil {
		return sizes, err
	}
	defer func() { err = errors.Join(err, b.Close()) }()
	x, err := o.store.Difference(ctx, a, b)
	if err != nil {
		return sizes, err
	}
	sizes[1] = x.Size()
	batch := make([]Extent, 0, 512)
	var stopped error
	hand := func() bool {
		stopped = each(batch)
		batch = batch[:0]
		return stopped == nil
	}
	err = x.Extents(ctx, 0, x.Size(), func(off, length int64, zero bool) bool {
		batch = append(batch, Extent{off, length, zero})
		return len(batch) < cap(batch) || hand()
	})
	if stopped == nil && len(batch) > 0 {
		hand() // before a damaged leaf, too
	}
	return sizes, errors.Join(err, stopped)
}

// Comparison is the result of a comparison of two disks. The end of the shorter one is followed by zeros.
type Comparison struct {
	Sizes   [2]int64
	Differs bool
	At      int64 // the first byte that differs
}

// Compare compares the contents of two volumes or snapshots. It reads only where their maps differ.
func (o *Owner) Compare(ctx context.Context, a, b cow.Ref) (c Comparison, err error) {
	da, err := o.still(a)
	if err != nil {
		return c, err
	}
	defer func() { err = errors.Join(err, da.Close()) }()
	c.Sizes = [2]int64{da.Size(), da.Size()}
	if a == b {
		return c, nil
	}
	db, err := o.still(b)
	if err != nil {
		return c, err
	}
	defer func() { err = errors.Join(err, db.Close()) }()
	c.Sizes[1] = db.Size()
	x, err := o.store.Difference(ctx, da, db)
	if err != nil {
		return c, err
	}
	common := min(c.Sizes[0], c.Sizes[1])
	var cmp comparer
	var bad error
	err = x.Extents(ctx, 0, common, func(off, length int64, _ bool) bool {
		c.At, c.Differs, bad = cmp.compare(ctx, da, db, off, length)
		return bad == nil && !c.Differs
	})
	if err = errors.Join(err, bad); err != nil || c.Differs || c.Sizes[0] == c.Sizes[1] {
		return c, err
	}
	longer := da
	if c.Sizes[1] > common {
		longer = db
	}
	for at := common; at < longer.Size() && bad == nil && !c.Differs; {
		err := longer.Extents(at, longer.Size()-at, func(off, length int64, hole bool) bool {
			if at = off + length; !hole {
				c.At, c.Differs, bad = cmp.compare(ctx, longer, nil, off, length)
			}
			return hole && bad == nil
		})
		if bad = errors.Join(err, bad); bad == nil {
			bad = context.Cause(ctx)
		}
	}
	return c, bad
}

// comparer has the buffers of a comparison.
type comparer struct{ a, b []byte }

// compare returns the first byte of a range that differs between two devices. Without b, the range is compared with
// zeros.
func (c *comparer) compare(ctx context.Context, a, b *cow.Device, off, length int64) (at int64, differs bool, err error) {
	const piece = 1 << 20
	if c.a == nil {
		c.a, c.b = make([]byte, piece), make([]byte, piece)
	}
	for end := off + length; off < end; off += piece {
		if err := context.Cause(ctx); err != nil {
			return 0, false, err
		}
		pa, pb := c.a[:min(piece, end-off)], c.b[:min(piece, end-off)]
		_, err := a.ReadAt(pa, off)
		if b == nil {
			clear(pb)
		} else if err == nil {
			_, err = b.ReadAt(pb, off)
		}
		if err != nil {
			return 0, false, err
		}
		if i := sparse.FirstDifference(pa, pb); i >= 0 {
			return off + int64(i), true, nil
		}
	}
	return 0, false, nil
}

// differenceLine is one line of the answer to difference. The last one has Sizes or Error.
type differenceLine struct {
	Extents []Extent  `json:",omitempty"`
	Sizes   *[2]int64 `json:",omitempty"`
	Error   *Error    `json:",omitempty"`
}

func (c *control) difference(w http.ResponseWriter, r *http.Request) {
	req, err := arguments(r)
	if err != nil {
		reply(w, nil, err)
		return
	}
	waitLonger(w, exportStandstill) // somebody may be paging through it
	lines := newLineWriter(w)
	sizes, err := c.owner.Difference(r.Context(), req.Ref, req.To, func(es []Extent) error {
		lines.write(differenceLine{Extents: es})
		return context.Cause(r.Context())
	})
	last := differenceLine{Sizes: &sizes}
	if err != nil {
		last = differenceLine{Error: toWire(err)}
	}
	lines.write(last)
}

// Difference calls each with the extents in which to may be other than from.
func (c *Client) Difference(ctx context.Context, from, to cow.Ref, each func([]Extent) error) (sizes [2]int64, err error) {
	resp, err := c.post(ctx, "difference", &request{Ref: from, To: to}, nil)
	if err != nil {
		return sizes, err
	}
	defer resp.Body.Close()
	for d := json.NewDecoder(resp.Body); ; {
		var line differenceLine
		if err := d.Decode(&line); err != nil {
			return sizes, c.lost(ctx, err)
		}
		switch {
		case line.Error != nil:
			return sizes, line.Error
		case line.Sizes != nil:
			return *line.Sizes, nil
		}
		if err := each(line.Extents); err != nil {
			return sizes, err
		}
	}
}

// Compare compares the contents of two volumes or snapshots.
func (c *Client) Compare(ctx context.Context, a, b cow.Ref) (r Comparison, err error) {
	return r, c.call(ctx, "compare", request{Ref: a, To: b}, &r)
}
