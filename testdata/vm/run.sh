#!/bin/bash
# run.sh [DIR]: virtual machines on clones of one golden image (image.sh), booted by QEMU over NBD, beside the same machines on overlays of a
# qcow2. All write, each its own data (work.sh). Meanwhile vdisk's owner is killed twice, and starts again. No machine may see an error; all
# that they have acknowledged must be on their disks (verify.sh), and the golden image must be as before. Prints what it took. A DIR, which
# must be empty or have an image already, keeps it all.
# Environment:
#   VMS       machines (10); TOGETHER, how many boot at a time (3); MEMORY, MiB of each (128); FILES, of 512 KiB, that each writes (16)
#   PEERS     vdisk qcow2; VDISK, the program (bin/vdisk)
#   ACCEL     tcg or kvm; LIMIT, seconds to wait for anything (300)
#   GUEST     1: also as block devices (guest.sh)
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
cd "$here/../.."
vms=${VMS:-10} together=${TOGETHER:-3} files=${FILES:-16} peers=${PEERS:-vdisk qcow2} accel=${ACCEL:-tcg} limit=${LIMIT:-300}
vdisk=$(realpath "${VDISK:-bin/vdisk}")
export PATH=$PATH:/usr/sbin:/sbin LC_ALL=C
dir=${1:-$(mktemp -d /tmp/vdisk-vm-XXXXXX)} keep=${1:-}
mkdir -p "$dir"
export VDISK_STORE=$dir/store
declare -A pid input started
owner=

cleanup() {
	local p n
	for p in $(jobs -pr); do [ "$p" = "$owner" ] || kill -9 "$p" 2>/dev/null || true; done
	if [ "$owner" ] && kill "$owner" 2>/dev/null; then # in order, so that it leaves nothing in /dev/shm
		for n in $(seq 100); do kill -0 "$owner" 2>/dev/null || break; sleep 0.1; done
		kill -9 "$owner" 2>/dev/null || true
	fi
	[ "$keep" ] || rm -rf "$dir"
}
trap cleanup EXIT
fail() {
	tail -n 1 "$dir"/*.console >&2 || true
	cat "$dir"/*.err >&2 || true
	tail -n 5 "$dir/owner.log" >&2 || true
	echo "FAIL: $*" >&2
	echo "what it left is in $dir" >&2
	keep=yes
	exit 1
}
trap 'fail "line $LINENO: $BASH_COMMAND"' ERR
set -E
say() { printf '%s  %s\n' "$(date +%T)" "$*"; }
ms() { echo $((${EPOCHREALTIME//[.,]/} / 1000)); }
stamp() { while IFS= read -r line; do printf '%s %s\n' "$(ms)" "$line"; done; }
ended() { # child: waits for its end, and returns its status
	local end=$((SECONDS + limit))
	while kill -0 "$1" 2>/dev/null; do
		[ $SECONDS -lt $end ] || fail "process $1 has not ended in $limit s"
		sleep 0.2
	done
	wait "$1"
}
reap() { kill -9 "$1" && { wait "$1" 2>/dev/null || true; }; } # kills a child
median() { sort -n | awk '{ a[NR] = $1 } END { print a[int((NR + 1) / 2)] }'; }
on_disk() { du -sB1 "$@" | awk '{ n += $1 } END { printf "%.1f MiB", n / 1048576 }'; }
machines() { for n in $(seq "$vms"); do for p in ${1:-$peers}; do echo "$p-$n"; done; done; }

# As in internal/guest/qemu.go. nowatchdog: the clock of an emulated machine may run many times too fast if it booted while the host was
# busy, and then the kernel takes a pause for a processor that hangs.
kernel_args="console=ttyS0 quiet loglevel=5 panic=-1 no_timer_check tsc=nowatchdog nowatchdog mitigations=off"

# Machines. A machine's name is PEER-NUMBER.
boot() { # machine
	local m=$1 n=${1#*-} disk cpu=max,-cx16 how=$accel,tb-size=64 fd
	case $m in
	vdisk-*) disk=driver=nbd,export=vm$n,server.type=unix,server.path=$VDISK_STORE/nbd.sock,reconnect-delay=300 ;;
	qcow2-*) disk=driver=qcow2,file.driver=file,file.filename=$dir/vm$n.qcow2 ;;
	esac
	[ "$accel" != kvm ] || { cpu=host how=kvm; }
	[ -p "$dir/$m.in" ] || mkfifo "$dir/$m.in"
	exec {fd}<>"$dir/$m.in"
	input[$m]=$fd started[$m]=$(ms)
	qemu-system-x86_64 -accel "$how" -cpu "$cpu" -m "${MEMORY:-128}" -nodefaults -no-user-config -display none -net none -no-reboot \
		-kernel "$dir/vmlinuz" -initrd "$dir/initrd" -serial stdio -blockdev "$disk,node-name=disk,discard=unmap,detect-zeroes=unmap" \
		-device virtio-blk-pci,drive=disk -append "$kernel_args vm=$n" \
		<"$dir/$m.in" > >(stamp >"$dir/$m.console") 2>"$dir/$m.err" &
	pid[$m]=$!
}
tell() { # words, machines...
	local words=$1 m
	for m in "${@:2}"; do echo "$words" >&"${input[$m]}"; done
}
written() { grep -c ': wrote ' "$dir/$1.console" || true; }
until_said() { # pattern machines...: waits until all have said it
	local pattern=$1 m end=$((SECONDS + limit))
	for m in "${@:2}"; do
		until grep -qE ": $pattern" "$dir/$m.console"; do
			kill -0 "${pid[$m]}" 2>/dev/null || { sleep 1; grep -qE ": $pattern" "$dir/$m.console" || fail "$m has ended, and has not said '$pattern'"; }
			! grep -q FAILED "$dir/$m.console" || fail "$m"
			[ $SECONDS -lt $end ] || fail "$m has not said '$pattern' in $limit s"
			sleep 0.2
		done
	done
}
until_any() { # pattern files...: waits until one of them has it
	local end=$((SECONDS + limit))
	until grep -qE ": $1" "${@:2}"; do
		[ $SECONDS -lt $end ] || fail "no machine has said '$1' in $limit s"
		sleep 0.1
	done
}
# Old emulators now and then fail to boot a kernel (internal/guest/accel.go). Such a machine is booted again.
until_ready() { # machines...
	local m tries
	for m; do
		tries=1
		until grep -q ': ready' "$dir/$m.console" 2>/dev/null; do
			if [ $(($(ms) - started[$m])) -gt $((limit * 1000)) ]; then reap "${pid[$m]}"; fi
			if ! kill -0 "${pid[$m]}" 2>/dev/null; then
				[ $tries -lt 3 ] || fail "$m does not boot"
				tries=$((tries + 1))
				say "$m did not boot, try $tries"
				boot "$m"
			fi
			sleep 0.2
		done
	done
}
boot_time() { # machine
	echo $(($(sed -n 's/^\([0-9]*\) .*: ready.*/\1/p' "$dir/$1.console") - started[$1]))
}

# The owner.
serve() { # serve or daemon: both serve NBD
	"$vdisk" "$1" >>"$dir/owner.log" 2>&1 &
	owner=$!
}
answers() { # until the first bytes of a disk can be read
	local end=$((SECONDS + limit))
	until qemu-io -r -f raw -c 'read 0 4k' "nbd+unix:///$1?socket=$VDISK_STORE/nbd.sock" >"$dir/io.log" 2>&1; do
		[ $SECONDS -lt $end ] || fail "no answer: $(cat "$dir/io.log")"
		sleep 0.1
	done
}

say "the golden image"
[ -e "$dir/golden.img" ] || "$here/image.sh" "$dir"
"$vdisk" -q import "$dir/golden.img" golden >"$dir/import.log"
"$vdisk" -q snapshot golden@v1
qemu-img convert -q -O qcow2 "$dir/golden.img" "$dir/golden.qcow2"
store_before=$(on_disk "$VDISK_STORE")
serve serve
answers golden

say "$vms clones of it"
for n in $(seq "$vms"); do
	a=$(ms)
	"$vdisk" -q clone golden@v1 "vm$n"
	b=$(ms)
	answers "vm$n"
	c=$(ms)
	(cd "$dir" && qemu-img create -q -f qcow2 -b golden.qcow2 -F qcow2 "vm$n.qcow2")
	d=$(ms)
	qemu-io -r -f qcow2 -c 'read 0 4k' "$dir/vm$n.qcow2" >"$dir/io.log"
	e=$(ms)
	echo $((b - a)) $((c - a)) $((d - c)) $((e - c)) >>"$dir/clones"
done
column() { awk -v c="$1" '{ print $c }' "$dir/clones" | median; }

for first in $(seq 1 "$together" "$vms"); do
	last=$((first + together - 1 < vms ? first + together - 1 : vms))
	order=$peers # the other way round in every second turn: those that boot later have more machines beside them
	[ $((first / together % 2)) = 0 ] || order=$(tr ' ' '\n' <<<"$peers" | tac | xargs)
	for p in $order; do
		some=()
		for n in $(seq "$first" $last); do boot "$p-$n"; some+=("$p-$n"); done
		until_ready "${some[@]}"
		say "booted: ${some[*]}"
	done
done

work() { # peer: tells its machines to write, and kills vdisk's owner twice in the middle of it
	local all m busy goal next next_owner=daemon
	mapfile -t all < <(machines "$1")
	goal=$((files * 3 / 8))
	tell "go $goal" "${all[@]}"
	for next in $((files * 3 / 4)) "$files"; do
		until_said "wrote $goal " "${all[@]}"
		tell "go $next" "${all[@]}"
		if [ "$1" = vdisk ]; then
			until_any "wrote $((goal + 1)) " "$dir"/vdisk-*.console
			reap "$owner"
			busy=0
			for m in "${all[@]}"; do [ "$(written "$m")" -ge "$next" ] || busy=$((busy + 1)); done
			say "the owner is killed while $busy of $vms machines write"
			sleep 2
			serve $next_owner
			next_owner=serve
		fi
		goal=$next
	done
	until_said "wrote $files " "${all[@]}"
	reap "${pid[$1-$vms]}" # this one has a power cut instead of an end
	unset "all[-1]"
	tell end "${all[@]}"
	until_said "end $files" "${all[@]}"
	for m in "${all[@]}"; do ended "${pid[$m]}" || fail "$m ended with status $?"; done
	if grep -E 'FAILED|I/O error|EXT4-fs (error|warning)|[Rr]emount|Oops|BUG:|panic' "$dir/$1"-*.console; then fail "$1 machines have seen errors"; fi
	say "$1: every machine has written $files files and seen no error; the last one had its power cut"
}
for p in $peers; do work "$p"; done

say "what is on the disks"
kill "$owner"
ended "$owner" || [ $? = 143 ] || fail "the owner ended with status $?"
owner=
store_after=$(on_disk "$VDISK_STORE")
"$vdisk" check --read-data
for m in $(machines); do
	n=${m#*-}
	case $m in
	vdisk-*) "$vdisk" -q export "vm$n" "$dir/disk.img" ;;
	qcow2-*) qemu-img convert -q -O raw "$dir/vm$n.qcow2" "$dir/disk.img" ;;
	esac
	"$here/verify.sh" "$dir/disk.img" "$n" "$dir/$m.console" "$dir/golden.img" "$([ "$n" != "$vms" ] || echo cut)" >"$dir/verified" || fail "$m"
	say "$m: $(cat "$dir/verified")"
	rm "$dir/disk.img"
done
for v in golden golden@v1; do "$vdisk" -q export "$v" - | cmp - "$dir/golden.img" || fail "$v has changed"; done
say "golden and golden@v1 are the image still"

boots() { # peer
	local m times=
	for m in $(machines "$1"); do times+="$(boot_time "$m") "; done
	tr ' ' '\n' <<<"${times% }" | sort -n | awk '{ a[NR] = $1 / 1000 } END { printf "%.1f s (%.1f to %.1f)", a[int((NR + 1) / 2)], a[1], a[NR] }'
}
qcow2_after=$(cd "$dir" && on_disk golden.qcow2 $(seq -f 'vm%g.qcow2' "$vms"))
row() { printf '%-66s %-22s %s\n' "$1" "$2" "${3:-}"; }
echo
row "$vms machines, $(nproc) processors, ${MEMORY:-128} MiB, $accel" vdisk "qcow2 overlays"
row "a clone, the whole command (median)" "$(column 1) ms" "$(column 3) ms"
row "the same, and the first 4 KiB read by a new client (median)" "$(column 2) ms" "$(column 4) ms"
has() { [[ " $peers " = *" $1 "* ]]; }
row "boot, $together at a time (median, range)" "$(has vdisk && boots vdisk || echo -)" "$(has qcow2 && boots qcow2 || echo -)"
row "on the disk: the golden image ($(on_disk "$dir/golden.img") as a raw file)" "$store_before" "$(on_disk "$dir/golden.qcow2")"
row "  with $vms clones, and $((files * 512 + files * 64)) KiB written by each" "$store_after" "$(has qcow2 && echo "$qcow2_after" || echo -)"

if [ "${GUEST:-}" = 1 ]; then
	echo
	say "the same as block devices, in a guest"
	go run ./internal/guest/cmd/guest run -kernel newest -timeout 40m -file bin/vdisk="$vdisk" -file golden.img="$dir/golden.img" -file vm.sh="$here/guest.sh" \
		-file verify.sh="$here/verify.sh" -- env "VMS=$vms" "FILES=$files" bash /payload/vm.sh 2>"$dir/guest.err" | stamp >"$dir/guest.out" ||
		{ cat "$dir/guest.out" "$dir/guest.err"; fail "in the guest"; }
	sed 's/^[0-9]* //; /^clone [0-9]/d' "$dir/guest.out"
	row "a clone, attached, and its first 4 KiB read (median, emulated)" \
		"$(awk '$2 == "clone" { if ($4 == "begins") a = $1; else print $1 - a }' "$dir/guest.out" | median) ms"
fi
