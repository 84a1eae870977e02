# A local user without rights, a container, and a copy of the store cannot harm disks that wait for their server. The user
# nobody holds files that look like the devices all the time.
set -euo pipefail
modprobe ublk_drv
export VDISK_STORE=$VDISK_SCRATCH/hostile-store VDISK_LOCK_TIMEOUT=60s
mkdir -p /mnt/a /mnt/orig /mnt/copy /tmp/hostile
cd /tmp/hostile
fail() {
	echo "FAIL: $*" >&2
	tail -n 30 "$VDISK_STORE/daemon.log" >&2 || true
	timeout 30 vdisk devices >&2 || true
	exit 1
}
trap 'fail "line $LINENO: $BASH_COMMAND"' ERR
set -E
v() { timeout -k 10 120 vdisk "$@"; }
refused() { # status text command...
	local want=$1 text=$2 code=0
	shift 2
	v "$@" >out 2>err || code=$?
	[ $code = "$want" ] || fail "vdisk $*: status $code, want $want: $(cat out err)"
	grep -qF -- "$text" err || fail "vdisk $* does not say '$text': $(cat err)"
}
owner() { local pid; read -r _ pid _ <"$VDISK_STORE/lock" && echo "$pid"; }
murder() { kill -KILL "$(owner)" || fail "there is no owner to kill"; }
noowner() {
	local n
	for n in $(seq 100); do [ -e "$VDISK_STORE/control.sock" ] || return 0; sleep 0.2; done
	fail "the owner did not end"
}
nobody() { setpriv --reuid=65534 --regid=65534 --clear-groups "$@"; }
sum() { dd if="$1" bs=64k count=16 iflag=direct status=none | md5sum; }

mkdir bin
cp "$(command -v vdisk)" bin/vdisk
PATH=$PWD/bin:$PATH
v create a --size 64M
dev=$(v attach a)
chmod 777 /tmp/hostile
# A file with a device's name, and both real nodes opened with O_PATH, which needs no permission.
nobody perl -e 'open(F, ">/tmp/hostile/ublkc0") or die; open(E, ">/tmp/hostile/ublkb0") or die; $0 = "vdisk";
	for (qw(/dev/ublkc0 /dev/ublkb0)) { sysopen(my $fh, $_, 010000000) or die $!; push @held, $fh } print "held\n"; close STDOUT; sleep 3000' >held &
decoy=$!
for n in $(seq 100); do grep -q held held && break; sleep 0.1; done
kill -0 $decoy || fail "the decoy did not start"

echo "== a decoy: recover, upgrade, detach"
murder
[ "$(v recover)" = "$dev" ] || fail "recover does not print $dev"
mv bin/vdisk bin/vdisk.old
cp bin/vdisk.old bin/vdisk
v upgrade
[ "$(readlink "/proc/$(owner)/exe")" = "$PWD/bin/vdisk" ] || fail "the old file runs: $(readlink "/proc/$(owner)/exe")"
dd if=/dev/urandom of="$dev" bs=1M count=1 oflag=direct status=none
v detach a
noowner
dev=$(v attach a)
murder
v detach --force a
[ ! -e "$dev" ] || fail "$dev is still there"

echo "== what is mounted in another mount namespace only is written back"
for end in "v detach --force a" 'kill -TERM $(owner)'; do
	dev=$(v attach a)
	mkfs.ext4 -q "$dev"
	rm -f ready
	unshare -m --propagation private sh -c "mount $dev /mnt/a && dd if=/dev/urandom of=/mnt/a/f bs=1M count=8 status=none
		md5sum </mnt/a/f >before; touch ready; exec sleep 1000" &
	holder=$!
	for n in $(seq 300); do [ -e ready ] && break; sleep 0.1; done
	eval "$end"
	noowner
	kill $holder
	wait $holder 2>/dev/null || true
	for n in $(seq 100); do [ -e "$dev" ] || break; sleep 0.1; done
	dev=$(v attach a)
	mount "$dev" /mnt/a
	md5sum </mnt/a/f >after
	cmp before after || fail "lost at: $end"
	umount /mnt/a
	v detach a
	noowner
done

echo "== a look from elsewhere forgets nothing"
dev=$(v attach a)
dd if=/dev/urandom of="$dev" bs=1M count=1 oflag=direct status=none
sum "$dev" >before
murder
for n in $(seq 100); do v devices | grep -q quiesced && break; sleep 0.1; done
cp "$VDISK_STORE/devices" devices.before
look() { # how, as a script for a mount namespace
	unshare -m --propagation private sh -c "$1 vdisk ls" >out 2>&1 || [ "$2" = refused ] || fail "$1: $(cat out)"
	cmp devices.before "$VDISK_STORE/devices" || fail "changed by: $1"
}
look "mount -t tmpfs none /dev/shm &&" refused
grep -q 'another /dev/shm' out || fail "$(cat out)"
bare='mkdir -p dev && mount -t tmpfs none dev && cp -a /dev/ublk-control /dev/null /dev/zero /dev/urandom dev/ && mkdir dev/shm && mount --bind /dev/shm dev/shm &&'
look "$bare mount --move dev /dev &&" works
look "$bare rm dev/ublk-control && mount --move dev /dev &&" works
look "umount -l /sys &&" works
look "mount -t tmpfs none /sys && mkdir -p /sys/class/ublk-char &&" works
unshare -p -f --mount-proc vdisk ls >out
cmp devices.before "$VDISK_STORE/devices"
[ "$(v recover)" = "$dev" ] || fail "not recovered after the looks"
sum "$dev" >after
cmp before after || fail "the content is another one"

echo "== a server that cannot be seen is not taken for dead"
unshare -p -f --mount-proc vdisk devices --prune --force "$dev" 2>err && fail "a served device was deleted"
[ -e "$dev" ] || fail "a served device was deleted"

echo "== a /dev/shm that somebody has filled"
v detach a
noowner
mount -o remount,size=40M /dev/shm
chmod 1777 /dev/shm
nobody sh -c 'cat /dev/zero >/dev/shm/fill' 2>/dev/null || true
[ "$(stat -c %s /dev/shm/fill)" -gt 20000000 ] || fail "/dev/shm is not full: $(df /dev/shm)"
dev=$(v attach a)
grep -q 'writes are slower' "$VDISK_STORE/daemon.log" || fail "there was room in /dev/shm"
for round in attached recovered upgraded; do
	[ $round != upgraded ] || v upgrade
	dd if=/dev/urandom of="$dev" bs=4k count=256 oflag=direct status=none
	sum "$dev" >before
	murder
	[ "$(v recover)" = "$dev" ] || fail "not recovered"
	sum "$dev" >after
	cmp before after || fail "answered writes of a disk that was $round are lost"
done
rm /dev/shm/fill
v detach a
noowner
v check --read-data

echo "== a copy of the store's file system"
modprobe loop
o=$VDISK_SCRATCH/o.img c=$VDISK_SCRATCH/c.img
truncate -s 400M "$o"
mkfs.ext4 -q "$o"
first=$(losetup -f --show "$o")
mount "$first" /mnt/orig
VDISK_STORE=/mnt/orig/store
v create c --size 32M
dev=$(v attach c)
dd if=/dev/urandom of="$dev" bs=1M count=1 oflag=direct status=none
sum "$dev" >before
murder
fsfreeze -f /mnt/orig
cp --sparse=always "$o" "$c"
fsfreeze -u /mnt/orig
second=$(losetup -f --show "$c")
mount "$second" /mnt/copy
copy() { v --store /mnt/copy/store "$@"; }
copy ls -H -o name,device | grep -qF "$dev (waits)" || fail "the copy does not say that the disk may be its own: $(copy ls)"
refused 5 "recover --moved c" --store /mnt/copy/store recover c
copy devices --prune 2>&1 | grep -q 'nothing to delete' || fail "the copy pruned"
copy detach --force c
[ -b "$dev" ] || fail "the copy deleted the original's device"
VDISK_STORE=/mnt/copy/store noowner
copy check
[ "$(v recover)" = "$dev" ] || fail "the original is not recovered"
sum "$dev" >after
cmp before after || fail "the content is another one"

echo "== the same file system, mounted anew"
murder
umount /mnt/orig /mnt/copy
losetup -d "$first"
losetup -d "$second"
first=$(losetup -f --show "$c") # so that the other one gets another number
second=$(losetup -f --show "$o")
mount "$second" /mnt/orig
refused 5 "recover --moved c" recover
[ "$(v recover --moved)" = "$dev" ] || fail "not recovered"
sum "$dev" >after
cmp before after || fail "the content is another one"
v detach c
noowner
v check --read-data
umount /mnt/orig
losetup -d "$first"
losetup -d "$second"
kill $decoy
[ "$(v devices --json | grep -c '"path"')" = 0 ] || fail "devices are left: $(v devices)"
