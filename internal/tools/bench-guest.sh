#!/bin/bash
# bench-guest.sh: a volume's block device beside dm-thin, dm-vdo, LVM's old snapshots, a file on btrfs, qcow2 (on the kernel's nbd), the
# kernel's loop and, where it is found, ublksrv's loop, measured in one boot of a guest in turns, and the part of docs/bench.md
# about it. Half-compressible data, all with O_DIRECT. Peers that are not available are listed. Environment, beside that of bench-common.sh
# (UBLKSRV_DIR, KERNEL, ICOUNT):
#   PEERS        vdisk dm-thin dm-vdo lvm btrfs ublksrv loop qcow2; ROUNDS (3), RUNTIME (seconds a test, 3), FILE_MB (256)
#   QUEUES       0: without the test of two queues
#   VDOFORMAT    a vdoformat that runs in the guest's Debian; default: from its package
set -euo pipefail
cd "$(dirname "$0")/../.."
. internal/tools/bench-common.sh
vdoformat=${VDOFORMAT:-$(go run ./internal/guest/cmd/guest package vdo || true)/usr/bin/vdoformat}
[ ! -x "$vdoformat" ] || flags+=(-bin "$vdoformat")
flags+=(-file bench.sh=testdata/guest/bench/peers.sh -scratch-size $((24 << 30)))
size=${FILE_MB:-256}
out=bin/bench-guest.out
go run ./internal/guest/cmd/guest run "${flags[@]}" -- env "PEERS=${PEERS:-vdisk dm-thin dm-vdo lvm btrfs ublksrv loop qcow2}" \
	"ROUNDS=${ROUNDS:-3}" "RUNTIME=${RUNTIME:-3}" "FILE_MB=$size" "DISK_MB=$((4 * size))" "QUEUES=$([ "${QUEUES:-1}" = 0 ] || echo 1)" \
	bash bench.sh | tee "$out"
go run ./internal/tools/bench guest <"$out"
