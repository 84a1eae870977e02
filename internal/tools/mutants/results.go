package main

import (
	"bufio"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
)

// results are the mutants that were killed in earlier runs: lines of a key, the test and the name.
type results struct {
	mu sync.Mutex // guards f
	f  *os.File   // nil: none are kept
	by map[string]string
}

// openResults opens a file of results, and makes it if there is none.
func openResults(path string) (*results, error) {
	r := &results{by: map[string]string{}}
	if path == "" {
		return r, nil
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, err
	}
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_APPEND, 0o644)
	if err != nil {
		return nil, err
	}
	for lines := bufio.NewScanner(f); lines.Scan(); {
		// A line that a kill cut short has no name, and does not count.
		if word := strings.SplitN(lines.Text(), "\t", 3); len(word) == 3 {
			r.by[word[0]] = word[1]
		}
	}
	r.f = f
	return r, nil
}

func (r *results) close() {
	if r.f != nil {
		_ = r.f.Close() // each line was written already
	}
}

// has returns the test that killed a mutant in an earlier run.
func (r *results) has(m *mutant) (by string, ok bool) {
	if r.f == nil || m.equivalent != "" {
		return "", false
	}
	key, err := m.key()
	if err != nil {
		return "", false // the try says what is wrong
	}
	by, ok = r.by[key]
	return by, ok
}

// add notes that a mutant was killed.
func (r *results) add(m *mutant, by string) error {
	if r.f == nil {
		return nil
	}
	key, err := m.key()
	if err != nil {
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	_, err = fmt.Fprintf(r.f, "\n%s\t%s\t%s", key, by, m.name)
	return err
}

// key is another one if the mutant, its file or the package of its test changes.
func (m *mutant) key() (string, error) {
	h := sha256.New()
	fmt.Fprintf(h, "%q %q %q %q %q %q\n", m.file, m.old, m.new, m.pkg, m.test, m.env)
	files, err := filepath.Glob(filepath.Join(m.pkg, "*.go"))
	for _, f := range append(files, m.file) {
		text, rerr := os.ReadFile(f)
		if errors.Is(rerr, fs.ErrNotExist) && f != m.file {
			continue // it went since it was listed
		}
		err = errors.Join(err, rerr)
		fmt.Fprintf(h, "%s %d\n", f, len(text))
		h.Write(text)
	}
	return fmt.Sprintf("%x", h.Sum(nil)[:12]), err
}
