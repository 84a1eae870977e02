package owner

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/vdisk/vdisk/cow"
	"github.com/vdisk/vdisk/internal/storage"
	"github.com/vdisk/vdisk/nbd"
)

// An upgrade hands NBD services and their connections to the next program as open descriptors, which the process keeps
// when it executes that program. What the program has to know about them is in a file in memory, whose descriptor is in
// the Handover: docs/nbd.md, Upgrades.

// NBDHandoverVersion is the version of that file. A program that has another one, or none, gets no clients: the upgrade
// is refused while there are some.
const NBDHandoverVersion = 1

// handed is what the file says.
type handed struct {
	Last     int64 // the number of the latest connection
	Services []handedService

	file *os.File // the file; nil: none has been written
}

type handedService struct {
	Options  ServeOptions
	Own      bool // see service
	Made     bool // the owner made the socket's file, and removes it
	Listener int  // descriptors; Control is 0 unless a command asked for the service
	Control  int
	Clients  []handedClient
}

type handedClient struct {
	Conn   int // a descriptor
	Number int64
	// Process made the connection, and may have ended since. Zero: it is not known.
	Process process `json:",omitzero"`
	State   nbd.State
	// Identity is that of the volume or snapshot: see Owner.identity.
	Identity string
}

// descriptors returns all of them, without that of the file.
func (h *handed) descriptors() (fds []int) {
	for _, s := range h.Services {
		fds = append(fds, s.Listener)
		if s.Control != 0 {
			fds = append(fds, s.Control)
		}
		for _, c := range s.Clients {
			fds = append(fds, c.Conn)
		}
	}
	return fds
}

// close closes the file and all descriptors.
func (h *handed) close() {
	if h == nil {
		return
	}
	for _, fd := range h.descriptors() {
		_ = unix.Close(fd)
	}
	if h.file != nil {
		_ = h.file.Close()
	}
}

// keepInExec sets whether the descriptors, with that of the file, stay open when the process executes another program.
func (h *handed) keepInExec(keep bool) {
	flags := unix.FD_CLOEXEC
	if keep {
		flags = 0
	}
	for _, fd := range append(h.descriptors(), int(h.file.Fd())) {
		_, _ = unix.FcntlInt(uintptr(fd), unix.F_SETFD, flags) // fails for no descriptor that is open
	}
}

// write writes the file. ctx ends it between two steps.
func (h *handed) write(ctx context.Context) error {
	fd, err := unix.MemfdCreate("vdisk-handover", unix.MFD_CLOEXEC)
	if err != nil {
		return fmt.Errorf("making a file in memory: %w", err)
	}
	h.file = os.NewFile(uintptr(fd), "hand-over")
	return errors.Join(json.NewEncoder(contextWriter{ctx, h.file}).Encode(h), ctx.Err())
}

// contextWriter fails once ctx has ended.
type contextWriter struct {
	ctx context.Context
	w   io.Writer
}

// Write is that of io.Writer.
func (w contextWriter) Write(p []byte) (int, error) {
	if err := w.ctx.Err(); err != nil {
		return 0, err
	}
	return w.w.Write(p)
}

// readHanded reads the file that another program has written. If it fails, all descriptors stay as they are.
func readHanded(fd int) (*handed, error) {
	h := &handed{}
	own, err := socketOf(fd)
	if err != nil {
		return nil, fmt.Errorf("reading what was handed over: %w", err)
	}
	err = json.NewDecoder(io.NewSectionReader(own, 0, math.MaxInt64)).Decode(h) // not from where another program stopped
	if err = errors.Join(err, own.Close()); err != nil {
		return nil, fmt.Errorf("reading what was handed over: %w", err)
	}
	h.file = os.NewFile(uintptr(fd), "hand-over")
	h.keepInExec(false)
	return h, nil
}

// duplicate returns another descriptor of a socket.
func duplicate(c any) (fd int, err error) {
	sc, ok := c.(syscall.Conn)
	if !ok {
		return 0, fmt.Errorf("a %T cannot be handed over", c)
	}
	rc, err := sc.SyscallConn()
	if err != nil {
		return 0, err
	}
	cerr := rc.Control(func(s uintptr) { fd, err = unix.FcntlInt(s, unix.F_DUPFD_CLOEXEC, 3) })
	return fd, errors.Join(cerr, err)
}

// socketOf returns a file of a descriptor that stays open by itself.
func socketOf(fd int) (*os.File, error) {
	own, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(own), "handed socket"), nil
}

// pauseServices stops all NBD services between two requests of each client, and returns what the next program needs to
// go on with them. If it fails, all go on.
func (o *Owner) pauseServices(ctx context.Context) (_ *handed, err error) {
	ctx, cancel := context.WithTimeout(ctx, stopTimeout)
	defer cancel()
	o.mu.Lock()
	services := slices.Clone(o.services)
	o.mu.Unlock()
	h := &handed{Last: o.connections.Load()}
	defer func() {
		if err != nil {
			h.close()
			o.continueServices()
		}
	}()
	var mu sync.Mutex // guards h and errs
	var errs []error
	var wg sync.WaitGroup
	for _, s := range services {
		wg.Go(func() {
			hs, err := s.pause(ctx, o.identity)
			mu.Lock()
			defer mu.Unlock()
			h.Services, errs = append(h.Services, hs), append(errs, err)
		})
	}
	wg.Wait()
	if err = errors.Join(errs...); err != nil {
		return nil, fmt.Errorf("NBD clients cannot be handed over: %w", err)
	}
	return h, h.write(ctx)
}

// continueServices undoes pauseServices.
func (o *Owner) continueServices() {
	o.mu.Lock()
	services := slices.Clone(o.services)
	o.mu.Unlock()
	for _, s := range services { // without mu, as a server that closes a connection calls notify
		s.server.Continue()
	}
}

// pause pauses a service. What it returns has open descriptors, also with an error.
func (s *service) pause(ctx context.Context, identity func(cow.Ref) string) (h handedService, err error) {
	h = handedService{Options: s.opts, Own: s.own, Made: s.made, Listener: -1}
	paused, err := s.server.Pause(ctx)
	if err != nil {
		return h, fmt.Errorf("%s: %w", s.opts.Socket, err)
	}
	if h.Listener, err = duplicate(s.listener.Listener); err != nil {
		return h, err
	}
	if s.control != nil {
		if h.Control, err = duplicate(s.control); err != nil {
			return h, err
		}
	}
	for _, p := range paused {
		fd, err := duplicate(p.Conn)
		if err != nil {
			return h, err
		}
		known := p.Conn.(knownConn).known()
		c := handedClient{Conn: fd, Number: known.number, Process: known.by, State: p.State}
		h.Clients = append(h.Clients, c)
		r, err := cow.ParseRef(p.State.Export)
		if err != nil {
			return h, err
		}
		h.Clients[len(h.Clients)-1].Identity = identity(r)
	}
	return h, nil
}

// GoOn goes on with the NBD services that were handed over. It must be the last step of a start, as there is no way back
// once a client has been served. What cannot go on is logged, and its clients are cut off. Until it is called, an owner
// that Starts refuses upgrades.
func (o *Owner) GoOn(h *Handover) {
	defer o.hasStarted()
	if h == nil || h.handed == nil {
		return
	}
	o.connections.Store(h.handed.Last)
	for _, s := range h.handed.Services {
		if err := o.goOn(s); err != nil {
			o.opts.Logger.Error("an NBD service was handed over and cannot go on", "socket", s.Options.Socket, "err", err)
		}
	}
	if err := o.releaseHeld(); err != nil {
		o.opts.Logger.Error("NBD clients were handed over and could not go on", "err", err)
	}
}

// hasStarted permits upgrades.
func (o *Owner) hasStarted() {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.starting = false
	o.notifyLocked()
}

func (o *Owner) goOn(s handedService) error {
	f, err := socketOf(s.Listener)
	if err != nil {
		return err
	}
	l, err := net.FileListener(f)
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	if u, ok := l.(*net.UnixListener); ok {
		u.SetUnlinkOnClose(false)
	}
	if s.Control != 0 {
		return o.goOnAsked(l, s)
	}
	var remove func()
	if s.Made {
		remove = madeSocket(s.Options.Socket)
	}
	o.serveOwn(l, s.Options, remove, s.Clients)
	return nil
}

// goOnAsked goes on with a service that a command asked for. It ends with that command.
func (o *Owner) goOnAsked(l net.Listener, s handedService) error {
	f, err := socketOf(s.Control)
	if err != nil {
		return errors.Join(err, l.Close())
	}
	conn, err := net.FileConn(f)
	if err = errors.Join(err, f.Close()); err != nil {
		return errors.Join(err, l.Close())
	}
	registered := make(chan struct{})
	once := sync.OnceFunc(func() { close(registered) })
	o.own.Go(func() {
		defer once()
		defer conn.Close()
		o.serveAsked(context.Background(), conn.(*net.UnixConn), l, s.Options, serviceStart{handed: s.Clients, registered: once})
	})
	<-registered
	return nil
}

// madeSocket returns a function that removes the socket at path, which this process made when it was another program.
func madeSocket(path string) (remove func()) {
	in, err := storage.OpenFolder(filepath.Dir(path), true)
	if err != nil {
		return nil
	}
	made, err := in.Lstat(filepath.Base(path))
	if err != nil {
		_ = in.Close()
		return nil
	}
	return func() { removeSocket(in, filepath.Base(path), made); _ = in.Close() }
}

// connOf returns a connection of a descriptor that stays open by itself.
func connOf(fd int) (net.Conn, error) {
	f, err := socketOf(fd)
	if err != nil {
		return nil, err
	}
	nc, err := net.FileConn(f)
	return nc, errors.Join(err, f.Close())
}

// adopt opens the exports of clients that were handed over, and returns functions that serve them. A client for whom
// that fails is cut off. take returns a client's connection.
func (s *service) adopt(ctx context.Context, clients []handedClient, take func(int) (net.Conn, error), failed func(error)) (serve []func() error) {
	for _, c := range clients {
		nc, err := take(c.Conn)
		if err != nil {
			failed(err)
			continue
		}
		known := s.listener.known(nc, c.Number, c.Process)
		one, err := s.server.Adopt(ctx, known, c.State)
		if err != nil {
			failed(errors.Join(err, known.Close()))
			continue
		}
		serve = append(serve, one)
	}
	return serve
}

// GoesOn reports whether an NBD service of the owner's own was handed over.
func (h *Handover) GoesOn() bool {
	return h != nil && h.handed != nil && slices.ContainsFunc(h.handed.Services, func(s handedService) bool { return s.Own })
}

// clients returns how many connections are handed over.
func (h *handed) clients() (n int) {
	for _, s := range h.Services {
		n += len(s.Clients)
	}
	return n
}
