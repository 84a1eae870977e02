package owner

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/vdisk/vdisk/internal/storage"
)

// names tells udev which volume or snapshot a block device shows: docs/ublk.md, Names of devices. It never fails,
// because a disk without a link can be used as well.
type names struct {
	dir   string   // has a file for each disk, by its sequence number in the kernel
	block string   // /sys/block
	links string   // /dev/disk/by-id
	udev  string   // udev's socket, which shows that it runs
	rules []string // where its rule for these names may be

	patience time.Duration // how long attach waits for udev
}

func systemNames() names {
	n := names{dir: "/run/vdisk/disks", block: "/sys/block", links: "/dev/disk/by-id", udev: "/run/udev/control", patience: 3 * time.Second}
	for _, dir := range []string{"/etc", "/run", "/usr/local/lib", "/usr/lib", "/lib"} {
		n.rules = append(n.rules, filepath.Join(dir, "udev/rules.d/60-vdisk.rules"))
	}
	return n
}

// diskName is what is told of one disk.
type diskName struct {
	id      int    // of the ublk device
	store   string // the store's id
	ref     string // of the volume or snapshot
	mayLink bool   // the store is not another user's, who chooses the names and can copy an id
}

// aPartition matches a name that could be that of a partition of another disk.
var aPartition = regexp.MustCompile(`-part[0-9]+$`)

// tell writes down the names of a disk, and lets udev read them.
func (n names) tell(d diskName, log *slog.Logger) {
	if n.dir == "" {
		return
	}
	seq, err := n.sequence(d.id)
	if err == nil {
		err = n.write(seq, d, log)
	}
	if err != nil {
		log.Debug("the device has no links in /dev/disk", "err", err)
	}
}

func (n names) disk(id int) string { return filepath.Join(n.block, fmt.Sprintf("ublkb%d", id)) }

func (n names) sequence(id int) (string, error) {
	text, err := os.ReadFile(filepath.Join(n.disk(id), "diskseq"))
	return strings.TrimSpace(string(text)), err
}

func (n names) write(seq string, d diskName, log *slog.Logger) error {
	if err := makeReadable(n.dir); err != nil {
		return err
	}
	in, err := storage.OpenFolder(n.dir, false)
	if err != nil {
		return err
	}
	defer in.Close()
	defer lockFolder(in)() // of two disks with one name, one has to be the first
	taken, err := n.taken(in, seq)
	if err != nil {
		return err
	}
	linked := d.mayLink
	if linked && aPartition.MatchString(d.ref) {
		linked = false
		log.Warn("the name looks like a partition's, so the device has no links in /dev/disk")
	}
	var lines []string
	for _, one := range []struct {
		key, value string
	}{{"VDISK_ID", d.store + "-" + d.ref}, {"VDISK_NAME", d.ref}} {
		line := one.key + "=" + one.value
		switch {
		case !linked:
		case slices.Contains(taken, line):
			log.Warn("a disk of another store has this name in /dev/disk, and keeps it", "name", one.value)
		default:
			lines = append(lines, line+"\n")
		}
	}
	text := strings.Join(lines, "")
	if old, err := in.Read(seq); err == nil && string(old) == text {
		return nil
	}
	if err := in.Replace(seq, []byte(text), false); err != nil {
		return err
	}
	return n.event(d.id)
}

// makeReadable makes a folder and the one above it, if they are not there, so that everybody can read them, whatever the
// umask is: clients of sockets in /run/vdisk must reach them.
func makeReadable(dir string) error {
	for _, d := range []string{filepath.Dir(dir), dir} {
		err := os.Mkdir(d, 0o755)
		if err == nil {
			err = os.Chmod(d, 0o755)
		}
		if err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
	}
	return nil
}

// taken returns the lines in the files of all other disks that exist, and removes the files of those that do not.
func (n names) taken(in *storage.Folder, own string) ([]string, error) {
	exist := map[string]bool{own: true}
	files, err := filepath.Glob(filepath.Join(n.block, "ublkb*", "diskseq"))
	if err != nil {
		return nil, err
	}
	for _, f := range files {
		if text, err := os.ReadFile(f); err == nil {
			exist[strings.TrimSpace(string(text))] = true
		}
	}
	list, err := in.Names()
	if err != nil {
		return nil, err
	}
	var lines []string
	for _, name := range list {
		if !exist[name] {
			if err := in.Remove(name); err != nil {
				return nil, err
			}
			continue
		}
		if text, err := in.Read(name); err == nil && name != own {
			lines = append(lines, strings.Fields(string(text))...)
		}
	}
	return lines, nil
}

// event makes the kernel announce the disk anew, and then its partitions, whose rules read what the disk's have found.
func (n names) event(id int) error {
	files, err := filepath.Glob(filepath.Join(n.disk(id), "ublkb*p*", "uevent"))
	if err != nil {
		return err
	}
	for _, f := range append([]string{filepath.Join(n.disk(id), "uevent")}, files...) {
		if err := os.WriteFile(f, []byte("change"), 0); err != nil {
			return err
		}
	}
	return nil
}

// linked reports whether udev is going to make links for a disk, as tell has asked.
func (n names) linked(d diskName) bool {
	exists := func(f string) bool { _, err := os.Stat(f); return err == nil }
	if n.dir == "" || !exists(n.udev) || !slices.ContainsFunc(n.rules, exists) {
		return false
	}
	seq, err := n.sequence(d.id)
	if err != nil {
		return false
	}
	text, err := os.ReadFile(filepath.Join(n.dir, seq))
	return err == nil && strings.Contains(string(text), "VDISK_ID=")
}

// wait returns when the link by id of a disk leads to the device at path, or after n.patience.
func (n names) wait(ctx context.Context, d diskName, path string) {
	if !n.linked(d) {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, n.patience)
	defer cancel()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for ctx.Err() == nil {
		if real, err := filepath.EvalSymlinks(filepath.Join(n.links, "vdisk-"+d.store+"-"+d.ref)); err == nil && real == path {
			return
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
		}
	}
}

// nameOf returns the names of a disk that this process serves. The caller holds Owner.mu.
func (o *Owner) nameOf(d *disk) diskName {
	return diskName{id: d.id, store: o.uuid, ref: d.ref().String(), mayLink: o.in.Owner() == 0}
}

// tellNames tells udev the names of the disks of a volume and its snapshots.
func (o *Owner) tellNames(volume string) {
	var list []diskName
	o.mu.Lock()
	for _, d := range o.disks {
		if d.block != nil && d.ref().Volume == volume {
			list = append(list, o.nameOf(d))
		}
	}
	o.mu.Unlock()
	for _, d := range list {
		o.tell(d)
	}
}

func (o *Owner) tell(d diskName) {
	o.opts.names.tell(d, o.opts.Logger.With("what", d.ref, "device", pathOf(d.id)))
}
