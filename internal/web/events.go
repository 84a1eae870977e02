package web

import (
	"errors"
	"io"
	"slices"
	"sync"
	"time"

	"github.com/docker/go-units"

	"github.com/vdisk/vdisk/internal/journal"
)

const (
	shownEvents = 100
	shownNames  = 5 // of an event
)

// events are the last entries of the journal. Its file stays open, so that the next request reads only what is new.
type events struct {
	mu     sync.Mutex // guards the fields below
	tail   *journal.Tail
	last   []event // the newest first
	users  journal.Users
	closed bool
	told   told
}

// tell reports whether the log is to be told of an error.
func (x *events) tell(now time.Time) bool {
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.told.again(now)
}

// event is an entry as the page shows it.
type event struct {
	journal.Entry
	Who, Text string
	Bad       bool // something failed or is damaged
}

// newest returns the newest entries, the latest first. With an error it returns those before it, too.
func (x *events) newest(open func() (*journal.Tail, error)) ([]event, error) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.closed {
		return nil, errNotOpen
	}
	if x.tail == nil {
		tail, err := open()
		if err != nil {
			return nil, err
		}
		x.tail, x.users = tail, journal.Users{}
	}
	var found []journal.Entry
	var err error
	for {
		var e journal.Entry
		if e, err = x.tail.Next(); err != nil {
			break
		}
		if found = append(found, e); len(found) == 2*shownEvents {
			found = slices.Delete(found, 0, shownEvents)
		}
	}
	slices.Reverse(found)
	next := make([]event, 0, shownEvents)
	for _, e := range found[:min(len(found), shownEvents)] {
		bad := e.Error != "" || e.Kind == "damage" || e.Kind == "failed"
		next = append(next, event{e, x.users.By(e.By), e.Text(shownNames, byteSize), bad})
	}
	x.last = append(next, x.last[:min(len(x.last), shownEvents-len(next))]...)
	if errors.Is(err, io.EOF) {
		err = nil
	}
	return x.last, err
}

func (x *events) close() {
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.closed = true; x.tail != nil {
		_ = x.tail.Close() // nothing was written
	}
}

// byteSize formats a number of bytes as the commands do.
func byteSize(n int64) string {
	if n < 0 {
		return "-" + units.BytesSize(-float64(n))
	}
	return units.BytesSize(float64(n))
}
