package owner

import (
	"context"
	"io"
	"net/http"
)

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
