package ublk

import (
	"fmt"
	"os"
	"path"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// user is one thing that holds a block device or one of its partitions.
type user struct {
	text    string
	lasting bool // not just an open file, which may be closed soon, as udev's are
}

// users lists the users of the block device of id: mounts (of this mount namespace), swap, devices that are built on
// it, and processes that have it open. It is for error messages, and may miss users that this process may not see.
func users(id int) []user {
	var us []user
	devs := blockNumbers(id)
	mounts, _ := os.ReadFile("/proc/self/mountinfo")
	for _, m := range mountsOf(devs, string(mounts)) {
		us = append(us, user{"mounted on " + printable(m), true})
	}
	name := fmt.Sprintf("ublkb%d", id)
	for _, pattern := range []string{"/sys/block/" + name + "/holders/*", "/sys/block/" + name + "/" + name + "p*/holders/*"} {
		found, _ := filepath.Glob(pattern)
		for _, f := range found {
			us = append(us, user{"part of " + printable(filepath.Base(f)), true})
		}
	}
	if swaps, err := os.ReadFile("/proc/swaps"); err == nil && swapsOn(name, string(swaps)) {
		us = append(us, user{"used as swap", true})
	}
	return append(us, openers(id, -1)...)
}

func lasting(us []user) bool {
	for _, u := range us {
		if u.lasting {
			return true
		}
	}
	return false
}

func describeUsers(us []user) string {
	if len(us) == 0 {
		return "held by a process or mount that cannot be seen from here"
	}
	texts := make([]string, len(us))
	for i, u := range us {
		texts[i] = u.text
	}
	return strings.Join(texts, ", ")
}

// blockNumbers returns "major:minor" of the block device and its partitions.
func blockNumbers(id int) map[string]bool {
	name := fmt.Sprintf("ublkb%d", id)
	devs := make(map[string]bool)
	for _, pattern := range []string{"/sys/block/" + name + "/dev", "/sys/block/" + name + "/" + name + "p*/dev"} {
		files, _ := filepath.Glob(pattern)
		for _, f := range files {
			if b, err := os.ReadFile(f); err == nil {
				devs[strings.TrimSpace(string(b))] = true
			}
		}
	}
	return devs
}

// mountsOf returns the mount points of the devices in a text like /proc/self/mountinfo (proc_pid_mountinfo(5): the
// third field is major:minor, the fifth the mount point). A line may have any length: an overlay's options make it
// long.
func mountsOf(devs map[string]bool, mountinfo string) []string {
	var points []string
	for line := range strings.Lines(mountinfo) {
		fields := strings.Fields(line)
		if len(fields) > 4 && devs[fields[2]] {
			points = append(points, unescapeMount(fields[4]))
		}
	}
	return points
}

// swapsOn reports whether a text like /proc/swaps (proc_swaps(5): the first field is the path) has the block device of
// that name or one of its partitions.
func swapsOn(name, swaps string) bool {
	for line := range strings.Lines(swaps) {
		fields := strings.Fields(line)
		if len(fields) == 0 {
			continue
		}
		rest, ok := strings.CutPrefix(fields[0], "/dev/"+name)
		if ok && (rest == "" || rest[0] == 'p') {
			return true
		}
	}
	return false
}

// openers returns the processes that have the block device or a partition open. It does not count this process's
// descriptor except.
func openers(id, except int) []user {
	devs := blockNumbers(id)
	if len(devs) == 0 {
		return nil
	}
	own := fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), except)
	found, _ := findOpeners(func(link, target string) bool {
		named := strings.HasPrefix(target, "/dev/") || strings.HasPrefix(path.Base(target), fmt.Sprintf("ublkb%d", id))
		return named && link != own && devs[deviceBehind(link, unix.S_IFBLK)]
	})
	var us []user
	for _, p := range found {
		us = append(us, user{fmt.Sprintf("open in %s (pid %d)", printable(p.name), p.pid), false})
	}
	return us
}
