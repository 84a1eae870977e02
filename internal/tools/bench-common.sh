# Functions for bench-ublk.sh and bench-guest.sh, which source this file in the top folder. flags[] are the flags of "guest
# run". Environment:
#   UBLKSRV_DIR  folder of ublksrv's ublk, ublk.null and ublk.loop, static or with their libraries; default: on PATH
#   KERNEL       newest (default) or stable
#   ICOUNT=1     a guest whose clock counts instructions: figures without the host's load, but of instructions only
flags=(-kernel "${KERNEL:-newest}" -timeout 60m -memory 4096 -bin bin/vdisk -file lib.sh=testdata/guest/bench/lib.sh)
for tool in ublk ublk.null ublk.loop; do
	path=${UBLKSRV_DIR:+$UBLKSRV_DIR/}$tool
	path=$(command -v "$path") || continue
	flags+=(-bin "$path")
	while read -r lib; do flags+=(-file "lib/$(basename "$lib")=$lib"); done \
		< <(ldd "$path" 2>/dev/null | awk '$1 ~ /^lib(uring|ublksrv)/ {print $3}')
done
if [ "${ICOUNT:-}" = 1 ]; then
	export VDISK_GUEST_QEMU=$PWD/internal/tools/qemu-icount.sh VDISK_GUEST_ACCEL=tcg
fi
