# Process 1 of the guest, or a service of systemd: prepares the system, runs the payload, reports its exit status, and resets the machine.
# Starting programs is slow when emulated, so this uses busybox and the shell's own commands where it can.
export PATH=/payload/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
export HOME=/root TMPDIR=/tmp LANG=C.UTF-8 TERM=linux USER=root SHELL=/bin/bash
export VDISK_GUEST=1 VDISK_SCRATCH=/scratch VDISK_RESULTS=/results
bb=/run/busybox

systemd=
for w in $(</proc/cmdline); do
	case $w in vdisk.nonce=*) nonce=${w#*=} ;; vdisk.systemd) systemd=yes ;; esac
done
ulimit -n 65536; ulimit -l unlimited; ulimit -u unlimited; ulimit -c 0

# From here on all kernel messages go to the console, which the host keeps.
cd /proc/sys/kernel
echo guest >hostname
echo 8 >printk
echo 60 >hung_task_timeout_secs # before Linux 6.15 the driver may need 30 s to notice that a server is gone
echo 10 >hung_task_check_interval_secs
echo -1 >hung_task_warnings
echo 60 >watchdog_thresh # emulated processors may wait long for a real one
echo 1 >sysrq
cd /

# Present devices have their nodes from devtmpfs. udev is for devices that tests make.
[ "$systemd" ] || /usr/lib/systemd/systemd-udevd --daemon 2>/dev/null

for p in /sys/class/virtio-ports/*; do
	[ "$(<"$p/name")" = vdisk.0 ] && port=/dev/${p##*/}
done
exec 3<>"$port" || { echo "guest: no port to the host" >/dev/console; echo b >/proc/sysrq-trigger; }
# The port can be opened only once, so the payload writes to a pipe, where /dev/stdout can be opened again.
$bb mkfifo /run/out
$bb cat /run/out >&3 &
exec 4>/run/out
event() { printf '\036%s %s\n' "$nonce" "$*" >&4; }
echo "#!/bin/sh
# Asks the host to kill the machine at once.
printf '\\036%s powercut\\n' $nonce >/run/out
exec sleep 1000000" >/usr/local/bin/vdisk-powercut
$bb chmod +x /usr/local/bin/vdisk-powercut

event ready
cd /payload
setsid -w bash /payload/.script </dev/null >&4 2>&1 3>&- 4>&-
code=$?
event exit $code
read -r -t 30 -u 3 _ # the host has all output
[ ! "$systemd" ] || exec systemctl reboot
# Unmount the disks that the host keeps, but do not let a file system that hangs delay the end.
{ $bb umount /results; $bb umount /scratch || sync -f /scratch; : >/run/down; } 2>/dev/null &
n=0
until [ -e /run/down ] || [ $n -ge 100 ]; do n=$((n + 1)); $bb sleep 0.1; done
echo b >/proc/sysrq-trigger
while :; do $bb sleep 1; done
