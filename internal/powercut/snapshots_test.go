package powercut

import (
	"context"
	"crypto/sha256"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"time"
)

// snapshots takes snapshots of a volume, keeps the hash of each, and removes old ones.
type snapshots struct {
	volume string
	rng    *rand.Rand
	n      int // names never come again

	mu      sync.Mutex // guards what follows
	kept    []snapshot
	unknown []string // a power cut may have come before they were taken or removed
	taken   int      // since the last cut
}

// snapshot is one that must be there.
type snapshot struct{ name, hash string }

// load goes on until a command fails or the context ends. In between it makes the store commit its table.
func (s *snapshots) load(ctx context.Context) error {
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(time.Duration(s.rng.IntN(500)) * time.Millisecond):
		}
		if err := s.step(ctx); err != nil {
			return err
		}
	}
}

func (s *snapshots) step(ctx context.Context) error {
	s.mu.Lock()
	drop := ""
	if len(s.kept) >= 4 || len(s.kept) > 0 && s.rng.IntN(4) == 0 {
		i := s.rng.IntN(len(s.kept))
		drop = s.kept[i].name
		s.kept = slices.Delete(s.kept, i, i+1)
		s.unknown = append(s.unknown, drop)
	}
	s.mu.Unlock()
	if drop != "" {
		return s.remove(ctx, drop)
	}
	if s.rng.IntN(3) == 0 {
		if out, err := try(ctx, nil, "vdisk", "ls", "-l"); err != nil { // its figures come from a checkpoint
			return fmt.Errorf("%w: %s", err, out)
		}
	}
	s.n++
	name := fmt.Sprintf("%s@%d", s.volume, s.n)
	s.mu.Lock()
	s.unknown = append(s.unknown, name)
	s.mu.Unlock()
	if out, err := try(ctx, nil, "vdisk", "snapshot", name); err != nil {
		return fmt.Errorf("%w: %s", err, out)
	}
	s.mu.Lock()
	s.unknown = slices.DeleteFunc(s.unknown, func(n string) bool { return n == name })
	s.kept = append(s.kept, snapshot{name: name})
	s.taken++
	s.mu.Unlock()
	hash, err := hashOf(ctx, name)
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if i := slices.IndexFunc(s.kept, func(k snapshot) bool { return k.name == name }); i >= 0 {
		s.kept[i].hash = hash
	}
	return nil
}

func (s *snapshots) remove(ctx context.Context, name string) error {
	if out, err := try(ctx, nil, "vdisk", "rm", name); err != nil {
		return fmt.Errorf("%w: %s", err, out)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.unknown = slices.DeleteFunc(s.unknown, func(n string) bool { return n == name })
	return nil
}

func hashOf(ctx context.Context, name string) (string, error) {
	h := sha256.New()
	if out, err := try(ctx, h, "vdisk", "export", name, "-"); err != nil {
		return "", fmt.Errorf("%w: %s", err, out)
	}
	return fmt.Sprintf("%x", h.Sum(nil)), nil
}

func (s *snapshots) count() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.taken
}

func (s *snapshots) promise() []snapshot {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.kept)
}

// check compares the promised snapshots with their hashes, and removes those that may be there or not.
func (s *snapshots) check(t *testing.T, promise []snapshot) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	for _, want := range s.kept { // those that came after the promise
		if !slices.ContainsFunc(promise, func(p snapshot) bool { return p.name == want.name }) {
			s.unknown = append(s.unknown, want.name)
		}
	}
	for i, want := range promise {
		hash, err := hashOf(ctx, want.name)
		if err != nil || want.hash != "" && hash != want.hash {
			t.Fatalf("snapshot %s, which was taken, is lost or another: hash %q, was %q, %v", want.name, hash, want.hash, err)
		}
		promise[i].hash = hash
	}
	// A removal that was under way when the promise was noted has not taken its name off any more.
	s.kept = slices.DeleteFunc(promise, func(p snapshot) bool { return slices.Contains(s.unknown, p.name) })
	for _, name := range s.unknown {
		_, _ = try(ctx, nil, "vdisk", "rm", name) // it may not be there
	}
	s.unknown = nil
}
