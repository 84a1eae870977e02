#!/bin/bash
# bench-space.sh: the space of a Debian root file system in a store, as written and after the cold pass, and in qcow2.
# Environment:
#   IMAGE    a raw image; default: ext4 that is made with debootstrap (as root, from the network)
#   SUITE    Debian's release (bookworm)
#   INCLUDE  packages beside the essential ones, by commas
#   DIR      folder for all files (a temporary one); they take a few GiB
set -euo pipefail
cd "$(dirname "$0")/../.."
dir=${DIR:-$(mktemp -d)}
mkdir -p "$dir"
[ -n "${DIR:-}" ] || trap 'rm -rf "$dir"' EXIT
vdisk=$PWD/bin/vdisk
image=${IMAGE:-$dir/root.img}
if [ ! -e "$image" ]; then
	debootstrap --variant=minbase --include="${INCLUDE:-git,gcc,perl,python3,vim,openssh-server,curl,locales}" "${SUITE:-bookworm}" "$dir/tree" >"$dir/debootstrap.log" 2>&1 ||
		{ tail -20 "$dir/debootstrap.log"; exit 1; }
	rm -rf "$dir"/tree/var/cache/apt/* "$dir"/tree/var/lib/apt/lists/*
	truncate -s 2G "$image"
	mkfs.ext4 -q -d "$dir/tree" "$image"
	rm -rf "$dir/tree"
fi
on_disk() { du -sB1 "$@" | awk '{ n += $1 } END { print n }'; }
raw=$(on_disk "$image")
row() { # what bytes
	awk -v what="$1" -v n="$2" -v raw="$raw" -v best="$best" 'BEGIN { printf "| %s | %.1f MiB | %.3f | %.3f |\n", what, n / 1048576, n / raw, n / best }'
}
for type in zlib zstd; do
	qemu-img convert -q -c -O qcow2 -o "compression_type=$type" "$image" "$dir/$type.qcow2"
done
best=$(for type in zlib zstd; do on_disk "$dir/$type.qcow2"; done | sort -n | head -1)
echo "| | on the disk | of the data | of the best qcow2 |"
echo "|---|---|---|---|"
row "data of the image" "$raw"
for type in zlib zstd; do row "qcow2, $type" "$(on_disk "$dir/$type.qcow2")"; done
for codec in s2 zstd; do
	store=$dir/$codec
	rm -rf "$store"
	"$vdisk" -q --store "$store" import --compress "$codec" "$image" v >/dev/null
	row "vdisk, $codec, as written" "$(on_disk "$store")"
	"$vdisk" -q --store "$store" gc --cold --waste 5 >"$dir/gc.log"
	row "vdisk, $codec, after the cold pass" "$(on_disk "$store")"
	"$vdisk" -q --store "$store" check --read-data >/dev/null
	rm -rf "$store"
done
store=$dir/golden
rm -rf "$store"
"$vdisk" -q --store "$store" import "$image" v >/dev/null
"$vdisk" -q --store "$store" snapshot v@golden
for clone in a b c; do "$vdisk" -q --store "$store" clone v@golden "$clone"; done
"$vdisk" -q --store "$store" gc --cold --waste 5 >"$dir/gc.log"
row "vdisk, s2, a snapshot with three clones, after the cold pass" "$(on_disk "$store")"
"$vdisk" -q --store "$store" check --read-data >/dev/null
"$vdisk" -q --store "$store" export b - | cmp - "$image"
rm -rf "$store" "$dir"/*.qcow2
