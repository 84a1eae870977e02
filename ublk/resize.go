package ublk

import (
	"context"
	"fmt"
)

// Resize changes the size of a live device (6.16; a *FeatureError before). The handler must serve the larger of the old
// and the new size before Resize begins, and until it has returned.
func (d *Device) Resize(ctx context.Context, size int64) error {
	if size <= 0 || size%int64(d.opts.LogicalBlock) != 0 {
		return fmt.Errorf("ublk: %w: Size %d: must be a multiple of the logical block (%d), above zero",
			ErrInvalid, size, d.opts.LogicalBlock)
	}
	if d.features&FeatureUpdateSize == 0 {
		return &FeatureError{Missing: FeatureUpdateSize, Kernel: kernelRelease()}
	}
	cmd := command(d.id)
	cmd.data = uint64(size) >> sectorShift
	if err := d.control.quick(ctx, cmdUpdateSize, cmd, nil); err != nil {
		return deviceError("resize", d.id, err)
	}
	p, err := d.control.getParams(ctx, d.id)
	if err != nil {
		return err
	}
	if got := int64(p.basic.devSectors) << sectorShift; got != size {
		return fmt.Errorf("ublk: resize device %d to %d bytes: the driver made it %d", d.id, size, got)
	}
	return nil
}
