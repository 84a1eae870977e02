package owner

import (
	"context"

	"github.com/vdisk/vdisk/cow"
)

// Flatten makes a volume independent of its origin.
func (o *Owner) Flatten(ctx context.Context, name string) (cow.FlattenReport, error) {
	return o.store.Flatten(ctx, name)
}

// Flatten makes a volume independent of its origin.
func (c *Client) Flatten(ctx context.Context, name string) (r cow.FlattenReport, err error) {
	return r, c.call(ctx, "flatten", request{Name: name}, &r)
}
