# The Debian package under systemd, after the reboot: disks and mounts are back; a disk in use keeps the package; purging it
# keeps the store.
. /payload/lib.sh

echo "== after the reboot"
systemctl is-active "$unit" || fail "the service is not there"
until_true 60 mountpoint -q /mnt/vm1
sha256sum -c /root/kept.sum || fail "the content is another"
[ "$(blockdev --getro /dev/disk/vdisk/vm2)" = 1 ] || fail "vm2"
! journalctl -b --no-pager | grep -i 'ordering cycle' || fail "units wait for each other"
systemctl is-active "$auto.timer" "$nbd" || fail "the timer or the socket is not there"
same_vm4 || fail "vm4 over NBD"
no_warnings

echo "== an NBD client keeps the package"
qemu-io -r -f raw "$(uri vm4)" -c 'sleep 3600000' & client=$!
until_true 60 sh -c "vdisk clients --json | grep -q '\"client\":'"
! dpkg --remove vdisk 2>&1 | tee /tmp/remove || fail "the package was removed under a client"
grep -q 'NBD clients are connected' /tmp/remove || fail "it was not the client that kept the package"
kill $client
until_true 60 sh -c "! vdisk clients --json | grep -q '\"client\":'"

echo "== a disk in use keeps the package"
! dpkg --remove vdisk 2>&1 | tee /tmp/remove || fail "the package was removed under a mounted file system"
grep -q 'is a disk of /var/lib/vdisk' /tmp/remove || fail "it was not the disk that kept the package"
mountpoint -q /mnt/vm1 && sha256sum -c /root/kept.sum || fail "the removal has harmed the disk"
[ -x /usr/bin/vdisk ] || fail "the program is gone"

echo "== purge"
umount /mnt/vm1
dpkg --purge vdisk
[ ! -e /usr/bin/vdisk ] && [ ! -e /etc/default/vdisk ] || fail "something is left"
[ -z "$(find /etc/systemd -name 'vdisk*')" ] || fail "enabled still"
none_loaded
[ -z "$(ls /dev/ublkb* 2>/dev/null)" ] || fail "a disk is left"
[ -s /var/lib/vdisk/meta.db ] || fail "the store is gone"
dpkg -i /payload/new.deb
vdisk check --read-data
vdisk ls
echo "== all is well"
