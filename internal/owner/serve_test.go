package owner

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vdisk/vdisk/cow"
	"github.com/vdisk/vdisk/internal/testwatch"
	"github.com/vdisk/vdisk/nbd"
)

// serving serves NBD until the returned function is called, which returns the error of the service.
func serving(t *testing.T, s Store, opts ServeOptions) (path string, end func() error) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "s")
	l, remove, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	opts.Socket = path
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- s.Serve(ctx, l, opts); remove() }()
	return path, sync.OnceValue(func() error { cancel(); return testwatch.Wait(t, testwatch.Long, "the end of the service", ended) })
}

// eventually waits until ready returns true. Only a hang takes longer than its limit.
func eventually(t *testing.T, ready func() bool) {
	t.Helper()
	for end := time.Now().Add(testwatch.Long); !ready(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("hangs\n%s", testwatch.Stacks())
		}
	}
}

// nbdClient is a minimal client for these tests.
type nbdClient struct {
	net.Conn
	t testing.TB
}

// openNBD opens an export, or returns the text of the refusal.
func openNBD(t testing.TB, path, name string) (c nbdClient, refusal string) {
	t.Helper()
	nc, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = nc.Close() })
	_ = nc.SetDeadline(time.Now().Add(20 * time.Second))
	c = nbdClient{nc, t}
	c.get(18)
	be := binary.BigEndian
	b := be.AppendUint32(nil, 3)
	b = append(b, "IHAVEOPT"...)
	b = be.AppendUint32(b, 7) // GO
	b = be.AppendUint32(b, uint32(4+len(name)+2))
	b = be.AppendUint32(b, uint32(len(name)))
	b = append(b, name...)
	b = be.AppendUint16(b, 0)
	c.put(b)
	for {
		h := c.get(20)
		data := c.get(int(be.Uint32(h[16:])))
		switch typ := be.Uint32(h[12:]); {
		case typ == 1: // ACK
			return c, ""
		case typ >= 1<<31:
			return c, string(data)
		}
	}
}

func (c nbdClient) put(b []byte) {
	c.t.Helper()
	if _, err := c.Write(b); err != nil {
		c.t.Fatal(err)
	}
}

func (c nbdClient) get(n int) []byte {
	c.t.Helper()
	b := make([]byte, n)
	if _, err := io.ReadFull(c, b); err != nil {
		c.t.Fatal(err)
	}
	return b
}

// request sends a request, and returns the error number of its simple reply.
func (c nbdClient) request(typ uint16, off uint64, length uint32, payload string) uint32 {
	c.t.Helper()
	c.send(typ, off, length, payload)
	return binary.BigEndian.Uint32(c.get(16)[4:])
}

func (c nbdClient) send(typ uint16, off uint64, length uint32, payload string) {
	c.t.Helper()
	be := binary.BigEndian
	b := be.AppendUint32(nil, 0x25609513)
	b = be.AppendUint16(b, 0)
	b = be.AppendUint16(b, typ)
	b = be.AppendUint64(b, 1)
	b = be.AppendUint64(b, off)
	b = be.AppendUint32(b, length)
	c.put(append(b, payload...))
}

const nbdWrite, nbdFlush = 1, 3

// A service in another process ends with that process. For its client this is an error, because the client did not end
// it.
func TestServiceEndsWithItsOwner(t *testing.T) {
	dir := newStore(t)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	opts := quick
	opts.Offer = true
	o, err := Own(ctx, dir, opts)
	if err != nil {
		t.Fatal(err)
	}
	own, endOwn := serving(t, o, ServeOptions{})
	client := open(t, dir)
	theirs, endTheirs := serving(t, client, ServeOptions{})
	for _, path := range []string{own, theirs} {
		if _, refusal := openNBD(t, path, "v"); refusal != "" {
			t.Fatal(refusal)
		}
	}
	closed := make(chan error, 1)
	cancel()
	go func() { closed <- o.Close() }()
	if err := testwatch.Wait(t, testwatch.Long, "Close", closed); err != nil {
		t.Error(err)
	}
	for _, end := range []func() error{endOwn, endTheirs} {
		if err := end(); !errors.Is(err, errStopping) || !strings.Contains(err.Error(), "has ended") {
			t.Errorf("a service ended with %v", err)
		}
	}
}

// A volume that clients have open is not renamed, because they would look for the old name when they reconnect.
func TestRenameOfOpenExport(t *testing.T) {
	o := offer(t, newStore(t))
	ref := func(name string) cow.Ref {
		r, err := cow.ParseRef(name)
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	for _, name := range []string{"v@s", "v@other"} {
		if err := o.Snapshot(t.Context(), ref(name)); err != nil {
			t.Fatal(err)
		}
	}
	path, end := serving(t, o, ServeOptions{})
	for _, x := range []struct {
		open, from, to string
		refused        bool
	}{
		{"v", "v", "w", true},
		{"v@s", "v", "w", true},
		{"v@s", "v@s", "v@z", true},
		{"v@s", "v@other", "v@another", false},
		{"v", "v@another", "v@other", false},
	} {
		c, refusal := openNBD(t, path, x.open)
		if refusal != "" {
			t.Fatal(refusal)
		}
		err := o.Rename(t.Context(), ref(x.from), ref(x.to))
		if x.refused != errors.Is(err, cow.ErrBusy) || x.refused != (err != nil && strings.Contains(err.Error(), "NBD client")) {
			t.Errorf("%s is open, renaming %s to %s: %v", x.open, x.from, x.to, err)
		}
		_ = c.Close()
		eventually(t, func() bool { return len(o.exports.users("v")) == 0 })
	}
	// No client can open it meanwhile.
	done, err := o.exports.keepOut(ref("v"))
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"v", "v@s"} {
		if _, refusal := openNBD(t, path, name); !strings.Contains(refusal, "renamed") {
			t.Errorf("%s is opened while it is renamed: %q", name, refusal)
		}
	}
	done()
	if err := o.Rename(t.Context(), ref("v"), ref("w")); err != nil {
		t.Error(err)
	}
	if _, refusal := openNBD(t, path, "w"); refusal != "" {
		t.Error(refusal)
	}
	if err := end(); err != nil {
		t.Error(err)
	}
}

// Each client of an export is counted, although they share one handle of the engine.
func TestWritersAreCounted(t *testing.T) {
	o := offer(t, newStore(t))
	if err := o.Snapshot(t.Context(), cow.Ref{Volume: "v", Snapshot: "s"}); err != nil {
		t.Fatal(err)
	}
	path, end := serving(t, o, ServeOptions{})
	opened := 0
	for _, name := range []string{"v", "v", "v", "v@s", "v@s"} {
		if _, refusal := openNBD(t, path, name); refusal != "" {
			t.Fatal(refusal)
		}
		opened++
		one, err := o.Volume(t.Context(), "v")
		if err != nil || one.Open != opened {
			t.Errorf("%d are open (%v), want %d", one.Open, err, opened)
		}
		all, err := o.Volumes(t.Context())
		if err != nil || all[0].Open != opened {
			t.Errorf("%d are open (%v), want %d", all[0].Open, err, opened)
		}
	}
	if err := end(); err != nil {
		t.Error(err)
	}
}

// A disk that does not answer delays the clients that wait for it, but neither other opens nor the end of a service.
func TestStuckDisk(t *testing.T) {
	_, o, disk := brittle(t, t.Context())
	if _, err := o.CreateVolume(t.Context(), "other", cow.VolumeOptions{Size: 1 << 20}); err != nil {
		t.Fatal(err)
	}
	path, end := serving(t, o, ServeOptions{})
	writer, refusal := openNBD(t, path, "v")
	if refusal != "" || writer.request(nbdWrite, 0, 4096, strings.Repeat("x", 4096)) != 0 {
		t.Fatal(refusal)
	}
	stuck := make(chan struct{})
	disk.stuck.Store(&stuck)
	_ = writer.Close() // and what it wrote is flushed, if the disk lets it
	eventually(t, func() bool {
		o.exports.mu.Lock()
		defer o.exports.mu.Unlock()
		return len(o.exports.open) == 1 && o.exports.open[0].flushing == 1
	})
	for _, name := range []string{"other", "v"} {
		c, refusal := openNBD(t, path, name)
		if refusal != "" {
			t.Error(refusal)
		}
		_ = c.Close()
	}
	if users := o.exports.users("v"); len(users) != 1 {
		t.Error(users)
	}

	shown := &catalog{exports: o.exports}
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- serveUntil(ctx, nbd.New(shown, nbd.Options{}), l, 50*time.Millisecond) }()
	c, _ := openNBD(t, l.Addr().String(), "v")
	c.send(nbdFlush, 0, 0, "")
	time.Sleep(20 * time.Millisecond)
	cancel()
	if err := testwatch.Wait(t, testwatch.Long, "the end of the service", ended); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a service ends with %v", err)
	}

	never := make(chan error)
	if err := inTime(10*time.Millisecond, "closing", func() error { return <-never }); err == nil || !strings.Contains(err.Error(), "closing takes more than") {
		t.Error(err)
	}
	if err := inTime(time.Hour, "closing", func() error { return io.EOF }); err != io.EOF {
		t.Error(err)
	}
	disk.stuck.Store(nil)
	close(stuck)
	if err := errors.Join(end(), o.Close()); err != nil {
		t.Error(err)
	}
}

// The owner logs the reason why a request fails.
func TestFailedNBDRequestIsLogged(t *testing.T) {
	var mu sync.Mutex
	var log bytes.Buffer
	_, o, disk := brittle(t, t.Context())
	o.opts.Logger = slog.New(slog.NewTextHandler(lockedWriter{&mu, &log}, nil))
	path, end := serving(t, o, ServeOptions{})
	c, refusal := openNBD(t, path, "v")
	if refusal != "" || c.request(nbdWrite, 0, 4096, strings.Repeat("x", 4096)) != 0 {
		t.Fatal(refusal)
	}
	disk.broken.Store(true)
	if errno := c.request(nbdFlush, 0, 0, ""); errno != uint32(unix.EIO) {
		t.Errorf("errno %d", errno)
	}
	mu.Lock()
	text := log.String()
	mu.Unlock()
	if !strings.Contains(text, "nbd request failed") || !strings.Contains(text, "export=v request=FLUSH") || !strings.Contains(text, "input/output error") {
		t.Errorf("log: %s", text)
	}
	_ = c.Close()
	if errors.Join(end(), o.Close()) == nil {
		t.Error("a service ends as if nothing had happened")
	}
}

type lockedWriter struct {
	mu *sync.Mutex
	w  io.Writer
}

func (w lockedWriter) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.w.Write(p)
}

// The empty name means the only volume, even if there are snapshots. A volume that is in use can be described.
func TestCatalog(t *testing.T) {
	w := newFakeMachine(t)
	o := w.own(true)
	x := &catalog{exports: o.exports}
	if err := o.Snapshot(t.Context(), cow.Ref{Volume: "v", Snapshot: "s"}); err != nil {
		t.Fatal(err)
	}
	w.attach(o, "v")
	if err := o.Resize(t.Context(), "v", 128<<20, false); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]nbd.Info{
		"":    {Name: "v", Size: 128 << 20},
		"v":   {Name: "v", Size: 128 << 20},
		"v@s": {Name: "v@s", Size: 64 << 20, ReadOnly: true},
	} {
		want.PreferredBlock = preferredBlock
		want.Contexts = []string{"qemu:allocation-depth", "qemu:dirty-bitmap:s"}
		got, err := x.Describe(name)
		want.Description = got.Description
		if err != nil || !reflect.DeepEqual(got, want) || !strings.HasPrefix(got.Description, want.Name+", a ") {
			t.Errorf("%q: %+v %v", name, got, err)
		}
	}
	names, err := x.List()
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []*catalog{x, {exports: o.exports, only: []cow.Ref{{Volume: "v", Snapshot: "s"}, {Volume: "v"}, {Volume: "gone"}}}} {
		infos, err := c.ListInfo()
		if err != nil {
			t.Fatal(err)
		}
		if c != x {
			names = []string{"v@s", "v", "gone"}
		}
		for i, info := range infos {
			if info.Name != names[i] || info.Name != "gone" && !strings.HasPrefix(info.Description, info.Name+", a ") {
				t.Errorf("listed: %q %q, want %s", info.Name, info.Description, names[i])
			}
		}
		if len(infos) != len(names) {
			t.Errorf("%d exports are listed, want %q", len(infos), names)
		}
	}
	for _, name := range []string{"w", "v@t", "w@s", "..", "v@", strings.Repeat("n", 100)} {
		if _, err := x.Describe(name); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%q: %v", name, err)
		}
		if _, err := x.Open(name); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%q: %v", name, err)
		}
	}
	shared := &catalog{exports: o.exports, shared: true}
	if _, err := shared.Open(""); !errors.Is(err, cow.ErrBusy) || !strings.Contains(err.Error(), "is attached as") {
		t.Error(err)
	}
	if e, err := x.Open(""); err != nil || !e.ReadOnly {
		t.Errorf("a volume that is attached: %+v %v", e, err)
	} else if err := e.Close(); err != nil {
		t.Error(err)
	}
	if err := o.Detach(t.Context(), "v", false); err != nil {
		t.Fatal(err)
	}
	e, err := x.Open("")
	if err != nil || e.Name != "v" {
		t.Fatal(e, err)
	}
	if err := e.Close(); err != nil {
		t.Error(err)
	}
	only := &catalog{exports: o.exports, only: []cow.Ref{{Volume: "v", Snapshot: "s"}}}
	if got, err := only.Describe(""); err != nil || got.Name != "v@s" {
		t.Error(got, err)
	}
	if _, err := o.CreateVolume(t.Context(), "second", cow.VolumeOptions{Size: 1 << 20}); err != nil {
		t.Fatal(err)
	}
	if _, err := x.Describe(""); !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
	w.close(o)
}

// askToServe asks the owner to serve, and returns before the descriptors are sent.
func askToServe(t *testing.T, dir string) *net.UnixConn {
	t.Helper()
	nc, err := net.Dial("unix", filepath.Join(dir, controlName))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = nc.Close() })
	_ = nc.SetDeadline(time.Now().Add(20 * time.Second))
	_, _ = fmt.Fprintf(nc, "POST /v1/serve HTTP/1.1\r\nHost: vdisk\r\nContent-Length: 0\r\n%s: {\"Serve\":{}}\r\n\r\n", argumentsHeader)
	if _, err := io.ReadFull(nc, make([]byte, len(switching))); err != nil {
		t.Fatal(err)
	}
	return nc.(*net.UnixConn)
}

// A service that is about to begin is counted at all times: an upgrade neither overlooks it nor cuts it off.
func TestServiceThatBegins(t *testing.T) {
	w := newFakeMachine(t)
	opts := w.options(true)
	opts.Replaceable, opts.program = true, program(t, `echo '{"version":"2.0","store_format":99,"handover":1}'`)
	opts.sessionTimeout = 50 * time.Millisecond
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	o, err := Own(ctx, w.dir, opts)
	if err != nil {
		t.Fatal(err)
	}
	asker := askToServe(t, w.dir)
	if _, err := o.Upgrade(t.Context()); !errors.Is(err, cow.ErrBusy) {
		t.Errorf("upgrade while a service begins: %v", err)
	}
	// It is there now, between the upgrade's looks.
	o.opts.sessionTimeout = 10 * time.Second
	upgraded := make(chan error, 1)
	go func() { _, err := o.Upgrade(t.Context()); upgraded <- err }()
	eventually(t, func() bool {
		o.mu.Lock()
		defer o.mu.Unlock()
		return !o.accepting
	})
	l, remove, err := Listen(filepath.Join(t.TempDir(), "s"))
	if err != nil {
		t.Fatal(err)
	}
	defer remove()
	if err := giveListener(asker, l); err != nil {
		t.Fatal(err)
	}
	err = testwatch.Wait(t, testwatch.Long, "the upgrade", upgraded)
	answer, _ := io.ReadAll(asker)
	if refused := strings.Contains(string(answer), "stopping"); (err == nil) != refused || o.Successor() == nil != (err != nil) {
		t.Errorf("upgrade: %v, the service: %s", err, answer)
	}
	cancel()
	if err := o.CloseWhenDone(); err != nil {
		t.Error(err)
	}
}

// Of all descriptors that come with a request, those that are not served are closed.
func TestPassedDescriptorsAreClosed(t *testing.T) {
	dir := newStore(t)
	o := offer(t, dir)
	descriptors := func() int {
		entries, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return len(entries)
	}
	null, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	before := descriptors()
	for i := range 20 {
		for n := range 4 {
			asker := askToServe(t, dir)
			fds := make([]int, n)
			for i := range fds {
				fds[i] = int(null.Fd())
			}
			if _, _, err := asker.WriteMsgUnix([]byte{0}, unix.UnixRights(fds...), nil); err != nil {
				t.Fatal(err)
			}
			if answer, err := io.ReadAll(asker); err != nil || !strings.Contains(string(answer), "came with the request") {
				t.Fatalf("%d, %d descriptors: %s %v", i, n, answer, err)
			}
			_ = asker.Close()
		}
	}
	o.wait(func() bool { return o.sessions == 0 })
	if after := descriptors(); after > before+5 {
		t.Errorf("%d descriptors are open, %d were", after, before)
	}
}

func TestConnectionLimits(t *testing.T) {
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	half := int(min(limit.Cur/2, 1<<30))
	for asked, want := range map[int]int{0: min(defaultConnections, half), 1: 1, half: half} {
		if got, err := connections(asked); err != nil || got != want {
			t.Errorf("%d: %d %v, want %d", asked, got, err, want)
		}
	}
	for _, asked := range []int{-1, half + 1} {
		if _, err := connections(asked); !errors.Is(err, cow.ErrInvalid) {
			t.Errorf("%d: %v", asked, err)
		}
	}
}

// The limits that a client asks for hold in the owner.
func TestServeLimits(t *testing.T) {
	dir := newStore(t)
	offer(t, dir)
	path, end := serving(t, open(t, dir), ServeOptions{MaxConnections: 1, MaxMemory: 64 << 20})
	c, refusal := openNBD(t, path, "v")
	if refusal != "" {
		t.Fatal(refusal)
	}
	if _, refusal := openNBD(t, path, "v"); refusal != "too many NBD connections: the server takes 1 at a time" {
		t.Errorf("%q", refusal)
	}
	if c.request(nbdFlush, 0, 0, "") != 0 {
		t.Error("the first is not served")
	}
	if err := end(); err != nil {
		t.Error(err)
	}
}
