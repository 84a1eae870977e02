package cow

import (
	"errors"
	"fmt"

	"github.com/vdisk/vdisk/cow/internal/wal"
	"github.com/vdisk/vdisk/format"
)

// transact makes one event happen. It calls build under mu. build checks everything, and returns the event, which lists
// the rows that change. The event gets its place in the log, the catalog changes, and transact returns when the event
// is durable. If build returns a nil event, nothing changes. transact may call build more than once.
func (s *Store) transact(build func() (*format.Event, error)) error {
	if err := s.record(build); err != nil {
		return err
	}
	return s.wal.Sync()
}

// record is transact, but does not wait until the event is durable.
func (s *Store) record(build func() (*format.Event, error)) error {
	cleared, refused := false, 0
	for {
		s.mu.Lock()
		p, err := s.transactLocked(build)
		s.mu.Unlock()
		switch {
		case err == nil:
			return nil
		case errors.Is(err, errFull):
			err = s.makeRoom(p)
		case errors.Is(err, errNoNew):
			more, merr := s.moreForNew(refused)
			if refused++; more && merr == nil {
				err = nil
			}
		case errors.Is(err, ErrNoSpace) && p == wal.ForEvents && !cleared:
			cleared = true
			if s.clearEvents() == nil {
				err = nil
			}
		}
		if err != nil {
			return err
		}
	}
}

// transactLocked is transact without the sync. It returns errFull if the table has no room for the event, whose purpose
// is p. The caller holds mu.
func (s *Store) transactLocked(build func() (*format.Event, error)) (p wal.Purpose, err error) {
	// build runs before room is made, so that a refused event costs nothing, and is refused even where there is no
	// room.
	for room := 0; ; {
		if room > 0 {
			if err := s.wal.Reserve(room, p); err != nil {
				return p, err
			}
		}
		if err := s.usable(); err != nil { // checked after reserve, which may have waited
			return p, err
		}
		ids := s.catalog.nextID
		ev, err := build()
		if err == nil {
			err = s.catalog.enoughIDs()
		}
		if err != nil || ev == nil {
			s.catalog.nextID = ids // the IDs are not used
			return p, err
		}
		if p = purposeOf(ev); p == wal.ForData {
			err = s.roomForNames()
			if err == nil && s.tableShort(1, p) > 0 {
				err = errFull
			}
			if err != nil {
				s.catalog.nextID = ids
				return p, err
			}
		}
		payload, err := format.AppendEvent(nil, ev)
		if err != nil {
			return p, err
		}
		h := format.RecordHeader{Kind: format.KindEvent, Blocks: 1, PayloadLen: len(payload), PayloadCRC: format.Checksum(payload)}
		switch {
		case h.Size() > wal.MaxEvent:
			return p, fmt.Errorf("%s: too many at once (%d bytes of changes); remove or name fewer first: %w", ev.Op, len(payload), ErrInvalid)
		case h.Size() > room:
			room, s.catalog.nextID = h.Size(), ids
			continue // reserve may have to wait, and what build saw may change meanwhile
		}
		s.wal.Append(&h, payload)
		s.changes.catalog = true
		if p == wal.ForEvents {
			s.cleaner.exhausted = false // the data of a name that is gone can be reclaimed
		}
		return p, s.catalog.apply(ev, s.changes.gen)
	}
}
