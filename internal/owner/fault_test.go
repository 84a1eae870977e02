package owner

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vdisk/vdisk/cow"
	"github.com/vdisk/vdisk/internal/owner/sparse"
	"github.com/vdisk/vdisk/internal/storage"
	"github.com/vdisk/vdisk/internal/testwatch"
)

// cutConn is a client's connection that ends when it has sent, or received, so many bytes.
type cutConn struct {
	*net.UnixConn
	*cut
}

type cut struct {
	sends, receives int  // bytes until the end; -1: there is no end
	small           bool // each call does one byte
	fired           bool
}

func (c *cutConn) Write(p []byte) (n int, err error) {
	if c.sends < 0 && !c.small {
		return c.UnixConn.Write(p)
	}
	for n < len(p) {
		if c.sends == 0 {
			c.fired = true
			_ = c.UnixConn.Close()
			return n, syscall.EPIPE
		}
		k := len(p) - n
		if c.sends > 0 {
			k = min(k, c.sends)
		}
		if c.small {
			k = 1
		}
		k, err = c.UnixConn.Write(p[n : n+k])
		if n += k; err != nil {
			return n, err
		}
		if c.sends > 0 {
			c.sends -= k
		}
	}
	return n, nil
}

func (c *cutConn) Read(p []byte) (int, error) {
	if c.receives == 0 {
		c.fired = true
		_ = c.UnixConn.Close()
		return 0, syscall.ECONNRESET
	}
	if c.small {
		p = p[:1]
	}
	if c.receives > 0 {
		p = p[:min(len(p), c.receives)]
	}
	n, err := c.UnixConn.Read(p)
	if c.receives > 0 {
		c.receives -= n
	}
	return n, err
}

// cutOperation is what a client asks for. It returns an error if the answer is not the right one, too.
type cutOperation struct {
	name string
	do   func(context.Context, *Client) error
	undo func(*Owner) error // nil: it changes nothing
}

func cutOperations() []cutOperation {
	base, ctx := cow.Ref{Volume: "v", Snapshot: "base"}, context.Background()
	content := bytes.Repeat([]byte("0123456789abcdef"), 600)
	right := func(err error, ok bool) error {
		if err == nil && !ok {
			return errors.New("a wrong answer")
		}
		return err
	}
	return []cutOperation{
		{"create", func(ctx context.Context, c *Client) error {
			v, err := c.CreateVolume(ctx, "w", cow.VolumeOptions{Size: 1 << 20})
			return right(err, v.Size == 1<<20)
		}, func(o *Owner) error { return o.Remove(ctx, cow.Ref{Volume: "w"}, false) }},
		{"snapshot", func(ctx context.Context, c *Client) error {
			return c.Snapshot(ctx, cow.Ref{Volume: "v", Snapshot: "s"}, cow.Ref{Volume: "u", Snapshot: "s"})
		}, func(o *Owner) error {
			return errors.Join(o.Remove(ctx, cow.Ref{Volume: "v", Snapshot: "s"}, false), o.Remove(ctx, cow.Ref{Volume: "u", Snapshot: "s"}, false))
		}},
		{
			"clone", func(ctx context.Context, c *Client) error { return c.Clone(ctx, base, "c") },
			func(o *Owner) error { return o.Remove(ctx, cow.Ref{Volume: "c"}, false) },
		},
		{"rename", func(ctx context.Context, c *Client) error {
			return c.Rename(ctx, cow.Ref{Volume: "u"}, cow.Ref{Volume: "x"})
		}, func(o *Owner) error { return o.Rename(ctx, cow.Ref{Volume: "x"}, cow.Ref{Volume: "u"}) }},
		{
			"resize", func(ctx context.Context, c *Client) error { return c.Resize(ctx, "v", 128<<20, false) },
			func(o *Owner) error { return o.Resize(ctx, "v", 64<<20, true) },
		},
		{"import", func(ctx context.Context, c *Client) error {
			v, err := c.Import(ctx, "i", cow.VolumeOptions{}, sparse.FromStream(bytes.NewReader(content)), nil)
			return right(err, v.Size >= int64(len(content)))
		}, func(o *Owner) error { return o.Remove(ctx, cow.Ref{Volume: "i"}, false) }},
		{"export", func(ctx context.Context, c *Client) error {
			var got bytes.Buffer
			err := c.Export(ctx, base, func(src sparse.Source) error { return sparse.WriteTo(ctx, &got, src, nil) })
			return right(err, got.Len() == 64<<20 && strings.HasPrefix(got.String(), "the content"))
		}, nil},
		{"volumes", func(ctx context.Context, c *Client) error {
			v, err := c.Volumes(ctx)
			return right(err, len(v) == 2 && len(v[1].Snapshots) == 1)
		}, nil},
		{"check", func(ctx context.Context, c *Client) error {
			r, err := c.Check(ctx, cow.CheckOptions{}, func(cow.Problem) {})
			return right(err, r.Entries > 0)
		}, nil},
	}
}

// cutState describes all volumes and snapshots.
func cutState(t *testing.T, o *Owner) string {
	t.Helper()
	volumes, err := o.Volumes(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var b strings.Builder
	for _, v := range volumes {
		fmt.Fprint(&b, v.Name, " ", v.Size, " ", len(v.Snapshots), "; ")
	}
	return b.String()
}

// settled waits until no client has a session.
func (o *Owner) settled(t *testing.T) {
	t.Helper()
	for end := time.Now().Add(testwatch.Long); ; time.Sleep(50 * time.Microsecond) {
		o.mu.Lock()
		n := o.sessions
		o.mu.Unlock()
		if n == 0 {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("%d sessions do not end\n%s", n, testwatch.Stacks())
		}
	}
}

// TestFaultAtEveryByteOfControl: a client's connection to the owner ends after every number of bytes that it has sent,
// or received; or each call does one byte. The operation is then done, or not at all, and the client knows, or gets an
// error that says so. Nothing is left. VDISK_FAULTS=all takes every byte.
func TestFaultAtEveryByteOfControl(t *testing.T) {
	dir := newStore(t)
	o := offer(t, dir)
	ctx := t.Context()
	if _, err := o.CreateVolume(ctx, "u", cow.VolumeOptions{Size: 1 << 20}); err != nil {
		t.Fatal(err)
	}
	dev, err := o.store.OpenDevice(cow.Ref{Volume: "v"}, false)
	if err == nil {
		_, err = dev.WriteAt(bytes.Repeat([]byte("the content, "), 300), 0)
		err = errors.Join(err, dev.Close(), o.Snapshot(ctx, cow.Ref{Volume: "v", Snapshot: "base"}))
	}
	if err != nil {
		t.Fatal(err)
	}
	in, err := storage.OpenFolder(dir, false)
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	step, seed, count := 1, int(time.Now().UnixNano()>>10&0xffff), 0
	if os.Getenv("VDISK_FAULTS") != "all" {
		if step = 29; testing.Short() {
			step = 150
		}
		t.Logf("seed %d", seed)
	}
	for i, op := range cutOperations() {
		r := &cutRun{owner: o, in: in, op: op}
		r.run(t, &cut{sends: -1, receives: -1})
		r.run(t, &cut{sends: -1, receives: -1, small: true})
		files := openFDs(t)
		first := (seed + i*11) % step
		next := func(n int) int {
			if step > 1 {
				return n + step + n/8 // a stream is long
			}
			return n + 1
		}
		for n := first; r.run(t, &cut{sends: n, receives: -1}); n = next(n) {
			count++
		}
		for n := first; r.run(t, &cut{sends: -1, receives: n}); n = next(n) {
			count++
		}
		if n := openFDs(t); n > files+2 { // the store's own may change
			t.Errorf("%s: %d open files, %d before", op.name, n, files)
		}
	}
	t.Logf("proof: faults on the control socket: %d", count)
}

// cutRun runs one operation again and again.
type cutRun struct {
	owner         *Owner
	in            *storage.Folder
	op            cutOperation
	before, after string // the states
}

// run does the operation, undoes it, and reports whether the connection was cut.
func (r *cutRun) run(t *testing.T, c *cut) bool {
	t.Helper()
	at := fmt.Sprintf("%s, cut after %d bytes sent, %d received", r.op.name, c.sends, c.receives)
	whole := c.sends < 0 && c.receives < 0
	request := c.sends >= 0
	dials := 0
	client := &Client{in: r.in, path: r.in.Join(controlName)}
	transport := &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			conn, err := dialControl(ctx, r.in)
			if err != nil {
				return nil, err
			}
			dials++
			return &cutConn{conn, c}, nil
		},
		ExpectContinueTimeout: passTimeout, DisableCompression: true,
	}
	client.http = &http.Client{Transport: transport}
	if r.before == "" {
		r.before = cutState(t, r.owner)
	}
	done := make(chan error, 1)
	go func() { done <- r.op.do(t.Context(), client) }()
	err := testwatch.Wait(t, testwatch.Long, at, done)
	transport.CloseIdleConnections()
	r.owner.settled(t)
	now := cutState(t, r.owner)
	if r.after == "" && whole {
		r.after = now
	}
	switch {
	case err == nil && now != r.after, err != nil && now != r.before && now != r.after:
		t.Errorf("%s: %v: %s; before %s", at, err, now, r.before)
	case c.fired && request && (err == nil || now != r.before && r.op.name != "import"): // whose content has an end of its own
		t.Errorf("%s: half a request: %v: %s; before %s", at, err, now, r.before)
	case !c.fired && err != nil:
		t.Errorf("%s: %v", at, err)
	case err != nil && !strings.Contains(err.Error(), "owner"):
		t.Errorf("%s: the error does not say what happened: %v", at, err)
	case dials > 1:
		t.Errorf("%s: sent again", at)
	}
	if now != r.before && r.op.undo != nil {
		if err := r.op.undo(r.owner); err != nil {
			t.Fatalf("%s: undoing: %v", at, err)
		}
	}
	if t.Failed() {
		t.FailNow()
	}
	return c.fired
}

func openFDs(t testing.TB) int {
	t.Helper()
	names, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(names)
}
