#!/bin/busybox sh
# First program of a virtual machine: mounts its disk, and goes on with the disk's /sbin/init.
bb=/bin/busybox
$bb mount -t devtmpfs dev /dev
for m in /boot/*.ko; do $bb insmod "$m"; done
until [ -b /dev/vda ]; do $bb sleep 0.1; done
$bb mount -t ext4 /dev/vda /root || { echo "init: no root disk" >/dev/console; $bb poweroff -f; }
$bb mount --move /dev /root/dev
exec $bb switch_root /root /sbin/init
