# Measures vdisk on ublk beside the kernel's own disks, copy-on-write or not, and those of ublksrv and qemu: in one boot, in
# turns. bench-guest.sh runs it in a guest, and internal/tools/bench makes the report of its lines "R test target round IOPS
# p50(ns) p99(ns)" and "# machine: NAME value".
# Environment: PEERS, ROUNDS, RUNTIME (seconds a test), FILE_MB (of data), DISK_MB (a disk's size), QUEUES (empty: not two queues).
set -euo pipefail
. ./lib.sh
cd "$VDISK_SCRATCH"
export VDISK_STORE=$VDISK_SCRATCH/store
sectors=$((DISK_MB * 2048))
owner=
modprobe loop

# make_TARGET makes a new target and puts its path into device[]. remove_TARGET removes the target, and snapshot_TARGET takes
# a snapshot of it. lacks_TARGET prints the reason why it cannot run here. A target without lacks_TARGET always can.
start_owner() {
	vdisk -q create first --size 1M # a daemon needs a store
	vdisk daemon >/tmp/daemon.log 2>&1 &
	owner=$!
	await vdisk -q ls >/dev/null 2>&1
}
stop_owner() {
	[ -z "$owner" ] || { kill "$owner" && wait "$owner"; }
	owner=
	rm -rf store
}
volume() { # target queues
	[ "$owner" ] || start_owner
	vdisk -q create "$1" --size "${DISK_MB}M"
	device[$1]=$(vdisk attach "$1" --queues "$2" --depth 128)
}
make_vdisk() { volume vdisk 1; }
snapshot_vdisk() { vdisk snapshot vdisk@s; }
remove_vdisk() { stop_owner; }

image() { truncate -s "${2:-$DISK_MB}M" "$1"; losetup -f --show --direct-io=on "$PWD/$1"; } # file MB: as a loop device
unloop() { losetup -d "$1"; }
make_loop() { device[loop]=$(image loop); }
remove_loop() { unloop "${device[loop]}"; rm loop; }

lacks_ublksrv() { have_peer loop || echo "ublksrv's ublk or ublk.loop is not there (UBLKSRV_DIR)"; }
make_ublksrv() { truncate -s "${DISK_MB}M" ublksrv; peer ublksrv 30 loop -q 1 -f "$PWD/ublksrv"; }
remove_ublksrv() { timeout 60 ublk del -n 30 >/dev/null; rm ublksrv; }

lacks_target() { # of device mapper, module
	command -v dmsetup >/dev/null || echo "there is no dmsetup"
	modprobe "$2" 2>/dev/null && dmsetup targets | grep -q "^$1 " || echo "this kernel has no $2"
}
lacks_dm-thin() { lacks_target thin-pool dm-thin-pool; }
make_dm-thin() { # blocks of 64 KiB
	thin_data=$(image thin.data $((2 * DISK_MB)))
	thin_meta=$(image thin.meta 64)
	dmsetup create pool --table "0 $((2 * sectors)) thin-pool $thin_meta $thin_data 128 0"
	dmsetup message pool 0 "create_thin 0"
	dmsetup create thin --table "0 $sectors thin /dev/mapper/pool 0"
	device[dm-thin]=/dev/mapper/thin
}
snapshot_dm-thin() { dmsetup suspend thin && dmsetup message pool 0 "create_snap 1 0" && dmsetup resume thin; }
remove_dm-thin() {
	dmsetup remove --retry thin
	dmsetup remove --retry pool
	unloop "$thin_data"
	unloop "$thin_meta"
	rm thin.data thin.meta
}

# The old snapshots of LVM, as "lvcreate --snapshot" makes them: a write to the origin first copies what was there.
lacks_lvm() { lacks_target snapshot dm-snapshot; }
make_lvm() {
	lvm_data=$(image lvm.data)
	dmsetup create lvm --table "0 $sectors linear $lvm_data 0"
	device[lvm]=/dev/mapper/lvm
}
snapshot_lvm() { # lvm becomes the origin, beside the volume that has the data
	lvm_copies=$(image lvm.copies)
	dmsetup create lvm-real --table "0 $sectors linear $lvm_data 0"
	dmsetup suspend lvm
	dmsetup create lvm-snapshot --table "0 $sectors snapshot /dev/mapper/lvm-real $lvm_copies P 8"
	dmsetup load lvm --table "0 $sectors snapshot-origin /dev/mapper/lvm-real"
	dmsetup resume lvm
}
remove_lvm() {
	local d
	for d in lvm-snapshot lvm lvm-real; do dmsetup remove --retry $d; done
	unloop "$lvm_data"
	unloop "$lvm_copies"
	rm lvm.data lvm.copies
}

lacks_btrfs() {
	command -v mkfs.btrfs >/dev/null || echo "there is no mkfs.btrfs"
	modprobe btrfs 2>/dev/null || echo "this kernel has no btrfs"
}
make_btrfs() { # a file on btrfs, as a loop device
	btrfs_data=$(image btrfs.data $((4 * DISK_MB)))
	mkfs.btrfs -q "$btrfs_data"
	mkdir -p btrfs
	mount "$btrfs_data" btrfs
	device[btrfs]=$(image btrfs/disk)
}
snapshot_btrfs() { sync btrfs/disk && cp --reflink=always btrfs/disk btrfs/snapshot; }
remove_btrfs() {
	unloop "${device[btrfs]}"
	await umount btrfs
	unloop "$btrfs_data"
	rm btrfs.data
}

lacks_dm-vdo() {
	command -v vdoformat >/dev/null || echo "there is no vdoformat"
	lacks_target vdo dm-vdo
}
make_dm-vdo() {
	vdo_data=$(image vdo.data $((VDO_MB)))
	vdoformat --force --logical-size="${DISK_MB}M" "$vdo_data" >/dev/null
	dmsetup create vdo --table "0 $sectors vdo V4 $vdo_data $((VDO_MB * 256)) 4096 32768 16380 deduplication off compression on"
	device[dm-vdo]=/dev/mapper/vdo
}
remove_dm-vdo() { dmsetup remove --retry vdo; unloop "$vdo_data"; rm vdo.data; }
VDO_MB=8192 # its index alone takes 2.5 GiB, and none of that is written

lacks_qcow2() {
	command -v qemu-nbd >/dev/null || echo "there is no qemu-nbd"
	modprobe nbd 2>/dev/null || echo "this kernel has no nbd"
}
connect() { qemu-nbd -c /dev/nbd0 -f qcow2 --cache=none --aio=io_uring --discard=unmap qcow2 && await nbd_ready; }
nbd_ready() { [ "$(</sys/block/nbd0/size)" = "$sectors" ]; }
nbd_gone() { [ ! -e /sys/block/nbd0/pid ]; }
disconnect() { qemu-nbd -d /dev/nbd0 >/dev/null && await nbd_gone; }
make_qcow2() { qemu-img create -q -f qcow2 qcow2 "${DISK_MB}M"; connect; device[qcow2]=/dev/nbd0; }
snapshot_qcow2() { disconnect; qemu-img snapshot -c s qcow2; connect; }
remove_qcow2() { disconnect; rm qcow2; }

result() { # test target round rw
	local iops p50 p99 _
	read -r iops p50 p99 _ < <(numbers "$4")
	echo "R $1 $2 $3 $iops $p50 $p99"
}
measure() { # test target round rw
	random "$2" "$4" 32 1
	result "$@"
}
fill() { # target round
	fio --name=x --filename="${device[$1]}" --ioengine=io_uring --direct=1 --rw=write --bs=1M --iodepth=4 --size="${FILE_MB}M" --end_fsync=1 \
		"${half[@]}" --output-format=json --output=/tmp/fio.json
	result 1-fill-1M "$1" "$2" write
}
overwrite() { # target: every block of the data once, at random
	fio --name=x --filename="${device[$1]}" --ioengine=io_uring --direct=1 --rw=randwrite --bs=4k --iodepth=32 --size="${FILE_MB}M" --end_fsync=1 \
		"${half[@]}" --output=/dev/null
}
round() { # target round
	"make_$1"
	fill "$1" "$2"
	measure 2-randread-4k "$1" "$2" read
	measure 3-randwrite-4k "$1" "$2" write
	if [ "$1" = vdisk ]; then # the others store data the same way, whether it was written in pieces of 4 KiB or of 1 MiB
		overwrite vdisk
		device[vdisk.4k]=${device[vdisk]}
		measure 2-randread-4k vdisk.4k "$2" read
		measure 3-randwrite-4k vdisk.4k "$2" write # before the snapshot, with nothing between
	fi
	if declare -F "snapshot_$1" >/dev/null; then
		"snapshot_$1"
		measure 4-randwrite-4k-after-snapshot "$1" "$2" write
	fi
	"remove_$1"
}

# The gain of a second queue and its thread, beside that of null_blk, which is the most that this machine permits.
queues() { # targets
	local FILE_MB=64 round target jobs q rw
	for target; do
		for q in 1 2; do
			case $target in
			vdisk) volume vdisk-$q $q; overwrite vdisk-$q ;;
			null_blk) kernel_null null_blk-$q $q ;;
			ublksrv)
				truncate -s "${FILE_MB}M" ublksrv-$q
				peer ublksrv-$q $((30 + q)) loop -q $q -f "$PWD/ublksrv-$q"
				overwrite ublksrv-$q
				;;
			esac
		done
	done
	for round in $(seq "$ROUNDS"); do
		for target; do
			for rw in read write; do
				for jobs in 1 2; do
					random "$target-$jobs" $rw 32 $jobs
					result "5-rand$rw-4k-$jobs-jobs-and-queues" "$target" "$round" $rw
				done
			done
		done
	done
	for target; do
		case $target in
		vdisk) stop_owner ;;
		ublksrv) for q in 1 2; do timeout 60 ublk del -n $((30 + q)) >/dev/null; done; rm ublksrv-? ;;
		esac
	done
}

about() { echo "# machine: $*"; }
about date "$(date +%F)"
about kernel "Linux $(uname -r)"
about system "$(. /etc/os-release && echo "$PRETTY_NAME")"
about processor "$(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -1)"
about processors "$(nproc)"
about rounds "$ROUNDS"
about seconds "$RUNTIME"
about size "$FILE_MB"
for command in "vdisk --version" "fio --version" "qemu-nbd --version" "mkfs.btrfs --version"; do
	about version "$($command 2>/dev/null | head -1 || true)"
done
about version "dmsetup $(dmsetup version | sed -n 's/^Library version: *//p')"
targets=
for target in $PEERS; do
	why=
	! declare -F "lacks_$target" >/dev/null || why=$("lacks_$target")
	if [ "$why" ]; then say "MISSING $target: $why"; else targets+=" $target"; fi
done
for round in $(seq "$ROUNDS"); do
	for target in $(if ((round % 2)); then echo "$targets"; else echo "$targets" | tac -s' '; fi); do round "$target" "$round"; done
done
[ -z "$QUEUES" ] || queues null_blk $(grep -ow -e vdisk -e ublksrv <<<"$targets")
