package cow

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/vdisk/vdisk/cow/internal/wal"
	"github.com/vdisk/vdisk/internal/storage"
	"github.com/vdisk/vdisk/internal/storage/crashfs"
	"github.com/vdisk/vdisk/internal/storage/crashtable"
	"github.com/vdisk/vdisk/internal/testwatch"
	"github.com/vdisk/vdisk/metadata"
)

func TestMain(m *testing.M) {
	flag.Parse()
	if flag.Lookup("test.bench").Value.String() == "" { // it takes as long as the rest of the copy
		wrongItem = func(err error) {
			go panic(fmt.Sprintf("the copy of the table is wrong: %v", err)) // in an Update it would become an error
			select {}
		}
	}
	os.Exit(testwatch.Run(m))
}

// crashHarness makes stores whose power can be cut. The chunk files are in a crashfs. The table is a real file, and has
// a copy in a crashfs of its own, which says what a power cut leaves of it.
type crashHarness struct {
	root   string
	format []byte // the file of every store here
	table  []byte // of an empty store

	mu   sync.Mutex
	idle []string // store directories that nobody uses
	made int

	states    atomic.Int64                // crash states verified
	inCommit  atomic.Int64                // of them, inside a commit of the table
	summaries atomic.Int64                // chunks that they replayed from the summary alone
	overOld   atomic.Int64                // chunks that they replayed over a former life of their file
	recycled  atomic.Int64                // files that became chunks again
	held      atomic.Int64                // of them, while a read that was planned held a chunk
	damaged   atomic.Int64                // crash states whose table was then damaged
	copyless  atomic.Int64                // of them, without a copy
	rebuilt   atomic.Int64                // of them, with a table that was made anew from the copy
	wrap      func(storage.FS) storage.FS // what stands between the engine and the disk; nil: nothing
}

// memoryDir is a directory in memory where there is one: a state costs a table file.
func memoryDir(t testing.TB) string {
	dir, err := os.MkdirTemp(testwatch.Memory(), "vdisk-cow-")
	if err != nil {
		return t.TempDir()
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func newCrashHarness(t testing.TB) *crashHarness {
	t.Helper()
	l := &crashHarness{root: memoryDir(t)}
	dir := filepath.Join(l.root, "template")
	if err := Create(dir); err != nil {
		t.Fatal(err)
	}
	// A table that was made without syncs is as small as can be: bbolt grows it with them only.
	table := filepath.Join(dir, "small")
	db, err := metadata.Open(table, metadata.Options{NoSync: true, Create: true})
	if err == nil {
		err = db.Close()
	}
	var err1, err2 error
	l.format, err1 = os.ReadFile(filepath.Join(dir, formatFile))
	l.table, err2 = os.ReadFile(table)
	if err := errors.Join(err, err1, err2); err != nil {
		t.Fatal(err)
	}
	return l
}

// dir gives a store directory out; its table is to be written.
func (l *crashHarness) dir() (string, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if n := len(l.idle); n > 0 {
		d := l.idle[n-1]
		l.idle = l.idle[:n-1]
		return d, nil
	}
	l.made++
	d := filepath.Join(l.root, fmt.Sprint(l.made))
	return d, errors.Join(os.Mkdir(d, 0o700), os.WriteFile(filepath.Join(d, formatFile), l.format, 0o600))
}

func (l *crashHarness) giveBack(dir string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.idle = append(l.idle, dir)
}

// crashImage is what a crash left behind, and what is known of what it must hold.
type crashImage struct {
	fs     *crashfs.FS
	table  tableImage
	m      *model
	floor  uint64 // number of the first record that the crash may have taken
	known  uint64 // number of the first record that a crash of the process may have taken; more than floor after one
	what   string
	memory *sharedImage // what a killed owner left in shared memory, or nil

	outlive bool // who opens it shares its buffers
}

// sharedImage is a store's owner file, and the head and the used part of each buffer.
type sharedImage struct {
	owner   ownerRecord
	head    []byte
	buffers [wal.BufferCount][]byte
}

// saveShared copies the shared memory of a store whose goroutines wait.
func (s *Store) saveShared() (*sharedImage, error) {
	text, err := os.ReadFile(filepath.Join(s.dir, ownerFile))
	if err != nil {
		return nil, err
	}
	m := &sharedImage{head: slices.Clone(s.shared.buffers.mem[:sharedHead])}
	for i := range m.buffers {
		m.buffers[i] = slices.Clone(s.shared.buffers.data(i)[:s.shared.buffers.head(i).Used.Load()])
	}
	return m, json.Unmarshal(text, &m.owner)
}

// restore puts it back, for a store that is not open.
func (m *sharedImage) restore(dir string) error {
	in, err := storage.OpenFolder(dir, false)
	if err != nil {
		return err
	}
	defer in.Close()
	s := &Store{dir: dir, in: in}
	r, err := s.newOwnerRecord()
	if err != nil {
		return err
	}
	r.Boot = m.owner.Boot
	f, err := os.OpenFile(filepath.Join(sharedMemory, "vdisk-"+r.Buffers), os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = f.WriteAt(m.head, 0)
	for i, b := range m.buffers {
		_, werr := f.WriteAt(b, int64(sharedHead+i*wal.BufferSize))
		err = errors.Join(err, werr)
	}
	return errors.Join(err, f.Truncate(sharedFileSize), f.Close(), s.writeOwner(r))
}

// crashInjector takes images of a modelStore while it works.
type crashInjector struct {
	mu     sync.Mutex
	rng    *rand.Rand
	every  int         // about one point in so many is taken
	dir    string      // of the store
	fs     *crashfs.FS // has the chunk files
	table  *crashfs.FS // has the table
	begun  bool        // a commit of the table has begun, and has not succeeded
	failed bool        // a sync of the table has failed
	m      *model
	floor  uint64
	known  uint64          // records before were replayed: they are in the files, durable or not
	seen   map[string]bool // states that were taken
	images []crashImage
}

// killed is a crash beside crashfs's choices: the process dies and the page cache lives on.
const killed = "SIGKILL"

// point may cut the power here.
func (c *crashInjector) point(what string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.rng.IntN(c.every) != 0 {
		return
	}
	if c.rng.IntN(6) == 0 {
		c.take(what, killed, c.fs.Clone, c.tableNow)
		return
	}
	choices := c.fs.Choices(c.rng.Uint64(), 3)
	c.rng.Shuffle(len(choices), func(i, j int) { choices[i], choices[j] = choices[j], choices[i] })
	tables := c.tableChoices()
	n := 1 + c.rng.IntN(2)
	if c.inside() {
		n += c.rng.IntN(2)
	}
	if c.rng.IntN(8) == 0 {
		n = 24 // now and then all
	}
	for _, ch := range choices[:min(n, len(choices))] {
		of := tables[c.rng.IntN(len(tables))]
		c.take(what, fmt.Sprintf("%v, of the table %v", ch, of),
			func() *crashfs.FS { return c.fs.Crash(ch) }, func() tableImage { return c.tableCut(of) })
	}
}

// take adds an image, unless nothing has happened since the same was taken.
func (c *crashInjector) take(what, choice string, make func() *crashfs.FS, table func() tableImage) {
	ops := 0
	for op := crashfs.OpCreate; op <= crashfs.OpSyncDir; op++ {
		ops += c.fs.Count(op) + c.table.Count(op)
	}
	key := fmt.Sprint(ops, choice)
	if c.seen[key] {
		return
	}
	c.seen[key] = true
	img := crashImage{table: table(), fs: make(), m: c.m, floor: c.floor, what: what + ", " + choice}
	if choice == killed {
		img.known = c.known
	}
	c.images = append(c.images, img)
}

// never is a rate of points at which no power is cut.
const never = 1 << 62

// rate sets about how many points there are to one that is taken.
func (c *crashInjector) rate(every int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.every = every
}

// drain returns the images taken so far.
func (c *crashInjector) drain() []crashImage {
	c.mu.Lock()
	defer c.mu.Unlock()
	images := c.images
	c.images = nil
	return images
}

// durable notes that every record before seq must survive.
func (c *crashInjector) durable(seq uint64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.floor = max(c.floor, seq)
}

// modelStore is an open store, its disk and its model.
type modelStore struct {
	harness  *crashHarness
	dir      string
	s        *Store
	m        *model
	injector *crashInjector
	devs     map[string]*Device // open for writing, by volume
	names    int                // made up so far
	writes   uint64             // contents made up so far
	buf      []byte
	held     *heldRead
	noRoom   bool // for the table
	table    *crashtable.Table
	failing  func(crashtable.Step) error // returns the error of a step of a commit; nil: none fails

	meanwhile func() error // called around commits of the table
}

// options are for a store of a few megabytes: chunks of half a megabyte, so that they come and go, and a reaper whose
// batches end often.
func (l *crashHarness) options(fs storage.FS) Options {
	return Options{
		fs: fs, checkpointInterval: -1, noTableSync: true, chunkBytes: 512 << 10, reapBatch: 3, replayBatch: 20,
		CacheBytes: 1 << 20, Logger: slog.New(slog.DiscardHandler),
		LockTimeout: 10 * time.Second, // a child that another test starts has the lock of a closed store until it executes its program
	}
}

// open recovers the store that a crash left and checks that it is at a place in its history that the crash may have
// left. Points during the recovery are taken too.
func (l *crashHarness) open(img crashImage, every int, rng *rand.Rand) (*modelStore, error) {
	dir, err := l.dir()
	if err != nil {
		return nil, err
	}
	if err := img.table.restore(dir); err != nil {
		return nil, err
	}
	if img.memory != nil {
		if err := img.memory.restore(dir); err != nil {
			return nil, err
		}
	}
	w := &modelStore{harness: l, dir: dir, m: img.m.fork(), devs: map[string]*Device{}, buf: make([]byte, 256<<10)}
	// Its own: hooks run on the engine's goroutines.
	c := &crashInjector{rng: rand.New(rand.NewPCG(rng.Uint64(), 2)), every: every, dir: dir, fs: img.fs, table: img.table.disk, failed: img.table.failed, m: img.m, floor: img.floor, seen: map[string]bool{}}
	w.injector = c
	img.fs.OnSync(func(name string) { c.point("at a sync of " + name) })
	fs := storage.FS(img.fs)
	if l.wrap != nil {
		fs = l.wrap(img.fs)
	}
	o := l.options(fs)
	if o.copyFS = fs; c.rng.IntN(12) == 0 {
		if err := w.loseTable(o, c.rng); err != nil {
			l.giveBack(dir)
			return nil, fmt.Errorf("make a lost table anew: %w", err)
		}
	}
	o.onCommit, o.Outlive = w.onCommit, img.outlive
	o.onTable, o.growTable, o.syncTable, o.syncCopy = w.onTable, w.growTable, w.syncTable, w.syncCopy
	if rng.IntN(2) == 0 {
		o.chunkBytes = 160 << 10 // logs of many chunks, with summaries
	}
	if w.s, err = Open(dir, o); err != nil {
		l.giveBack(dir)
		return nil, fmt.Errorf("open: %w", err)
	}
	w.s.cold.codec = quickCodec
	seq := w.seq()
	r := w.s.Recovery()
	if least := max(img.floor, img.known); seq < least || seq > w.m.next() || r.Lost > 0 {
		err := fmt.Errorf("the log goes on with record %d; %d to %d are possible (%+v)", seq, least, w.m.next(), r)
		return nil, errors.Join(err, w.kill())
	}
	l.summaries.Add(int64(r.Summaries))
	l.overOld.Add(overOld(w.s))
	// What has been seen once must stay when this process is killed. If power is cut, what was flushed.
	w.m.truncate(seq)
	c.mu.Lock()
	c.m, c.known = w.m, seq
	c.mu.Unlock()
	if rng.IntN(2) == 0 {
		if rng.IntN(2) == 0 { // what was replayed is dirty
			if err := w.s.Checkpoint(); err != nil {
				return nil, errors.Join(err, w.kill())
			}
		}
		w.s.cache.Restrict(3 + rng.IntN(4))
	}
	return w, nil
}

// onCommit cuts the power right before and right after a commit of the table. Within it, step does.
func (w *modelStore) onCommit(done bool) error {
	if w.meanwhile != nil {
		if err := w.meanwhile(); err != nil {
			return err
		}
	}
	if !done {
		w.injector.point("before a commit")
		if w.noRoom {
			return ErrNoSpace
		}
		return nil
	}
	w.injector.mu.Lock()
	w.injector.begun = false
	compare := w.injector.rng.IntN(32) == 0
	w.injector.mu.Unlock()
	if compare {
		if err := w.sameTable(); err != nil {
			return err
		}
	}
	w.injector.point("after a commit")
	return nil
}

func (w *modelStore) seq() uint64 {
	w.s.mu.Lock()
	defer w.s.mu.Unlock()
	return w.s.wal.NextSeq()
}

// kill ends the store as SIGKILL does, but for the goroutines and files of this process.
func (w *modelStore) kill() error {
	w.injector.rate(never) // what still happens is after the end
	err := w.letGo()
	close(w.s.quit)
	w.s.wg.Wait()
	w.s.wal.Stop()
	w.harness.recycled.Add(int64(w.s.wal.Pool.Reused()))
	err = errors.Join(err, w.s.release())
	if w.s.opts.Outlive { // the image that was taken has a copy
		err = errors.Join(err, os.Remove(filepath.Join(w.dir, ownerFile)), os.Remove(w.s.shared.buffers.path))
	}
	_ = os.Remove(filepath.Join(w.dir, damageFile)) // the next store in this folder is another one
	w.harness.giveBack(w.dir)
	return err
}

// leave is the image of the end of the process between two operations: all that was answered must be there, if the
// store's buffers outlive it.
func (w *modelStore) leave() (crashImage, error) {
	defer w.s.wal.HoldWrites()() // nothing is written meanwhile, and so no buffer is given back
	img := w.now("the process ended", w.injector.fs.Clone())
	if !w.s.SurvivesKill() {
		img.known = w.injector.known
		return img, nil
	}
	m, err := w.s.saveShared()
	img.memory, img.known = m, w.m.next()
	return img, err
}

// now is the image of a crash at this moment.
func (w *modelStore) now(what string, fs *crashfs.FS) crashImage {
	w.injector.mu.Lock()
	defer w.injector.mu.Unlock()
	return crashImage{fs: fs, table: w.injector.tableNow(), m: w.m, floor: w.injector.floor, what: what}
}

// same checks everything that can be read, and Check.
func (w *modelStore) same(readData bool) error {
	if err := same(w.s, w.m.now(), w.buf); err != nil {
		return err
	}
	return w.check(readData)
}

func (w *modelStore) check(readData bool) error {
	var problems []error
	_, err := w.s.Check(context.Background(), CheckOptions{ReadData: readData}, func(p Problem) {
		problems = append(problems, fmt.Errorf("check: %s: %s: %s", p.Kind, p.Where, p.What))
	})
	if len(problems) > 3 {
		problems = problems[:3]
	}
	return errors.Join(append(problems, err)...)
}

// verify opens an image and proves it: it is the state after some record that the crash may have left, it is sound, and
// it can be worked with and crash again.
func (l *crashHarness) verify(img crashImage, depth int, rng *rand.Rand) error {
	l.states.Add(1)
	if img.table.inside {
		l.inCommit.Add(1)
	}
	if err := l.verifyOne(img, depth, rng); err != nil {
		return fmt.Errorf("%s (durable before %d): %w", img.what, img.floor, err)
	}
	return nil
}

func (l *crashHarness) verifyOne(img crashImage, depth int, rng *rand.Rand) error {
	every := 24
	work := depth < 2 && rng.IntN(8) == 0
	if depth > 2 {
		every = never
	}
	w, err := l.open(img, every, rng)
	if err != nil {
		return err
	}
	// Names and contents as nobody else has made them.
	w.names, w.writes = (depth+1)*1_000_000, uint64(depth+1)<<40
	// Check would begin with a checkpoint: half of the time, work goes on without.
	err = same(w.s, w.m.now(), w.buf)
	if err == nil && (!work || rng.IntN(2) == 0) {
		err = w.check(rng.IntN(4) == 0)
	}
	if err == nil && work {
		w.injector.rate(6)
		for range 1 + rng.IntN(6) {
			o := randomOp(rng)
			if err = w.do(o); err != nil {
				err = fmt.Errorf("then %v: %w", o, err)
				break
			}
		}
		if err == nil {
			w.injector.rate(1)
			w.injector.point("then")
		}
	}
	images := w.injector.drain()
	if err := errors.Join(err, w.kill()); err != nil {
		return err
	}
	for _, again := range images {
		if err := l.verify(again, depth+1, rng); err != nil {
			return fmt.Errorf("%s; %w", img.what, err)
		}
	}
	return nil
}
