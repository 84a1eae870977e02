# Block devices outlive their server. The server is killed again and again under fio's verification and under a mounted
# file system, upgraded, and killed while it recovers. No user may see an error or a lost write.
# RECOVERY_KILLS, RECOVERY_AGAIN (kills while it recovers) and RECOVERY_UPGRADES make it longer (make recovery-test).
set -euo pipefail
kills=${RECOVERY_KILLS:-3} again=${RECOVERY_AGAIN:-3} upgrades=${RECOVERY_UPGRADES:-3}
modprobe ublk_drv
dmesg -C # drop the messages of earlier tests, which cause errors on purpose
export VDISK_STORE=$VDISK_SCRATCH/recovery-store VDISK_LOCK_TIMEOUT=60s # everything is emulated here
mkdir -p /mnt/a /tmp/recovery
cd /tmp/recovery
fail() {
	echo "FAIL: $*" >&2
	tail -n 40 "$VDISK_STORE/daemon.log" >&2 || true
	timeout 30 vdisk devices >&2 || true
	exit 1
}
trap 'fail "line $LINENO: $BASH_COMMAND"' ERR
set -E
v() { timeout -k 10 180 vdisk "$@"; }
refused() { # status text command...
	local want=$1 text=$2 code=0
	shift 2
	v "$@" >out 2>err || code=$?
	[ $code = "$want" ] || fail "vdisk $*: status $code, want $want: $(cat out err)"
	grep -qF -- "$text" err || fail "vdisk $* does not say '$text': $(cat err)"
}
owner() { local pid; read -r _ pid _ <"$VDISK_STORE/lock" && echo "$pid"; }
murders=0
murder() {
	local pid
	pid=$(owner)
	kill -KILL "$pid" || fail "there is no owner to kill ($pid)"
	murders=$((murders + 1))
}
settled() { # nobody hangs
	local n d
	for n in $(seq 100); do
		d=$(ps -eo stat=,pid=,comm= | awk '$1 ~ /^D/ && $3 !~ /^(kworker|jbd2)/')
		[ -n "$d" ] || return 0
		sleep 0.3
	done
	fail "in D state: $d"
}
# load DEVICE: writes and verifies until there is a file "stop", in the background.
load() {
	rm -f stop bad rounds
	(
		n=0
		while [ ! -e stop ]; do
			fio --name=verify --filename="$1" --rw=randwrite --bsrange=512-64k --blockalign=512 --size=12M --io_size=12M --numjobs=2 --offset_increment=16M \
				--ioengine=libaio --iodepth=8 --direct=1 --verify=crc32c --verify_fatal=1 --verify_backlog=64 --do_verify=1 --randseed=$n \
				--buffer_compress_percentage=50 --output=fio.out || { touch bad; exit 1; }
			n=$((n + 1))
			echo $n >rounds
		done
	) &
	loader=$!
}
stopload() {
	touch stop
	wait $loader || { cat fio.out >&2; fail "fio"; }
	[ ! -e bad ] || fail "fio"
	echo "fio verified in $(cat rounds) rounds"
}
pause() { sleep "0.$((RANDOM % 9 + 1))"; }

v create v --size 128M
dev=$(v attach v)
v features
[ "$(v features --json | grep -c '"available": false')" = "$(v features --json | grep -A1 -E 'nbd_client' | grep -c false)" ] || fail "not safe when memory is short"

# Meanwhile a local user without rights holds files that look like the devices, and fills the shared memory again and again.
mount -o remount,size=64M /dev/shm
chmod 1777 /dev/shm
setpriv --reuid=65534 --regid=65534 --clear-groups perl -e 'open(F, ">/tmp/ublkc0") or die; $0 = "vdisk";
	for (qw(/dev/ublkc0 /dev/ublkb0)) { sysopen(my $fh, $_, 010000000) or die $!; push @held, $fh }
	while (getppid() != 1) {
		open(S, ">/dev/shm/fill") or die; while (syswrite(S, "x" x 1048576)) {}
		select(undef, undef, undef, rand 2); unlink "/dev/shm/fill"; close S; select(undef, undef, undef, rand 2) }' &
hostile=$!
# In its own folder it replaces files of a store of root's by links to other files of root's, while root uses that store.
# Root's commands may fail there, but they must neither wait nor write elsewhere. If they succeed, they have done their work.
theirs=$VDISK_SCRATCH/nobody
mkdir "$theirs"
VDISK_STORE=$theirs/store v create t --size 1M
chown 65534:65534 "$theirs"
echo untouched >canary
setpriv --reuid=65534 --regid=65534 --clear-groups sh -c "cd $theirs"'
	mkdir links
	for f in lock owner owner.tmp devices devices.tmp daemon.log daemon.log.old format meta.db control.sock; do
		ln -s /tmp/recovery/canary links/$f
	done
	ln -s /tmp/recovery links/chunks
	while :; do
		mv store true; cp -a links store; sleep 0.1
		rm -r store; ln -s /tmp/recovery store; rm store; mkfifo store; rm store
		mv true store; sleep 0.5
	done' 2>/dev/null &
racer=$!
(
	n=0
	while [ ! -e peace ]; do
		n=$((n + 1)) code=0
		VDISK_STORE=$theirs/store VDISK_LOCK_TIMEOUT=1s timeout -s QUIT -k 10 120 vdisk snapshot t@$n 2>said || code=$?
		[ $code -lt 124 ] || { echo "status $code" >hung; cat said >>hung; break; } # with the stacks of its goroutines
		[ $code != 0 ] || echo $n >>taken
		sleep 1
	done
) &
snapshots=$!
peace() {
	touch peace
	wait $snapshots
	kill $racer
	wait $racer 2>/dev/null || true
	[ ! -e hung ] || fail "a command in a folder of nobody's hangs: $(cat hung)"
	[ "$(cat canary)" = untouched ] || fail "a file outside of the store was written to: $(cat canary)"
	[ ! -d "$theirs/true" ] || { rm -rf "$theirs/store"; mv "$theirs/true" "$theirs/store"; }
	[ -s taken ] || fail "no snapshot was taken beside a hostile user"
	for n in $(cat taken); do
		VDISK_STORE=$theirs/store v info "t@$n" >/dev/null || fail "t@$n was taken, and is not there"
	done
	VDISK_STORE=$theirs/store v check --read-data
	echo "$(wc -l <taken) snapshots taken beside a hostile user"
}

echo "== $kills kills under fio"
load "$dev"
for i in $(seq "$kills"); do
	sleep 1; pause
	[ ! -e bad ] || { cat fio.out; fail "fio after kill $i"; }
	murder
	pause
	[ "$(v recover)" = "$dev" ] || fail "recover does not print $dev"
	[ $((i % 20)) != 0 ] || echo "$i kills"
done
stopload
settled
v recover 2>err
grep -q 'nothing waits' err || fail "recover says: $(cat err)"

echo "== $again kills while it recovers"
load "$dev"
for i in $(seq "$again"); do
	sleep 0.5
	murder
	v recover >/dev/null 2>&1 &
	r=$!
	sleep "$(((i * 7) % 10 / 5)).$(((i * 3) % 10))"
	if kill -KILL "$(owner)" 2>/dev/null; then murders=$((murders + 1)); fi # it may be dead already, or not started yet
	wait $r || true
	[ "$(v recover | head -1)" = "$dev" ] || v info | grep -q "attached *v as $dev" || fail "not recovered after a kill in recovery $i"
done
stopload

echo "== $upgrades upgrades under fio"
mkdir -p bin
cp "$(command -v vdisk)" bin/vdisk
murder
PATH=$PWD/bin:$PATH v recover
load "$dev"
for i in $(seq "$upgrades"); do
	sleep 1; pause
	[ ! -e bad ] || { cat fio.out; fail "fio after upgrade $i"; }
	cp bin/vdisk bin/new && mv bin/new bin/vdisk
	before=$(owner)
	v upgrade
	[ "$(owner)" = "$before" ] || fail "another process"
done
stopload
v detach v
v check --read-data
settled
peace

echo "== a mounted file system"
dev=$(v attach v)
mkfs.ext4 -q "$dev"
mount "$dev" /mnt/a
cp -a /usr/share/perl* /usr/share/fio /mnt/a/ 2>/dev/null || cp -a /usr/share/bash-completion /mnt/a/
sync -f /mnt/a
for i in $(seq 3); do
	(for n in $(seq 40); do echo "$i $n" >/mnt/a/f$i.$n; sync /mnt/a/f$i.$n; done) &
	writer=$!
	pause
	murder
	pause
	v recover
	wait $writer || fail "writing while the server was killed"
	v upgrade
done
(cd /mnt/a && find . -type f -print0 | sort -z | xargs -0 sha256sum) >before
v snapshot v@s

echo "== a volume that waits"
murder
says="v waits as $dev for its server: run 'vdisk recover', or 'vdisk detach --force v' to give it up"
refused 5 "$says" rm v -r
refused 5 "$says" rollback v@s
refused 5 "$says" resize v 32M --shrink
refused 5 "$says" detach v
refused 5 "$says" export v -
refused 5 "$says" serve --socket /tmp/recovery/s v
v snapshot v@while-waiting
v ls -o name,device | grep -qF "v     $dev (waits)" || fail "ls does not show it: $(v ls -o name,device)"
v info | grep -qE "^waits +v as $dev" || fail "info does not show it"
v devices | grep -qE "^$dev +128MiB +quiesced +v +-" || fail "devices does not show it: $(v devices)"
v attach v@s >other # starts a daemon, which recovers
[ "$(v recover 2>/dev/null)" = "" ] || fail "attach has not recovered"
umount /mnt/a
mount "$dev" /mnt/a
(cd /mnt/a && find . -type f -print0 | sort -z | xargs -0 sha256sum) >after
cmp before after || fail "the content is another one"
refused 5 "mounted" detach v
v stats v
v stats v --interval 100ms --count 2 --json >/dev/null

echo "== an owner that does not become ready"
murder
mv "$VDISK_STORE/daemon.log" unready.log
mkdir "$VDISK_STORE/daemon.log"
refused 1 "daemon.log" recover # by then it has recovered them, and it leaves them
v devices | grep -qE "^$dev +128MiB +quiesced +v +-" || fail "devices: $(v devices)"
rmdir "$VDISK_STORE/daemon.log"
v recover
echo again >/mnt/a/again
sync /mnt/a/again

echo "== resize"
if v resize v 256M 2>err; then
	[ "$(blockdev --getsize64 "$dev")" = $((256 << 20)) ] || fail "size of $dev"
	resize2fs "$dev"
	[ "$(df -k --output=size /mnt/a | tail -1)" -gt 190000 ] || fail "size of the file system"
	murder
	v recover
	dd if=/dev/urandom of=/mnt/a/more bs=1M count=60 conv=fsync status=none
else
	case $(uname -r) in 6.1[0-5].*) ;; *) fail "$(cat err)" ;; esac
	grep -q 'Linux 6.16' err || fail "$(cat err)"
	[ "$(blockdev --getsize64 "$dev")" = $((128 << 20)) ] || fail "size of $dev"
	v info v --json | grep -q '"size": 134217728' || fail "the volume has changed"
fi
refused 5 "" resize v 32M --shrink

echo "== a store on a disk that waits"
v --store /mnt/a/inner create i --size 4M
murder
start=$SECONDS
refused 5 "waits for its server" --store /mnt/a/inner ls
refused 5 "waits for its server" --store /mnt/a/inner attach i
[ $((SECONDS - start)) -lt 30 ] || fail "refusing took $((SECONDS - start)) s"
v recover
v --store /mnt/a/inner ls
rm -r /mnt/a/inner

echo "== another mount namespace"
murder
v detach --force v@s
unshare -m --propagation private vdisk daemon >ns.log 2>&1 &
for n in $(seq 200); do grep -q msg=ready ns.log && break; sleep 0.2; done
grep -q ublkb "/proc/$(owner)/mountinfo" && fail "a copy of the mount: $(grep ublkb "/proc/$(owner)/mountinfo")"
grep -q ublkb /proc/self/mountinfo || fail "the mount is gone"
v features | grep -A9 'safe when'
cmp /mnt/a/f1.1 <(echo 1 1)
umount /mnt/a
e2fsck -fn "$dev"
v detach v
kill "$(owner)"
wait %% 2>/dev/null || true
settled
v check --read-data

echo "== a disk that was attached to an NBD server"
v serve --socket /tmp/recovery/nbd 2>serve.log >/dev/null &
for n in $(seq 200); do [ -S "$VDISK_STORE/control.sock" ] && [ -S nbd ] && break; sleep 0.2; done
dev=$(v attach v)
mount "$dev" /mnt/a
server=$(owner)
kill -INT "$server"
wait %% 2>/dev/null || true
[ "$(owner)" != "$server" ] || fail "there is no other owner"
grep -q 'a daemon serves' serve.log || fail "serve says: $(cat serve.log)"
echo handed over >/mnt/a/handed
sync /mnt/a/handed
umount /mnt/a
v detach v
for n in $(seq 100); do [ -e "$VDISK_STORE/control.sock" ] || break; sleep 0.3; done
settled
v check --read-data

complaints() { dmesg | grep -E "$1" && fail "the kernel complained" || true; }
complaints 'hung task|blocked for more|blocked in I/O|I/O error|Oops|BUG:'

echo "== giving up" # from here on users, and udev's probes, must see errors
dev=$(v attach v)
mount "$dev" /mnt/a
murder
v detach --force v
[ ! -e "$dev" ] || fail "$dev is still there"
umount -l /mnt/a
dev=$(v attach v)
mount "$dev" /mnt/a
v detach --force v
[ ! -e "$dev" ] || fail "$dev is still there"
umount /mnt/a || umount -l /mnt/a
refused 3 "not attached" detach --force v

echo "== devices that are not ours"
dev=$(v attach v)
murder
sed -i 's/"cookie":"\(........\)......../"cookie":"\100000001/' "$VDISK_STORE/devices"
[ -z "$(v recover 2>err)" ] || fail "recovered a device with another cookie"
v devices | grep -qE "^$dev +.*quiesced +- +-" || fail "devices: $(v devices)"
v devices --prune 2>&1 | grep -q 'nothing to delete' || fail "pruned what waits"
refused 5 "waits to be recovered" devices --prune "$dev"
v devices --prune --force "$dev" | grep -qF "$dev" || fail "not deleted"
[ ! -e "$dev" ] || fail "$dev is still there"
for n in $(seq 100); do [ -e "$VDISK_STORE/control.sock" ] || break; sleep 0.3; done
dev=$(v attach v)
murder
sed -i 's/"boot":"..../"boot":"0000/' "$VDISK_STORE/devices"
v ls -H -o name,device | grep -qP '^v\t-$' || fail "ls: $(v ls -H -o name,device)"
v devices --prune --force "$dev"
[ ! -e "$dev" ] || fail "$dev is still there"
v devices --prune 2>&1 | grep -q 'nothing to delete' || fail "prune"
v rm v -r
v check --read-data
settled
complaints 'hung task|blocked for more|blocked in I/O|Oops|BUG:'
[ "$(v devices --json | grep -c '"path"')" = 0 ] || fail "devices are left: $(v devices)"
kill $hostile || fail "the hostile user is gone"
rm -f /dev/shm/fill
mount -o remount,size=50% /dev/shm
echo "proof: kills over ublk: $murders"
