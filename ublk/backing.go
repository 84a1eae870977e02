package ublk

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// BackingDevices returns the ids of the ublk devices below the file system that path is on, or below path itself if it
// is a block device, in ascending order. It follows partitions, device mapper, md, bcache and loop devices, and btrfs
// and overlayfs as far as /proc/self/mountinfo names the devices below them.
//
// A server must not keep anything on its own disk: when memory is short, it would wait for itself.
func BackingDevices(path string) ([]int, error) {
	w := blockWalk{seen: make(map[string]bool)}
	if err := w.file(path); err != nil {
		return nil, fmt.Errorf("ublk: find out what %s rests on: %w", path, err)
	}
	slices.Sort(w.ids)
	return slices.Compact(w.ids), nil
}

// blockWalk goes down from files to block devices, and on to files (of loop devices). It visits each once.
type blockWalk struct {
	seen map[string]bool
	ids  []int
}

func (w *blockWalk) once(what string) bool {
	if w.seen[what] {
		return false
	}
	w.seen[what] = true
	return true
}

// file goes on with the devices below a file.
func (w *blockWalk) file(path string) error {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return &os.PathError{Op: "stat", Path: path, Err: err}
	}
	if st.Mode&unix.S_IFMT == unix.S_IFBLK {
		return w.device(devNumber(st.Rdev))
	}
	if !w.once(path) {
		return nil
	}
	if unix.Major(st.Dev) != 0 {
		return w.device(devNumber(st.Dev))
	}
	sources, err := mountSources(path)
	if err != nil {
		return err
	}
	for _, source := range sources {
		if err := w.file(source); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

func devNumber(dev uint64) string { return fmt.Sprintf("%d:%d", unix.Major(dev), unix.Minor(dev)) }

// device goes on with the devices below a block device, given as major:minor.
func (w *blockWalk) device(number string) error {
	if !w.once(number) {
		return nil
	}
	dir, err := filepath.EvalSymlinks("/sys/dev/block/" + number)
	if errors.Is(err, fs.ErrNotExist) {
		return nil // gone meanwhile
	}
	if err != nil {
		return err
	}
	if _, err := os.Stat(dir + "/partition"); err == nil {
		dir = filepath.Dir(dir)
	}
	if id, ok := idOf(filepath.Base(dir), "ublkb"); ok {
		w.ids = append(w.ids, id)
	}
	slaves, _ := filepath.Glob(dir + "/slaves/*/dev")
	for _, slave := range slaves {
		b, err := os.ReadFile(slave)
		if err != nil {
			continue
		}
		if err := w.device(strings.TrimSpace(string(b))); err != nil {
			return err
		}
	}
	backing, err := os.ReadFile(dir + "/loop/backing_file")
	if err != nil {
		return nil
	}
	err = w.file(strings.TrimSuffix(string(backing), "\n"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil // deleted, or in another mount namespace
	}
	return err
}

// mountSources returns what a file system without a device of its own is made of: its source if that is a device, and
// the layers of an overlay. The mount of path is the last one in /proc/self/mountinfo (proc_pid_mountinfo(5)) among
// those whose mount point is the longest one above path.
func mountSources(path string) ([]string, error) {
	path, err := filepath.Abs(path)
	if err == nil {
		path, err = filepath.EvalSymlinks(path)
	}
	if err != nil {
		return nil, err
	}
	mountinfo, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	return sourcesOf(path, string(mountinfo)), nil
}

func sourcesOf(path, mountinfo string) []string {
	longest, sources := -1, []string(nil)
	for line := range strings.Lines(mountinfo) {
		point, found, ok := parseMount(line)
		if ok && len(point) >= longest && under(path, point) {
			longest, sources = len(point), found
		}
	}
	return sources
}

func under(path, dir string) bool {
	return path == dir || strings.HasPrefix(path, strings.TrimSuffix(dir, "/")+"/")
}

// parseMount returns the mount point and the sources in a line of mountinfo.
func parseMount(line string) (point string, sources []string, ok bool) {
	head, tail, ok := strings.Cut(line, " - ")
	fields, rest := strings.Fields(head), strings.Fields(tail)
	if !ok || len(fields) < 5 || len(rest) < 2 {
		return "", nil, false
	}
	if strings.HasPrefix(rest[1], "/") {
		sources = append(sources, unescapeMount(rest[1]))
	}
	if rest[0] == "overlay" && len(rest) > 2 {
		for _, option := range strings.Split(rest[2], ",") {
			if value, ok := strings.CutPrefix(option, "upperdir="); ok {
				sources = append(sources, unescapeMount(value))
			}
			if value, ok := strings.CutPrefix(option, "lowerdir="); ok {
				sources = append(sources, strings.Split(unescapeMount(value), ":")...)
			}
		}
	}
	return unescapeMount(fields[4]), sources, true
}

// unescapeMount undoes the octal escapes of mountinfo.
var unescapeMount = strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`).Replace
