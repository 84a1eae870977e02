package ublk

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// holdersTime bounds the flush of what is built on a device (device mapper, md). It may have other disks below it, and
// wait for those.
const holdersTime = 10 * time.Second

// writeBack makes the kernel write back what is dirty on the block device, its partitions, and what is built on them: the
// block device's own cache, and that of the file system on it, wherever that is mounted. A user of the disk need not be
// visible from here: a file system may be mounted in another mount namespace only.
func (d *Device) writeBack() error {
	flushed := make(chan error, 1)
	go func() { flushed <- flushDisk(d.id) }() // which ends with the disk, at the latest
	select {
	case err := <-flushed:
		return err
	case <-d.over:
		return nil // it broke, which is another error
	}
}

// flushDisk flushes a disk, and what is built on it for as long as that may take.
func flushDisk(id int) error {
	own, holders := flushNodes(fmt.Sprintf("ublkb%d", id))
	above := make(chan error, 1)
	go func() { above <- flushBlocks(holders) }() // which ends when those devices answer
	err := flushBlocks(own)
	if errors.Is(err, unix.ENOENT) && diskGone(id) {
		err = nil
	}
	select {
	case herr := <-above:
		err = errors.Join(err, herr)
	case <-time.After(holdersTime):
		err = errors.Join(err, fmt.Errorf("%s did not answer in %v", strings.Join(holders, ", "), holdersTime))
	}
	if err != nil {
		return fmt.Errorf("ublk: %w: %s: %w", ErrNotFlushed, blockPath(id), err)
	}
	return nil
}

// flushNodes returns the nodes of a block device and its partitions, and those of the devices that are built on them.
func flushNodes(name string) (own, holders []string) {
	seen := map[string]bool{}
	var walk func(name string, built bool)
	walk = func(name string, built bool) {
		if seen[name] {
			return
		}
		seen[name] = true
		dir := "/sys/class/block/" + name
		parts, _ := filepath.Glob(dir + "/*/partition")
		for _, p := range parts {
			walk(filepath.Base(filepath.Dir(p)), built)
		}
		above, _ := filepath.Glob(dir + "/holders/*")
		for _, h := range above {
			walk(filepath.Base(h), true)
		}
		if built {
			holders = append(holders, "/dev/"+name)
		} else {
			own = append(own, "/dev/"+name)
		}
	}
	walk(name, false)
	return own, holders
}

// flushBlocks flushes block devices (BLKFLSBUF). That is done by another process if there is a program for it, because
// one that waits for its own disk cannot be killed.
func flushBlocks(nodes []string) error {
	var errs []error
	var there []string
	for _, path := range nodes {
		if _, err := os.Stat(path); err != nil {
			errs = append(errs, err)
			continue
		}
		there = append(there, path)
	}
	flush := flushOneByOne
	if program, err := exec.LookPath("blockdev"); err == nil {
		flush = func(nodes []string) error {
			out, err := exec.Command(program, append([]string{"--flushbufs"}, nodes...)...).CombinedOutput()
			if err != nil {
				return fmt.Errorf("%s --flushbufs: %w (%.200q)", program, err, out)
			}
			return nil
		}
	}
	if len(there) > 0 {
		errs = append(errs, flush(there))
	}
	return errors.Join(errs...)
}

func flushOneByOne(nodes []string) error {
	var errs []error
	for _, path := range nodes {
		fd, err := openRetry(path, unix.O_RDONLY|unix.O_NONBLOCK)
		if err == nil {
			err = errors.Join(unix.IoctlSetInt(fd, unix.BLKFLSBUF, 0), unix.Close(fd))
		}
		if err != nil {
			errs = append(errs, &os.PathError{Op: "flush", Path: path, Err: err})
		}
	}
	return errors.Join(errs...)
}

// diskGone reports whether the kernel has no such block device. A missing node does not say so.
func diskGone(id int) bool {
	_, err := os.Lstat("/sys/class/block")
	_, derr := os.Lstat(fmt.Sprintf("/sys/class/block/ublkb%d", id))
	return err == nil && errors.Is(derr, unix.ENOENT)
}
