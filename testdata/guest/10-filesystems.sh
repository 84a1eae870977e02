# On /dev/ublkbN: mkfs, mount, a real tree, a snapshot under fio load, and a clone of it that is attached too. fsck finds
# no error, the content is that of the moment of the snapshot, and the device is gone after detach.
set -euo pipefail
dmesg -C # drop the messages of earlier tests, which cause errors on purpose
export VDISK_STORE=$VDISK_SCRATCH/fs-store
mkdir -p /mnt/a /mnt/b
fail() { echo "FAIL: $*" >&2; exit 1; }
sums() { (cd "$1" && find . -type f ! -path './load/*' -print0 | sort -z | xargs -0 sha256sum); }

for fs in ext4 xfs; do
	echo "== $fs"
	vdisk create "$fs" --size 1G
	dev=$(vdisk attach "$fs")
	[ -b "$dev" ] || fail "attach printed '$dev'"
	[ "$(blockdev --getss "$dev")" = 512 ] || fail "logical block of $dev"
	[ "$(blockdev --getpbsz "$dev")" = 4096 ] || fail "physical block of $dev"
	if [ $fs = ext4 ]; then mkfs.ext4 -q "$dev"; else mkfs.xfs -q "$dev"; fi
	mount "$dev" /mnt/a
	cp -a /usr/share /mnt/a/tree
	mkdir /mnt/a/load
	sync -f /mnt/a
	sums /mnt/a >/tmp/at-snapshot

	fio --name=load --directory=/mnt/a/load --rw=randrw --bs=4k --size=64M --numjobs=2 --iodepth=8 --ioengine=libaio \
		--direct=1 --time_based --runtime=8 --output=/tmp/fio.out &
	load=$!
	sleep 3
	vdisk snapshot "$fs@s1"
	echo changed >/mnt/a/after-the-snapshot
	rm -r /mnt/a/tree/doc 2>/dev/null || true
	wait $load || { cat /tmp/fio.out; fail "fio"; }

	vdisk clone "$fs@s1" "$fs-clone"
	clone=$(vdisk attach "$fs-clone")
	if [ $fs = ext4 ]; then mount "$clone" /mnt/b; else mount -o nouuid "$clone" /mnt/b; fi
	[ ! -e /mnt/b/after-the-snapshot ] || fail "the snapshot has what came after it"
	sums /mnt/b >/tmp/in-clone
	cmp /tmp/at-snapshot /tmp/in-clone || fail "the clone's content is not the snapshot's"
	echo "$(wc -l </tmp/in-clone) files in the clone are as at the snapshot"
	echo mine >/mnt/b/only-in-the-clone
	if vdisk detach "$clone" 2>/tmp/err; then fail "detached a mounted device"; else [ $? = 5 ] || fail "exit status $? for a busy device"; fi
	cat /tmp/err
	umount /mnt/b
	umount /mnt/a
	for d in "$dev" "$clone"; do
		if [ $fs = ext4 ]; then e2fsck -fn "$d"; else xfs_repair -n "$d" >/tmp/xr 2>&1 || { cat /tmp/xr; fail "xfs_repair"; }; fi
	done
	vdisk detach "$fs-clone"
	vdisk detach "$dev"
	for d in "$dev" "$clone"; do
		[ ! -e "$d" ] || fail "$d is still there"
	done
	vdisk check --read-data
done
! dmesg | grep -E 'hung task|blocked for more than|I/O error|Oops|BUG:' || fail "the kernel complained"
