package metadata

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"

	"github.com/vdisk/vdisk/format"
)

// bbolt's file format, from its internal/common (page.go, meta.go, inode.go). It has the native byte order, which is
// little-endian wherever this runs.
const (
	pageHeader  = 16 // id 8, flags 2, count 2, overflow 4
	elementSize = 16 // branch page: pos 4, ksize 4, page 8; leaf page: flags 4, pos 4, ksize 4, vsize 4
	// magic 4, version 4, page size 4, flags 4, root 8, sequence 8, free list 8, pages 8, txid 8, checksum 8
	metaSize  = 64
	metaMagic = 0xED0CDAED

	flagBranch    = 1
	flagLeaf      = 2
	flagFree      = 16
	noFreeList    = 1<<64 - 1
	flagBucket    = 1 // in an element of a leaf page: the value is a bucket
	bucketHeader  = 16
	maxPageDepth  = 32
	maxMetaOffset = 64 << 10 // the largest page size
)

var le = binary.LittleEndian

// pageChecker verifies the pages of a table before bbolt opens it. bbolt trusts its pages. When it opens a file, it
// looks at all of them in a goroutine of its own, where a panic or a fault over damage ends the process. So the damage
// that bbolt would fail on is found here first, and with it damage that bbolt would not notice: a damaged key hides the
// rows under it, and a damaged page number brings back older rows (bbolt never overwrites a page in use).
type pageChecker struct {
	f     *os.File
	size  int64  // size of the file in bytes
	page  int64  // size of a page in bytes
	pages uint64 // number of pages
	root  uint64 // the root page
	free  uint64 // the page of the list of free pages
	seen  []bool // pages that were read

	// The sum with the values' checksums as stored, the sum with them as computed, and the stored sum.
	fields, bodies, stored sum
}

func damaged(text string, args ...any) error {
	return fmt.Errorf("metadata: damaged table: %s: %w", fmt.Sprintf(text, args...), format.ErrCorrupt)
}

// checkPages verifies the pages of the table at a place. If the file is missing or empty, bbolt will make it, and there
// is nothing to verify.
func checkPages(at place) (err error) {
	f, err := at.in.Open(at.name, os.O_RDONLY)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("open the table: %w", err)
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	check, err := pagesOf(f)
	if err != nil {
		return err
	}
	return check()
}

// pagesOf returns a function that verifies, once, the pages of a table as they are now.
func pagesOf(f *os.File) (check func() error, err error) {
	info, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("open the table: %w", err)
	}
	c := &pageChecker{f: f, size: info.Size()}
	if c.size == 0 {
		return func() error { return nil }, nil
	}
	if err := c.meta(); err != nil {
		return nil, err
	}
	return c.check, nil
}

// check verifies everything that the meta page refers to.
func (c *pageChecker) check() error {
	// All pages will be read, in the order of the keys. The disk is faster in its own order. This is a hint.
	_ = unix.Fadvise(int(c.f.Fd()), 0, 0, unix.FADV_WILLNEED)
	c.seen = make([]bool, c.pages)
	if err := c.tree(c.root, nil, nil, 0, c.bucket); err != nil {
		return err
	}
	if err := c.freeList(c.free); err != nil {
		return err
	}
	// A value that does not verify is for its reader to report. Either its content is damaged, and the sum is right
	// with the checksums as stored; or its checksum is damaged, and the sum is right with the checksums as computed.
	// Then nothing else is missing.
	if c.fields != c.stored && c.bodies != c.stored {
		return damaged("its rows sum up to %016x, not to %016x as they should: some are lost, or old ones are back", uint64(c.fields), uint64(c.stored))
	}
	return nil
}

// meta finds the newer of the two meta pages that verify, as bbolt does.
func (c *pageChecker) meta() error {
	var newest, found uint64
	var unread error
	offsets := []int64{0}
	for at := int64(1 << 10); at <= maxMetaOffset; at *= 2 {
		offsets = append(offsets, at)
	}
	for _, at := range offsets {
		if at > 0 && c.page > 0 && at != c.page {
			continue
		}
		var p [pageHeader + metaSize]byte
		if _, err := c.f.ReadAt(p[:], at); err != nil {
			if !errors.Is(err, io.EOF) {
				unread = err
			}
			continue
		}
		m := p[pageHeader:]
		h := fnv.New64a()
		h.Write(m[:metaSize-8])
		if le.Uint32(m) != metaMagic || h.Sum64() != le.Uint64(m[56:]) {
			continue
		}
		if tx := le.Uint64(m[48:]); found == 0 || tx > newest {
			newest, c.root, c.free = tx, le.Uint64(m[16:]), le.Uint64(m[32:])
			c.page, c.pages = int64(le.Uint32(m[8:])), le.Uint64(m[40:])
		}
		found++
	}
	if found == 0 && unread != nil {
		return fmt.Errorf("read the table: %w", unread)
	}
	if found == 0 {
		return damaged("no meta page verifies")
	}
	if c.page < 1<<10 || c.page > maxMetaOffset || c.pages > uint64(c.size/c.page)+1<<16 {
		return damaged("%d pages of %d bytes in a file of %d", c.pages, c.page, c.size)
	}
	return nil
}

// freeList verifies that no page in the list of free pages is in use, because bbolt would write to it. It comes after
// all trees.
func (c *pageChecker) freeList(id uint64) error {
	if id == noFreeList {
		return nil // bbolt will look for the free pages itself
	}
	p, err := c.read(id)
	if err != nil {
		return err
	}
	if le.Uint16(p[8:]) != flagFree {
		return damaged("page %d is not a list of free pages", id)
	}
	n, ids := uint64(le.Uint16(p[10:])), p[pageHeader:]
	if n == 0xffff { // the count does not fit in its field
		n, ids = le.Uint64(ids), ids[8:]
	}
	if n > uint64(len(ids)/8) {
		return damaged("page %d lists %d free pages", id, n)
	}
	last := uint64(1)
	for i := range n {
		free := le.Uint64(ids[8*i:])
		if free <= last || free >= c.pages || c.seen[free] {
			return damaged("page %d is said to be free", free)
		}
		last = free
	}
	return nil
}

// read reads a page with its overflow pages. It refuses a page that was read before.
func (c *pageChecker) read(id uint64) ([]byte, error) {
	if id < 2 || id >= c.pages || int64(id+1)*c.page > c.size {
		return nil, damaged("page %d of %d is referred to", id, c.pages)
	}
	p := make([]byte, c.page)
	if _, err := c.f.ReadAt(p, int64(id)*c.page); err != nil {
		return nil, fmt.Errorf("read the table: %w", err)
	}
	more := uint64(le.Uint32(p[12:]))
	if le.Uint64(p) != id || id+more >= c.pages || int64(id+more+1)*c.page > c.size {
		return nil, damaged("page %d says it is page %d and %d more of %d", id, le.Uint64(p), more, c.pages)
	}
	for i := id; i <= id+more; i++ {
		if c.seen[i] {
			return nil, damaged("page %d is referred to twice", i)
		}
		c.seen[i] = true
	}
	if more > 0 {
		rest := make([]byte, int64(more)*c.page)
		if _, err := c.f.ReadAt(rest, int64(id+1)*c.page); err != nil && err != io.EOF {
			return nil, fmt.Errorf("read the table: %w", err)
		}
		p = append(p, rest...)
	}
	return p, nil
}

// entryFunc is called with an entry of a bucket: its key, its value, and whether the value is a bucket.
type entryFunc func(key, value []byte, bucket bool) error

// tree verifies a tree of pages whose keys must lie in [from, to). A nil bound is no bound.
func (c *pageChecker) tree(id uint64, from, to []byte, depth int, fn entryFunc) error {
	if depth > maxPageDepth {
		return damaged("page %d is too deep", id)
	}
	p, err := c.read(id)
	if err != nil {
		return err
	}
	switch flags := le.Uint16(p[8:]); flags {
	case flagLeaf:
		return c.elements(p, id, from, to, fn)
	case flagBranch:
		return c.branch(p, id, from, to, depth, fn)
	default:
		return damaged("page %d has the flags %#x", id, flags)
	}
}

func (c *pageChecker) branch(p []byte, id uint64, from, to []byte, depth int, fn entryFunc) error {
	n := int(le.Uint16(p[10:]))
	if n == 0 || pageHeader+n*elementSize > len(p) {
		return damaged("page %d has %d elements", id, n)
	}
	keys := make([][]byte, n+1)
	keys[n] = to
	next := pageHeader + n*elementSize
	for i := range n {
		at := pageHeader + i*elementSize
		key, _, ok := slice(p, at, &next, le.Uint32(p[at:]), le.Uint32(p[at+4:]), 0)
		if !ok || i > 0 && bytes.Compare(keys[i-1], key) >= 0 || !within(key, from, to) && i > 0 {
			return damaged("page %d: key %d", id, i)
		}
		keys[i] = key
	}
	for i := range n {
		child := le.Uint64(p[pageHeader+i*elementSize+8:])
		if err := c.tree(child, keys[i], keys[i+1], depth+1, fn); err != nil {
			return err
		}
	}
	return nil
}

// elements verifies a leaf page, or the page inside the value of a small bucket.
func (c *pageChecker) elements(p []byte, id uint64, from, to []byte, fn entryFunc) error {
	n := int(le.Uint16(p[10:]))
	if pageHeader+n*elementSize > len(p) {
		return damaged("page %d has %d elements", id, n)
	}
	var last []byte
	next := pageHeader + n*elementSize
	for i := range n {
		at := pageHeader + i*elementSize
		key, value, ok := slice(p, at, &next, le.Uint32(p[at+4:]), le.Uint32(p[at+8:]), le.Uint32(p[at+12:]))
		if !ok || len(key) == 0 || i > 0 && bytes.Compare(last, key) >= 0 || !within(key, from, to) {
			return damaged("page %d: element %d", id, i)
		}
		if err := fn(key, value, le.Uint32(p[at:])&flagBucket != 0); err != nil {
			return err
		}
		last = key
	}
	return nil
}

// slice returns the key and the value of the element at p[at:]. bbolt packs them without a gap behind the elements, so
// each begins where the last one ended. That shows a wrong count or length.
func slice(p []byte, at int, next *int, pos, ksize, vsize uint32) (key, value []byte, ok bool) {
	start := uint64(at) + uint64(pos)
	mid, end := start+uint64(ksize), start+uint64(ksize)+uint64(vsize)
	if end > uint64(len(p)) || start != uint64(*next) {
		return nil, nil, false
	}
	*next = int(end)
	return p[start:mid], p[mid:end], true
}

func within(key, from, to []byte) bool {
	return (from == nil || bytes.Compare(key, from) >= 0) && (to == nil || bytes.Compare(key, to) < 0)
}

// bucket verifies an entry of the root. It must be a bucket, and the entries of that bucket must not be.
func (c *pageChecker) bucket(name, value []byte, isBucket bool) error {
	if !isBucket || len(value) < bucketHeader {
		return damaged("%q is not a bucket", name)
	}
	fn := func(key, value []byte, isBucket bool) (err error) {
		switch {
		case isBucket:
			return damaged("a bucket in %q", name)
		case isSum(name, key):
			c.stored, err = decodeSum(value)
		default:
			field, body := valueSums(value)
			c.fields += sumOf(name, key, field)
			c.bodies += sumOf(name, key, body)
		}
		return err
	}
	if root := le.Uint64(value); root != 0 {
		return c.tree(root, nil, nil, 0, fn)
	}
	if len(value) < bucketHeader+pageHeader || le.Uint16(value[bucketHeader+8:]) != flagLeaf {
		return damaged("bucket %q", name)
	}
	return c.elements(value[bucketHeader:], 0, nil, nil, fn)
}
