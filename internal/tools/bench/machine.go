package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"reflect"
	"runtime"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// parameters of a run.
type parameters struct {
	Rounds    int `json:"rounds"`
	Seconds   int `json:"seconds"`
	SizeMiB   int `json:"size_mib"`
	Snapshots int `json:"snapshots,omitempty"`
	Clones    int `json:"clones,omitempty"`
}

// A machine describes where and how a run was measured.
type machine struct {
	Date       string     `json:"date"`
	Processor  string     `json:"processor"`
	Processors int        `json:"processors"`
	MemoryGiB  int        `json:"memory_gib,omitempty"`
	Virtual    bool       `json:"virtual,omitempty"`
	System     string     `json:"system"`
	Kernel     string     `json:"kernel"`
	FileSystem string     `json:"file_system,omitempty"`
	Versions   []string   `json:"versions"`
	Missing    []string   `json:"missing,omitempty"` // peers that could not be measured, and why
	Busy       float64    `json:"busy"`              // percent of the processors that others used before the run
	Parameters parameters `json:"parameters"`
}

// same reports whether results of n can be added to those of m.
func (m machine) same(n machine) bool {
	m.Date, m.Busy = n.Date, n.Busy
	return reflect.DeepEqual(m, n)
}

func describe(ctx context.Context, h *host, p parameters) (machine, error) {
	m := machine{Date: time.Now().Format(time.DateOnly), Processors: runtime.NumCPU(), Parameters: p}
	m.Processor = field("/proc/cpuinfo", "model name", ":")
	m.Virtual = strings.Contains(field("/proc/cpuinfo", "flags", ":")+" ", " hypervisor ")
	m.System = strings.Trim(field("/etc/os-release", "PRETTY_NAME", "="), `"`)
	kib, _ := strconv.Atoi(strings.TrimSuffix(field("/proc/meminfo", "MemTotal", ":"), " kB"))
	m.MemoryGiB = (kib + 1<<19) >> 20
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return m, err
	}
	m.Kernel = "Linux " + unix.ByteSliceToString(u.Release[:])
	for _, c := range [][]string{{h.vdisk, "--version"}, {"qemu-nbd", "--version"}, {"nbdkit", "--version"}, {"fio", "--version"}} {
		out, err := exec.CommandContext(ctx, c[0], c[1:]...).Output()
		if err != nil {
			return m, fmt.Errorf("%s: %w", strings.Join(c, " "), err)
		}
		line, _, _ := strings.Cut(string(out), "\n")
		m.Versions = append(m.Versions, line)
	}
	out, err := exec.CommandContext(ctx, "stat", "-f", "-c", "%T", h.dir).Output()
	m.FileSystem = strings.TrimSpace(string(out))
	if m.FileSystem == "ext2/ext3" {
		m.FileSystem = "ext4" // they have the same number
	}
	m.Busy = busy(2 * time.Second)
	return m, err
}

// field is what stands behind a name in a file of such lines, or nothing.
func field(path, name, separator string) string {
	data, _ := os.ReadFile(path)
	for line := range strings.Lines(string(data)) {
		if k, v, is := strings.Cut(line, separator); is && strings.TrimSpace(k) == name {
			return strings.TrimSpace(v)
		}
	}
	return ""
}

// busy is the part of the processors that is used during d, in percent.
func busy(d time.Duration) float64 {
	all, idle := ticks()
	time.Sleep(d)
	a, i := ticks()
	if a == all {
		return 0
	}
	return (1 - (i-idle)/(a-all)) * 100
}

// ticks of all processors since the start, and those without work.
func ticks() (all, idle float64) {
	data, _ := os.ReadFile("/proc/stat")
	line, _, _ := strings.Cut(string(data), "\n")
	for i, f := range strings.Fields(line) {
		n, _ := strconv.ParseFloat(f, 64)
		if i >= 1 && i <= 8 { // those of guests are in user's
			all += n
		}
		if i == 4 || i == 5 {
			idle += n
		}
	}
	return all, idle
}
