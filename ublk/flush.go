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

// holdersTime bounds the flush of the devices that are built on a device (device mapper, md). They may have other disks
// below them too, and wait for those.
const holdersTime = 10 * time.Second

// writeBack makes the kernel write back dirty data of the block device, of its partitions, and of the devices that are
// built on them. That includes the data of file systems, wherever they are mounted: a file system may be mounted only
// in another mount namespace, where this process does not see it.
func (d *Device) writeBack() error {
	flushed := make(chan error, 1)
	go func() { flushed <- flushDisk(d.id) }() // ends with the disk, at the latest
	select {
	case err := <-flushed:
		return err
	case <-d.over:
		return nil // the queues have ended, and Err has the reason
	}
}

// flushDisk flushes a disk. It also flushes the devices that are built on it, and waits up to holdersTime for those.
func flushDisk(id int) error {
	own, holders := flushNodes(fmt.Sprintf("ublkb%d", id))
	above := make(chan error, 1)
	go func() { above <- flushBlocks(holders) }() // ends when those devices answer
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

// flushBlocks flushes block devices (BLKFLSBUF). If the program blockdev is installed, another process does it, because
// a process that waits for its own disk cannot be killed.
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

// diskGone reports whether the kernel has no such block device. A missing node in /dev is no proof of that.
func diskGone(id int) bool {
	_, err := os.Lstat("/sys/class/block")
	_, derr := os.Lstat(fmt.Sprintf("/sys/class/block/ublkb%d", id))
	return err == nil && errors.Is(derr, unix.ENOENT)
}
