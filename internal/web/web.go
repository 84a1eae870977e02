// Package web serves a page about a store to people on this machine: the tree of its volumes, what it does, where its
// space is, and what was done to it. The page can only be looked at. docs/web.md describes it, and what keeps others from
// reading it.
//
// Everything is read when somebody asks for it. What costs the store something is kept, so that many requests cost no
// more than a few: see kept and sampler.
package web

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/vdisk/vdisk/cow"
	"github.com/vdisk/vdisk/internal/journal"
	"github.com/vdisk/vdisk/internal/localhttp"
	"github.com/vdisk/vdisk/internal/metrics"
	"github.com/vdisk/vdisk/internal/natural"
	"github.com/vdisk/vdisk/internal/owner"
)

// Source is what the page is about: an owner.Owner.
type Source interface {
	Activity() metrics.Reading
	Volumes(context.Context) ([]owner.Volume, error)
	Usage(context.Context, ...cow.Ref) ([]cow.Usage, error)
	EachChunk(func(cow.ChunkInfo)) error
}

// Options are what Serve needs.
type Options struct {
	// Source returns the store, or nil while it is not open.
	Source func() Source
	// Journal opens the journal of the store.
	Journal func() (*journal.Tail, error)
	Log     *slog.Logger

	// Tests set the fields below.
	now       func() time.Time                                          // time.Now
	tick      func(time.Duration) (ticks <-chan time.Time, stop func()) // a time.Ticker's
	usageWait time.Duration                                             // usageWait
}

func (o Options) withDefaults() Options {
	if o.now == nil {
		o.now = time.Now
	}
	if o.tick == nil {
		o.tick = func(d time.Duration) (<-chan time.Time, func()) {
			t := time.NewTicker(d)
			return t.C, t.Stop
		}
	}
	o.usageWait = cmp.Or(o.usageWait, usageWait)
	return o
}

// ErrAddress is matched by the error of Listen for an address that it refuses.
var ErrAddress = errors.New("the page is for this machine alone, so a loopback address (127.0.0.1:9751) or a Unix socket (unix:PATH) is needed")

// Listen listens on a loopback address (ADDRESS:PORT), or on a Unix socket (unix:PATH). On the socket only root and the user
// that this process runs as are answered, in a folder of another user, too. The caller calls remove once the listener is
// closed.
func Listen(address string) (l net.Listener, remove func(), err error) {
	if path, is := strings.CutPrefix(address, "unix:"); is {
		if path == "" {
			return nil, nil, fmt.Errorf("%q has no path: %w", address, ErrAddress)
		}
		u, remove, err := owner.ListenOwn(path)
		if err != nil {
			return nil, nil, fmt.Errorf("listening for the page: %w", err)
		}
		return u, remove, nil
	}
	if _, _, serr := net.SplitHostPort(address); serr != nil {
		return nil, nil, fmt.Errorf("%q: %w", address, ErrAddress)
	}
	l, err = localhttp.Listen("the page", address, false)
	if errors.Is(err, localhttp.ErrPublic) {
		err = fmt.Errorf("%q: %w", address, ErrAddress)
	}
	return l, func() {}, err
}

// URL returns where the page on a listener of Listen is found.
func URL(l net.Listener) string {
	if l.Addr().Network() == "unix" {
		return "unix:" + l.Addr().String()
	}
	return "http://" + l.Addr().String() + "/"
}

// maxConnections is how many connections there are at most: a browser keeps up to six.
const maxConnections = 24

// Serve serves the page on l until ctx ends, and closes l. When it returns, nothing of it uses the store any more.
func Serve(ctx context.Context, l net.Listener, o Options) error {
	ctx, cancel := context.WithCancel(ctx)
	s := newServer(ctx, o)
	defer s.close()
	defer cancel()
	if err := localhttp.Serve(ctx, l, maxConnections, o.Log, s.guarded()); err != nil {
		return fmt.Errorf("serving the page: %w", err)
	}
	return nil
}

// server is the page of one store.
type server struct {
	Options
	life    context.Context // ends with Serve
	running chan struct{}   // a value for each request under way

	mu     sync.Mutex // guards closed
	closed bool
	work   sync.WaitGroup // requests, and what goes on without one; Add under mu, while not closed

	making  sync.Mutex // of a tree
	volumes *kept[[]owner.Volume]
	usage   *kept[map[string]cow.Usage]
	chunks  *kept[*chunkMap]
	sampler sampler
	events  events
}

// errNotOpen is the error of a store that is not open yet.
var errNotOpen = errors.New("the store is not open yet")

func newServer(ctx context.Context, o Options) *server {
	s := &server{Options: o.withDefaults(), life: ctx, running: make(chan struct{}, maxRequests)}
	s.volumes = &kept[[]owner.Volume]{s: s, what: "volumes", load: func(ctx context.Context, from Source) ([]owner.Volume, error) {
		list, err := from.Volumes(ctx)
		slices.SortStableFunc(list, func(a, b owner.Volume) int { return natural.Compare(a.Name, b.Name) })
		return list, err
	}, least: time.Second, times: 20}
	s.usage = &kept[map[string]cow.Usage]{s: s, what: "space of volumes", load: usageByName, least: 20 * time.Second, times: 50}
	s.chunks = &kept[*chunkMap]{s: s, what: "chunks", load: func(_ context.Context, from Source) (*chunkMap, error) {
		m := new(chunkMap)
		return m, from.EachChunk(m.add)
	}, least: 2 * time.Second, times: 20}
	s.sampler.run = s.now().UnixMilli()
	return s
}

// usageByName returns what each volume and snapshot takes.
func usageByName(ctx context.Context, from Source) (map[string]cow.Usage, error) {
	list, err := from.Usage(ctx)
	all := make(map[string]cow.Usage, len(list))
	for _, u := range list {
		all[u.Ref.String()] = u
	}
	return all, err
}

// enter notes that a request is under way, until leave is called. It returns false at the end of Serve.
func (s *server) enter() (leave func(), ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil, false
	}
	s.work.Add(1)
	return s.work.Done, true
}

// close waits for all that goes on. life has ended.
func (s *server) close() {
	s.mu.Lock()
	s.closed = true
	s.mu.Unlock()
	s.work.Wait()
	s.events.close()
}

// source returns the store, or errNotOpen.
func (s *server) source() (Source, error) {
	if from := s.Source(); from != nil {
		return from, nil
	}
	return nil, errNotOpen
}
