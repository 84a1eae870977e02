package ublk_test

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/vdisk/vdisk/ublk"
)

// TestIDsBeyond64: devices with ids above 63, the driver's former limit, are made and listed.
func TestIDsBeyond64(t *testing.T) {
	needDriver(t)
	const limit = "/sys/module/ublk_drv/parameters/ublks_max"
	if err := os.WriteFile(limit, []byte("300"), 0); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = os.WriteFile(limit, []byte("64"), 0) }()
	want := []int{2, 63, 64, 70, 255}
	for _, id := range want {
		create(t, ublk.Options{Size: 1 << 20, Depth: 4, ID: new(id), Cookie: uint64(id) + 1, ReadOnly: id == 70}, newRAMDisk(1<<20))
	}
	infos, err := ublk.Devices(stopCtx(t))
	var got []int
	for _, i := range infos {
		got = append(got, i.ID)
		if i.Cookie != uint64(i.ID)+1 || i.ServerPID != os.Getpid() || i.State != ublk.KernelLive || i.ReadOnly != (i.ID == 70) {
			t.Errorf("%+v", i)
		}
	}
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("listed %v, %v", got, err)
	}
	disk, err := os.OpenFile("/dev/ublkb70", os.O_RDWR, 0)
	if err == nil {
		_, err = disk.Write(make([]byte, 4096))
		_ = disk.Close()
	}
	if !errors.Is(err, syscall.EACCES) && !errors.Is(err, syscall.EPERM) {
		t.Errorf("writing to a read-only disk: %v", err)
	}
}

// TestUnprivileged: a user without rights makes a device, as far as the limit allows, and serves it.
func TestUnprivileged(t *testing.T) {
	if os.Getenv("UBLK_TEST_USER") == "1" {
		unprivilegedUser(t)
		return
	}
	needDriver(t)
	const limit = "/sys/module/ublk_drv/parameters/ublks_max"
	if err := os.WriteFile(limit, []byte("1"), 0); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = os.WriteFile(limit, []byte("64"), 0) }()
	if err := os.Chmod("/dev/ublk-control", 0o666); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = os.Chmod("/dev/ublk-control", 0o600) }()
	binary := filepath.Join(t.TempDir(), "test")
	run(t, "cp", os.Args[0], binary)
	run(t, "chmod", "-R", "a+rX", filepath.Dir(filepath.Dir(binary)))
	stop := make(chan struct{})
	defer close(stop)
	go func() { // what a udev rule does
		for {
			select {
			case <-stop:
				return
			default:
			}
			for _, node := range []string{"/dev/ublkc20", "/dev/ublkb20"} {
				_ = os.Chown(node, 1000, 1000)
			}
		}
	}()
	cmd := exec.Command(binary, "-test.run=^TestUnprivileged$", "-test.v")
	cmd.Env = append(os.Environ(), "UBLK_TEST_USER=1")
	cmd.Dir = "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 1000, Gid: 1000}}
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Errorf("%v\n%s", err, out)
	}
	nothingLeft(t)
	for _, o := range []ublk.Options{{Recovery: ublk.RecoverReissue}, {Copy: ublk.CopyUser}} {
		o.Size, o.Unprivileged = 1<<20, true
		if _, err := ublk.Create(stopCtx(t), o, newRAMDisk(1<<20)); !errors.Is(err, ublk.ErrInvalid) || !strings.Contains(err.Error(), "unprivileged") {
			t.Errorf("%+v: %v", o, err)
		}
	}
}

// unprivilegedUser is the user of TestUnprivileged.
func unprivilegedUser(t *testing.T) {
	if _, err := ublk.Create(stopCtx(t), ublk.Options{Size: 1 << 20}, newRAMDisk(1<<20)); !errors.Is(err, ublk.ErrPermission) {
		t.Errorf("a privileged device: %v", err)
	}
	o := ublk.Options{Size: 1 << 20, Depth: 4, ID: new(20), Unprivileged: true}
	d, err := ublk.Create(stopCtx(t), o, newRAMDisk(1<<20))
	if err != nil {
		t.Fatal(err)
	}
	checkUserDisk(t, d)
	o.ID = new(21)
	if _, err := ublk.Create(stopCtx(t), o, newRAMDisk(1<<20)); !errors.Is(err, ublk.ErrNoFreeDevice) || !strings.Contains(err.Error(), "ublks_max") {
		t.Errorf("one device more than the limit: %v", err)
	}
	infos, err := ublk.Devices(stopCtx(t))
	if err != nil || len(infos) != 1 || infos[0].OwnerUID != 1000 || infos[0].Size != 1<<20 {
		t.Errorf("Devices: %+v, %v", infos, err)
	}
	closeDevice(t, d)
}

func checkUserDisk(t *testing.T, d *ublk.Device) {
	t.Helper()
	if d.Features()&ublk.FeatureUnprivileged == 0 {
		t.Errorf("granted %v", ublk.FeatureSet{Bits: d.Features()}.Names())
	}
	var fd int
	repeat(t, func() (err error) { fd, err = unix.Open(d.Path(), unix.O_RDWR|unix.O_CLOEXEC, 0); return err })
	defer unix.Close(fd)
	if _, err := unix.Pwrite(fd, []byte("user"), 4096); err != nil || unix.Fsync(fd) != nil {
		t.Errorf("write: %v", err)
	}
}

// queueThreads returns the ids of the threads that serve a device, by queue.
func queueThreads(t testing.TB, d *ublk.Device) []int {
	t.Helper()
	tids := make([]int, d.Options().Queues)
	tasks, _ := filepath.Glob("/proc/self/task/*/comm")
	for _, comm := range tasks {
		b, _ := os.ReadFile(comm)
		for q := range tids {
			if strings.TrimSpace(string(b)) == fmt.Sprintf("ublk%dq%d", d.ID(), q) {
				tids[q], _ = strconv.Atoi(filepath.Base(filepath.Dir(comm)))
			}
		}
	}
	if slices.Contains(tids, 0) {
		t.Fatalf("threads of the queues: %v", tids)
	}
	return tids
}

// TestAffinity: the queues' threads share the CPUs as the block layer's queues do, unless NoAffinity is set.
func TestAffinity(t *testing.T) {
	needDriver(t)
	var all unix.CPUSet
	if err := unix.SchedGetaffinity(0, &all); err != nil {
		t.Fatal(err)
	}
	for _, free := range []bool{false, true} {
		d := create(t, ublk.Options{Size: 1 << 20, Queues: 2, NoAffinity: free}, newRAMDisk(1<<20))
		tids := queueThreads(t, d)
		sum := 0
		for q, tid := range tids {
			var set unix.CPUSet
			if err := unix.SchedGetaffinity(tid, &set); err != nil {
				t.Fatal(err)
			}
			sum += set.Count()
			if list, err := os.ReadFile(fmt.Sprintf("/sys/block/ublkb%d/mq/%d/cpu_list", d.ID(), q)); err == nil && !free {
				for _, cpu := range strings.Split(strings.TrimSpace(string(list)), ", ") {
					if n, err := strconv.Atoi(cpu); err == nil && !set.IsSet(n) {
						t.Errorf("queue %d is not on CPU %d", q, n)
					}
				}
			}
		}
		want := all.Count()
		if free {
			want *= len(tids)
		}
		if sum != want {
			t.Errorf("NoAffinity %v: the threads are on %d CPUs, want %d", free, sum, want)
		}
	}
}

// Flags of a task (include/linux/sched.h) that PR_SET_IO_FLUSHER sets.
const taskFlusher = 0x00080000 | 0x00100000 // PF_MEMALLOC_NOIO | PF_LOCAL_THROTTLE

func isFlusher(t testing.TB, tid int) bool {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/self/task/%d/stat", tid))
	if err != nil {
		return true // the thread is gone
	}
	_, rest, _ := strings.Cut(string(b), ") ")
	flags, err := strconv.ParseUint(strings.Fields(rest)[6], 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	return flags&taskFlusher == taskFlusher
}

// TestIOFlusher: the queue threads are marked, and SetIOFlusher marks all others, also while queues wait for requests.
func TestIOFlusher(t *testing.T) {
	needDriver(t)
	if os.Getenv("UBLK_TEST_FLUSHER") != "1" { // the mark stays, so in a process of its own
		cmd := exec.Command(os.Args[0], "-test.run=^TestIOFlusher$", "-test.v")
		cmd.Env = append(os.Environ(), "UBLK_TEST_FLUSHER=1")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("%v\n%s", err, out)
		}
		return
	}
	d := create(t, ublk.Options{Size: 1 << 20, Queues: 2}, newRAMDisk(1<<20))
	for _, tid := range queueThreads(t, d) {
		if !isFlusher(t, tid) {
			t.Errorf("thread %d is not marked", tid)
		}
	}
	if !d.IOFlusher() || !d.MemoryLocked() {
		t.Errorf("flusher %v, locked %v", d.IOFlusher(), d.MemoryLocked())
	}
	if isFlusher(t, os.Getpid()) {
		t.Error("the main thread is marked already")
	}
	if err := ublk.SetIOFlusher(); err != nil {
		if !errors.Is(err, syscall.ENOTSUP) || !strings.Contains(err.Error(), "cgo") {
			t.Error(err)
		}
		return
	}
	tasks, _ := os.ReadDir("/proc/self/task")
	for _, task := range tasks {
		if b, _ := os.ReadFile("/proc/self/task/" + task.Name() + "/comm"); strings.HasPrefix(string(b), "iou-wrk") {
			continue // the kernel's, for control commands
		}
		if tid, _ := strconv.Atoi(task.Name()); !isFlusher(t, tid) {
			t.Errorf("thread %d is not marked", tid)
		}
	}
}

// TestBackingDevices finds a disk below a partition, device mapper, a file system and a loop device on it.
func TestBackingDevices(t *testing.T) {
	needDriver(t)
	d := create(t, ublk.Options{Size: 64 << 20}, newRAMDisk(64<<20))
	backedBy := func(path string, want ...int) {
		t.Helper()
		if got, err := ublk.BackingDevices(path); err != nil || !slices.Equal(got, want) {
			t.Errorf("%s rests on %v, %v; want %v", path, got, err, want)
		}
	}
	backedBy("/tmp")
	backedBy("/proc/self")
	backedBy(d.Path(), d.ID())
	if _, err := ublk.BackingDevices("/nowhere"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("nowhere: %v", err)
	}
	table := make([]byte, 512) // one MBR partition of 65536 sectors from 2048 on
	table[446+4] = 0x83
	binary.LittleEndian.PutUint32(table[446+8:], 2048)
	binary.LittleEndian.PutUint32(table[446+12:], 65536)
	table[510], table[511] = 0x55, 0xaa
	if err := os.WriteFile(d.Path(), table, 0); err != nil {
		t.Fatal(err)
	}
	run(t, "partx", "-a", d.Path())
	part := d.Path() + "p1"
	repeat(t, func() error { _, err := os.Stat(part); return err })
	backedBy(part, d.ID())
	run(t, "sh", "-c", "echo 0 65536 linear "+part+" 0 | dmsetup create ublkdm")
	defer func() { _ = exec.Command("dmsetup", "remove", "ublkdm").Run() }()
	run(t, "dmsetup", "mknodes")
	backedBy("/dev/mapper/ublkdm", d.ID())
	run(t, "mkfs.ext4", "-q", "/dev/mapper/ublkdm")
	dir := t.TempDir()
	run(t, "mount", "/dev/mapper/ublkdm", dir)
	defer func() { _ = exec.Command("umount", dir).Run() }()
	backedBy(dir, d.ID())
	run(t, "modprobe", "loop")
	run(t, "truncate", "-s", "16M", dir+"/image")
	run(t, "mkfs.ext4", "-q", dir+"/image")
	inner := t.TempDir()
	run(t, "mount", "-o", "loop", dir+"/image", inner)
	defer func() { _ = exec.Command("umount", inner).Run() }()
	backedBy(inner+"/lost+found", d.ID())
}
