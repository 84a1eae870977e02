# Functions for the benchmarks in a guest, which source this file in the payload's folder.
modprobe ublk_drv
export LD_LIBRARY_PATH=/payload/lib
declare -A device pid # of a target: its path, and the process that serves it if there is one
say() { echo "# $*"; }
await() { # command...: tries for half a minute
	local n
	for n in $(seq 300); do "$@" && return; sleep 0.1; done
	say "waited in vain for: $*"
	return 1
}
# Data that compresses to about half, as in the engine's benchmarks.
half=(--buffer_compress_percentage=50 --buffer_compress_chunk=4k --refill_buffers)
have_peer() { command -v ublk >/dev/null && command -v "ublk.$1" >/dev/null; }

# Each of these functions makes a device for a target.
peer() { # target id type flags...: ublksrv
	local target=$1 id=$2 type=$3
	shift 3
	timeout 60 ublk add -t "$type" -n "$id" -d 128 "$@" >/tmp/peer.out 2>&1 || { cat /tmp/peer.out; return 1; }
	await test -b "/dev/ublkb$id"
	device[$target]=/dev/ublkb$id
	pid[$target]=$(ublk list -n "$id" | sed -n 's/.*daemon pid \([0-9]*\).*/\1/p')
}
kernel_null() { # target queues
	local dir=/sys/kernel/config/nullb/$1 setting
	modprobe null_blk nr_devices=0
	mountpoint -q /sys/kernel/config || mount -t configfs none /sys/kernel/config
	mkdir "$dir"
	for setting in size=65536 "submit_queues=$2" hw_queue_depth=128 irqmode=0 power=1; do
		echo "${setting#*=}" >"$dir/${setting%%=*}"
	done
	device[$1]=/dev/$1 # the folder's name since Linux 5.17
	await test -b "/dev/$1"
}

random() { # target rw depth jobs flags...: 4 KiB at random for RUNTIME seconds in FILE_MB
	fio --name=x --filename="${device[$1]}" --ioengine=io_uring --direct=1 --bs=4k --rw="rand$2" --iodepth="$3" --numjobs="$4" \
		--group_reporting --runtime="$RUNTIME" --time_based --norandommap --randrepeat=0 --size="${FILE_MB}M" "${half[@]}" \
		--output-format=json --output=/tmp/fio.json "${@:5}"
}
numbers() { # read or write: IOPS, p50 of the completion latency, p99, I/Os in fio's JSON
	awk '/"(read|write|trim)" : /{s = $1} s == want && /"iops" : /{gsub(",", ""); iops = $3}
		s == want && /"total_ios" : /{gsub(",", ""); n = $3} s == want && /"50.000000" : /{gsub(",", ""); p = $3}
		s == want && /"99.000000" : /{gsub(",", ""); q = $3} END{print iops, p + 0, q + 0, n}' want="\"$1\"" /tmp/fio.json
}
