#!/bin/bash
# bench-cleaner.sh: the cost of cleaning for writers, over NBD with fio's own client. Random, half-compressible writes of
# 4 KiB at depth 32 go to a store with a limit: first until the volume is full, then over and over, so that the cleaner
# has to keep up with them.
# Environment: DIR (bench-server.sh)
#   LIMIT_MB  of the store (1024); USE, the volume's part of it in percent ("70 85"); RUNTIME, seconds (10); ROUNDS (3)
set -euo pipefail
. "$(dirname "$0")/bench-server.sh"
limit=${LIMIT_MB:-1024}

write() { # name, fio's flags...
	local numbers
	numbers=$(nbd_fio v --rw=randwrite --bs=4k --iodepth=32 --size="$bytes" "${@:2}")
	result "$use $1 $numbers"
}
round() { # use
	local use=$1
	bytes=$((limit * use / 100 * 1048576 / 2124 * 4096)) # such a block takes 2124 bytes of the log
	"$vdisk" -q create v --size "$bytes"
	serve "$vdisk" -q --max-size "${limit}M" serve --socket "$dir/s.sock" v
	write empty
	write again # every block once more: until the cleaner works steadily
	write steady --time_based --runtime="${RUNTIME:-10}" --norandommap
	stop
	rm -rf "$dir/store"
}
for r in $(seq "${ROUNDS:-3}"); do
	for u in ${USE:-70 85}; do round "$u"; done
done
awk -f "$tools/median.awk" -f <(cat <<'AWK'
$1 == "R" {
	if (!($2 in seen)) { seen[$2]; use[++uses] = $2 }
	k = $2 " " $3
	iops[k] = iops[k] " " $4; p50[k] = p50[k] " " $5; p99[k] = p99[k] " " $6
}
END {
	printf "%-12s %9s %9s %9s\n", "use", "IOPS", "p50 us", "p99 us"
	for (i = 1; i <= uses; i++) {
		e = use[i] " empty"; s = use[i] " steady"
		for (j = 1; j <= 2; j++) {
			k = j == 1 ? e : s
			printf "%-12s %9.0f %9.0f %9.0f\n", k, median(iops[k]), median(p50[k]) / 1000, median(p99[k]) / 1000
		}
		printf "%-12s %9.2f %9.2f %9.2f\n", "  of empty", median(iops[s]) / median(iops[e]), median(p50[s]) / median(p50[e]), median(p99[s]) / median(p99[e])
	}
}
AWK
) "$out"
