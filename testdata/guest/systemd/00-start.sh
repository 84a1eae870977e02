# The walk for the first day (docs/start.md) on a fresh machine, with the package alone: its blocks as they stand, but for the
# installation. The document is the one that the package has installed.
. /payload/lib.sh
echo "== install"
dpkg -i /payload/new.deb
doc=/usr/share/doc/vdisk/docs/start.md
awk '/^## / { walk = $0 != "## Install" } /^    / && walk { print substr($0, 5) }' $doc >/tmp/walk
[ "$(wc -l </tmp/walk)" -ge 50 ] || fail "$doc has too few commands"

echo "== the walk"
bash -e -x /tmp/walk 2>&1 | tee /tmp/transcript

echo "== what came of it"
[ "$(cat /srv/vm1/monday)" = 'written on Monday' ] || fail "the restored disk is another"
[ "$(findmnt -n -o SOURCE /srv/vm1)" = "$(readlink -f /dev/disk/vdisk/vm1)" ] || fail "another disk is mounted"
grep -q 'have the same content' /tmp/transcript || fail "nothing was compared"
systemctl list-timers --no-pager "$auto.timer" | grep -q ' 02:30:00 ' || fail "the timer does not come at night"
echo x >/srv/vm1/x
sync -f /srv/vm1
systemctl start "$auto.service"
vdisk-backup vm1 # goes on from the snapshot that was restored
[ "$(vdisk --store /backup ls -H -t snap -o name vm1 | wc -l)" = 3 ] || fail "the backup has not gone on"
vdisk check
no_warnings
echo "== the walk has $(grep -c '^+ ' /tmp/transcript) commands, and its transcript $(wc -l </tmp/transcript) lines"
