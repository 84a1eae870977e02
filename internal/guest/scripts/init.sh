#!/bin/busybox sh
# First program of the guest: finds the root image, mounts the kernel's modules on it, and switches to it.
bb=/bin/busybox
$bb mount -t devtmpfs dev /dev
$bb mount -t proc proc /proc
$bb mount -t sysfs sys /sys
for m in /boot/*.ko; do [ -e "$m" ] && $bb insmod "$m"; done

# disk NAME: the block device whose virtio serial is NAME.
disk() {
	for s in /sys/block/*/serial; do
		[ -e "$s" ] && [ "$($bb cat "$s")" = "$1" ] && { s=${s%/serial}; echo "/dev/${s##*/}"; return 0; }
	done
	return 1
}

case " $($bb cat /proc/cmdline) " in
*" vdisk.probe "*)
	echo VDISK-PROBE-OK >/dev/console
	$bb poweroff -f ;;
esac

n=0
until root=$(disk root) && modules=$(disk modules); do
	n=$((n + 1)); [ $n -lt 100 ] || { echo "init: no root disk" >/dev/console; $bb reboot -f; }
	$bb sleep 0.05
done
$bb mount -t ext4 "$root" /newroot && $bb mount -t ext4 -o ro "$modules" /newroot/usr/lib/modules || {
	echo "init: cannot mount the root image" >/dev/console; $bb reboot -f; }
$bb mount -t tmpfs -o size=80% payload /newroot/payload
d=$(disk payload) && $bb tar -xf "$d" -C /newroot || {
	echo "init: the payload cannot be unpacked" >/dev/console; $bb reboot -f; }
d=$(disk scratch) && $bb mount -t ext4 -o discard "$d" /newroot/scratch
d=$(disk results) && $bb mount -t ext4 "$d" /newroot/results
for d in dev proc sys; do $bb mount --move /$d /newroot/$d; done
cd /newroot
$bb mount -t tmpfs -o mode=755 run run
$bb mount -t tmpfs tmp tmp
$bb mkdir -p dev/pts dev/shm run/lock
$bb mount -t devpts -o gid=5,mode=620,ptmxmode=666 pts dev/pts
$bb mount -t tmpfs shm dev/shm
$bb mount -t cgroup2 cgroup sys/fs/cgroup
$bb mount -t debugfs debug sys/kernel/debug
$bb ln -s /proc/self/fd dev/fd; $bb ln -s fd/0 dev/stdin; $bb ln -s fd/1 dev/stdout; $bb ln -s fd/2 dev/stderr
$bb ln -sf /proc/mounts etc/mtab
echo "127.0.0.1 localhost guest" >etc/hosts
$bb ifconfig lo 127.0.0.1 up
$bb cp /guest.sh run/guest.sh
$bb cp $bb run/busybox
case " $($bb cat proc/cmdline) " in
*" vdisk.systemd "*)
	# The rest is a service, which begins when the system is up.
	$bb mkdir -p run/systemd/system/multi-user.target.wants
	printf '%s\n' '[Unit]' After=multi-user.target '[Service]' 'ExecStart=/bin/bash /run/guest.sh' TasksMax=infinity KillMode=mixed \
		>run/systemd/system/vdisk-guest.service
	$bb ln -s ../vdisk-guest.service run/systemd/system/multi-user.target.wants/
	exec $bb switch_root /newroot /usr/lib/systemd/systemd ;;
esac
exec $bb switch_root /newroot /bin/bash /run/guest.sh
