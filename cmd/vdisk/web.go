package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"strings"
	"sync/atomic"

	"github.com/urfave/cli/v2"

	"github.com/vdisk/vdisk/internal/journal"
	"github.com/vdisk/vdisk/internal/owner"
	"github.com/vdisk/vdisk/internal/web"
)

func webFlag() cli.Flag {
	return &cli.StringFlag{Name: "web", Usage: "serve a page to look at the store at `ADDRESS:PORT|unix:PATH`: a loopback address, or a Unix socket"}
}

// webServer serves the page of the store that it was told of last.
type webServer struct {
	store atomic.Pointer[owner.Owner]
	end   func()
}

// of makes o the store of the page.
func (w *webServer) of(o *owner.Owner) { w.store.Store(o) }

// serveWeb serves the page where --web says, if it says so, until end is called.
func (a *app) serveWeb(c *cli.Context) (*webServer, error) {
	w := &webServer{end: func() {}}
	if !c.IsSet("web") {
		return w, nil
	}
	address := c.String("web")
	if path, is := strings.CutPrefix(address, "unix:"); is && path != "" {
		abs, err := filepath.Abs(path)
		if err != nil {
			return w, err
		}
		address = "unix:" + abs
	}
	l, remove, err := web.Listen(address)
	if errors.Is(err, web.ErrAddress) {
		return w, usageError{c, fmt.Errorf("--web: %w", err)}
	}
	if err != nil {
		return w, err
	}
	where := web.URL(l)
	if path, is := strings.CutPrefix(address, "unix:"); is { // the listener knows another name of it
		where = "unix:" + path
	}
	a.log.Info("page", "url", where)
	w.end = a.goServe(l, remove, web.Options{
		Source: func() web.Source {
			if o := w.store.Load(); o != nil {
				return o
			}
			return nil // and no Source with a nil in it
		},
		Journal: func() (*journal.Tail, error) { return owner.Journal(a.dir, a.foreign) },
		Log:     a.log,
	})
	return w, nil
}

// goServe serves the page on l until the function that it returns is called.
func (a *app) goServe(l net.Listener, remove func(), o web.Options) (end func()) {
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		if err := web.Serve(ctx, l, o); err != nil {
			a.log.Error("page", "err", err)
		}
		remove()
	}()
	return func() { cancel(); <-ended }
}
