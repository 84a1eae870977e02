package owner

import (
	"context"

	"github.com/vdisk/vdisk/cow"
	"github.com/vdisk/vdisk/internal/journal"
	"github.com/vdisk/vdisk/internal/owner/sparse"
)

// Repair writes the content of src over the blocks of a volume that cannot be read.
func (o *Owner) Repair(ctx context.Context, name string, src sparse.Source, progress func(off int64)) (cow.RepairReport, error) {
	rep, err := o.store.Repair(ctx, name, &watchedSource{Source: src, progress: progress})
	return rep, o.did(ctx, journal.Entry{Kind: "repair", Names: []string{name}}, fromStream(err))
}

// Repair sends the content of src to the owner, which writes it over the blocks of a volume that cannot be read.
func (c *Client) Repair(ctx context.Context, name string, src sparse.Source, progress func(off int64)) (rep cow.RepairReport, err error) {
	return rep, c.send(ctx, "repair", &request{Name: name, Size: src.Size()}, src, progress, &rep)
}
