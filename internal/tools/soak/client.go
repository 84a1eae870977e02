package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"syscall"
	"time"

	"github.com/vdisk/vdisk/internal/nbdclient"
	"github.com/vdisk/vdisk/internal/workload"
)

// clients opens volumes and snapshots over NBD, one after the other, until ctx ends.
func (w *world) clients(ctx context.Context, r *rand.Rand) {
	for w.pause(ctx) {
		name, im := w.use(r, r.IntN(6) == 0)
		if im == nil {
			sleep(ctx, 50*time.Millisecond)
			continue
		}
		err := w.session(ctx, r, name, im)
		if err != nil && (errors.As(err, &wrongError{}) || !w.server.dying.Load()) {
			w.fail(fmt.Errorf("%s: %w", name, err))
		}
		im.users.RUnlock()
	}
}

// session is one client's connection.
func (w *world) session(ctx context.Context, r *rand.Rand, name string, im *image) error {
	d, err := w.server.dial(name)
	if err != nil {
		return err
	}
	if im.shape.TryLock() { // nobody resizes it
		size := im.length()
		im.shape.Unlock()
		if d.Size() > size { // a client from before it grew sees less
			return fmt.Errorf("it is exported with %d bytes, and has %d", d.Size(), size)
		}
	}
	c := &client{world: w, r: r, name: name, im: im, d: d}
	for range 1 + r.IntN(200) {
		if !w.pause(ctx) {
			break
		}
		if err := c.request(); err != nil {
			d.Abort()
			return err
		}
		w.state.count("requests")
	}
	switch {
	case r.IntN(8) > 0:
		return d.Close()
	case d.ReadOnly() || r.IntN(2) == 0:
		d.Abort()
		return nil
	}
	return c.desert()
}

// wrongError is content that must not be there.
type wrongError struct{ error }

// client is one connection with what it works on.
type client struct {
	*world
	r    *rand.Rand
	name string
	im   *image
	d    *nbdclient.Client
}

// somewhere chooses a range and claims it. n is 0 if it found none.
func (c *client) somewhere(most int64) (off, n int64) {
	unit := int64(512)
	if c.r.IntN(3) > 0 {
		unit = blockSize
	}
	for range 20 {
		n = min(most, unit<<c.r.IntN(12))
		if c.r.IntN(4) == 0 {
			n = unit * (1 + c.r.Int64N(max(1, most/unit)))
		}
		n = min(n, c.d.Size())
		off = c.r.Int64N(c.d.Size()-n+1) / unit * unit
		if c.r.IntN(16) == 0 {
			off = c.d.Size() - n // the end
		}
		if n > 0 && c.im.claim(off, n) {
			return off, n
		}
	}
	return 0, 0
}

// request does one random thing.
func (c *client) request() error {
	k := c.r.IntN(100)
	switch {
	case c.freeing.Load():
		k = max(k, 60*c.r.IntN(2))
	case c.used.Load() < 60: // mostly large writes
		k /= 1 + c.r.IntN(3)
	}
	var flags uint16
	if c.r.IntN(12) == 0 {
		flags = nbdclient.FUA
	}
	most := int64(256 << 10)
	switch {
	case c.d.ReadOnly() || k >= 50 && k < 80:
		return c.check()
	case k >= 94:
		most = 1 << 20
	case k >= 88:
		most = 4 << 20
	case k >= 80:
		return c.d.Sync()
	}
	off, n := c.somewhere(most)
	if n == 0 {
		return nil
	}
	ch := &change{off: off, n: n}
	send := func() error { return c.d.Write(ch.data, off, flags) }
	switch {
	case k < 50:
		ch.data = content(c.r, n)
	case k < 94:
		ch.trim = true
		send = func() error { return c.d.Trim(off, n, flags) }
	default:
		if c.r.IntN(3) == 0 {
			flags |= nbdclient.NoHole
		}
		send = func() error { return c.d.Zero(off, n, flags) }
	}
	return c.change(ch, send)
}

// content makes n bytes to write.
func content(r *rand.Rand, n int64) []byte {
	p := make([]byte, n)
	switch r.IntN(8) {
	case 0, 1:
		workload.Random(r, p)
	case 2:
		text := fmt.Sprintf("this compresses well, and is the only one of its kind: %d. ", r.Uint64())
		copy(p, strings.Repeat(text, int(n)/len(text)+1))
	case 3: // with holes
		workload.HalfCompressible(r, p)
		for b := int64(0); b < n; b += blockSize {
			if r.IntN(2) == 0 {
				clear(p[b:min(n, b+blockSize)])
			}
		}
	default:
		workload.HalfCompressible(r, p)
	}
	return p
}

// check reads a range, which must be what was answered last.
func (c *client) check() error {
	off, n := c.somewhere(1 << 20)
	if n == 0 {
		return nil
	}
	defer c.im.release(off, n)
	got, want := make([]byte, n), make([]byte, n)
	if _, err := c.d.ReadAt(got, off); err != nil {
		return fmt.Errorf("read %d bytes at %d: %w", n, off, err)
	}
	if err := c.im.read(want, off); err != nil {
		return err
	}
	if !bytes.Equal(got, want) {
		return wrongError{fmt.Errorf("read %d bytes at %d: %s", n, off, difference(got, want, off))}
	}
	return nil
}

func difference(got, want []byte, off int64) string {
	for i := range got {
		if got[i] != want[i] {
			return fmt.Sprintf("the first difference is at %d: there is %s, and should be %s", off+int64(i), describe(got[i:]), describe(want[i:]))
		}
	}
	return "no difference"
}

// change makes a change, whose range is claimed.
func (c *client) change(ch *change, send func() error) error {
	if err := c.im.begin(ch); err != nil {
		return err
	}
	err := send()
	var no nbdclient.Errno
	switch {
	case err == nil:
		return c.im.done(ch)
	case !errors.As(err, &no): // it stays in doubt until the next server can be asked
		return fmt.Errorf("change %d bytes at %d: %w", ch.n, ch.off, err)
	case no.Errno == syscall.ENOSPC:
		c.full.Add(1)
		return c.refused(ch)
	case no.Errno == syscall.ESHUTDOWN && c.server.dying.Load():
		return err
	}
	return fmt.Errorf("change %d bytes at %d: %w", ch.n, ch.off, err)
}

// refused finds out what is there after a change was answered with "no space". It asks by a connection of its own, since
// the client's may be from before the volume grew, and not reach the end of its last block.
func (c *client) refused(ch *change) error {
	c.im.shape.Lock()
	defer c.im.shape.Unlock()
	d, err := c.server.dial(c.name)
	if err != nil {
		return err
	}
	defer d.Abort()
	return c.im.refused(c.name, ch, d)
}

// desert goes away in the middle of a write.
func (c *client) desert() error {
	off, n := c.somewhere(256 << 10)
	if n == 0 {
		return c.d.Close()
	}
	data, half := content(c.r, n), c.r.IntN(2) == 0
	c.state.count("deserted writes")
	if half {
		_ = c.d.Desert(data, off, true) // the server may be gone
		c.im.release(off, n)
		return nil
	}
	if err := c.im.begin(&change{off: off, n: n, data: data}); err != nil {
		return err
	}
	_ = c.d.Desert(data, off, false) // in doubt until the next server, however it ends
	return nil
}
