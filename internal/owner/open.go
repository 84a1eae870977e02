package owner

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/vdisk/vdisk/cow"
	"github.com/vdisk/vdisk/internal/storage"
)

// retryEvery is the pause between two attempts to open a busy store.
const retryEvery = 25 * time.Millisecond

// Open opens the store at dir: through its owner if one answers, otherwise by owning it until Close. A store that this
// process cannot write to is opened for reading. ctx must last for as long as the store is open.
func Open(ctx context.Context, dir string, o Options) (Store, error) {
	o = o.withDefaults()
	if err := refuseWaiting(ctx, dir, o); err != nil {
		return nil, err
	}
	return retry(ctx, o, func() (Store, error) {
		c, _, err := connect(ctx, dir, o)
		if err == nil {
			return c, nil
		}
		if !errors.Is(err, ErrNoOwner) {
			return nil, err
		}
		owner, err := own(ctx, dir, withoutWait(o), true)
		if err != nil {
			return nil, err // a nil *Owner in a Store would not be nil
		}
		return owner, nil
	})
}

// OpenOwned is Open for a store that has an owner, and changes nothing. Without one it fails with ErrNoOwner.
func OpenOwned(ctx context.Context, dir string, o Options) (Store, error) {
	o = o.withDefaults()
	return retry(ctx, o, func() (Store, error) {
		c, _, err := connect(ctx, dir, o)
		if err != nil {
			return nil, err // a nil *Client in a Store would not be nil
		}
		return c, nil
	})
}

// OpenOrCreate is Open, and creates the store if there is none.
func OpenOrCreate(ctx context.Context, dir string, o Options) (Store, error) {
	s, err := Open(ctx, dir, o)
	// An empty folder, which is to become a store, may have any mode.
	if !errors.Is(err, cow.ErrNotFound) && !errors.Is(err, cow.ErrForeign) {
		return s, err
	}
	_, err = retry(ctx, o, func() (struct{}, error) { return struct{}{}, cow.CreateIn(dir, o.Foreign) })
	if err != nil {
		return nil, err
	}
	return Open(ctx, dir, o)
}

// Own makes this process the owner of the store at dir. It waits while another process owns it.
func Own(ctx context.Context, dir string, o Options) (*Owner, error) {
	o = o.withDefaults()
	if err := o.Handed.readable(o.Logger); err != nil {
		return nil, err
	}
	if err := refuseWaiting(ctx, dir, o); err != nil {
		return nil, err
	}
	return retry(ctx, o, func() (*Owner, error) { return own(ctx, dir, withoutWait(o), false) })
}

func withoutWait(o Options) Options {
	o.LockTimeout = 0
	return o
}

// retry repeats f while the store is locked or its owner is about to end, for up to o.LockTimeout.
func retry[T any](ctx context.Context, o Options, f func() (T, error)) (T, error) {
	deadline := time.Now().Add(o.LockTimeout)
	for {
		v, err := f()
		var locked *cow.LockedError
		if err == nil || !errors.As(err, &locked) && !errors.Is(err, errStopping) {
			return v, err
		}
		if !time.Now().Before(deadline) {
			if errors.Is(err, errStopping) {
				err = fmt.Errorf("%w: %w", cow.ErrBusy, err)
			}
			return v, err
		}
		select {
		case <-ctx.Done():
			return v, context.Cause(ctx)
		case <-time.After(retryEvery):
		}
	}
}

// Holder returns the lock file's text about the process that has locked the store at dir, or "" if it cannot be read.
func Holder(dir string) string {
	in, err := storage.OpenFolder(dir, true)
	if err != nil {
		return ""
	}
	defer in.Close()
	b, err := in.Read("lock")
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
}
