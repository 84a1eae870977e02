package owner

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"sync"
	"time"

	"github.com/vdisk/vdisk/cow"
	"github.com/vdisk/vdisk/internal/bench"
	"github.com/vdisk/vdisk/internal/owner/sparse"
)

// control is the server of the control socket.
type control struct {
	owner  *Owner
	remove func() // removes the socket
	http   *http.Server
	ended  chan struct{} // closed when http no longer accepts connections
}

// maxRequest limits the body of a plain operation, and the arguments of the other operations.
const maxRequest = 1 << 20

// listenControl starts to offer the store on its control socket. The store's lock is held, so an existing socket is not
// in use.
func listenControl(o *Owner) (*control, error) {
	if err := o.in.Remove(controlName); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	l, remove, err := listenIn(o.in, controlName, Access{})
	if err != nil {
		return nil, err
	}
	c := &control{owner: o, remove: remove, ended: make(chan struct{})}
	c.http = &http.Server{
		Handler:           named(givingUp(c.routes(), standstill)),
		BaseContext:       func(net.Listener) context.Context { return o.life },
		ConnContext:       withPeer,
		ConnState:         c.count,
		ReadHeaderTimeout: standstill,
	}
	go func() {
		defer close(c.ended)
		_ = c.http.Serve(ownListener{l}) // close ends it; if it fails, clients notice
	}()
	return c, nil
}

// close stops the server. Operations under way have been told that the owner's life is over; close waits up to
// stopTimeout for them.
func (c *control) close() error {
	c.remove() // first, so that nobody connects to a closing server; the store's lock is held until the end
	ctx, cancel := context.WithTimeout(context.Background(), stopTimeout)
	defer cancel()
	err := c.http.Shutdown(ctx)
	if err != nil {
		err = errors.Join(err, c.http.Close())
	}
	<-c.ended
	return err
}

// count counts the connected clients. A connection that serve takes over counts as a service instead.
func (c *control) count(_ net.Conn, s http.ConnState) {
	switch s {
	case http.StateNew:
		c.owner.begin()
	case http.StateClosed, http.StateHijacked:
		c.owner.end()
	}
}

// request is the body of a plain operation, and the arguments of the others. Each operation uses the fields that it
// needs.
type request struct {
	Name   string            `json:",omitempty"`
	Names  []string          `json:",omitempty"`
	Ref    cow.Ref           `json:",omitzero"`
	To     cow.Ref           `json:",omitzero"`
	Refs   []cow.Ref         `json:",omitempty"`
	Size   int64             `json:",omitempty"`
	Flag   bool              `json:",omitempty"` // shrink, recursive or force
	Volume cow.VolumeOptions `json:",omitzero"`
	Attach AttachOptions     `json:",omitzero"`
	Serve  ServeOptions      `json:",omitzero"`
	Check  checkRequest      `json:",omitzero"`
	Waste  float64           `json:",omitempty"`
	Scrub  cow.ScrubOptions  `json:",omitzero"`
	Prune  []cow.PruneTarget `json:",omitempty"`
	Bench  bench.Options     `json:",omitzero"`

	Properties map[string]string `json:",omitempty"`

	Send    cow.SendOptions    `json:",omitzero"`
	Receive cow.ReceiveOptions `json:",omitzero"`
}

type checkRequest struct {
	ReadData bool
	Volume   string
}

func (c *control) routes() *http.ServeMux {
	o, mux := c.owner, http.NewServeMux()
	plain := func(name string, f func(context.Context, request) (any, error)) {
		mux.HandleFunc("POST /v1/"+name, func(w http.ResponseWriter, r *http.Request) {
			var req request
			rc := http.NewResponseController(w)
			err := rc.SetReadDeadline(time.Now().Add(standstill))
			if err == nil {
				err = decode(http.MaxBytesReader(w, r.Body, maxRequest), &req)
			}
			if err = errors.Join(err, rc.SetReadDeadline(time.Time{})); err != nil {
				reply(w, nil, err)
				return
			}
			v, err := f(r.Context(), req)
			reply(w, v, err)
		})
	}
	plain("status", func(ctx context.Context, _ request) (any, error) { return o.Status(ctx) })
	plain("info", func(ctx context.Context, _ request) (any, error) { return o.Info(ctx) })
	plain("volumes", func(ctx context.Context, _ request) (any, error) { return o.Volumes(ctx) })
	plain("volume", func(ctx context.Context, r request) (any, error) { return o.Volume(ctx, r.Name) })
	plain("space", func(ctx context.Context, r request) (any, error) { return o.Usage(ctx, r.Refs...) })
	plain("volume-space", func(ctx context.Context, r request) (any, error) { return o.VolumeUsage(ctx, r.Names...) })
	plain("create", func(ctx context.Context, r request) (any, error) { return o.CreateVolume(ctx, r.Name, r.Volume) })
	plain("snapshot", func(ctx context.Context, r request) (any, error) { return nil, o.Snapshot(ctx, r.Refs...) })
	o.retentionRoutes(plain)
	plain("clone", func(ctx context.Context, r request) (any, error) {
		if len(r.Names) == 0 {
			r.Names = []string{r.Name}
		}
		return nil, o.Clone(ctx, r.Ref, r.Names...)
	})
	plain("rollback", func(ctx context.Context, r request) (any, error) { return nil, o.Rollback(ctx, r.Ref) })
	plain("rename", func(ctx context.Context, r request) (any, error) { return nil, o.Rename(ctx, r.Ref, r.To) })
	plain("resize", func(ctx context.Context, r request) (any, error) { return nil, o.Resize(ctx, r.Name, r.Size, r.Flag) })
	plain("remove", func(ctx context.Context, r request) (any, error) { return nil, o.Remove(ctx, r.Ref, r.Flag) })
	plain("hold", func(ctx context.Context, r request) (any, error) { return nil, o.Hold(ctx, r.Name, r.Refs...) })
	plain("release", func(ctx context.Context, r request) (any, error) { return nil, o.Release(ctx, r.Name, r.Refs...) })
	plain("set", func(ctx context.Context, r request) (any, error) {
		return nil, o.SetProperties(ctx, r.Name, r.Properties)
	})
	plain("flatten", func(ctx context.Context, r request) (any, error) { return o.Flatten(ctx, r.Name) })
	plain("abort-receive", func(ctx context.Context, r request) (any, error) { return nil, o.AbortReceive(ctx, r.Name) })
	plain("attach", func(ctx context.Context, r request) (any, error) { return o.Attach(ctx, r.Attach) })
	plain("detach", func(ctx context.Context, r request) (any, error) { return nil, o.Detach(ctx, r.Name, r.Flag) })
	plain("claim", func(ctx context.Context, r request) (any, error) { return nil, o.Claim(ctx, r.Name) })
	plain("recover", func(ctx context.Context, r request) (any, error) { return o.Recover(ctx, r.Name) })
	plain("stats", func(ctx context.Context, r request) (any, error) { return o.Stats(ctx, r.Name) })
	plain("clients", func(ctx context.Context, _ request) (any, error) { return o.Clients(ctx) })
	plain("disconnect", func(ctx context.Context, r request) (any, error) { return o.Disconnect(ctx, r.Name) })
	plain("clean", func(ctx context.Context, r request) (any, error) { return o.Clean(ctx, r.Waste) })
	plain("cold", func(ctx context.Context, _ request) (any, error) { return o.Cold(ctx) })
	plain("scrub", func(ctx context.Context, r request) (any, error) { return o.Scrub(ctx, r.Name, r.Scrub) })
	plain("compare", func(ctx context.Context, r request) (any, error) { return o.Compare(ctx, r.Ref, r.To) })
	plain("damage", func(ctx context.Context, r request) (any, error) { return o.Damage(ctx, r.Refs...) })
	plain("upgrade", func(ctx context.Context, _ request) (any, error) { return o.upgrade(ctx, 1) })
	plain("reading", func(ctx context.Context, _ request) (any, error) { return o.Reading(ctx) })
	plain("metrics", func(ctx context.Context, _ request) (any, error) { return o.metricsText(ctx) })
	c.streamRoutes(mux)
	return mux
}

// streamRoutes adds the operations whose body or answer is a stream.
func (c *control) streamRoutes(mux *http.ServeMux) {
	mux.HandleFunc("GET /metrics", c.metrics)
	mux.HandleFunc("POST /v1/check", c.check)
	mux.HandleFunc("POST /v1/bench", c.bench)
	mux.HandleFunc("POST /v1/difference", c.difference)
	mux.HandleFunc("POST /v1/import", c.importStream)
	mux.HandleFunc("POST /v1/repair", c.repair)
	mux.HandleFunc("POST /v1/export", c.exportStream)
	mux.HandleFunc("POST /v1/salvage", c.salvageStream)
	mux.HandleFunc("POST /v1/export-diff", c.exportDiff)
	mux.HandleFunc("POST /v1/import-diff", c.importDiff)
	mux.HandleFunc("POST /v1/send", c.sendSnapshot)
	mux.HandleFunc("POST /v1/dump-table", c.dumpTable)
	mux.HandleFunc("POST /v1/receive", c.receiveSnapshot)
	mux.HandleFunc("POST /v1/serve", c.serve)
}

// decode refuses fields that this version does not know, so that a newer client's request is never half done.
func decode(r io.Reader, v any) error {
	d := json.NewDecoder(r)
	d.DisallowUnknownFields()
	if err := d.Decode(v); err != nil {
		return fmt.Errorf("the owner of the store does not understand the request: %w: %w", cow.ErrInvalid, err)
	}
	return nil
}

func reply(w http.ResponseWriter, v any, err error) {
	w.Header().Set("Content-Type", "application/json")
	if err != nil {
		w.WriteHeader(http.StatusUnprocessableEntity)
		v = toWire(err)
	}
	_ = json.NewEncoder(w).Encode(v) // fails if the client is gone
}

// arguments returns the arguments of an operation whose body is something else.
func arguments(r *http.Request) (request, error) {
	var req request
	return req, unmarshalStrict(r.Header.Get(argumentsHeader), &req)
}

const (
	argumentsHeader = "Vdisk-Arguments"
	sizeHeader      = "Vdisk-Size"
)

func (c *control) importStream(w http.ResponseWriter, r *http.Request) {
	c.takeStream(w, r, func(req request, src sparse.Source) (any, error) {
		return c.owner.Import(r.Context(), req.Name, req.Volume, src, nil)
	})
}

func (c *control) repair(w http.ResponseWriter, r *http.Request) {
	c.takeStream(w, r, func(req request, src sparse.Source) (any, error) {
		return c.owner.Repair(r.Context(), req.Name, src, nil)
	})
}

// takeStream answers an operation whose body is a framed stream.
func (c *control) takeStream(w http.ResponseWriter, r *http.Request, take func(request, sparse.Source) (any, error)) {
	req, err := arguments(r)
	if err != nil {
		reply(w, nil, err)
		return
	}
	rc := http.NewResponseController(w)
	duplexErr := rc.EnableFullDuplex() // lets an error be answered while the client is still sending
	v, err := take(req, sparse.Decode(r.Body, req.Size))
	reply(w, v, err)
	if duplexErr == nil {
		// An operation may end before the stream does. The client stops once it has read the answer. If the connection were
		// closed earlier, the client would see a broken pipe instead.
		if errors.Join(rc.Flush(), rc.SetReadDeadline(time.Now().Add(stopTimeout))) == nil {
			_, _ = io.Copy(io.Discard, r.Body) // ends when the client closes, or at the deadline
		}
	}
}

func (c *control) exportStream(w http.ResponseWriter, r *http.Request) {
	c.sendStream(w, r, func(req request, use func(sparse.Source) error) error {
		return c.owner.Export(r.Context(), req.Ref, use)
	})
}

// sendStream answers an operation with a framed stream.
func (c *control) sendStream(w http.ResponseWriter, r *http.Request, send func(request, func(sparse.Source) error) error) {
	req, err := arguments(r)
	if err != nil {
		reply(w, nil, err)
		return
	}
	begun := false
	err = send(req, func(src sparse.Source) error {
		begun = true
		waitLonger(w, exportStandstill)
		w.Header().Set(sizeHeader, fmt.Sprint(src.Size()))
		return sparse.Encode(r.Context(), w, src, message)
	})
	if err != nil && !begun {
		reply(w, nil, err)
	}
}

// checkLine is one line of the answer to check.
type checkLine struct {
	Problem  *cow.Problem     `json:",omitempty"`
	Progress *[2]int64        `json:",omitempty"`
	Report   *cow.CheckReport `json:",omitempty"` // in the last line, with Error if the check is incomplete
	Error    *Error           `json:",omitempty"`
}

func (c *control) check(w http.ResponseWriter, r *http.Request) {
	req, err := arguments(r)
	if err != nil {
		reply(w, nil, err)
		return
	}
	lines := newLineWriter(w)
	opts := cow.CheckOptions{
		ReadData: req.Check.ReadData, Volume: req.Check.Volume,
		Progress: func(done, total int64) { lines.write(checkLine{Progress: &[2]int64{done, total}}) },
	}
	report, err := c.owner.Check(r.Context(), opts, func(p cow.Problem) { lines.write(checkLine{Problem: &p}) })
	last := checkLine{Report: &report}
	if err != nil {
		last.Error = toWire(err)
	}
	lines.write(last)
}

// benchLine is one line of the answer to bench. The last line has Done or Error.
type benchLine struct {
	Result *bench.Result `json:",omitempty"`
	Done   bool          `json:",omitempty"`
	Error  *Error        `json:",omitempty"`
}

func (c *control) bench(w http.ResponseWriter, r *http.Request) {
	req, err := arguments(r)
	if err != nil {
		reply(w, nil, err)
		return
	}
	lines := newLineWriter(w)
	last := benchLine{Done: true}
	if err := c.owner.Bench(r.Context(), req.Bench, func(r bench.Result) { lines.write(benchLine{Result: &r}) }); err != nil {
		last = benchLine{Error: toWire(err)}
	}
	lines.write(last)
}

// serve takes over the connection. It answers 101, receives the listening socket, and serves until the client closes
// the connection or the service ends by itself. At the end it sends an Error, which is empty after success.
func (c *control) serve(w http.ResponseWriter, r *http.Request) {
	req, err := arguments(r)
	if err == nil {
		err = c.owner.mayServe(req.Serve)
	}
	if err != nil {
		reply(w, nil, err)
		return
	}
	// The connection counts as a session until the service is counted: no upgrade, and no end of an idle owner, may
	// come in between. One that is Fixed is a session to its end.
	c.owner.begin()
	ended := sync.OnceFunc(c.owner.end)
	defer ended()
	registered := ended
	if req.Serve.Fixed {
		registered = func() {}
	}
	conn, _, err := w.(http.Hijacker).Hijack()
	if err != nil {
		reply(w, nil, err)
		return
	}
	defer conn.Close()
	l, err := takeListener(conn.(*net.UnixConn))
	if err != nil {
		_ = json.NewEncoder(conn).Encode(toWire(err)) // fails if the client is gone
		return
	}
	c.owner.serveAsked(context.WithoutCancel(r.Context()), conn.(*net.UnixConn), l, req.Serve, serviceStart{registered: registered})
}
