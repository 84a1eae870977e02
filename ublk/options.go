package ublk

import (
	"fmt"
	"math/bits"
	"os"
	"strings"
)

// Options describe a device. A zero value stands for the default.
type Options struct {
	// ID asks for /dev/ublkbID. With nil or a negative number the kernel chooses.
	ID *int
	// Size is in bytes: a multiple of LogicalBlock, above zero.
	Size int64
	// Queues is the number of hardware queues, each with a thread and a ring; default 1. The kernel grants no more
	// queues than it has CPUs.
	Queues int
	// Depth is the number of requests that a queue can have under way, up to 4096; default 64.
	Depth int
	// MaxIOBytes is the size of the largest read or write, a multiple of the page size; default 256 KiB. A queue holds
	// Depth × MaxIOBytes of locked memory, or with CopyUser only as much as its requests need at the moment.
	MaxIOBytes int
	// LogicalBlock is the unit of addressing: 512 (the default) or 4096.
	LogicalBlock int
	// PhysicalBlock is the smallest unit that is written without a read-modify-write; default 4096.
	PhysicalBlock int
	// IOMin and IOOpt are hints to file systems: the smallest and the best I/O, powers of two; default PhysicalBlock.
	IOMin, IOOpt int
	// ReadOnly makes the block device refuse writes.
	ReadOnly bool
	// VolatileCache declares that an answered write is durable only after a flush, so that the kernel sends OpFlush.
	VolatileCache bool
	// FUA lets the kernel mark single writes as durable (Request.FUA), instead of sending a flush after them. It needs
	// VolatileCache.
	FUA bool
	// Discard lets the kernel send OpDiscard and OpWriteZeroes. Without it, the kernel writes zeros as data.
	Discard bool
	// DiscardGranularity is the unit that a discard frees; default PhysicalBlock.
	DiscardGranularity int
	// Report is called with faults that the device survives but its owner should know of; at present each is a
	// *PanicError. It is called on a queue's thread, and must not block.
	Report func(error)
	// Copy selects how payloads travel between the driver and the handler. The default is CopyPlain, which measured
	// fastest.
	Copy CopyMode
	// Recovery selects what happens to the disk when its server ends. By default the disk ends too.
	Recovery Recovery
	// Cookie is a mark of the owner's. The driver keeps it with the device, and Devices returns it.
	Cookie uint64
	// NoPartitionScan keeps the kernel from reading the partition table. It takes effect on kernels that can (7.0);
	// Device.Features shows whether it did.
	NoPartitionScan bool
	// NoAffinity lets the queue threads run on all CPUs. By default a thread stays on the CPUs that the block layer
	// maps to its queue.
	NoAffinity bool
	// Unprivileged makes a device that a user without CAP_SYS_ADMIN may make and serve (6.3); see the package
	// documentation. The driver ignores it for a process that has CAP_SYS_ADMIN.
	Unprivileged bool
	// Require names features without which Create fails with a *FeatureError. Create refuses features that need another
	// kind of server (zero copy, NEED_GET_DATA, zones, integrity).
	Require Feature
}

// CopyMode is a way for payloads to travel between the driver and the handler.
type CopyMode uint8

// The copy modes.
const (
	CopyDefault CopyMode = iota // CopyPlain, which measured fastest
	// CopyPlain: the driver copies between the request and the buffer of its tag.
	CopyPlain
	// CopyUser: the queue copies, with one system call for each payload (USER_COPY, 6.5). A request has a buffer only
	// while it is served. All such devices of the process share the memory for buffers (SetBufferLimit), and an idle
	// device has none of it. A queue has at most an eighth of Depth × MaxIOBytes of it, but at least 1 MiB. When that
	// is lent out, the next requests wait.
	CopyUser
	// CopyBatch: as CopyPlain, but requests and answers travel in lists (BATCH_IO, 7.0).
	CopyBatch
)

// Recovery selects what happens to a device's disk when its server ends.
type Recovery uint8

// The ways of recovery. All but RecoverNone keep the disk until a server calls Recover, or Delete removes it.
const (
	// RecoverNone: the disk ends with its server, and its open requests fail.
	RecoverNone Recovery = iota
	// RecoverReissue: requests wait for the next server. Those that the last server had not answered are issued again,
	// so a write may be applied twice.
	RecoverReissue
	// RecoverEIO: requests wait for the next server, but those that the last server had not answered fail.
	RecoverEIO
	// RecoverFailIO: requests fail with EREMOTEIO until there is a next server (6.13).
	RecoverFailIO
)

// features returns the driver's flags for this way of recovery.
func (r Recovery) features() Feature {
	return [...]Feature{
		RecoverNone:    0,
		RecoverReissue: FeatureUserRecovery | FeatureRecoveryReissue,
		RecoverEIO:     FeatureUserRecovery,
		RecoverFailIO:  FeatureUserRecovery | FeatureRecoveryFailIO,
	}[r]
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

const (
	maxQueueMemory = 1 << 30 // bounds the locked memory of one queue
	maxHint        = 1 << 30 // the driver shifts 32 bits by the hint's exponent, and does not check it
)

// validate checks options that have their defaults.
func (o Options) validate() error {
	page := os.Getpagesize()
	checks := []struct {
		bad  bool
		text string
	}{
		{o.ID != nil && *o.ID >= 1<<20, fmt.Sprintf("ID %v: must be below 1048576", deref(o.ID))},
		{o.LogicalBlock != 512 && o.LogicalBlock != 4096, fmt.Sprintf("LogicalBlock %d: must be 512 or 4096", o.LogicalBlock)},
		{
			!powerOfTwo(o.PhysicalBlock) || o.PhysicalBlock < o.LogicalBlock || o.PhysicalBlock > 1<<20,
			fmt.Sprintf("PhysicalBlock %d: must be a power of two from LogicalBlock to 1 MiB", o.PhysicalBlock),
		},
		{
			!powerOfTwo(o.IOMin) || o.IOMin < o.LogicalBlock || o.IOMin > maxHint,
			fmt.Sprintf("IOMin %d: must be a power of two from LogicalBlock to 1 GiB", o.IOMin),
		},
		{
			!powerOfTwo(o.IOOpt) || o.IOOpt < o.LogicalBlock || o.IOOpt > maxHint,
			fmt.Sprintf("IOOpt %d: must be a power of two from LogicalBlock to 1 GiB", o.IOOpt),
		},
		{
			o.Size <= 0 || o.Size%int64(max(o.LogicalBlock, 1)) != 0,
			fmt.Sprintf("Size %d: must be a multiple of the logical block (%d), above zero", o.Size, o.LogicalBlock),
		},
		{o.Queues < 1 || o.Queues > maxQueues, fmt.Sprintf("Queues %d: must be 1 to %d", o.Queues, maxQueues)},
		{o.Depth < 1 || o.Depth > maxQueueDepth, fmt.Sprintf("Depth %d: must be 1 to %d", o.Depth, maxQueueDepth)},
		{
			o.MaxIOBytes < page || o.MaxIOBytes > maxIOBytes || o.MaxIOBytes%page != 0,
			fmt.Sprintf("MaxIOBytes %d: must be a multiple of %d, at most %d", o.MaxIOBytes, page, maxIOBytes),
		},
		{
			o.Depth > 0 && o.MaxIOBytes > maxQueueMemory/o.Depth,
			fmt.Sprintf("Depth %d × MaxIOBytes %d: more than 1 GiB of locked memory a queue", o.Depth, o.MaxIOBytes),
		},
		{o.Copy == CopyBatch && o.Depth == 1, "Depth 1 with CopyBatch: the driver's FIFO of tags takes at least 2"},
		{o.Copy > CopyBatch, fmt.Sprintf("Copy %d: there is no such mode", o.Copy)},
		{o.Recovery > RecoverFailIO, fmt.Sprintf("Recovery %d: there is no such mode", o.Recovery)},
		{
			o.Unprivileged && o.Recovery != RecoverNone,
			"Recovery of an unprivileged device: the driver refuses it, as requests that wait for a server could hold up the machine",
		},
		{
			o.Unprivileged && o.Copy == CopyUser,
			"CopyUser for an unprivileged device: the driver refuses it, as the kernel could pass on memory that was not filled",
		},
		{o.Require&unspoken != 0, fmt.Sprintf("Require %s: this library does not serve that",
			strings.Join(FeatureSet{Bits: o.Require & unspoken}.Names(), ", "))},
		{o.FUA && !o.VolatileCache, "FUA without VolatileCache: every answered write is durable anyway"},
		{o.Discard && o.ReadOnly, "Discard on a read-only device"},
		{
			!powerOfTwo(o.DiscardGranularity) || o.DiscardGranularity < o.LogicalBlock || o.DiscardGranularity > 1<<30,
			fmt.Sprintf("DiscardGranularity %d: must be a power of two from LogicalBlock to 1 GiB", o.DiscardGranularity),
		},
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

// required returns the features that the options cannot do without.
func (o Options) required() Feature {
	f := o.Require | o.Recovery.features()
	if o.Unprivileged {
		f |= FeatureUnprivileged
	}
	switch o.Copy {
	case CopyUser:
		f |= FeatureUserCopy
	case CopyBatch:
		f |= FeatureBatchIO
	}
	return f
}

// Memory estimates how much memory a device with these options takes while it is not used, and at most. It counts the
// buffers, and the memory of the queues' threads and rings in this process and in the kernel.
func (o Options) Memory() (idle, most int64) {
	o = o.withDefaults()
	buffers := o.Depth * o.MaxIOBytes
	if o.Copy == CopyUser {
		buffers = poolSize(o.Depth, o.MaxIOBytes)
	}
	entries := 2 * o.Depth
	// An SQE and two CQEs for each entry, the driver's request for each tag, and the thread with its counters.
	idle = deviceBytes + int64(o.Queues)*int64(entries*(sqeSize+4*cqeSize)+o.Depth*1024+threadBytes)
	most = idle + int64(o.Queues*buffers)
	if o.Copy != CopyUser {
		idle = most
	}
	return idle, most
}

const (
	deviceBytes = 128 << 10 // the kernel's disk, with its partitions and its files in sysfs
	threadBytes = 128 << 10 // two stacks, the runtime's state of a thread, and the counters
)

// info returns the arguments of ADD for a kernel that offers some features: those that are required, and those that are
// useful besides. It returns a *FeatureError if the kernel does not offer enough.
func (o Options) info(offered Feature) (*devInfo, error) {
	if missing := o.required() &^ offered; missing != 0 {
		return nil, &FeatureError{Missing: missing, Kernel: kernelRelease()}
	}
	useful := FeatureUpdateSize
	if o.Recovery != RecoverNone {
		useful |= FeatureQuiesce
	}
	if o.NoPartitionScan {
		useful |= FeatureNoAutoPartScan
	}
	id := uint32(kernelPicks)
	if o.ID != nil && *o.ID >= 0 {
		id = uint32(*o.ID)
	}
	return &devInfo{
		queues:      uint16(o.Queues),
		depth:       uint16(o.Depth),
		maxIOBytes:  uint32(o.MaxIOBytes),
		devID:       id,
		flags:       uint64(o.required() | FeatureIoctlEncode | useful&offered),
		serverFlags: o.Cookie,
	}, nil
}

// params returns the arguments of SET_PARAMS.
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
