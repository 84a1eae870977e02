package cow

import (
	"errors"
	"fmt"
	"slices"

	"github.com/vdisk/vdisk/format"
)

// WriteZeroes makes the range read as zeros. The zeros are a hole and take no space, unless noHole is set. Then they
// take the space of data that does not compress: the cold pass does not compress them, and a later overwrite can use
// the space that it frees.
func (d *Device) WriteZeroes(off, length int64, noHole bool) error {
	if err := d.checkWrite(off, length); err != nil {
		return fmt.Errorf("write zeroes %s: %w", d.ref, err)
	}
	if noHole {
		return wrapIf(d.fill(off, length), "write zeroes %s", d.ref)
	}
	first, end := blocksOf(off), uint64(off+length)/format.BlockSize
	if first >= end { // the range covers no whole block
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

// fill writes zeros that are not holes.
func (d *Device) fill(off, length int64) error {
	if err := d.fits(nil, off, length); err != nil {
		return err
	}
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

// Zero makes the range read as zeros without giving up space: mapped blocks stay mapped, as after WriteZeroes with
// noHole, and holes stay holes.
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

// keepSolid leaves out the units that contain zeros which are not holes. If such a unit were compressed, it would not
// keep its space.
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
