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
)

// KernelState is what the driver says of a device (UBLK_S_DEV_*).
type KernelState uint16

// The states of a device in the driver.
const (
	KernelDead     KernelState = 0 // not started, or stopped
	KernelLive     KernelState = 1
	KernelQuiesced KernelState = 2 // its server is gone, requests wait for recovery
	KernelFailIO   KernelState = 3 // its server is gone, requests fail until recovery
)

// String names the state.
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

// DeviceInfo is one device of the machine, whoever serves it.
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

// Path is the block device's path; it exists while the device is live or waits for recovery.
func (i DeviceInfo) Path() string { return blockPath(i.ID) }

// Devices lists all ublk devices of the machine by their id. A device that goes away meanwhile is left out.
func Devices(ctx context.Context) ([]DeviceInfo, error) {
	c, err := openControl()
	if err != nil {
		return nil, err
	}
	ids, err := deviceIDs()
	if err != nil {
		return nil, err
	}
	var all []DeviceInfo
	for _, id := range ids {
		info, err := c.describe(ctx, id)
		if errors.Is(err, ErrNotFound) {
			continue
		}
		if err != nil {
			return all, err
		}
		all = append(all, info)
	}
	return all, nil
}

// deviceIDs finds the ids by the char devices, which exist from ADD to DEL.
func deviceIDs() ([]int, error) {
	entries, err := os.ReadDir("/sys/class/ublk-char")
	if err != nil {
		if entries, err = os.ReadDir("/dev"); err != nil {
			return nil, fmt.Errorf("ublk: list devices: %w", err)
		}
	}
	var ids []int
	for _, e := range entries {
		if rest, ok := strings.CutPrefix(e.Name(), "ublkc"); ok {
			if id, err := strconv.Atoi(rest); err == nil {
				ids = append(ids, id)
			}
		}
	}
	slices.Sort(ids)
	return ids, nil
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

// udevTime is how long somebody who has the char device open may be udev.
const udevTime = 500 * time.Millisecond

// Delete removes a device that no process serves, and never one that a process serves: that one has to stop it
// (ErrBusy). Without force it refuses with ErrBusy, too, when the block device is in use or waits to be recovered. With
// force, what waits on it fails.
//
// A block device that is open goes when its last user closes it; Delete then returns ErrBusy after a while.
func Delete(ctx context.Context, id int, force bool) error {
	c, err := openControl()
	if err != nil {
		return err
	}
	info, err := c.getInfo(ctx, id)
	if err != nil {
		return err
	}
	s, served := serverOf(id, int(info.serverPID))
	for end := time.Now().Add(udevTime); served && time.Now().Before(end) && s.pid != os.Getpid(); {
		if err := sleep(ctx, 50*time.Millisecond); err != nil {
			return fmt.Errorf("ublk: delete device %d: %w", id, err)
		}
		s, served = serverOf(id, int(info.serverPID))
	}
	if served {
		return fmt.Errorf("ublk: delete device %d: %w: %v serves it, and has to stop it", id, ErrBusy, s)
	}
	// A device that is live without a server is about to wait: the driver has not noticed yet.
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
