package cow

import (
	"errors"
	"fmt"
	"slices"

	"github.com/vdisk/vdisk/format"
)

// WriteZeroes makes the range read as zeros. They are a hole and take no space, unless noHole asks that the range be
// as good as written: then they take what data takes that does not compress, no pass over the store compresses them,
// and whatever overwrites them finds the space that it gives back.
func (d *Device) WriteZeroes(off, length int64, noHole bool) error {
	if err := d.checkWrite(off, length); err != nil {
		return fmt.Errorf("write zeroes %s: %w", d.ref, err)
	}
	if noHole {
		return wrapIf(d.fill(off, length), "write zeroes %s", d.ref)
	}
	first, end := blocksOf(off), uint64(off+length)/format.BlockSize
	if first >= end { // within one block, or over one boundary
		return d.zeroPart(off, length)
	}
	return errors.Join(
		d.zeroPart(off, int64(first)*format.BlockSize-off),
		wrapIf(d.punch(first, end), "write zeroes %s", d.ref),
		d.zeroPart(int64(end)*format.BlockSize, off+length-int64(end)*format.BlockSize))
}

var zeros [hotUnit]byte

func (d *Device) zeroPart(off, length int64) error {
	if length == 0 {
		return nil
	}
	_, err := d.WriteAt(zeros[:length], off)
	return err
}

// fill writes zeros that are no hole.
func (d *Device) fill(off, length int64) error {
	sc := d.s.scratch.Get().(*scratch)
	sc.solid, sc.small = true, length <= smallWrite
	defer func() {
		sc.solid = false
		d.s.scratch.Put(sc)
	}()
	for end := off + length; off < end; {
		part := min(end-off, hotUnit-off%hotUnit)
		if err := d.writeUnit(sc, zeros[:part], off); err != nil {
			return err
		}
		off += part
	}
	return d.s.answer()
}

// Zero makes the range read as zeros and gives up no space: what is mapped stays so, as WriteZeroes without a hole has
// it, and what is a hole stays one.
func (d *Device) Zero(off, length int64) error {
	type run struct{ off, length int64 }
	var runs []run
	for end := off + length; off < end; {
		runs = runs[:0]
		err := d.Extents(off, end-off, func(at, n int64, hole bool) bool {
			off = at + n
			if !hole {
				runs = append(runs, run{at, n})
			}
			return len(runs) < format.LeafBlocks
		})
		for _, r := range runs {
			if err == nil {
				err = d.WriteZeroes(r.off, r.length, true)
			}
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// keepSolid leaves out the units that have zeros which are no hole: compressed, they would not keep their space.
func (p *coldPass) keepSolid() {
	p.units = slices.DeleteFunc(p.units, func(u coldUnit) bool {
		for data := p.data[u.first*format.BlockSize:][:u.n*format.BlockSize]; len(data) > 0; data = data[format.BlockSize:] {
			if format.IsZero(data[:format.BlockSize]) {
				return true
			}
		}
		return false
	})
}
