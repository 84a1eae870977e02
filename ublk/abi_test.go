package ublk

import (
	"testing"
	"unsafe"
)

// layout is the ABI as the C header states it on a 64-bit machine, with our side of each line.
var layout = []struct {
	c    string // C expression
	got  uintptr
	want uintptr
}{
	{"sizeof(struct ublksrv_ctrl_cmd)", unsafe.Sizeof(ctrlCmd{}), 32},
	{"offsetof(struct ublksrv_ctrl_cmd, queue_id)", unsafe.Offsetof(ctrlCmd{}.queueID), 4},
	{"offsetof(struct ublksrv_ctrl_cmd, len)", unsafe.Offsetof(ctrlCmd{}.len), 6},
	{"offsetof(struct ublksrv_ctrl_cmd, addr)", unsafe.Offsetof(ctrlCmd{}.addr), 8},
	{"offsetof(struct ublksrv_ctrl_cmd, data)", unsafe.Offsetof(ctrlCmd{}.data), 16},
	{"sizeof(struct ublksrv_ctrl_dev_info)", unsafe.Sizeof(devInfo{}), 64},
	{"offsetof(struct ublksrv_ctrl_dev_info, queue_depth)", unsafe.Offsetof(devInfo{}.depth), 2},
	{"offsetof(struct ublksrv_ctrl_dev_info, state)", unsafe.Offsetof(devInfo{}.state), 4},
	{"offsetof(struct ublksrv_ctrl_dev_info, max_io_buf_bytes)", unsafe.Offsetof(devInfo{}.maxIOBytes), 8},
	{"offsetof(struct ublksrv_ctrl_dev_info, dev_id)", unsafe.Offsetof(devInfo{}.devID), 12},
	{"offsetof(struct ublksrv_ctrl_dev_info, ublksrv_pid)", unsafe.Offsetof(devInfo{}.serverPID), 16},
	{"offsetof(struct ublksrv_ctrl_dev_info, flags)", unsafe.Offsetof(devInfo{}.flags), 24},
	{"offsetof(struct ublksrv_ctrl_dev_info, ublksrv_flags)", unsafe.Offsetof(devInfo{}.serverFlags), 32},
	{"sizeof(struct ublksrv_io_desc)", unsafe.Sizeof(ioDesc{}), 24},
	{"offsetof(struct ublksrv_io_desc, nr_sectors)", unsafe.Offsetof(ioDesc{}.sectors), 4},
	{"offsetof(struct ublksrv_io_desc, start_sector)", unsafe.Offsetof(ioDesc{}.startSector), 8},
	{"offsetof(struct ublksrv_io_desc, addr)", unsafe.Offsetof(ioDesc{}.addr), 16},
	{"sizeof(struct ublksrv_io_cmd)", unsafe.Sizeof(ioCmd{}), 16},
	{"offsetof(struct ublksrv_io_cmd, tag)", unsafe.Offsetof(ioCmd{}.tag), 2},
	{"offsetof(struct ublksrv_io_cmd, result)", unsafe.Offsetof(ioCmd{}.result), 4},
	{"offsetof(struct ublksrv_io_cmd, addr)", unsafe.Offsetof(ioCmd{}.addr), 8},
	{"sizeof(struct ublk_param_basic)", unsafe.Sizeof(paramsBasic{}), 32},
	{"offsetof(struct ublk_param_basic, max_sectors)", unsafe.Offsetof(paramsBasic{}.maxSectors), 8},
	{"offsetof(struct ublk_param_basic, dev_sectors)", unsafe.Offsetof(paramsBasic{}.devSectors), 16},
	{"sizeof(struct ublk_param_discard)", unsafe.Sizeof(paramsDiscard{}), 20},
	{"offsetof(struct ublk_param_discard, max_discard_segments)", unsafe.Offsetof(paramsDiscard{}.maxSegments), 16},
	{"offsetof(struct ublk_params, basic)", unsafe.Offsetof(params{}.basic), 8},
	{"offsetof(struct ublk_params, discard)", unsafe.Offsetof(params{}.discard), 40},
	{"offsetof(struct io_uring_sqe, fd)", unsafe.Offsetof(sqe{}.fd), 4},
	{"offsetof(struct io_uring_sqe, off)", unsafe.Offsetof(sqe{}.off), 8},
	{"offsetof(struct io_uring_sqe, addr)", unsafe.Offsetof(sqe{}.addr), 16},
	{"offsetof(struct io_uring_sqe, len)", unsafe.Offsetof(sqe{}.len), 24},
	{"offsetof(struct io_uring_sqe, user_data)", unsafe.Offsetof(sqe{}.userData), 32},
	{"offsetof(struct io_uring_sqe, cmd)", unsafe.Offsetof(sqe{}.cmd), 48},
	{"sizeof(struct io_uring_params)", unsafe.Sizeof(ringParams{}), 120},
	{"offsetof(struct io_uring_params, sq_off)", unsafe.Offsetof(ringParams{}.sq), 40},
	{"offsetof(struct io_uring_params, cq_off)", unsafe.Offsetof(ringParams{}.cq), 80},
	{"sizeof(struct io_uring_cqe)", unsafe.Sizeof(cqe{}), 16},
	{"sizeof(struct io_uring_rsrc_update)", unsafe.Sizeof(ringFDUpdate{}), 16},
	{"UBLK_MAX_QUEUE_DEPTH", maxQueueDepth, 4096},
	{"UBLK_IO_F_FUA", flagFUA, 1 << 13},
	{"UBLK_IO_F_NOUNMAP", flagNoUnmap, 1 << 15},
	{"UBLK_IO_OP_WRITE_ZEROES", uintptr(OpWriteZeroes), 5},
	{"UBLK_ATTR_FUA", attrFUA, 1 << 3},
}

func TestLayout(t *testing.T) {
	if unsafe.Sizeof(uintptr(0)) != 8 {
		t.Skip("the numbers are those of 64-bit machines")
	}
	for _, l := range layout {
		if l.got != l.want {
			t.Errorf("%s is %d, want %d", l.c, l.got, l.want)
		}
	}
	if unsafe.Sizeof(sqe{}) != sqeSize || unsafe.Sizeof(params{}) != 80 || unsafe.Sizeof(ioDesc{}) != descSize {
		t.Errorf("sqe %d, params %d, ioDesc %d", unsafe.Sizeof(sqe{}), unsafe.Sizeof(params{}), unsafe.Sizeof(ioDesc{}))
	}
}

func TestCommandNumbers(t *testing.T) {
	// Encoded by hand from the header's _IOR and _IOWR.
	for _, c := range []struct {
		name      string
		got, want uint32
	}{
		{"ADD_DEV", cmdAddDev, 0xc0207504},
		{"DEL_DEV", cmdDelDev, 0xc0207505},
		{"START_DEV", cmdStartDev, 0xc0207506},
		{"STOP_DEV", cmdStopDev, 0xc0207507},
		{"SET_PARAMS", cmdSetParams, 0xc0207508},
		{"GET_PARAMS", cmdGetParams, 0x80207509},
		{"GET_QUEUE_AFFINITY", cmdGetQueueAffinity, 0x80207501},
		{"GET_DEV_INFO", cmdGetDevInfo, 0x80207502},
		{"START_USER_RECOVERY", cmdStartUserRecovery, 0xc0207510},
		{"END_USER_RECOVERY", cmdEndUserRecovery, 0xc0207511},
		{"UPDATE_SIZE", cmdUpdateSize, 0xc0207515},
		{"QUIESCE_DEV", cmdQuiesceDev, 0xc0207516},
		{"GET_DEV_INFO2", cmdGetDevInfo2, 0x80207512},
		{"GET_FEATURES", cmdGetFeatures, 0x80207513},
		{"TRY_STOP_DEV", cmdTryStopDev, 0xc0207517},
		{"FETCH_REQ", ioFetchReq, 0xc0107520},
		{"COMMIT_AND_FETCH_REQ", ioCommitAndFetchReq, 0xc0107521},
	} {
		if c.got != c.want {
			t.Errorf("%s is %#x, want %#x", c.name, c.got, c.want)
		}
	}
}
