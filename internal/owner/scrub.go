package owner

import (
	"context"
	"fmt"

	"github.com/vdisk/vdisk/cow"
)

// What Scrub does.
const (
	ScrubLook  = "look" // nothing
	ScrubStart = "start"
	ScrubPause = "pause"
	ScrubStop  = "stop"
)

// Scrub starts, pauses or stops the scrub of the store, and returns what is then known of it.
func (o *Owner) Scrub(_ context.Context, what string, opts cow.ScrubOptions) (cow.ScrubStatus, error) {
	var err error
	switch what {
	case ScrubLook:
	case ScrubStart:
		err = o.store.StartScrub(opts)
	case ScrubPause:
		err = o.store.PauseScrub()
	case ScrubStop:
		err = o.store.StopScrub()
	default:
		err = fmt.Errorf("scrub: %q: %w", what, cow.ErrInvalid)
	}
	return o.store.ScrubStatus(), err
}

// Scrub starts, pauses or stops the scrub of the store, and returns what is then known of it.
func (c *Client) Scrub(ctx context.Context, what string, opts cow.ScrubOptions) (s cow.ScrubStatus, err error) {
	return s, c.call(ctx, "scrub", request{Name: what, Scrub: opts}, &s)
}
