package owner

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/vdisk/vdisk/ublk"
)

// memory is one limit on the memory that this process may use: the machine, or a control group that it is in.
type memory struct {
	name      string
	total     int64
	available int64 // what is free, or can be freed without writing anything
}

// limitBuffers limits the buffers of all devices together to a fraction of the memory that this process may use.
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

// hasMemoryFor refuses a device that would use up the memory: the kernel would sooner or later kill the process, which
// serves all the other devices. There must be enough for the idle device and for one busy queue; further requests wait
// for each other's buffers. Some memory must be left over, since available memory includes the pages of running
// programs: a guest of 512 MiB became slow and lost processes when 40 MiB were left.
func (o *Owner) hasMemoryFor(opts ublk.Options) error {
	idle, most := opts.Memory()
	need := idle + (most-idle)/int64(max(opts.Queues, 1))
	for _, m := range o.opts.memory() {
		if spare := min(max(m.total/16, 64<<20), 256<<20); m.available < need+spare {
			return fmt.Errorf("%w: a device needs up to %d KiB, and %s has %d KiB available, from which %d KiB are kept for others",
				ErrNoMemory, need>>10, m.name, m.available>>10, spare>>10)
		}
	}
	return nil
}

// room is one limit on threads, and how many more it allows.
type room struct {
	name string
	left int64
}

// spareThreads is how many threads are left for the runtime, which ends the process if it cannot make a thread, and for
// other programs.
const spareThreads = 64

// hasThreadsFor refuses a device if there is no room for its threads.
func (o *Owner) hasThreadsFor(opts ublk.Options) error {
	for _, r := range o.opts.threads() {
		if r.left < int64(opts.Queues)+spareThreads {
			return fmt.Errorf("%w for threads: a device takes one a queue, here %d, and %s allows %d more, from which %d are kept for others",
				ErrNoMemory, opts.Queues, r.name, max(r.left, 0), spareThreads)
		}
	}
	return nil
}

// runtimeThreads is the default of debug.SetMaxThreads. The runtime ends the process at that number.
const runtimeThreads = 10000

// readThreads reads the limits on threads from the files below root, as readMemory does.
func readThreads(root string) []room {
	var list []room
	if own, ok := readFields(filepath.Join(root, "proc/self/status"))["Threads:"]; ok {
		list = append(list, room{"the Go runtime", runtimeThreads - own})
	}
	// proc_loadavg(5): the fourth field is running/all threads.
	load, err := os.ReadFile(filepath.Join(root, "proc/loadavg"))
	if f := strings.Fields(string(load)); err == nil && len(f) > 3 {
		_, all, _ := strings.Cut(f[3], "/")
		most := readNumber(filepath.Join(root, "proc/sys/kernel/threads-max"))
		if n, err := strconv.ParseInt(all, 10, 64); err == nil && most >= 0 {
			list = append(list, room{"the kernel (kernel.threads-max)", most - n})
		}
	}
	for _, g := range groups(root, "pids") {
		max, used := readNumber(filepath.Join(g.path, "pids.max")), readNumber(filepath.Join(g.path, "pids.current"))
		if max >= 0 && used >= 0 {
			list = append(list, room{"the control group " + g.name + " (pids.max, TasksMax)", max - used})
		}
	}
	return list
}

// readMemory reads the limits on memory from the files below root, which is / except in tests. A file that cannot be
// read sets no limit.
func readMemory(root string) []memory {
	var list []memory
	info := readFields(filepath.Join(root, "proc/meminfo"))
	if total, ok := info["MemTotal:"]; ok {
		list = append(list, memory{"the machine", total << 10, info["MemAvailable:"] << 10})
	}
	for _, g := range groups(root, "memory") {
		limit, usage, prefix := "memory.max", "memory.current", ""
		if g.old {
			limit, usage, prefix = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"
		}
		max, used := readNumber(filepath.Join(g.path, limit)), readNumber(filepath.Join(g.path, usage))
		if max < 0 || used < 0 || max >= 1<<60 { // version 1 reports a huge number for no limit
			continue
		}
		stat := readFields(filepath.Join(g.path, "memory.stat"))
		files := stat[prefix+"inactive_file"] + stat[prefix+"active_file"]
		list = append(list, memory{"the control group " + g.name, max, max - used + files})
	}
	return list
}

// group is a control group that contains this process.
type group struct {
	name, path string
	old        bool // of cgroup version 1
}

// groups returns the control groups of this process that have a controller, from the innermost outwards. In a container
// the names may be those of the host, whose groups cannot be seen from there; then the root is the container's group.
func groups(root, controller string) (list []group) {
	text, err := os.ReadFile(filepath.Join(root, "proc/self/cgroup"))
	if err != nil {
		return nil
	}
	for line := range strings.Lines(string(text)) { // cgroups(7): hierarchy, controllers, path
		f := strings.SplitN(strings.TrimSuffix(line, "\n"), ":", 3)
		if len(f) < 3 {
			continue
		}
		top, old := filepath.Join(root, "sys/fs/cgroup"), f[1] != ""
		if old {
			if !slices.Contains(strings.Split(f[1], ","), controller) {
				continue
			}
			top = filepath.Join(top, controller)
		}
		for name := filepath.Clean("/" + f[2]); ; name = filepath.Dir(name) {
			list = append(list, group{name, filepath.Join(top, name), old})
			if name == "/" {
				break
			}
		}
	}
	return list
}

// readNumber returns the number in a file, or a negative number if there is none, as for "max".
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

// readFields reads lines that start with a name and a number.
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
