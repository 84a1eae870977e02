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
	At      int64         // the first byte that differs
	Unread  sparse.Ranges `json:",omitempty"` // what could not be compared, as one of them cannot be read there
}

// Compare compares the contents of two volumes or snapshots. It reads only where their maps differ. It goes on behind what
// cannot be read.
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
	cmp := comparer{ctx: ctx, c: &c}
	err = cmp.extents(common, func(at, length int64, fn func(off, length int64) bool) error {
		return x.Extents(ctx, at, length, func(off, length int64, _ bool) bool { return fn(off, length) })
	}, da, db)
	if err != nil || c.Differs || c.Sizes[0] == c.Sizes[1] {
		return c, err
	}
	longer := da
	if c.Sizes[1] > common {
		longer = db
	}
	cmp.at = common
	return c, cmp.extents(longer.Size(), func(at, length int64, fn func(off, length int64) bool) error {
		return longer.Extents(at, length, func(off, length int64, hole bool) bool { return hole || fn(off, length) })
	}, longer, nil)
}

// comparer compares two devices, and has the buffers for that.
type comparer struct {
	ctx  context.Context
	c    *Comparison
	at   int64 // what lies before is compared
	a, b []byte
}

// extents compares what each lists, from x.at to end, until it finds a difference. Without b, a is compared with zeros. A
// leaf of the map that is damaged is not compared.
func (x *comparer) extents(end int64, each func(at, length int64, fn func(off, length int64) bool) error, a, b *cow.Device) error {
	for x.at < end && !x.c.Differs {
		var bad error
		err := each(x.at, end-x.at, func(off, length int64) bool {
			bad = x.compare(a, b, off, length)
			x.at = off + length
			return bad == nil && !x.c.Differs
		})
		switch {
		case bad != nil:
			return bad
		case err == nil:
			return nil
		case !cow.IsDamage(err):
			return err
		}
		var d *cow.LeafDamage
		if !errors.As(err, &d) {
			return err
		}
		from := max(d.Offset, x.at)
		x.at = min(d.Offset+cow.LeafSize, end)
		x.c.Unread.Add(from, x.at-from)
	}
	return nil
}

// compare compares a range. It leaves out the blocks that cannot be read.
func (x *comparer) compare(a, b *cow.Device, off, length int64) error {
	const piece = 1 << 20
	if x.a == nil {
		x.a, x.b = make([]byte, piece), make([]byte, piece)
	}
	for end := off + length; off < end && !x.c.Differs; off += piece {
		if err := context.Cause(x.ctx); err != nil {
			return err
		}
		n := min(piece, end-off)
		err := x.piece(a, b, x.a[:n], x.b[:n], off)
		if cow.IsDamage(err) {
			err = x.blocks(a, b, off, n)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// blocks compares a range block by block.
func (x *comparer) blocks(a, b *cow.Device, off, length int64) error {
	return eachBlock(x.a[:length], off, func(p []byte, at int64) error {
		if x.c.Differs {
			return nil
		}
		err := x.piece(a, b, p, x.b[:len(p)], at)
		if cow.IsDamage(err) {
			x.c.Unread.Add(at, int64(len(p)))
			return nil
		}
		return err
	})
}

// piece compares a range that the buffers pa and pb have room for.
func (x *comparer) piece(a, b *cow.Device, pa, pb []byte, off int64) error {
	if _, err := a.ReadAt(pa, off); err != nil {
		return err
	}
	if b == nil {
		clear(pb)
	} else if _, err := b.ReadAt(pb, off); err != nil {
		return err
	}
	if i := sparse.FirstDifference(pa, pb); i >= 0 {
		x.c.At, x.c.Differs = off+int64(i), true
	}
	return nil
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
