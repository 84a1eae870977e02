package wal

import (
	"log/slog"
	"syscall"
	"testing"
)

// A disk that does not take the mark once takes it again later.
func TestMarkIsTriedAgain(t *testing.T) {
	fs, off := newHookFS(), false
	fs.onWrite = func(int64) error {
		if off {
			return syscall.EIO
		}
		return nil
	}
	var m Mark
	m.Open(fs, [16]byte{1}, slog.New(slog.DiscardHandler))
	if err := m.Begin(1); err != nil {
		t.Fatal(err)
	}
	m.set(2)
	off = true
	m.set(3)
	off = false
	m.set(4)
	if m.Seq() != 2 {
		t.Errorf("the mark is %d, though a try has just failed", m.Seq())
	}
	m.failedAt = m.failedAt.Add(-markRetry)
	if m.set(5); m.Seq() != 5 || !m.failedAt.IsZero() {
		t.Errorf("the mark is %d, and the log durable up to 5", m.Seq())
	}
}
