package ublk_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vdisk/vdisk/ublk"
)

// noLeftovers makes the test fail if it leaves a device, a process that hangs in the kernel, or a complaint of the
// kernel. needDriver calls it first, so that it runs after the test's own clean-up.
func noLeftovers(t testing.TB) {
	t.Helper()
	log := openKernelLog(t)
	t.Cleanup(func() {
		within(t, 20*time.Second, "devices are left", devicesGone)
		within(t, 20*time.Second, "threads hang in the kernel", noHangs)
		for _, line := range log.complaints() {
			if !strings.Contains(line, pretended) {
				t.Errorf("the kernel's log: %s", line)
			}
		}
		log.close()
	})
}

// within polls until check returns nil, and fails the test with its last answer when that takes too long.
func within(t testing.TB, limit time.Duration, what string, check func() error) {
	t.Helper()
	if err := poll(limit, check); err != nil {
		t.Errorf("%s after %v: %v", what, limit, err)
	}
}

func poll(limit time.Duration, check func() error) error {
	for deadline := time.Now().Add(limit); ; time.Sleep(20 * time.Millisecond) {
		err := check()
		if err == nil || time.Now().After(deadline) {
			return err
		}
	}
}

// devicesGone returns an error if there are devices in the driver, or nodes in /dev.
func devicesGone() error {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	infos, err := ublk.Devices(ctx)
	if err != nil {
		return err
	}
	nodes, _ := filepath.Glob("/dev/ublk[bc]*")
	if len(infos)+len(nodes) > 0 {
		return fmt.Errorf("devices %+v, nodes %v", infos, nodes)
	}
	return nil
}

const kernelThread = 0x00200000 // PF_KTHREAD of include/linux/sched.h

// noHangs returns an error if there are threads of user processes in uninterruptible sleep. A short sleep is no hang,
// so the caller asks again.
func noHangs() error {
	var all []error
	stats, _ := filepath.Glob("/proc/[0-9]*/task/[0-9]*/stat")
	for _, stat := range stats {
		state, flags := taskState(stat)
		if state != "D" || flags&kernelThread != 0 {
			continue
		}
		dir := filepath.Dir(stat)
		name, _ := os.ReadFile(dir + "/comm")
		stack, _ := os.ReadFile(dir + "/stack")
		all = append(all, fmt.Errorf("%s (%s): %s", strings.TrimSpace(string(name)), dir, stack))
	}
	return errors.Join(all...)
}

// taskState reads state and flags from a stat file of /proc (proc_pid_stat(5): the third and the ninth field, after the
// name in parentheses).
func taskState(stat string) (state string, flags uint64) {
	text, _ := os.ReadFile(stat)
	fields := strings.Fields(string(text[strings.LastIndexByte(string(text), ')')+1:]))
	if len(fields) < 7 {
		return "", 0
	}
	flags, _ = strconv.ParseUint(fields[6], 10, 64)
	return fields[0], flags
}

// kernelLog reads the messages that the kernel logs after it was opened.
type kernelLog struct{ fd int }

// complaint matches messages that no test may cause. I/O errors are not among them, because disks are made to fail.
var complaint = regexp.MustCompile(`hung task|blocked for more than|BUG:|WARNING:|Oops|general protection fault|kernel BUG at|` +
	`refcount_t|Invalid wait context|detected stall`)

func openKernelLog(t testing.TB) *kernelLog {
	t.Helper()
	fd, err := unix.Open("/dev/kmsg", unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := unix.Seek(fd, 0, unix.SEEK_END); err != nil {
		t.Fatal(err)
	}
	return &kernelLog{fd}
}

// complaints returns the lines since the last call that match complaint. Each read of /dev/kmsg returns one record.
func (l *kernelLog) complaints() []string {
	var lines []string
	buf := make([]byte, 8192)
	for {
		n, err := unix.Read(l.fd, buf)
		switch {
		case err == unix.EPIPE || err == unix.EINTR: // records were overwritten before we read them
			continue
		case err != nil || n <= 0:
			return lines
		}
		_, text, _ := strings.Cut(string(buf[:n]), ";")
		if complaint.MatchString(text) {
			lines = append(lines, strings.TrimSpace(text))
		}
	}
}

func (l *kernelLog) close() { _ = unix.Close(l.fd) }

// pretended marks the complaint that TestLeftoversAreSeen makes itself.
const pretended = "ublk test, not the kernel"

// TestLeftoversAreSeen: noLeftovers finds everything that it looks for.
func TestLeftoversAreSeen(t *testing.T) {
	needDriver(t)
	log := openKernelLog(t)
	defer log.close()
	d := create(t, ublk.Options{Size: 1 << 20}, newRAMDisk(1<<20))
	if err := devicesGone(); err == nil {
		t.Error("a live device is not seen")
	}
	kmsg, err := os.OpenFile("/dev/kmsg", os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer kmsg.Close()
	if _, err := kmsg.WriteString(pretended + ": refcount_t\n"); err != nil {
		t.Fatal(err)
	}
	if got := log.complaints(); len(got) != 1 || !strings.Contains(got[0], pretended) {
		t.Errorf("complaints: %q", got)
	}
	closeDevice(t, d)
	if err := devicesGone(); err != nil {
		t.Error(err)
	}
	if state, flags := taskState("/proc/self/task/" + strconv.Itoa(unix.Gettid()) + "/stat"); state != "R" || flags == 0 {
		t.Errorf("the state of a running thread is %q, flags %#x", state, flags)
	}
	if _, flags := taskState("/proc/2/task/2/stat"); flags&kernelThread == 0 {
		t.Error("kthreadd is not seen as a kernel thread")
	}
}
