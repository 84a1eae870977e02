# A snapshot of a frozen file system needs no recovery, and has what was written before it. Writers go on afterwards,
# whatever becomes of the command.
set -euo pipefail
dmesg -C
export VDISK_STORE=$VDISK_SCRATCH/freeze-store
mkdir -p /mnt/a /mnt/b
fail() { echo "FAIL: $*" >&2; exit 1; }
exits() { want=$1; shift; got=0; "$@" >/tmp/out 2>/tmp/err || got=$?; [ "$got" = "$want" ] || { cat /tmp/err; fail "$*: exit status $got, not $want"; }; }
writes() { timeout 300 sh -c 'echo x >/mnt/a/still' || fail "the file system is frozen"; }

for fs in ${FREEZE_FS:-ext4}; do # or "ext4 xfs"
	echo "== $fs"
	vdisk create "$fs" --size 1G
	vdisk create "$fs-other" --size 64M
	dev=$(vdisk attach "$fs")
	other=$(vdisk attach "$fs-other")
	"mkfs.$fs" -q "$dev"
	mount "$dev" /mnt/a
	fio --name=load --directory=/mnt/a --rw=randwrite --bs=4k --size=32M --ioengine=libaio --iodepth=4 --rate_iops=200 --time_based --runtime=600 \
		--output=/tmp/fio.out &
	load=$!
	sleep 2
	echo before >/mnt/a/file # in memory only
	vdisk snapshot "$fs@clean" --freeze /mnt/a
	writes
	vdisk snapshot --auto "$fs" --freeze /mnt/a | grep -q "^$fs@auto-" || fail "no automatic snapshot"
	writes

	# The device is mounted as it is: without a recovery, which a read-only device would refuse.
	snap=$(vdisk attach "$fs@clean" --read-only)
	if [ $fs = ext4 ]; then
		if dumpe2fs -h "$snap" 2>/dev/null | grep -q needs_recovery; then fail "it needs recovery"; fi
		mount -o ro,noload "$snap" /mnt/b
		e2fsck -fn "$snap" || fail "e2fsck"
	else
		mount -o ro,norecovery,nouuid "$snap" /mnt/b
	fi
	[ "$(cat /mnt/b/file)" = before ] || fail "the snapshot lacks what was in memory"
	umount /mnt/b
	vdisk detach "$fs@clean"

	# Refused: another volume, no mount point, the store's own file system, and one that somebody else has frozen.
	exits 2 vdisk snapshot "$fs-other@s" --freeze /mnt/a
	exits 2 vdisk snapshot "$fs@s" --freeze /mnt
	exits 2 vdisk snapshot "$fs@s" --freeze "$VDISK_SCRATCH"
	fsfreeze --freeze /mnt/a
	exits 5 vdisk snapshot "$fs@s" --freeze /mnt/a
	fsfreeze --unfreeze /mnt/a
	exits 4 vdisk snapshot "$fs@clean" --freeze /mnt/a # while it is frozen, it turns out that the name is taken
	writes

	# The limit passes, or a signal comes, at any moment: the file system is thawed, and there is a snapshot or an error.
	for i in 1 2 3; do
		limit=10s
		[ $((i % 3)) != 0 ] || limit=1us
		vdisk snapshot "$fs@t$i" --freeze /mnt/a --freeze-timeout $limit >/tmp/out 2>/tmp/err &
		command=$!
		if [ $limit = 10s ]; then
			sleep 0.$i
			kill -TERM $command 2>/dev/null || true
		fi
		got=0
		wait $command || got=$?
		writes
		echo "limit $limit: exit status $got"
		case $got in
		0) vdisk info "$fs@t$i" >/dev/null || fail "no snapshot" ;;
		1) # thawed too early; the owner may have been quicker than the command, which says so then
			grep -q 'it is not known whether' /tmp/err || exits 3 vdisk info "$fs@t$i"
			;;
		143) ;;
		*) cat /tmp/err; fail "exit status $got" ;;
		esac
	done
	kill $load
	wait $load || true
	umount /mnt/a
	vdisk detach "$dev"
	vdisk detach "$other"
	vdisk check --read-data
done
! dmesg | grep -E 'hung task|blocked for more than|I/O error|Oops|BUG:' || fail "the kernel complained"
