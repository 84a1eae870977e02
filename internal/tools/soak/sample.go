package main

import (
	"context"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// sample is what the server takes at one moment.
type sample struct {
	Life        int
	Memory      int64 // resident, in bytes
	Descriptors int64
	Threads     int64
	Goroutines  int64 // 0: not known
	Chunks      int64 // bytes that the chunk files take
	Table       int64 // bytes that meta.db takes
	Others      int64 // bytes that all other files of the store take
}

// warmup is how long a server lives before it is sampled.
const warmup = 15 * time.Second

// sampler samples the server until ctx ends, and looks how full the store is.
func (w *world) sampler(ctx context.Context, every time.Duration) {
	for sleep(ctx, every); ctx.Err() == nil; sleep(ctx, every) {
		w.look()
		if w.filled.Load() && time.Since(w.server.since) > warmup {
			w.take(w.measure(w.server.cmd.Process.Pid))
		}
	}
}

func (w *world) take(s sample) {
	if s.Memory > 0 { // or it has just been killed
		w.samples = append(w.samples, s)
	}
}

func (w *world) measure(pid int) sample {
	s := sample{Life: w.state.Lives}
	dir := fmt.Sprintf("/proc/%d", pid)
	if text, err := os.ReadFile(dir + "/status"); err == nil {
		for line := range strings.Lines(string(text)) {
			var kb int64
			switch key, value, _ := strings.Cut(line, ":"); key {
			case "VmRSS":
				kb, _ = strconv.ParseInt(strings.TrimSuffix(strings.TrimSpace(value), " kB"), 10, 64) // 0 if there is none
				s.Memory = kb << 10
			case "Threads":
				s.Threads, _ = strconv.ParseInt(strings.TrimSpace(value), 10, 64)
			}
		}
	}
	if fds, err := os.ReadDir(dir + "/fd"); err == nil {
		s.Descriptors = int64(len(fds))
	}
	_ = filepath.WalkDir(w.store(), func(path string, e fs.DirEntry, err error) error { // files come and go
		if err != nil || e.IsDir() {
			return nil
		}
		fi, err := e.Info()
		if err != nil {
			return nil
		}
		bytes := fi.Sys().(*syscall.Stat_t).Blocks * 512
		switch {
		case filepath.Base(filepath.Dir(path)) == "chunks":
			s.Chunks += bytes
		case e.Name() == "meta.db":
			s.Table += bytes
		default:
			s.Others += bytes
		}
		return nil
	})
	return s
}

var goroutine = regexp.MustCompile(`(?m)^goroutine \d+`)

// countGoroutines counts the stacks that a server has printed at its end, in the last of its log.
func (w *world) countGoroutines() {
	text, err := os.ReadFile(filepath.Join(w.dir, "server.log"))
	if err != nil {
		w.fail(err)
		return
	}
	last := text[strings.LastIndex(string(text), "\n== life ")+1:]
	w.samples = append(w.samples, sample{Life: w.state.Lives, Goroutines: int64(len(goroutine.FindAll(last, -1)))})
}

// measures are the figures that must not grow: the median of the last third of the samples may exceed the median of the
// first third by a quarter, and by slack.
var measures = []struct {
	name  string
	of    func(sample) int64
	slack int64
}{
	{"memory", func(s sample) int64 { return s.Memory }, 48 << 20},
	{"descriptors", func(s sample) int64 { return s.Descriptors }, 16},
	{"threads", func(s sample) int64 { return s.Threads }, 8},
	{"goroutines", func(s sample) int64 { return s.Goroutines }, 24},
	{"bytes of chunk files", func(s sample) int64 { return s.Chunks }, 64 << 20},
	{"bytes of the table", func(s sample) int64 { return s.Table }, 8 << 20},
	{"bytes of other files", func(s sample) int64 { return s.Others }, 32 << 20},
}

// flat compares the last third of the samples with the first.
func flat(samples []sample, log func(string, ...any)) error {
	for _, m := range measures {
		var all []int64
		for _, s := range samples {
			if v := m.of(s); v > 0 {
				all = append(all, v)
			}
		}
		if len(all) < 6 { // too few to say anything
			continue
		}
		third := len(all) / 3
		first, last := median(all[:third]), median(all[len(all)-third:])
		log("%s: %d in the first third, %d in the last, at most %d, of %d samples", m.name, first, last, slices.Max(all), len(all))
		if last > first+first/4+m.slack {
			return fmt.Errorf("%s grew from %d to %d", m.name, first, last)
		}
	}
	return nil
}

func median(v []int64) int64 {
	v = slices.Sorted(slices.Values(v))
	return v[len(v)/2]
}
