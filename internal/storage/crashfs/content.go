package crashfs

import "maps"

const (
	pageSize   = 4096
	sectorSize = 512 // the unit that a disk writes as a whole
)

// page is a page of one or more contents. Only the content that owns it writes to it.
type page struct {
	owner *content
	data  [pageSize]byte
}

// content is the content of a file: pages by number, and zeros where there is no page. Once it is frozen it never
// changes, so any number of inodes, of any number of FS, can share it without a lock.
type content struct {
	size  int64
	pages map[int64]*page
}

func newContent() *content { return &content{pages: map[int64]*page{}} }

// thaw returns a new content that holds the same. The two share their pages until one of them writes to a page.
func (c *content) thaw() *content { return &content{size: c.size, pages: maps.Clone(c.pages)} }

func (c *content) readAt(p []byte, off int64) int {
	if off >= c.size {
		return 0
	}
	p = p[:min(int64(len(p)), c.size-off)]
	for done := 0; done < len(p); {
		at := off + int64(done)
		in := int(at % pageSize)
		part := p[done:min(len(p), done+pageSize-in)]
		if pg := c.pages[at/pageSize]; pg != nil {
			copy(part, pg.data[in:])
		} else {
			clear(part)
		}
		done += len(part)
	}
	return len(p)
}

func (c *content) writeAt(p []byte, off int64) {
	c.size = max(c.size, off+int64(len(p)))
	for len(p) > 0 {
		in := int(off % pageSize)
		n := copy(c.own(off / pageSize)[in:], p)
		p, off = p[n:], off+int64(n)
	}
}

// own returns the data of a page for writing. It copies the page if another content owns it.
func (c *content) own(number int64) *[pageSize]byte {
	pg := c.pages[number]
	if pg == nil {
		pg = &page{owner: c}
	} else if pg.owner != c {
		pg = &page{owner: c, data: pg.data}
	} else {
		return &pg.data
	}
	c.pages[number] = pg
	return &pg.data
}

func (c *content) truncate(size int64) {
	if size < c.size {
		maps.DeleteFunc(c.pages, func(n int64, _ *page) bool { return n*pageSize >= size })
		if in := size % pageSize; in != 0 && c.pages[size/pageSize] != nil {
			clear(c.own(size / pageSize)[in:])
		}
	}
	c.size = size
}

// op is a change of a file that is not durable yet: a write, or a truncation to off if data is nil.
type op struct {
	seq  uint64 // place in the order of all operations of the FS
	off  int64
	data []byte // never changed after the op is made
}

func (o *op) apply(c *content) {
	if o.data == nil {
		c.truncate(o.off)
		return
	}
	c.writeAt(o.data, o.off)
}

// applyTorn applies those sectors of a write for which keep returns true. A truncation cannot tear.
func (o *op) applyTorn(c *content, keep func() bool) {
	if o.data == nil {
		c.truncate(o.off)
		return
	}
	for at := 0; at < len(o.data); {
		n := min(len(o.data)-at, sectorSize-int((o.off+int64(at))%sectorSize))
		if keep() {
			c.writeAt(o.data[at:at+n], o.off+int64(at))
		}
		at += n
	}
}
