package main

import (
	"bytes"
	"context"
	"math/rand/v2"
	"os"
	"os/exec"
	"testing"

	"github.com/vdisk/vdisk/internal/testwatch"
	"github.com/vdisk/vdisk/ublk"
)

// The example is a disk: it keeps a file system, and goes when its context ends.
func TestRAMDisk(t *testing.T) {
	if os.Getenv("VDISK_GUEST") != "1" {
		t.Skip("needs a kernel with ublk_drv: runs in the guest (VDISK_GUEST=1)")
	}
	command(t, "modprobe", "ublk_drv")
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	paths, end := make(chan string, 1), make(chan error, 1)
	go func() {
		end <- serve(ctx, ublk.Options{Size: 64 << 20, Queues: 2}, func(path string) { paths <- path })
	}()
	var path string
	select {
	case path = <-paths:
	case err := <-end:
		t.Fatal(err)
	}
	fileSystem(t, path)
	cancel()
	if err := testwatch.Wait(t, testwatch.Long, "the end of the server", end); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(path); !os.IsNotExist(err) {
		t.Errorf("%s is still there: %v", path, err)
	}
}

// fileSystem writes a file to a new file system and reads it back from the disk.
func fileSystem(t *testing.T, path string) {
	t.Helper()
	command(t, "mkfs.ext4", "-q", path)
	dir := t.TempDir()
	command(t, "mount", path, dir)
	data := make([]byte, 5<<20)
	random := rand.NewChaCha8([32]byte{1})
	_, _ = random.Read(data)
	if err := os.WriteFile(dir+"/file", data, 0o600); err != nil {
		t.Error(err)
	}
	command(t, "umount", dir)
	command(t, "blockdev", "--flushbufs", path)
	command(t, "mount", "-o", "ro", path, dir)
	defer command(t, "umount", dir)
	if got, err := os.ReadFile(dir + "/file"); err != nil || !bytes.Equal(got, data) {
		t.Errorf("the file came back as %d bytes, error %v", len(got), err)
	}
}

func command(t *testing.T, name string, args ...string) {
	t.Helper()
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		t.Fatalf("%s %v: %v\n%s", name, args, err, out)
	}
}
