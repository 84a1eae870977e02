#!/bin/bash
# bench-guest.sh: a volume's block device beside dm-thin, dm-vdo, qcow2 (on the kernel's nbd), the kernel's loop and, where it is found,
# ublksrv's loop, measured in one boot of a guest in turns, and a table of medians. Half-compressible data, all with O_DIRECT. Peers that
# are not available are listed. Environment, beside that of bench-common.sh (UBLKSRV_DIR, KERNEL, ICOUNT):
#   PEERS        vdisk dm-thin dm-vdo ublksrv loop qcow2; ROUNDS (3), RUNTIME (seconds a test, 3), FILE_MB (256)
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
go run ./internal/guest/cmd/guest run "${flags[@]}" -- env "PEERS=${PEERS:-vdisk dm-thin dm-vdo ublksrv loop qcow2}" "ROUNDS=${ROUNDS:-3}" \
	"RUNTIME=${RUNTIME:-3}" "FILE_MB=$size" "DISK_MB=$((4 * size))" "QUEUES=$([ "${QUEUES:-1}" = 0 ] || echo 1)" bash bench.sh |
	tee "$out" | grep --line-buffered -v '^R '
awk -f internal/tools/median.awk -f <(cat <<'AWK'
$1 == "R" {
	k = $2 " " $3
	if (!($2 in seen)) { seen[$2]; test[++tests] = $2 }
	if (!(k in iops)) targets[$2] = targets[$2] " " $3
	iops[k] = iops[k] " " $5; p50[k] = p50[k] " " $6; p99[k] = p99[k] " " $7
}
$2 == "MISSING" { missing = missing "\n  " substr($0, 11) }
function of(test, target) { return median(iops[test " " target]) }
function best(test,    m, x) { # of the peers that vdisk is compared with
	if ((m = of(test, "dm-thin")) < (x = of(test, "dm-vdo"))) m = x
	if (m < (x = of(test, "ublksrv"))) m = x
	return m
}
function wanted(what, x, y, least) {
	if (!(x > 0 && y > 0)) printf "  %-62s   not measured\n", what
	else if (least == "") printf "  %-62s %6.2f\n", what, x / y
	else printf "  %-62s %6.2f   wanted %4s   %s\n", what, x / y, least, (x / y >= least ? "yes" : "NO")
}
END {
	for (i = 1; i <= tests; i++) {
		printf "\n%-32s %9s %6s %9s %9s   vdisk is\n", test[i], "IOPS", "+-%", "p50 us", "p99 us"
		v = of(test[i], "vdisk")
		n = split(targets[test[i]], target, " ")
		for (j = 1; j <= n; j++) {
			k = test[i] " " target[j]; m = median(iops[k]); s = spread
			printf "  %-30s %9.0f %6.1f %9.0f %9.0f   %s\n", target[j], m, s, median(p50[k]) / 1000, median(p99[k]) / 1000, \
				(target[j] ~ /^vdisk/ || v == 0 || m == 0 ? "" : sprintf("%.2f of it", v / m))
		}
	}
	r = "2-randread-4k"; w = "3-randwrite-4k"; s = "4-randwrite-4k-after-snapshot"
	print "\nratios"
	wanted("random write, of the best of dm-thin, dm-vdo, ublksrv", of(w, "vdisk"), best(w), 1.3)
	wanted("random read of what 4 KiB were written at a time, of the best", of(r, "vdisk.4k"), best(r), 0.9)
	wanted("random read of what 1 MiB was written at a time, of the best", of(r, "vdisk"), best(r), 0.9)
	wanted("random write, of ublksrv", of(w, "vdisk"), of(w, "ublksrv"), 1.2)
	wanted("random read (4 KiB written), of ublksrv", of(r, "vdisk.4k"), of(r, "ublksrv"), 0.9)
	wanted("random read (1 MiB written), of ublksrv", of(r, "vdisk"), of(r, "ublksrv"), 0.9)
	wanted("after a snapshot, of before", of(s, "vdisk"), of(w, "vdisk.4k"), 0.95)
	wanted("  dm-thin", of(s, "dm-thin"), of(w, "dm-thin"), "")
	wanted("  qcow2", of(s, "qcow2"), of(w, "qcow2"), "")
	for (i = split("read write", rw, " "); i > 0; i--) for (j = split("null_blk ublksrv vdisk", target, " "); j > 0; j--) {
		q = "5-rand" rw[i] "-4k-%d-jobs-and-queues"
		wanted("rand" rw[i] ", two jobs and queues, of one: " target[j], of(sprintf(q, 2), target[j]), of(sprintf(q, 1), target[j]), \
			(target[j] == "vdisk" ? 1.6 : ""))
	}
	if (missing != "") print "\nmissing" missing
}
AWK
) "$out"
