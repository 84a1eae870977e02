// Command loop serves a file as a block device, as the kernel's loop driver does. Reads go through the queue's own ring
// and never block it; what may block is done by workers.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/vdisk/vdisk/ublk"
)

func main() {
	var o ublk.Options
	flag.IntVar(&o.Queues, "queues", 1, "number of hardware queues")
	flag.IntVar(&o.Depth, "depth", 128, "requests under way in a queue")
	flag.BoolVar(&o.ReadOnly, "readonly", false, "refuse writes")
	direct := flag.Bool("direct", false, "open the file with O_DIRECT, past the page cache")
	workers := flag.Int("workers", 16, "writes, flushes and discards under way at once")
	flag.Usage = func() {
		fmt.Fprintln(flag.CommandLine.Output(), "usage: loop [flags] FILE")
		flag.PrintDefaults()
	}
	flag.Parse()
	if flag.NArg() != 1 {
		flag.Usage()
		os.Exit(2)
	}
	ctx, cancel := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer cancel()
	if err := serve(ctx, flag.Arg(0), *direct, *workers, o, func(path string) { fmt.Println(path) }); err != nil {
		fmt.Fprintln(os.Stderr, "loop:", err)
		os.Exit(1)
	}
}

// serve shows the file as a disk, calls ready with its path, and returns when ctx ends or somebody has stopped the
// device.
func serve(ctx context.Context, path string, direct bool, workers int, o ublk.Options, ready func(path string)) (err error) {
	b, err := openBacking(path, direct, o.ReadOnly)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, b.Close()) }()
	h := &handler{int(b.Fd()), ublk.NewReaderWriterAt(b, workers)}
	defer h.others.Close()
	o.Size, o.LogicalBlock = b.size/int64(b.align)*int64(b.align), b.align
	o.VolatileCache, o.FUA, o.Discard = !o.ReadOnly, !o.ReadOnly, !o.ReadOnly
	d, err := ublk.Create(ctx, o, h)
	if err != nil {
		return err
	}
	ready(d.Path())
	select {
	case <-ctx.Done():
		return d.Close(context.Background())
	case <-d.Done():
		return d.Err()
	}
}

// handler reads on the queue's ring and leaves the rest to workers.
type handler struct {
	fd     int
	others *ublk.Adapter
}

func (h *handler) ServeUBLK(r *ublk.Request) error {
	if r.Op != ublk.OpRead {
		return h.others.ServeUBLK(r)
	}
	r.Fetch(h.fd, r.Buf, r.Offset)
	return ublk.ErrFetch
}

// backing is the file. ReadAt, WriteAt and Sync are those of os.File; a pwrite of a queue's buffer is aligned as
// O_DIRECT wants it.
type backing struct {
	*os.File
	size  int64
	align int // of offsets and lengths
}

func openBacking(path string, direct, readOnly bool) (*backing, error) {
	flags := os.O_RDWR
	if readOnly {
		flags = os.O_RDONLY
	}
	if direct {
		flags |= unix.O_DIRECT
	}
	f, err := os.OpenFile(path, flags, 0)
	if err != nil {
		return nil, err
	}
	b := &backing{File: f, align: 512}
	st, err := f.Stat()
	if err == nil && !st.Mode().IsRegular() {
		err = fmt.Errorf("%s is not a regular file", path)
	}
	if err == nil && direct {
		b.align, err = directAlign(f)
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	b.size = st.Size()
	return b, nil
}

// directAlign is the unit of direct I/O of a file, as a logical block that ublk can have.
func directAlign(f *os.File) (int, error) {
	var st unix.Statx_t
	err := unix.Statx(int(f.Fd()), "", unix.AT_EMPTY_PATH, unix.STATX_DIOALIGN, &st)
	switch {
	case err != nil:
		return 0, &os.PathError{Op: "statx", Path: f.Name(), Err: err}
	case st.Mask&unix.STATX_DIOALIGN == 0: // a file system that does not tell; all can do pages
		return 4096, nil
	case st.Dio_offset_align == 0 || st.Dio_offset_align > 4096:
		return 0, fmt.Errorf("%s: no direct I/O in blocks of at most 4096 bytes", f.Name())
	}
	return max(512, int(st.Dio_offset_align)), nil
}

// Discard frees the range.
func (b *backing) Discard(off, n int64) error { return b.punch(off, n) }

// WriteZeroes frees the range too: a hole reads as zeros.
func (b *backing) WriteZeroes(off, n int64) error { return b.punch(off, n) }

func (b *backing) punch(off, n int64) error {
	for {
		err := unix.Fallocate(int(b.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, n)
		if err != unix.EINTR {
			return err
		}
	}
}

// Sync makes the data durable; the file's times do not matter.
func (b *backing) Sync() error {
	for {
		err := unix.Fdatasync(int(b.Fd()))
		if err != unix.EINTR {
			return err
		}
	}
}
