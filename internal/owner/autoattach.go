package owner

import (
	"context"
	"fmt"

	"github.com/vdisk/vdisk/cow"
)

// AutoAttach is the name of a property of volumes. A daemon that starts attaches the volumes for which it is set:
// docs/ublk.md, Attached at the start.
const AutoAttach = "auto.attach"

// autoAttach reports what a value of the property asks for, other than "".
func autoAttach(text string) (readOnly bool, err error) {
	switch text {
	case "on":
		return false, nil
	case "read-only":
		return true, nil
	}
	return false, fmt.Errorf("%s=%s: it is on or read-only: %w", AutoAttach, text, cow.ErrInvalid)
}

// AttachMarked attaches all volumes whose property says so, and that are not attached. Each succeeds or fails by
// itself; a failure is logged.
func (o *Owner) AttachMarked(ctx context.Context) {
	volumes, _ := o.Volumes(ctx) // never fails
	for _, v := range volumes {
		text := v.Properties[AutoAttach]
		if text == "" || ctx.Err() != nil || o.attachedItself(v.Name) {
			continue
		}
		readOnly, err := autoAttach(text)
		if err == nil {
			_, err = o.attachNoted(ctx, AttachOptions{Ref: cow.Ref{Volume: v.Name}, ReadOnly: readOnly})
		}
		if err != nil {
			o.opts.Logger.Error("a volume cannot be attached at the start", "what", v.Name, "err", err)
		}
	}
}

// attachedItself reports whether a disk shows the volume, and not only one of its snapshots.
func (o *Owner) attachedItself(volume string) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.shown(cow.Ref{Volume: volume}) != nil
}
