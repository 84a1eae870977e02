package owner

import (
	"context"

	"github.com/vdisk/vdisk/cow"
)

// Hold gives snapshots a hold, which keeps them from being removed.
func (o *Owner) Hold(_ context.Context, tag string, refs ...cow.Ref) error {
	return o.store.Hold(tag, refs...)
}

// Release removes a hold from snapshots.
func (o *Owner) Release(_ context.Context, tag string, refs ...cow.Ref) error {
	return o.store.Release(tag, refs...)
}

// SetProperties changes properties of a volume.
func (o *Owner) SetProperties(_ context.Context, name string, changes map[string]string) error {
	return o.store.SetProperties(name, changes)
}

// Hold gives snapshots a hold, which keeps them from being removed.
func (c *Client) Hold(ctx context.Context, tag string, refs ...cow.Ref) error {
	return c.call(ctx, "hold", request{Name: tag, Refs: refs}, nil)
}

// Release removes a hold from snapshots.
func (c *Client) Release(ctx context.Context, tag string, refs ...cow.Ref) error {
	return c.call(ctx, "release", request{Name: tag, Refs: refs}, nil)
}

// SetProperties changes properties of a volume.
func (c *Client) SetProperties(ctx context.Context, name string, changes map[string]string) error {
	return c.call(ctx, "set", request{Name: name, Properties: changes}, nil)
}
