#!/bin/bash
# bench-cleaner.sh: what the cleaner costs who writes, over NBD with fio's own client: random writes of 4 KiB, half-compressible, depth 32, to a
# store with a limit; first while it is empty, until the volume is full, then over and over, when the cleaner has to work at the pace of the writes.
#   DIR       a folder on the disk to measure (default: a temporary one in the present folder)
#   LIMIT_MB  of the store (1024); USE, what the volume takes of it, in percent ("70 90"); RUNTIME, seconds (10); ROUNDS (3)
set -euo pipefail
tools=$(realpath "$(dirname "$0")")
vdisk=$(realpath "$tools/../../bin/vdisk")
limit=${LIMIT_MB:-1024}
made=
[ -n "${DIR:-}" ] || made=$(mktemp -d "$PWD/bench-cleaner.XXXXXX")
dir=$(realpath "${DIR:-$made}")
export VDISK_STORE=$dir/store
server=
over() {
	[ -z "$server" ] || { kill "$server" && wait "$server"; } || true
	rm -rf "$dir/store" "$dir/s.sock" "$dir/fio.json"
	[ -z "$made" ] || rmdir "$made"
}
trap over EXIT
trap 'exit 130' INT TERM

write() { # fio's flags...; prints IOPS, p50 in ns, p99
	fio --name=x --ioengine=nbd --uri="nbd+unix:///v?socket=$dir/s.sock" --rw=randwrite --bs=4k --iodepth=32 --size="$bytes" --randrepeat=0 \
		--buffer_compress_percentage=50 --buffer_compress_chunk=4k --refill_buffers --output-format=json --output="$dir/fio.json" "$@"
	awk '/"(read|write|trim)" : /{s = $1} s == "\"write\"" && /"iops" : /{gsub(",", ""); iops = $3}
		s == "\"write\"" && /"50.000000" : /{gsub(",", ""); p = $3} s == "\"write\"" && /"99.000000" : /{gsub(",", ""); q = $3}
		END{print iops, p, q}' "$dir/fio.json"
}
round() { # use
	local n
	bytes=$((limit * $1 / 100 * 1048576 / 2124 * 4096)) # such a block takes 2124 bytes of the log
	"$vdisk" -q create v --size "$bytes"
	"$vdisk" -q --max-size "${limit}M" serve --socket "$dir/s.sock" v &
	server=$!
	for n in $(seq 100); do
		[ ! -S "$dir/s.sock" ] || break
		sleep 0.1
	done
	echo "R $1 empty $(write)"
	write >/dev/null # every block once more: until the cleaner works steadily
	echo "R $1 steady $(write --time_based --runtime="${RUNTIME:-10}" --norandommap)"
	kill "$server"
	wait "$server" || true
	server=
	rm -rf "$dir/store" "$dir/s.sock"
}
mkdir -p "$dir"
out=$PWD/bench-cleaner.out
for r in $(seq "${ROUNDS:-3}"); do
	for u in ${USE:-70 90}; do round "$u"; done
done | tee "$out" | cut -d' ' -f2- >&2
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
