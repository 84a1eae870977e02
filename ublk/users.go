package ublk

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// user is one thing that holds a block device or one of its partitions.
type user struct {
	text    string
	lasting bool // not a passing open, as udev's are
}

// users finds out who holds the block device of id: mounts (of this mount namespace), swap, devices built on it and
// processes that have it open. It is for error messages, and finds what the process may see.
func users(id int) []user {
	var us []user
	devs := blockNumbers(id)
	for _, m := range mountsOf(devs) {
		us = append(us, user{"mounted on " + m, true})
	}
	name := fmt.Sprintf("ublkb%d", id)
	for _, pattern := range []string{"/sys/block/" + name + "/holders/*", "/sys/block/" + name + "/" + name + "p*/holders/*"} {
		found, _ := filepath.Glob(pattern)
		for _, f := range found {
			us = append(us, user{"part of " + filepath.Base(f), true})
		}
	}
	if swaps, err := os.ReadFile("/proc/swaps"); err == nil && strings.Contains(string(swaps), "/dev/"+name) {
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

// mountsOf returns the mount points of the devices, from /proc/self/mountinfo (proc_pid_mountinfo(5): the third field
// is major:minor, the fifth the mount point).
func mountsOf(devs map[string]bool) []string {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return nil
	}
	defer f.Close()
	var points []string
	for s := bufio.NewScanner(f); s.Scan(); {
		fields := strings.Fields(s.Text())
		if len(fields) > 4 && devs[fields[2]] {
			points = append(points, fields[4])
		}
	}
	return points
}

// openers returns the processes that have the block device or a partition open, but for this process's file except.
func openers(id, except int) []user {
	devs := blockNumbers(id)
	if len(devs) == 0 {
		return nil
	}
	prefix := fmt.Sprintf("/dev/ublkb%d", id)
	self := strconv.Itoa(os.Getpid())
	var us []user
	procs, _ := os.ReadDir("/proc")
	for _, p := range procs {
		if _, err := strconv.Atoi(p.Name()); err != nil {
			continue
		}
		dir := "/proc/" + p.Name()
		fds, err := os.ReadDir(dir + "/fd")
		if err != nil {
			continue // gone, or not ours to see
		}
		for _, fd := range fds {
			path := dir + "/fd/" + fd.Name()
			if p.Name() == self && fd.Name() == strconv.Itoa(except) || !opensBlock(path, prefix, devs) {
				continue
			}
			name, _ := os.ReadFile(dir + "/comm")
			us = append(us, user{fmt.Sprintf("open in %s (pid %s)", strings.TrimSpace(string(name)), p.Name()), false})
			break
		}
	}
	return us
}

// opensBlock tells whether the file behind a /proc link is one of the devices. Links that name another kind of file are
// told apart by their text, which spares a stat that a dead network file system could hold up.
func opensBlock(link, prefix string, devs map[string]bool) bool {
	target, err := os.Readlink(link)
	if err != nil || !strings.HasPrefix(target, "/dev/") && !strings.HasPrefix(target, prefix) {
		return false
	}
	var st unix.Stat_t
	if unix.Stat(link, &st) != nil || st.Mode&unix.S_IFMT != unix.S_IFBLK {
		return false
	}
	return devs[fmt.Sprintf("%d:%d", unix.Major(st.Rdev), unix.Minor(st.Rdev))]
}

// process is one that was found in /proc.
type process struct {
	pid  int
	name string
}

func (p process) String() string { return fmt.Sprintf("process %d (%s)", p.pid, p.name) }

// serverOf finds the process that has the char device of id open: its server, or one that is about to be. pid is who
// the driver says it is, which may be gone, and its number somebody else's; it counts if its files may not be looked
// at.
func serverOf(id, pid int) (process, bool) {
	node := fmt.Sprintf("/ublkc%d", id)
	procs, _ := os.ReadDir("/proc")
	for _, p := range procs {
		n, err := strconv.Atoi(p.Name())
		if err != nil {
			continue
		}
		dir := "/proc/" + p.Name()
		fds, err := os.ReadDir(dir + "/fd")
		open := err != nil && errors.Is(err, unix.EACCES) && n == pid
		for _, fd := range fds {
			if target, _ := os.Readlink(dir + "/fd/" + fd.Name()); strings.HasSuffix(target, node) {
				open = true
			}
		}
		if open {
			name, _ := os.ReadFile(dir + "/comm")
			return process{n, strings.TrimSpace(string(name))}, true
		}
	}
	return process{}, false
}
