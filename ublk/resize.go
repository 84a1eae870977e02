package ublk

import (
	"context"
	"fmt"
)

// Resize changes the size of a live device (Linux 6.16; a *FeatureError before that). From before Resize until it has
// returned, the handler must be able to serve the larger of the two sizes.
func (d *Device) Resize(ctx context.Context, size int64) error {
	block := int64(d.Options().LogicalBlock)
	if size <= 0 || size%block != 0 {
		return fmt.Errorf("ublk: %w: Size %d: must be a multiple of the logical block (%d), above zero", ErrInvalid, size, block)
	}
	if d.features&FeatureUpdateSize == 0 {
		return &FeatureError{Missing: FeatureUpdateSize, Kernel: kernelRelease()}
	}
	// Before 7.2 the driver does not check whether there is still a disk. So the disk must not go meanwhile: see
	// waitResize.
	select {
	case d.sizing <- struct{}{}:
		defer func() { <-d.sizing }()
	case <-d.done:
	case <-ctx.Done():
		return fmt.Errorf("ublk: resize device %d: %w", d.id, ctx.Err())
	}
	switch s := d.State(); {
	case s != StateLive:
		return fmt.Errorf("ublk: resize device %d: it is %v: %w", d.id, s, ErrBusy)
	case d.isOver():
		return fmt.Errorf("ublk: resize device %d: it is about to end: %w", d.id, ErrBusy)
	}
	if err := d.control.resize(ctx, d.target, uint64(size)>>sectorShift); err != nil {
		return deviceError("resize", d.id, err)
	}
	p, err := d.control.getParams(ctx, d.target)
	if err != nil {
		return err
	}
	if got := int64(p.basic.devSectors) << sectorShift; got != size {
		return fmt.Errorf("ublk: resize device %d to %d bytes: the driver made it %d", d.id, size, got)
	}
	d.mu.Lock()
	d.opts.Size = size
	d.mu.Unlock()
	return nil
}

// waitResize waits until no change of the size is under way. It is called before the disk may go. Once the state is not
// live, or the queues have ended, no further change begins.
func (d *Device) waitResize() {
	d.sizing <- struct{}{} // waits for two commands at most
	<-d.sizing
}
