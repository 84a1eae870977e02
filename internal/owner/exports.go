package owner

import (
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"sync"

	"github.com/vdisk/vdisk/cow"
	"github.com/vdisk/vdisk/nbd"
)

// exports are the volumes and snapshots that NBD clients have open. All clients of one share a handle: the engine has
// one writer a volume, and a flush on one connection covers what was written on all (MULTI_CONN).
type exports struct {
	store   *cow.Store
	explain func(volume string, err error) error // adds who uses a busy volume

	// Guards the fields below, and the handles' counts. Nothing that waits for the disk is done under it.
	mu       sync.Mutex
	open     []*handle
	renaming []cow.Ref // may not be opened meanwhile
}

// handle is an open volume or snapshot.
type handle struct {
	dev      *cow.Device
	readOnly bool // as it was opened
	users    int
	flushing int // ends of the last user that are not done; one who comes meanwhile takes part in the handle
}

// acquire opens r, or takes part in it where it is open.
func (x *exports) acquire(r cow.Ref, readOnly bool) (*handle, error) {
	x.mu.Lock()
	defer x.mu.Unlock()
	for _, h := range x.open {
		if h.readOnly == readOnly && h.dev.Ref() == r {
			h.users++
			return h, nil
		}
	}
	if slices.ContainsFunc(x.renaming, func(from cow.Ref) bool { return within(r, from) }) {
		return nil, fmt.Errorf("%v is being renamed: %w", r, cow.ErrBusy)
	}
	dev, err := x.store.OpenDevice(r, readOnly)
	if err != nil {
		return nil, err
	}
	h := &handle{dev: dev, readOnly: readOnly, users: 1}
	x.open = append(x.open, h)
	return h, nil
}

// within reports whether r is what, or a snapshot of it.
func within(r, what cow.Ref) bool {
	return r == what || what.Snapshot == "" && r.Volume == what.Volume
}

// release is the end of one user. The last one's writes are made durable, as after any flush.
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
	if h.users > 0 || h.flushing > 0 || i < 0 { // somebody came, who ends it, or close has ended it
		return err
	}
	x.open = slices.Delete(x.open, i, i+1)
	return errors.Join(err, h.dev.Close())
}

// keepOut lets no client open what is to be renamed, until the function that it returns is called. It refuses what
// clients have open: they would ask for the old name when they connect again, and find nothing, or another volume.
func (x *exports) keepOut(from cow.Ref) (func(), error) {
	x.mu.Lock()
	defer x.mu.Unlock()
	for _, h := range x.open {
		if r := h.dev.Ref(); h.users > 0 && within(r, from) {
			return nil, fmt.Errorf("%v is open by %d NBD client connections, which would not find it again: %w: end them first",
				r, h.users, cow.ErrBusy)
		}
	}
	x.renaming = append(x.renaming, from)
	return func() {
		x.mu.Lock()
		defer x.mu.Unlock()
		x.renaming = slices.Delete(x.renaming, slices.Index(x.renaming, from), slices.Index(x.renaming, from)+1)
	}, nil
}

// sharing is how many clients have a volume or its snapshots open beyond those that the engine knows of: it sees one
// for all of a handle.
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

// close closes what is still open, after the services have ended.
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

// users says which clients have a volume or its snapshots open.
func (x *exports) users(volume string) []string {
	x.mu.Lock()
	defer x.mu.Unlock()
	var list []string
	for _, h := range x.open {
		switch r := h.dev.Ref(); {
		case r.Volume != volume:
		case h.users > 0:
			list = append(list, fmt.Sprintf("%v is open by %d NBD client connections", r, h.users))
		default:
			list = append(list, fmt.Sprintf("what the last NBD client of %v wrote is being made durable", r))
		}
	}
	return list
}

// catalog is what one service shows of the exports; it is the service's nbd.Exports.
type catalog struct {
	*exports
	only     []cow.Ref // empty: all
	readOnly bool

	mu  sync.Mutex // guards err
	err error      // the first end of a client whose writes could not be made durable
}

// leave is the end of a client. What could not be made durable then is the result of the service, too: the client may
// be gone.
func (c *catalog) leave(h *handle) error {
	err := c.release(h)
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err == nil {
		c.err = err
	}
	return err
}

// outcome is the error of the service, after it has ended.
func (c *catalog) outcome() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.err
}

// List returns the names that clients may open.
func (c *catalog) List() ([]string, error) {
	var names []string
	for _, r := range c.refs() {
		names = append(names, r.String())
	}
	return names, nil
}

func (c *catalog) refs() []cow.Ref {
	if len(c.only) > 0 {
		return c.only
	}
	var refs []cow.Ref
	for _, v := range c.store.Volumes() {
		refs = append(refs, cow.Ref{Volume: v.Name})
		for _, s := range v.Snapshots {
			refs = append(refs, cow.Ref{Volume: v.Name, Snapshot: s.Name})
		}
	}
	return refs
}

// preferredBlock is the engine's unit of redirection.
const preferredBlock = 4096

// Describe tells of an export without opening it: while its volume is imported or attached, nobody else can.
func (c *catalog) Describe(name string) (nbd.Info, error) {
	r, err := c.resolve(name)
	if err != nil {
		return nbd.Info{}, err
	}
	info := nbd.Info{
		Name: r.String(), ReadOnly: c.readOnly || r.Snapshot != "", Description: r.String(), PreferredBlock: preferredBlock,
	}
	v, err := c.store.Volume(r.Volume)
	if err != nil {
		return info, notExist(err)
	}
	info.Size = v.Size
	if r.Snapshot == "" {
		return info, nil
	}
	i := slices.IndexFunc(v.Snapshots, func(s cow.SnapshotInfo) bool { return s.Name == r.Snapshot })
	if i < 0 {
		return info, notExist(fmt.Errorf("snapshot %v: %w", r, cow.ErrNotFound))
	}
	info.Size = v.Snapshots[i].Size
	return info, nil
}

// notExist gives an error of the engine about what is not there its meaning for NBD.
func notExist(err error) error {
	if errors.Is(err, cow.ErrNotFound) {
		return &kindError{err, fs.ErrNotExist}
	}
	return err
}

// Open opens an export for a client. The empty name is the only export, where there is only one, or else the only
// volume.
func (c *catalog) Open(name string) (*nbd.Export, error) {
	r, err := c.resolve(name)
	if err != nil {
		return nil, err
	}
	h, err := c.acquire(r, c.readOnly || r.Snapshot != "")
	if err != nil {
		return nil, notExist(c.explain(r.Volume, err))
	}
	var once sync.Once
	return &nbd.Export{
		Device:         h.dev,
		Name:           r.String(),
		ReadOnly:       h.dev.ReadOnly(),
		Description:    r.String(),
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
