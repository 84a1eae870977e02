#!/bin/sh
# setup.sh WHAT...: makes sure that this machine has the programs that the Makefile's targets need. It installs missing ones
# with apt-get if it can (as root, on Debian or a relative of it).
#   build   Go
#   demo    mkfs.ext4, nbdcopy, nbdinfo, fio
#   bench   fio, the servers that vdisk is measured beside, and gnuplot
#   deb     dpkg-deb; deb-test also lintian
#   vm      QEMU and e2fsprogs
#   web-test  Chromium, fio
#   test    the NBD clients and file-system tools that the tests drive
# Exits with 1 and says what to install when it cannot.
set -eu

packages=
need() { # command package
	command -v "$1" >/dev/null 2>&1 || [ -x "/usr/sbin/$1" ] || packages="$packages $2"
}

go_works() { # at least 1.21, which fetches the toolchain that go.mod names by itself
	command -v go >/dev/null 2>&1 || return 1
	v=$(cd / && go env GOVERSION 2>/dev/null | sed -n 's/^go1\.\([0-9]*\).*/\1/p')
	[ "${v:-0}" -ge 21 ]
}

install() {
	[ -n "$*" ] || return 0
	if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null 2>&1; then
		echo "setup: missing:$(printf ' %s' "$@"). Install it (Debian: sudo apt-get install$(printf ' %s' "$@")) and try again." >&2
		exit 1
	fi
	echo "setup: installing$(printf ' %s' "$@")" >&2
	export DEBIAN_FRONTEND=noninteractive
	log=$(mktemp)
	if ! { apt-get update && apt-get install -y --no-install-recommends "$@"; } >"$log" 2>&1; then
		tail -20 "$log" >&2
		echo "setup: apt-get failed; see $log" >&2
		exit 1
	fi
	rm -f "$log"
}

for what; do
	case $what in
	build)
		if ! go_works; then
			install golang-go ca-certificates
			if ! go_works; then # an older Debian: its backports have a newer Go
				apt-get install -y --no-install-recommends -t "$(. /etc/os-release && echo "$VERSION_CODENAME")-backports" golang-go >/dev/null 2>&1 || true
			fi
			go_works || {
				echo "setup: Go 1.21 or later is needed and this distribution has none; install it from https://go.dev/dl" >&2
				exit 1
			}
		fi
		;;
	demo | test)
		need mkfs.ext4 e2fsprogs
		need nbdcopy libnbd-bin
		need fio fio
		;;
	bench)
		need fio fio
		need qemu-nbd qemu-utils
		need nbdkit nbdkit
		need gnuplot gnuplot-nox
		;;
	vm)
		need qemu-system-x86_64 qemu-system-x86
		need qemu-img qemu-utils
		need mke2fs e2fsprogs
		need debugfs e2fsprogs
		;;
	deb | deb-test)
		need dpkg-deb dpkg
		need git git
		need gzip gzip
		[ "$what" = deb ] || { need lintian lintian; need python3 python3-minimal; }
		;;
	web-test)
		need chromium chromium
		need fio fio
		[ -e /usr/share/fonts/truetype/dejavu ] || packages="$packages fonts-dejavu-core"
		;;
	*)
		echo "usage: setup.sh build|bench|deb|deb-test|demo|vm|test|web-test..." >&2
		exit 2
		;;
	esac
	if [ "$what" = test ]; then
		need gcc gcc
		[ -e /usr/include/stdio.h ] || packages="$packages libc6-dev"
		need nbdfuse nbdfuse
		need nbdsh python3-libnbd
		need fusermount3 fuse3
		need qemu-img qemu-utils
		need qemu-nbd qemu-utils
		need nbdkit nbdkit
		need xz xz-utils
		need zstd zstd
		need losetup mount
		need mkfs.xfs xfsprogs
		need pgrep procps
		need strace strace
		need zsh zsh
		need fish fish
		need groff groff-base
	fi
done
# shellcheck disable=SC2086 # a list of words
install $packages
