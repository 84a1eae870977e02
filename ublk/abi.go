package ublk

// The ublk user ABI: include/uapi/linux/ublk_cmd.h. Structures have the layout that a C compiler gives them on all
// 64-bit and 32-bit Linux machines; abi_test.go checks their sizes and offsets.

// Control commands, encoded as ioctls (type 'u', size of struct ublksrv_ctrl_cmd = 32), as Linux 6.4 and later take
// them. Older kernels take only the low byte, the legacy opcode. Some later kernels are built without legacy opcodes.
const (
	cmdGetQueueAffinity  = iocRead | 0x01
	cmdGetDevInfo        = iocRead | 0x02
	cmdAddDev            = iocReadWrite | 0x04
	cmdDelDev            = iocReadWrite | 0x05
	cmdStartDev          = iocReadWrite | 0x06
	cmdStopDev           = iocReadWrite | 0x07
	cmdSetParams         = iocReadWrite | 0x08
	cmdGetParams         = iocRead | 0x09
	cmdStartUserRecovery = iocReadWrite | 0x10
	cmdEndUserRecovery   = iocReadWrite | 0x11
	cmdGetDevInfo2       = iocRead | 0x12
	cmdGetFeatures       = iocRead | 0x13
	cmdUpdateSize        = iocReadWrite | 0x15
	cmdQuiesceDev        = iocReadWrite | 0x16
	cmdTryStopDev        = iocReadWrite | 0x17

	iocRead      = 2<<30 | 32<<16 | 'u'<<8 // _IOR('u', nr, struct ublksrv_ctrl_cmd)
	iocReadWrite = 3<<30 | 32<<16 | 'u'<<8 // _IOWR('u', nr, struct ublksrv_ctrl_cmd)
)

// I/O commands: _IOWR('u', nr, struct ublksrv_io_cmd), 16 bytes.
const (
	ioFetchReq          = 3<<30 | 16<<16 | 'u'<<8 | 0x20
	ioCommitAndFetchReq = 3<<30 | 16<<16 | 'u'<<8 | 0x21
)

// Limits of the header and of the driver.
const (
	maxQueueDepth = 4096     // UBLK_MAX_QUEUE_DEPTH
	maxQueues     = 4096     // UBLK_MAX_NR_QUEUES
	maxIOBytes    = 32 << 20 // UBLK_IO_BUF_BITS = 25
	sectorShift   = 9        // every sector count of the ABI is in 512 bytes, whatever the block size

	// maxRangeSectors caps DISCARD and WRITE_ZEROES so that their byte count fits the 32 bits of a block request.
	maxRangeSectors = (1<<32 - 1) >> sectorShift

	descSize = 24                       // sizeof(struct ublksrv_io_desc)
	descArea = maxQueueDepth * descSize // a queue's stride in the descriptor mapping, before rounding up to a page
)

const (
	opMask       = 0xff
	flagFUA      = 1 << 13   // UBLK_IO_F_FUA
	flagNoUnmap  = 1 << 15   // UBLK_IO_F_NOUNMAP
	noQueue      = 0xffff    // queue_id of a control command that does not concern a queue
	kernelPicks  = 1<<32 - 1 // device id that lets the kernel choose
	featuresSize = 8         // UBLK_FEATURES_LEN
)

const (
	attrReadOnly      = 1 << 0
	attrVolatileCache = 1 << 2
	attrFUA           = 1 << 3

	paramBasic   = 1 << 0
	paramDiscard = 1 << 1
)

// ctrlCmd is struct ublksrv_ctrl_cmd, at byte 48 of a control SQE.
type ctrlCmd struct {
	devID    uint32
	queueID  uint16
	len      uint16
	addr     uint64
	data     uint64
	pathLen  uint16
	_        uint16
	reserved uint32
}

// devInfo is struct ublksrv_ctrl_dev_info.
type devInfo struct {
	queues      uint16
	depth       uint16
	state       uint16
	_           uint16
	maxIOBytes  uint32
	devID       uint32
	serverPID   int32
	_           uint32
	flags       uint64
	serverFlags uint64
	ownerUID    uint32
	ownerGID    uint32
	_, _        uint64
}

// ioDesc is struct ublksrv_io_desc: one request, written by the driver before the FETCH of its tag completes.
type ioDesc struct {
	opFlags     uint32
	sectors     uint32
	startSector uint64
	addr        uint64
}

// ioCmd is struct ublksrv_io_cmd, at byte 48 of an I/O SQE.
type ioCmd struct {
	queueID uint16
	tag     uint16
	result  int32
	addr    uint64
}

// paramsBasic is struct ublk_param_basic.
type paramsBasic struct {
	attrs         uint32
	logicalShift  uint8
	physicalShift uint8
	ioOptShift    uint8
	ioMinShift    uint8
	maxSectors    uint32
	chunkSectors  uint32
	devSectors    uint64
	virtBoundary  uint64
}

// paramsDiscard is struct ublk_param_discard.
type paramsDiscard struct {
	alignment        uint32
	granularity      uint32
	maxSectors       uint32
	maxZeroesSectors uint32
	maxSegments      uint16
	_                uint16
}

// params is the beginning of struct ublk_params, up to the DEVT part. The driver accepts any prefix of its structure.
type params struct {
	len     uint32
	types   uint32
	basic   paramsBasic
	discard paramsDiscard
	devt    [4]uint32
}
