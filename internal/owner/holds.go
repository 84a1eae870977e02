package owner

import (
	"context"
	"fmt"

	"github.com/vdisk/vdisk/cow"
	"github.com/vdisk/vdisk/internal/journal"
	"github.com/vdisk/vdisk/internal/retention"
)

// Hold gives snapshots a hold, which keeps them from being removed.
func (o *Owner) Hold(ctx context.Context, tag string, refs ...cow.Ref) error {
	e := journal.Entry{Kind: "hold", Names: namesOf(refs), Details: map[string]any{"tag": tag}}
	return o.did(ctx, e, o.store.Hold(tag, refs...))
}

// Release removes a hold from snapshots.
func (o *Owner) Release(ctx context.Context, tag string, refs ...cow.Ref) error {
	e := journal.Entry{Kind: "release", Names: namesOf(refs), Details: map[string]any{"tag": tag}}
	return o.did(ctx, e, o.store.Release(tag, refs...))
}

// SetProperties changes properties of a volume. Those that have a meaning must have it.
func (o *Owner) SetProperties(ctx context.Context, name string, changes map[string]string) error {
	if text := changes[retention.Property]; text != "" {
		if _, err := retention.Parse(text); err != nil {
			return fmt.Errorf("set %s: %s=%s: %w: %w", name, retention.Property, text, err, cow.ErrInvalid)
		}
	}
	if text := changes[AutoAttach]; text != "" {
		if _, err := autoAttach(text); err != nil {
			return fmt.Errorf("set %s: %w", name, err)
		}
	}
	e := journal.Entry{Kind: "set", Names: []string{name}, Details: map[string]any{}}
	for key, value := range changes {
		e.Details[key] = value
	}
	return o.did(ctx, e, o.store.SetProperties(name, changes))
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
