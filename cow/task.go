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

// interrupted returns the cause if ctx has ended, and ErrClosed if the store is closing, so that a long operation stops.
func (s *Store) interrupted(ctx context.Context) error {
	select {
	case <-s.quit:
		return ErrClosed
	default:
		return context.Cause(ctx)
	}
}
