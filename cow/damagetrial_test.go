package cow

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/vdisk/vdisk/format"
	"github.com/vdisk/vdisk/metadata"
)

// damage is one damage to a specimen.
type damage struct {
	what     string
	file     string            // the damaged file, which errors must name; "": several
	files    func(image) image // makes the damaged files
	m        *model            // what may be there; nil: the specimen's
	floor    uint64            // the least record that the store must go on with; 0: the specimen's
	gone     bool              // the file is missing: nothing has its name if the log goes on there
	harmless bool              // nothing may be noticed

	// undo takes the damage back from the content that the file has after the store was used (nil: there is none). It
	// returns false if the file has become another one. A nil undo: it cannot be taken back.
	undo func(now []byte) ([]byte, bool)

	// spare: the check reports a damaged record. If the record was moved there from a chunk that still
	// exists, it is read from that one, as long as that one exists.
	spare bool
}

// outcomes count what became of damages, by structure.
type outcomes struct {
	mu     sync.Mutex
	counts map[string]*[4]int
}

const (
	refused  = iota // Open did
	partly          // some blocks cannot be read; the others are right
	reported        // everything is right, and a check reports the damage
	right           // everything is right, and nothing is reported
)

func (o *outcomes) add(what string, outcome int) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.counts[what] == nil {
		o.counts[what] = new([4]int)
	}
	o.counts[what][outcome]++
}

func (o *outcomes) String() string {
	var b strings.Builder
	for _, what := range slices.Sorted(maps.Keys(o.counts)) {
		n := o.counts[what]
		fmt.Fprintf(&b, "\n%-36s refused %5d, read in part %5d, only reported %5d, without effect %5d", what, n[refused], n[partly], n[reported], n[right])
	}
	return b.String()
}

// blocks are blocks of volumes and snapshots that cannot be read, and why.
type blocks map[string]error

// beyond returns an error about a block that is in b and not in others, or nil.
func (b blocks) beyond(others blocks) error {
	for k, why := range b {
		if others[k] == nil {
			return fmt.Errorf("%s cannot be read: %w", k, why)
		}
	}
	return nil
}

// trial is a folder in which damaged stores are opened, one after the other.
type trial struct {
	dir string
	buf []byte
}

// trialLimit is how long one damage may take, in ticks; it is far more than any takes. A machine that stands still for a
// while misses ticks.
const (
	trialLimit = 60
	trialTick  = 2 * time.Second
)

// run damages a specimen and proves what must hold. It ends the process, with the stacks of all goroutines, if that
// takes too long.
func (tr *trial) run(x *specimen, d *damage) (outcome int, err error) {
	done := make(chan struct{})
	defer close(done)
	go func() {
		tick := time.NewTicker(trialTick)
		defer tick.Stop()
		for range trialLimit {
			select {
			case <-done:
				return
			case <-tick.C:
			}
		}
		debug.SetTraceback("all")
		panic(fmt.Sprintf("%s, %s: it hangs", x.name, d.what))
	}()
	if outcome, err = tr.prove(x, d); err != nil {
		err = fmt.Errorf("%s, %s: %w", x.name, d.what, err)
	}
	return outcome, err
}

func (tr *trial) prove(x *specimen, d *damage) (outcome int, err error) {
	img := d.files(x.files)
	if err := lay(tr.dir, img); err != nil {
		return 0, err
	}
	if err := tr.lookOnly(x, d, img); err != nil {
		return 0, fmt.Errorf("opened to be read: %w", err)
	}
	if d.file == tableFile {
		if err := tr.putBack(x, d, img); err != nil {
			return 0, err
		}
	}
	w, lost, outcome, err := tr.own(x, d, img)
	if err != nil || w == nil {
		return outcome, err
	}
	closed, err := tr.goOn(w, d, lost)
	if err != nil || !closed {
		return outcome, err
	}
	if err := tr.again(w.m, d, lost); err != nil {
		return outcome, fmt.Errorf("opened again: %w", err)
	}
	if d.undo == nil {
		return outcome, nil
	}
	path := filepath.Join(tr.dir, d.file)
	now, err := os.ReadFile(path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return outcome, err
	}
	if right, ok := d.undo(now); ok {
		if err := os.WriteFile(path, right, 0o600); err != nil {
			return outcome, err
		}
	}
	d.spare = false
	if err := tr.again(w.m, d, blocks{}); err != nil {
		return outcome, fmt.Errorf("without the damage: %w", err)
	}
	return outcome, nil
}

// lookOnly opens the store as one that can only be read. Nothing changes then.
func (tr *trial) lookOnly(x *specimen, d *damage, img image) error {
	o := specimenOptions()
	o.AllowReadOnly, o.unwritable = true, ErrReadOnly
	s, err := Open(tr.dir, o)
	if err != nil {
		return errors.Join(d.named(err), changed(tr.dir, img))
	}
	_, err = tr.compare(s, x, d)
	if err == nil {
		_, err = tr.check(s, d)
	}
	return errors.Join(err, s.Close(), changed(tr.dir, img))
}

// own opens the store as its owner, reads everything in it, and checks it. A nil store is one that was refused, of
// which nothing may have changed.
func (tr *trial) own(x *specimen, d *damage, img image) (w *modelStore, lost blocks, outcome int, err error) {
	w, err = onDisk(tr.dir, cmp.Or(d.m, x.m).fork(), specimenOptions())
	if err != nil {
		if d.harmless {
			return nil, nil, 0, err
		}
		return nil, nil, refused, errors.Join(d.named(err), changed(tr.dir, img))
	}
	lost, err = tr.compare(w.s, x, d)
	found := 0
	if err == nil {
		found, err = tr.check(w.s, d)
	}
	if err == nil && len(lost) > 0 && found == 0 {
		// The checkpoint with which a check begins gives back what was allocated ahead, up to the end of the records. So
		// a file that was cut may have got its zeros back.
		lost, err = tr.compare(w.s, x, d)
	}
	switch {
	case err != nil:
	case len(lost) > 0 && found == 0:
		err = fmt.Errorf("the check finds nothing, and %w", lost.beyond(nil))
	case d.harmless && len(lost)+found > 0:
		err = fmt.Errorf("%d blocks cannot be read, and the check finds %d problems", len(lost), found)
	}
	if err != nil {
		killStore(w.s)
		return nil, nil, 0, err
	}
	w.m.truncate(w.seq())
	d.spare = found > 0 && d.file != tableFile
	switch {
	case len(lost) > 0:
		return w, lost, partly, nil
	case found > 0:
		return w, lost, reported, nil
	default:
		return w, lost, right, nil
	}
}

// compare reads all that the store has and compares it with the model as of the record that the store goes on with. It
// returns the blocks that cannot be read.
func (tr *trial) compare(s *Store, x *specimen, d *damage) (blocks, error) {
	s.mu.Lock()
	seq := s.wal.NextSeq()
	s.mu.Unlock()
	floor, m := cmp.Or(d.floor, x.floor), cmp.Or(d.m, x.m)
	want, ok := m.at(seq)
	if !ok || seq < floor {
		return nil, fmt.Errorf("it goes on with record %d; %d to %d are possible (%+v)", seq, floor, m.next(), s.Recovery())
	}
	return tr.read(s, want, d)
}

// read compares all that the store has with a state. It returns the blocks that cannot be read.
func (tr *trial) read(s *Store, want state, d *damage) (lost blocks, err error) {
	lost = blocks{}
	names := map[string]bool{}
	for _, v := range s.Volumes() {
		names[v.Name] = true
		for _, sn := range v.Snapshots {
			names[v.Name+"@"+sn.Name] = true
		}
	}
	for name, v := range want {
		if err := tr.readDisk(s, Ref{Volume: name}, v.disk, d, lost); err != nil {
			return nil, err
		}
		delete(names, name)
		for sn, snap := range v.snaps {
			if err := tr.readDisk(s, Ref{name, sn}, snap, d, lost); err != nil {
				return nil, err
			}
			delete(names, name+"@"+sn)
		}
	}
	for name := range names {
		return nil, fmt.Errorf("%s should not exist", name)
	}
	return lost, nil
}

func (tr *trial) readDisk(s *Store, r Ref, want disk, d *damage, lost blocks) error {
	dev, err := s.OpenDevice(r, true)
	if err != nil {
		return err
	}
	defer dev.Close()
	if dev.Size() != want.size {
		return fmt.Errorf("%s has the size %d, not %d", r, dev.Size(), want.size)
	}
	for off := int64(0); off < want.size; off += int64(len(tr.buf)) {
		p := tr.buf[:min(int64(len(tr.buf)), want.size-off)]
		if _, err := dev.ReadAt(p, off); err == nil {
			if at := differ(p, want.blocks[off/format.BlockSize:]); at >= 0 {
				return fmt.Errorf("%s differs at byte %d", r, off+int64(at))
			}
			continue
		}
		for i := off / format.BlockSize; i*format.BlockSize < off+int64(len(p)); i++ { // all but the damaged ones must be right
			b := tr.buf[:min(format.BlockSize, want.size-i*format.BlockSize)]
			if _, err := dev.ReadAt(b, i*format.BlockSize); err != nil {
				if err := d.named(err); err != nil {
					return err
				}
				lost[fmt.Sprintf("%s block %d", r, i)] = err
			} else if differ(b, want.blocks[i:]) >= 0 {
				return fmt.Errorf("%s: block %d is wrong", r, i)
			}
		}
	}
	return nil
}

// check returns how many problems a check with data finds.
func (tr *trial) check(s *Store, d *damage) (found int, err error) {
	_, err = s.Check(context.Background(), CheckOptions{ReadData: true}, func(Problem) { found++ })
	if err == nil {
		return found, nil
	}
	return found + 1, d.named(err)
}

var chunkFileName = regexp.MustCompile(`\b[0-9a-f]{8}\b`)

// named returns nil if an error is about damage and says where it is. Otherwise it returns the error.
func (d *damage) named(err error) error {
	text := err.Error()
	isDamage := errors.Is(err, ErrCorrupt) || errors.Is(err, ErrNotStore) || errors.Is(err, ErrVersion) || errors.Is(err, ErrNotFound)
	var where bool
	switch {
	case d.file == "":
		where = chunkFileName.MatchString(text) || strings.Contains(text, "table") || strings.Contains(text, "log") || strings.Contains(text, "branch")
	case strings.HasPrefix(d.file, chunksDir):
		where = strings.Contains(text, filepath.Base(d.file)) || d.gone && strings.Contains(text, "the log is damaged")
	case d.file == tableFile:
		where = strings.Contains(text, "table") || strings.Contains(text, tableFile)
	default:
		where = strings.Contains(text, filepath.Base(d.file))
	}
	if isDamage && where {
		return nil
	}
	return fmt.Errorf("an error that does not say what is damaged: %w", err)
}

// putBack opens a store with a damaged table, reads everything, and kills that owner. With the right table,
// everything must be there then.
func (tr *trial) putBack(x *specimen, d *damage, img image) error {
	s, err := Open(tr.dir, specimenOptions())
	if err != nil {
		return nil // nothing has changed: own proves it
	}
	_, err = tr.compare(s, x, d)
	killStore(s)
	if err != nil {
		return err
	}
	err = errors.Join(os.WriteFile(filepath.Join(tr.dir, tableFile), x.files[tableFile], 0o600),
		os.RemoveAll(filepath.Join(tr.dir, tableFile+metadata.VerifiedSuffix)))
	if err == nil {
		s, err = Open(tr.dir, specimenOptions())
	}
	if err == nil {
		var lost blocks
		if lost, err = tr.compare(s, x, d); err == nil {
			err = lost.beyond(nil)
		}
		killStore(s)
	}
	if err != nil {
		return fmt.Errorf("with the right table: %w", err)
	}
	return lay(tr.dir, img)
}

// goOn works with an open store, and closes it. It reports whether that went well; it need not if the damage is in the
// way. What could be read before must still be there.
func (tr *trial) goOn(w *modelStore, d *damage, lost blocks) (closed bool, err error) {
	err = w.toil(lost)
	for name := range w.devs {
		w.closeDevice(name)
	}
	if err != nil {
		if err = d.named(err); err == nil {
			err = tr.noWorse(w.s, w.m.now(), d, lost)
		}
		killStore(w.s)
		return false, err
	}
	if err := tr.noWorse(w.s, w.m.now(), d, lost); err != nil {
		killStore(w.s)
		return false, fmt.Errorf("after work: %w", err)
	}
	if err := w.s.Close(); err != nil {
		return false, d.named(err)
	}
	return true, nil
}

// toil writes, takes and removes a snapshot, cleans, makes a cold pass and gives space back. A block that cannot be read
// cannot be read in a snapshot of it, either.
func (w *modelStore) toil(lost blocks) error {
	names := slices.Sorted(maps.Keys(w.m.now()))
	if len(names) == 0 {
		return nil
	}
	for _, name := range []string{names[0], names[len(names)-1]} {
		size := w.m.now()[name].size
		unit := bytes.Repeat([]byte(fmt.Sprintf("%7d ", w.m.next())), min(hotUnit, int(size)/format.BlockSize*format.BlockSize)/8)
		dev, err := w.device(name)
		if err != nil {
			return err
		}
		if _, err := dev.WriteAt(unit, 0); err != nil {
			return err
		}
		w.m.write(name, unit, 0)
		if err := dev.Flush(); err != nil {
			return err
		}
	}
	for sn := range w.m.now()[names[0]].snaps {
		r := Ref{names[0], sn}
		if err := w.release(r); err != nil {
			return err
		}
		if err := w.s.Remove(r, false); err != nil {
			return err
		}
		w.m.remove(r)
		break
	}
	r := Ref{names[0], "toil"}
	if err := w.s.Snapshot(r); err != nil {
		return err
	}
	w.m.snapshot(r)
	for b := range maps.Clone(lost) {
		if block, ok := strings.CutPrefix(b, names[0]+" "); ok {
			lost[r.String()+" "+block] = lost[b]
		}
	}
	if err := w.s.Checkpoint(); err != nil {
		return err
	}
	_, err := w.s.Cold(context.Background())
	if err == nil {
		_, err = w.s.Clean(context.Background(), 0)
	}
	w.catchUp()
	return err
}

// noWorse reads and checks everything once more: no other block may have become unreadable.
func (tr *trial) noWorse(s *Store, want state, d *damage, lost blocks) error {
	now, err := tr.read(s, want, d)
	if err != nil {
		return err
	}
	still := maps.Clone(now)
	if d.spare {
		clear(still)
	}
	if err := still.beyond(lost); err != nil {
		return err
	}
	found, err := tr.check(s, d)
	if err == nil && len(now) > 0 && found == 0 { // as in own
		now, err = tr.read(s, want, d)
	}
	if err == nil && len(now) > 0 && found == 0 {
		err = fmt.Errorf("the check finds nothing, and %w", now.beyond(nil))
	}
	return err
}

// again opens a store that was closed: it must open, and no other block may have become unreadable.
func (tr *trial) again(m *model, d *damage, lost blocks) error {
	s, err := Open(tr.dir, specimenOptions())
	if err != nil {
		return err
	}
	if err := tr.noWorse(s, m.now(), d, lost); err != nil {
		killStore(s)
		return err
	}
	return s.Close()
}
