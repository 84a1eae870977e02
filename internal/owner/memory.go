package owner

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/vdisk/vdisk/ublk"
)

// memory is one thing that bounds what this process may use: the machine, or a control group that it is in.
type memory struct {
	name      string
	total     int64
	available int64 // what is free, or can be given up without writing anything
}

// limitBuffers bounds the buffers of all devices together by a part of what the process may use.
func (o *Owner) limitBuffers() {
	const share = 8
	least := int64(0)
	for _, m := range o.opts.memory() {
		if least == 0 || m.total < least {
			least = m.total
		}
	}
	if least > 0 {
		ublk.SetBufferLimit(least / share)
	}
}

// hasMemoryFor refuses a device that would take the last memory: without it the kernel would sooner or later kill the
// process that serves all the others. It must be there for the device while it is idle, and for one of its queues at
// work; from there on requests wait for each other's buffers. And some has to be left.
func (o *Owner) hasMemoryFor(opts ublk.Options) error {
	idle, most := opts.Memory()
	need := idle + (most-idle)/int64(max(opts.Queues, 1))
	for _, m := range o.opts.memory() {
		if spare := min(max(m.total/64, 16<<20), 256<<20); m.available < need+spare {
			return fmt.Errorf("%w: a device needs up to %d KiB, and %s has %d KiB available, from which %d KiB are kept for others",
				ErrNoMemory, need>>10, m.name, m.available>>10, spare>>10)
		}
	}
	return nil
}

// readMemory looks at the files below root, which is / but in tests. What cannot be read bounds nothing.
func readMemory(root string) []memory {
	var list []memory
	info := readFields(filepath.Join(root, "proc/meminfo"))
	if total, ok := info["MemTotal:"]; ok {
		list = append(list, memory{"the machine", total << 10, info["MemAvailable:"] << 10})
	}
	text, err := os.ReadFile(filepath.Join(root, "proc/self/cgroup"))
	if err != nil {
		return list
	}
	for line := range strings.Lines(string(text)) { // cgroups(7): hierarchy, controllers, path
		f := strings.SplitN(strings.TrimSuffix(line, "\n"), ":", 3)
		switch {
		case len(f) < 3:
		case f[1] == "":
			list = append(list, groupMemory(filepath.Join(root, "sys/fs/cgroup"), f[2], "memory.max", "memory.current", "")...)
		case strings.Contains(","+f[1]+",", ",memory,"):
			list = append(list, groupMemory(filepath.Join(root, "sys/fs/cgroup/memory"), f[2], "memory.limit_in_bytes",
				"memory.usage_in_bytes", "total_")...)
		}
	}
	return list
}

// groupMemory are the limits of a control group and of those that it is in. In a container the path may be one that
// cannot be seen from here; then the root is the container's group.
func groupMemory(root, path, limit, usage, statPrefix string) (list []memory) {
	for dir := filepath.Clean("/" + path); ; dir = filepath.Dir(dir) {
		full := filepath.Join(root, dir)
		max, used := readNumber(filepath.Join(full, limit)), readNumber(filepath.Join(full, usage))
		if max >= 0 && used >= 0 && max < 1<<60 { // the first version has a number for no limit
			stat := readFields(filepath.Join(full, "memory.stat"))
			files := stat[statPrefix+"inactive_file"] + stat[statPrefix+"active_file"]
			list = append(list, memory{"the control group " + dir, max, max - used + files})
		}
		if dir == "/" {
			return list
		}
	}
}

// readNumber is negative where there is none, as for "max".
func readNumber(path string) int64 {
	text, err := os.ReadFile(path)
	if err != nil {
		return -1
	}
	n, err := strconv.ParseInt(strings.TrimSpace(string(text)), 10, 64)
	if err != nil {
		return -1
	}
	return n
}

// readFields reads lines of a name and a number.
func readFields(path string) map[string]int64 {
	fields := map[string]int64{}
	text, err := os.ReadFile(path)
	if err != nil {
		return fields
	}
	for line := range strings.Lines(string(text)) {
		if f := strings.Fields(line); len(f) >= 2 {
			if n, err := strconv.ParseInt(f[1], 10, 64); err == nil {
				fields[f[0]] = n
			}
		}
	}
	return fields
}
