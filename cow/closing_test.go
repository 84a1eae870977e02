package cow

import (
	"errors"
	"sync"
	"testing"
	"time"

	"github.com/vdisk/vdisk/format"
)

// An event waits for a chunk while the store closes.
func TestEventDuringClose(t *testing.T) {
	lost, hung := 0, 0
	for range 10 {
		dir := setup(t, 64<<20, format.Raw)
		fs := newHook(t, dir)
		entered, gate := make(chan struct{}), make(chan struct{})
		var once sync.Once
		fs.onCreate = func(string) error { once.Do(func() { close(entered); <-gate }); return nil }
		s := open(t, dir, Options{FS: fs, CheckpointInterval: -1})
		snapped, closed := make(chan error, 1), make(chan error, 1)
		go func() { snapped <- s.Snapshot(Ref{"v", "a"}) }()
		<-entered
		go func() { closed <- s.Close() }()
		time.Sleep(20 * time.Millisecond)
		close(gate)
		var serr error
		select {
		case serr = <-snapped:
		case <-time.After(2 * time.Second):
			hung++
			continue
		}
		cerr := <-closed
		s2 := open(t, dir, Options{CheckpointInterval: -1})
		v, err := s2.Volume("v")
		must(t, err)
		if serr == nil && len(v.Snapshots) == 0 {
			lost++
		}
		if serr != nil && !errors.Is(serr, ErrClosed) || cerr != nil {
			t.Logf("snapshot: %v; close: %v; there afterwards: %d", serr, cerr, len(v.Snapshots))
		}
		must(t, s2.Close())
	}
	if lost+hung > 0 {
		t.Errorf("of 10 snapshots during Close %d were said to be durable and are lost, %d hang", lost, hung)
	}
}
