package ublk

import (
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// A process has a device open if one of its descriptors has the device's number. A path proves nothing: any user may
// have a file called ublkc0, or hold even the real node as a mere name (O_PATH), which needs no right to it.

// process is one that was found in /proc.
type process struct {
	pid  int
	name string
}

func (p process) String() string { return fmt.Sprintf("process %d (%s)", p.pid, printable(p.name)) }

// printable returns another user's text in a form that is safe in an error: characters that would move a terminal's
// cursor, or change what is shown before it, are written as Go writes them in a string.
func printable(text string) string {
	quoted := strconv.Quote(text)
	return strings.ReplaceAll(quoted[1:len(quoted)-1], `\"`, `"`)
}

// findOpeners returns the processes that have a file open for which opens returns true, given its link in /proc and the
// target of the link. hidden lists the processes whose files may not be looked at.
func findOpeners(opens func(link, target string) bool) (found []process, hidden []int) {
	procs, _ := os.ReadDir("/proc")
	for _, p := range procs {
		pid, err := strconv.Atoi(p.Name())
		if err != nil {
			continue
		}
		dir := "/proc/" + p.Name()
		fds, err := os.ReadDir(dir + "/fd")
		if errors.Is(err, unix.EACCES) || errors.Is(err, unix.EPERM) {
			hidden = append(hidden, pid)
		}
		for _, fd := range fds {
			link := dir + "/fd/" + fd.Name()
			if target, err := os.Readlink(link); err == nil && opens(link, target) {
				found = append(found, process{pid, nameOf(pid)})
				break
			}
		}
	}
	return found, hidden
}

// nameOf returns the name that a process has given itself.
func nameOf(pid int) string {
	name, _ := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid))
	return strings.TrimSpace(string(name))
}

// deviceBehind returns the number, as major:minor, of the device of the given kind (S_IFCHR or S_IFBLK) that is open
// behind a link in /proc. It is empty for everything else. Callers first sort out files of other kinds by the text of
// their links, since looking at a file on a dead network file system could hang.
func deviceBehind(link string, kind uint32) string {
	if onlyNames(link) {
		return ""
	}
	var st unix.Statx_t
	err := unix.Statx(unix.AT_FDCWD, link, unix.AT_STATX_DONT_SYNC|unix.AT_NO_AUTOMOUNT, unix.STATX_TYPE, &st)
	if err != nil || uint32(st.Mode)&unix.S_IFMT != kind {
		return ""
	}
	return fmt.Sprintf("%d:%d", st.Rdev_major, st.Rdev_minor)
}

// onlyNames reports whether a descriptor was opened with O_PATH (proc_pid_fdinfo(5)), or cannot be looked at.
func onlyNames(link string) bool {
	dir, fd := filepath.Split(link)
	text, err := os.ReadFile(filepath.Join(filepath.Dir(filepath.Clean(dir)), "fdinfo", fd))
	if err != nil {
		return true // it was closed meanwhile
	}
	for line := range strings.Lines(string(text)) {
		if value, ok := strings.CutPrefix(line, "flags:"); ok {
			flags, err := strconv.ParseUint(strings.TrimSpace(value), 8, 64)
			return err != nil || flags&unix.O_PATH != 0
		}
	}
	return true
}

// charNumber returns the number, as major:minor, of the char device of id. The driver's minor numbers are the ids.
func charNumber(id int) (string, error) {
	if b, err := os.ReadFile(fmt.Sprintf("/sys/class/ublk-char/ublkc%d/dev", id)); err == nil {
		return strings.TrimSpace(string(b)), nil
	}
	text, err := os.ReadFile("/proc/devices")
	if err != nil {
		return "", fmt.Errorf("ublk: find the number of %s: %w", charPath(id), err)
	}
	for line := range strings.Lines(string(text)) {
		if f := strings.Fields(line); len(f) == 2 && f[1] == "ublk-char" {
			return fmt.Sprintf("%s:%d", f[0], id), nil
		}
	}
	return "", fmt.Errorf("ublk: find the number of %s: %w", charPath(id), ErrNoDriver)
}

// server is what is known of the process that has a char device open: the device's server, or a process that is about
// to be.
type server struct {
	process
	found bool
	sure  bool // if none was found, there is none
}

// serverOf looks for the server of the device of id. pid is the process that the driver names. That process may be gone
// and its number another's, so it counts only if its files may not be looked at.
func serverOf(id, pid int) server {
	number, err := charNumber(id)
	if err != nil {
		return server{}
	}
	return charOpener(fmt.Sprintf("ublkc%d", id), number, pid)
}

// charOpener looks for the process that has the char device with the number open. The path of the device ends in name.
func charOpener(name, number string, pid int) server {
	found, hidden := findOpeners(func(link, target string) bool {
		return path.Base(strings.TrimSuffix(target, " (deleted)")) == name && deviceBehind(link, unix.S_IFCHR) == number
	})
	if len(found) > 0 {
		return server{process: found[0], found: true}
	}
	for _, h := range hidden {
		if h == pid {
			return server{process: process{pid, nameOf(pid)}, found: true}
		}
	}
	return server{sure: len(hidden) == 0 && seesAll()}
}

// firstPIDs is the initial PID namespace (PROC_PID_INIT_INO of linux/proc_ns.h).
const firstPIDs = "pid:[4026531836]"

// seesAll reports whether /proc has every process of the machine.
func seesAll() bool {
	ns, err := os.Readlink("/proc/self/ns/pid")
	return err == nil && ns == firstPIDs
}

// Server returns the id of the process that has the char device of a device open, or 0 if there is none. That process
// is the device's server, or about to be. sure is false if there may be one that cannot be seen from here, as from a
// container.
func Server(id int) (pid int, sure bool) {
	s := serverOf(id, 0)
	return s.pid, s.found || s.sure
}
