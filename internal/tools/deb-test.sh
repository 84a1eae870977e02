#!/bin/bash
# deb-test.sh [-u]: proves that the Debian package of the commit that is checked out
#   - is the same, bit for bit, and so is the list of modules beside it, when it is built in two folders, at two times, with nothing kept of the first build;
#   - has no error and no warning of lintian's;
#   - has the files of packaging/deb/contents, with these modes and owners. -u writes that list anew.
# It needs lintian, and takes some minutes.
set -euo pipefail
cd "$(dirname "$0")/../.."
update=${1:-}
work=$(mktemp -d /tmp/vdisk-deb-XXXXXX)
trap 'chmod -R u+w "$work"; rm -rf "$work"' EXIT

fail() { echo "deb-test: $*" >&2; exit 1; }

head=$(git rev-parse HEAD)
# build FOLDER [NAME=VALUE...]: the package of HEAD, built in a clone of its own, in such an environment.
build() {
	local folder=$work/$1
	shift
	git clone -q --local --no-checkout . "$folder" && git -C "$folder" checkout -q --detach "$head"
	env "$@" "$folder/internal/tools/deb.sh" "$folder/bin"
}
first=$(build one)
sleep 1 # the times in both would differ
second=$(build another/folder GOCACHE="$work/cache" TZ=Asia/Tokyo LANG=C.UTF-8 USER=somebody)
cmp "$first" "$second" || fail "two builds differ"
cmp "${first%.deb}.cdx.json" "${second%.deb}.cdx.json" || fail "two lists of modules differ"
python3 -c 'import json, sys; b = json.load(open(sys.argv[1])); sys.exit(len(b["components"]) < 5)' "${first%.deb}.cdx.json" || fail "the list of modules"
echo "deb-test: two builds are the same: $(sha256sum <"$first" | cut -c 1-16)… ($(basename "$first"))"

# Manual pages and documents go with the commands; the list has one line for each kind.
contents() {
	dpkg-deb --contents "$1" | awk '{ print $1, $2, substr($6, 2) ($7 == "->" ? " -> " $8 : "") }' |
		sed -E 's|(man8/vdisk)-[a-z-]+\.8\.gz|\1-COMMAND.8.gz|; s|(doc/vdisk/docs)/.*|\1/FILE|' | sort -k 3 -u
}
contents "$first" >"$work/contents"
if [ "$update" = -u ]; then
	cp "$work/contents" packaging/deb/contents
	echo "deb-test: wrote packaging/deb/contents"
fi
diff -u packaging/deb/contents "$work/contents" >&2 || fail "the package has other files (deb-test.sh -u, if that is right)"
[ "$(dpkg-deb --info "$first" conffiles)" = /etc/default/vdisk ] || fail "the conffiles are others"
dpkg --compare-versions "$(dpkg-deb --field "$first" Version)" gt 0.1.0 || fail "the version sorts before 0.1.0"

lintian --allow-root --tag-display-limit 0 --fail-on error,warning "$first" || fail "lintian"
echo "deb-test: lintian has no error and no warning"
