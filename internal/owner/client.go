package owner

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"slices"
	"time"

	"github.com/vdisk/vdisk/cow"
	"github.com/vdisk/vdisk/internal/bench"
	"github.com/vdisk/vdisk/internal/owner/sparse"
	"github.com/vdisk/vdisk/internal/storage"
)

// Client is a [Store] that another process owns. It speaks to that owner over the control socket.
type Client struct {
	in   *storage.Folder // the store's folder
	path string          // of the control socket
	http *http.Client
	// command is what the owner notes in the journal, log gets what the owner did.
	command string
	log     *slog.Logger
}

// leastAnswer is the least time that an owner gets for its first answer, however short Options.LockTimeout is.
// Otherwise an owner at work on a busy machine would be mistaken for a stopped one.
const leastAnswer = 2 * time.Second

// connect opens a session with the owner of the store at dir and returns the owner's first status. It fails with
// ErrNoOwner if nobody listens, with errStopping if the owner is about to end, and with cow.ErrBusy if the owner
// listens but does not answer within the larger of Options.LockTimeout and leastAnswer. Only this first answer has a
// time limit.
func connect(ctx context.Context, dir string, o Options) (*Client, Status, error) {
	in, err := storage.OpenFolder(dir, o.Foreign)
	if err != nil && !errors.Is(err, cow.ErrForeign) {
		err = fmt.Errorf("%w: %w", ErrNoOwner, err)
	}
	if err != nil {
		return nil, Status{}, err
	}
	c := &Client{in: in, path: in.Join(controlName), command: o.Command, log: o.Logger}
	c.http = &http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			conn, err := dialControl(ctx, in)
			if err != nil { // a nil *UnixConn in a net.Conn would not be nil
				return nil, err
			}
			return conn, nil
		},
		ExpectContinueTimeout: passTimeout,
		DisableCompression:    true,
	}}
	patience := max(o.LockTimeout, leastAnswer)
	first, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	s, err := c.Status(first)
	if err == nil {
		return c, s, nil
	}
	_ = c.Close()
	if ctx.Err() == nil && first.Err() != nil {
		return nil, s, fmt.Errorf("the owner of the store at %s (%s) has not answered for %v: %w: if it was stopped, let it go on "+
			"(kill -CONT PID); if it is only slow, give a longer --lock-timeout", dir, cmp.Or(Holder(dir), "unknown"), patience, cow.ErrBusy)
	}
	var netErr *net.OpError
	if !errors.Is(err, ErrNoOwner) && ctx.Err() == nil && (errors.As(err, &netErr) || errors.Is(err, io.EOF)) {
		err = fmt.Errorf("%w: %w", errStopping, err) // it closed the connection before anything was asked
	}
	return nil, s, err
}

// Close ends the session and closes the store's folder.
func (c *Client) Close() error {
	c.http.CloseIdleConnections()
	return c.in.Close()
}

// looks are the operations that change nothing, and that no log has.
var looks = []string{"status", "info", "volumes", "volume", "space", "volume-space", "stats", "compare", "damage", "difference"}

// post sends an operation and returns the answer, whose body the caller closes. args, unless nil, go into a header,
// since the body is something else then.
func (c *Client) post(ctx context.Context, name string, args *request, body io.Reader) (*http.Response, error) {
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://vdisk/v1/"+name, body)
	if err != nil {
		return nil, err
	}
	if c.command != "" {
		r.Header.Set(commandHeader, c.command)
	}
	if args != nil {
		b, err := json.Marshal(args)
		if err != nil {
			return nil, err
		}
		r.Header.Set(argumentsHeader, string(b))
		r.Header.Set("Expect", "100-continue") // so that a refusal arrives before the body is sent
	}
	resp, err := c.http.Do(r)
	if err != nil {
		return nil, c.lost(ctx, err)
	}
	if resp.StatusCode != http.StatusOK {
		defer resp.Body.Close()
		return nil, answerError(resp)
	}
	if c.log != nil && !slices.Contains(looks, name) {
		c.log.Debug("the owner of the store does", "operation", name)
	}
	return resp, nil
}

// lost returns the error for an operation that got no answer because of err.
func (c *Client) lost(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return UnansweredError{context.Cause(ctx)}
	}
	return UnansweredError{fmt.Errorf("asking the owner of the store at %s: %w", c.path, err)}
}

func answerError(resp *http.Response) error {
	e := new(Error)
	err := json.NewDecoder(io.LimitReader(resp.Body, maxRequest)).Decode(e)
	if err != nil || e.Message == "" {
		return statusError(resp.StatusCode)
	}
	return e
}

// call performs a plain operation and decodes the answer into answer, which may be nil.
func (c *Client) call(ctx context.Context, name string, req request, answer any) error {
	b, err := json.Marshal(req)
	if err != nil {
		return err
	}
	resp, err := c.post(ctx, name, nil, bytes.NewReader(b))
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if answer == nil {
		answer = new(any)
	}
	if err := json.NewDecoder(resp.Body).Decode(answer); err != nil {
		return c.lost(ctx, err)
	}
	_, _ = io.Copy(io.Discard, resp.Body) // read to the end, so that the connection is reused
	return nil
}

// Status describes the owner of the store, its devices and its services.
func (c *Client) Status(ctx context.Context) (s Status, err error) {
	return s, c.call(ctx, "status", request{}, &s)
}

// Info describes the store.
func (c *Client) Info(ctx context.Context) (i cow.StoreInfo, err error) {
	return i, c.call(ctx, "info", request{}, &i)
}

// Volumes lists the volumes by name.
func (c *Client) Volumes(ctx context.Context) (v []Volume, err error) {
	return v, c.call(ctx, "volumes", request{}, &v)
}

// Volume describes one volume.
func (c *Client) Volume(ctx context.Context, name string) (v Volume, err error) {
	return v, c.call(ctx, "volume", request{Name: name}, &v)
}

// Usage returns the space that volumes and snapshots take: the named ones that exist, or all of them.
func (c *Client) Usage(ctx context.Context, refs ...cow.Ref) (us []cow.Usage, err error) {
	return us, c.call(ctx, "space", request{Refs: refs}, &us)
}

// VolumeUsage returns the space that volumes take, each with all of its snapshots.
func (c *Client) VolumeUsage(ctx context.Context, names ...string) (us []cow.Usage, err error) {
	return us, c.call(ctx, "volume-space", request{Names: names}, &us)
}

// CreateVolume makes an empty volume.
func (c *Client) CreateVolume(ctx context.Context, name string, o cow.VolumeOptions) (v cow.VolumeInfo, err error) {
	return v, c.call(ctx, "create", request{Name: name, Volume: o}, &v)
}

// Snapshot takes snapshots of all the volumes at the same moment.
func (c *Client) Snapshot(ctx context.Context, refs ...cow.Ref) error {
	return c.call(ctx, "snapshot", request{Refs: refs}, nil)
}

// Clone makes volumes from a snapshot, all of them or none.
func (c *Client) Clone(ctx context.Context, src cow.Ref, names ...string) error {
	r := request{Ref: src, Names: names}
	if len(names) == 1 { // an older owner knows no others
		r.Name, r.Names = names[0], nil
	}
	return c.call(ctx, "clone", r, nil)
}

// Rollback gives a volume the content of one of its snapshots.
func (c *Client) Rollback(ctx context.Context, to cow.Ref) error {
	return c.call(ctx, "rollback", request{Ref: to}, nil)
}

// Rename gives a volume, or a snapshot of the same volume, another name.
func (c *Client) Rename(ctx context.Context, from, to cow.Ref) error {
	return c.call(ctx, "rename", request{Ref: from, To: to}, nil)
}

// Resize changes the size of a volume.
func (c *Client) Resize(ctx context.Context, name string, size int64, shrink bool) error {
	return c.call(ctx, "resize", request{Name: name, Size: size, Flag: shrink}, nil)
}

// Remove removes a volume or snapshot.
func (c *Client) Remove(ctx context.Context, r cow.Ref, recursive bool) error {
	return c.call(ctx, "remove", request{Ref: r, Flag: recursive}, nil)
}

// Attach makes a block device for a volume or snapshot.
func (c *Client) Attach(ctx context.Context, o AttachOptions) (d Device, err error) {
	return d, c.call(ctx, "attach", request{Attach: o}, &d)
}

// Detach removes a block device.
func (c *Client) Detach(ctx context.Context, what string, force bool) error {
	return c.call(ctx, "detach", request{Name: what, Flag: force}, nil)
}

// Claim declares that waiting devices belong to this store.
func (c *Client) Claim(ctx context.Context, what string) error {
	return c.call(ctx, "claim", request{Name: what}, nil)
}

// Recover serves waiting devices again.
func (c *Client) Recover(ctx context.Context, what string) (r []Recovery, err error) {
	return r, c.call(ctx, "recover", request{Name: what}, &r)
}

// Stats returns the counters of a block device.
func (c *Client) Stats(ctx context.Context, what string) (s DeviceStats, err error) {
	return s, c.call(ctx, "stats", request{Name: what}, &s)
}

// Clean reclaims the space of chunk files that are partly dead.
func (c *Client) Clean(ctx context.Context, waste float64) (r cow.CleanReport, err error) {
	return r, c.call(ctx, "clean", request{Waste: waste}, &r)
}

// Cold runs a whole cold pass.
func (c *Client) Cold(ctx context.Context) (r cow.ColdReport, err error) {
	return r, c.call(ctx, "cold", request{}, &r)
}

// Check verifies the store's structure and calls problem for each problem that it finds.
func (c *Client) Check(ctx context.Context, o cow.CheckOptions, problem func(cow.Problem)) (cow.CheckReport, error) {
	var report cow.CheckReport
	resp, err := c.post(ctx, "check", &request{Check: checkRequest{ReadData: o.ReadData, Volume: o.Volume}}, nil)
	if err != nil {
		return report, err
	}
	defer resp.Body.Close()
	for d := json.NewDecoder(resp.Body); ; {
		var line checkLine
		if err := d.Decode(&line); err != nil {
			return report, c.lost(ctx, err)
		}
		switch {
		case line.Problem != nil:
			problem(*line.Problem)
		case line.Progress != nil && o.Progress != nil:
			o.Progress(line.Progress[0], line.Progress[1])
		case line.Report != nil && line.Error != nil:
			return *line.Report, line.Error
		case line.Report != nil:
			return *line.Report, nil
		}
	}
}

// Bench measures the owner's engine on a scratch volume.
func (c *Client) Bench(ctx context.Context, o bench.Options, each func(bench.Result)) error {
	resp, err := c.post(ctx, "bench", &request{Bench: o}, nil)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	for d := json.NewDecoder(resp.Body); ; {
		var line benchLine
		if err := d.Decode(&line); err != nil {
			return c.lost(ctx, err)
		}
		switch {
		case line.Result != nil:
			each(*line.Result)
		case line.Error != nil:
			return line.Error
		case line.Done:
			return nil
		}
	}
}

// Import makes a volume with the content of src. Holes of src are not sent.
func (c *Client) Import(ctx context.Context, name string, o cow.VolumeOptions, src sparse.Source, progress func(int64)) (v cow.VolumeInfo, err error) {
	return v, c.send(ctx, "import", &request{Name: name, Volume: o, Size: src.Size()}, src, progress, &v)
}

// send performs an operation whose body is the content of src, and decodes the answer into answer.
func (c *Client) send(ctx context.Context, name string, args *request, src sparse.Source, progress func(int64), answer any) error {
	r, w := io.Pipe()
	sent := make(chan error, 1)
	watched := &watchedSource{Source: src, progress: progress}
	go func() {
		bw := bufio.NewWriterSize(w, 256<<10)
		// If the source fails, watched.err has the reason; if the owner wants no more, its answer has it.
		_ = sparse.Encode(ctx, bw, watched, message)
		_ = w.CloseWithError(bw.Flush())
		sent <- watched.err
	}()
	patient, cancel := outlast(ctx)
	defer cancel()
	resp, err := c.post(patient, name, args, r)
	_ = r.Close() // ends the sender if it is still running
	if serr := <-sent; serr != nil {
		err = serr // this is what caused the owner's error
	}
	if ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	if resp != nil {
		defer resp.Body.Close()
	}
	if err == nil {
		err = json.NewDecoder(&answerBody{resp.Body, c, ctx}).Decode(answer)
	}
	return err
}

// answerBody is the body of an answer. An error says that it was cut off.
type answerBody struct {
	io.Reader
	c   *Client
	ctx context.Context
}

func (b *answerBody) Read(p []byte) (int, error) {
	n, err := b.Reader.Read(p)
	if err != nil && err != io.EOF {
		err = b.c.lost(b.ctx, err)
	}
	return n, err
}

// outlast returns a context for an operation whose data stream tells the owner that ctx has ended. The operation then
// has stopTimeout to clean up.
func outlast(ctx context.Context) (context.Context, context.CancelFunc) {
	longer, cancel := context.WithCancel(context.WithoutCancel(ctx))
	stop := context.AfterFunc(ctx, func() {
		select {
		case <-longer.Done():
		case <-time.After(stopTimeout):
			cancel()
		}
	})
	return longer, func() { stop(); cancel() }
}

// watchedSource reports a source's progress and keeps its error.
type watchedSource struct {
	sparse.Source
	progress func(int64)
	err      error
}

func (s *watchedSource) Next(p []byte) (int, int64, error) {
	n, off, err := s.Source.Next(p)
	if err != nil && err != io.EOF {
		s.err = err
	}
	if err == nil && s.progress != nil {
		s.progress(off + int64(n))
	}
	return n, off, err
}

// Export calls use with the content of a snapshot, or of a volume that is not open for writing.
func (c *Client) Export(ctx context.Context, ref cow.Ref, use func(sparse.Source) error) error {
	return c.receive(ctx, "export", &request{Ref: ref}, use)
}

// receive performs an operation that is answered with a framed stream.
func (c *Client) receive(ctx context.Context, name string, args *request, use func(sparse.Source) error) error {
	return c.receiveLost(ctx, name, args, nil, use)
}

// Serve makes the owner serve the NBD clients that connect to l.
func (c *Client) Serve(ctx context.Context, l net.Listener, o ServeOptions) error {
	defer l.Close()
	nc, err := dialControl(ctx, c.in)
	if err != nil {
		return c.lost(ctx, err)
	}
	defer nc.Close()
	stop := context.AfterFunc(ctx, func() {
		_ = nc.CloseWrite()                                 // fails if the owner is gone
		_ = nc.SetReadDeadline(time.Now().Add(stopTimeout)) // the owner ends its clients in less time
	})
	defer stop()
	b, err := json.Marshal(request{Serve: o})
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(nc, "POST /v1/serve HTTP/1.1\r\nHost: vdisk\r\nContent-Length: 0\r\n%s: %s\r\n%s: %s\r\n\r\n", argumentsHeader, b, commandHeader, c.command)
	if err != nil {
		return c.lost(ctx, err)
	}
	br := bufio.NewReader(nc)
	resp, err := http.ReadResponse(br, nil)
	if err != nil {
		return c.lost(ctx, err)
	}
	if resp.StatusCode != http.StatusSwitchingProtocols {
		defer resp.Body.Close()
		return answerError(resp)
	}
	if err := giveListener(nc, l); err != nil {
		return c.lost(ctx, err)
	}
	if !o.Fixed { // the owner counts a service now: an upgrade need not wait for this command
		c.http.CloseIdleConnections()
	}
	answer := new(Error)
	if err := json.NewDecoder(br).Decode(answer); err != nil {
		return fmt.Errorf("the owner of the store has ended: %w", err)
	}
	if answer.Message != "" {
		return answer
	}
	return nil
}
