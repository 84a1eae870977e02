package cow

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/vdisk/vdisk/format"
)

// refs are all volumes and snapshots of a state, in order.
func (st state) refs() (refs []Ref) {
	for name, v := range st {
		if v.hidden != nil {
			continue
		}
		refs = append(refs, Ref{Volume: name})
		for sn := range v.snaps {
			refs = append(refs, Ref{name, sn})
		}
	}
	slices.SortFunc(refs, func(a, b Ref) int {
		return cmp.Or(cmp.Compare(a.Volume, b.Volume), cmp.Compare(a.Snapshot, b.Snapshot))
	})
	return refs
}

func (st state) disk(r Ref) disk {
	if r.Snapshot == "" {
		return st[r.Volume].disk
	}
	return st[r.Volume].snaps[r.Snapshot]
}

// difference compares the differences of some pairs of states, and of one from nothing, with the model.
func (w *modelStore) difference(o op) error {
	st := w.m.now()
	refs := st.refs()
	to, from := mix(o.b), mix(o.c)
	for range min(3, len(refs)) {
		if err := sameDifference(w.s, st, &refs[from%uint64(len(refs))], refs[to%uint64(len(refs))]); err != nil {
			return err
		}
		from, to = from/7+3, to+1
	}
	return sameDifference(w.s, st, nil, refs[to%uint64(len(refs))])
}

func sameDifference(s *Store, st state, from *Ref, to Ref) (err error) {
	d, err := s.OpenDevice(to, true)
	if err != nil {
		return err
	}
	defer d.Close()
	var a *Device
	old, now := disk{}, st.disk(to)
	if from != nil {
		if a, err = s.OpenDevice(*from, true); err != nil {
			return err
		}
		defer a.Close()
		old = st.disk(*from)
	}
	x, err := s.Difference(context.Background(), a, d)
	if err != nil {
		return err
	}
	end := int64(0)
	differs := make([]bool, len(now.blocks))
	var bad error
	err = x.Extents(context.Background(), 0, x.Size(), func(off, length int64, zero bool) bool {
		if off < end || length <= 0 || off+length > now.size || off%format.BlockSize != 0 {
			bad = fmt.Errorf("difference %s: extent of %d at %d, after %d, of %d", x, length, off, end, now.size)
		}
		end = off + length
		for i := off / format.BlockSize; i < int64(blocksOf(end)) && bad == nil; i++ {
			differs[i] = true
			if b := now.blocks[i]; zero != (b == nil) {
				bad = fmt.Errorf("difference %s: block %d is called zero: %v; in the model it is a hole: %v", x, i, zero, b == nil)
			}
		}
		return bad == nil
	})
	if err := errors.Join(err, bad); err != nil {
		return err
	}
	for i, b := range now.blocks {
		var was block
		if i < len(old.blocks) {
			was = old.blocks[i]
		}
		if same := sameContent(was, b); !same && !differs[i] {
			return fmt.Errorf("difference %s: block %d is missing", x, i)
		}
		if was == b && b != solid && differs[i] {
			return fmt.Errorf("difference %s: block %d was not written", x, i)
		}
	}
	return nil
}

// sameContent reports whether two blocks hold the same.
func sameContent(a, b block) bool {
	if a == nil {
		a = solid
	}
	if b == nil {
		b = solid
	}
	return *a == *b
}
