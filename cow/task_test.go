package cow

import (
	"bytes"
	"context"
	"errors"
	"io"
	"testing"
)

// TestEndsByItsCause ends what may take long by a context. The error has the cause, so that a command can say which
// signal it was, and what can be done next.
func TestEndsByItsCause(t *testing.T) {
	s, _ := newStore(t, Options{checkpointInterval: -1})
	flat(t, s)
	var sent bytes.Buffer
	if _, err := s.Send(t.Context(), SendOptions{Snapshot: Ref{"v", "a"}}, &sent); err != nil {
		t.Fatal(err)
	}
	cause := errors.New("a signal")
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(cause)
	for name, do := range map[string]func() error{
		"check":   func() error { _, err := s.Check(ctx, CheckOptions{ReadData: true}, func(Problem) {}); return err },
		"clean":   func() error { _, err := s.Clean(ctx, 0); return err },
		"cold":    func() error { _, err := s.Cold(ctx); return err },
		"flatten": func() error { _, err := s.Flatten(ctx, "c"); return err },
		"send":    func() error { _, err := s.Send(ctx, SendOptions{Snapshot: Ref{"v", "a"}}, io.Discard); return err },
		"receive": func() error {
			_, err := s.Receive(ctx, &sent, ReceiveOptions{Target: Ref{Volume: "w"}})
			if again := new(ReceiveError); !errors.As(err, &again) {
				t.Errorf("receive does not say how to go on: %v", err)
			}
			return err
		},
	} {
		if err := do(); !errors.Is(err, cause) {
			t.Errorf("%s: %v", name, err)
		}
	}
}
