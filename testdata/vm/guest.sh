# In the guest (internal/guest): VMS clones of the golden image as block devices (ublk), all mounted. In each the machine's work (work.sh) is
# done in a chroot, with the disk's own programs: a virtual machine in the emulated guest would be too slow. Meanwhile the daemon is
# killed twice, and recovers its devices. Then as run.sh, which takes the time between two lines "clone N ..." by its own clock: that of an
# emulated guest may run many times too fast when the host is busy. So limits are wide here, and run.sh bounds the whole.
set -euo pipefail
vms=${VMS:-10} files=${FILES:-16}
modprobe ublk_drv
dmesg -C
dir=$VDISK_SCRATCH/vm
export VDISK_STORE=$dir/store VDISK_LOCK_TIMEOUT=600s
mkdir -p "$dir"
cd "$dir"
golden=/payload/golden.img
fail() {
	tail -n 5 ./*.console "$VDISK_STORE/daemon.log" >&2 || true
	dmesg | tail -n 20 >&2
	echo "FAIL: $*" >&2
	exit 1
}
trap 'fail "line $LINENO: $BASH_COMMAND"' ERR
set -E
v() { timeout -k 100 3000 vdisk "$@"; }
written() { grep -c ': wrote ' "$1.console" || true; }
until_said() { # pattern: waits until all have said it
	local n end=$((SECONDS + 6000))
	for n in $(seq "$vms"); do
		until grep -qE ": $1" "$n.console"; do
			! grep -q FAILED "$n.console" || fail "machine $n"
			[ $SECONDS -lt $end ] || fail "machine $n has not said '$1'"
			sleep 0.3
		done
	done
}
tell() { for n in $(seq "$vms"); do echo "$1" >&"${input[$n]}"; done; }

v -q import "$golden" golden
v -q snapshot golden@v1
for n in $(seq "$vms"); do
	echo "clone $n begins"
	v -q clone golden@v1 "vm$n"
	dev[n]=$(v attach "vm$n")
	dd if="${dev[n]}" of=/dev/null bs=4k count=1 iflag=direct status=none
	echo "clone $n is read"
	mkdir -p "mnt/$n"
	mount "${dev[n]}" "mnt/$n"
	mount --bind /dev "mnt/$n/dev"
	mkfifo "$n.in"
	exec {fd}<>"$n.in"
	input[n]=$fd
	chroot "mnt/$n" /bin/busybox sh /sbin/init "$n" <"$n.in" >"$n.console" 2>&1 &
	pid[n]=$!
done
until_said ready
goal=$((files * 3 / 8))
tell "go $goal"
for next in $((files * 3 / 4)) "$files"; do
	until_said "wrote $goal "
	tell "go $next"
	until grep -q ": wrote $((goal + 1)) " ./*.console; do sleep 0.1; done
	read -r _ owner _ <"$VDISK_STORE/lock"
	kill -9 "$owner"
	busy=0
	for n in $(seq "$vms"); do [ "$(written "$n")" -ge "$next" ] || busy=$((busy + 1)); done
	echo "the daemon is killed while $busy of $vms machines write"
	goal=$next
	sleep 2
	v recover >recovered
	[ "$(grep -c '^/dev/ublkb' recovered)" = "$vms" ] || fail "recovered: $(cat recovered)"
done
until_said "wrote $files "
tell end
until_said "end $files"
for n in $(seq "$vms"); do
	wait "${pid[n]}" || fail "machine $n ended with status $?"
	umount "mnt/$n/dev" "mnt/$n"
	v detach "${dev[n]}"
done
! dmesg | grep -v 'soft lockup' | grep -E 'I/O error|EXT4-fs (error|warning)|[Rr]emount|Oops|BUG:' || fail "the kernel complained"
v check --read-data
for n in $(seq "$vms"); do
	v -q export "vm$n" disk.img
	echo "machine $n: $(bash /payload/verify.sh disk.img "$n" "$n.console" "$golden")"
	rm disk.img
done
for volume in golden golden@v1; do v -q export "$volume" - | cmp - "$golden" || fail "$volume has changed"; done
echo "golden and golden@v1 are the image still"
