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

// retryEvery is how long to wait between two tries to get at a busy store.
const retryEvery = 25 * time.Millisecond

// Open gives the store at dir: through its owner when it has one that answers, else by owning it until Close. One that
// this process cannot write to can be read. ctx is for all the time the store is open.
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
			return nil, err // and not a Store that holds a nil *Owner
		}
		return owner, nil
	})
}

// OpenOrCreate is Open, and makes the store when there is none.
func OpenOrCreate(ctx context.Context, dir string, o Options) (Store, error) {
	s, err := Open(ctx, dir, o)
	if !errors.Is(err, cow.ErrNotFound) && !errors.Is(err, cow.ErrForeign) { // an empty folder may have any mode as yet
		return s, err
	}
	_, err = retry(ctx, o, func() (struct{}, error) { return struct{}{}, cow.CreateIn(dir, o.Foreign) })
	if err != nil {
		return nil, err
	}
	return Open(ctx, dir, o)
}

// Own takes the store at dir for this process, and waits for it while another has it.
func Own(ctx context.Context, dir string, o Options) (*Owner, error) {
	o = o.withDefaults()
	if err := refuseWaiting(ctx, dir, o); err != nil {
		return nil, err
	}
	return retry(ctx, o, func() (*Owner, error) { return own(ctx, dir, withoutWait(o), false) })
}

func withoutWait(o Options) Options {
	o.LockTimeout = 0
	return o
}

// retry tries again while the store is locked or its owner is about to go, for up to o.LockTimeout.
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

// Holder says who has the lock of the store at dir, as the lock file tells; empty when it cannot be told.
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
