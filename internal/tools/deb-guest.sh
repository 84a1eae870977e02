#!/bin/bash
# deb-guest.sh: installs the Debian package in a guest under systemd. On one machine it takes the walk of docs/start.md, and
# on another it uses the package over an upgrade, kills and a reboot (testdata/guest/systemd). KERNEL is the guest's, LIMIT
# bounds each of the three runs (30m).
set -euo pipefail
cd "$(dirname "$0")/../.."
work=$(mktemp -d /tmp/vdisk-deb-guest-XXXXXX)
trap 'rm -rf "$work"' EXIT

old=${DEB_OLD:-$(VERSION=v0.1.1 internal/tools/deb.sh "$work")}
new=${DEB_NEW:-$(VERSION=v0.1.2 internal/tools/deb.sh "$work")}
boot() { # SCRIPT MACHINE
	go run ./internal/guest/cmd/guest run -kernel "${KERNEL:-newest}" -systemd -root-file "$work/$2.qcow2" -scratch-size -1 \
		-timeout "${LIMIT:-30m}" -file old.deb="$old" -file new.deb="$new" -file lib.sh=testdata/guest/systemd/lib.sh \
		-file script.sh="testdata/guest/systemd/$1" -- bash /payload/script.sh
}
boot 00-start.sh first
boot 10-install.sh second
boot 20-reboot.sh second
echo "deb-guest: the package does what it should under systemd"
