package owner

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vdisk/vdisk/cow"
	"github.com/vdisk/vdisk/internal/journal"
	"github.com/vdisk/vdisk/nbd"
)

// service is one NBD service: a listening socket and its clients.
type service struct {
	opts     ServeOptions
	listener *countingListener
	server   *nbd.Server
	own      bool          // it is the owner's, and not asked for by a command
	made     bool          // the owner made the socket's file
	control  *net.UnixConn // of the command that asked for it; may be nil
}

// serviceStart is how a service begins.
type serviceStart struct {
	own, made  bool
	control    *net.UnixConn
	handed     []handedClient // clients of another program, to go on with
	registered func()         // called once the service is visible to others
}

// inUse reports whether somebody depends on the service: a command that asked for it, or a client.
func (s *service) inUse() bool { return !s.own || s.listener.open.Load() > 0 }

func (s *service) info() Service {
	exports := []string{}
	for _, r := range s.opts.Exports {
		exports = append(exports, r.String())
	}
	return Service{Socket: s.opts.Socket, ReadOnly: s.opts.ReadOnly, Exports: exports, Clients: int(s.listener.open.Load())}
}

// Serve serves the NBD clients that connect to l until ctx or the owner ends, or, with Once, until the last client has
// left.
func (o *Owner) Serve(ctx context.Context, l net.Listener, opts ServeOptions) error {
	return o.serve(ctx, l, opts, serviceStart{registered: func() {}})
}

// ServeOwn begins to serve the NBD clients that connect to l, until the owner ends. Then remove is called, unless it is
// nil, or another program goes on with the service. The service is in nobody's way: an owner without clients may end
// (CloseWhenIdle).
func (o *Owner) ServeOwn(l net.Listener, opts ServeOptions, remove func()) {
	o.serveOwn(l, opts, remove, nil)
}

func (o *Owner) serveOwn(l net.Listener, opts ServeOptions, remove func(), clients []handedClient) {
	registered := make(chan struct{})
	once := sync.OnceFunc(func() { close(registered) })
	o.own.Go(func() {
		defer once() // if the service is refused
		err := o.serve(o.life, l, opts, serviceStart{own: true, made: remove != nil, handed: clients, registered: once})
		if err != nil {
			o.opts.Logger.Error("the NBD service has ended", "socket", opts.Socket, "err", err)
		}
		if remove != nil && !o.handsOver() {
			remove()
		}
	})
	<-registered
}

// serveAsked serves until the command that asked for it ends, which is at the other end of conn, or the service ends by
// itself. Then it answers, unless another program goes on with the service.
func (o *Owner) serveAsked(ctx context.Context, conn *net.UnixConn, l net.Listener, opts ServeOptions, how serviceStart) {
	ctx, cancel := context.WithCancel(ctx) // it ends with the command; o.life ends the service, too
	defer cancel()
	go func() { // blocks until the command, or the caller's Close, ends the connection
		_, _ = conn.Read(make([]byte, 1))
		cancel()
	}()
	how.control = conn
	err := o.serve(ctx, l, opts, how)
	if o.handsOver() {
		return
	}
	answer := &Error{}
	if err != nil {
		answer = toWire(err)
	}
	_ = json.NewEncoder(conn).Encode(answer) // fails if the command is gone
}

// serve serves until asked or the owner ends, or the service ends by itself.
func (o *Owner) serve(asked context.Context, l net.Listener, opts ServeOptions, how serviceStart) (err error) {
	if o.ReadOnly() != nil || opts.Fixed {
		opts.ReadOnly = true
	}
	err = o.mayServe(opts)
	if err == nil {
		opts.MaxConnections, err = connections(opts.MaxConnections)
	}
	var secure *tls.Config
	if err == nil {
		secure, err = secured(l.Addr().Network(), opts)
	}
	if err != nil {
		return errors.Join(err, l.Close())
	}
	for _, r := range opts.Exports {
		err := o.known(r)
		if err == nil && !opts.ReadOnly {
			err = o.notWaiting(r)
		}
		if err != nil {
			return errors.Join(err, l.Close())
		}
	}
	release, err := o.fix(opts)
	if err != nil {
		return errors.Join(err, l.Close())
	}
	defer release()
	ctx, cancel := context.WithCancel(asked)
	defer cancel()
	shown := &catalog{exports: o.exports, only: opts.Exports, readOnly: opts.ReadOnly, shared: opts.Shared, watched: opts.Fixed, log: o.opts.Logger}
	limits := nbd.Options{Logger: o.opts.Logger, MaxConnections: opts.MaxConnections, MaxMemory: opts.MaxMemory, TLS: secure}
	s := &service{opts: opts, listener: &countingListener{Listener: l, number: &o.connections}, server: nbd.New(shown, limits), own: how.own, made: how.made, control: how.control}
	switch {
	case opts.Once:
		s.listener.last = cancel
	case how.own:
		s.listener.last = o.notify
	}
	defer o.serveHanded(s, how.handed)()
	if !o.registerService(s) {
		return errors.Join(errStopping, l.Close())
	}
	how.registered()
	defer o.served(s)
	defer o.noteService(asked, opts, &err)()
	defer context.AfterFunc(o.life, cancel)()
	err = serveUntil(ctx, s.server, s.listener, stopTimeout/2)
	if o.life.Err() != nil && asked.Err() == nil {
		err = errors.Join(fmt.Errorf("%s has ended, and these NBD clients were served by it: %w", o.holder(), errStopping), err)
	}
	return errors.Join(err, shown.outcome())
}

// registerService makes a service visible to others. It returns false if no service may begin.
func (o *Owner) registerService(s *service) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.stopping || !o.accepting {
		return false
	}
	o.services = append(o.services, s)
	o.notifyLocked()
	return true
}

// serveHanded goes on with the clients of another program. All of their exports are open when it returns, so that no new
// client takes the place of a writer. The returned function waits for them to end; the server has been shut down by then,
// or never began.
func (o *Owner) serveHanded(s *service, clients []handedClient) (wait func()) {
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	for _, serve := range s.adopt(ctx, clients, o.takeHeld, func(err error) {
		o.opts.Logger.Error("an NBD client was handed over and cannot go on", "socket", s.opts.Socket, "err", err)
	}) {
		wg.Go(func() { _ = serve() }) // the server logs it
	}
	return func() {
		cancel()
		_ = inTime(stopTimeout, "the end of NBD clients", func() error { wg.Wait(); return nil })
	}
}

// noteService notes that a service begins, and returns a function that notes that it ends, with *err.
func (o *Owner) noteService(asked context.Context, opts ServeOptions, err *error) (ended func()) {
	e := journal.Entry{Kind: "serve", Names: namesOf(opts.Exports)}
	if opts.Fixed { // for an export as an image
		e.Kind = "export"
	}
	note := o.begun(asked, e)
	return func() { note(map[string]any{"socket": opts.Socket}, *err) }
}

// mayServe refuses a service that an owner that is about to end could not keep up.
func (o *Owner) mayServe(opts ServeOptions) error {
	if o.ReadOnly() != nil || opts.Fixed {
		return nil
	}
	return o.lasting()
}

// fix sees to it that nobody writes to the volumes of a service that is Fixed, until the returned function is called.
func (o *Owner) fix(opts ServeOptions) (release func(), err error) {
	var held []*cow.Device
	release = func() {
		for _, d := range held {
			_ = d.Close() // nothing was written
		}
	}
	if !opts.Fixed || o.ReadOnly() != nil {
		return release, nil
	}
	for _, r := range opts.Exports {
		if r.Snapshot != "" {
			continue
		}
		dev, err := o.still(r)
		if err != nil {
			release()
			return nil, err
		}
		held = append(held, dev)
	}
	return release, nil
}

// defaultConnections is the default limit on a service's clients, if the limit on open files allows it.
const defaultConnections = 10_000

// connections returns how many clients a service accepts. Half of the open files are reserved for the store: a client
// must not be the reason why a chunk file cannot be opened.
func connections(asked int) (int, error) {
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return 0, fmt.Errorf("the limit of open files: %w", err)
	}
	most := int(min(limit.Cur/2, 1<<30))
	switch {
	case asked < 0:
		return 0, fmt.Errorf("%d NBD connections: %w", asked, cow.ErrInvalid)
	case asked == 0:
		return min(defaultConnections, most), nil
	case asked > most:
		return 0, fmt.Errorf("%d NBD connections need twice as many open files, and the limit of the store's owner is %d: %w: raise it (ulimit -n)", asked, limit.Cur, cow.ErrInvalid)
	}
	return asked, nil
}

// serveUntil serves until ctx ends, and then lets requests under way finish for at most patience.
func serveUntil(ctx context.Context, server *nbd.Server, l net.Listener, patience time.Duration) error {
	ended := make(chan error, 1)
	go func() { ended <- server.Serve(context.Background(), l) }()
	select {
	case err := <-ended:
		return fmt.Errorf("serving NBD: %w", err)
	case <-ctx.Done():
	}
	bounded, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	err := server.Shutdown(bounded)
	<-ended //nolint:errcheck // that it was shut down
	return err
}

// served removes a service that has ended.
func (o *Owner) served(s *service) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.services = slices.DeleteFunc(o.services, func(x *service) bool { return x == s })
	o.notifyLocked()
}

// waitServices waits until the services, which end with life, are gone, or ctx ends.
func (o *Owner) waitServices(ctx context.Context) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for len(o.services) > 0 && ctx.Err() == nil {
		o.waitLocked(ctx)
	}
}
