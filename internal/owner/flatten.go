package owner

import (
	"context"

	"github.com/vdisk/vdisk/cow"
	"github.com/vdisk/vdisk/internal/journal"
)

// Flatten makes a volume independent of its origin.
func (o *Owner) Flatten(ctx context.Context, name string) (cow.FlattenReport, error) {
	rep, err := o.store.Flatten(ctx, name)
	return rep, o.did(ctx, journal.Entry{Kind: "flatten", Names: []string{name}}, err)
}

// Flatten makes a volume independent of its origin.
func (c *Client) Flatten(ctx context.Context, name string) (r cow.FlattenReport, err error) {
	return r, c.call(ctx, "flatten", request{Name: name}, &r)
}
