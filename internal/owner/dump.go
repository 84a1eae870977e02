package owner

import (
	"context"
	"encoding/json"
	"io"
	"net/http"
)

// DumpTable writes the store's table as text.
func (o *Owner) DumpTable(_ context.Context, w io.Writer) error { return o.store.DumpTable(w) }

func (c *control) dumpTable(w http.ResponseWriter, r *http.Request) {
	waitLonger(w, exportStandstill)
	p := &pieces{w: w}
	var end sendEnd
	if err := c.owner.DumpTable(r.Context(), p); err != nil {
		end.Error = toWire(err)
	}
	if b, err := json.Marshal(end); err == nil {
		_, _ = p.put(pieceEnd, b) // fails if the client is gone
	}
}

// DumpTable writes the store's table as text.
func (c *Client) DumpTable(ctx context.Context, w io.Writer) error {
	resp, err := c.post(ctx, "dump-table", &request{}, nil)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	end, err := readPieces(&answerBody{resp.Body, c, ctx}, w, nil)
	switch {
	case err != nil && ctx.Err() != nil:
		return context.Cause(ctx)
	case err != nil:
		return err
	case end.Error != nil:
		return end.Error
	}
	return nil
}
