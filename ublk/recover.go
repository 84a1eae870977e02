package ublk

import (
	"context"
	"errors"
)

var errNotBuilt = errors.New("ublk: not built yet")

// RecoverOptions are what the driver does not keep of a device's Options.
type RecoverOptions struct {
	// Cookie is what the device was made with; another one is refused. 0 takes any.
	Cookie uint64
	// Report and NoAffinity are those of Options.
	Report     func(error)
	NoAffinity bool
}

// Recover takes over the device id, whose server is gone, with all that its driver kept: size, queues, flags.
func Recover(ctx context.Context, id int, o RecoverOptions, h Handler) (*Device, error) {
	return nil, errNotBuilt
}

// Quiesce ends serving and leaves the disk: its users wait until somebody recovers it. It needs Options.Recovery.
func (d *Device) Quiesce(ctx context.Context) error { return errNotBuilt }
