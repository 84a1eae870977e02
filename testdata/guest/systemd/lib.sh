# What the scripts of this folder share.
set -euo pipefail
export VDISK_LOCK_TIMEOUT=2m # an emulated guest may be slow
unit=vdisk@var-lib-vdisk.service auto=vdisk-auto@var-lib-vdisk nbd=vdisk-nbd@var-lib-vdisk.socket

fail() {
	echo "FAIL: $*"
	systemctl status --no-pager -l 'vdisk@*' 'vdisk-auto@*' 'vdisk-nbd@*' '*vm1.mount' || true
	journalctl -b --no-pager | tail -80
	exit 1
}
trap 'fail "$0, line $LINENO: $BASH_COMMAND"' ERR

until_true() { # SECONDS COMMAND...
	local n=$(($1 * 5)); shift
	until "$@" >/dev/null 2>&1; do n=$((n - 1)); [ $n -gt 0 ] || fail "in time: $*"; sleep 0.2; done
}
uri() { echo "nbd+unix:///$1?socket=/run/vdisk/var-lib-vdisk.sock"; }

# same_vm4: vm4 has the content of /root/vm4, over NBD.
same_vm4() { nbdcopy "$(uri vm4)" /tmp/vm4 && cmp -n 4M /tmp/vm4 /root/vm4; }

# none_loaded: systemd has no unit of the package, not even one that has failed. (It knows the name of one that /etc/fstab
# requires: not-found.)
none_loaded() {
	local units
	units=$(systemctl list-units --all --plain --no-legend 'vdisk@*' 'vdisk-auto@*' 'vdisk-nbd@*' | grep -v ' not-found ' || true)
	[ -z "$units" ] || fail "there are units: $units"
}

# no_warnings: since the boot, neither the units of the package nor systemd about them have warned of anything but kills.
no_warnings() {
	local said
	said=$({
		journalctl -b --no-pager -o cat -p warning -u 'vdisk@*' -u 'vdisk-auto@*' -u 'vdisk-nbd@*'
		journalctl -b --no-pager -o cat -u 'vdisk@*' -u 'vdisk-auto@*' | grep -E 'level=(WARN|ERROR)' || true
		journalctl -b --no-pager -o cat -u systemd-udevd | grep -i vdisk || true
	} | grep -v -e "Failed with result 'signal'" -e 'Main process exited, code=killed' || true)
	[ -z "$said" ] || fail "warnings: $said"
}
