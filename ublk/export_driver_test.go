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
	o = o.withDefaults()
	c, err := openControl()
	if err != nil {
		return err
	}
	d := &Device{id: deref(o.ID), opts: o, control: c, charFD: -1}
	if recover {
		err = retryBusy(func() error { return c.startRecovery(ctx, target{id: d.id}) })
	} else {
		err = d.addForTest(ctx)
	}
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
	buf, _, err := mapAnonymous(o.MaxIOBytes)
	if err != nil {
		return err
	}
	for tag := range tags {
		e := r.get()
		e.opcode, e.fd, e.off = opURingCmd, int32(d.charFD), ioFetchReq
		cmd := ioCmd{tag: uint16(tag)}
		if o.Copy != CopyUser {
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

// retryBusy tries again for as long as the last server is still going.
func retryBusy(try func() error) error {
	for range 1000 {
		if err := try(); err != unix.EBUSY {
			return err
		}
		if err := sleep(context.Background(), 10e6); err != nil {
			return err
		}
	}
	return unix.EBUSY
}

func (d *Device) addForTest(ctx context.Context) error {
	offered, err := d.control.offered(ctx)
	if err != nil {
		return err
	}
	info, err := d.opts.info(offered)
	if err != nil {
		return err
	}
	if err := d.control.add(ctx, info); err != nil {
		return err
	}
	return d.control.setParams(ctx, info.target(), d.opts.params())
}
