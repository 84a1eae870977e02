package ublk

import (
	"context"
	"fmt"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// DieFetchingForTest makes a device, or begins to recover the one of Options.ID, offers the first tags of its first
// queue to the driver, and kills the process before the rest: a server that died while it started.
func DieFetchingForTest(ctx context.Context, o Options, recover bool, tags int) error {
	c, err := openControl()
	if err != nil {
		return err
	}
	d, err := addedForTest(ctx, c, o.withDefaults(), recover)
	if err != nil {
		return err
	}
	if err := d.openChar(ctx); err != nil {
		return err
	}
	r, err := newRing(64, 256, 0)
	if err != nil {
		return err
	}
	buf, _, err := mapAnonymous(d.opts.MaxIOBytes)
	if err != nil {
		return err
	}
	for tag := range tags {
		e := r.get()
		e.opcode, e.fd, e.off = opURingCmd, int32(d.charFD), ioFetchReq
		cmd := ioCmd{tag: uint16(tag)}
		if d.opts.Copy != CopyUser {
			cmd.addr = uint64(uintptr(unsafe.Pointer(&buf[0])))
		}
		*(*ioCmd)(unsafe.Pointer(&e.cmd)) = cmd
	}
	if err := r.enter(0); err != nil {
		return err
	}
	if _, res, refused := r.next(); refused {
		return fmt.Errorf("a fetch ended with %d", res)
	}
	fmt.Println("FETCHED")
	_ = unix.Kill(os.Getpid(), unix.SIGKILL)
	select {}
}

// addedForTest returns a device that is added and not started, or whose recovery has begun.
func addedForTest(ctx context.Context, c *control, o Options, recover bool) (*Device, error) {
	offered, err := c.offered(ctx)
	if err != nil {
		return nil, err
	}
	if recover {
		info, err := c.waitOrphan(ctx, deref(o.ID), 0)
		if err == nil {
			err = startRetry(ctx, c, info.target())
		}
		if err != nil {
			return nil, err
		}
		return newDevice(c, info, offered, o, StateRecovering), nil
	}
	info, err := o.info(offered)
	if err != nil {
		return nil, err
	}
	if err := c.add(ctx, info); err != nil {
		return nil, err
	}
	d := newDevice(c, info, offered, o, StateStarting)
	return d, c.setParams(ctx, d.target, o.params())
}
