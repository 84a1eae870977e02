# The Debian package under systemd, after the reboot: disks and mounts are back; a disk in use keeps the package; purging it
# keeps the store.
set -eu
export VDISK_LOCK_TIMEOUT=2m # an emulated guest may be slow
fail() { echo "FAIL: $*"; systemctl status --no-pager -l 'vdisk@*' mnt-vm1.mount || true; journalctl -b --no-pager | tail -60; exit 1; }
unit=vdisk@var-lib-vdisk.service

echo "== after the reboot"
systemctl is-active "$unit" || fail "the service is not there"
n=0
until mountpoint -q /mnt/vm1; do n=$((n + 1)); [ $n -lt 300 ] || fail "not mounted"; sleep 0.2; done
sha256sum -c /root/kept.sum || fail "the content is another"
[ "$(blockdev --getro /dev/disk/vdisk/vm2)" = 1 ] || fail "vm2"
! journalctl -b --no-pager | grep -i 'ordering cycle' || fail "units wait for each other"

echo "== a disk in use keeps the package"
! dpkg --remove vdisk || fail "the package was removed under a mounted file system"
mountpoint -q /mnt/vm1 && sha256sum -c /root/kept.sum || fail "the removal has harmed the disk"
[ -x /usr/bin/vdisk ] || fail "the program is gone"

echo "== purge"
umount /mnt/vm1
dpkg --purge vdisk
[ ! -e /usr/bin/vdisk ] && [ ! -e /etc/default/vdisk ] || fail "something is left"
[ -z "$(find /etc/systemd -name 'vdisk*')" ] || fail "enabled still"
[ -z "$(ls /dev/ublkb* 2>/dev/null)" ] || fail "a disk is left"
[ -s /var/lib/vdisk/meta.db ] || fail "the store is gone"
dpkg -i /payload/new.deb
vdisk check --read-data
vdisk ls
echo "== all is well"
