package registers

import (
	"errors"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"unsafe"

	"github.com/vdisk/vdisk/internal/nbdclient"
)

// Disk is a volume as a client uses it.
type Disk interface {
	io.ReaderAt
	io.WriterAt
	WriteDurable(p []byte, off int64) error // durable when it returns
	Zero(off, length int64) error
	Sync() error // everything that was answered before is durable when it returns
}

// NBD is a Disk over a connection.
type NBD struct{ *nbdclient.Client }

// WriteDurable writes with FUA.
func (d NBD) WriteDurable(p []byte, off int64) error { return d.Write(p, off, nbdclient.FUA) }

// Zero makes a range read as zeros.
func (d NBD) Zero(off, length int64) error { return d.Client.Zero(off, length, 0) }

// Client does one operation at a time.
type Client struct {
	ID    int
	Disks map[string]Disk // by volume

	// Snapshot takes a snapshot of all volumes, calls taken, and returns what the snapshot holds. Nil: the client takes
	// none. Durable says that a snapshot is durable when it is taken, with everything that was answered before.
	// If it returns ErrNotTaken, the client goes on without.
	Snapshot func(taken func()) (Values, error)
	Durable  bool
	Seldom   int // operations to a snapshot
}

// ErrNotTaken is returned for a snapshot that nothing is known of.
var ErrNotTaken = errors.New("the snapshot was not taken")

// Run does n operations at random, or as many as succeed. A write that fails may have been made.
func (c *Client) Run(h *History, r *rand.Rand, n int) error {
	buf := aligned()
	for range n {
		var err error
		switch {
		case c.Snapshot != nil && r.IntN(c.Seldom) == 0:
			err = c.snapshot(h)
		case r.IntN(20) == 0:
			err = c.sync(h, At[r.IntN(len(At))].Volume)
		case r.IntN(2) == 0:
			err = c.read(h, r.IntN(len(At)), buf)
		default:
			err = c.write(h, r, buf)
		}
		if err != nil {
			return fmt.Errorf("client %d: %w", c.ID, err)
		}
	}
	return nil
}

func (c *Client) snapshot(h *History) error {
	op := operation{client: c.ID, in: input{kind: all}, call: h.Now()}
	out, err := c.Snapshot(func() { op.ret = h.Now() })
	if errors.Is(err, ErrNotTaken) {
		return nil
	}
	if err != nil {
		return err
	}
	op.out = out
	h.add(op)
	if c.Durable {
		h.addSync(op.call, op.ret)
	}
	return nil
}

// sync flushes a volume. It does not change the registers; its place in the history is where a power cut looks for it.
func (c *Client) sync(h *History, volume string) error {
	call := h.Now()
	if err := c.Disks[volume].Sync(); err != nil {
		return err
	}
	h.addSync(call, h.Now())
	return nil
}

func (c *Client) read(h *History, register int, buf []byte) error {
	op := operation{client: c.ID, in: input{kind: read, register: register}, call: h.Now()}
	if _, err := c.Disks[At[register].Volume].ReadAt(buf, Offset(register)); err != nil {
		return err
	}
	op.ret = h.Now()
	op.out[register] = Value(buf, register)
	h.add(op)
	return nil
}

// write writes a new value, or zeros.
func (c *Client) write(h *History, r *rand.Rand, buf []byte) error {
	op := operation{client: c.ID, in: input{kind: write, register: r.IntN(len(At))}}
	d, off := c.Disks[At[op.in.register].Volume], Offset(op.in.register)
	how := r.IntN(10)
	if how > 0 {
		op.in.value = values.Add(1)
		Fill(buf, op.in.register, op.in.value)
	}
	op.call = h.Now()
	var err error
	switch {
	case how == 0:
		err = d.Zero(off, Size)
	case how <= 2:
		op.fua = true
		err = d.WriteDurable(buf, off)
	default:
		_, err = d.WriteAt(buf, off)
	}
	op.ret = h.Now()
	if err != nil {
		op.ret, op.fua = math.MaxInt64, false
	}
	h.add(op)
	return err
}

// ReadAll reads all registers, one after the other.
func ReadAll(disks map[string]io.ReaderAt) (v Values, err error) {
	buf := aligned()
	for i, at := range At {
		if _, err := disks[at.Volume].ReadAt(buf, Offset(i)); err != nil {
			return v, fmt.Errorf("register %d: %w", i, err)
		}
		v[i] = Value(buf, i)
	}
	return v, nil
}

// aligned returns memory for a register that is suitable for O_DIRECT.
func aligned() []byte {
	b := make([]byte, 2*Size)
	skip := Size - int(uintptr(unsafe.Pointer(&b[0]))%Size)
	return b[skip:][:Size:Size]
}
