package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"sync"

	"golang.org/x/sys/unix"
)

const blockSize = 4096

// image is the shadow of a volume or snapshot. Its file has what was answered. Requests under way are beside it, and so
// are those whose outcome is not known: for each of their blocks, the content may be the old or the new one.
type image struct {
	path string
	file *os.File

	// users is held for reading by those who use the image, and for writing by those who change it as a whole. It is
	// only ever tried.
	users sync.RWMutex
	// shape is held by those who change the size or need it to stay.
	shape sync.Mutex

	mu       sync.Mutex
	size     int64
	busy     map[int64]bool // blocks of requests under way or in doubt
	running  []*change      // under way or in doubt
	captures []*variants    // of the snapshots that are being taken
	open     variants       // blocks whose content is not known yet
}

// variants lists the contents that a block may have.
type variants map[int64][][]byte

func (v variants) add(block int64, content []byte) {
	for _, have := range v[block] {
		if bytes.Equal(have, content) {
			return
		}
	}
	v[block] = append(v[block], content)
}

// change is a request that changes a range: a write, zeros if data is nil, or a trim.
type change struct {
	off, n int64
	data   []byte
	trim   bool // of whole blocks only
}

func (c *change) blocks() (first, end int64) {
	return c.off / blockSize, (c.off + c.n + blockSize - 1) / blockSize
}

func newImage(path string, size int64) (*image, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	im := &image{path: path, file: f, size: size, busy: map[int64]bool{}, open: variants{}}
	return im, f.Truncate(size)
}

func (im *image) remove() {
	_ = im.file.Close() // nobody needs it any more
	os.Remove(im.path)
}

// read fills p from the file; behind the end are zeros.
func (im *image) read(p []byte, off int64) error {
	n, err := im.file.ReadAt(p, off)
	clear(p[n:])
	if errors.Is(err, io.EOF) {
		err = nil
	}
	return err
}

// block returns a block's content in the file; the last one may be short.
func (im *image) block(b int64) ([]byte, error) {
	p := make([]byte, max(0, min(blockSize, im.size-b*blockSize)))
	return p, im.read(p, b*blockSize)
}

// apply changes p, the content at off, as c does.
func (c *change) apply(p []byte, off, size int64) {
	from, to := c.off, c.off+c.n
	if c.trim {
		from = (from + blockSize - 1) / blockSize * blockSize
		if to < size {
			to = to / blockSize * blockSize
		}
	}
	from, to = max(from, off), min(to, off+int64(len(p)))
	if from >= to {
		return
	}
	if c.data == nil {
		clear(p[from-off : to-off])
	} else {
		copy(p[from-off:to-off], c.data[from-c.off:])
	}
}

// note adds the old and the new content of a change's blocks to v.
func (im *image) note(c *change, v variants) error {
	first, end := c.blocks()
	for b := first; b < end; b++ {
		old, err := im.block(b)
		if err != nil {
			return err
		}
		v.add(b, bytes.Clone(old))
		c.apply(old, b*blockSize, im.size)
		v.add(b, old)
	}
	return nil
}

// claim takes the blocks of a range for a request, unless one of them is taken.
func (im *image) claim(off, n int64) bool {
	im.mu.Lock()
	defer im.mu.Unlock()
	first, end := (&change{off: off, n: n}).blocks()
	for b := first; b < end; b++ {
		if im.busy[b] {
			return false
		}
	}
	for b := first; b < end; b++ {
		im.busy[b] = true
	}
	return true
}

func (im *image) release(off, n int64) {
	im.mu.Lock()
	defer im.mu.Unlock()
	im.releaseLocked(off, n)
}

func (im *image) releaseLocked(off, n int64) {
	first, end := (&change{off: off, n: n}).blocks()
	for b := first; b < end; b++ {
		delete(im.busy, b)
	}
}

// begin notes that a change is about to be sent. Its blocks are claimed.
func (im *image) begin(c *change) error {
	im.mu.Lock()
	defer im.mu.Unlock()
	for _, v := range im.captures {
		if err := im.note(c, *v); err != nil {
			return err
		}
	}
	im.running = append(im.running, c)
	return nil
}

// done notes that a change was answered: its content is what must be there.
func (im *image) done(c *change) error {
	im.mu.Lock()
	defer im.mu.Unlock()
	first, end := c.blocks()
	p := make([]byte, min(end*blockSize, im.size)-first*blockSize)
	if err := im.read(p, first*blockSize); err != nil {
		return err
	}
	c.apply(p, first*blockSize, im.size)
	im.forget(c)
	return im.write(p, first*blockSize)
}

// write writes to the file, and leaves out zeros where there is a hole.
func (im *image) write(p []byte, off int64) error {
	if len(p) > 0 && allZero(p) {
		return unix.Fallocate(int(im.file.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, int64(len(p)))
	}
	_, err := im.file.WriteAt(p, off)
	return err
}

func allZero(p []byte) bool { return len(bytes.TrimLeft(p, "\x00")) == 0 }

// forget takes c out of those that run, and gives back its blocks. The caller holds mu.
func (im *image) forget(c *change) {
	im.running = slices.DeleteFunc(im.running, func(r *change) bool { return r == c })
	im.releaseLocked(c.off, c.n)
}

// refused reads the blocks of a change that was answered with "no space", and takes over what is there. A change of one
// block has then changed nothing; of a larger one, a part may have been done.
func (im *image) refused(name string, c *change, src io.ReaderAt) error {
	im.mu.Lock()
	defer im.mu.Unlock()
	v := variants{}
	if err := im.note(c, v); err != nil {
		return err
	}
	if first, end := c.blocks(); end-first == 1 {
		v[first] = v[first][:1] // the old content
	}
	if err := im.take(name, v, src); err != nil {
		return err
	}
	im.forget(c)
	return nil
}

// settleAll reads all blocks that are in doubt, and takes over what is there.
func (im *image) settleAll(name string, src io.ReaderAt) error {
	im.mu.Lock()
	defer im.mu.Unlock()
	v := im.open
	for _, c := range im.running {
		if err := im.note(c, v); err != nil {
			return err
		}
	}
	if err := im.take(name, v, src); err != nil {
		return err
	}
	im.running, im.busy, im.open = nil, map[int64]bool{}, variants{}
	return nil
}

// take reads each block of v, which must have one of its variants, and makes that the content.
func (im *image) take(name string, v variants, src io.ReaderAt) error {
	for b, contents := range v {
		p := make([]byte, max(0, min(blockSize, im.size-b*blockSize)))
		if len(p) == 0 {
			continue
		}
		if _, err := src.ReadAt(p, b*blockSize); err != nil {
			return fmt.Errorf("%s: read block %d: %w", name, b, err)
		}
		found := false
		for _, c := range contents {
			found = found || bytes.Equal(padded(c, len(p)), p)
		}
		if !found {
			return wrongError{fmt.Errorf("%s: block %d has none of the %d contents that it may have: it has %s", name, b, len(contents), describe(p))}
		}
		if err := im.write(p, b*blockSize); err != nil {
			return err
		}
	}
	return nil
}

// padded returns p with n bytes.
func padded(p []byte, n int) []byte {
	if len(p) >= n {
		return p[:n]
	}
	return append(bytes.Clone(p), make([]byte, n-len(p))...)
}

func describe(p []byte) string {
	if allZero(p) {
		return "zeros"
	}
	return fmt.Sprintf("%x…", p[:min(16, len(p))])
}

// doubtful reports whether the content is not known in full.
func (im *image) doubtful() bool {
	im.mu.Lock()
	defer im.mu.Unlock()
	return len(im.running) > 0 || len(im.open) > 0
}

// capture begins to note what a snapshot that is taken from now on may contain.
func (im *image) capture() (*variants, error) {
	im.mu.Lock()
	defer im.mu.Unlock()
	v := variants{}
	for _, c := range im.running {
		if err := im.note(c, v); err != nil {
			return nil, err
		}
	}
	im.captures = append(im.captures, &v)
	return &v, nil
}

// captured ends a capture, and returns the snapshot's image.
func (im *image) captured(v *variants, path string) (*image, error) {
	im.mu.Lock()
	defer im.mu.Unlock()
	im.captures = slices.DeleteFunc(im.captures, func(c *variants) bool { return c == v })
	snap, err := im.copyLocked(path)
	if err == nil {
		snap.open = *v
	}
	return snap, err
}

// copy copies an image that nobody changes.
func (im *image) copy(path string) (*image, error) {
	im.mu.Lock()
	defer im.mu.Unlock()
	return im.copyLocked(path)
}

func (im *image) copyLocked(path string) (*image, error) {
	to, err := newImage(path, im.size)
	if err != nil {
		return nil, err
	}
	return to, im.copyTo(to)
}

// copyTo copies the content into another file, and leaves its holes out.
func (im *image) copyTo(to *image) error {
	if out, err := exec.Command("cp", "--sparse=auto", im.path, to.path).CombinedOutput(); err != nil {
		return fmt.Errorf("cp %s %s: %w: %s", im.path, to.path, err, out)
	}
	return nil
}

// become takes over the content and the size of from.
func (im *image) become(from *image) error {
	im.mu.Lock()
	defer im.mu.Unlock()
	im.size = from.size
	return from.copyTo(im)
}

// resize changes the size.
func (im *image) resize(size int64) error {
	im.mu.Lock()
	defer im.mu.Unlock()
	im.size = size
	return im.file.Truncate(size)
}

func (im *image) length() int64 {
	im.mu.Lock()
	defer im.mu.Unlock()
	return im.size
}
