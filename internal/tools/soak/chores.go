package main

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
)

const exitNotFound = 3

// chore runs a command that changes nothing that a client could see.
func (w *world) chore(r *rand.Rand) {
	after := w.sometimes(r)
	chores := []struct {
		args []string
		also int
	}{
		{[]string{"gc"}, exitFull},
		{[]string{"gc", "--waste", fmt.Sprint(5 + r.IntN(60))}, exitFull},
		{[]string{"gc", "--cold"}, exitFull},
		{[]string{"gc", "-n"}, exitOK},
		{[]string{"check"}, exitOK},
		{[]string{"check", "--read-data"}, exitOK},
		{[]string{"ls", "-l", "-t", "all"}, exitOK},
		{[]string{"ls", "--json", "-l"}, exitOK},
		{[]string{"info"}, exitOK},
		{[]string{"upgrade"}, exitBusy}, // it would cut off the NBD clients
		{[]string{"stats", "v0"}, exitNotFound},
		{[]string{"features"}, exitOK},
	}
	c := chores[r.IntN(len(chores))]
	o := w.doKilled(after, c.args, c.also)
	if o.doubt && after > 0 && !w.server.dying.Load() {
		w.state.count("killed clients")
	}
}

// export exports a snapshot, or a volume that nobody uses, and compares the file. Sometimes the client is killed.
func (w *world) export(r *rand.Rand) {
	name, im := w.use(r, true)
	if im != nil {
		defer im.users.RUnlock()
	} else {
		var release func()
		if name, im, release = w.seize(r, false, false); im == nil {
			return
		}
		defer release()
	}
	if im.doubtful() {
		return
	}
	dir, err := os.MkdirTemp(w.dir, "export")
	if err != nil {
		w.fail(err)
		return
	}
	defer os.RemoveAll(dir) // with what a client that was killed has left
	path := filepath.Join(dir, "image")
	if o := w.doKilled(w.sometimes(r), []string{"export", name, path}, exitBusy); o.doubt || o.code != exitOK {
		return
	}
	f, err := os.Open(path)
	if err != nil {
		w.fail(err)
		return
	}
	defer f.Close()
	if fi, err := f.Stat(); err != nil || fi.Size() != im.length() {
		w.fail(fmt.Errorf("the export of %s has %d bytes instead of %d (%v)", name, fi.Size(), im.length(), err))
		return
	}
	if err := w.compareWith(name+", exported", im, f); err != nil {
		w.fail(err)
	}
}

// look asks how full the store is, and turns from filling to freeing and back.
func (w *world) look() {
	o := w.do([]string{"--json", "info"})
	if o.code != exitOK {
		return
	}
	var i struct {
		Chunks int64 `json:"chunk_bytes"`
		Live   int64 `json:"live_bytes"`
	}
	if err := json.Unmarshal(o.out, &i); err != nil {
		w.fail(fmt.Errorf("%v: %w", o, err))
		return
	}
	if most := w.maxSize << 20; i.Chunks > most {
		w.fail(fmt.Errorf("the chunk files take %d bytes, and the limit is %d", i.Chunks, most))
	}
	w.used.Store(i.Live * 100 / (w.maxSize << 20))
	w.taking.Store(i.Chunks * 100 / (w.maxSize << 20))
	if w.taking.Load() >= 80 {
		w.filled.Store(true)
	}
	full := w.full.Swap(0)
	switch {
	case w.freeing.Load():
		w.freeing.Store(w.used.Load() > 72)
	default:
		w.freeing.Store(full > 40)
	}
	w.state.add("answers 'no space'", int(full))
}
