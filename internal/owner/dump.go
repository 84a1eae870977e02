package owner

import (
	"context"
	"io"
	"net/http"

	"github.com/vdisk/vdisk/cow"
	"github.com/vdisk/vdisk/internal/journal"
	"github.com/vdisk/vdisk/internal/storage"
)

// RebuildTable is cow.RebuildTable, and notes it in the journal.
func RebuildTable(dir string, force bool, o cow.Options) (*cow.Rebuilt, error) {
	o.Replaced = noteTable(&o, "rebuild")
	return cow.RebuildTable(dir, force, o)
}

// RestoreTable is cow.RestoreTable, and notes it in the journal.
func RestoreTable(dir, name string, dump io.Reader, force bool, o cow.Options) (*cow.Rebuilt, error) {
	o.Replaced = noteTable(&o, "restore")
	return cow.RestoreTable(dir, name, dump, force, o)
}

// noteTable returns a function that notes what a table was made from. Nobody owns the store then, and nobody can.
func noteTable(o *cow.Options, how string) func(*storage.Folder, *cow.Rebuilt) {
	log := o.Logger
	return func(in *storage.Folder, r *cow.Rebuilt) {
		details := map[string]any{"how": how, "from": r.From, "record": r.Record}
		if r.Why != "" {
			details["why"] = r.Why
		}
		journal.New(in, log).Add(journal.Entry{Kind: "metadata", By: journal.Here("vdisk metadata " + how), Details: details})
	}
}

// DumpTable writes the store's table as text.
func (o *Owner) DumpTable(ctx context.Context, w io.Writer) error { return o.store.DumpTable(ctx, w) }

func (c *control) dumpTable(w http.ResponseWriter, r *http.Request) {
	waitLonger(w, exportStandstill)
	p := &pieces{w: w}
	p.end(nil, c.owner.DumpTable(r.Context(), p))
}

// DumpTable writes the store's table as text.
func (c *Client) DumpTable(ctx context.Context, w io.Writer) error {
	_, err := c.pieces(ctx, "dump-table", &request{}, w, nil)
	return err
}
