package main

import (
	"bufio"
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"math/bits"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// What is kept of a corpus: the inputs must not be a burden on the repository, nor on make test, which runs them.
const (
	mostInputs = 16   // of a target
	mostBytes  = 1500 // of an input's file
	mostOften  = 5
)

// keep chooses the inputs of all targets. It tries so many of each.
func keep(ts []target, tries int) error {
	out, err := exec.Command("go", "env", "GOCACHE").Output()
	if err != nil {
		return fmt.Errorf("go env: %w", err)
	}
	cache := strings.TrimSpace(string(out))
	tmp, err := os.MkdirTemp("", "fuzz")
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp)
	for _, t := range ts {
		n, bytes, err := t.keep(cache, tmp, tries)
		if err != nil {
			return fmt.Errorf("%v: %w", t, err)
		}
		fmt.Printf("%v: %d inputs, %d bytes\n", t, n, bytes)
	}
	return nil
}

// candidate is an input, and the code that it reaches: blocks, each with a class of how often.
type candidate struct {
	name    string
	content []byte
	reaches map[string]bool
}

// keep chooses the inputs of a target. It measures each by the compiled test, in the package's folder. If there are more
// than tries, it measures as many, of all sizes.
func (t target) keep(cache, tmp string, tries int) (n, size int, err error) {
	kept := filepath.Join(t.dir, "testdata", "fuzz", t.name)
	all, err := candidates(kept, filepath.Join(cache, "fuzz", t.pkg, t.name))
	if err != nil || len(all) == 0 {
		return 0, 0, err
	}
	if n := len(all); n > tries {
		for i := range tries {
			all[i] = all[i*n/tries]
		}
		all = all[:tries]
	}
	binary := filepath.Join(tmp, strings.ReplaceAll(t.pkg, "/", "_"))
	if _, err := os.Stat(binary); errors.Is(err, fs.ErrNotExist) {
		build := exec.Command("go", "test", "-c", "-covermode", "count", "-coverpkg", t.module+"/...", "-o", binary, t.pkg)
		if out, err := build.CombinedOutput(); err != nil {
			return 0, 0, fmt.Errorf("%w: %s", err, out)
		}
	}
	if err := os.MkdirAll(kept, 0o755); err != nil {
		return 0, 0, err
	}
	reached, err := t.measure(binary, tmp, "^seed#")
	if err != nil {
		return 0, 0, err
	}
	for _, c := range all {
		if err := os.WriteFile(filepath.Join(kept, c.name), c.content, 0o644); err != nil {
			return 0, 0, err
		}
		c.reaches, err = t.measure(binary, tmp, "^"+c.name+"$")
		if rerr := os.Remove(filepath.Join(kept, c.name)); err != nil || rerr != nil {
			return 0, 0, errors.Join(err, rerr)
		}
	}
	for _, c := range choose(all, reached) {
		if err := os.WriteFile(filepath.Join(kept, c.name), c.content, 0o644); err != nil {
			return 0, 0, err
		}
		n, size = n+1, size+len(c.content)
	}
	if n == 0 {
		err = os.Remove(kept)
	}
	return n, size, err
}

// candidates returns the small inputs in the folders, which need not exist.
func candidates(dirs ...string) (all []*candidate, err error) {
	seen := map[string]bool{}
	for _, dir := range dirs {
		entries, err := os.ReadDir(dir)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, err
		}
		for _, e := range entries {
			b, err := os.ReadFile(filepath.Join(dir, e.Name()))
			if err != nil {
				return nil, err
			}
			if len(b) <= mostBytes && !seen[e.Name()] {
				seen[e.Name()] = true
				all = append(all, &candidate{name: e.Name(), content: b})
			}
		}
	}
	slices.SortFunc(all, func(a, b *candidate) int { return cmp.Or(len(a.content)-len(b.content), cmp.Compare(a.name, b.name)) })
	return all, nil
}

// measure runs the inputs whose names match, and returns the code that they reach. Inputs that fail are an error.
func (t target) measure(binary, tmp, inputs string) (map[string]bool, error) {
	profile := filepath.Join(tmp, "profile")
	cmd := exec.Command(binary, "-test.run", "^"+t.name+"$/"+inputs, "-test.coverprofile", profile, "-test.timeout", "1m")
	cmd.Dir = t.dir
	if out, err := cmd.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("%s: %w: %s", inputs, err, out)
	}
	f, err := os.Open(profile)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	reached := map[string]bool{}
	for s := bufio.NewScanner(f); s.Scan(); {
		fields := strings.Fields(s.Text()) // file:from,to statements count
		if len(fields) != 3 {
			continue
		}
		n, err := strconv.ParseUint(fields[2], 10, 64)
		if err != nil {
			return nil, err
		}
		for often := range min(bits.Len64(n), mostOften) { // 2 times, 4, 8 and so on are other things than once, as in a loop
			reached[fmt.Sprint(fields[0], " ", often)] = true
		}
	}
	return reached, nil
}

// choose returns the inputs that together reach all that the inputs reach, without what is reached already. It takes
// the one that adds most, again and again; of equals the smallest.
func choose(all []*candidate, reached map[string]bool) (chosen []*candidate) {
	for len(chosen) < mostInputs {
		var best *candidate
		most := 0
		for _, c := range all {
			n := 0
			for b := range c.reaches {
				if !reached[b] {
					n++
				}
			}
			if n > most {
				best, most = c, n
			}
		}
		if best == nil {
			break
		}
		maps.Copy(reached, best.reaches)
		chosen = append(chosen, best)
	}
	return chosen
}
