package owner

import (
	"context"

	"github.com/vdisk/vdisk/ublk"
)

// driver is the part of package ublk that an owner needs. Tests replace it with one that needs no kernel.
type driver interface {
	Create(ctx context.Context, o ublk.Options, h ublk.Handler) (block, error)
	Recover(ctx context.Context, id int, o ublk.RecoverOptions, h ublk.Handler) (block, error)
	Devices(ctx context.Context) ([]ublk.DeviceInfo, error)
	Delete(ctx context.Context, id int, force bool) error
	Server(id int) (pid int, sure bool)
	BackingDevices(path string) ([]int, error)
}

// block is a block device that this process serves.
type block interface {
	ID() int
	Path() string
	Options() ublk.Options
	Features() ublk.Feature
	MemoryLocked() bool
	State() ublk.State
	Stats() ublk.Stats
	Resize(ctx context.Context, size int64) error
	Stop(ctx context.Context) error
	Quiesce(ctx context.Context) error
	Close(ctx context.Context) error
	Done() <-chan struct{}
	Err() error
}

// kernel is the driver of the running kernel.
type kernel struct{}

func (kernel) Create(ctx context.Context, o ublk.Options, h ublk.Handler) (block, error) {
	d, err := ublk.Create(ctx, o, h)
	if err != nil {
		return nil, err // a nil *Device in a block would not be nil
	}
	return d, nil
}

func (kernel) Recover(ctx context.Context, id int, o ublk.RecoverOptions, h ublk.Handler) (block, error) {
	d, err := ublk.Recover(ctx, id, o, h)
	if err != nil {
		return nil, err
	}
	return d, nil
}

func (kernel) Devices(ctx context.Context) ([]ublk.DeviceInfo, error) { return ublk.Devices(ctx) }

func (kernel) Delete(ctx context.Context, id int, force bool) error {
	return ublk.Delete(ctx, id, force)
}

func (kernel) Server(id int) (pid int, sure bool) { return ublk.Server(id) }

func (kernel) BackingDevices(path string) ([]int, error) { return ublk.BackingDevices(path) }
