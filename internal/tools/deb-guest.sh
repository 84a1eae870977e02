#!/bin/bash
# deb-guest.sh: installs the Debian package in a guest under systemd, and uses it over an upgrade, a kill and a reboot
# (testdata/guest/systemd). KERNEL is the guest's, LIMIT bounds each of the two runs (15m).
set -euo pipefail
cd "$(dirname "$0")/../.."
work=$(mktemp -d /tmp/vdisk-deb-guest-XXXXXX)
trap 'rm -rf "$work"' EXIT

old=${DEB_OLD:-$(VERSION=v0.1.1 internal/tools/deb.sh "$work")}
new=${DEB_NEW:-$(VERSION=v0.1.2 internal/tools/deb.sh "$work")}
boot() {
	go run ./internal/guest/cmd/guest run -kernel "${KERNEL:-newest}" -systemd -root-file "$work/root.qcow2" -scratch-size -1 \
		-timeout "${LIMIT:-15m}" -file old.deb="$old" -file new.deb="$new" -file script.sh="testdata/guest/systemd/$1" -- \
		bash /payload/script.sh
}
boot 10-install.sh
boot 20-reboot.sh
echo "deb-guest: the package does what it should under systemd"
