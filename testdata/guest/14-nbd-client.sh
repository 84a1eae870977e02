# The kernel's own NBD client on a volume, by several connections, which outlive the process that made them. A file system on
# it goes on over upgrades of the server.
set -euo pipefail
modprobe nbd
export VDISK_STORE=$VDISK_SCRATCH/nbd-store VDISK_LOCK_TIMEOUT=60s
mkdir -p /mnt/nbd /tmp/nbd/bin
cd /tmp/nbd
fail() {
	echo "FAIL: $*" >&2
	tail -n 30 daemon.log >&2 || true
	exit 1
}
trap 'fail "line $LINENO: $BASH_COMMAND"' ERR
set -E
v() { timeout -k 10 120 vdisk "$@"; }
daemon() {
	vdisk daemon --nbd /tmp/nbd/sock 2>>daemon.log &
	for n in $(seq 300); do
		v clients >/dev/null 2>&1 && [ -S sock ] && return
		sleep 0.1
	done
	fail "the daemon did not start"
}
three() { [ "$(v clients | grep -c read-write)" = 3 ] || fail "there are not three connections that write: $(v clients)"; }
owner() { local pid; read -r _ pid _ <"$VDISK_STORE/lock" && echo "$pid"; }

cp "$(command -v vdisk)" bin/vdisk
PATH=$PWD/bin:$PATH
v create vm --size 128M
daemon
timeout 60 nbd-client -unix /tmp/nbd/sock /dev/nbd0 -name vm -connections 3 -timeout 60
three
mkfs.ext4 -q /dev/nbd0
mount /dev/nbd0 /mnt/nbd
fio --name=load --directory=/mnt/nbd --rw=randwrite --bs=4k --size=8M --ioengine=libaio --direct=1 --iodepth=8 --rate_iops=150 \
	--verify=crc32c --do_verify=0 --fsync=64 --output=fio.out &
load=$!
for i in 1 2; do
	sleep 1
	cp bin/vdisk bin/new && mv bin/new bin/vdisk # another file
	before=$(readlink "/proc/$(owner)/exe")
	v upgrade
	echo "upgrade $i: $before, then $(readlink "/proc/$(owner)/exe")"
	three
done
wait $load || fail "fio: $(cat fio.out)"
umount /mnt/nbd
mount /dev/nbd0 /mnt/nbd
fio --name=load --directory=/mnt/nbd --rw=randread --bs=4k --size=8M --verify=crc32c --verify_only --output=verify.out || fail "$(cat verify.out)"
if dmesg | grep -E 'nbd0.*(error|timed out|shutting)|I/O error.*nbd0'; then fail "the kernel met errors"; fi
v snapshot vm@s
umount /mnt/nbd
timeout 60 nbd-client -d /dev/nbd0
kill -TERM "$(owner)"
wait
v check --read-data
e2fsck -fn "$(v attach vm)" || fail "e2fsck"
v detach vm
echo "nbd-client: a file system over two upgrades, on three connections"
