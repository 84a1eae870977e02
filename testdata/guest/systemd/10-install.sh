# The Debian package under systemd, before a reboot: install, enable, attach, upgrade under load, kill -9 under a mounted
# file system, snapshots by the timer, NBD by the socket, stop and start. /payload has old.deb and new.deb. 20-reboot.sh goes
# on after the reboot.
. /payload/lib.sh

echo "== install"
dpkg -i /payload/old.deb
vdisk version | grep -q '^vdisk v0.1.1,' || fail "the version: $(vdisk version)"
lsmod | grep -q ublk_drv || fail "the driver is not loaded"
none_loaded
for limit in "45 $unit" "32 $auto.service"; do # what it is now; no setting that counts may get lost
	systemd-analyze security --no-pager --threshold="${limit% *}" "${limit#* }" | tail -1
	[ "${PIPESTATUS[0]}" = 0 ] || fail "exposed more than before: $limit"
done

echo "== enable, attach at the start"
vdisk create vm1 512M
vdisk create vm2 64M
vdisk set vm1 auto.attach=on
vdisk set vm2 auto.attach=read-only
systemctl enable --now "$unit"
[ "$(readlink "/proc/$(systemctl show -P MainPID "$unit")/ns/mnt")" = "$(readlink /proc/1/ns/mnt)" ] || fail "the service has a mount namespace of its own"
[ -b /dev/disk/vdisk/vm1 ] || until_true 30 test -b /dev/disk/vdisk/vm1
until_true 30 test -b /dev/disk/vdisk/vm2
[ "$(blockdev --getro /dev/disk/vdisk/vm2)" = 1 ] || fail "vm2 can be written to"
store=$(vdisk info --json | python3 -c 'import json, sys; print(json.load(sys.stdin)["uuid"])')
[ "$(readlink -f /dev/disk/by-id/vdisk-"$store"-vm1)" = "$(readlink -f /dev/disk/vdisk/vm1)" ] || fail "the link by id"

echo "== names: a rename, a partition, a second store"
vdisk create vm3 64M && vdisk attach vm3 && [ -b /dev/disk/vdisk/vm3 ] || fail "attach did not wait for the link"
vdisk rename vm3 vm4
until_true 30 test -b /dev/disk/vdisk/vm4
until_true 30 test ! -e /dev/disk/vdisk/vm3
printf '\0\0\0\0\203\0\0\0\0\010\0\0\0\100\0\0' | dd of=/dev/disk/vdisk/vm4 bs=1 seek=446 conv=notrunc status=none
printf '\125\252' | dd of=/dev/disk/vdisk/vm4 bs=1 seek=510 conv=notrunc,fsync status=none # a partition of 8 MiB at 1 MiB
blockdev --rereadpt /dev/disk/vdisk/vm4
until_true 30 test -b /dev/disk/vdisk/vm4-part1
first=$(readlink -f /dev/disk/vdisk/vm4)
vdisk --store /srv/two create vm4 64M
second=$(vdisk --store /srv/two attach vm4)
[ "$(readlink -f /dev/disk/vdisk/vm4)" = "$first" ] && [ "$second" != "$first" ] || fail "another store has taken the link"
ls /dev/disk/by-id/ | grep -c -- '-vm4$' | grep -qx 2 || fail "a link by id is missing"
vdisk --store /srv/two detach vm4
vdisk detach vm4
until_true 30 test ! -e /dev/disk/vdisk/vm4

echo "== a file system in /etc/fstab"
mkfs.ext4 -q /dev/disk/vdisk/vm1
mkdir -p /mnt/vm1
echo "/dev/disk/vdisk/vm1 /mnt/vm1 ext4 nofail,x-systemd.requires=$unit 0 2" >>/etc/fstab
systemctl daemon-reload
systemctl start mnt-vm1.mount
mountpoint -q /mnt/vm1 || fail "not mounted"

echo "== the package is upgraded under load: the disks stay"
load() { fio --name=load --directory=/mnt/vm1 --size=32M --rw=randwrite --bs=4k --verify=crc32c --do_verify=1 --end_fsync=1 --loops=3 --output=/tmp/fio."$1"; }
load upgrade & job=$!
until_true 60 test -s /mnt/vm1/load.0.0
pid=$(systemctl show -P MainPID "$unit")
dpkg -i /payload/new.deb
[ "$(systemctl show -P MainPID "$unit")" = "$pid" ] || fail "the service was restarted"
vdisk info --json | grep -q '"version": "v0.1.2"' || fail "the service is not the new program: $(vdisk info)"
wait $job || { cat /tmp/fio.upgrade; fail "fio saw an error in the upgrade"; }

echo "== kill -9 under a mounted file system"
rm /mnt/vm1/load.0.0
load kill & job=$!
until_true 60 test -s /mnt/vm1/load.0.0
kill -9 "$pid"
until_true 60 sh -c "[ \$(systemctl show -P MainPID '$unit') != $pid ] && systemctl is-active -q '$unit'"
wait $job || { cat /tmp/fio.kill; fail "fio saw an error after the kill"; }
[ -b /dev/disk/vdisk/vm1 ] || fail "the recovered disk has no link"
dd if=/dev/urandom of=/mnt/vm1/kept bs=1M count=8 2>/dev/null
sha256sum /mnt/vm1/kept >/root/kept.sum

echo "== snapshots by the timer"
vdisk set vm1 auto.keep=last=2
mkdir -p "/etc/systemd/system/$auto.timer.d" "/run/systemd/system/$auto.service.d"
printf '%s\n' '[Timer]' OnCalendar= 'OnCalendar=*:*:0/20' AccuracySec=1s >"/etc/systemd/system/$auto.timer.d/often.conf"
printf '%s\n' '[Service]' 'ExecStartPre=/bin/sh -c "readlink /proc/self/ns/mnt >/run/auto.ns"' >"/run/systemd/system/$auto.service.d/ns.conf"
systemctl daemon-reload
systemctl enable --now "$auto.timer"
seen=
for n in 1 2 3; do
	echo $n >/mnt/vm1/written
	sync -f /mnt/vm1
	until_true 120 sh -c "[ \"\$(vdisk ls -H -t snap -o name vm1 | tail -n 1)\" != '$seen' ]"
	seen=$(vdisk ls -H -t snap -o name vm1 | tail -n 1)
	first=${first:-$seen}
done
until_true 120 sh -c "! vdisk info $first" # the third has pushed it out
until_true 60 sh -c "[ \$(vdisk ls -H -t snap -o name vm1 | wc -l) = 2 ]"
[ "$(cat /run/auto.ns)" = "$(readlink /proc/1/ns/mnt)" ] || fail "the service of the timer has a mount namespace of its own"
rm -r "/etc/systemd/system/$auto.timer.d" "/run/systemd/system/$auto.service.d"
systemctl daemon-reload
systemctl restart "$auto.timer" # every hour again, also after the reboot
! systemctl is-failed -q "$auto.service" || fail "the service of the timer"

echo "== stop and start"
systemctl stop "$unit"
! mountpoint -q /mnt/vm1 || fail "mounted after the stop"
[ -z "$(ls /dev/ublkb* 2>/dev/null)" ] || fail "a disk is left: $(ls /dev/ublkb*)"
vdisk check

echo "== NBD by the socket"
systemctl enable --now "$nbd"
[ "$(systemctl is-active "$unit")" = inactive ] || fail "the socket has started the service before a client came"
[ "$(stat -c %A:%a /run/vdisk /run/vdisk/var-lib-vdisk.sock | tr '\n' ' ')" = "drwxr-xr-x:755 srw-rw----:660 " ] || fail "modes: $(ls -la /run/vdisk)"
[ "$(nbdinfo --size "$(uri vm4)")" = 67108864 ] || fail "vm4 over NBD"
systemctl is-active -q "$unit" || fail "the client has not started the service"
until_true 30 test -b /dev/disk/vdisk/vm1
dd if=/dev/urandom of=/root/vm4 bs=1M count=4 status=none
nbdcopy --flush /root/vm4 "$(uri vm4)"
kill -9 "$(systemctl show -P MainPID "$unit")"
same_vm4 || fail "after the kill, vm4 over NBD"
systemctl reload "$unit"
same_vm4 || fail "after the upgrade, vm4 over NBD"
systemctl start mnt-vm1.mount
sha256sum -c /root/kept.sum
no_warnings
echo "== before the reboot all is well"
