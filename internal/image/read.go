package image

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/vdisk/vdisk/internal/owner/sparse"
	"github.com/vdisk/vdisk/nbd"
)

// Disk is the content of an image that qemu-img reads: a Source. qemu-img is the client of an NBD server in this
// process, and writes the disk to it in order. Close ends it.
type Disk struct {
	ctx  context.Context
	end  context.CancelCauseFunc
	file *os.File
	node string
	opts Options
	size int64

	once sync.Once
	in   incoming
	ran  chan error // the end of qemu-img
	err  error      // what Next has returned at the end
}

// Open looks at an image and returns its content. f is a regular file or a block device, with a name by which qemu-img
// can open it.
func Open(ctx context.Context, f *os.File, o Options) (*Disk, error) {
	fi, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !fi.Mode().IsRegular() && fi.Mode()&(os.ModeDevice|os.ModeCharDevice) != os.ModeDevice {
		return nil, fmt.Errorf("an image in the format %s is read at random: put it into a file", o.Format.Name)
	}
	size, err := inspect(ctx, f, o)
	if err != nil {
		return nil, err
	}
	d := &Disk{file: f, opts: o, size: size, ran: make(chan error, 1)}
	if d.node, err = node(f, o); err != nil {
		return nil, err
	}
	d.ctx, d.end = context.WithCancelCause(ctx)
	d.in = incoming{size: size, want: make(chan []byte), have: make(chan run), gone: d.ctx.Done()}
	return d, nil
}

// Size returns the size of the disk.
func (d *Disk) Size() int64 { return d.size }

// Next is that of sparse.Source. It starts qemu-img when it is called first.
func (d *Disk) Next(p []byte) (int, int64, error) {
	d.once.Do(func() { go func() { d.ran <- d.convert() }() })
	if d.err != nil {
		return 0, 0, d.err
	}
	for {
		select {
		case d.in.want <- p[:len(p)/sparse.Block*sparse.Block]:
			r := <-d.in.have
			if r.n > 0 {
				return r.n, r.off, nil
			}
		case err := <-d.ran:
			if d.err = err; err == nil {
				d.err = io.EOF
			}
			return 0, 0, d.err
		}
	}
}

// Close ends qemu-img.
func (d *Disk) Close() error {
	d.end(errors.New("the image is no longer needed"))
	d.once.Do(func() { d.ran <- nil })
	if d.err == nil {
		<-d.ran //nolint:errcheck // that it was ended
	}
	return nil
}

// convert runs qemu-img with a server for it.
func (d *Disk) convert() error {
	ours, theirs, err := socketPair()
	if err != nil {
		return err
	}
	server := nbd.New(&d.in, nbd.Options{})
	served := make(chan error, 1)
	go func() { served <- server.ServeConn(d.ctx, ours) }()
	// qemu-img leaves out only large runs of zeros, because it makes more and smaller requests for each. WriteAt leaves out
	// the others.
	c, err := command(d.ctx, "qemu-img", "convert", "-n", "--target-is-zero", "-S", "1M", "-f", d.opts.Format.Name, "-O", "raw", d.node, target)
	if err == nil {
		c.ExtraFiles = []*os.File{theirs}
		err = runQuiet(d.ctx, c)
	}
	_ = theirs.Close() // after this the server has no client
	serr := <-served
	if d.in.err != nil { // the reason of the others
		return d.in.err
	}
	if err == nil && serr != nil && d.ctx.Err() == nil {
		err = fmt.Errorf("reading from qemu-img: %w", serr)
	}
	return err
}

// runQuiet runs a command that writes nothing but complaints.
func runQuiet(ctx context.Context, c *exec.Cmd) error {
	var why complaint
	c.Stderr = &why
	return why.explain(ctx, c.Run())
}

// target describes the socket that qemu-img inherits. It is the first file behind standard error.
var target = func() string {
	text, err := json.Marshal(map[string]any{"driver": "raw", "file": map[string]any{
		"driver": "nbd", "export": "", "server": map[string]string{"type": "fd", "str": "3"},
	}})
	if err != nil {
		panic(err)
	}
	return "json:" + string(text)
}()

// socketPair returns two connected sockets, one for this process and one to be inherited.
func socketPair() (net.Conn, *os.File, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("a pair of sockets: %w", err)
	}
	ours, theirs := os.NewFile(uintptr(fds[0]), "socket"), os.NewFile(uintptr(fds[1]), "socket")
	conn, err := net.FileConn(ours) // which has a descriptor of its own
	if err = errors.Join(err, ours.Close()); err != nil {
		return nil, nil, errors.Join(err, theirs.Close())
	}
	return conn, theirs, nil
}

// run is a run of data that Next returns.
type run struct {
	n   int
	off int64
}

// incoming is the disk that qemu-img writes to. It hands each piece to a waiting Next.
type incoming struct {
	size int64
	want chan []byte // buffers of Next
	have chan run    // what was put into the last one; nothing: ask again
	gone <-chan struct{}

	mu  sync.Mutex // held while a request is handed over; guards the fields below
	at  int64      // everything before it has been handed over, or is a hole
	err error
}

var errBackwards = errors.New("qemu-img does not write the disk in order")

// WriteAt hands p over, without blocks of zeros.
func (x *incoming) WriteAt(p []byte, off int64) (int, error) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if off < x.at {
		x.err = errBackwards
		return 0, x.err
	}
	done := 0
	for done < len(p) {
		select {
		case buf := <-x.want:
			skip, n := sparse.DataRun(p[done:min(done+len(buf), len(p))])
			copy(buf, p[done+skip:done+skip+n])
			x.have <- run{n, off + int64(done+skip)}
			done += skip + n
			x.at = off + int64(done)
		case <-x.gone:
			return done, io.ErrClosedPipe
		}
	}
	return done, nil
}

// WriteZeroes leaves a hole, since everything is one before it is written.
func (x *incoming) WriteZeroes(off, _ int64, _ bool) error {
	x.mu.Lock()
	defer x.mu.Unlock()
	if off < x.at {
		x.err = errBackwards
	}
	return x.err
}

// ReadAt is there for nbd.Device. qemu-img reads nothing of a new disk.
func (x *incoming) ReadAt([]byte, int64) (int, error) { return 0, errors.ErrUnsupported }

// Discard does nothing.
func (x *incoming) Discard(int64, int64) error { return nil }

// Flush does nothing: Next's caller makes the disk durable.
func (x *incoming) Flush() error { return nil }

// Size returns the size of the disk.
func (x *incoming) Size() int64 { return x.size }

// List, Describe and Open are those of nbd.Exports: there is one export.
func (x *incoming) List() ([]string, error) { return []string{""}, nil }

// Describe describes it.
func (x *incoming) Describe(string) (nbd.Info, error) { return nbd.Info{Size: x.size}, nil }

// Open opens it.
func (x *incoming) Open(string) (*nbd.Export, error) { return &nbd.Export{Device: x}, nil }
