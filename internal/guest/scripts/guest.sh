# Process 1 of the guest: makes the system ready, runs the payload, tells how it ended, resets the machine.
export PATH=/payload/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
export HOME=/root TMPDIR=/tmp LANG=C.UTF-8 TERM=${TERM:-linux} USER=root SHELL=/bin/bash
export VDISK_GUEST=1 VDISK_SCRATCH=/scratch VDISK_RESULTS=/results

for w in $(cat /proc/cmdline); do
	case $w in vdisk.nonce=*) nonce=${w#*=} ;; esac
done
disk() {
	local s
	for s in /sys/block/*/serial; do
		[ "$(<"$s")" = "$1" ] && { s=${s%/serial}; echo "/dev/${s##*/}"; return 0; }
	done 2>/dev/null
	return 1
}

mount -t tmpfs tmp /tmp
mkdir -p /dev/pts /dev/shm /run/lock
mount -t devpts -o gid=5,mode=620,ptmxmode=666 pts /dev/pts
mount -t tmpfs shm /dev/shm
mount -t cgroup2 cgroup /sys/fs/cgroup 2>/dev/null
mount -t debugfs debug /sys/kernel/debug 2>/dev/null
ln -sfn /proc/self/fd /dev/fd; ln -sfn fd/0 /dev/stdin; ln -sfn fd/1 /dev/stdout; ln -sfn fd/2 /dev/stderr
ln -sfn /proc/mounts /etc/mtab
echo guest >/proc/sys/kernel/hostname
echo "127.0.0.1 localhost guest" >/etc/hosts
ip link set lo up
ulimit -n 65536; ulimit -l unlimited; ulimit -u unlimited; ulimit -c 0

# From here on all that the kernel says goes to the console, which the host keeps.
cd /proc/sys/kernel
echo 8 >printk
echo 30 >hung_task_timeout_secs
echo -1 >hung_task_warnings
echo 60 >watchdog_thresh # emulated processors may wait long for a real one
echo 1 >sysrq
cd /

/usr/lib/systemd/systemd-udevd --daemon
udevadm trigger --subsystem-match=block --subsystem-match=misc --subsystem-match=virtio-ports --action=add
udevadm settle --timeout=20

mount -t tmpfs -o size=80% payload /payload
tar -xf "$(disk payload)" -C / || echo "guest: the payload cannot be unpacked" >/dev/console
d=$(disk scratch) && mount -t ext4 -o discard "$d" /scratch
d=$(disk results) && mount -t ext4 "$d" /results

for p in /sys/class/virtio-ports/*; do
	[ "$(<"$p/name")" = vdisk.0 ] && port=/dev/${p##*/}
done
exec 3<>"$port" || { echo "guest: no port to the host" >/dev/console; echo b >/proc/sysrq-trigger; }
# The port can be open once only, so the payload writes to a pipe (/dev/stdout can be opened again there).
mkfifo /run/out
cat /run/out >&3 &
exec 4>/run/out
event() { printf '\036%s %s\n' "$nonce" "$*" >&4; }
cat >/usr/local/bin/vdisk-powercut <<P
#!/bin/sh
# Asks the host to kill the machine at once.
printf '\036%s powercut\n' "$nonce" >/run/out
exec sleep 1000000
P
chmod +x /usr/local/bin/vdisk-powercut

event ready
cd /payload
setsid bash /payload/.script </dev/null >&4 2>&1 3>&- 4>&-
code=$?
event exit $code
read -r -t 30 -u 3 _ # the host has all output
# Disks that the host keeps are brought in order, but a file system that hangs shall not hang the end.
{ umount /results; umount /scratch || sync -f /scratch; : >/run/down; } 2>/dev/null &
n=0
until [ -e /run/down ] || [ $n -ge 100 ]; do n=$((n + 1)); sleep 0.1; done
echo b >/proc/sysrq-trigger
while :; do sleep 1; done
