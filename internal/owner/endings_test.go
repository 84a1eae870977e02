package owner

import (
	"bytes"
	"context"
	"errors"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/vdisk/vdisk/cow"
	"github.com/vdisk/vdisk/internal/storage"
	"github.com/vdisk/vdisk/ublk"
)

// brittleFS is the store's folder, on a disk that can be made to fail, or not to answer.
type brittleFS struct {
	storage.FS
	broken atomic.Bool
	stuck  atomic.Pointer[chan struct{}] // until it is closed, nothing is synced
}

type brittleFile struct {
	storage.File
	fs *brittleFS
}

func (f *brittleFS) file(file storage.File, err error) (storage.File, error) {
	if err != nil {
		return nil, err
	}
	return &brittleFile{file, f}, nil
}

func (f *brittleFS) Create(name string, size int64) (storage.File, error) {
	return f.file(f.FS.Create(name, size))
}

func (f *brittleFS) Open(name string) (storage.File, error) { return f.file(f.FS.Open(name)) }

func (f *brittleFile) Sync() error {
	if stuck := f.fs.stuck.Load(); stuck != nil {
		<-*stuck
	}
	if f.fs.broken.Load() {
		return syscall.EIO
	}
	return f.File.Sync()
}

// brittle owns a store whose disk can be made to fail.
func brittle(t *testing.T, ctx context.Context) (*fakeMachine, *Owner, *brittleFS) {
	t.Helper()
	w := newFakeMachine(t)
	dir, err := storage.OpenDir(w.dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = dir.Close() })
	fs := &brittleFS{FS: dir}
	opts := w.options(true)
	opts.fs, opts.Replaceable, opts.program = fs, true, program(t, `echo '{"version":"2.0","store_format":99,"handover":1}'`)
	o, err := Own(ctx, w.dir, opts)
	if err != nil {
		t.Fatal(err)
	}
	return w, o, fs
}

// TestLastFlushFails: unflushed writes cannot be made durable. Detach then leaves the disk. With force, and at every
// other end of the disk, the error reports it.
func TestLastFlushFails(t *testing.T) {
	notDurable := func(t *testing.T, err error) {
		t.Helper()
		if !errors.Is(err, cow.ErrFailed) || !strings.Contains(err.Error(), "it is not known whether the unflushed writes") {
			t.Errorf("want that the durability of the unflushed writes is not known, got: %v", err)
		}
	}
	for name, end := range map[string]func(t *testing.T, w *fakeMachine, o *Owner, stop context.CancelFunc){
		"detach": func(t *testing.T, w *fakeMachine, o *Owner, _ context.CancelFunc) {
			err := o.Detach(t.Context(), "v", false)
			notDurable(t, err)
			if w.d.count() != 1 || !strings.Contains(err.Error(), "detach --force") {
				t.Errorf("%d devices are left, %v", w.d.count(), err)
			}
			notDurable(t, o.Detach(t.Context(), "v", true))
		},
		"close": func(t *testing.T, _ *fakeMachine, o *Owner, stop context.CancelFunc) {
			stop()
			notDurable(t, o.CloseWhenDone())
		},
		"outside": func(t *testing.T, w *fakeMachine, o *Owner, _ context.CancelFunc) {
			_, _, ends := o.servedUntil()
			if err := w.d.devices[0].server.Stop(t.Context()); err != nil {
				t.Fatal(err)
			}
			<-ends[0].done
			notDurable(t, o.CloseWhenIdle(0))
		},
		"upgrade": func(t *testing.T, w *fakeMachine, o *Owner, _ context.CancelFunc) {
			_, err := o.Upgrade(t.Context())
			notDurable(t, err)
			if o.Successor() != nil || w.d.count() != 1 || w.d.devices[0].info.State != ublk.KernelLive {
				t.Errorf("successor %v, devices %v", o.Successor(), w.d.devices)
			}
			notDurable(t, o.Detach(t.Context(), "v", true))
		},
	} {
		t.Run(name, func(t *testing.T) {
			ctx, stop := context.WithCancel(t.Context())
			defer stop()
			w, o, fs := brittle(t, ctx)
			w.attach(o, "v")
			write(t, w.d.devices[0].server, "data")
			fs.broken.Store(true)
			end(t, w, o, stop)
			if w.d.count() != 0 {
				t.Errorf("%d devices are left", w.d.count())
			}
			if err := o.Close(); err == nil {
				t.Error("the store closes as if nothing had happened")
			}
		})
	}
}

// TestLastClientCannotFlush: if the last client of an export is gone before its writes turn out not to be durable, the
// service returns the error.
func TestLastClientCannotFlush(t *testing.T) {
	_, o, fs := brittle(t, t.Context())
	x := &catalog{exports: o.exports}
	e, err := x.Open("v")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := e.Device.WriteAt(bytes.Repeat([]byte("x"), 4096), 0); err != nil {
		t.Fatal(err)
	}
	fs.broken.Store(true)
	for _, err := range []error{e.Close(), x.outcome()} {
		if !errors.Is(err, cow.ErrFailed) {
			t.Error(err)
		}
	}
	if err := o.Close(); err == nil {
		t.Error("the store closes as if nothing had happened")
	}
}

// TestAttachAtOnce: if several commands attach the same snapshot or volume at once, exactly one succeeds, as when they
// run one after the other.
func TestAttachAtOnce(t *testing.T) {
	w := newFakeMachine(t)
	o := w.own(true)
	if err := o.Snapshot(t.Context(), cow.Ref{Volume: "v", Snapshot: "s"}); err != nil {
		t.Fatal(err)
	}
	for _, a := range []AttachOptions{
		{Ref: cow.Ref{Volume: "v", Snapshot: "s"}},
		{Ref: cow.Ref{Volume: "v"}, ReadOnly: true},
		{Ref: cow.Ref{Volume: "v"}},
	} {
		before := w.d.count()
		var attached, busy atomic.Int32
		var wg sync.WaitGroup
		for range 8 {
			wg.Go(func() {
				switch _, err := o.Attach(t.Context(), a); {
				case err == nil:
					attached.Add(1)
				case errors.Is(err, cow.ErrBusy):
					busy.Add(1)
				default:
					t.Error(err)
				}
			})
		}
		wg.Wait()
		if attached.Load() != 1 || busy.Load() != 7 || w.d.count() != before+1 {
			t.Errorf("%+v: %d attached, %d busy, %d devices", a, attached.Load(), busy.Load(), w.d.count())
		}
		if _, err := o.Attach(t.Context(), a); !errors.Is(err, cow.ErrBusy) {
			t.Errorf("one after the other: %v", err)
		}
		if err := o.Detach(t.Context(), a.Ref.String(), false); err != nil {
			t.Error(err)
		}
	}
	w.close(o)
}
