package crashfs

import "slices"

// inode is a file, whatever names it has. The FS's lock guards it.
type inode struct {
	now     *content // what a read sees
	durable *content // the least that a power loss leaves; always frozen
	// frozen says that now is shared, and must be thawed before it is written to.
	frozen bool
	// pending holds the operations since the last sync, in order.
	pending []op
	// failed is the number of operations in pending that a failed sync covered. They may or may not have reached the
	// disk, and no later sync writes them.
	failed int
	// diverged says that such operations were lost: now is no longer durable plus pending.
	diverged bool
	reserved int64 // bytes that count against the capacity, unless unlinked
	unlinked bool  // the file was removed
}

// newInode returns an inode with the content c, which is frozen from now on and durable.
func newInode(c *content, reserved int64) *inode {
	return &inode{now: c, durable: c, frozen: true, reserved: reserved}
}

// clone returns an independent inode in the same state.
func (n *inode) clone() *inode {
	n.frozen = true
	c := *n
	c.pending = slices.Clone(n.pending)
	return &c
}

// change applies an operation to what reads see, and notes that it is not durable.
func (n *inode) change(o op) {
	if n.frozen {
		n.now, n.frozen = n.now.thaw(), false
	}
	o.apply(n.now)
	n.pending = append(n.pending, o)
}

// sync makes the pending operations durable, except those that a failed sync covered: the kernel treats those as clean,
// though reads still see them.
func (n *inode) sync() {
	if n.failed == 0 && !n.diverged {
		n.durable, n.frozen = n.now, true
	} else {
		c := n.durable.thaw()
		for i := n.failed; i < len(n.pending); i++ {
			n.pending[i].apply(c)
		}
		n.durable, n.diverged = c, true
	}
	n.pending, n.failed = nil, 0
}

func (n *inode) failSync() { n.failed = len(n.pending) }
