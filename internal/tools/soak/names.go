package main

import (
	"context"
	"fmt"
	"math/rand/v2"
	"strings"
	"time"
)

// commands runs one command after the other until ctx ends.
func (w *world) orders(ctx context.Context, r *rand.Rand) {
	for w.pause(ctx) {
		w.choose(r)(r)
		sleep(ctx, time.Duration(r.IntN(400))*time.Millisecond)
	}
}

// choose picks what to do, by how much there is and how full the store is.
func (w *world) choose(r *rand.Rand) func(*rand.Rand) {
	volumes, snapshots := w.counts()
	type choice struct {
		weight int
		do     func(*rand.Rand)
	}
	more, less := 1, 1
	switch {
	case w.freeing.Load():
		more, less = 0, 4
	case w.used.Load() < 60:
		more, less = 4, 0
	}
	if volumes < 3 {
		return w.create
	}
	choices := []choice{
		{more * max(0, 12*(w.snapshots-snapshots)) / w.snapshots, w.snapshot},
		{more * max(0, 6*(w.volumes-volumes)) / w.volumes, w.create},
		{more * max(0, 10*(w.volumes-volumes)) / w.volumes, w.clone},
		{more * max(0, 12*(w.volumes-volumes)) / w.volumes, w.importFile},
		{4*(snapshots/w.snapshots) + less*(1+4*snapshots/w.snapshots), w.removeSnapshot},
		{4*(volumes/w.volumes) + less, w.removeVolume},
		{1, w.rollback},
		{3, w.grow},
		{1, w.shrink},
		{2, w.renameVolume},
		{2, w.renameSnapshot},
		{3, w.export},
		{6, w.chore},
	}
	sum := 0
	for _, c := range choices {
		sum += c.weight
	}
	for k := r.IntN(sum); ; choices = choices[1:] {
		if k -= choices[0].weight; k < 0 {
			return choices[0].do
		}
	}
}

func (w *world) randomSize(r *rand.Rand) int64 {
	size := (1 + r.Int64N(w.volumeSize)) << 20
	switch r.IntN(3) {
	case 0:
		size -= blockSize * r.Int64N(200)
	case 1:
		size -= 512 * r.Int64N(2000)
	}
	return size
}

// options are those of a new volume.
func options(r *rand.Rand) []string {
	return []string{"--compress", []string{"none", "s2", "s2", "s2", "zstd", "zstd:9"}[r.IntN(6)]}
}

// born puts new volumes or snapshots into the world, if they came to be.
func (w *world) born(o outcome, images map[string]*image) {
	switch {
	case o.doubt:
		w.maybe(strings.Join(o.args, " "), images)
	case o.code == exitOK:
		for name, im := range images {
			w.lookInto(name, im)
			w.put(name, im)
		}
	default:
		w.discard(images)
	}
}

// lookInto finds out what a new snapshot has of the requests that were under way.
func (w *world) lookInto(name string, im *image) {
	if !im.doubtful() {
		return
	}
	d, err := w.server.dial(name)
	if err == nil {
		err = im.settleAll(name, d)
		d.Abort()
	}
	if err != nil && !w.server.dying.Load() {
		w.fail(err)
	}
}

func (w *world) create(r *rand.Rand) {
	name := w.name(r, "")
	if name == "" {
		return
	}
	size := w.randomSize(r)
	im, err := newImage(w.path(), size)
	if err != nil {
		w.fail(err)
		return
	}
	o := w.do(append([]string{"create", name, "--size", fmt.Sprint(size)}, options(r)...), exitFull)
	w.born(o, map[string]*image{name: im})
}

func (w *world) clone(r *rand.Rand) {
	from, snap := w.use(r, true)
	if snap == nil {
		return
	}
	defer snap.users.RUnlock()
	if snap.doubtful() {
		return
	}
	name := w.name(r, "")
	if name == "" {
		return
	}
	im, err := snap.copy(w.path())
	if err != nil {
		w.fail(err)
		return
	}
	w.born(w.do([]string{"clone", from, name}, exitFull), map[string]*image{name: im})
}

// importFile imports a copy of a snapshot, or a new file. Sometimes the client is killed.
func (w *world) importFile(r *rand.Rand) {
	name := w.name(r, "")
	if name == "" {
		return
	}
	im, err := w.toImport(r)
	if err != nil {
		w.fail(err)
		return
	}
	args := append([]string{"import", im.path, name, "--format", "raw"}, options(r)...)
	w.born(w.doKilled(w.sometimes(r), args, exitFull), map[string]*image{name: im})
}

func (w *world) toImport(r *rand.Rand) (*image, error) {
	if _, snap := w.use(r, true); snap != nil {
		defer snap.users.RUnlock()
		if !snap.doubtful() && r.IntN(2) == 0 {
			return snap.copy(w.path())
		}
	}
	im, err := newImage(w.path(), w.randomSize(r))
	for off := int64(0); err == nil && off < im.size; off += 1 + r.Int64N(4<<20) {
		_, err = im.file.WriteAt(content(r, min(1<<20, im.size-off)), off)
	}
	return im, err
}

// sometimes returns after what time to kill a client; mostly 0, which is never.
func (w *world) sometimes(r *rand.Rand) time.Duration {
	if r.IntN(6) > 0 {
		return 0
	}
	return time.Duration(1 + r.Int64N(int64(time.Second)))
}

// snapshot takes snapshots of one to three volumes at one moment, while clients write to them.
func (w *world) snapshot(r *rand.Rand) {
	type part struct {
		im *image
		v  *variants
	}
	args, parts := []string{"snapshot"}, map[string]part{}
	for range 1 + r.IntN(3) {
		name, im := w.use(r, false)
		if im == nil {
			continue
		}
		defer im.users.RUnlock()
		if !im.shape.TryLock() { // it is one of these already, or is resized
			continue
		}
		defer im.shape.Unlock()
		snap := w.name(r, name)
		if snap == "" {
			continue
		}
		v, err := im.capture()
		if err != nil {
			w.fail(err)
			return
		}
		args, parts[snap] = append(args, snap), part{im, v}
	}
	if len(parts) == 0 {
		return
	}
	o := w.do(args, exitFull)
	taken := map[string]*image{}
	for name, p := range parts {
		var err error
		if taken[name], err = p.im.captured(p.v, w.path()); err != nil {
			w.fail(err)
			return
		}
	}
	w.born(o, taken)
}

// alone runs a command that is refused while its volume is open. The server may notice late that the last client has
// gone.
func (w *world) alone(args []string, also ...int) outcome {
	for end := time.Now().Add(patience / 3); ; time.Sleep(50 * time.Millisecond) {
		o := w.do(args, append(also, exitBusy)...)
		if o.doubt || o.code != exitBusy {
			return o
		}
		if time.Now().After(end) {
			w.fail(fmt.Errorf("%v: it is still busy", o))
			return o
		}
	}
}

func (w *world) rollback(r *rand.Rand) {
	name, im, release := w.seize(r, false, true)
	if im == nil {
		return
	}
	defer release()
	for _, from := range w.family(name) {
		if !isSnapshot(from) {
			continue
		}
		w.mu.Lock()
		snap := w.images[from]
		w.mu.Unlock()
		if snap.doubtful() {
			continue
		}
		o := w.alone([]string{"rollback", from}, exitFull)
		switch {
		case o.doubt:
			w.inDoubt("rollback "+from, func(names map[string]int64) error { return w.rolledBack(name, names[name], im, snap) })
		case o.code == exitOK:
			if err := im.become(snap); err != nil {
				w.fail(err)
			}
		}
		return
	}
}

// rolledBack finds out whether a volume is as before, or as the snapshot.
func (w *world) rolledBack(name string, size int64, im, snap *image) error {
	if size == im.size {
		if err := w.compare(name, im); err == nil || size != snap.size {
			return err
		}
	}
	if size != snap.size {
		return fmt.Errorf("%s has %d bytes; before it had %d, and the snapshot has %d", name, size, im.size, snap.size)
	}
	return im.become(snap)
}

// grow makes a volume larger while clients use it.
func (w *world) grow(r *rand.Rand) {
	name, im := w.use(r, false)
	if im == nil {
		return
	}
	defer im.users.RUnlock()
	if !im.shape.TryLock() {
		return
	}
	defer im.shape.Unlock()
	old := im.length()
	size := min(w.volumeSize<<20, old+512*r.Int64N(16<<11))
	tail := old / blockSize * blockSize
	if size <= old || !im.claim(tail, old-tail+1) {
		return
	}
	o := w.do([]string{"resize", name, fmt.Sprint(size)}, exitFull)
	im.release(tail, old-tail+1)
	w.resized(name, im, size, o)
}

func (w *world) resized(name string, im *image, size int64, o outcome) {
	switch {
	case o.doubt:
		old := im.length()
		w.inDoubt(strings.Join(o.args, " "), func(names map[string]int64) error {
			if names[name] == size && size != old {
				return im.resize(size)
			}
			return nil // the sizes of all are compared later
		})
	case o.code == exitOK:
		if err := im.resize(size); err != nil {
			w.fail(err)
		}
	}
}

func (w *world) shrink(r *rand.Rand) {
	name, im, release := w.seize(r, false, false)
	if im == nil {
		return
	}
	defer release()
	size := im.size - 512*r.Int64N(16<<11)
	if size < 1<<20 {
		return
	}
	w.resized(name, im, size, w.alone([]string{"resize", name, fmt.Sprint(size), "--shrink"}, exitFull))
}

func (w *world) renameVolume(r *rand.Rand)   { w.rename(r, false) }
func (w *world) renameSnapshot(r *rand.Rand) { w.rename(r, true) }

func (w *world) rename(r *rand.Rand, snapshot bool) {
	from, im, release := w.seize(r, snapshot, true)
	if im == nil {
		return
	}
	defer release()
	volume := ""
	if snapshot {
		volume = volumeOf(from)
	}
	to := w.name(r, volume)
	if to == "" {
		return
	}
	o := w.alone([]string{"rename", from, to}, exitFull)
	switch {
	case o.doubt:
		w.inDoubt("rename "+from+" "+to, func(names map[string]int64) error {
			_, is := names[to]
			_, was := names[from]
			switch {
			case is == was:
				return fmt.Errorf("%s is there: %v; %s is there: %v", from, was, to, is)
			case is:
				w.move(from, to)
			default:
				w.free(to)
			}
			return nil
		})
	case o.code == exitOK:
		w.move(from, to)
	default:
		w.free(to)
	}
}

func (w *world) removeVolume(r *rand.Rand)   { w.remove(r, false) }
func (w *world) removeSnapshot(r *rand.Rand) { w.remove(r, true) }

func (w *world) remove(r *rand.Rand, snapshot bool) {
	name, im, release := w.seize(r, snapshot, true)
	if im == nil {
		return
	}
	defer release()
	args, names := []string{"rm", name}, []string{name}
	if !snapshot {
		args, names = append(args, "-r"), w.family(name)
	}
	o := w.alone(args)
	switch {
	case o.doubt:
		w.inDoubt(strings.Join(args, " "), func(there map[string]int64) error {
			_, left := there[name]
			for _, n := range names {
				if _, ok := there[n]; ok != left {
					return fmt.Errorf("%s is there: %v; %s is there: %v", name, left, n, ok)
				} else if !left {
					w.drop(n)
				}
			}
			return nil
		})
	case o.code == exitOK:
		for _, n := range names {
			w.drop(n)
		}
	}
}
