package ublk

import (
	"context"
	"errors"
	"unsafe"
)

// StopForTest sends STOP past the Device, as another process could.
func StopForTest(id int) error {
	c, err := openControl()
	if err != nil {
		return err
	}
	return c.stop(target{id: id})
}

// KillForTest breaks the first queue of a device, as a failing ring would.
func KillForTest(d *Device, err error) { d.fail(err) }

// stuckAt is a commander that calls reached at one command, and then hangs.
type stuckAt struct {
	commander
	op      uint32
	after   bool
	reached func()
}

func (s stuckAt) run(ctx context.Context, op uint32, cmd ctrlCmd, buf unsafe.Pointer) (int32, error) {
	if op != s.op {
		return s.commander.run(ctx, op, cmd, buf)
	}
	if s.after {
		if res, err := s.commander.run(ctx, op, cmd, buf); res < 0 || err != nil {
			return res, err
		}
	}
	s.reached()
	select {}
}

// StickForTest makes the process hang before or after a control command.
func StickForTest(command string, after bool, reached func()) error {
	c, err := openControl()
	if err != nil {
		return err
	}
	op, ok := map[string]uint32{
		"ADD": cmdAddDev, "SET_PARAMS": cmdSetParams, "START": cmdStartDev, "STOP": cmdStopDev,
		"START_USER_RECOVERY": cmdStartUserRecovery, "END_USER_RECOVERY": cmdEndUserRecovery,
	}[command]
	if !ok {
		return errors.New("no such command: " + command)
	}
	c.commander = stuckAt{commander: c.commander, op: op, after: after, reached: reached}
	return nil
}

// HalfFetchForTest makes a device, or with id takes one over, and stops when the first of several queues has fetched.
func HalfFetchForTest(id int, o Options, h Handler) error {
	ctx := context.Background()
	c, err := openControl()
	if err != nil {
		return err
	}
	offered, err := c.offered(ctx)
	if err != nil {
		return err
	}
	var info *devInfo
	if id < 0 {
		o = o.withDefaults()
		if info, err = o.info(offered); err != nil {
			return err
		}
		err = c.add(ctx, info)
	} else {
		if info, err = c.waitOrphan(ctx, id, 0); err != nil {
			return err
		}
		p, perr := c.getParams(ctx, info.target())
		if perr != nil {
			return perr
		}
		o = optionsOf(info, p)
		err = startRetry(ctx, c, info.target())
	}
	if err != nil {
		return err
	}
	d := newDevice(c, info, offered, o, StateStarting)
	if id < 0 {
		if err := c.setParams(ctx, d.target, o.params()); err != nil {
			return err
		}
	}
	if err := d.openChar(ctx); err != nil {
		return err
	}
	if err := d.makeQueues(ctx, h); err != nil {
		return err
	}
	ready := make(chan error, 1)
	d.ending.Add(1)
	go d.queueRoutine(d.queues[0], ready)
	return <-ready
}
