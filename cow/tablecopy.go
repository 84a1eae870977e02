package cow

import "time"

// The second copy of the table: docs/format.md, The copy of the table. Package metadata keeps it with each commit. Here
// is the goroutine that makes a new one, when there is none or its changes take too much.

const (
	copyEvery = 10 * time.Second // how often to look whether a new base is due
	copyRetry = 10 * time.Minute // the longest time from a failure to the next try
)

// wrongItem is metadata.Options.WrongItem. Tests set it.
var wrongItem func(error)

// copyRoutine makes new bases of the copy, until quit is closed.
func (s *Store) copyRoutine() {
	wait := copyEvery
	timer := time.NewTimer(wait)
	defer timer.Stop()
	for {
		select {
		case <-s.quit:
			return
		case <-timer.C:
		}
		// A full disk is left to those who need it. The store works without a copy.
		if n, due := s.meta.CopyDue(); due && !s.lowDiskWith(n) {
			if err := s.renewCopy(); err != nil {
				wait = min(2*wait, copyRetry)
			} else {
				wait = copyEvery
			}
		}
		timer.Reset(wait)
	}
}

// renewCopy makes a new base of the copy.
func (s *Store) renewCopy() error {
	s.copying.Lock()
	defer s.copying.Unlock()
	begun := time.Now()
	err := s.meta.RenewCopy(func() bool {
		select {
		case <-s.quit:
			return true
		default:
			return false
		}
	})
	if err == nil {
		s.log.Debug("made a new copy of the table", "bytes", s.meta.CopyState().Bytes, "took", time.Since(begun).Round(time.Millisecond))
	}
	return err
}

// copyLost is called when the copy is given up, or cannot be made.
func (s *Store) copyLost(err error) {
	s.log.Warn("a damaged table could not be made anew; a new copy of it is made as soon as possible", "err", err)
}
