package cow

import (
	"context"
	"errors"
	"io"
	"time"

	"github.com/vdisk/vdisk/cow/internal/audit"
	"github.com/vdisk/vdisk/format"
	"github.com/vdisk/vdisk/internal/storage"
)

const (
	// scrubBusy is how many bytes in a second a scrub reads at most while others work, or the cleaner has to. It goes on
	// at that rate, as it would never end on a store that is always in use.
	scrubBusy = 1 << 20
	// scrubOthers is how many reads and 4 KiB writes of others in a second count as work.
	scrubOthers = coldOthers
	// scrubStep is how many bytes are read between two rests.
	scrubStep = 256 << 10
	// scrubLook is how often it is looked whether a scrub is due.
	scrubLook = time.Minute
)

// scrubWorker works on a scrub. Only its own goroutine uses it.
type scrubWorker struct {
	s      *Store
	pass   *audit.Pass // nil: none is under way
	disk   diskReader
	report audit.CheckReport // of pass, at the last step
	told   int               // problems of pass that were logged, or were too many
	saved  time.Time

	looked   time.Time // when activity was taken
	activity uint64
	busy     bool
}

// scrubRoutine works on scrubs until the store closes (quit).
func (s *Store) scrubRoutine() {
	w := &scrubWorker{s: s, saved: time.Now(), looked: time.Now(), activity: s.activity()}
	w.disk.buf = storage.DiskBuffer(diskWindow)
	tick := time.NewTicker(scrubLook)
	defer tick.Stop()
	for {
		if w.active() && s.interrupted(context.Background()) == nil {
			w.work()
			continue
		}
		if w.pass != nil {
			s.saveScrub()
			w.pass = nil
		}
		select {
		case <-s.quit:
			return
		case <-s.scrub.work:
		case now := <-tick.C:
			if s.scrubDue(now) {
				if err := s.StartScrub(ScrubOptions{}); err != nil {
					s.log.Warn("a scrub that is due cannot begin", "err", err)
				}
			}
		}
	}
}

// resumeScrub goes on with what the last owner did not end.
func (s *Store) resumeScrub() {
	c := &s.scrub
	c.mu.Lock()
	defer c.mu.Unlock()
	c.state.Active = c.state.Now != nil && !c.state.Paused
}

func (s *Store) scrubDue(now time.Time) bool {
	s.scrub.mu.Lock()
	defer s.scrub.mu.Unlock()
	next := s.nextScrub()
	return !next.IsZero() && !now.Before(next)
}

func (w *scrubWorker) active() bool {
	w.s.scrub.mu.Lock()
	defer w.s.scrub.mu.Unlock()
	return w.s.scrub.state.Active
}

// work does a step, and rests.
func (w *scrubWorker) work() {
	c, start := &w.s.scrub, time.Now()
	if w.pass == nil {
		w.pass, w.report = audit.NewPass(scrubbedStore{checkedStore{w.s, context.Background()}, &w.disk}, w.problem), audit.CheckReport{}
		w.told = 0
	}
	c.mu.Lock()
	run, from, rate := c.state.Now, c.state.at(), c.state.Rate
	c.mu.Unlock()
	if run == nil {
		return
	}
	next, more, err := w.pass.Step(from, scrubStep)
	w.disk.forget()
	read := w.pass.Report().DataBytes - w.report.DataBytes
	if w.s.interrupted(context.Background()) != nil {
		return // what was not read counts as given up meanwhile, so the step is done again
	}
	if err != nil {
		w.s.log.Error("the scrub has ended early; it goes on when it is started again", "err", err)
		w.note(run, func() {
			c.state.Paused, c.state.Active, c.err = true, false, err
			c.notify()
		})
		return
	}
	if w.note(run, func() {
		c.state.goOnAt(next)
		if !more {
			run.Ended = time.Now().UTC().Truncate(time.Second)
			c.state.Last, c.state.Now, c.state.Active = run, nil, false
			c.notify()
		}
	}) && !more {
		w.s.log.Info("a scrub has ended", "bytes", run.Bytes, "damaged", run.Damaged, "unreadable", run.Unreadable)
		return
	}
	if time.Since(w.saved) >= scrubSaves {
		w.s.saveScrub()
		w.saved = time.Now()
	}
	w.rest(w.pause(read, rate, time.Since(start)))
}

// note adds what the pass has done since the last call to the run, and calls also, unless another run has begun, or the
// run was given up. It reports whether it did.
func (w *scrubWorker) note(run *ScrubRun, also func()) bool {
	c, r := &w.s.scrub, w.pass.Report()
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.state.Now != run { // its progress is not this pass's
		w.report = r
		return false
	}
	run.Leaves += r.Versions - w.report.Versions
	run.Bytes += r.DataBytes - w.report.DataBytes
	run.Damaged += r.Corrupt - w.report.Corrupt
	run.Unreadable += r.Unreadable - w.report.Unreadable
	w.report = r
	also()
	return true
}

// pause returns how long to rest after a step that has read n bytes and has taken some time. A scrub takes at most half
// of one core, or of a disk.
func (w *scrubWorker) pause(n, rate int64, took time.Duration) time.Duration {
	if since := time.Since(w.looked); since >= 200*time.Millisecond {
		now := w.s.activity()
		w.busy = float64(now-w.activity) > scrubOthers*since.Seconds() || w.s.urgency() != idle
		w.looked, w.activity = time.Now(), now
	}
	switch {
	case rate < 0:
		return 0
	case rate == 0 && w.busy:
		rate = scrubBusy
	case rate == 0:
		rate = scrubRate
	}
	return max(took, time.Duration(float64(n)/float64(rate)*float64(time.Second))-took)
}

// rest waits, but not for longer than the scrub is to go on.
func (w *scrubWorker) rest(d time.Duration) {
	if d <= 0 {
		return
	}
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-w.s.quit:
	case <-w.s.scrub.work:
	case <-timer.C:
	}
}

// problem notes what is damaged like a read that meets it: see docs/engine.md, Known damage.
func (w *scrubWorker) problem(p audit.Problem) {
	w.s.metProblem(p)
	if w.told++; w.told <= damageLines {
		w.s.log.Error("the scrub has found damage; 'vdisk check --read-data' lists it", "kind", p.Kind, "where", p.Where, "what", p.What)
	}
}

// scrubbedStore is the store as a scrub sees it: it reads from the disk.
type scrubbedStore struct {
	checkedStore
	disk *diskReader
}

// Hold returns no chunk once the store closes: the scrub then ends soon, and does not take the step for done.
func (s scrubbedStore) Hold(row format.Chunk) audit.Chunk {
	if s.Interrupted() != nil {
		return nil
	}
	if c, ok := s.hold(row); ok {
		return scrubbedChunk{c, s.disk}
	}
	return nil
}

type scrubbedChunk struct {
	heldChunk
	disk *diskReader
}

func (c scrubbedChunk) ReadFull(p []byte, off int64) (int, error) {
	f, err := c.ch.Handle()
	if err != nil {
		return 0, err
	}
	return c.disk.read(c.ch, f, p, off)
}

// diskWindow is the most that a scrub reads at once. It is larger than any record.
const diskWindow = 1 << 20

// diskReader reads records around the page cache. While they lie one behind the other, it reads ahead, more and more.
type diskReader struct {
	buf  []byte
	c    *chunk // that was read last
	at   int64  // offset of the window in it
	n    int    // bytes in the window
	end  int64  // where the last record ended
	next int    // bytes to read at once
}

// forget empties the window: what was read long ago says nothing of the disk.
func (r *diskReader) forget() { r.n = 0 }

// read is ReadFull of the chunk's file.
func (r *diskReader) read(c *chunk, f storage.File, p []byte, off int64) (int, error) {
	follows := r.c == c && off == r.end
	if r.c != c || off < r.at || off+int64(len(p)) > r.at+int64(r.n) {
		from := off &^ (storage.DiskAlign - 1)
		need := (int(off-from) + len(p) + storage.DiskAlign - 1) &^ (storage.DiskAlign - 1)
		if r.next = min(2*r.next, diskWindow); !follows {
			r.next = 0
		}
		r.next = max(r.next, need)
		r.c, r.at, r.n = c, from, 0
		n, err := f.ReadDisk(r.buf[:r.next], from)
		if n < int(off-from)+len(p) && err != nil && r.next > need { // the damaged place may lie behind
			n, err = f.ReadDisk(r.buf[:need], from)
		}
		if r.n = n; n < int(off-from)+len(p) && !errors.Is(err, io.EOF) {
			return 0, err
		}
	}
	r.end = off + int64(len(p))
	return copy(p, r.buf[min(int(off-r.at), r.n):r.n]), nil
}
