package ublk

import (
	"fmt"
	"math/bits"
	"os"
)

// Options describe a device. Zero values mean the default.
type Options struct {
	// ID asks for /dev/ublkbID; nil, or a negative number, lets the kernel choose.
	ID *int
	// Size in bytes: a multiple of LogicalBlock, above zero.
	Size int64
	// Queues is the number of hardware queues, each with a thread and a ring; default 1. The kernel gives no more than
	// it has CPUs.
	Queues int
	// Depth is how many requests a queue has under way at once, up to 4096; default 64.
	Depth int
	// MaxIOBytes is the largest read or write, a multiple of the page size; default 256 KiB. A queue holds
	// Depth × MaxIOBytes of locked memory.
	MaxIOBytes int
	// LogicalBlock is the unit of addressing: 512 (the default) or 4096.
	LogicalBlock int
	// PhysicalBlock is the unit that is written without a read-modify-write; default 4096.
	PhysicalBlock int
	// IOMin and IOOpt are hints to file systems: the smallest and the best I/O, powers of two; default PhysicalBlock.
	IOMin, IOOpt int
	// ReadOnly makes the block device refuse writes.
	ReadOnly bool
	// VolatileCache says that an answered write is durable only after a flush: the kernel then sends OpFlush.
	VolatileCache bool
	// FUA has single writes marked as durable (Request.FUA) instead of a flush after them; it needs VolatileCache.
	FUA bool
	// Discard has OpDiscard and OpWriteZeroes sent; without it the kernel writes zeros itself.
	Discard bool
	// DiscardGranularity is the unit that a discard frees; default PhysicalBlock.
	DiscardGranularity int
	// Report gets what the device survives but its owner should know, now *PanicError. It is called on a queue's
	// thread and must not block.
	Report func(error)
}

// withDefaults fills in what was left out.
func (o Options) withDefaults() Options {
	fill := func(p *int, v int) {
		if *p == 0 {
			*p = v
		}
	}
	fill(&o.Queues, 1)
	fill(&o.Depth, 64)
	fill(&o.MaxIOBytes, 256<<10)
	fill(&o.LogicalBlock, 512)
	fill(&o.PhysicalBlock, 4096)
	fill(&o.IOMin, o.PhysicalBlock)
	fill(&o.IOOpt, o.PhysicalBlock)
	fill(&o.DiscardGranularity, o.PhysicalBlock)
	return o
}

// maxQueueMemory bounds the locked memory of one queue.
const maxQueueMemory = 1 << 30

// validate checks options that have their defaults.
func (o Options) validate() error {
	page := os.Getpagesize()
	checks := []struct {
		bad  bool
		text string
	}{
		{o.ID != nil && *o.ID >= 1<<20, fmt.Sprintf("ID %v: must be below 1048576", deref(o.ID))},
		{o.LogicalBlock != 512 && o.LogicalBlock != 4096, fmt.Sprintf("LogicalBlock %d: must be 512 or 4096", o.LogicalBlock)},
		{!powerOfTwo(o.PhysicalBlock) || o.PhysicalBlock < o.LogicalBlock || o.PhysicalBlock > 1<<20,
			fmt.Sprintf("PhysicalBlock %d: must be a power of two from LogicalBlock to 1 MiB", o.PhysicalBlock)},
		{!powerOfTwo(o.IOMin) || o.IOMin < o.LogicalBlock, fmt.Sprintf("IOMin %d: must be a power of two, at least LogicalBlock", o.IOMin)},
		{!powerOfTwo(o.IOOpt) || o.IOOpt < o.LogicalBlock, fmt.Sprintf("IOOpt %d: must be a power of two, at least LogicalBlock", o.IOOpt)},
		{o.Size <= 0 || o.Size%int64(max(o.LogicalBlock, 1)) != 0,
			fmt.Sprintf("Size %d: must be a multiple of the logical block (%d), above zero", o.Size, o.LogicalBlock)},
		{o.Queues < 1 || o.Queues > maxQueues, fmt.Sprintf("Queues %d: must be 1 to %d", o.Queues, maxQueues)},
		{o.Depth < 1 || o.Depth > maxQueueDepth, fmt.Sprintf("Depth %d: must be 1 to %d", o.Depth, maxQueueDepth)},
		{o.MaxIOBytes < page || o.MaxIOBytes > maxIOBytes || o.MaxIOBytes%page != 0,
			fmt.Sprintf("MaxIOBytes %d: must be a multiple of %d, at most %d", o.MaxIOBytes, page, maxIOBytes)},
		{o.Depth > 0 && o.MaxIOBytes > maxQueueMemory/o.Depth,
			fmt.Sprintf("Depth %d × MaxIOBytes %d: more than 1 GiB of locked memory a queue", o.Depth, o.MaxIOBytes)},
		{o.FUA && !o.VolatileCache, "FUA without VolatileCache: every answered write is durable anyway"},
		{o.Discard && o.ReadOnly, "Discard on a read-only device"},
		{!powerOfTwo(o.DiscardGranularity) || o.DiscardGranularity < o.LogicalBlock || o.DiscardGranularity > 1<<30,
			fmt.Sprintf("DiscardGranularity %d: must be a power of two from LogicalBlock to 1 GiB", o.DiscardGranularity)},
	}
	for _, c := range checks {
		if c.bad {
			return fmt.Errorf("ublk: %w: %s", ErrInvalid, c.text)
		}
	}
	return nil
}

func deref(p *int) int {
	if p == nil {
		return -1
	}
	return *p
}

func powerOfTwo(n int) bool { return n > 0 && n&(n-1) == 0 }

func shiftOf(n int) uint8 { return uint8(bits.TrailingZeros(uint(n))) }

// info is what ADD is asked for.
func (o Options) info() *devInfo {
	id := uint32(kernelPicks)
	if o.ID != nil && *o.ID >= 0 {
		id = uint32(*o.ID)
	}
	return &devInfo{
		queues:     uint16(o.Queues),
		depth:      uint16(o.Depth),
		maxIOBytes: uint32(o.MaxIOBytes),
		devID:      id,
		flags:      uint64(FeatureIoctlEncode),
	}
}

// params is what SET_PARAMS is given.
func (o Options) params() *params {
	p := &params{types: paramBasic, basic: paramsBasic{
		logicalShift:  shiftOf(o.LogicalBlock),
		physicalShift: shiftOf(o.PhysicalBlock),
		ioMinShift:    shiftOf(o.IOMin),
		ioOptShift:    shiftOf(o.IOOpt),
		maxSectors:    uint32(o.MaxIOBytes >> sectorShift),
		devSectors:    uint64(o.Size) >> sectorShift,
	}}
	if o.ReadOnly {
		p.basic.attrs |= attrReadOnly
	}
	if o.VolatileCache {
		p.basic.attrs |= attrVolatileCache
	}
	if o.FUA {
		p.basic.attrs |= attrFUA
	}
	if o.Discard {
		// A whole number of granules, so that the block layer splits on them.
		limit := uint32(maxRangeSectors / (o.DiscardGranularity >> sectorShift) * (o.DiscardGranularity >> sectorShift))
		p.types |= paramDiscard
		p.discard = paramsDiscard{
			granularity:      uint32(o.DiscardGranularity),
			maxSectors:       limit,
			maxZeroesSectors: limit,
			maxSegments:      1, // the driver takes no other number
		}
	}
	return p
}
