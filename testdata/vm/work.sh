#!/bin/busybox sh
# The work of one machine, which is told what to do, and says what it has done, a line each. It is process 1 of a virtual machine,
# where the lines go over the serial console, and vm=N of the kernel's command line is the machine's number; without it there is a shell on
# the console. "work.sh N" does the work in a chroot on the disk, for standard input and output.
#   go K    write files until there are K
#   end     read all of them back, say whether the disk can still be written, and end
# A line "wrote FILE SUM" is a promise: the file is on the disk, and so is its beginning in a part of /base/data, which came with the
# golden image. So it is said after the syncs, and not before.
export PATH=/bin
n=$1 machine=
if [ $$ = 1 ]; then
	machine=yes
	mount -t proc proc /proc
	mount -t sysfs sys /sys
	for w in $(cat /proc/cmdline); do
		case $w in vm=*) n=${w#vm=} ;; esac
	done
	exec </dev/ttyS0 >/dev/ttyS0 2>&1
	[ -z "$n" ] || stty raw -echo
fi
mine=VM-$(printf %02d "${n:-0}")
say() { echo "$mine: $*"; }
quit() {
	[ "$machine" ] || exit "$1"
	sync
	mount -o remount,ro /
	poweroff -f
}
if [ -z "$n" ]; then
	setsid cttyhack sh
	quit 0
fi
fail() { say "FAILED: $*"; quit 1; }

write() { # file number
	f=/data/$mine-$1
	{ yes "$mine file $1" | head -c 262144; head -c 262144 /dev/urandom; } | dd of="$f" bs=64k iflag=fullblock conv=fsync 2>/dev/null || fail "write $f"
	sync /data || fail "sync /data"
	dd if="$f" of=/base/data bs=64k count=1 seek=$(($1 * 7 % 128)) conv=notrunc,fsync 2>/dev/null || fail "write /base/data"
	sum=$(sha256sum <"$f") || fail "read $f"
	sums="$sums $1=${sum%% *}"
	say "wrote $1 ${sum%% *}"
}
back() { # all files, from the disk
	[ -z "$machine" ] || echo 3 >/proc/sys/vm/drop_caches
	for s in $sums; do
		sum=$(sha256sum <"/data/$mine-${s%%=*}") || fail "read file ${s%%=*}"
		[ "${sum%% *}" = "${s#*=}" ] || fail "file ${s%%=*} has changed"
	done
}

[ -z "$(ls /data)" ] || fail "the disk is not new: $(ls /data)"
done=0 sums=
say ready
while read -r word k; do
	case $word in
	go)
		while [ "$done" -lt "$k" ]; do
			done=$((done + 1))
			write $done
		done
		;;
	end)
		back
		echo "$mine" >/data/.end && sync /data/.end && sync /data || fail "the disk cannot be written"
		say "end $done"
		break
		;;
	esac
done
quit 0
