package main

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/vdisk/vdisk/internal/testwatch"
	"github.com/vdisk/vdisk/ublk"
)

const size = 64 << 20

// makeFile makes a file of zeros; in the guest it lies on a disk, since tmpfs has no direct I/O on older kernels.
func makeFile(t *testing.T) string {
	t.Helper()
	dir := os.Getenv("VDISK_SCRATCH")
	if dir == "" {
		dir = t.TempDir()
	}
	path := filepath.Join(dir, "loop.img")
	if err := os.WriteFile(path, make([]byte, size), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.Remove(path) })
	return path
}

func TestBacking(t *testing.T) {
	path := makeFile(t)
	b, err := openBacking(path, false, false)
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	if b.size != size || b.align != 512 {
		t.Errorf("size %d, align %d", b.size, b.align)
	}
	data := make([]byte, 1<<20)
	for i := range data {
		data[i] = 7
	}
	if _, err := b.WriteAt(data, 0); err != nil {
		t.Fatal(err)
	}
	if err := b.WriteZeroes(4096, 8192); err != nil {
		t.Fatal(err)
	}
	if err := b.Discard(512<<10, 512<<10); err != nil {
		t.Fatal(err)
	}
	if err := b.Sync(); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, 1<<20)
	if _, err := b.ReadAt(got, 0); err != nil {
		t.Fatal(err)
	}
	for i, c := range got {
		zero := i >= 4096 && i < 12288 || i >= 512<<10
		if zero != (c == 0) {
			t.Fatalf("byte %d is %d", i, c)
		}
	}
	if _, err := openBacking(filepath.Dir(path), false, true); err == nil {
		t.Error("a folder was opened")
	}
}

// The example serves a file: what is written to the disk is in it, with and without O_DIRECT.
func TestLoop(t *testing.T) {
	if os.Getenv("VDISK_GUEST") != "1" {
		t.Skip("needs a kernel with ublk_drv: runs in the guest (VDISK_GUEST=1)")
	}
	command(t, "modprobe", "ublk_drv")
	for _, direct := range []bool{false, true} {
		file := makeFile(t)
		ctx, cancel := context.WithCancel(context.Background())
		defer cancel()
		paths, end := make(chan string, 1), make(chan error, 1)
		go func() {
			end <- serve(ctx, file, direct, 4, ublk.Options{Queues: 2}, func(path string) { paths <- path })
		}()
		var path string
		select {
		case path = <-paths:
		case err := <-end:
			t.Fatal(err)
		}
		verify := []string{
			"--name=v", "--rw=randwrite", "--bs=4k", "--size=4M", "--verify=crc32c", "--verify_fatal=1", "--direct=1",
			"--ioengine=io_uring", "--iodepth=8", "--fsync=64", "--randseed=7",
		}
		command(t, "fio", append(verify, "--filename="+path)...)
		command(t, "blkdiscard", "-o", "32M", "-l", "1M", path)
		// The kernel asks for zeros that keep their space.
		command(t, "blkdiscard", "-z", "-o", "40M", "-l", "1M", path)
		cancel()
		if err := testwatch.Wait(t, testwatch.Long, "the end of the server", end); err != nil {
			t.Error(err)
		}
		command(t, "fio", append(verify, "--verify_only", "--filename="+file)...)
		if used := allocated(t, file); used > size-(1<<20)+(64<<10) {
			t.Errorf("direct %v: %d bytes allocated after a discard of 1 MiB", direct, used)
		}
	}
}

func allocated(t *testing.T, path string) int64 {
	t.Helper()
	var st syscall.Stat_t
	if err := syscall.Stat(path, &st); err != nil {
		t.Fatal(err)
	}
	return st.Blocks * 512
}

func command(t *testing.T, name string, args ...string) {
	t.Helper()
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		t.Fatalf("%s %v: %v\n%s", name, args, err, out)
	}
}
