package ublk

import (
	"errors"
	"syscall"
)

// Errors that a caller can match with errors.Is. The error that is returned adds what was being done, to which device,
// and the errno.
var (
	// ErrNoDriver: the driver is not loaded, so there is no device.
	ErrNoDriver = errors.New("the kernel has no ublk driver loaded: run 'modprobe ublk_drv' " +
		"(CONFIG_BLK_DEV_UBLK, Linux 6.0 or later; this library needs 6.1)")
	// ErrPermission: the process may not open the control device, does not have it in its /dev, or lacks CAP_SYS_ADMIN.
	ErrPermission = errors.New("not permitted: run as root, or with CAP_SYS_ADMIN and access to /dev/ublk-control")
	// ErrKernelTooOld: the driver or io_uring lacks a feature that is needed.
	ErrKernelTooOld = errors.New("the kernel is too old: Linux 6.1 or later is needed")
	// ErrNoFreeDevice: the driver has reached its limit on devices.
	ErrNoFreeDevice = errors.New("no free ublk device: delete one, or raise the limit in " +
		"/sys/module/ublk_drv/parameters/ublks_max")
	// ErrExists: the device id that was asked for is taken.
	ErrExists = errors.New("the device id is taken: choose another, or let the kernel choose")
	// ErrNotFound: there is no device with that id.
	ErrNotFound = errors.New("no such ublk device")
	// ErrNoNode: the device is there, but this /dev has no node for it, as in a container.
	ErrNoNode = errors.New("this /dev has no node of the device: run where /dev is the machine's (a devtmpfs)")
	// ErrUnlisted: the devices cannot be listed, as in a container without /sys. There may be some.
	ErrUnlisted = errors.New("the devices of the machine cannot be listed here")
	// ErrBusy: the block device is open, mounted or otherwise held, or another process serves it.
	ErrBusy = errors.New("the device is in use")
	// ErrNotRecoverable: the device cannot be recovered. It was made without Options.Recovery or with features that
	// this package does not serve, it has no disk any more, it has another cookie, or an earlier recovery left it in a
	// state from which the kernel cannot go on.
	ErrNotRecoverable = errors.New("the device cannot be recovered")
	// ErrStopped: something other than Stop, Close or Quiesce of this process ended the device.
	ErrStopped = errors.New("the device was stopped from outside this process")
	// ErrNotFlushed: the device has ended, but data that its users wrote without a sync may not have been written back.
	ErrNotFlushed = errors.New("what is on the disk was not all written back")
	// ErrInvalid: the options contradict each other, or exceed a limit of the driver.
	ErrInvalid = errors.New("invalid option")
)

// errnoOf returns the errno with which a request fails when its handler answers err. EAGAIN would tell the block layer
// to retry a non-blocking request, which no handler can mean, so it becomes EIO like everything unknown.
func errnoOf(err error) syscall.Errno {
	var errno syscall.Errno
	if errors.As(err, &errno) && errno > 0 && errno < 4096 && errno != syscall.EAGAIN {
		return errno
	}
	return syscall.EIO
}
