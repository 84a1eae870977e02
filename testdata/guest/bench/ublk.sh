# Measures the cost of block devices: in one boot, in turns. bench-ublk.sh runs it in a guest, and makes a table of its
# lines "R group test target round IOPS p50(ns) CPU(ns an I/O)".
# Environment: GROUPS_, ROUNDS, RUNTIME (seconds a run), FILE_MB.
set -euo pipefail
. ./lib.sh
export VDISK_STORE=$VDISK_SCRATCH/store
fill() { # file
	fio --name=fill --filename="$1" --rw=write --bs=1M --size="${FILE_MB}M" --end_fsync=1 "${half[@]}" --output=/dev/null
}

ours() { # target program flags...
	local target=$1 out=/tmp/$1.out
	shift
	"$@" >"$out" &
	pid[$target]=$!
	await test -s "$out"
	device[$target]=$(cat "$out")
}
volume() { # target queues size-of-writes: units of the engine are as large as the writes that make them, up to 16 KiB
	vdisk -q create "$1" --size "${FILE_MB}M"
	device[$1]=$(vdisk attach "$1" --queues "$2" --depth 128)
	pid[$1]=$owner
	dd if="$VDISK_SCRATCH/base" of="${device[$1]}" bs="$3" oflag=direct conv=fsync status=none
}
copy() { cp "$VDISK_SCRATCH/base" "$VDISK_SCRATCH/$1"; echo "$VDISK_SCRATCH/$1"; }

cpu() { # pid: clock ticks that the process has used, of all its threads, also those that have ended
	awk '{print $14 + $15}' "/proc/$1/stat"
}
measure() { # group test target round rw depth jobs
	local before=0 after=0 iops p50 n tick _
	[ -z "${pid[$3]:-}" ] || before=$(cpu "${pid[$3]}")
	random "$3" "$5" "$6" "$7"
	[ -z "${pid[$3]:-}" ] || after=$(cpu "${pid[$3]}")
	read -r iops p50 _ n < <(numbers "$5")
	tick=$(getconf CLK_TCK)
	echo "R $1 $2 $3 $4 $iops $p50 $(((after - before) * 1000000000 / tick / n))"
}
tests() { # group suffix test rw depth jobs...: every round in the other direction than the one before
	local group=$1 round target order
	for round in $(seq "$ROUNDS"); do
		order=$(printf '%s\n' "${!device[@]}" | grep "^$group.*-$2\$" | sort ${reverse:+-r})
		for target in $order; do measure "$group" "$3" "$target" "$round" "${@:4}"; done
		if [ "${reverse:-}" ]; then reverse=; else reverse=1; fi
	done
}

null_group() {
	local q
	for q in 1 2; do
		ours "null-ours-$q" null -queues $q
		! have_peer null || peer "null-ublksrv-$q" $((20 + q)) null -q $q
		kernel_null "null-kernel-$q" $q
	done
	tests null 1 read-32 read 32 1
	tests null 1 write-32 write 32 1
	tests null 1 read-1 read 1 1
	tests null 1 read-32-2-jobs read 32 2
	tests null 2 read-32-2-jobs-2-queues read 32 2
}
file_group() {
	local q
	fill "$VDISK_SCRATCH/base"
	vdisk -q create first --size 1M # a daemon needs a store
	vdisk daemon >/tmp/daemon.log 2>&1 &
	owner=$!
	await vdisk -q ls >/dev/null 2>&1
	for q in 1 2; do
		ours "file-loop-$q" loop -queues $q "$(copy "loop$q")"
		ours "file-loop.direct-$q" loop -direct -queues $q "$(copy "direct$q")"
		if have_peer loop; then
			peer "file-ublksrv.direct-$q" $((30 + q)) loop -q $q -f "$(copy "peer$q")"
			peer "file-ublksrv-$q" $((40 + q)) loop -q $q --buffered_io -f "$(copy "buffered$q")"
		fi
		volume "file-volume-$q" $q 1M
		volume "file-volume.4k-$q" $q 4k
	done
	sync
	tests file 1 read-32 read 32 1
	tests file 1 write-32 write 32 1
	tests file 1 read-1 read 1 1
	tests file 1 read-32-2-jobs read 32 2
	tests file 2 read-32-2-jobs-2-queues read 32 2
	tests file 1 write-32-2-jobs write 32 2
	tests file 2 write-32-2-jobs-2-queues write 32 2
}

say "kernel $(uname -r), $(nproc) CPUs, fio $(fio --version), $ROUNDS rounds of ${RUNTIME} s"
for type in null loop; do have_peer "$type" || say "not compared with ublksrv's $type: ublk or ublk.$type is not there (UBLKSRV_DIR)"; done
for group in $GROUPS_; do "${group}_group"; done
for target in "${!device[@]}"; do
	case $target in
	*-ours-* | file-loop*) kill "${pid[$target]}" && wait "${pid[$target]}" ;;
	*-volume*) vdisk -q detach "${target}" ;;
	esac
done
! have_peer null || ublk del -a >/dev/null
[ -z "${owner:-}" ] || { kill "$owner" && wait "$owner"; }
