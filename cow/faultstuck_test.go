package cow

import (
	"context"
	"errors"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/vdisk/vdisk/format"
)

// stuckDisk is a store whose disk does not answer one call until it is released.
type stuckDisk struct {
	s       *Store
	d, ro   *Device
	arm     sync.Mutex // guards what
	what    string     // the call that gets stuck; "": none
	entered chan struct{}
	gate    chan struct{}
}

// meet stops here if what is the call that gets stuck.
func (k *stuckDisk) meet(what string) {
	k.arm.Lock()
	hit := k.what == what
	if hit {
		k.what = ""
	}
	k.arm.Unlock()
	if hit {
		close(k.entered)
		<-k.gate
	}
}

func (k *stuckDisk) next(what string) {
	k.arm.Lock()
	defer k.arm.Unlock()
	k.what = what
}

func newStuckDisk(t *testing.T) *stuckDisk {
	k := &stuckDisk{entered: make(chan struct{}), gate: make(chan struct{})}
	dir := setup(t, 64<<20, format.Raw)
	fs := newHook(t, dir)
	fs.onCreate = func(string) error { k.meet("create"); return nil }
	fs.onWrite = func(string, int) { k.meet("write") }
	fs.onSync = func(string) { k.meet("sync") }
	fs.onRead = func(string) error { k.meet("read"); return nil }
	k.s = open(t, dir, Options{fs: fs, checkpointInterval: -1, chunkBytes: 4 << 20, onCommit: func(done bool) error {
		if !done {
			k.meet("commit")
		}
		return nil
	}})
	var err error
	k.d, err = k.s.OpenDevice(Ref{Volume: "v"}, false)
	must(t, err)
	for i := range int64(3) {
		_, err := k.d.WriteAt(randomBytes(1<<20, uint64(i)), i<<20)
		must(t, err)
	}
	must(t, k.s.Snapshot(Ref{"v", "a"}))
	k.ro, err = k.s.OpenDevice(Ref{"v", "a"}, true)
	must(t, err)
	k.s.wal.WaitIdle()
	return k
}

// TestFaultStuckCall lets one call of the disk wait until the test is done with it. Meanwhile readers of other data must
// go on, and operations that are cancelled must end, unless they need a checkpoint, and that needs the call. Afterwards
// everything must end well, and Close as well.
func TestFaultStuckCall(t *testing.T) {
	for what, start := range map[string]func(k *stuckDisk) error{
		"write":  func(k *stuckDisk) error { return k.d.Flush() },
		"sync":   func(k *stuckDisk) error { return k.d.Flush() },
		"commit": func(k *stuckDisk) error { return k.s.Checkpoint() },
		"read":   func(k *stuckDisk) error { _, err := k.ro.ReadAt(make([]byte, 4096), 2<<20); return err },
		"create": func(k *stuckDisk) error {
			for i := range int64(6) { // more than the chunk has left
				if _, err := k.d.WriteAt(randomBytes(1<<20, uint64(i+9)), (i+8)<<20); err != nil {
					return err
				}
			}
			return nil
		},
	} {
		t.Run(what, func(t *testing.T) {
			t.Parallel()
			k := newStuckDisk(t)
			if what == "write" || what == "sync" {
				_, err := k.d.WriteAt(randomBytes(4096, 7), 0)
				must(t, err)
			}
			k.next(what)
			started := make(chan error, 1)
			go func() { started <- start(k) }()
			<-k.entered
			ended := k.meanwhile(t, what)
			if what == "read" || what == "create" { // the others hold up checkpoints, with which the operations begin
				ended()
			}
			close(k.gate)
			ended()
			must(t, within(t, "the call that got stuck", func() error { return <-started }))
			must(t, errors.Join(k.d.Close(), k.ro.Close()))
			must(t, within(t, "close", k.s.Close))
		})
	}
}

// meanwhile reads, and begins operations and cancels them. ended waits for their end.
func (k *stuckDisk) meanwhile(t *testing.T, what string) (ended func()) {
	p := make([]byte, 64<<10)
	for _, d := range []*Device{k.d, k.ro} {
		must(t, within(t, "a read beside a stuck "+what, func() error { _, err := d.ReadAt(p, 1<<20); return err }))
		if want := randomBytes(1<<20, 1)[:len(p)]; !slices.Equal(p, want) {
			t.Errorf("beside a stuck %s, a read finds something else", what)
		}
	}
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	for name, call := range map[string]func() error{
		"check": func() error { _, err := k.s.Check(ctx, CheckOptions{ReadData: true}, func(Problem) {}); return err },
		"usage": func() error { _, err := k.s.Usage(ctx); return err },
		"clean": func() error { _, err := k.s.Clean(ctx, 0.1); return err },
		"cold":  func() error { _, err := k.s.Cold(ctx); return err },
		"scrub": func() error { _, err := k.s.Scrub(ctx, ScrubOptions{}); return err },
	} {
		wg.Go(func() {
			if err := call(); err != nil && !errors.Is(err, context.Canceled) {
				t.Errorf("%s beside a stuck %s: %v", name, what, err)
			}
		})
	}
	time.Sleep(20 * time.Millisecond)
	cancel()
	return func() { within(t, "what was cancelled beside a stuck "+what, func() error { wg.Wait(); return nil }) }
}
