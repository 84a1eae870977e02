package ublk

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// KernelState is the state of a device in the driver (UBLK_S_DEV_*).
type KernelState uint16

// The states of a device in the driver.
const (
	KernelDead     KernelState = 0 // not started, or stopped
	KernelLive     KernelState = 1
	KernelQuiesced KernelState = 2 // its server is gone, requests wait for recovery
	KernelFailIO   KernelState = 3 // its server is gone, requests fail until recovery
)

// String returns the name of the state.
func (s KernelState) String() string {
	switch s {
	case KernelDead:
		return "dead"
	case KernelLive:
		return "live"
	case KernelQuiesced:
		return "quiesced"
	case KernelFailIO:
		return "fail-io"
	}
	return fmt.Sprintf("state %d", uint16(s))
}

// DeviceInfo describes one device of the machine, whichever process serves it.
type DeviceInfo struct {
	ID         int
	State      KernelState
	ServerPID  int // 0 when no process serves it
	Queues     int
	Depth      int
	MaxIOBytes int
	Size       int64 // bytes
	ReadOnly   bool
	Features   Feature
	Cookie     uint64 // Options.Cookie of the server that made it
	OwnerUID   int
	OwnerGID   int
}

// Path returns the path of the block device. It exists while the device is live or waits for recovery.
func (i DeviceInfo) Path() string { return blockPath(i.ID) }

// Devices lists all ublk devices of the machine, by id. A device that goes away meanwhile is left out. If Devices
// cannot describe all of them, it returns an error beside those that it can describe. So without an error, a device
// that is not in the list is not there. If sysfs does not list the devices, the error is ErrUnlisted.
func Devices(ctx context.Context) ([]DeviceInfo, error) {
	c, err := openControl()
	if err != nil {
		return nil, err
	}
	ids, err := deviceIDs(classDir, "/dev")
	all, derr := c.describeAll(ctx, ids)
	return all, errors.Join(err, derr)
}

func (c *control) describeAll(ctx context.Context, ids []int) (all []DeviceInfo, err error) {
	for _, id := range ids {
		info, derr := c.describe(ctx, id)
		switch {
		case derr == nil:
			all = append(all, info)
		case !errors.Is(derr, ErrNotFound):
			err = errors.Join(err, derr)
		}
		if ctx.Err() != nil {
			return all, errors.Join(err, ctx.Err())
		}
	}
	return all, err
}

// classDir is where sysfs lists the char devices, which exist from ADD to DEL.
const classDir = "/sys/class/ublk-char"

// deviceIDs finds the ids by the char devices in a folder of sysfs. If there is no sysfs, it returns the ids whose
// nodes are in dev, which may not be all, with ErrUnlisted.
func deviceIDs(class, dev string) (ids []int, err error) {
	entries, rerr := os.ReadDir(class)
	var st unix.Statfs_t
	if rerr == nil && (unix.Statfs(class, &st) != nil || st.Type != unix.SYSFS_MAGIC) {
		rerr = fmt.Errorf("%s is no part of a sysfs", class)
	}
	if rerr != nil {
		err = fmt.Errorf("ublk: %w: %w", ErrUnlisted, rerr)
		if entries, rerr = os.ReadDir(dev); rerr != nil {
			return nil, errors.Join(err, rerr)
		}
	}
	for _, e := range entries {
		if id, ok := idOf(e.Name(), "ublkc"); ok {
			ids = append(ids, id)
		}
	}
	slices.Sort(ids)
	return ids, err
}

// maxDeviceID is above all ids: the driver's ids are minor numbers (MINORBITS of linux/kdev_t.h).
const maxDeviceID = 1 << 20

// idOf returns the id in the name of a device, prefix and id. ok is false for every other name: where the names come
// from /dev, anything may have them.
func idOf(name, prefix string) (id int, ok bool) {
	rest, ok := strings.CutPrefix(name, prefix)
	if !ok {
		return 0, false
	}
	id, err := strconv.Atoi(rest)
	return id, err == nil && id >= 0 && id < maxDeviceID && strconv.Itoa(id) == rest
}

func (c *control) describe(ctx context.Context, id int) (DeviceInfo, error) {
	k, err := c.getInfo(ctx, id)
	if err != nil {
		return DeviceInfo{}, err
	}
	p, err := c.getParams(ctx, k.target())
	if err != nil {
		return DeviceInfo{}, err
	}
	return DeviceInfo{
		ID:         id,
		State:      KernelState(k.state),
		ServerPID:  max(int(k.serverPID), 0),
		Queues:     int(k.queues),
		Depth:      int(k.depth),
		MaxIOBytes: int(k.maxIOBytes),
		Size:       int64(p.basic.devSectors) << sectorShift,
		ReadOnly:   p.basic.attrs&attrReadOnly != 0,
		Features:   Feature(k.flags),
		Cookie:     k.serverFlags,
		OwnerUID:   int(k.ownerUID),
		OwnerGID:   int(k.ownerGID),
	}, nil
}

// udevTime is how long udev may have the char device open. A process that has it open for longer is the server.
const udevTime = 500 * time.Millisecond

// Delete removes a device that no process serves. If a process serves it, only that process can stop it (ErrBusy).
// Without force, Delete also returns ErrBusy if the block device is in use, or waits to be recovered. With force, the
// requests that wait on it fail.
//
// A block device that is open goes when its last user closes it. Delete then returns ErrBusy after a while.
func Delete(ctx context.Context, id int, force bool) error {
	c, err := openControl()
	if err != nil {
		return err
	}
	return deleteDevice(ctx, c, id, force)
}

func deleteDevice(ctx context.Context, c *control, id int, force bool) error {
	info, err := c.unserved(ctx, id)
	if err != nil {
		return err
	}
	// A device that is live without a server is about to wait: the driver has not noticed yet that its server is gone.
	waits := KernelState(info.state) != KernelDead && Feature(info.flags)&FeatureUserRecovery != 0
	if waits && !force {
		return fmt.Errorf("ublk: delete device %d: %w: it waits to be recovered", id, ErrBusy)
	}
	if us := users(id); len(us) > 0 && !force {
		return fmt.Errorf("ublk: delete device %d: %w: %s", id, ErrBusy, describeUsers(us))
	}
	err = c.del(ctx, info.target()) // DEL stops it first
	switch {
	case err == nil, gone(err):
		return nil
	case errors.Is(err, errHeld):
		return fmt.Errorf("ublk: device %d is stopped, and goes when its last user closes it (%s): %w",
			id, describeUsers(users(id)), ErrBusy)
	}
	return deviceError("delete", id, err)
}

// unserved returns the driver's information about a device that no process serves. If one serves it, the error matches
// ErrBusy.
func (c *control) unserved(ctx context.Context, id int) (*devInfo, error) {
	for begin := time.Now(); ; {
		info, err := c.getInfo(ctx, id)
		if err != nil {
			return nil, err
		}
		s := serverOf(id, int(info.serverPID))
		live := KernelState(info.state) == KernelLive
		since := time.Since(begin)
		switch {
		case !s.found && (s.sure || !live):
			return info, nil
		case s.found && (since > udevTime || s.pid == os.Getpid()):
			return nil, fmt.Errorf("ublk: delete device %d: %w: %v serves it, and has to stop it", id, ErrBusy, s)
		case since > settleDriver:
			return nil, fmt.Errorf("ublk: delete device %d: %w: the driver says that process %d serves it, and that process cannot be seen from here",
				id, ErrBusy, info.serverPID)
		}
		if err := sleep(ctx, 50*time.Millisecond); err != nil {
			return nil, fmt.Errorf("ublk: delete device %d: %w", id, err)
		}
	}
}
