package owner

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net/http"
	"strconv"

	"github.com/vdisk/vdisk/cow"
	"github.com/vdisk/vdisk/internal/journal"
	"github.com/vdisk/vdisk/internal/owner/sparse"
)

// KnownDamage is what the owner of a store knows to be damaged.
type KnownDamage struct {
	List     []cow.Damage
	Complete bool // there is no more than is listed
}

// Damage returns the damage that the owner has met, as far as it takes something of the volumes and snapshots in refs, and
// what it takes of these; without refs, of any.
func (o *Owner) Damage(ctx context.Context, refs ...cow.Ref) (k KnownDamage, err error) {
	k.List, k.Complete, err = o.store.KnownDamage(ctx, refs...)
	return k, err
}

// Damage returns the damage that the owner has met.
func (c *Client) Damage(ctx context.Context, refs ...cow.Ref) (k KnownDamage, err error) {
	return k, c.call(ctx, "damage", request{Refs: refs}, &k)
}

// Salvage is Export of what can be read. It calls lost with each range that cannot be, before the data behind it is
// handed out; there the content has zeros.
func (o *Owner) Salvage(ctx context.Context, r cow.Ref, lost func(off, length int64), use func(sparse.Source) error) (err error) {
	dev, err := o.still(r)
	if err != nil {
		return err
	}
	ended := o.begun(ctx, journal.Entry{Kind: "export", Names: []string{r.String()}})
	defer func() { ended(map[string]any{"salvage": true}, err) }()
	defer func() { err = errors.Join(err, dev.Close()) }()
	return use(&deviceSource{dev: dev, lost: lost})
}

// read reads data of a run. If it is salvaged, blocks that cannot be read are zeros.
func (s *deviceSource) read(p []byte, off int64) error {
	_, err := s.dev.ReadAt(p, off)
	if s.lost == nil || !cow.IsDamage(err) {
		return err
	}
	return eachBlock(p, off, func(block []byte, at int64) error {
		_, err := s.dev.ReadAt(block, at)
		if !cow.IsDamage(err) {
			return err
		}
		clear(block)
		s.lost(at, int64(len(block)))
		return nil
	})
}

// eachBlock calls fn for the parts of p, which begins at off, that lie in one block each.
func eachBlock(p []byte, off int64, fn func(block []byte, at int64) error) error {
	for len(p) > 0 {
		n := min(len(p), int(sparse.Block-off%sparse.Block))
		if err := fn(p[:n], off); err != nil {
			return err
		}
		p, off = p[n:], off+int64(n)
	}
	return nil
}

// skipLeaf gives up the part of the content whose map cannot be read because of err.
func (s *deviceSource) skipLeaf(err error) error {
	if s.lost == nil || !cow.IsDamage(err) {
		return err
	}
	from := s.at
	if d := (*cow.LeafDamage)(nil); errors.As(err, &d) {
		from = max(from, d.Offset)
	}
	s.at = min((from/cow.LeafSize+1)*cow.LeafSize, s.Size())
	s.lost(from, s.at-from)
	return nil
}

func (c *control) salvageStream(w http.ResponseWriter, r *http.Request) {
	c.sendStream(w, r, func(req request, use func(sparse.Source) error) error {
		var failed error
		lost := func(off, length int64) {
			if failed == nil {
				failed = sparse.EncodeLost(w, off, length)
			}
		}
		return errors.Join(c.owner.Salvage(r.Context(), req.Ref, lost, use), failed)
	})
}

// Salvage is Export of what can be read.
func (c *Client) Salvage(ctx context.Context, ref cow.Ref, lost func(off, length int64), use func(sparse.Source) error) error {
	return c.receiveLost(ctx, "salvage", &request{Ref: ref}, lost, use)
}

// receiveLost performs an operation that is answered with a framed stream. lost is called with ranges that the stream
// says are lost; if it is nil, there must be none.
func (c *Client) receiveLost(ctx context.Context, name string, args *request, lost func(off, length int64), use func(sparse.Source) error) error {
	resp, err := c.post(ctx, name, args, nil)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	size, err := strconv.ParseInt(resp.Header.Get(sizeHeader), 10, 64)
	if err != nil {
		return fmt.Errorf("the owner of the store does not say the size of its answer to %s: %w", name, err)
	}
	return fromStream(use(sparse.DecodeLost(bufio.NewReaderSize(&answerBody{resp.Body, c, ctx}, 256<<10), size, lost)))
}
