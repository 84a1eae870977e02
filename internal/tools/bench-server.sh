# bench-server.sh: functions for benchmarks of servers on a socket: fio's NBD client, and a temporary folder. To be sourced.
#   DIR   a folder on the disk to measure (default: a temporary one in the present folder)
tools=$(realpath "$(dirname "$0")")
vdisk=$(realpath "$tools/../../bin/vdisk")
name=$(basename "$0" .sh)
made=
[ -n "${DIR:-}" ] || made=$(mktemp -d "$PWD/$name.XXXXXX")
mkdir -p "${DIR:-$made}"
dir=$(realpath "${DIR:-$made}")
export VDISK_STORE=$dir/store
out=$PWD/$name.out
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
ticks() { awk '{print $14 + $15}' "/proc/$server/stat"; }
with_cpu() { # as nbd_fio, but the last is the server's CPU time an I/O, in ns
	local before iops p50 p99 n
	before=$(ticks)
	read -r iops p50 p99 n < <(nbd_fio "$@")
	echo "$iops $p50 $p99 $((($(ticks) - before) * 1000000000 / $(getconf CLK_TCK) / n))"
}
