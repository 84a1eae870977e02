# A full store under a block device, on an ext4 of $VDISK_FULL_SIZE (1 GiB by default). The levels of fill are told before data is
# refused. With no byte free, all that gives space back goes on, and when there is space again, so do writes.
# testdata/script/fullnbd.txt does the same over NBD.
set -euo pipefail
dmesg -C
fail() { echo "FAIL: $*" >&2; exit 1; }
pat() { head -c "$2" /dev/zero | tr '\0' "\\$1"; }                                                         # CHARACTER SIZE
put() { pat "$1" "$3M" | dd of="$dev" bs=1M seek="$2" iflag=fullblock oflag=direct conv=notrunc 2>/tmp/dd; } # CHARACTER MIB MIB
has() { dd if="$dev" bs=1M skip="$2" count="$3" iflag=direct 2>/dev/null | cmp - <(pat "$1" "$3M") || fail "$3 MiB at $2 are not $1"; }
refused() { if put "$@"; then fail "a write is not refused"; else grep 'No space left' /tmp/dd; fi; }
sound() { vdisk check "$@" | tee /tmp/check; grep -q '0 corrupt, 0 leaks' /tmp/check || fail check; }

modprobe loop
mkdir -p /mnt/full
truncate -s "${VDISK_FULL_SIZE:-1G}" "$VDISK_SCRATCH/full.img"
mkfs.ext4 -q -m 0 "$VDISK_SCRATCH/full.img"
mount -o loop "$VDISK_SCRATCH/full.img" /mnt/full
export VDISK_STORE=/mnt/full/store VDISK_WARN_AT=50,90
vdisk create v 8G --compress none
vdisk create w 64M --compress none
dev=$(vdisk attach w)
put 7 0 8
vdisk detach w
dev=$(vdisk attach v)
put 1 0 16
vdisk snapshot v@old
put 2 0 16
if vdisk events | grep fill; then fail "a level is told too early"; fi
at=16
while put 3 $at 8; do at=$((at + 8)); done
grep 'No space left' /tmp/dd
vdisk events -H | cut -f 2,4 | grep fill | tee /tmp/fill
[ "$(wc -l </tmp/fill)" = 2 ] && grep -q level=50 /tmp/fill && grep -q level=90 /tmp/fill || fail "the levels are not told once each"
sound

echo "== others take the last byte"
cat /dev/zero >/mnt/full/other.0 2>/dev/null || true
for i in $(seq 20); do # ext4 gives some blocks back that it reserved
	dd if=/dev/zero bs=1k oflag=append conv=notrunc,fsync of=/mnt/full/other.$i 2>/dev/null || true
	sync -f /mnt/full
	[ "$(stat -f -c %a /mnt/full)" -gt 4 ] || break
done
stat -f /mnt/full
[ "$(stat -f -c %a /mnt/full)" -le 4 ] || fail "there is free space"
refused 9 7000 1
has 2 0 16
has 3 16 1
vdisk export v@old /tmp/old.img
head -c 16M /tmp/old.img | cmp - <(pat 1 16M) || fail "the snapshot has changed"
blkdiscard -o 0 -l 8M "$dev"
has 0 0 8
has 2 8 8
vdisk rm v@old
vdisk gc
blkdiscard -o 16M -l 8M "$dev"
has 0 16 8
vdisk rm w
vdisk gc
sound --read-data

echo "== there is space again"
rm /mnt/full/other.*
put 5 7000 8
has 5 7000 8
has 2 9 7
vdisk snapshot v@new
sound --read-data
vdisk detach v
sound --read-data
umount /mnt/full || { sleep 2; umount /mnt/full; } # the daemon that attach has started ends by itself
if dmesg | grep -E 'hung task|blocked for more than|Oops|BUG:'; then fail "the kernel complained"; fi
