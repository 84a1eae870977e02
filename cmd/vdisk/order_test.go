package main

import (
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/vdisk/vdisk/internal/strace"
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
		// writers: records are written beside flushes and commits, so a chunk may have some that these do not speak of.
		writers bool
	}{
		{"create v --size 1G", []string{"chunk", "commit", "mark", "rename", "end"}, false},
		{"ls", []string{"look"}, false},
		{"import " + image + " i", []string{"chunk", "commit", "mark", "rename", "end", "note"}, true},
		{"snapshot i@a", []string{"chunk", "commit", "mark", "end"}, false},
		{"clone i@a c", []string{"commit", "mark", "end"}, false},
		{"info", []string{"look"}, false},
		{"check --read-data", []string{"look"}, false},
		{"export i@a " + filepath.Join(dir, "out"), []string{"look"}, false},
		{"resize v 2G", []string{"commit", "mark", "end"}, false},
		{"rm -r i c", []string{"commit", "mark", "end", "remove"}, true}, // two events, and a checkpoint beside the second
		{"gc", []string{"end"}, false},
		{"bench --size 16M --time 10ms", []string{"note"}, true},
	} {
		t.Run(strings.Fields(c.args)[0], func(t *testing.T) {
			o := order{t: t, looks: slices.Contains(c.want, "look"), makes: i == 0, notes: slices.Contains(c.want, "note"), writers: c.writers, met: map[string]int{}, unsynced: map[string]bool{}, written: map[string]bool{}}
			cmd := exec.Command(bin, strings.Fields(c.args)...)
			cmd.Env = append(os.Environ(), "VDISK_STORE="+store)
			events, err := strace.Run(cmd, store)
			if err != nil {
				t.Fatal(err)
			}
			for _, e := range events {
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

// order checks system calls against the rules. A write counts from its beginning, a sync from its end.
type order struct {
	t        *testing.T
	looks    bool
	met      map[string]int
	unsynced map[string]bool // files with writes, and folders with changes of names, that are not synced
	written  map[string]bool // chunks with records that this command has written
	makes    bool            // the table is being made
	metaPage bool            // a meta page of the table is written and not synced
	notes    bool            // a note must come before the first record, and has not come yet
	writers  bool            // see the table of commands
}

func (o *order) must(ok bool, rule, text string, e strace.Event) {
	o.t.Helper()
	o.met[rule]++
	if !ok {
		o.t.Errorf("%s: %s\n  unsynced: %v", e.Line, text, slices.Sorted(maps.Keys(o.unsynced)))
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

func (o *order) add(e strace.Event) {
	folder := filepath.Dir(e.File)
	if folder == "." {
		folder = ""
	}
	isChunk := strings.HasPrefix(e.File, "chunks/")
	switch {
	case e.Call == "sync" && e.Ended:
		delete(o.unsynced, e.File)
		o.metaPage = o.metaPage && e.File != "meta.db"
	case e.Ended || e.Call == "sync":
	case e.Call == "write" && isChunk:
		if e.Off >= headerSize {
			o.must(!o.unsynced["chunks"] && (o.written[e.File] || !o.unsynced[e.File]), "chunk", "a record is written before the chunk's header and name are durable", e)
			o.written[e.File] = true
			o.must(!o.notes, "note", "a volume is made that a kill would leave, and nothing says so yet", e)
		}
		o.unsynced[e.File] = true
	case e.Call == "write" && e.File == "durable":
		o.must(o.writers || !o.dirtyChunk(), "mark", "the mark says that the log is durable, and it is not", e)
	case e.Call == "write" && e.File == "meta.db" && e.Off >= 2*4096:
		o.must(!o.metaPage, "commit", "a page of the table is written before the meta page of the last commit is durable", e)
		o.unsynced["meta.db"] = true
	case e.Call == "write" && e.File == "meta.db":
		o.metaPage = !o.makes
		if !o.makes { // a table that is being made has nothing to lose
			o.must(!o.unsynced["meta.db"], "commit", "the meta page is written before the pages that it refers to are durable", e)
			o.must(o.writers || !o.dirtyChunk(), "commit", "the table refers to records that are not durable", e)
		}
		o.unsynced["meta.db"] = true
	case e.Call == "write":
		o.unsynced[e.File] = true
		o.makes = o.makes && e.File != "format.tmp"
	case e.Call == "make":
		o.unsynced[folder] = true
	case e.Call == "rename":
		o.unsynced[folder] = true
		o.notes = o.notes && e.File != "importing.tmp"
		if strings.HasSuffix(e.File, ".tmp") {
			o.must(!o.unsynced[e.File], "rename", "a file gets its name before it is durable", e)
			o.must(e.File != "format.tmp" || !o.unsynced["meta.db"], "rename", "there is a store before its table is durable", e)
		}
	case e.Call == "remove" && isChunk:
		o.must(!o.looks, "look", "a command that only looks removes a chunk", e)
		o.must(!o.unsynced["meta.db"], "remove", "a chunk is removed before the table does without it", e)
	}
}

// end checks the state at the command's end against the rules.
func (o *order) end() {
	e := strace.Event{Line: "the end"}
	if o.looks {
		o.must(len(o.written) == 0, "look", "a command that only looks writes records", e)
		return
	}
	o.must(!o.dirtyChunk() && !o.unsynced["meta.db"] && !o.unsynced["format"], "end", "something is not durable", e)
}
