#!/bin/busybox sh
# First program of the guest: finds the root image, puts the kernel's modules on it and goes there.
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
for d in dev proc sys; do $bb mount --move /$d /newroot/$d; done
$bb mount -t tmpfs -o mode=755 run /newroot/run
$bb cp /guest.sh /newroot/run/guest.sh
exec $bb switch_root /newroot /bin/bash /run/guest.sh
