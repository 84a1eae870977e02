package cow

import (
	"context"
	"log/slog"
)

// Notice is something that has happened to the store, and that nobody has asked for.
type Notice struct {
	Kind NoticeKind
	// Where is the place of the damage, and Lost what is known to lose by it.
	Where string
	Lost  []Lost
	// Err is what is wrong.
	Err error
}

// NoticeKind is the kind of a notice.
type NoticeKind string

const (
	// NoticeDamage means that data is damaged and cannot be read. Each place has a notice of its own, but of very many at
	// once only some have one.
	NoticeDamage NoticeKind = "damage"
	// NoticeFailed means that the store has failed: it can only be read until it is opened again (ErrFailed).
	NoticeFailed NoticeKind = "failed"
)

// failureRoutine says that the store has failed, when it has.
func (s *Store) failureRoutine() {
	select {
	case <-s.quit:
		return
	case <-s.wal.Failed():
	}
	err := s.wal.Err()
	level := slog.LevelError
	if s.opts.Brief { // the command says so itself
		level = slog.LevelInfo
	}
	s.log.Log(context.Background(), level, "the store has failed: it can only be read until it is opened again", "err", err)
	s.opts.Notice(Notice{Kind: NoticeFailed, Err: err})
}
