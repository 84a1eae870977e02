#!/bin/bash
# image.sh DIR: makes a small Linux from Debian's packages, which boots in seconds even where the processor is emulated. It needs no root.
#   DIR/golden.img   a disk: ext4 with busybox, the kernel's file, 8 MiB in /base/data, and work.sh as /sbin/init
#   DIR/vmlinuz      the kernel (KERNEL: newest or stable of internal/guest), for QEMU's -kernel
#   DIR/initrd       mounts the disk
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$1"
dir=$(cd "$1" && pwd)
cd "$here/../.."
export PATH=$PATH:/usr/sbin:/sbin
kernel=$(go run ./internal/guest/cmd/guest kernel "${KERNEL:-newest}")
busybox=$(go run ./internal/guest/cmd/guest package busybox-static)/usr/bin/busybox
tree=$(mktemp -d)
trap 'rm -rf "$tree"' EXIT

mkdir -p "$tree"/initrd/{bin,boot,dev,proc,root}
cp "$busybox" "$tree/initrd/bin/busybox"
cp "$kernel"/boot/*.ko "$tree/initrd/boot/"
install -m 755 "$here/initrd.sh" "$tree/initrd/init"
(cd "$tree/initrd" && find . | "$busybox" cpio -o -H newc 2>/dev/null) >"$dir/initrd"

mkdir -p "$tree"/root/{bin,sbin,boot,dev,proc,sys,tmp,data,base}
cp "$busybox" "$tree/root/bin/busybox"
for applet in $("$busybox" --list); do [ "$applet" = busybox ] || ln -s busybox "$tree/root/bin/$applet"; done
install -m 755 "$here/work.sh" "$tree/root/sbin/init"
cp "$kernel/vmlinuz" "$tree/root/boot/"
head -c 6M /dev/urandom | base64 -w 0 | head -c 8M >"$tree/root/base/data"
rm -f "$dir/golden.img"
truncate -s 128M "$dir/golden.img"
mke2fs -q -F -t ext4 -b 4096 -m 0 -e remount-ro -L golden -E root_owner=0:0,lazy_itable_init=0,lazy_journal_init=0 -d "$tree/root" "$dir/golden.img"
cp -f "$kernel/vmlinuz" "$dir/vmlinuz"
