package main

import (
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// TestOrderOfSystemCalls runs whole commands under strace and checks their system calls on the store against the rules
// of docs/engine.md: which write must be durable before which. The engine's own tests cut the power of a double of the
// file system. This one checks that the real one gets the same calls as the double.
func TestOrderOfSystemCalls(t *testing.T) {
	if _, err := exec.LookPath("strace"); err != nil {
		t.Fatal("strace is needed; make test installs it")
	}
	dir := t.TempDir()
	bin := filepath.Join(dir, "vdisk")
	if out, err := exec.Command("go", "build", "-o", bin, ".").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	image := filepath.Join(dir, "image")
	if err := os.WriteFile(image, []byte(strings.Repeat("0123456789abcdef", 200<<10)), 0o600); err != nil {
		t.Fatal(err)
	}
	store := filepath.Join(dir, "store")
	for i, c := range []struct {
		args string
		want []string // rules that must have been met at least once
	}{
		{"create v --size 1G", []string{"chunk", "commit", "mark", "rename", "end"}},
		{"ls", []string{"look"}},
		{"import " + image + " i", []string{"chunk", "commit", "mark", "rename", "end"}},
		{"snapshot i@a", []string{"chunk", "commit", "mark", "end"}},
		{"clone i@a c", []string{"commit", "mark", "end"}},
		{"info", []string{"look"}},
		{"check --read-data", []string{"look"}},
		{"export i@a " + filepath.Join(dir, "out"), []string{"look"}},
		{"resize v 2G", []string{"commit", "mark", "end"}},
		{"rm -r i c", []string{"commit", "mark", "end", "remove"}},
		{"gc", []string{"end"}},
	} {
		t.Run(strings.Fields(c.args)[0], func(t *testing.T) {
			o := order{t: t, looks: slices.Contains(c.want, "look"), makes: i == 0, met: map[string]int{}, unsynced: map[string]bool{}, written: map[string]bool{}}
			for _, e := range trace(t, bin, store, strings.Fields(c.args)) {
				o.add(e)
			}
			o.end()
			for _, rule := range c.want {
				if o.met[rule] == 0 {
					t.Errorf("nothing here is about the rule %q; about others: %v", rule, slices.Collect(maps.Keys(o.met)))
				}
			}
		})
	}
}

// event is the beginning or the end of a system call on a file of the store.
type event struct {
	call  string // "write", "sync", "make", "rename", "remove"
	file  string // relative to the store; "": its folder
	off   int64  // of a write
	ended bool
	line  string
}

// order checks system calls against the rules. A write counts from its beginning, a sync from its end.
type order struct {
	t        *testing.T
	looks    bool
	met      map[string]int
	unsynced map[string]bool // files with writes, and folders with changes of names, that are not synced
	written  map[string]bool // chunks with records that this command has written
	makes    bool            // the table is being made
}

func (o *order) must(ok bool, rule, text string, e event) {
	o.t.Helper()
	o.met[rule]++
	if !ok {
		o.t.Errorf("%s: %s\n  unsynced: %v", e.line, text, slices.Sorted(maps.Keys(o.unsynced)))
	}
}

// dirtyChunk reports whether a chunk file has a write that is not synced.
func (o *order) dirtyChunk() bool {
	for f := range o.unsynced {
		if strings.HasPrefix(f, "chunks/") {
			return true
		}
	}
	return false
}

const headerSize = 4096

func (o *order) add(e event) {
	folder := filepath.Dir(e.file)
	if folder == "." {
		folder = ""
	}
	isChunk := strings.HasPrefix(e.file, "chunks/")
	switch {
	case e.call == "sync" && e.ended:
		delete(o.unsynced, e.file)
	case e.ended || e.call == "sync":
	case e.call == "write" && isChunk:
		if e.off >= headerSize {
			o.must(!o.unsynced["chunks"] && (o.written[e.file] || !o.unsynced[e.file]), "chunk", "a record is written before the chunk's header and name are durable", e)
			o.written[e.file] = true
		}
		o.unsynced[e.file] = true
	case e.call == "write" && e.file == "durable":
		o.must(!o.dirtyChunk(), "mark", "the mark says that the log is durable, and it is not", e)
	case e.call == "write" && e.file == "meta.db" && e.off < 2*4096:
		if !o.makes { // a table that is being made has nothing to lose
			o.must(!o.unsynced["meta.db"], "commit", "the meta page is written before the pages that it refers to are durable", e)
			o.must(!o.dirtyChunk(), "commit", "the table refers to records that are not durable", e)
		}
		o.unsynced["meta.db"] = true
	case e.call == "write":
		o.unsynced[e.file] = true
		o.makes = o.makes && e.file != "format.tmp"
	case e.call == "make":
		o.unsynced[folder] = true
	case e.call == "rename":
		o.unsynced[folder] = true
		if strings.HasSuffix(e.file, ".tmp") {
			o.must(!o.unsynced[e.file], "rename", "a file gets its name before it is durable", e)
		}
	case e.call == "remove" && isChunk:
		o.must(!o.looks, "look", "a command that only looks removes a chunk", e)
		o.must(!o.unsynced["meta.db"], "remove", "a chunk is removed before the table does without it", e)
	}
}

// end checks the state at the command's end against the rules.
func (o *order) end() {
	e := event{line: "the end"}
	if o.looks {
		o.must(len(o.written) == 0, "look", "a command that only looks writes records", e)
		return
	}
	o.must(!o.dirtyChunk() && !o.unsynced["meta.db"] && !o.unsynced["format"], "end", "something is not durable", e)
}

var (
	begun   = regexp.MustCompile(`^(\d+) +(\w+)\((.*)$`)
	resumed = regexp.MustCompile(`^(\d+) +<\.\.\. (\w+) resumed>`)
	result  = regexp.MustCompile(`= (-?\d+)[^=]*$`)
	inDir   = regexp.MustCompile(`\d+<([^>]*)>, "([^"]*)"`)
	ofFile  = regexp.MustCompile(`^\d+<([^>]*)>`)
	atEnd   = regexp.MustCompile(`, (\d+)( <unfinished|\) )`)
)

// trace runs a command under strace, and returns what happened to the files of the store, in order.
func trace(t *testing.T, bin, store string, args []string) (events []event) {
	t.Helper()
	out := filepath.Join(t.TempDir(), "trace")
	cmd := exec.Command("strace", append([]string{
		"-f", "-y", "-qq", "-s", "0", "-o", out,
		"-e", "trace=openat,write,pwrite64,fdatasync,fsync,renameat,renameat2,unlinkat", bin,
	}, args...)...)
	cmd.Env = append(os.Environ(), "VDISK_STORE="+store)
	if text, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, text)
	}
	text, err := os.ReadFile(out)
	if err != nil {
		t.Fatal(err)
	}
	open := map[string]event{} // by thread: its unfinished call
	for line := range strings.Lines(string(text)) {
		line = strings.TrimSpace(line)
		if m := resumed.FindStringSubmatch(line); m != nil {
			if e, ok := open[m[1]]; ok && !failed(line) {
				e.ended = true
				events = append(events, e)
			}
			delete(open, m[1])
			continue
		}
		m := begun.FindStringSubmatch(line)
		if m == nil {
			continue
		}
		e, ok := parse(m[2], m[3], store)
		if !ok || failed(line) {
			continue
		}
		e.line = line
		events = append(events, e)
		if strings.HasSuffix(line, "<unfinished ...>") {
			open[m[1]] = e
			continue
		}
		e.ended = true
		events = append(events, e)
	}
	if len(events) == 0 {
		t.Fatalf("strace saw nothing: %s", text)
	}
	return events
}

// failed reports whether a line has the result of a call that failed.
func failed(line string) bool {
	m := result.FindStringSubmatch(line)
	return m != nil && strings.HasPrefix(m[1], "-")
}

// parse returns the event of a call; ok is false if it changes nothing in the store.
func parse(call, args, store string) (e event, ok bool) {
	relative := func(path string) (string, bool) {
		if path == store {
			return "", true
		}
		return strings.CutPrefix(path, store+"/")
	}
	var paths []string
	for _, m := range inDir.FindAllStringSubmatch(args, -1) {
		p, ours := relative(filepath.Join(m[1], m[2]))
		if !ours {
			return e, false
		}
		paths = append(paths, p)
	}
	file, ours := "", false
	if m := ofFile.FindStringSubmatch(args); m != nil {
		file, ours = relative(m[1])
	}
	switch call {
	case "openat":
		if len(paths) != 1 || !strings.Contains(args, "O_CREAT|O_EXCL") {
			return e, false
		}
		return event{call: "make", file: paths[0]}, true
	case "renameat", "renameat2":
		if len(paths) != 2 {
			return e, false
		}
		return event{call: "rename", file: paths[0]}, true
	case "unlinkat":
		if len(paths) != 1 {
			return e, false
		}
		return event{call: "remove", file: paths[0]}, true
	case "fdatasync", "fsync":
		return event{call: "sync", file: file}, ours
	case "write", "pwrite64":
		e = event{call: "write", file: file}
		if m := atEnd.FindStringSubmatch(args); m != nil && call == "pwrite64" {
			if _, err := fmt.Sscan(m[1], &e.off); err != nil {
				return e, false
			}
		}
		return e, ours
	}
	return e, false
}
