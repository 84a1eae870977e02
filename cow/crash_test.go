package cow

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/vdisk/vdisk/format"
	"github.com/vdisk/vdisk/internal/storage/crashfs"
	"github.com/vdisk/vdisk/internal/storage/crashtable"
	"github.com/vdisk/vdisk/internal/workload"
)

var crashStates = flag.Int64("crash.states", defaultCrashStates, "crash states that TestCrashStates goes through")

// op is one operation. The meaning of its numbers depends on what there is to operate on.
type op struct {
	kind    string
	a, b, c uint32
}

func (o op) String() string { return fmt.Sprintf("%s(%d, %d, %d)", o.kind, o.a, o.b, o.c) }

// opKinds are the operations, each as often as its weight says.
var opKinds = func() (kinds []string) {
	for kind, weight := range map[string]int{
		"write": 30, "discard": 4, "zero": 4, "flush": 4, "drain": 5, "read": 2,
		"create": 1, "snapshot": 6, "clone": 3, "unsnap": 4, "remove": 1, "rollback": 2, "rename": 2, "resize": 3,
		"checkpoint": 5, "reap": 1, "clean": 6, "cold": 7, "check": 1, "scrub": 2, "difference": 4, "send": 4, "misuse": 1, "space": 3, "hold": 3, "flatten": 3, "tag": 4, "property": 2, "churn": 3, "unpool": 1, "skip": 3, "uncommitted": 5, "beside": 5, "between": 3,
	} {
		kinds = append(kinds, slices.Repeat([]string{kind}, weight)...)
	}
	slices.Sort(kinds)
	return kinds
}()

// restarts are the operations that end one store and go on with another.
var restarts = []string{"reopen", "kill", "powercut", "failedcommit"}

func randomOp(r *rand.Rand) op {
	return op{opKinds[r.IntN(len(opKinds))], r.Uint32(), r.Uint32(), r.Uint32()}
}

// genOps makes runs of operations. Half of the runs have only a few kinds, which then meet far more often: some faults
// need three operations of rare kinds in a row.
func genOps() *rapid.Generator[[]op] {
	all := append(slices.Clone(opKinds), restarts...)
	return rapid.Custom(func(t *rapid.T) []op {
		kinds := all
		if rapid.Bool().Draw(t, "few") {
			kinds = append(rapid.SliceOfN(rapid.SampledFrom(append(slices.Compact(slices.Clone(opKinds)), restarts...)), 2, 8).Draw(t, "kinds"), "write", "flush")
		}
		one := rapid.Custom(func(t *rapid.T) op {
			return op{rapid.SampledFrom(kinds).Draw(t, "kind"), rapid.Uint32().Draw(t, "a"), rapid.Uint32().Draw(t, "b"), rapid.Uint32().Draw(t, "c")}
		})
		n := rapid.IntRange(1, 150).Draw(t, "n") // by itself, rapid prefers short ones
		return rapid.SliceOfN(one, n, n).Draw(t, "ops")
	})
}

// mix spreads the small numbers that rapid prefers over all numbers.
func mix(x uint32) uint64 { return uint64(x) * 0x9e3779b97f4a7c15 >> 16 }

// TestCrashStates runs random operations against the model. It cuts the power wherever something may be half done:
// before and after every sync, within commits of the table and recoveries, and between operations. It opens every state,
// and compares it with the model after exactly those records that survived. In a share of them it first damages the
// table, and makes it anew from the copy. It goes through -crash.states states; make crash-test has more.
func TestCrashStates(t *testing.T) {
	l := newCrashHarness(t)
	enough := *crashStates
	if testing.Short() {
		enough = min(enough, 2000)
	}
	start := time.Now()
	if err := flag.Set("rapid.nofailfile", "true"); err != nil { // the seed is enough to repeat a failure
		t.Fatal(err)
	}
	t.Run("workers", func(t *testing.T) {
		for i := range runtime.GOMAXPROCS(0) {
			t.Run(fmt.Sprint(i), func(t *testing.T) {
				t.Parallel()
				for l.states.Load() < enough && !t.Failed() {
					rapid.Check(t, l.crashProperty(enough))
				}
			})
		}
	})
	t.Logf("crash states: %d in %v, in which %d chunks were replayed from summaries, %d over a former life of their file; %d files were recycled, and %d reads held chunks meanwhile",
		l.states.Load(), time.Since(start).Round(time.Millisecond), l.summaries.Load(), l.overOld.Load(), l.recycled.Load(), l.held.Load())
	t.Logf("%d tables were damaged: %d had no copy, and %d were made anew", l.damaged.Load(), l.copyless.Load(), l.rebuilt.Load())
	if n := l.damaged.Load(); n > 100 && (l.rebuilt.Load() < n/4 || l.copyless.Load() > n/4) {
		t.Errorf("of %d damaged tables %d had no copy, and only %d could be made anew", n, l.copyless.Load(), l.rebuilt.Load())
	}
	if l.inCommit.Load() < l.states.Load()/50 {
		t.Errorf("only %d of %d states are inside a commit of the table", l.inCommit.Load(), l.states.Load())
	}
	// What the operations meet by chance is only asked for where there are so many that it cannot fail to happen.
	if n := l.states.Load(); n > 20000 && (l.summaries.Load() == 0 || l.overOld.Load() == 0) || n > 200000 && l.held.Load() == 0 {
		t.Error("no summary was ever read, no file recycled, or none while it was read")
	}
	if !t.Failed() {
		t.Logf("proof: crash states: %d", l.states.Load())
		t.Logf("proof: crash states inside a commit of the table: %d", l.inCommit.Load())
	}
	fmt.Printf("crash states: %d\n", l.states.Load())
}

// crashProperty stops making states when there are enough, unless it is shrinking a failure.
func (l *crashHarness) crashProperty(enough int64) func(*rapid.T) {
	var failed atomic.Bool
	return func(t *rapid.T) {
		done := func() bool { return l.states.Load() >= enough && !failed.Load() }
		if done() {
			return
		}
		ops := genOps().Draw(t, "ops")
		seed := rapid.Uint64().Draw(t, "seed")
		if at, err := l.run(ops, rand.New(rand.NewPCG(seed, 0)), done); err != nil {
			failed.Store(true)
			t.Fatalf("operation %d, %v: %v", at, ops[at], err)
		}
	}
}

// run does the operations on a new store until done returns true, and verifies every image as it is taken.
func (l *crashHarness) run(ops []op, rng *rand.Rand, done func() bool) (at int, err error) {
	w, err := l.open(crashImage{fs: crashfs.New(), table: l.newTable(), m: newModel(1, state{}), floor: 1, what: "new", outlive: true}, 6, rng)
	if err != nil {
		return 0, err
	}
	lazy := rng.IntN(3) == 0 // for long logs
	for at, o := range ops {
		if done() {
			break
		}
		if lazy && slices.Contains([]string{"checkpoint", "reap", "check", "scrub", "churn"}, o.kind) {
			o.kind = "flush"
		}
		if slices.Contains(restarts, o.kind) {
			if w, err = w.restart(o, rng); err != nil {
				return at, err
			}
		} else if err := w.do(o); err != nil {
			return at, errors.Join(err, w.kill())
		}
		w.injector.point("after " + o.kind)
		if rng.IntN(8) == 0 {
			img, err := w.leave()
			if err == nil {
				err = l.verify(img, 0, rng)
			}
			if err != nil {
				return at, errors.Join(err, w.kill())
			}
		}
		for _, img := range w.injector.drain() {
			if err := l.verify(img, 0, rng); err != nil {
				return at, errors.Join(err, w.kill())
			}
		}
		w.m.forget(w.injector.floor)
	}
	if err := w.same(true); err != nil {
		return len(ops) - 1, errors.Join(err, w.kill())
	}
	return len(ops) - 1, w.close()
}

// close closes the store for good and looks for files that it left open.
func (w *modelStore) close() error {
	err := w.letGo()
	for name := range w.devs {
		w.closeDevice(name)
	}
	err = errors.Join(err, w.s.sumsAgree(), w.event(w.s.Close()))
	w.harness.recycled.Add(int64(w.s.wal.Pool.Reused()))
	if n := w.injector.fs.Handles(); n != 0 {
		err = errors.Join(err, fmt.Errorf("%d files are left open", n))
	}
	w.harness.giveBack(w.dir)
	return err
}

// restart closes or kills the store, or cuts its power, and opens it again.
func (w *modelStore) restart(o op, rng *rand.Rand) (*modelStore, error) {
	choices := w.injector.fs.Choices(uint64(o.a), 4)
	var img crashImage
	var err error
	switch o.kind {
	case "reopen":
		// The images that are taken during Close are verified with this store's model.
		err = w.close()
		img = w.now("closed", w.injector.fs)
	case "kill":
		if img, err = w.leave(); err == nil {
			err = w.kill()
		}
	case "powercut":
		img = w.cut(choices[mix(o.b)%uint64(len(choices))])
		err = w.kill()
	case "failedcommit":
		if err = w.failCommit(o); err != nil {
			break
		}
		w.injector.point("after a commit that failed")
		if o.c%2 == 0 {
			img = w.cut(choices[mix(o.b)%uint64(len(choices))])
		} else if img, err = w.leave(); err != nil {
			break
		}
		err = w.kill()
	}
	if err != nil {
		return w, err
	}
	img.outlive = true
	before := w.injector.drain()
	next, err := w.harness.open(img, 6, rng)
	if err != nil {
		return w, fmt.Errorf("%s: %w", img.what, err)
	}
	next.names, next.writes = w.names, w.writes
	next.injector.images = append(before, next.injector.images...)
	if o.kind == "reopen" && next.s.Recovery() != (Recovery{}) {
		return next, fmt.Errorf("after Close, Open replayed %+v", next.s.Recovery())
	}
	err = same(next.s, next.m.now(), next.buf)
	if err == nil && rng.IntN(2) == 0 {
		err = next.check(false) // check begins with a checkpoint
	}
	if err != nil {
		return next, fmt.Errorf("%s: %w", img.what, err)
	}
	return next, nil
}

// do does an operation, first on the model and then on the store. Hooks may take images meanwhile.
func (w *modelStore) do(o op) error {
	if err := w.operate(o); err != nil {
		return err
	}
	if seq := w.seq(); seq != w.m.next() {
		return fmt.Errorf("the log is at record %d, the model at %d", seq, w.m.next())
	}
	return nil
}

// event does an operation that is durable when it returns.
func (w *modelStore) event(err error) error {
	if err == nil {
		w.injector.durable(w.m.next())
	}
	return err
}

func (w *modelStore) operate(o op) error {
	names := w.m.now().names()
	if o.kind == "create" && len(names) < 3 || len(names) == 0 {
		return w.create(o)
	}
	name := names[mix(o.a)%uint64(len(names))]
	v := w.m.now()[name]
	switch o.kind {
	case "write", "discard", "zero":
		return w.change(o, name, v.size)
	case "flush":
		d, err := w.device(name)
		if err != nil {
			return err
		}
		return w.event(d.Flush())
	case "drain": // written, but not synced
		return w.s.wal.WriteOut()
	case "read":
		return same(w.s, w.m.now(), w.buf)
	case "resize":
		return w.resize(o, name, v)
	case "checkpoint":
		return w.event(w.s.Checkpoint())
	case "reap":
		for range 12 {
			if err := w.event(w.s.Checkpoint()); err != nil {
				return err
			}
		}
		return nil
	case "clean":
		return w.clean(o)
	case "cold":
		return w.cold(o)
	case "check":
		// A store that has stopped can be checked too, but the check then makes nothing durable.
		return w.event(errors.Join(w.check(true), w.s.wal.Err()))
	case "scrub":
		return w.scrub()
	case "difference":
		return w.difference(o)
	case "send":
		return w.send(o, names)
	case "flatten":
		return w.flatten(o, name)
	case "misuse":
		return w.misuse(name)
	case "space":
		return w.space(o, name)
	case "hold":
		return w.hold(o, name, v.size)
	case "churn":
		return w.churn(o, name, v.size)
	case "uncommitted":
		return w.uncommitted(o, name)
	case "beside":
		return w.beside(o)
	case "between":
		return w.withChunk(o, w.cleanBetween)
	case "skip": // as if room was made for a record that then was not needed
		return w.s.skipChunk()
	case "unpool":
		_, err := w.s.wal.Pool.Empty()
		return err
	default:
		return w.administer(o, names, name)
	}
}

func (w *modelStore) newName(prefix string) string {
	w.names++
	return fmt.Sprint(prefix, w.names)
}

func (w *modelStore) create(o op) error {
	name, size := w.newName("v"), 1<<20+int64(mix(o.b)%2048)*512
	if o.c%8 == 7 {
		size = 4 << 20
	}
	codec := []format.Codec{format.S2, format.S2, format.Zstd, format.Raw}[mix(o.c)%4]
	w.m.create(name, size, codec)
	_, err := w.s.CreateVolume(name, VolumeOptions{Size: size, Codec: codec})
	return w.event(err)
}

func (w *modelStore) device(name string) (*Device, error) {
	if d := w.devs[name]; d != nil {
		return d, nil
	}
	d, err := w.s.OpenDevice(Ref{Volume: name}, false)
	if err == nil {
		w.devs[name] = d
	}
	return d, err
}

func (w *modelStore) closeDevice(name string) {
	if d := w.devs[name]; d != nil {
		_ = d.Close() // cannot be ErrClosed, since it is open
		delete(w.devs, name)
	}
}

// change writes, discards or zeroes a range.
func (w *modelStore) change(o op, name string, size int64) error {
	d, err := w.device(name)
	if err != nil {
		return err
	}
	align := []int64{1, 512, 512, 4096, 4096, 65536}[o.b%6]
	most := []int64{4096, 4096, 16384, 65536, 300 << 10}[o.c%5]
	off := int64(mix(o.b)) % size / align * align
	length := min(size-off, int64(mix(o.c))%most/align*align+min(align, 4096))
	switch o.kind {
	case "discard":
		w.m.discard(name, off, length)
		return d.Discard(off, length)
	case "zero":
		w.m.zero(name, off, length, o.a%2 == 0)
		return d.WriteZeroes(off, length, o.a%2 == 0)
	}
	p := make([]byte, length)
	w.writes++
	fill(p, int(mix(o.a^o.c)%6), rand.New(rand.NewPCG(w.writes, 1)))
	w.m.write(name, p, off)
	_, err = d.WriteAt(p, off)
	return err
}

// fill makes content that never existed before, of one kind after another: half compressible, incompressible, zeros,
// very compressible, and a mix of all.
func fill(p []byte, kind int, r *rand.Rand) {
	switch kind {
	case 0:
		workload.HalfCompressible(r, p)
	case 1:
		noise(p, r)
	case 2:
	case 3:
		copy(p, strings.Repeat(fmt.Sprintf("%x ", r.Uint64()), len(p)/8+1))
	case 5: // zstd makes this smaller than S2 does
		for len(p) > 0 {
			p = p[copy(p, fmt.Sprintf("%06x ", r.IntN(3000)*0x9e3779&0xffffff)):]
		}
	default:
		for len(p) > 0 {
			n := min(len(p), 512+r.IntN(24<<10))
			fill(p[:n], r.IntN(4), r)
			p = p[n:]
		}
	}
}

// clean cleans some chunk, as the cleaner does, and counts the records that it wrote.
func (w *modelStore) clean(o op) error {
	w.s.cleaner.mu.Lock()
	defer w.s.cleaner.mu.Unlock()
	return w.withChunk(o, func(c *chunk) error {
		_, err := w.s.cleanChunk(context.Background(), c, nil)
		w.catchUp()
		if err == nil && c.live > 0 && !c.damaged {
			err = fmt.Errorf("%d bytes live in chunk %s after it was cleaned", c.live, c.Name())
		}
		return err
	})
}

// withChunk calls fn with a chunk that may be cleaned, if there is one.
func (w *modelStore) withChunk(o op, fn func(*chunk) error) error {
	s := w.s
	s.mu.Lock()
	var cs []*chunk
	for _, c := range s.slots.all() {
		if s.slots.mayClean(c) {
			c.Acquire()
			cs = append(cs, c)
		}
	}
	s.mu.Unlock()
	if len(cs) == 0 {
		return nil
	}
	err := fn(cs[mix(o.b)%uint64(len(cs))])
	for _, c := range cs {
		c.Release()
	}
	return err
}

// beside makes the cleaner rewrite blocks of heads during a checkpoint, before its commit and after it: as many as it
// can without the checkpoint's lock. Some of the commits fail.
func (w *modelStore) beside(o op) error {
	before := w.m.next()
	w.noRoom = o.c%4 == 0
	w.meanwhile = func() error {
		o.b++
		return w.withChunk(o, w.rewriteHeads)
	}
	defer func() { w.noRoom, w.meanwhile = false, nil }()
	err := w.s.Checkpoint()
	switch {
	case err == nil:
		w.injector.durable(before) // records written beside the checkpoint are not durable
	case w.noRoom && errors.Is(err, ErrNoSpace):
		return nil
	}
	return err
}

func (w *modelStore) rewriteHeads(c *chunk) error {
	m := newMover(w.s)
	if err := m.begin(c); err != nil {
		return err
	}
	end, here := m.look()
	for here && m.r.Off < end {
		off := m.r.Off
		h, payload, err := m.r.Any()
		if err == nil && (h.Kind == format.KindData || h.Kind == format.KindMoved) {
			var r record
			if r, err = m.decode(h, payload, off); err == nil {
				_, _, err = m.moveOwn(&r)
				w.catchUp()
			}
		}
		if errors.Is(err, errFull) || errors.Is(err, ErrNoSpace) || errors.Is(err, ErrCorrupt) {
			return nil // not an error here: the cleaner handles it
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// cleanBetween cleans a chunk. Between looking at what a head has of a record and looking at what points have of it, it
// makes checkpoints, which reap.
func (w *modelStore) cleanBetween(c *chunk) error {
	m := newMover(w.s)
	if err := m.begin(c); err != nil {
		return err
	}
	end, here := m.look()
	for here && m.r.Off < end {
		off := m.r.Off
		h, payload, err := m.r.Any()
		if err != nil {
			return err
		}
		if h.Kind != format.KindData && h.Kind != format.KindMoved {
			continue
		}
		r, err := m.decode(h, payload, off)
		if err != nil {
			return err
		}
		for err = errChanged; errors.Is(err, errChanged); m.line = (lineage{}) {
			var rest bool
			_, rest, err = m.moveOwn(&r)
			w.catchUp()
			if err != nil || !rest {
				continue
			}
			if off%3 == 0 {
				if err := w.event(w.s.Checkpoint()); err != nil {
					return err
				}
			}
			_, err = m.moveHeld(&r)
			w.catchUp()
		}
		if errors.Is(err, errFull) {
			return nil
		}
		if err != nil {
			return err
		}
		end, here = m.look()
	}
	return nil
}

// uncommitted makes a checkpoint fail because the table finds no room, before it writes or while it does, and cleans
// meanwhile.
func (w *modelStore) uncommitted(o op, name string) error {
	w.noRoom = o.b%2 == 0
	if !w.noRoom {
		w.failAt(o.c%3, syscall.ENOSPC, crashtable.WritePage, crashtable.WriteMeta)
	}
	err := w.s.Checkpoint()
	never := w.noRoom
	w.noRoom, w.failing = false, nil
	switch {
	case err == nil && !never: // the reserve has given room, and the second attempt has succeeded
		w.injector.durable(w.m.next())
	case !errors.Is(err, ErrNoSpace):
		return fmt.Errorf("a checkpoint without room for the table: %w", err)
	}
	if err := w.clean(o); err != nil && !errors.Is(err, ErrNoSpace) {
		return err
	}
	d, err := w.device(name)
	if err != nil {
		return err
	}
	return w.event(d.Flush())
}
