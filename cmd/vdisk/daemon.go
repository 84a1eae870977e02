package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/urfave/cli/v2"

	"github.com/vdisk/vdisk/internal/owner"
)

func (a *app) daemonCommand() *cli.Command {
	return a.command(arity{0, 0}, &cli.Command{
		Name:      "daemon",
		Category:  groupAccess,
		Usage:     "own the store in the foreground",
		UsageText: "vdisk daemon [--nbd PATH|off] [--socket-mode MODE] [--socket-group GROUP] [--metrics ADDRESS:PORT] [--web ADDRESS:PORT|unix:PATH]",
		Description: "The daemon recovers devices that wait for a server, and serves all volumes and snapshots over NBD, as 'vdisk serve' does:\n" +
			"on STORE/nbd.sock, on another socket (--nbd PATH), or not at all (--nbd off). It attaches the volumes with the property\n" +
			"auto.attach=on ('vdisk set').\n\n" +
			"SIGINT, SIGTERM and SIGHUP end it, and its block devices with it; if it is killed in any other way, they wait for the\n" +
			"next server. 'vdisk attach' starts a daemon, without NBD, if the store has no owner. Start one yourself (as a service:\n" +
			"init/vdisk@.service) to keep the store open at all times. SIGUSR2 does what 'vdisk upgrade' does.\n\n" +
			"--web 127.0.0.1:9751 lets every user of this machine look at the store with a browser: volumes, graphs, space, events.\n" +
			"--web unix:/run/vdisk/web.sock lets only root and the daemon's user ('ssh -L 9751:/run/vdisk/web.sock HOST').",
		Flags: append([]cli.Flag{
			&cli.PathFlag{Name: "nbd", Usage: "serve NBD on the Unix socket `PATH`, or \"off\"", DefaultText: "STORE/nbd.sock; off with --until-idle"},
			&cli.BoolFlag{Name: "until-idle", Usage: "end with the last device, service and client"},
			&cli.BoolFlag{Name: "ready", Usage: "tell on descriptor 3 how the start went", Hidden: true},
		}, append(append(accessFlags(), metricsFlags()...), webFlag())...),
	}, a.daemon)
}

const (
	// firstUse is how long a daemon that was started for a command waits for that command.
	firstUse = 10 * time.Second
	// successorTimeout is how long a program that took over waits for a command that locked the store in between.
	successorTimeout = time.Minute
)

// daemonArgs returns the arguments that start a daemon which ends once it is no longer needed.
func (a *app) daemonArgs() []string {
	args := []string{"--store", a.dir, "--lock-timeout", "0s"}
	if a.maxSize != "" {
		args = append(args, "--max-size", a.maxSize)
	}
	if a.foreign {
		args = append(args, "--foreign")
	}
	return append(args, "daemon", "--until-idle", "--ready")
}

func (a *app) daemon(c *cli.Context) error {
	if !a.verbose {
		a.log = slog.New(slog.NewTextHandler(a.stderr, nil))
	}
	o := a.options(c)
	o.Logger, o.Offer, o.Replaceable, o.Starts = a.log, true, true, true
	handover := owner.TakeHandover()
	if handover != nil {
		o.LockTimeout = max(o.LockTimeout, successorTimeout)
		o.Handover = handover.Failed
	}
	l, err := a.listenMetrics(c)
	if err = a.disksFirst(err, handover, "there are no metrics"); err != nil {
		return err
	}
	if l != nil {
		a.log.Info("metrics", "url", "http://"+l.Addr().String()+"/metrics")
	}
	shown := a.serveMetrics(l)
	defer shown.end()
	page, err := a.serveWeb(c)
	defer page.end()
	if err = a.disksFirst(err, handover, "there is no page"); err != nil {
		return err
	}
	return a.own(c, o, handover, func(s *owner.Owner) { shown.of(s); page.of(s) })
}

// disksFirst returns why a daemon cannot listen for those who look at it, and so does not start. It logs what must not keep
// the disks waiting: any user of the machine can take the address while the daemon is down, and a daemon that takes over
// in an upgrade has clients.
func (a *app) disksFirst(err error, handover *owner.Handover, lacks string) error {
	if err == nil || handover == nil && !errors.Is(err, syscall.EADDRINUSE) {
		return err
	}
	a.log.Error(lacks, "err", err)
	return nil
}

// own owns the store until the end, or until an upgrade executes another program.
func (a *app) own(c *cli.Context, o owner.Options, handover *owner.Handover, show func(*owner.Owner)) error {
	for {
		o.Handed = handover
		s, err := a.startOwner(c, o, handover)
		if err != nil && handover != nil && c.Context.Err() == nil {
			return handover.Return(version(), err)
		}
		if err != nil {
			return err
		}
		show(s)
		if handover != nil {
			handover.Done()
		}
		if err = a.untilEnd(c, s); err != nil {
			err = closeError{err}
		}
		successor := s.Successor()
		if successor == nil {
			return err
		}
		if err != nil {
			// The devices have been flushed, or there would be no successor. Opening the store does what could not be
			// done now.
			a.log.Error("closing the store before the upgrade", "err", err)
		}
		err = successor.Execute(version())
		a.log.Error("the upgrade failed; going on", "err", err)
		handover = successor.Undone(version())
		o.LockTimeout, o.Handover = max(o.LockTimeout, successorTimeout), err.Error()
	}
}

// startOwner opens the store, recovers waiting devices, begins to serve NBD, and reports to the process that started
// this daemon, or that executed its program. If it fails, or is stopped before it is ready, the recovered devices wait
// again: their users did not ask for their end.
func (a *app) startOwner(c *cli.Context, o owner.Options, handover *owner.Handover) (*owner.Owner, error) {
	nbd, err := a.daemonSocket(c)
	var s *owner.Owner
	if err == nil {
		s, err = owner.Own(c.Context, a.dir, o)
	}
	if err == nil {
		_, err = s.Recover(c.Context, "") // the outcome of each device is logged and listed
		if err == nil && handover == nil && !c.Bool("until-idle") {
			s.AttachMarked(c.Context)
		}
		if err == nil && !handover.GoesOn() {
			err = a.serveNBD(s, nbd)
		}
		if err = errors.Join(err, context.Cause(c.Context)); err != nil {
			err = errors.Join(err, s.CloseLeaving())
		}
	}
	if c.Bool("ready") && handover == nil {
		if rerr := owner.Ready(a.dir, a.foreign, err); err == nil && rerr != nil {
			err = errors.Join(rerr, s.CloseLeaving())
		}
	}
	if err != nil {
		return nil, err
	}
	s.GoOn(handover)
	if s.WritesThrough() { // earlier log messages are not in the store's log
		a.log.Warn("there was no room in /dev/shm when the store was opened: writes are slower")
	}
	a.log.Info("ready", "store", a.dir, "pid", os.Getpid(), "version", version())
	a.notify(daemon.SdNotifyReady)
	return s, nil
}

// notify sends a state to the service manager, if there is one.
func (a *app) notify(state string) {
	if _, err := daemon.SdNotify(false, state); err != nil {
		a.log.Warn("telling the service manager", "err", err)
	}
}

// untilEnd waits until the owner must end, closes it, and returns the error.
func (a *app) untilEnd(c *cli.Context, s *owner.Owner) error {
	ctx, stop := context.WithCancel(c.Context)
	defer stop()
	upgrades := make(chan os.Signal, 1)
	signal.Notify(upgrades, syscall.SIGUSR2)
	go func() {
		defer signal.Stop(upgrades)
		for {
			select {
			case <-upgrades:
				if _, err := s.Upgrade(ctx); err != nil {
					a.log.Error("the upgrade is refused", "err", err)
				}
			case <-ctx.Done():
				return
			}
		}
	}()
	told := make(chan struct{})
	remains := context.AfterFunc(ctx, func() {
		defer close(told)
		if s.Successor() == nil {
			a.notify(daemon.SdNotifyStopping)
		}
	})
	defer func() {
		if !remains() { // the owner may have closed, and the process would end, before the manager was told
			<-told
		}
	}()
	if c.Bool("until-idle") {
		return s.CloseWhenIdle(firstUse)
	}
	return s.CloseWhenDone()
}

func (a *app) recoverCommand() *cli.Command {
	return a.command(arity{0, 1}, &cli.Command{
		Name:      "recover",
		Category:  groupAccess,
		Usage:     "serve block devices whose server was killed, and print their paths",
		UsageText: "vdisk recover [--moved] [VOL[@SNAP]|/dev/ublkbN]",
		Description: "A block device outlives its server: I/O to it waits. This command lets the store's owner serve it again; if there is\n" +
			"none, a daemon is started, as by attach. Without an argument, all waiting devices of the store are recovered.\n" +
			"If the store's file system was mounted anew meanwhile and has another device number, it may be a copy of the original.\n" +
			"--moved asserts that it is the original.",
		Flags: []cli.Flag{&cli.BoolFlag{Name: "moved", Usage: "assert that the store's file system was mounted anew, and is not a copy"}},
	}, a.recover)
}

func (a *app) recover(c *cli.Context) error {
	s, started, err := owner.OpenLasting(c.Context, a.dir, a.options(c), a.daemonArgs())
	if err != nil {
		return err
	}
	defer s.Close()
	what := c.Args().First()
	if c.Bool("moved") {
		if err := s.Claim(c.Context, what); err != nil {
			return err
		}
	}
	outcome, err := s.Recover(c.Context, what)
	if err != nil {
		return err
	}
	if started { // a new daemon recovered what it could before it was ready
		st, err := s.Status(c.Context)
		if err != nil {
			return err
		}
		outcome = withServed(outcome, st.Devices, what)
	}
	if len(outcome) == 0 {
		a.note("nothing waits for a server")
	}
	return a.printRecovered(outcome)
}

// withServed adds to outcome the served devices that what names, or all of them if it is empty, each only once.
func withServed(outcome []owner.Recovery, devices []owner.Device, what string) []owner.Recovery {
	told := map[string]bool{}
	for _, r := range outcome {
		told[r.Device.Path] = true
	}
	for _, d := range devices {
		if !d.Waits && !told[d.Path] && (what == "" || what == d.Path || what == d.Ref.String()) {
			outcome = append(outcome, owner.Recovery{Device: d})
		}
	}
	return outcome
}

func (a *app) printRecovered(outcome []owner.Recovery) error {
	list := []deviceJSON{}
	var errs []error
	for _, r := range outcome {
		list = append(list, deviceJSONOf(r.Device))
		if r.Error != nil {
			errs = append(errs, r.Error)
		}
	}
	err := a.print(map[string]any{"devices": list}, func() error {
		for _, r := range outcome {
			if r.Error == nil {
				if _, err := fmt.Fprintln(a.stdout, r.Device.Path); err != nil {
					return err
				}
			}
		}
		return nil
	})
	return errors.Join(append(errs, err)...)
}

func (a *app) upgradeCommand() *cli.Command {
	return a.command(arity{0, 0}, &cli.Command{
		Name:      "upgrade",
		Category:  groupAccess,
		Usage:     "replace the running daemon with the installed version of vdisk",
		UsageText: "vdisk upgrade",
		Description: "The new program must be at the path from which the daemon was started. Block devices and NBD clients stay:\n" +
			"they notice a pause. The process keeps its pid. If the new program cannot take over, the old one continues. The command\n" +
			"succeeds when all devices are served again. NBD connections with TLS cannot be handed over: they end in order, behind the\n" +
			"last request that was received, and their clients have to connect again.",
	}, func(c *cli.Context) error {
		u, err := owner.UpgradeDaemon(c.Context, a.dir, a.options(c))
		if errors.Is(err, owner.ErrNoOwner) {
			a.note("no daemon has the store open; the next one is the installed program anyway")
			return a.print(map[string]string{"from": "", "to": ""}, func() error { return nil })
		}
		if err != nil {
			return err
		}
		if u.Same {
			a.note("%s is the program that ran already; it was started again", u.Program)
		}
		if u.Ended > 0 {
			a.note("%d NBD clients were disconnected: connections with TLS, or that have opened nothing yet, cannot be handed over", u.Ended)
		}
		return a.print(map[string]string{"from": u.From, "to": u.To}, func() error {
			_, err := fmt.Fprintf(a.stdout, "from %s to %s\n", u.From, u.To)
			return err
		})
	})
}
