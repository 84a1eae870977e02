#!/bin/bash
# deb.sh [FOLDER]: builds a Debian package of the commit that is checked out into FOLDER (bin), and prints its path. Beside it
# comes what the program is made of, as CycloneDX (.cdx.json, sbom).
#
# dpkg-deb is used, because each Debian has it, and it makes the same file of the same content. That is what this script
# sees to, too: the times are those of the commit (SOURCE_DATE_EPOCH), owners, modes and the order are fixed, and
# nothing that the machine is called or where the checkout is gets in.
#
# VERSION is git's description of the commit (git describe); a checkout without git has to give it, and
# SOURCE_DATE_EPOCH.
set -euo pipefail
cd "$(dirname "$0")/../.."
out=$(realpath -m "${1:-bin}")
export LC_ALL=C TZ=UTC
umask 022

described=${VERSION:-$(git describe --tags --always --dirty)}
SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct)}
arch=$(go env GOARCH)
case $arch in arm) arch=armhf ;; 386) arch=i386 ;; ppc64le) arch=ppc64el ;; esac
# A variable would let the compression depend on the number of processors.
export SOURCE_DATE_EPOCH DPKG_DEB_THREADS_MAX=1

# debian_version turns a description into a version that sorts as it should: v1.2.0 → 1.2.0, v1.2.0-rc1 → 1.2.0~rc1,
# v1.2.0-7-gabc → 1.2.0+7.gabc. Where no tag is, the last release in the changelog and the number of commits count.
debian_version() {
	local v=$described dirty=
	[[ $v != *-dirty ]] || { dirty=+dirty; v=${v%-dirty}; }
	case $v in
	v[0-9]*) v=${v#v} ;;
	*) v=$(sed -n 's/^## \[\([0-9][^]]*\)\].*/\1/p' CHANGELOG.md | head -n 1)-$(git rev-list --count HEAD)-g$v ;;
	esac
	printf '%s%s-1\n' "$(sed -E 's/-([0-9]+)-g([0-9a-f]+)$/+\1.g\2/; s/-/~/g' <<<"$v")" "$dirty"
}
version=$(debian_version)

tree=$(mktemp -d)
trap 'rm -rf "$tree"' EXIT
doc=$tree/usr/share/doc/vdisk
install -d "$tree"/{DEBIAN,etc/default} "$tree"/usr/{bin,lib/systemd/system,lib/modules-load.d,lib/udev/rules.d,share/man/man8,share/lintian/overrides} \
	"$tree"/usr/share/{bash-completion/completions,zsh/vendor-completions,fish/vendor_completions.d} "$doc/docs"

# The symbols are left out: stacks have their names without them, and so does 'go version -m'.
CGO_ENABLED=0 go build -trimpath -buildvcs=false -ldflags "-s -w -X main.described=$described" -o "$tree/usr/bin/vdisk" ./cmd/vdisk
run() { env -i "$tree/usr/bin/vdisk" "$@"; }

run man "$tree/usr/share/man/man8"
run completion bash >"$tree/usr/share/bash-completion/completions/vdisk"
run completion zsh >"$tree/usr/share/zsh/vendor-completions/_vdisk"
run completion fish >"$tree/usr/share/fish/vendor_completions.d/vdisk.fish"

for unit in init/*.service init/*.socket init/*.timer; do
	[ -e "$unit" ] || continue
	sed 's|/usr/local/bin/|/usr/bin/|' "$unit" >"$tree/usr/lib/systemd/system/${unit#init/}"
done
cp init/60-vdisk.rules "$tree/usr/lib/udev/rules.d"
cp init/modules-load.conf "$tree/usr/lib/modules-load.d/vdisk.conf"

cp packaging/deb/default "$tree/etc/default/vdisk"
cp packaging/deb/lintian-overrides "$tree/usr/share/lintian/overrides/vdisk"
cp packaging/deb/copyright README.md SECURITY.md NOTICE "$doc"
cp -r docs/*.md docs/*.svg docs/bench "$doc/docs"
cp DESIGN.md init/grafana-dashboard.json "$doc"
cp CHANGELOG.md "$doc/changelog"
cat >"$doc/changelog.Debian" <<-END
	vdisk ($version) unstable; urgency=medium

	  * Built from $described; changelog.gz says what is new.

	 -- $(sed -n 's/^Maintainer: //p' packaging/deb/control)  $(date -u -d "@$SOURCE_DATE_EPOCH" '+%a, %d %b %Y %H:%M:%S +0000')
END
# The modules of others in the program, each with its license.
go version -m "$tree/usr/bin/vdisk" | awk '$1 == "dep" { print $2, $3 }' | while read -r module v; do
	dir=$(go list -m -f '{{.Dir}}' "$module")
	printf '==== %s %s\n\n' "$module" "$v"
	cat "$dir"/LICENSE* "$dir"/COPYING* "$dir"/NOTICE* 2>/dev/null || true
	printf '\n'
done >"$doc/modules"
grep -q '^====' "$doc/modules"
gzip -9n "$doc"/{changelog,changelog.Debian,modules} "$tree"/usr/share/man/man8/*

find "$tree" -type d -exec chmod 755 {} +
find "$tree" -type f -exec chmod 644 {} +
chmod 755 "$tree/usr/bin/vdisk"
sed -e "s/@VERSION@/$version/; s/@ARCH@/$arch/" -e "s/@SIZE@/$(find "$tree" -type f -printf '%s\n' | awk '{ n += int(($1 + 1023) / 1024) } END { print n }')/" \
	packaging/deb/control >"$tree/DEBIAN/control"
echo /etc/default/vdisk >"$tree/DEBIAN/conffiles"
(cd "$tree" && find usr -type f | sort | xargs md5sum) >"$tree/DEBIAN/md5sums"
for script in postinst prerm postrm; do install -m 755 "packaging/deb/$script" "$tree/DEBIAN"; done
find "$tree" -exec touch -h -d "@$SOURCE_DATE_EPOCH" {} +

mkdir -p "$out"
deb=$out/vdisk_${version}_$arch.deb
dpkg-deb --root-owner-group -Zxz --build "$tree" "$deb" >/dev/null
go run ./internal/tools/sbom -name vdisk -version "$version" "$tree/usr/bin/vdisk" >"${deb%.deb}.cdx.json"
echo "$deb"
