package cow

import "context"

// beginTask registers a long task, such as a check, so that Close waits for it. After Close it returns ErrClosed.
func (s *Store) beginTask() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return ErrClosed
	}
	s.tasks.Add(1)
	return nil
}

// interrupted returns an error if ctx has ended or the store is closing, so that a long operation stops.
func (s *Store) interrupted(ctx context.Context) error {
	select {
	case <-s.quit:
		return ErrClosed
	default:
		return ctx.Err()
	}
}
