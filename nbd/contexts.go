package nbd

import (
	"errors"
	"fmt"
)

// maxContexts is how many metadata contexts a client may select. Each has a chunk in the reply to a BLOCK_STATUS.
const maxContexts = 16

// ContextOpener is implemented by a Device with metadata contexts beside base:allocation. Info.Contexts lists their
// names.
type ContextOpener interface {
	// OpenContext opens a context for a client that has selected it. It is called when the export is opened; if it
	// fails, the export is not opened, and the client is told why. What the context needs has to last until it is
	// closed, which it is once, before the export.
	OpenContext(name string) (Context, error)
}

// Context is the state of a device in one metadata context. Status may be called concurrently.
type Context interface {
	// Status calls fn with the extents of the range in ascending order, until fn returns false. The name of the context
	// says what the flags mean. Parts of the range that no call covers have no flags.
	Status(off, length int64, fn func(off, length int64, flags uint32) bool) error
	Close() error
}

// metaContextID returns the protocol's id of the context with an index in a session.
func metaContextID(i int) uint32 { return uint32(i) + 1 }

// openContexts opens the contexts that a client has selected for an export. Their panics become errors; base:allocation
// is nil.
func openContexts(export *Export, names []string) (cs []Context, err error) {
	for _, name := range names {
		var c Context
		if name != contextAllocation {
			if c, err = openContext(export.Device, name); err != nil {
				return nil, errors.Join(fmt.Errorf("metadata context %s: %w", name, err), closeContexts(cs))
			}
		}
		cs = append(cs, c)
	}
	return cs, nil
}

func openContext(d Device, name string) (_ Context, err error) {
	defer recovered(&err)
	o, ok := d.(ContextOpener)
	if !ok {
		return nil, errors.New("the device has no such context")
	}
	c, err := o.OpenContext(name)
	if err != nil {
		return nil, err
	}
	return guardedContext{c}, nil
}

func closeContexts(cs []Context) (err error) {
	for _, c := range cs {
		if c != nil {
			err = errors.Join(err, c.Close())
		}
	}
	return err
}

// openContexts opens the contexts that were selected for the export with a name.
func (n *negotiation) openContexts(name string, export *Export) ([]Context, error) {
	if n.metaExport != name {
		return nil, nil
	}
	return openContexts(export, n.selected)
}

// meta answers LIST_META_CONTEXT and SET_META_CONTEXT, whose data is an export name and queries. Of an export that
// cannot be described, it knows base:allocation: only GO opens an export, and says why that cannot be done.
func (n *negotiation) meta(opt option) error {
	if !n.structured {
		return n.refuse(opt, repErrInvalid, "metadata contexts need structured replies")
	}
	set := opt.id == optSetMeta
	if set { // even if it fails, since SET replaces what was set before
		n.selected = nil
	}
	d := decoder{b: opt.data}
	name := d.str()
	count := d.u32()
	var queries []string
	for range count {
		query := d.str()
		if d.failed {
			break
		}
		queries = append(queries, query)
	}
	if !d.done() {
		return n.refuse(opt, repErrInvalid, "malformed metadata context query")
	}
	info, err := n.describe(name)
	if err != nil {
		n.failed(err)
	}
	found := matching(append([]string{contextAllocation}, info.Contexts...), queries, !set)
	if set && len(found) > maxContexts {
		return n.refuse(opt, repErrTooBig, fmt.Sprintf("at most %d metadata contexts can be selected", maxContexts))
	}
	var b []byte
	for i, name := range found {
		id := uint32(0) // has no meaning in a list
		if set {
			id = metaContextID(i)
		}
		b = appendOptReply(b, opt.id, repMetaContext, u32(id), name)
	}
	if set {
		n.selected, n.metaExport = found, name
	}
	return n.write(appendOptReply(b, opt.id, repAck))
}

// matching returns the contexts that match a query. In a list, no queries match all, and a query that ends with a colon
// matches all that begin with it.
func matching(contexts, queries []string, list bool) (found []string) {
	asked := make(map[string]bool, len(queries))
	for _, q := range queries {
		asked[q] = true
	}
	for _, name := range contexts {
		match := asked[name] || list && len(queries) == 0
		for i := 0; list && !match && i < len(name); i++ {
			match = name[i] == ':' && asked[name[:i+1]]
		}
		if match {
			found = append(found, name)
		}
	}
	return found
}
