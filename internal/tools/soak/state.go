package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"
)

// state are the sums over all pieces.
type state struct {
	Hours  float64
	Kills  int // by SIGKILL
	Ends   int // by SIGTERM
	Quits  int // by SIGQUIT, with stacks
	Lives  int
	Counts map[string]int // of everything else
	Failed string         // the fault that ended a piece
	Shadow map[string]entry
	Files  int
	Filled bool

	mu sync.Mutex
}

// entry is an image in the state's file.
type entry struct {
	File string
	Size int64
}

func (s *state) count(what string) { s.add(what, 1) }

func (s *state) add(what string, n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.Counts == nil {
		s.Counts = map[string]int{}
	}
	s.Counts[what] += n
}

func (s *state) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	parts := []string{fmt.Sprintf("%.2f hours, %d kills, %d SIGTERM, %d SIGQUIT", s.Hours, s.Kills, s.Ends, s.Quits)}
	for _, k := range slices.Sorted(maps.Keys(s.Counts)) {
		parts = append(parts, fmt.Sprintf("%d %s", s.Counts[k], k))
	}
	return strings.Join(parts, ", ")
}

// load reads the state, and makes the folder ready. If the last piece was cut off in the middle, the sums stay, and the
// store and its shadow begin anew.
func (w *world) load() error {
	text, err := os.ReadFile(filepath.Join(w.dir, "state"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err == nil {
		if err := json.Unmarshal(text, &w.state); err != nil {
			return err
		}
	}
	if w.state.Failed != "" {
		return fmt.Errorf("the last piece failed, and %s is as it was then: remove it to begin anew. The fault was: %s", w.dir, w.state.Failed)
	}
	if text, err := os.ReadFile(filepath.Join(w.dir, "samples")); err == nil {
		if err := json.Unmarshal(text, &w.samples); err != nil {
			return err
		}
	}
	shadow := w.state.Shadow
	if shadow == nil {
		if err := errors.Join(os.RemoveAll(w.store()), os.RemoveAll(filepath.Join(w.dir, "shadow")), os.MkdirAll(filepath.Join(w.dir, "shadow"), 0o700)); err != nil {
			return err
		}
	}
	w.files, w.state.Shadow = w.state.Files, nil
	w.filled.Store(shadow != nil && w.state.Filled)
	for name, e := range shadow {
		im, err := newImage(filepath.Join(w.dir, "shadow", e.File), e.Size)
		if err != nil {
			return err
		}
		w.put(name, im)
	}
	return w.save()
}

// save writes the state. It has a shadow only if the store is at rest.
func (w *world) save() error {
	w.state.mu.Lock()
	text, err := json.MarshalIndent(&w.state, "", "\t")
	w.state.mu.Unlock()
	if err != nil {
		return err
	}
	samples, err := json.Marshal(w.samples)
	if err != nil {
		return err
	}
	for name, p := range map[string][]byte{"samples": samples, "state": text} {
		path := filepath.Join(w.dir, name)
		if err := errors.Join(os.WriteFile(path+".new", p, 0o600), os.Rename(path+".new", path)); err != nil {
			return err
		}
	}
	return nil
}

// rest notes the shadow of a store that is closed.
func (w *world) rest() error {
	w.state.Shadow, w.state.Files, w.state.Filled = map[string]entry{}, w.files, w.filled.Load()
	for name, im := range w.images {
		w.state.Shadow[name] = entry{filepath.Base(im.path), im.size}
	}
	return w.save()
}

// passed adds time that has been proved.
func (w *world) passed(d time.Duration) error {
	w.state.Hours += d.Hours()
	return w.save()
}
