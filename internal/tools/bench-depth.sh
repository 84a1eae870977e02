#!/bin/bash
# bench-depth.sh: read cost by snapshot and clone depth, over NBD with fio's own client. Random reads of 4 KiB at
# depth 32, in turns, of three volumes: one without snapshots, one with many and with changes between them, and the last
# of a chain of clones that were each written before the next was made. The data is half compressible, and was written
# 4 KiB at a time. Environment: DIR (bench-server.sh)
#   SIZE_MB  of a volume (256); SNAPSHOTS (1000); CLONES (100); RUNTIME, seconds a test (4); ROUNDS (6)
set -euo pipefail
. "$(dirname "$0")/bench-server.sh"
size=${SIZE_MB:-256} snapshots=${SNAPSHOTS:-1000} clones=${CLONES:-100}

write() { nbd_fio "$1" --rw=randwrite --bs=4k --iodepth=32 --size="${size}M" "${@:2}" >/dev/null; }

for v in flat snapshots clone0; do "$vdisk" -q create $v --size "${size}M"; done
serve "$vdisk" -q serve --socket "$dir/s.sock"
for v in flat snapshots clone0; do write $v; done
write snapshots --time_based --runtime=10m --norandommap --rate_iops=1000 &
writer=$!
for i in $(seq "$snapshots"); do "$vdisk" -q snapshot "snapshots@$i"; done
pkill -P $writer fio
wait $writer || true
for i in $(seq "$clones"); do
	write "clone$((i - 1))" --number_ios=100 --norandommap
	"$vdisk" -q snapshot "clone$((i - 1))@s"
	"$vdisk" -q clone "clone$((i - 1))@s" "clone$i"
done
for r in $(seq 0 "${ROUNDS:-6}"); do # the first round only fills the caches
	order="flat snapshots clone$clones"
	for v in $(if ((r % 2)); then echo "$order"; else echo "$order" | tac -s' '; fi); do
		numbers=$(with_cpu "$v" --rw=randread --bs=4k --iodepth=32 --size="${size}M" --time_based --runtime="${RUNTIME:-4}" --norandommap)
		[ "$r" = 0 ] || result "${v/clone*/clones} $numbers"
	done
done
stop
awk -f "$tools/median.awk" -f <(cat <<'AWK'
$1 == "R" { iops[$2] = iops[$2] " " $3; p50[$2] = p50[$2] " " $4; p99[$2] = p99[$2] " " $5; cpu[$2] = cpu[$2] " " $6 }
END {
	printf "%-12s %9s %9s %9s %10s\n", "", "IOPS", "p50 us", "p99 us", "CPU us/IO"
	for (i = split("flat snapshots clones", v, " "); i > 0; i--) {
		m = median(iops[v[i]])
		printf "%-12s %9.0f %9.0f %9.0f %10.1f   %.2f of flat\n", v[i], m, median(p50[v[i]]) / 1000, median(p99[v[i]]) / 1000, median(cpu[v[i]]) / 1000, m / median(iops["flat"])
	}
}
AWK
) "$out"
