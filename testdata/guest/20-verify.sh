# fio --verify=crc32c with mixed block sizes and four jobs, then a full read-back: on ublk and on NBD, before
# and after a snapshot, and again after the store was opened anew.
set -euo pipefail
modprobe ublk_drv
dmesg -C # drop the messages of earlier tests, which cause errors on purpose
export VDISK_STORE=$VDISK_SCRATCH/verify-store
fail() { echo "FAIL: $*" >&2; exit 1; }
job() { # write|read target...
	local how=$1; shift
	local rw=(--rw=randwrite --do_verify=1)
	[ "$how" = write ] || rw=(--rw=randwrite --verify_only)
	fio --name=v "$@" "${rw[@]}" --bsrange=512-256k --bs_unaligned=0 --blockalign=512 --numjobs=4 --size=12M --offset_increment=48M \
		--iodepth=8 --verify=crc32c --verify_fatal=1 --randseed=42 --group_reporting --buffer_compress_percentage=50 --output=/tmp/fio.out ||
		{ cat /tmp/fio.out; fail "fio $how $*"; }
	grep -E 'err=' /tmp/fio.out | head -1
}

vdisk create u --size 256M
dev=$(vdisk attach u --queues 2)
ublk=(--ioengine=io_uring --direct=1 --filename="$dev")
echo "== ublk"; job write "${ublk[@]}"
vdisk snapshot u@s1
echo "== ublk, after a snapshot"; job write "${ublk[@]}"
vdisk detach u
dev=$(vdisk attach u)
echo "== ublk, read back after reopening the store"; job read --ioengine=io_uring --direct=1 --filename="$dev"
vdisk detach u

vdisk create n --size 256M
serve() { vdisk -q serve --socket /tmp/n.sock n & pid=$!; for _ in $(seq 300); do [ -S /tmp/n.sock ] && return; sleep 0.1; done; fail "no socket"; }
nbd=(--ioengine=nbd --uri='nbd+unix:///n?socket=/tmp/n.sock' --thread)
serve
echo "== nbd"; job write "${nbd[@]}"
vdisk snapshot n@s1
echo "== nbd, after a snapshot"; job write "${nbd[@]}"
kill $pid; wait $pid || true
rm -f /tmp/n.sock
serve
echo "== nbd, read back after reopening the store"; job read "${nbd[@]}"
kill $pid; wait $pid || true
vdisk check --read-data
