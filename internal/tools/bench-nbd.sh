#!/bin/bash
# bench-nbd.sh: vdisk against qemu-nbd on qcow2 and on a raw file (both with O_DIRECT) and nbdkit on a file, all over NBD with fio's own client,
# taking turns, and a table of medians. Half-compressible data. Environment: DIR (bench-server.sh)
#   SIZE_MB  of the data (1024); RUNTIME, seconds a test (4); ROUNDS (3); PEERS (qcow2 raw nbdkit vdisk)
set -euo pipefail
. "$(dirname "$0")/bench-server.sh"
size=${SIZE_MB:-1024} runtime=${RUNTIME:-4} rounds=${ROUNDS:-3}

drop() { # what the kernel caches of the disk
	sync
	echo 1 >/proc/sys/vm/drop_caches || { echo "bench-nbd: cold reads need root" >&2; exit 1; }
}
start() { # target: serves what is there
	local qemu=(qemu-nbd -t -e 8 -k "$dir/s.sock" --cache=none --aio=io_uring --discard=unmap)
	case $1 in
	qcow2) serve "${qemu[@]}" -f qcow2 "$dir/image" ;;
	raw) serve "${qemu[@]}" -f raw "$dir/image" ;;
	nbdkit) serve nbdkit -f -U "$dir/s.sock" file "$dir/image" ;;
	vdisk) serve "$vdisk" -q serve --socket "$dir/s.sock" v ;;
	esac
}
make_image() { # target
	case $1 in
	qcow2) qemu-img create -q -f qcow2 "$dir/image" $((4 * size))M ;;
	raw | nbdkit) truncate -s $((4 * size))M "$dir/image" ;;
	vdisk) "$vdisk" -q create v --size $((4 * size))M ;;
	esac
}
snapshot() { # target
	case $1 in
	qcow2) stop; qemu-img snapshot -c s "$dir/image"; start qcow2 ;;
	vdisk) "$vdisk" snapshot v@s ;;
	esac
}
measure() { # target round test rw bs depth fio's flags...
	local numbers export=
	[ "$1" != vdisk ] || export=v
	numbers=$(with_cpu "$export" --rw="$4" --bs="$5" --iodepth="$6" --size="${size}M" "${@:7}") # a failure ends the script
	result "$3 $1 $2 $numbers"
}
timed=(--time_based --runtime="$runtime" --norandommap)
round() { # target round
	make_image "$1"
	start "$1"
	measure "$1" "$2" 1-fill-1M write 1M 4 --end_fsync=1
	drop
	measure "$1" "$2" 2-read-1M-cold read 1M 4
	measure "$1" "$2" 3-randread-4k-warm randread 4k 32 "${timed[@]}"
	drop
	measure "$1" "$2" 4-randread-4k-cold randread 4k 32 "${timed[@]}"
	measure "$1" "$2" 5-randwrite-4k randwrite 4k 32 "${timed[@]}"
	measure "$1" "$2" 6-randwrite-4k-fsync-each randwrite 4k 1 --fsync=1 "${timed[@]}"
	case $1 in qcow2 | vdisk)
		snapshot "$1"
		measure "$1" "$2" 7-randwrite-4k-after-snapshot randwrite 4k 32 "${timed[@]}"
		;;
	esac
	measure "$1" "$2" 8-overwrite-all-4k randwrite 4k 32 # every block once
	drop
	measure "$1" "$2" 9-read-1M-overwritten-cold read 1M 4
	if [ "$1" = vdisk ]; then
		"$vdisk" -q gc --cold
		drop
		measure "$1" "$2" 10-read-1M-cold-pass-cold read 1M 4
	fi
	stop
	rm -rf "$dir/image" "$dir/store"
}
for r in $(seq "$rounds"); do
	for p in ${PEERS:-qcow2 raw nbdkit vdisk}; do round "$p" "$r"; done
done
awk -f "$tools/median.awk" -f <(cat <<'AWK'
$1 == "R" {
	k = $2 " " $3
	if (!($2 in seen)) { seen[$2]; test[++tests] = $2 }
	if (!(k in iops)) targets[$2] = targets[$2] " " $3
	iops[k] = iops[k] " " $5; p50[k] = p50[k] " " $6; p99[k] = p99[k] " " $7; cpu[k] = cpu[k] " " $8
}
END {
	for (i = 1; i <= tests; i++) {
		printf "\n%-30s %9s %9s %9s %10s   vdisk is\n", test[i], "IOPS", "p50 us", "p99 us", "CPU us/IO"
		v = median(iops[test[i] " vdisk"])
		n = split(targets[test[i]], target, " ")
		for (j = 1; j <= n; j++) {
			k = test[i] " " target[j]; m = median(iops[k])
			printf "  %-28s %9.0f %9.0f %9.0f %10.1f   %s\n", target[j], m, median(p50[k]) / 1000, median(p99[k]) / 1000, median(cpu[k]) / 1000, \
				(target[j] == "vdisk" || v == 0 || m == 0 ? "" : sprintf("%.2f of it", v / m))
		}
	}
}
AWK
) "$out"
