package owner

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"slices"
	"sync"
	"time"

	"github.com/vdisk/vdisk/cow"
	"github.com/vdisk/vdisk/nbd"
)

// exports holds the volumes and snapshots that NBD clients have open. All clients of one volume or snapshot share a
// handle, because the engine allows one writer per volume, and a flush on one connection must cover the writes of all
// connections (MULTI_CONN).
type exports struct {
	store   *cow.Store
	explain func(volume string, err error) error // adds the users of a busy volume to err
	// attached returns the block devices that write to a volume, or to all volumes if the name is empty.
	attached func(volume string) map[string]string
	meters   *meters

	// mu guards the fields below and the handles' counts. It is not held while waiting for the disk.
	mu       sync.Mutex
	open     []*handle
	renaming []cow.Ref // these may not be opened until they are renamed

	differences int64 // the memory that differences take
}

// handle is an open volume or snapshot.
type handle struct {
	dev      *cow.Device
	meter    *meter
	readOnly bool   // as it was opened
	writer   client // unless it is read-only; the last one, if it has no users
	users    int
	over     map[*net.UnixConn]int // the connections over which the users came that may write, each with its number of them
	// flushing counts the releases of a last user that still flush. A client that arrives meanwhile shares the handle.
	flushing int
}

// acquire opens r, or shares the handle if r is open.
func (x *exports) acquire(r cow.Ref, readOnly bool) (*handle, error) {
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.acquireLocked(r, readOnly)
}

// acquireLocked is acquire. The caller holds x.mu.
func (x *exports) acquireLocked(r cow.Ref, readOnly bool) (*handle, error) {
	for _, h := range x.open {
		if h.readOnly == readOnly && h.dev.Ref() == r {
			h.users++
			return h, nil
		}
	}
	if slices.ContainsFunc(x.renaming, func(from cow.Ref) bool { return within(r, from) }) {
		return nil, fmt.Errorf("%v is being renamed: %w", r, cow.ErrBusy)
	}
	dev, err := x.store.OpenAtOnce(r, readOnly)
	if err != nil {
		return nil, err
	}
	h := &handle{dev: dev, meter: x.meters.of(r), readOnly: readOnly, users: 1}
	x.open = append(x.open, h)
	return h, nil
}

// within reports whether r is what, or a snapshot of the volume what.
func within(r, what cow.Ref) bool {
	return r == what || what.Snapshot == "" && r.Volume == what.Volume
}

// release ends one user's use of a handle. After the last user it flushes the handle and closes it.
func (x *exports) release(h *handle) error {
	x.mu.Lock()
	defer x.mu.Unlock()
	if h.users--; h.users > 0 {
		return nil
	}
	h.flushing++
	x.mu.Unlock()
	err := flushWritten(h.dev)
	x.mu.Lock()
	h.flushing--
	i := slices.Index(x.open, h)
	// A new user releases it later, another release is flushing, or close has closed it.
	if h.users > 0 || h.flushing > 0 || i < 0 {
		return err
	}
	x.open = slices.Delete(x.open, i, i+1)
	return errors.Join(err, h.dev.Close())
}

// keepOut prevents clients from opening from, which is about to be renamed, until the returned function is called. It
// fails if clients have it open: when they reconnect they would ask for the old name and find nothing, or another
// volume.
func (x *exports) keepOut(from cow.Ref) (func(), error) {
	x.mu.Lock()
	defer x.mu.Unlock()
	for _, h := range x.open {
		if r := h.dev.Ref(); h.users > 0 && within(r, from) {
			return nil, fmt.Errorf("%v is open by %d NBD client connections, which would not find it again: %w: %s",
				r, h.users, cow.ErrBusy, putOut(r))
		}
	}
	x.renaming = append(x.renaming, from)
	return func() {
		x.mu.Lock()
		defer x.mu.Unlock()
		x.renaming = slices.Delete(x.renaming, slices.Index(x.renaming, from), slices.Index(x.renaming, from)+1)
	}, nil
}

// sharing returns how many more clients have a volume or its snapshots open than the engine counts. The engine counts
// one per handle.
func (x *exports) sharing(volume string) (n int) {
	x.mu.Lock()
	defer x.mu.Unlock()
	for _, h := range x.open {
		if h.users > 1 && h.dev.Ref().Volume == volume {
			n += h.users - 1
		}
	}
	return n
}

// close closes the handles that are still open. The services have ended by then.
func (x *exports) close() error {
	x.mu.Lock()
	defer x.mu.Unlock()
	var errs []error
	for _, h := range x.open {
		errs = append(errs, h.dev.Close())
	}
	x.open = nil
	return errors.Join(errs...)
}

// users describes the clients that have a volume or its snapshots open.
func (x *exports) users(volume string) []string {
	x.mu.Lock()
	defer x.mu.Unlock()
	var list []string
	for _, h := range x.open {
		switch r := h.dev.Ref(); {
		case r.Volume != volume:
		case h.users > 0:
			list = append(list, fmt.Sprintf("%v is open by %d NBD client connections, %s", r, h.users, putOut(r)))
		default:
			list = append(list, fmt.Sprintf("the writes of the last NBD client of %v are being made durable", r))
		}
	}
	return list
}

// catalog is the part of the exports that one service shows. It implements nbd.Exports.
type catalog struct {
	*exports
	only     []cow.Ref // empty: all
	readOnly bool
	shared   bool
	log      *slog.Logger // may be nil
	watched  bool         // a failed read counts, because it may be why the service's only client fails

	mu  sync.Mutex // guards err
	err error      // the first failure to make a leaving client's writes durable, or to read
}

// leave ends a client's use of a handle. If the client's writes could not be made durable, the service fails, too,
// since the client may be gone.
func (c *catalog) leave(h *handle) error {
	err := c.release(h)
	c.failed(err)
	return err
}

func (c *catalog) failed(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err == nil {
		c.err = err
	}
}

// watchedDevice is a device whose first failed read is the outcome of its service.
type watchedDevice struct {
	exportedDevice
}

// ReadAt is that of nbd.Device.
func (d watchedDevice) ReadAt(p []byte, off int64) (int, error) {
	n, err := d.Device.ReadAt(p, off)
	if err != nil {
		d.c.failed(fmt.Errorf("reading %v at %d: %w", d.Ref(), off, err))
	}
	return n, err
}

// TryReadAt is that of nbd.TryReader. A read that fails is not done by it, so that ReadAt meets the failure, too.
func (d watchedDevice) TryReadAt(p []byte, off int64) (bool, error) {
	done, err := d.Device.TryReadAt(p, off)
	return done && err == nil, nil
}

// outcome returns the error of the service once it has ended.
func (c *catalog) outcome() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.err
}

// List returns the names of the exports that clients may open.
func (c *catalog) List() ([]string, error) {
	var names []string
	for _, r := range c.refs() {
		names = append(names, r.String())
	}
	return names, nil
}

// ListInfo lists the exports with their descriptions, as nbd.InfoLister does.
func (c *catalog) ListInfo() (infos []nbd.Info, err error) {
	for _, r := range c.only {
		info, err := c.Describe(r.String())
		if err != nil { // removed meanwhile
			info.Name = r.String()
		}
		infos = append(infos, info)
	}
	if len(c.only) > 0 {
		return infos, nil
	}
	writers, attached := c.writers(""), c.exports.attached("")
	for _, v := range c.store.Volumes() {
		if v.Receiving != nil {
			continue
		}
		who := attached[v.Name]
		if w, ok := writers[v.Name]; ok {
			who = w.String()
		}
		infos = append(infos, nbd.Info{Name: v.Name, Description: describeVolume(v) + written(who)})
		for _, s := range v.Snapshots {
			infos = append(infos, nbd.Info{Name: cow.Ref{Volume: v.Name, Snapshot: s.Name}.String(), Description: describeSnapshot(s)})
		}
	}
	return infos, nil
}

func describeVolume(v cow.VolumeInfo) string {
	if v.Origin != "" {
		return fmt.Sprintf("%s, a volume from %s, made at %s", v.Name, v.Origin, v.Created.UTC().Format(time.RFC3339))
	}
	return fmt.Sprintf("%s, a volume, made at %s", v.Name, v.Created.UTC().Format(time.RFC3339))
}

func describeSnapshot(s cow.SnapshotInfo) string {
	return fmt.Sprintf("%s@%s, a snapshot, taken at %s", s.Volume, s.Name, s.Created.UTC().Format(time.RFC3339))
}

func (c *catalog) refs() []cow.Ref {
	if len(c.only) > 0 {
		return c.only
	}
	var refs []cow.Ref
	for _, v := range c.store.Volumes() {
		if v.Receiving != nil {
			continue
		}
		refs = append(refs, cow.Ref{Volume: v.Name})
		for _, s := range v.Snapshots {
			refs = append(refs, cow.Ref{Volume: v.Name, Snapshot: s.Name})
		}
	}
	return refs
}

// preferredBlock is the engine's unit of redirection.
const preferredBlock = 4096

// Describe describes an export without opening it, so that it works while the volume is imported or attached.
func (c *catalog) Describe(name string) (nbd.Info, error) {
	r, err := c.resolve(name)
	if err != nil {
		return nbd.Info{}, err
	}
	info := nbd.Info{
		Name: r.String(), ReadOnly: c.readOnly || r.Snapshot != "", PreferredBlock: preferredBlock,
	}
	v, err := c.store.Volume(r.Volume)
	if err != nil {
		return info, notExist(err)
	}
	info.Size, info.Contexts, info.Description = v.Size, contextNames(v), describeVolume(v)
	if r.Snapshot == "" {
		return info, nil
	}
	i := slices.IndexFunc(v.Snapshots, func(s cow.SnapshotInfo) bool { return s.Name == r.Snapshot })
	if i < 0 {
		return info, notExist(fmt.Errorf("snapshot %v: %w", r, cow.ErrNotFound))
	}
	info.Size, info.Description = v.Snapshots[i].Size, describeSnapshot(v.Snapshots[i])
	return info, nil
}

// notExist makes an engine's error that something was not found match fs.ErrNotExist, which NBD expects.
func notExist(err error) error {
	if errors.Is(err, cow.ErrNotFound) {
		return &kindError{err, fs.ErrNotExist}
	}
	return err
}

// ForClient is that of nbd.ClientExports.
func (c *catalog) ForClient(ctx context.Context, nc net.Conn) nbd.Exports {
	if c.shared {
		return view{c, ctx, client{shared: true}, nil}
	}
	return view{c, ctx, clientOf(nc), unixConn(nc)}
}

// Open opens an export for somebody who closes it.
func (c *catalog) Open(name string) (*nbd.Export, error) {
	return view{c, context.Background(), client{shared: c.shared}, nil}.Open(name)
}

// view is a catalog as one client sees it.
type view struct {
	*catalog
	client context.Context // ends when the client has gone
	who    client
	over   *net.UnixConn // how it is connected; nil: over something else
}

// Describe describes an export as it would be opened for the client now.
func (c view) Describe(name string) (nbd.Info, error) {
	info, err := c.catalog.Describe(name)
	if err != nil || info.ReadOnly {
		return info, err
	}
	who := c.otherWriter(info.Name, c.who)
	info.ReadOnly = who != ""
	info.Description += written(who)
	info.NoMultiConn = c.who.conn != nil && !info.ReadOnly
	return info, nil
}

// openFor opens an export, for the client to write if it may.
func (c view) openFor(r cow.Ref) (*handle, error) {
	if c.readOnly || r.Snapshot != "" {
		return c.acquire(r, true)
	}
	h, err := c.acquireToWrite(r, c.who, c.over)
	if err == nil {
		h.dev.AwaitCount() // without mu, and only for this client
	}
	if err == nil && h.readOnly && c.log != nil {
		c.log.Info("an NBD client gets a volume read-only, since another one writes to it", "volume", r.Volume,
			"client", c.who.String(), "writer", c.otherWriter(r.Volume, c.who))
	}
	return h, err
}

// Open opens an export for a client. An empty name means the service's only export; if the service shows all exports,
// it means the store's only volume.
func (c view) Open(name string) (*nbd.Export, error) {
	r, err := c.resolve(name)
	if err != nil {
		return nil, err
	}
	h, err := c.openFor(r)
	return c.export(r, h, err)
}

// Reopen is that of nbd.Reopener. A client that could not write does not become the writer.
func (c view) Reopen(name string, readOnly bool) (*nbd.Export, error) {
	if !readOnly {
		return c.Open(name)
	}
	r, err := c.resolve(name)
	if err != nil {
		return nil, err
	}
	h, err := c.acquire(r, true)
	return c.export(r, h, err)
}

// export returns the export of a handle, or what err says of why there is none.
func (c view) export(r cow.Ref, h *handle, err error) (*nbd.Export, error) {
	if err != nil {
		return nil, notExist(c.explain(r.Volume, err))
	}
	described, err := c.Describe(r.String())
	if err != nil {
		return nil, errors.Join(err, c.leave(h))
	}
	var once sync.Once
	exported := exportedDevice{h.dev, c.catalog, c.client, h.meter}
	dev := nbd.Device(exported)
	if c.watched {
		dev = watchedDevice{exported}
	}
	return &nbd.Export{
		Device:         dev,
		Name:           r.String(),
		ReadOnly:       h.dev.ReadOnly(),
		NoMultiConn:    c.who.conn != nil && !h.dev.ReadOnly(),
		Description:    described.Description,
		PreferredBlock: preferredBlock,
		Close: func() (err error) {
			once.Do(func() { err = c.leave(h) })
			return err
		},
	}, nil
}

func (c *catalog) resolve(name string) (cow.Ref, error) {
	if name == "" {
		return c.byDefault()
	}
	r, err := cow.ParseRef(name)
	if err != nil {
		return r, &kindError{err, fs.ErrNotExist}
	}
	if len(c.only) > 0 && !slices.Contains(c.only, r) {
		return r, fmt.Errorf("%v is not served here: %w", r, fs.ErrNotExist)
	}
	return r, nil
}

func (c *catalog) byDefault() (cow.Ref, error) {
	refs := c.refs()
	if len(c.only) == 0 {
		refs = slices.DeleteFunc(refs, func(r cow.Ref) bool { return r.Snapshot != "" })
	}
	if len(refs) != 1 {
		return cow.Ref{}, fmt.Errorf("there are %d exports, so one has to be named: %w", len(refs), fs.ErrNotExist)
	}
	return refs[0], nil
}
