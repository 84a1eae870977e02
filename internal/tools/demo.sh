#!/bin/bash
# demo.sh: vdisk's main job on a real ext4 image of a real tree (Go's standard library): import, serve
# or attach, check, snapshot while it is written, clone, change the clone, see that the base did not change.
# Needs no root. Uses ublk if the kernel has it and this user may use it, and otherwise NBD.
set -euo pipefail
cd "$(dirname "$0")/../.."
vdisk=$PWD/bin/vdisk
work=$(mktemp -d "${TMPDIR:-/tmp}/vdisk-demo.XXXXXX")
export VDISK_STORE=$work/store
server='' device=''

cleanup() {
	[ -z "$device" ] || "$vdisk" detach "$device" >/dev/null 2>&1 || true
	if [ -n "$server" ]; then
		kill "$server" 2>/dev/null || true
		wait "$server" 2>/dev/null || true
	fi
	rm -rf "$work"
}
trap cleanup EXIT

say() { printf '\n\033[1m%s\033[0m\n' "$*"; }
run() { printf '  $ %s\n' "$(sed "s#$vdisk#vdisk#; s#$work/##g" <<<"$*")"; "$@"; }
sum() { sha256sum "$1" | cut -c1-64; }
export_sum() { "$vdisk" export "$1" - | sha256sum | cut -c1-64; }
now() { date +%s%N; }
micros() { echo $((($(now) - $1) / 1000)); }
median() { sort -n | awk '{a[NR]=$1} END {print a[int((NR+1)/2)]}'; }

say "1. A real file system: ext4 with Go's source tree"
tree=$(go env GOROOT)/src
truncate -s 1G "$work/base.img"
PATH=$PATH:/usr/sbin mkfs.ext4 -q -d "$tree" "$work/base.img"
want=$(sum "$work/base.img")
printf '  base.img: 1 GiB, %s in use, sha256 %s…\n' "$(du -h "$work/base.img" | cut -f1)" "${want:0:16}"

say "2. Import it into a compressed volume"
run "$vdisk" -q create golden --from "$work/base.img"
[ "$(export_sum golden)" = "$want" ] || { echo "the volume differs from the image"; exit 1; }
echo "  exported again: the same sha256"

say "3. Give it to clients"
has_ublk() { "$vdisk" features --json | awk '/"ublk"/ {u = 1} u && /"available"/ {exit !/true/}'; }
if has_ublk && device=$("$vdisk" attach golden); then
	echo "  attached as $device (ublk)"
	target=(--ioengine=libaio --direct=1 --filename="$device")
	got=$(sum "$device")
else
	device=''
	echo '  $ vdisk serve --socket nbd.sock &'
	"$vdisk" -q serve --socket "$work/nbd.sock" >/dev/null &
	server=$!
	for _ in $(seq 100); do [ -S "$work/nbd.sock" ] && break; sleep 0.1; done
	uri="nbd+unix:///golden?socket=$work/nbd.sock"
	target=(--ioengine=nbd --uri="$uri")
	nbdinfo "$uri" | sed -n 's/^\t\(export-size\|can_flush\|can_fua\|can_trim\|can_multi_conn\).*/  &/p'
	nbdcopy "$uri" "$work/copy.img"
	got=$(sum "$work/copy.img")
	rm "$work/copy.img"
fi
[ "$got" = "$want" ] || { echo "what is served differs from the image"; exit 1; }
echo "  read through it: the same sha256"

say "4. Snapshots while it is being written"
fio --name=load "${target[@]}" --rw=randwrite --bs=4k --iodepth=16 --offset=900M --size=100M \
	--time_based --runtime=10 --buffer_compress_percentage=50 --refill_buffers >"$work/fio.out" 2>&1 &
load=$!
sleep 2
snaps='' clones=''
for i in $(seq 15); do
	t=$(now); "$vdisk" snapshot "golden@s$i"; snaps+="$(micros "$t")"$'\n'
	t=$(now); "$vdisk" clone "golden@s$i" "clone$i"; clones+="$(micros "$t")"$'\n'
	sleep 0.2
done
kill -INT $load 2>/dev/null || true
wait $load || true
if ! grep -qE 'WRITE:|write:' "$work/fio.out"; then cat "$work/fio.out"; exit 1; fi
snapshot_us=$(median <<<"${snaps%$'\n'}") clone_us=$(median <<<"${clones%$'\n'}")
grep -E '^ +write: IOPS' "$work/fio.out" | sed 's/^ */  load: /'

say "5. A clone is a disk of its own"
before=$(export_sum golden@s15)
printf 'changed in the clone only' >"$work/note"
"$vdisk" -q export clone15 "$work/clone.img"
[ "$(sum "$work/clone.img")" = "$before" ] || { echo "the clone differs from its snapshot"; exit 1; }
echo "  the clone is what the snapshot is"
if [ -n "$device" ]; then
	other=$("$vdisk" attach clone15)
	dd if="$work/note" of="$other" bs=512 seek=100000 conv=notrunc,fsync status=none
	"$vdisk" detach "$other"
else
	fio --name=w --ioengine=nbd --uri="nbd+unix:///clone15?socket=$work/nbd.sock" --rw=write --bs=64k --size=64M --end_fsync=1 >/dev/null
fi
[ "$(export_sum clone15)" != "$before" ] || { echo "the clone did not change"; exit 1; }
[ "$(export_sum golden@s15)" = "$before" ] || { echo "THE BASE CHANGED"; exit 1; }
echo "  the clone changed, the snapshot did not: sha256 ${before:0:16}… as before"

say "6. Check everything, every byte of data too"
run "$vdisk" check --read-data

say "The result"
read -r logical stored < <("$vdisk" info golden --json | tr -d ' ",' | awk -F: '
	$1 == "size" && !l {l = $2} $1 == "mapped" {m = $2} $1 == "referenced" {s = $2} END {print m, s}')
awk -v l="$logical" -v s="$stored" -v sn="$snapshot_us" -v cl="$clone_us" 'BEGIN {
	printf "  %-34s %10.1f MiB\n", "logical size (data of the volume)", l/1048576
	printf "  %-34s %10.1f MiB\n", "stored size", s/1048576
	printf "  %-34s %10.2f\n", "ratio", l/s
	printf "  %-34s %10.1f ms  (the whole command, median of 15)\n", "a snapshot, under load", sn/1000
	printf "  %-34s %10.1f ms  (the whole command, median of 15)\n", "a clone, under load", cl/1000
}'
