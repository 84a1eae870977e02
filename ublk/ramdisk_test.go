package ublk_test

import (
	"sync/atomic"

	"github.com/vdisk/vdisk/ublk"
)

// ramDisk keeps a device's bytes in memory, and counts requests.
type ramDisk struct {
	data     []byte
	ops      [8]atomic.Int64
	fuas     atomic.Int64
	noUnmaps atomic.Int64
}

func newRAMDisk(size int64) *ramDisk { return &ramDisk{data: make([]byte, size)} }

func (d *ramDisk) ServeUBLK(r *ublk.Request) error {
	d.ops[r.Op].Add(1)
	if r.FUA {
		d.fuas.Add(1)
	}
	if r.NoUnmap {
		d.noUnmaps.Add(1)
	}
	switch r.Op {
	case ublk.OpRead:
		copy(r.Buf, d.data[r.Offset:])
	case ublk.OpWrite:
		copy(d.data[r.Offset:], r.Buf)
	case ublk.OpDiscard, ublk.OpWriteZeroes:
		clear(d.data[r.Offset : r.Offset+int64(r.Length)])
	}
	return nil
}
