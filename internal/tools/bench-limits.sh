#!/bin/bash
# bench-limits.sh: how well the limits of a volume hold, and what a limited neighbour costs, over NBD with fio's own client.
# First, clients that ask for more than a limit run for RUNTIME seconds: each figure is what they got of the limit. Then a victim
# reads, and then writes, 4 KiB at a time (depth 1, 500 a second at most), in turns alone, beside a neighbour that writes 64 KiB at depth
# 32 without a limit, and beside the same with limit.bps. Environment:
#   DIR   a folder on the disk to measure (default: a temporary one in the present folder)
#   SIZE_MB  of a volume (256); RUNTIME, seconds (10); ROUNDS (3); IOPS (500), BPS_MB (8), NEIGHBOUR_MB (4), limits in a second
set -euo pipefail
tools=$(realpath "$(dirname "$0")")
vdisk=$(realpath "$tools/../../bin/vdisk")
name=$(basename "$0" .sh)
made=
[ -n "${DIR:-}" ] || made=$(mktemp -d "$PWD/$name.XXXXXX")
mkdir -p "${DIR:-$made}"
dir=$(realpath "${DIR:-$made}")
export VDISK_STORE=$dir/store
out=$tools/../../bin/$name.out
: >"$out"
server=
over() {
	[ -z "$server" ] || stop
	rm -rf "$dir/image" "$dir/store" "$dir/s.sock" "$dir/fio.json"
	[ -z "$made" ] || rmdir "$made"
}
trap over EXIT
trap 'exit 130' INT TERM

result() { # prints a row of figures and their names
	echo "R $*" >>"$out"
	echo "$*" >&2
}
serve() { # command...: runs a server, and returns when it listens at s.sock
	local n
	rm -f "$dir/s.sock"
	"$@" &
	server=$!
	for n in $(seq 100); do
		[ ! -S "$dir/s.sock" ] || return 0
		sleep 0.1
	done
	echo "$name: the server has made no socket" >&2
	exit 1
}
stop() {
	kill "$server"
	wait "$server" || true
	server=
}
nbd_fio() { # export, fio's flags...: prints IOPS, p50 in ns, p99, I/Os
	local dir_=write
	case " $* " in *read\ *) dir_=read ;; esac
	fio --name=x --ioengine=nbd --uri="nbd+unix:///$1?socket=$dir/s.sock" --randrepeat=0 \
		--buffer_compress_percentage=50 --buffer_compress_chunk=4k --refill_buffers --output-format=json --output="$dir/fio.json" "${@:2}"
	awk '/"(read|write|trim)" : /{s = $1} s == want && /"iops" : /{gsub(",", ""); iops = $3}
		s == want && /"total_ios" : /{gsub(",", ""); n = $3} s == want && /"50.000000" : /{gsub(",", ""); p = $3}
		s == want && /"99.000000" : /{gsub(",", ""); q = $3} END{print iops, p, q, n}' want="\"$dir_\"" "$dir/fio.json"
}

size=${SIZE_MB:-256} runtime=${RUNTIME:-10}

for v in victim neighbour; do "$vdisk" -q create $v "${size}M"; done
serve "$vdisk" -q serve --socket "$dir/s.sock"
for v in victim neighbour; do nbd_fio $v --rw=write --bs=1m --iodepth=4 --size="${size}M" >/dev/null; done

limit() { # limits of the neighbour...
	"$vdisk" -q set neighbour limit.iops= limit.bps=
	[ $# = 0 ] || "$vdisk" -q set neighbour "$@"
}
held() { # name, limit, block size, fio's flags...: of the limit, in a second
	local iops rest
	read -r iops rest < <(nbd_fio neighbour --size="${size}M" --time_based --runtime="$runtime" --norandommap --bs="$3" "${@:4}")
	result "limit $1 $(awk -v i="$iops" -v b="$3" -v l="$2" 'BEGIN{print (l < 100000 ? i : i * b) / l}')"
}
iops=${IOPS:-500} bps=$((${BPS_MB:-8} << 20))
for r in $(seq "${ROUNDS:-3}"); do
	limit limit.iops="$iops"
	held iops-4k-writes "$iops" 4096 --rw=randwrite --iodepth=32
	held iops-4k-reads "$iops" 4096 --rw=randread --iodepth=32
	limit limit.bps="$bps"
	held bps-64k-writes "$bps" 65536 --rw=randwrite --iodepth=8
	held bps-1m-reads "$bps" 1048576 --rw=read --iodepth=4
	limit
done

victim() { # name
	local iops p50 p99 n kind
	for kind in read write; do
		read -r iops p50 p99 n < <(nbd_fio victim --rw=rand$kind --bs=4k --iodepth=1 --rate_iops=500 \
			--size="${size}M" --time_based --runtime="$runtime" --norandommap)
		result "victim ${kind}s-$1 $p50 $p99"
	done
}
beside() { # name, the limits of the neighbour...
	limit "${@:2}"
	fio --name=n --ioengine=nbd --uri="nbd+unix:///neighbour?socket=$dir/s.sock" --rw=randwrite --bs=64k --iodepth=32 --size="${size}M" \
		--time_based --runtime=1h --norandommap --refill_buffers --buffer_compress_percentage=50 --output=/dev/null &
	local n=$!
	sleep 1
	victim "$1"
	kill "$n"
	wait "$n" || true
}
for r in $(seq "${ROUNDS:-3}"); do
	victim alone
	beside unlimited
	beside limited limit.bps="${NEIGHBOUR_MB:-4}M"
done
stop
awk -f "$tools/median.awk" -f <(cat <<'AWK'
$1 == "R" && $2 == "limit" { if (!($3 in held)) name[++names] = $3; held[$3] = held[$3] " " $4 }
$1 == "R" && $2 == "victim" { p50[$3] = p50[$3] " " $4; p99[$3] = p99[$3] " " $5 }
END {
	printf "%-24s %s\n", "", "got, of the limit"
	for (i = 1; i <= names; i++) printf "%-24s %9.3f\n", name[i], median(held[name[i]])
	printf "%-24s %9s %9s\n", "victim", "p50 us", "p99 us"
	split("alone unlimited limited", v, " ")
	for (w = 1; w <= 2; w++) for (i = 1; i <= 3; i++) {
		kind = w == 1 ? "reads-" : "writes-"
		m = median(p99[kind v[i]])
		printf "%-24s %9.0f %9.0f   %.2f of alone\n", kind v[i], median(p50[kind v[i]]) / 1000, m / 1000, m / median(p99[kind "alone"])
	}
}
AWK
) "$out"
