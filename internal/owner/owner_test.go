package owner

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/vdisk/vdisk/cow"
	"github.com/vdisk/vdisk/format"
	"github.com/vdisk/vdisk/internal/owner/sparse"
	"github.com/vdisk/vdisk/internal/testwatch"
	"github.com/vdisk/vdisk/ublk"
)

func TestMain(m *testing.M) {
	if path := os.Getenv(connectTo); path != "" {
		os.Exit(connectAndEnd(path))
	}
	os.Exit(testwatch.Run(m))
}

// quick are options for tests. With them nothing waits for other processes.
var quick = Options{Command: "test", LockTimeout: 5 * time.Second}

// newStore makes a store with one volume, v.
func newStore(t *testing.T) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "store")
	t.Cleanup(func() { removeBuffers(t, dir) })
	s, err := OpenOrCreate(t.Context(), dir, quick)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.CreateVolume(t.Context(), "v", cow.VolumeOptions{Size: 64 << 20}); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	return dir
}

// removeBuffers removes the shared memory that an owner has left for the next one after a failure, or because it was
// killed.
func removeBuffers(t *testing.T, dir string) {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(dir, "owner"))
	if errors.Is(err, os.ErrNotExist) {
		return
	}
	var record struct{ Buffers string }
	if err := errors.Join(err, json.Unmarshal(text, &record)); err != nil {
		t.Error(err)
	} else if err := os.Remove("/dev/shm/vdisk-" + record.Buffers); err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Error(err)
	}
}

// offer owns the store and lets others use it, until the test ends.
func offer(t *testing.T, dir string) *Owner {
	t.Helper()
	o := quick
	o.Offer = true
	ctx, cancel := context.WithCancel(context.Background())
	owner, err := Own(ctx, dir, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cancel()
		if err := owner.Close(); err != nil && !errors.Is(err, cow.ErrClosed) {
			t.Error(err)
		}
	})
	return owner
}

func open(t *testing.T, dir string) Store {
	t.Helper()
	s, err := Open(t.Context(), dir, quick)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	return s
}

func TestErrorsKeepTheirMeaning(t *testing.T) {
	for _, c := range codes {
		err := error(toWire(fmt.Errorf("about something: %w", c.err)))
		if !errors.Is(err, c.err) {
			t.Errorf("%s is lost", c.code)
		}
		for _, other := range codes {
			if errors.Is(err, other.err) && !errors.Is(c.err, other.err) {
				t.Errorf("%s became %s", c.code, other.code)
			}
		}
		if back := fromStream(&sparse.RemoteError{Message: message(err)}); !errors.Is(back, c.err) || back.Error() != err.Error() {
			t.Errorf("%s came through a stream as %v", c.code, back)
		}
	}
	if err := error(toWire(fmt.Errorf("full: %w", cow.ErrNoSpace))); codeOf(err) != "no-space" {
		t.Error(err)
	}
	locked := toWire(&cow.LockedError{Dir: "d", Holder: "h"})
	if !errors.Is(locked, cow.ErrBusy) || !errors.Is(locked, errLocked) {
		t.Error(locked.Codes)
	}
}

// codeOf returns the name of an error's kind.
func codeOf(err error) string {
	for _, c := range codes {
		if errors.Is(err, c.err) {
			return c.code
		}
	}
	return ""
}

// TestClientIsAsGoodAsOwner makes the same calls through an Owner and a Client, with the same outcome.
func TestClientIsAsGoodAsOwner(t *testing.T) {
	script := func(s Store) (log []string) {
		ctx := t.Context()
		say := func(what string, err error) {
			log = append(log, fmt.Sprint(what, ": ", err, " ", codeOf(err)))
		}
		_, err := s.CreateVolume(ctx, "w", cow.VolumeOptions{Size: 1 << 20})
		say("create", err)
		_, err = s.CreateVolume(ctx, "w", cow.VolumeOptions{Size: 1 << 20})
		say("create again", err)
		say("snapshot", s.Snapshot(ctx, cow.Ref{Volume: "v", Snapshot: "a"}, cow.Ref{Volume: "w", Snapshot: "a"}))
		say("clone", s.Clone(ctx, cow.Ref{Volume: "v", Snapshot: "a"}, "c"))
		say("clone nothing", s.Clone(ctx, cow.Ref{Volume: "v", Snapshot: "b"}, "d"))
		say("rollback", s.Rollback(ctx, cow.Ref{Volume: "w", Snapshot: "a"}))
		say("rename", s.Rename(ctx, cow.Ref{Volume: "c"}, cow.Ref{Volume: "e"}))
		say("grow", s.Resize(ctx, "e", 128<<20, false))
		say("shrink", s.Resize(ctx, "e", 1<<20, false))
		say("remove", s.Remove(ctx, cow.Ref{Volume: "w"}, false))
		say("remove all", s.Remove(ctx, cow.Ref{Volume: "w"}, true))
		content := bytes.Repeat([]byte("0123456789abcdef"), 100_000)
		_, err = s.Import(ctx, "i", cow.VolumeOptions{}, sparse.FromStream(bytes.NewReader(content)), nil)
		say("import", err)
		_, err = s.Import(ctx, "i", cow.VolumeOptions{}, sparse.FromStream(bytes.NewReader(content)), nil)
		say("import again", err)
		_, err = s.Import(ctx, "j", cow.VolumeOptions{}, sparse.FromStream(io.MultiReader(bytes.NewReader(content), brokenReader{})), nil)
		say("import of what breaks", err)
		_, err = s.Import(ctx, "j", cow.VolumeOptions{Size: 1 << 20}, sparse.FromStream(bytes.NewReader(content)), nil)
		say("import of too much", err)
		var got bytes.Buffer
		err = s.Export(ctx, cow.Ref{Volume: "i"}, func(src sparse.Source) error { return sparse.WriteTo(ctx, &got, src, nil) })
		say("export", err)
		if !bytes.Equal(got.Bytes()[:len(content)], content) {
			t.Error("the content came back otherwise")
		}
		say("export nothing", s.Export(ctx, cow.Ref{Volume: "k"}, func(sparse.Source) error { return nil }))
		say("export that the user ends", s.Export(ctx, cow.Ref{Volume: "i"}, func(sparse.Source) error { return os.ErrPermission }))
		say("detach", s.Detach(ctx, "v", false))
		report, err := s.Check(ctx, cow.CheckOptions{ReadData: true}, func(p cow.Problem) { t.Error(p) })
		say(fmt.Sprint("check ", report.Entries > 0), err) // how many there are depends on checkpoints
		volumes, err := s.Volumes(ctx)
		isOpen := func(v Volume) bool { return v.Open > 0 }
		for end := time.Now().Add(10 * time.Second); slices.ContainsFunc(volumes, isOpen) && time.Now().Before(end); {
			time.Sleep(time.Millisecond) // an owner notices a little later that the client of an export has gone
			volumes, err = s.Volumes(ctx)
		}
		for _, v := range volumes {
			log = append(log, fmt.Sprint(v.Name, v.Size, v.Codec, v.Origin, len(v.Snapshots), v.Open))
		}
		say("volumes", err)
		return log
	}
	local := script(open(t, newStore(t)))
	dir := newStore(t)
	offer(t, dir)
	s := open(t, dir)
	if _, ok := s.(*Client); !ok {
		t.Fatalf("a %T", s)
	}
	remote := script(s)
	if a, b := strings.Join(local, "\n"), strings.Join(remote, "\n"); a != b {
		t.Errorf("local:\n%s\nremote:\n%s", a, b)
	}
}

type brokenReader struct{}

func (brokenReader) Read([]byte) (int, error) { return 0, errors.New("the tape is torn") }

// TestImportEndsWithItsClient cuts a client off during an import: no volume may stay.
func TestImportEndsWithItsClient(t *testing.T) {
	dir := newStore(t)
	owner := offer(t, dir)
	ctx, cancel := context.WithCancel(t.Context())
	r, w := io.Pipe()
	ended := make(chan error, 1)
	s := open(t, dir)
	go func() {
		_, err := s.Import(ctx, "i", cow.VolumeOptions{}, sparse.FromStream(r), nil)
		ended <- err
	}()
	if _, err := w.Write(make([]byte, 3*sparse.Piece)); err != nil {
		t.Fatal(err)
	}
	cancel()
	_ = w.CloseWithError(io.ErrClosedPipe)
	if err := <-ended; !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	for end := time.Now().Add(10 * time.Second); len(owner.store.Volumes()) > 1; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal(owner.store.Volumes())
		}
	}
}

// TestSnapshotForNobody: if the context has ended, nobody waits for the snapshot, and none is taken.
func TestSnapshotForNobody(t *testing.T) {
	dir := newStore(t)
	o := offer(t, dir)
	c := open(t, dir)
	broken := errors.New("broken")
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(broken)
	ref := cow.Ref{Volume: "v", Snapshot: "s"}
	for s, want := range map[Store]bool{o: false, c: true} {
		_, aerr := s.SnapshotAuto(ctx, "v")
		for _, err := range []error{s.Snapshot(ctx, ref), aerr} {
			if !errors.Is(err, broken) || errors.As(err, &UnansweredError{}) != want {
				t.Errorf("%T: %v", s, err)
			}
		}
	}
	if v, err := o.Volume(t.Context(), "v"); err != nil || len(v.Snapshots) > 0 {
		t.Error(v.Snapshots, err)
	}
	if err := c.Snapshot(t.Context(), cow.Ref{Volume: "w", Snapshot: "s"}); !errors.Is(err, cow.ErrNotFound) || errors.As(err, &UnansweredError{}) {
		t.Error(err)
	}
}

// TestOpenWaitsForTheNext opens and closes a store from many goroutines. If they may wait, none is refused.
func TestOpenWaitsForTheNext(t *testing.T) {
	dir := newStore(t)
	var wg sync.WaitGroup
	for i := range 6 {
		wg.Go(func() {
			o := Options{Command: "test", LockTimeout: time.Minute, Offer: i%2 == 0, Temporary: true}
			for j := range 8 {
				s, err := Open(t.Context(), dir, o)
				if err != nil {
					t.Error(i, j, err)
					return
				}
				if err := s.Snapshot(t.Context(), cow.Ref{Volume: "v", Snapshot: fmt.Sprint(i, ".", j)}); err != nil {
					t.Error(i, j, err)
				}
				if err := s.Close(); err != nil {
					t.Error(i, j, err)
				}
			}
		})
	}
	wg.Wait()
	v, err := open(t, dir).Volume(t.Context(), "v")
	if err != nil || len(v.Snapshots) != 48 {
		t.Fatal(len(v.Snapshots), err)
	}
}

func TestOwnerIsTheOnlyOne(t *testing.T) {
	dir := newStore(t)
	offer(t, dir)
	_, err := Own(t.Context(), dir, Options{Command: "second", LockTimeout: 50 * time.Millisecond})
	var locked *cow.LockedError
	if !errors.As(err, &locked) || !strings.Contains(locked.Holder, fmt.Sprint(os.Getpid())) {
		t.Fatal(err)
	}
}

func TestOpenEndsWithItsContext(t *testing.T) {
	dir := newStore(t)
	held, err := Own(t.Context(), dir, quick) // not offered, so that others can only wait
	if err != nil {
		t.Fatal(err)
	}
	defer held.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := Open(ctx, dir, Options{LockTimeout: time.Hour}); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatal(err)
	}
}

// TestIdleOwner: an idle owner ends with its last session, and not before the first.
func TestIdleOwner(t *testing.T) {
	dir := newStore(t)
	o := quick
	o.Offer = true
	owner, err := Own(t.Context(), dir, o)
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- owner.CloseWhenIdle(time.Hour) }()
	a, b := open(t, dir), open(t, dir)
	_ = a.Close()
	if _, err := b.Volumes(t.Context()); err != nil {
		t.Fatal(err)
	}
	select {
	case err := <-ended:
		t.Fatal("it ended under its client", err)
	case <-time.After(50 * time.Millisecond):
	}
	_ = b.Close()
	if err := <-ended; err != nil {
		t.Fatal(err)
	}
	if _, err := os.Lstat(filepath.Join(dir, controlName)); !errors.Is(err, os.ErrNotExist) {
		t.Error(err)
	}
	if owner, err = Own(t.Context(), dir, o); err != nil {
		t.Fatal(err)
	}
	if err := owner.CloseWhenIdle(10 * time.Millisecond); err != nil {
		t.Fatal(err)
	}
}

func TestTemporaryOwner(t *testing.T) {
	dir := newStore(t)
	o := quick
	o.Offer, o.Temporary = true, true
	owner, err := Own(t.Context(), dir, o)
	if err != nil {
		t.Fatal(err)
	}
	s := open(t, dir)
	if _, err := s.Attach(t.Context(), AttachOptions{Ref: cow.Ref{Volume: "v"}}); !errors.Is(err, cow.ErrBusy) {
		t.Error(err)
	}
	l, _, err := Listen(filepath.Join(t.TempDir(), "s"))
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Serve(t.Context(), l, ServeOptions{}); !errors.Is(err, cow.ErrBusy) {
		t.Error(err)
	}
	closed := make(chan error, 1)
	go func() { closed <- owner.Close() }()
	select {
	case err := <-closed:
		t.Fatal("it did not wait for its client", err)
	case <-time.After(20 * time.Millisecond):
	}
	if _, err := s.Volumes(t.Context()); err != nil {
		t.Error(err)
	}
	_ = s.Close()
	if err := <-closed; err != nil {
		t.Fatal(err)
	}
}

func TestSockets(t *testing.T) {
	dir := t.TempDir()
	if _, _, err := Listen(filepath.Join(dir, strings.Repeat("long", 30))); err == nil || !strings.Contains(err.Error(), "too long") {
		t.Fatal(err)
	}
	path := filepath.Join(dir, strings.Repeat("long", 30), "s")
	if err := os.Mkdir(filepath.Dir(path), 0o700); err != nil {
		t.Fatal(err)
	}
	l, remove, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	fi, err := os.Lstat(path)
	if err != nil || fi.Mode().Perm() != 0o600 {
		t.Fatal(fi.Mode(), err)
	}
	if _, _, err := Listen(path); !errors.Is(err, os.ErrExist) {
		t.Fatal(err)
	}
	c, err := dialPath(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	_ = c.Close()
	_ = l.Close() // which leaves the file, as a killed process does
	if _, err := dialPath(t.Context(), path); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Fatal(err)
	}
	l, removeSecond, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	remove() // of the first, which must leave the second's
	if c, err = dialPath(t.Context(), path); err != nil {
		t.Fatal(err)
	}
	_ = c.Close()
	_ = l.Close()
	removeSecond()
	if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, _, err := Listen(file); !errors.Is(err, os.ErrExist) {
		t.Fatal(err)
	}
	if _, _, err := Listen(filepath.Join(dir, "no", "folder")); !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
}

// TestPassedSocket lets an owner serve a socket that a client made. The service ends with the client or the last
// connection.
func TestPassedSocket(t *testing.T) {
	dir := newStore(t)
	owner := offer(t, dir)
	s := open(t, dir)
	path := filepath.Join(t.TempDir(), "s")
	serve := func(ctx context.Context, o ServeOptions) chan error {
		l, remove, err := Listen(path)
		if err != nil {
			t.Fatal(err)
		}
		ended := make(chan error, 1)
		go func() {
			err := s.Serve(ctx, l, o)
			remove()
			ended <- err
		}()
		return ended
	}
	greet := func() net.Conn {
		c, err := dialPath(t.Context(), path)
		if err != nil {
			t.Fatal(err)
		}
		hello := make([]byte, 8)
		if _, err := io.ReadFull(c, hello); err != nil || string(hello) != "NBDMAGIC" {
			t.Fatalf("%q %v", hello, err)
		}
		return c
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := serve(ctx, ServeOptions{Socket: path})
	c := greet()
	if st, err := s.Status(t.Context()); err != nil || len(st.Services) != 1 || st.Services[0].Clients != 1 {
		t.Error(st, err)
	}
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
	_ = c.Close()
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		st, err := owner.Status(t.Context())
		if err != nil || time.Now().After(end) {
			t.Fatal(st, err)
		}
		if len(st.Services) == 0 {
			break
		}
	}
	if ended = serve(t.Context(), ServeOptions{Exports: []cow.Ref{{Volume: "nope"}}}); !errors.Is(<-ended, cow.ErrNotFound) {
		t.Error("it serves what is not there")
	}
	ended = serve(t.Context(), ServeOptions{Once: true})
	_ = greet().Close()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

// TestInlineRequestsDoNotAllocate: requests that the queue's thread answers itself allocate nothing.
func TestInlineRequestsDoNotAllocate(t *testing.T) {
	owner := offer(t, newStore(t))
	dev, err := owner.store.OpenDevice(cow.Ref{Volume: "v"}, false)
	if err != nil {
		t.Fatal(err)
	}
	defer dev.Close()
	target := newTarget(dev, new(meter), 1, nil)
	defer target.close()
	write := &ublk.Request{Op: ublk.OpWrite, Buf: bytes.Repeat([]byte("some text "), 410)[:4096], Length: 4096}
	read := &ublk.Request{Op: ublk.OpRead, Buf: make([]byte, 4096), Length: 4096}
	allocs := testing.AllocsPerRun(200, func() {
		write.Offset = (write.Offset + 4096) % (1 << 20)
		read.Offset = write.Offset
		if err := errors.Join(target.ServeUBLK(write), target.ServeUBLK(read)); err != nil {
			t.Fatal(err)
		}
	})
	if !bytes.Equal(read.Buf, write.Buf) {
		t.Error("it reads otherwise than it wrote")
	}
	if allocs > 0 && !raceEnabled {
		t.Errorf("%v allocations", allocs)
	}
}

// TestFailedRequestsAreLogged: the disk's user gets an errno. The reason is logged, at most once a second.
func TestFailedRequestsAreLogged(t *testing.T) {
	w := newFakeMachine(t)
	var text bytes.Buffer
	opts := w.options(true)
	opts.Logger = slog.New(slog.NewTextHandler(&text, nil))
	o, err := Own(t.Context(), w.dir, opts)
	if err != nil {
		t.Fatal(err)
	}
	w.attach(o, "v")
	disk := w.d.devices[0].server.h.(*target)
	beyond := &ublk.Request{Op: ublk.OpWrite, Buf: make([]byte, 4096), Length: 4096, Offset: 1 << 40}
	for _, fail := range []struct {
		says string
		do   func() error
	}{
		{"write of 4096 bytes at 1099511627776: ", func() error { return disk.ServeUBLK(beyond) }},
		{"read of 4096 bytes at 1099511627776: ", func() error {
			return disk.ServeUBLK(&ublk.Request{Op: ublk.OpRead, Buf: beyond.Buf, Length: 4096, Offset: beyond.Offset})
		}},
		{"owner.(*target).work", func() error { // a worker that panics
			r := &ublk.Request{Op: ublk.OpRead, Data: "no plan"}
			return disk.reportFailure(r, disk.work(r))
		}},
	} {
		text.Reset()
		disk.lastReport.Store(0)
		for range 5 {
			if err := fail.do(); err == nil {
				t.Fatalf("%q succeeds", fail.says)
			}
		}
		if n := strings.Count(text.String(), "level=ERROR"); n < 1 || n > 2 || !strings.Contains(text.String(), fail.says) ||
			!strings.Contains(text.String(), "what=v ") {
			t.Errorf("%d lines, want one with %q:\n%s", n, fail.says, text.String())
		}
	}
	text.Reset()
	if err := disk.ServeUBLK(&ublk.Request{Op: ublk.OpWrite, Buf: make([]byte, 4096), Length: 4096}); err != nil || text.Len() > 0 {
		t.Errorf("%v, %s", err, text.String())
	}
	w.close(o)
}

// TestPacedWritesAreNotInline: while writes wait for the cleaner, the queue's thread still serves reads.
func TestPacedWritesAreNotInline(t *testing.T) {
	const size = 128 << 20
	dir := filepath.Join(t.TempDir(), "paced")
	if err := cow.Create(dir); err != nil {
		t.Fatal(err)
	}
	s, err := cow.Open(dir, cow.Options{MaxBytes: size * 10 / 7, CacheBytes: 16 << 20})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if _, err := s.CreateVolume("v", cow.VolumeOptions{Size: size, Codec: format.Raw}); err != nil {
		t.Fatal(err)
	}
	dev, err := s.OpenDevice(cow.Ref{Volume: "v"}, false)
	if err != nil {
		t.Fatal(err)
	}
	defer dev.Close()
	target := &target{dev: dev, jobs: make(chan *ublk.Request, 1)} // nobody works
	rng, inline := rand.New(rand.NewPCG(1, 2)), 0
	for end := time.Now().Add(time.Minute); ; inline++ {
		r := &ublk.Request{Op: ublk.OpWrite, Buf: bytes.Repeat([]byte{1}, 4096), Length: 4096, Offset: rng.Int64N(size/4096) * 4096}
		if err := target.ServeUBLK(r); errors.Is(err, ublk.ErrAsync) {
			break
		} else if err != nil || time.Now().After(end) {
			t.Fatalf("%d writes inline, then %v", inline, err)
		}
	}
	if inline < 1000 {
		t.Errorf("only %d writes were inline", inline)
	}
}
