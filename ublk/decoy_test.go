package ublk

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// oneDevice is a driver with a single device, whose id is 7.
type oneDevice struct {
	state KernelState
	info2 syscall.Errno // what GET_DEV_INFO2 and GET_DEV_INFO answer
	info  syscall.Errno

	asked func() // called when the parameters are

	started, deleted int
}

func (d *oneDevice) run(_ context.Context, op uint32, _ ctrlCmd, buf unsafe.Pointer) (int32, error) {
	info := devInfo{
		devID: 7, queues: 1, depth: 1, maxIOBytes: 4096, state: uint16(d.state), serverPID: -1, serverFlags: 77,
		flags: uint64(FeatureUserRecovery | FeatureRecoveryReissue | FeatureIoctlEncode),
	}
	switch op {
	case cmdGetFeatures:
		*(*uint64)(buf) = uint64(FeatureUserRecovery | FeatureRecoveryReissue | FeatureIoctlEncode | FeatureQuiesce)
	case cmdGetDevInfo2:
		if d.info2 != 0 {
			return -int32(d.info2), nil
		}
		*(*devInfo)(unsafe.Add(buf, charPathSize)) = info
	case cmdGetDevInfo:
		if d.info != 0 {
			return -int32(d.info), nil
		}
		*(*devInfo)(buf) = info
	case cmdGetParams:
		if d.asked != nil {
			d.asked()
		}
	case cmdStartUserRecovery:
		d.started++
		return -int32(syscall.EIO), nil // which ends the recovery
	case cmdDelDev:
		d.deleted++
	}
	return 0, nil
}

// holdAs starts a process of the user nobody that holds a file open. The file's name is that of a char device.
func holdAs(t *testing.T, name string) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root, to be another user")
	}
	dir, err := os.MkdirTemp("/tmp", "decoy-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o777); err != nil {
		t.Fatal(err)
	}
	decoy := exec.Command("/bin/sh", "-c", "exec 9>"+dir+"/"+name+"; echo ready; exec sleep 60")
	decoy.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	out, err := decoy.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := decoy.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = decoy.Process.Kill(); _ = decoy.Wait() })
	if n, err := out.Read(make([]byte, 6)); err != nil || n == 0 {
		t.Fatal(err)
	}
}

// TestDecoyIsNoServer: a user's file with the name of a char device does not prevent a waiting device from being
// recovered or deleted.
func TestDecoyIsNoServer(t *testing.T) {
	holdAs(t, "ublkc7")
	d := &oneDevice{state: KernelQuiesced}
	if _, err := recoverDevice(t.Context(), newControl(d), 7, RecoverOptions{}, nil); errors.Is(err, ErrBusy) || d.started != 1 {
		t.Errorf("recover: START was sent %d times: %v", d.started, err)
	}
	if err := deleteDevice(t.Context(), newControl(d), 7, true); err != nil || d.deleted != 1 {
		t.Errorf("delete: DEL was sent %d times: %v", d.deleted, err)
	}
	d = &oneDevice{state: KernelDead}
	if err := deleteDevice(t.Context(), newControl(d), 7, false); err != nil || d.deleted != 1 {
		t.Errorf("delete a dead device: DEL was sent %d times: %v", d.deleted, err)
	}
}

// TestCharOpener: only an open descriptor of the real device counts. /dev/full stands for a char device.
func TestCharOpener(t *testing.T) {
	const number = "1:7"
	look := func(what string, want bool) {
		t.Helper()
		if s := charOpener("full", number, 0); (s.found && s.pid == os.Getpid()) != want {
			t.Errorf("%s: %+v", what, s)
		}
	}
	look("nothing is open", false)
	f, err := os.Create(filepath.Join(t.TempDir(), "full"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	look("another file of that name", false)
	fd, err := unix.Open("/dev/full", unix.O_PATH|unix.O_CLOEXEC, 0) // for which no right is needed
	if err != nil {
		t.Fatal(err)
	}
	look("held as a name", false)
	_ = unix.Close(fd)
	if fd, err = unix.Open("/dev/full", unix.O_RDONLY|unix.O_CLOEXEC, 0); err != nil {
		t.Fatal(err)
	}
	look("open", true)
	_ = unix.Close(fd)
	if s := charOpener("full", number, os.Getpid()); s.found {
		t.Errorf("a process that has it not open, as can be seen: %+v", s)
	}
}

// TestDeleteKeepsAServedDevice: a live device is not deleted if its server cannot be seen.
func TestDeleteKeepsAServedDevice(t *testing.T) {
	if s := serverOf(7, 0); s.found || s.sure {
		t.Skip("this machine's driver knows the server of its device 7")
	}
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	d := &oneDevice{state: KernelLive}
	if err := deleteDevice(ctx, newControl(d), 7, true); err == nil || d.deleted != 0 {
		t.Errorf("DEL was sent %d times: %v", d.deleted, err)
	}
}

// TestNoNodeIsNoProof: a device that is missing in /dev or /sys may be in the kernel even so.
func TestNoNodeIsNoProof(t *testing.T) {
	for _, c := range []struct {
		info2, info syscall.Errno
		want        error
	}{
		{0, syscall.EINVAL, nil},
		{syscall.ENOENT, 0, nil}, // no node, or
		{syscall.EINVAL, 0, nil}, // another file in its place
		{syscall.ENOENT, syscall.EINVAL, ErrNoNode},
		{syscall.ENOENT, syscall.EPERM, ErrNoNode},
		{syscall.ENOENT, syscall.ENODEV, ErrNotFound},
		{syscall.ENODEV, 0, ErrNotFound},
		{syscall.EOPNOTSUPP, syscall.ENODEV, ErrNotFound},
	} {
		i, err := newControl(&oneDevice{info2: c.info2, info: c.info}).getInfo(t.Context(), 7)
		if !errors.Is(err, c.want) || (err == nil) != (i != nil) || err != nil && c.want != ErrNotFound && errors.Is(err, ErrNotFound) {
			t.Errorf("GET_DEV_INFO2 %v, GET_DEV_INFO %v: %v", c.info2, c.info, err)
		}
		if err == nil && i.serverFlags != 77 {
			t.Errorf("%+v", i)
		}
	}
	// Without a sysfs only the nodes in /dev can be listed, which may not be all.
	dev := t.TempDir()
	for _, name := range []string{"ublkc7", "ublkb7", "ublk-control", "null"} {
		if err := os.WriteFile(filepath.Join(dev, name), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for what, class := range map[string]string{"no sysfs": filepath.Join(dev, "none"), "a folder of another file system": t.TempDir()} {
		if ids, err := deviceIDs(class, dev); !errors.Is(err, ErrUnlisted) || len(ids) != 1 || ids[0] != 7 {
			t.Errorf("%s: %v, %v", what, ids, err)
		}
	}
	ended, cancel := context.WithCancel(t.Context())
	if list, err := newControl(&oneDevice{asked: cancel}).describeAll(ended, []int{7, 8}); len(list) != 1 || err == nil {
		t.Errorf("a list that was broken off looks whole: %v", list)
	}
	// One device that cannot be asked about does not hide the others.
	d := &oneDevice{info2: syscall.EIO, info: syscall.EIO}
	if list, err := newControl(d).describeAll(t.Context(), []int{7}); err == nil || len(list) != 0 {
		t.Error(list, err)
	}
}

// TestFlushGoesOn: if a node is missing, the others are flushed even so, and the error names the missing one.
func TestFlushGoesOn(t *testing.T) {
	dir := t.TempDir()
	log := filepath.Join(dir, "log")
	if err := os.WriteFile(filepath.Join(dir, "blockdev"), []byte("#!/bin/sh\necho \"$@\" >"+log+"\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
	there := filepath.Join(dir, "blockdev")
	if err := flushBlocks([]string{filepath.Join(dir, "missing"), there}); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a missing node: %v", err)
	}
	if text, err := os.ReadFile(log); err != nil || strings.TrimSpace(string(text)) != "--flushbufs "+there {
		t.Errorf("%q, %v", text, err)
	}
	if err := os.WriteFile(there, []byte("#!/bin/sh\necho no >&2; exit 1\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := flushBlocks([]string{there}); err == nil || !strings.Contains(err.Error(), "no") {
		t.Errorf("a flush that fails: %v", err)
	}
}
