#!/bin/bash
# bench-import.sh: the import of a large raw file, beside cp and qemu-img convert to raw and to qcow2, taking turns. Every
# program begins with an empty page cache, and ends when its result is durable. Half-compressible data: a half of each 4 KiB is
# random. Needs root, and five times SIZE_MB of room. Environment:
#   DIR      a folder on the disk to measure (a temporary one in the present folder)
#   SIZE_MB  of the file (8192); ROUNDS (3)
#   PEERS    of cp, raw, qcow2, vdisk (import), none (import without compression), from-qcow2 (import of a qcow2 image)
set -euo pipefail
tools=$(realpath "$(dirname "$0")")
vdisk=$(realpath "$tools/../../bin/vdisk")
made=
[ -n "${DIR:-}" ] || made=$(mktemp -d "$PWD/bench-import.XXXXXX")
dir=$(realpath "${DIR:-$made}")
mb=${SIZE_MB:-8192}
export VDISK_STORE=$dir/store
TIMEFORMAT='%R %U %S'
trap 'rm -rf "$dir"/{source,copy,store,source.qcow2,times}; [ -z "$made" ] || rmdir "$made"' EXIT
trap 'exit 130' INT TERM

fio --name=source --filename="$dir/source" --rw=write --bs=1M --size="${mb}M" --end_fsync=1 --ioengine=psync --randrepeat=0 \
	--buffer_compress_percentage=50 --buffer_compress_chunk=4k --refill_buffers --minimal >"$dir/times"
: >"$dir/times"
case " ${PEERS:-} " in *from-qcow2*) qemu-img convert -f raw -O qcow2 "$dir/source" "$dir/source.qcow2" ;; esac

peer() { # name: makes the copy durable
	case $1 in
	cp) cp "$dir/source" "$dir/copy" && sync "$dir/copy" ;;
	raw | qcow2) qemu-img convert -f raw -O "$1" "$dir/source" "$dir/copy" && sync "$dir/copy" ;;
	vdisk) "$vdisk" -q import "$dir/source" v ;;
	none) "$vdisk" -q import --compress none "$dir/source" v ;;
	from-qcow2) "$vdisk" -q import --format qcow2 "$dir/source.qcow2" v ;;
	esac
}
for round in $(seq "${ROUNDS:-3}"); do
	for p in ${PEERS:-cp raw qcow2 vdisk}; do
		rm -rf "$dir/copy" "$dir/store"
		sync
		echo 3 >/proc/sys/vm/drop_caches
		{ time peer "$p"; } 2>"$dir/times.one"
		echo "R $p $(tail -1 "$dir/times.one")" | tee -a "$dir/times" >&2
	done
done
rm -f "$dir/times.one"
awk -v mb="$mb" -f "$tools/median.awk" -f <(cat <<'AWK'
$1 == "R" {
	if (!($2 in real)) peers[++n] = $2
	real[$2] = real[$2] " " $3; cpu[$2] = cpu[$2] " " $4 + $5
}
END {
	printf "%-12s %10s %8s %12s %10s\n", "", "MiB/s", "+-", "CPU s/GiB", "of cp"
	for (i = 1; i <= n; i++) {
		p = peers[i]; m = median(real[p]); s = spread
		printf "%-12s %10.0f %7.0f%% %12.2f %10.2f\n", p, mb / m, s, median(cpu[p]) / mb * 1024, median(real["cp"]) / m
	}
}
AWK
) "$dir/times"
