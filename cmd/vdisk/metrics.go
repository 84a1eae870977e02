package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync/atomic"

	"github.com/urfave/cli/v2"

	"github.com/vdisk/vdisk/internal/metrics"
	"github.com/vdisk/vdisk/internal/owner"
)

func (a *app) metricsCommand() *cli.Command {
	return a.command(arity{0, 0}, &cli.Command{
		Name:      "metrics",
		Category:  groupMaintenance,
		Usage:     "print what the store does, as metrics for Prometheus",
		UsageText: "vdisk metrics",
		Description: "The metrics are those of the store's owner, in Prometheus's text format: requests, bytes, errors and latencies of each\n" +
			"volume, and what the log, checkpoints, cleaner and caches do. 'vdisk daemon --metrics 127.0.0.1:9750' lets\n" +
			"Prometheus read them. docs/metrics.md says what each means.",
	}, func(c *cli.Context) error {
		var text bytes.Buffer
		if err := a.look(c, func(s owner.Store) error { return s.Metrics(c.Context, &text) }); err != nil {
			return err
		}
		if !a.json {
			_, err := text.WriteTo(a.stdout)
			return err
		}
		families, err := metrics.Parse(&text)
		if err != nil {
			return err
		}
		return a.print(map[string]any{"metrics": families}, nil)
	})
}

// metricsFlags are the flags of commands that serve metrics.
func metricsFlags() []cli.Flag {
	return []cli.Flag{
		&cli.StringFlag{Name: "metrics", Usage: "serve metrics for Prometheus at http://`ADDRESS:PORT`/metrics, on a loopback address"},
		&cli.BoolFlag{Name: "metrics-public", Usage: "permit an address of --metrics that other machines can reach: without TLS, to anybody"},
	}
}

// listenMetrics listens where --metrics says, or returns nil without it.
func (a *app) listenMetrics(c *cli.Context) (net.Listener, error) {
	if !c.IsSet("metrics") {
		if c.Bool("metrics-public") {
			return nil, usageError{c, errors.New("--metrics-public needs --metrics")}
		}
		return nil, nil
	}
	l, err := metrics.Listen(c.String("metrics"), c.Bool("metrics-public"))
	if errors.Is(err, metrics.ErrPublic) {
		return nil, usageError{c, fmt.Errorf("--metrics: %w; --metrics-public permits it", err)}
	}
	return l, err
}

// metricsServer serves the metrics of the store that it was told of last.
type metricsServer struct {
	store atomic.Pointer[owner.Store]
	end   func()
}

// serveMetrics serves metrics on l, unless that is nil, until end is called.
func (a *app) serveMetrics(l net.Listener) *metricsServer {
	m := &metricsServer{end: func() {}}
	if l == nil {
		return m
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		if err := metrics.Serve(ctx, l, a.log, m.write); err != nil {
			a.log.Error("metrics", "err", err)
		}
	}()
	m.end = func() { cancel(); <-ended }
	return m
}

// of makes s the store whose metrics are served.
func (m *metricsServer) of(s owner.Store) { m.store.Store(&s) }

func (m *metricsServer) write(ctx context.Context, w io.Writer) error {
	s := m.store.Load()
	if s == nil {
		return errors.New("the store is not open yet")
	}
	return (*s).Metrics(ctx, w)
}
