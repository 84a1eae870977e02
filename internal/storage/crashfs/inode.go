package crashfs

import "slices"

// inode is a file, whatever its names. The FS's lock guards it.
type inode struct {
	now     *content // what a read sees
	durable *content // what a power loss leaves at least; frozen always
	// frozen says that now is shared and is thawed before it is written to.
	frozen bool
	// pending are the operations since the last sync, in order.
	pending []op
	// failed is how many of pending a failed sync covered: they may have reached
	// the disk or not, but no later sync writes them.
	failed int
	// diverged says that such operations were lost: durable is not now less
	// pending any more.
	diverged bool
	reserved int64 // bytes that count against the capacity, unless
	unlinked bool  // the file has been removed
}

// newInode returns an inode whose content, from here on frozen, is durable.
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

// change applies the operation to what reads see and notes that it is not durable.
func (n *inode) change(o op) {
	if n.frozen {
		n.now, n.frozen = n.now.thaw(), false
	}
	o.apply(n.now)
	n.pending = append(n.pending, o)
}

// sync makes what is pending durable, except what a failed sync has covered:
// that is clean to the kernel, though reads still see it.
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
