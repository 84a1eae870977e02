#!/bin/bash
# verify.sh IMAGE NUMBER CONSOLE GOLDEN [cut]: whether a raw image of a machine's disk has all that the machine has said on its console,
# nothing of another machine, and the rest as in the golden image. The image's journal is replayed. The file system must be clean, unless the
# machine was cut off: then it may have one file more than it has said.
set -euo pipefail
export PATH=$PATH:/usr/sbin:/sbin LC_ALL=C
image=$1 mine=VM-$(printf %02d "$2") console=$3 golden=$4 cut=${5:-}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
fail() { echo "FAIL: $mine: $*" >&2; exit 1; }

if [ "$cut" ]; then
	e2fsck -fp "$image" >"$work/fsck" 2>&1 || [ $? = 1 ] || fail "e2fsck: $(cat "$work/fsck")"
fi
e2fsck -fn "$image" >"$work/fsck" 2>&1 || fail "e2fsck: $(cat "$work/fsck")"
debugfs -R "rdump /data $work" "$image" 2>/dev/null
debugfs -R "dump /base/data $work/base" "$image" 2>/dev/null
debugfs -R "dump /base/data $work/expected" "$golden" 2>/dev/null
[ "$(stat -c %s "$work/expected")" = $((8 << 20)) ] || fail "the golden image has no /base/data"

sed -n "s/.*$mine: wrote \([0-9]*\) \([0-9a-f]\{64\}\)\r*$/\1 \2/p" "$console" >"$work/said"
last=0
while read -r file sum; do
	last=$file
	[ -e "$work/data/$mine-$file" ] || fail "file $file is lost"
	got=$(sha256sum <"$work/data/$mine-$file")
	[ "${got%% *}" = "$sum" ] || fail "file $file has changed"
	[ "$(head -n 1 "$work/data/$mine-$file")" = "$mine file $file" ] || fail "file $file is another's"
	dd if="$work/data/$mine-$file" of="$work/expected" bs=64k count=1 seek=$((file * 7 % 128)) conv=notrunc status=none
	rm "$work/data/$mine-$file"
done <"$work/said"
[ "$last" -gt 0 ] || fail "nothing was said"
if [ "$cut" ]; then
	rm -f "$work/data/$mine-$((last + 1))"
	slot=$(((last + 1) * 7 % 128))
	dd if="$work/base" of="$work/expected" bs=64k count=1 skip=$slot seek=$slot conv=notrunc status=none
else
	[ "$(cat "$work/data/.end")" = "$mine" ] || fail "no end"
	rm "$work/data/.end"
fi
[ -z "$(ls -A "$work/data")" ] || fail "files of others: $(ls -A "$work/data")"
cmp "$work/expected" "$work/base" || fail "/base/data is not what was written there, and the golden image's elsewhere"
others=$(grep -aoE 'VM-[0-9]+ file' "$image" | sort -u | grep -v "^$mine file$" || true)
[ -z "$others" ] || fail "the disk has data of $others"
echo "all $last files that it has said are there, and nothing of another"
