package main

import (
	"context"
	"errors"
	"fmt"
	"math"
	"net"
	"slices"

	"github.com/coreos/go-systemd/v22/activation"
	"github.com/urfave/cli/v2"

	"github.com/vdisk/vdisk/cow"
	"github.com/vdisk/vdisk/internal/owner"
)

func (a *app) serveCommand() *cli.Command {
	return a.command(arity{0, -1}, &cli.Command{
		Name:      "serve",
		Category:  groupAccess,
		Usage:     "serve volumes and snapshots over NBD until interrupted",
		UsageText: "vdisk serve [--socket PATH [--socket-mode MODE] [--socket-group GROUP] | --listen HOST:PORT --tls-certificates DIR] [--read-only | --shared] [--metrics ADDRESS:PORT] [VOL[@SNAP]...]",
		Description: "Without arguments everything in the store is served, including volumes that are created later. Exports are named VOL\n" +
			"and VOL@SNAP. The default socket is STORE/nbd.sock. Under socket activation (LISTEN_FDS) the given socket is served,\n" +
			"until the last client leaves: nbdcopy -- [ vdisk serve vm1@monday ] out.img\n\n" +
			"A volume has one writer: the process that opens it first, with all of its connections. Others get it read-only. Over TCP,\n" +
			"a client is one connection. --shared lets all write, for clusters that agree on who writes what.\n\n" +
			"Over TCP (--listen) there is no service without TLS. --tls-certificates names a folder with ca-cert.pem, server-cert.pem\n" +
			"and server-key.pem, as for QEMU and libvirt. Every client needs a certificate of that authority; a revocation list in\n" +
			"ca-crl.pem names those that count no more.",
		Flags: append([]cli.Flag{
			&cli.PathFlag{Name: "socket", Usage: "create the Unix socket `PATH`"},
			&cli.StringFlag{Name: "listen", Usage: "listen on the TCP address `HOST:PORT` (NBD's port is 10809)"},
			&cli.PathFlag{Name: "tls-certificates", Usage: "require TLS, with the certificates in the folder `DIR`"},
			&cli.BoolFlag{Name: "read-only", Usage: "refuse writes"},
			&cli.BoolFlag{Name: "shared", Usage: "let all clients write to a volume at once, and not only the first one"},
			&cli.IntFlag{Name: "max-connections", Usage: "serve at most `N` clients of this service at a time", DefaultText: "10000, or half of the open files that are allowed"},
			&cli.StringFlag{Name: "max-memory", Usage: "limit the memory of the requests of this service's clients to `SIZE`", Value: "256M"},
		}, append(accessFlags(), metricsFlags()...)...),
	}, a.serve)
}

// minServeMemory is the memory for the largest request and its reply.
const minServeMemory = 64 << 20

func (a *app) serve(c *cli.Context) error {
	o := owner.ServeOptions{ReadOnly: c.Bool("read-only"), Shared: c.Bool("shared"), MaxConnections: c.Int("max-connections")}
	if c.IsSet("max-connections") && o.MaxConnections < 1 {
		return usageError{c, fmt.Errorf("--max-connections %d: at least 1 is needed", o.MaxConnections)}
	}
	if c.IsSet("max-memory") {
		var err error
		if o.MaxMemory, err = a.sizeBetween("--max-memory", c.String("max-memory"), minServeMemory, math.MaxInt64); err != nil {
			return err
		}
	}
	var err error
	if o.Exports, err = argsFrom(c, 0, ref); err != nil {
		return err
	}
	if o.Certificates, err = listenFlags(c); err != nil {
		return err
	}
	if _, err = socketAccess(c); err != nil { // before the store is opened
		return err
	}
	passed, err := passedListener(c)
	if err != nil {
		return err
	}
	l, err := a.listenMetrics(c)
	if err != nil {
		return err
	}
	if l != nil {
		a.note("metrics are at http://%v/metrics", l.Addr())
	}
	shown := a.serveMetrics(l)
	defer shown.end()
	opts := a.options(c)
	opts.Offer = true
	disks := false
	err = use(func(s owner.Store) (err error) {
		shown.of(s)
		if passed != nil {
			o.Once, o.Socket = true, passed.Addr().String()
			err = s.Serve(c.Context, passed, o)
		} else {
			err = a.serveSocket(c, s, o)
		}
		if o, ok := s.(*owner.Owner); ok {
			disks = o.LeaveDisks()
		}
		if err == nil { // otherwise the service ended by itself, with its last client
			err = context.Cause(c.Context)
		}
		return err
	})(owner.Open(c.Context, a.dir, opts))
	if disks {
		err = errors.Join(err, a.handDisksOver(c))
	}
	return err
}

// handDisksOver lets a daemon serve the disks that others attached while this process owned the store: their users did
// not ask for their end.
func (a *app) handDisksOver(c *cli.Context) error {
	s, _, err := owner.OpenLasting(context.WithoutCancel(c.Context), a.dir, a.options(c), a.daemonArgs())
	if err != nil {
		return fmt.Errorf("the disks that were attached meanwhile wait: %w; 'vdisk recover' serves them again", err)
	}
	a.note("a daemon serves the disks that were attached meanwhile")
	return s.Close()
}

// passedListener returns the socket that this process was started with, or nil if there is none.
func passedListener(c *cli.Context) (net.Listener, error) {
	listeners, err := activation.Listeners()
	switch {
	case err != nil:
		return nil, fmt.Errorf("socket activation: %w", err)
	case len(listeners) == 0:
		return nil, nil
	case len(listeners) > 1 || listeners[0] == nil:
		return nil, fmt.Errorf("socket activation: one listening socket is needed, and there are %d descriptors", len(listeners))
	case c.IsSet("socket"), c.IsSet("listen"), c.IsSet("socket-mode"), c.IsSet("socket-group"):
		return nil, usageError{c, errors.New("--socket, --socket-mode, --socket-group and --listen cannot be given under socket activation")}
	}
	return listeners[0], nil
}

func (a *app) serveSocket(c *cli.Context, s owner.Store, o owner.ServeOptions) error {
	names, err := exportNames(c.Context, s, o)
	if err != nil {
		return err
	}
	listen := a.listenUnix
	if c.IsSet("listen") {
		listen = a.listenTCP
	}
	l, err := listen(c, s, o.Certificates != "")
	if err != nil {
		return err
	}
	defer l.remove()
	if own, ok := s.(*owner.Owner); ok && own.ReadOnly() != nil {
		a.note("exports are read-only: %v", own.ReadOnly())
	}
	o.Socket = l.where
	uris := []string{}
	for _, name := range names {
		uris = append(uris, l.uri(name))
	}
	out := map[string]any{"socket": l.where, "uris": uris}
	if l.warning != "" {
		out["warning"] = l.warning
		a.note("%s", l.warning)
	}
	err = a.print(out, func() error {
		for _, u := range uris {
			if _, err := fmt.Fprintln(a.stdout, u); err != nil {
				return err
			}
		}
		if len(uris) == 0 {
			a.note("there are no volumes yet; those to come are served at %s", l.where)
		}
		return nil
	})
	if err != nil {
		return errors.Join(err, l.Close())
	}
	return s.Serve(c.Context, l.Listener, o)
}

// exportNames returns the names of what is served now. It fails if something that was asked for does not exist.
func exportNames(ctx context.Context, s owner.Store, o owner.ServeOptions) (names []string, err error) {
	if len(o.Exports) == 0 {
		volumes, err := s.Volumes(ctx)
		for _, v := range volumes {
			names = append(names, v.Name)
			for _, sn := range v.Snapshots {
				names = append(names, cow.Ref{Volume: v.Name, Snapshot: sn.Name}.String())
			}
		}
		return names, err
	}
	for _, r := range o.Exports {
		v, err := s.Volume(ctx, r.Volume)
		if err == nil && r.Snapshot != "" && !slices.ContainsFunc(v.Snapshots, func(sn cow.SnapshotInfo) bool { return sn.Name == r.Snapshot }) {
			err = fmt.Errorf("snapshot %v: %w", r, cow.ErrNotFound)
		}
		if err != nil {
			return nil, err
		}
		names = append(names, r.String())
	}
	return names, nil
}
