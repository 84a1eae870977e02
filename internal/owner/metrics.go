package owner

import (
	"bytes"
	"cmp"
	"context"
	"io"
	"net/http"
	"slices"
	"time"

	"github.com/vdisk/vdisk/cow"
	"github.com/vdisk/vdisk/internal/metrics"
	"github.com/vdisk/vdisk/ublk"
)

// Reading reads the counters of the store, of its clients and of its block devices.
func (o *Owner) Reading(context.Context) (metrics.Reading, error) {
	return o.reading(o.store.Counters()), nil
}

// Activity is Reading without the counters that the engine has of each volume, so that it can be asked for every second.
func (o *Owner) Activity() metrics.Reading { return o.reading(o.store.Totals()) }

func (o *Owner) reading(c cow.Counters) metrics.Reading {
	r := metrics.Reading{Version: o.opts.Version, Store: o.dir, Started: o.started, At: time.Now(), Info: o.store.Info(), Counters: c}
	served := map[*target]ublk.Stats{}
	o.mu.Lock()
	for _, s := range o.services {
		r.Services++
		r.Clients += int(s.listener.open.Load())
	}
	for _, d := range o.disks {
		switch {
		case d.block != nil:
			r.Served++
			served[d.target] = d.block.Stats()
		case d.listed():
			r.Waiting++
		}
	}
	o.mu.Unlock()
	r.Traffic = o.exports.meters.read(served)
	slices.SortFunc(r.Traffic, func(a, b metrics.Traffic) int {
		return cmp.Or(cmp.Compare(a.Ref.Volume, b.Ref.Volume), cmp.Compare(a.Ref.Snapshot, b.Ref.Snapshot))
	})
	return r
}

// EachChunk calls each for every chunk file of the store, as cow.Store.EachChunk does.
func (o *Owner) EachChunk(each func(cow.ChunkInfo)) error { return o.store.EachChunk(each) }

// Metrics writes a reading in Prometheus's text format.
func (o *Owner) Metrics(ctx context.Context, w io.Writer) error {
	r, err := o.Reading(ctx)
	if err != nil {
		return err
	}
	return metrics.Write(w, r)
}

// Reading reads the counters of the owner.
func (c *Client) Reading(ctx context.Context) (r metrics.Reading, err error) {
	return r, c.call(ctx, "reading", request{}, &r)
}

// Metrics writes the owner's metrics in Prometheus's text format.
func (c *Client) Metrics(ctx context.Context, w io.Writer) error {
	var text string
	if err := c.call(ctx, "metrics", request{}, &text); err != nil {
		return err
	}
	_, err := io.WriteString(w, text)
	return err
}

// metricsText is Metrics as an answer to Client.Metrics.
func (o *Owner) metricsText(ctx context.Context) (string, error) {
	var b bytes.Buffer
	err := o.Metrics(ctx, &b)
	return b.String(), err
}

// metrics answers GET /metrics, for programs that speak HTTP. The connection is closed, since it counts as a session,
// which a program that asks every few seconds would never end.
func (c *control) metrics(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Connection", "close")
	metrics.Answer(w, r, c.owner.opts.Logger, c.owner.Metrics)
}
