package main

import (
	"context"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
)

// world is all that the store must have.
type world struct {
	config
	mu      sync.Mutex
	images  map[string]*image // by VOL or VOL@SNAP
	taken   map[string]bool   // names that are in use or in doubt
	files   int               // made so far
	doubts  []doubt
	freeing atomic.Bool // there is little room, and giving it back comes first

	server  *server
	state   state
	samples []sample
	brake   throttle
	filled  atomic.Bool  // the store has been nearly full once
	taking  atomic.Int64 // per cent of the limit that the chunk files take
	used    atomic.Int64 // per cent of the limit that the live data has
	full    atomic.Int64 // answers "no space"
	atWork  atomic.Int64 // commands that run and change names, sizes or whole contents
	failure chan error   // the first one
}

// fail ends the soak.
func (w *world) fail(err error) {
	select {
	case w.failure <- err:
	default:
	}
}

// path returns the path of a new file of the shadow.
func (w *world) path() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.files++
	return filepath.Join(w.dir, "shadow", fmt.Sprint(w.files))
}

// name takes a name that is free, or returns "". With a volume it is a snapshot's.
func (w *world) name(r *rand.Rand, volume string) string {
	w.mu.Lock()
	defer w.mu.Unlock()
	prefix, n := "v", 2*w.volumes
	if volume != "" {
		prefix, n = volume+"@s", 2*w.snapshots
	}
	for _, i := range r.Perm(n) {
		if s := fmt.Sprint(prefix, i); !w.taken[s] {
			w.taken[s] = true
			return s
		}
	}
	return ""
}

func (w *world) free(name string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	delete(w.taken, name)
}

func (w *world) put(name string, im *image) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.images[name], w.taken[name] = im, true
}

// drop removes an image.
func (w *world) drop(name string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.images[name].remove()
	delete(w.images, name)
	delete(w.taken, name)
}

// discard gives up images that are not in the world, with their names.
func (w *world) discard(images map[string]*image) {
	for name, im := range images {
		im.remove()
		w.free(name)
	}
}

// move renames a volume with its snapshots, or a snapshot.
func (w *world) move(from, to string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for name, im := range w.images {
		if rest, ok := strings.CutPrefix(name, from); ok && (rest == "" || rest[0] == '@') {
			delete(w.images, name)
			delete(w.taken, name)
			w.images[to+rest], w.taken[to+rest] = im, true
		}
	}
}

// counts returns how many volumes and snapshots there are.
func (w *world) counts() (volumes, snapshots int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for name := range w.images {
		if isSnapshot(name) {
			snapshots++
		} else {
			volumes++
		}
	}
	return volumes, snapshots
}

func isSnapshot(name string) bool { return strings.Contains(name, "@") }

func volumeOf(name string) string {
	v, _, _ := strings.Cut(name, "@")
	return v
}

// use picks a random volume or snapshot and holds it for use.
func (w *world) use(r *rand.Rand, snapshot bool) (string, *image) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.server.dying.Load() { // what comes in doubt from here on stays as it is
		return "", nil
	}
	for _, name := range w.shuffled(r, snapshot) {
		if im := w.images[name]; im.users.TryRLock() {
			return name, im
		}
	}
	return "", nil
}

// seize picks a random volume or snapshot and holds it, so that nobody uses it, and its content is known. With family, a
// volume's snapshots are held, too; and the volume of a snapshot is used, so that it keeps its name.
func (w *world) seize(r *rand.Rand, snapshot, family bool) (string, *image, func()) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.server.dying.Load() {
		return "", nil, nil
	}
	for _, name := range w.shuffled(r, snapshot) {
		var held []func() // that give back
		release := func() {
			for _, back := range held {
				back()
			}
		}
		all := true
		for n, im := range w.images {
			switch {
			case !all:
			case n == name, family && strings.HasPrefix(n, name+"@"):
				if all = im.users.TryLock(); all {
					held = append(held, im.users.Unlock)
				}
			case family && n == volumeOf(name):
				if all = im.users.TryRLock(); all {
					held = append(held, im.users.RUnlock)
				}
			}
		}
		if im := w.images[name]; all && !im.doubtful() {
			return name, im, release
		}
		release()
	}
	return "", nil, nil
}

// shuffled lists the volumes or the snapshots in random order. The caller holds mu.
func (w *world) shuffled(r *rand.Rand, snapshot bool) (names []string) {
	for name := range w.images {
		if isSnapshot(name) == snapshot {
			names = append(names, name)
		}
	}
	slices.Sort(names) // the order of a map is no seed's
	r.Shuffle(len(names), func(i, j int) { names[i], names[j] = names[j], names[i] })
	return names
}

// family lists a volume and its snapshots.
func (w *world) family(volume string) (names []string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for name := range w.images {
		if volumeOf(name) == volume {
			names = append(names, name)
		}
	}
	return names
}

// pause waits for the processor's share, and reports whether to go on.
func (w *world) pause(ctx context.Context) bool {
	w.brake.wait(ctx)
	return ctx.Err() == nil
}
