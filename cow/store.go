package cow

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/vdisk/vdisk/format"
	"github.com/vdisk/vdisk/internal/storage"
	"github.com/vdisk/vdisk/metadata"
)

// File names in a store.
const (
	formatFile = "format"
	lockFile   = "lock"
	tableFile  = "meta.db"
	chunksDir  = "chunks"
)

// Store is an open store. Its methods may be called concurrently.
type Store struct {
	dir  string
	in   *storage.Folder // at dir
	info format.StoreInfo
	opts Options
	log  *slog.Logger
	lock *os.File // holds the flock; nil: there is none, and none is needed
	fs   storage.FS
	meta *metadata.DB

	readOnly error // why nothing can be written; nil: it can. Set by Open

	shared           *sharedBuffers // nil: the log's buffers are this process's
	lostAcknowledged bool           // see LostAcknowledged; set by Open
	// writeThrough: what is answered must be in the chunk files, as the buffers end with this process.
	writeThrough bool

	cache      *leafCache
	dirtyLimit int // leaves and images in one generation
	forwards   forwards
	slots      slotTable
	units      unitCache
	scratch    sync.Pool // *scratch
	unpacked   sync.Pool // *format.Leaf

	// mu orders every change: see docs/engine.md, Locks and goroutines.
	mu             sync.Mutex
	wal            *recordLog
	catalog        catalog
	gen            uint64     // of leaves that become dirty now
	frozen         *sync.Cond // gen has risen, or a checkpoint has failed
	dirty          []leafKey  // of generation gen
	unwritten      int        // dirty leaves and images of generation gen
	writing        int        // of the generation that a checkpoint writes
	writingRegions int        // of forwards, the same
	failures       uint64     // checkpoints that failed
	failure        error      // of the last of them
	dirtyRows      []*chunk
	pendingFree    int64                         // bytes of chunks that the checkpoint under way removes
	dirtyRegions   []*region                     // of generation gen
	pinnedStale    bool                          // names have been reaped since chunk.pinnedDead was counted
	catalogDirty   bool                          // a table changed since the last checkpoint
	dropping       map[metadata.Version]struct{} // given up by the reaper, still in the table
	closed         bool

	cleanMu          sync.Mutex // one cleans at a time; taken before ckptMu
	mover            *mover     // guarded by cleanMu
	cleaned          uint64     // bytes that the cleaner appended; guarded by mu
	cleaning         *chunk     // by the cleaner; guarded by mu
	cleanedBefore    uint64     // of cleaned, what was before this chunk; guarded by mu
	othersSeen       uint64     // bytes that others had, at the last look; guarded by cleanMu
	writersWaiting   bool       // writers wait for the cleaner; guarded by mu
	cleanerExhausted bool       // it can give nothing back, as things are; guarded by mu
	roomTaken        uint64     // chunks that data was given; guarded by mu
	cleanWork        chan struct{}
	pacer            pacer // of what others append, when the cleaner is pressed

	reads     atomic.Uint64
	coldMark  place      // everything before was gone over by the cold pass; guarded by mu
	coldNoted bool       // the table does not have coldMark; guarded by mu
	coldCodec *codecPool // of cold passes; nil before the first; guarded by mu

	ckptMu         sync.Mutex            // one checkpoint at a time; guards the fields below
	values         values                // of the checkpoint that runs
	lastAborted    bool                  // the last checkpoint has failed: memory may have what neither table nor log do, by the reaper
	untrimmed      []*chunk              // of the replayed log: more is allocated than they hold, and behind the replay position it goes
	pendingRemoval []*chunk              // dead, and not removed yet
	reapCursor     map[uint32]reapCursor // by branch; changes under mu, too

	committed atomic.Uint64 // generation of the last checkpoint that committed
	ckptAt    atomic.Uint64 // recordLog.appended at the last checkpoint

	ckptWork chan struct{}
	quit     chan struct{}
	wg       sync.WaitGroup
	tasks    sync.WaitGroup // long ones that callers run: Check, Clean and the like; Add under mu, while not closed

	recovery Recovery
}

// Recovery says what Open found behind the last checkpoint.
type Recovery struct {
	Records      int64 // replayed
	Bytes        int64 // replayed
	Summaries    int   // chunks of which only the summary was read
	DroppedBytes int64 // behind the first record that did not verify
	DroppedFiles int   // chunk files among them
	Lost         int64 // records among them that had been durable, and that Options.Repair gave up
	Damaged      int   // records that are in the log, and whose data cannot be read
	unsettled    bool  // a chunk has a summary of records that were dropped
}

// Recovery reports what this Open replayed and dropped.
func (s *Store) Recovery() Recovery { return s.recovery }

// OpenOver is Open with the chunk files in files, and not in the store's folder: for tests of this module whose disk
// fails.
func OpenOver(dir string, files storage.FS, o Options) (*Store, error) {
	o.fs = files
	return Open(dir, o)
}

// Open opens the store in dir and replays what its last checkpoint does not
// have. The caller owns the store until Close.
func Open(dir string, o Options) (*Store, error) {
	o.setDefaults()
	in, err := storage.OpenFolder(dir, o.Foreign)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("no store at %s: %w", dir, errors.Join(ErrNotFound, err))
	}
	if err != nil {
		return nil, fmt.Errorf("open store %s: %w", dir, err)
	}
	s, err := openIn(in, o)
	if err != nil {
		_ = in.Close() // unless release has
		return nil, err
	}
	return s, nil
}

// openIn opens the store in a directory, which is closed with it.
func openIn(in *storage.Folder, o Options) (*Store, error) {
	dir := in.Path()
	// The format is looked at first so that nothing is written, not even
	// a lock, into a directory that is not ours.
	info, err := readFormat(in)
	if errors.Is(err, fs.ErrNotExist) {
		if err := checkUninitialized(in); err != nil {
			return nil, err
		}
		return nil, fmt.Errorf("no store at %s: %w", dir, ErrNotFound)
	}
	if err != nil {
		return nil, err
	}
	readOnly := unwritable(in)
	var lock *os.File
	switch {
	case readOnly == nil:
		lock, err = lockStore(in, o.LockTimeout, o.Holder)
	case o.AllowReadOnly:
		lock, err = lockToRead(in, o.LockTimeout)
	default:
		err = fmt.Errorf("open store %s: %w", dir, readOnly)
	}
	if err != nil {
		return nil, err
	}
	s := &Store{
		dir: dir, in: in, info: info, opts: o, log: o.Logger.With("store", dir), lock: lock, readOnly: readOnly, fs: o.fs,
		catalog: newCatalog(), gen: 1, reapCursor: map[uint32]reapCursor{}, dropping: map[metadata.Version]struct{}{},
		ckptWork: make(chan struct{}, 1), cleanWork: make(chan struct{}, 1), quit: make(chan struct{}),
	}
	s.scratch.New = newScratch
	s.unpacked.New = func() any { return new(format.Leaf) }
	s.frozen = sync.NewCond(&s.mu)
	s.dirtyLimit = min(dirtyLimit(o.CacheBytes), 4*o.checkpointLeaves)
	s.forwards.load = s.loadForwards
	if s.cache, err = newLeafCache(o.CacheBytes, s.loadLeaf); err != nil {
		return nil, errors.Join(fmt.Errorf("open store %s: %w", dir, err), lock.Close())
	}
	if err := s.openChunks(); err != nil {
		return nil, errors.Join(fmt.Errorf("open store %s: %w", dir, err), s.release())
	}
	if err := s.openFiles(); err != nil {
		return nil, errors.Join(fmt.Errorf("open store %s: %w", dir, noSpace(err)), s.release())
	}
	if s.readOnly != nil {
		return s, nil
	}
	s.wg.Go(s.checkpointer)
	if s.opts.checkpointInterval >= 0 {
		s.wg.Go(s.cleanRoutine)
		if s.opts.ColdAfter > 0 {
			s.wg.Go(s.coldRoutine)
		}
	}
	return s, nil
}

// upgrade notes that the store is of this version from now on, before anything is written that an older program would
// misread.
func (s *Store) upgrade() error {
	if s.info.Version == format.StoreVersion || s.readOnly != nil {
		return nil
	}
	s.info.Version = format.StoreVersion
	text, err := s.info.Encode()
	if err != nil {
		return err
	}
	return s.in.Replace(formatFile, text, true)
}

// openChunks opens the folder of the chunks, and the reserve, so that there is room for what opening writes.
func (s *Store) openChunks() (err error) {
	in := s.fs // of the reserve and the durable mark
	if s.fs == nil {
		chunks, err := s.in.Sub(chunksDir)
		if err != nil {
			return err
		}
		if s.fs, in = chunks.Files(), s.in.Files(); s.readOnly != nil {
			s.fs, in = chunks.FilesToRead(), s.in.FilesToRead()
		}
	}
	uuid, err := s.info.ID()
	if err != nil {
		return err
	}
	s.wal = newRecordLog(s.fs, &s.mu, uuid, &s.slots)
	s.wal.durable = s.wal.mark.open(in, uuid, s.log)
	if s.readOnly != nil {
		return nil
	}
	if err := s.wal.stock.open(in); err != nil {
		s.log.Warn("the reserve cannot be used", "err", err)
	}
	s.makeElbowRoom()
	return nil
}

func (s *Store) openFiles() (err error) {
	uuid := s.wal.uuid
	s.meta, err = metadata.Open(s.in.Join(tableFile), metadata.Options{
		In: s.in, Store: uuid, Timeout: time.Second, NoSync: s.opts.noTableSync, Allocate: s.allocateTable,
		ReadOnly: s.readOnly != nil,
	})
	if err != nil {
		return unusable(err)
	}
	s.wal.kept, s.wal.workKept = s.kept, s.workKept
	s.wal.cleaner, s.wal.rotated = s.needRoom, func(p purpose) {
		s.cleanerExhausted = false // there was room: what filled it may have overwritten something
		if p == forData {
			s.roomTaken++
		}
		poke(s.cleanWork)
	}
	if s.readOnly != nil {
		return s.readLog()
	}
	settled, err := s.recoverSharedBuffers(uuid)
	if err != nil {
		return err
	}
	// Until here nothing was changed that a store of which one of the parts is missing, or another's, would miss.
	left, err := s.loadAndReplay()
	if err != nil {
		return unusable(err)
	}
	if s.onlyLooks(left) {
		return nil
	}
	if err := errors.Join(settled(), s.upgrade(), s.meta.Adopt()); err != nil {
		return err
	}
	s.wal.mark.begin(s.wal.durable)
	if s.opts.Outlive {
		s.outlive(uuid)
	}
	if err := s.sizeChunks(); err != nil {
		return err
	}
	s.fillReserve()
	s.wal.start()
	if err := s.resumeAfterReplay(left); err != nil {
		s.wal.stop()
		return err
	}
	return nil
}

// sizeChunks makes chunks small where there is little room: the cleaner needs one to work with, and frees whole ones.
func (s *Store) sizeChunks() error {
	s.wal.limit, s.wal.chunkBytes = s.opts.MaxBytes, s.opts.chunkBytes
	if s.wal.chunkBytes > 0 && s.wal.chunkBytes <= format.MaxChunkSize {
		return nil
	}
	free, err := s.fs.Free()
	if err != nil {
		return fmt.Errorf("free space of the store: %w", err)
	}
	room := free + s.slots.files + s.wal.stock.bytes()
	if s.wal.limit > 0 {
		room = min(room, s.wal.limit)
	}
	for s.wal.chunkBytes = format.MaxChunkSize; s.wal.chunkBytes > minChunkSize && s.wal.chunkBytes > room/128; {
		s.wal.chunkBytes /= 2
	}
	return nil
}

// resumeAfterReplay makes the log ready for records behind those that were replayed. What is behind its end goes
// before the next chunk is made, which also makes that durable. The checkpoint that a replay calls
// for can come later, unless a chunk is left with a summary of records that it does not have, or the cache had to
// become larger than it may be.
func (s *Store) resumeAfterReplay(left []leaving) error {
	r := &s.recovery
	if r.Records > 0 || len(left) > 0 || r.DroppedBytes > 0 {
		s.log.Info("replayed the log", "records", r.Records, "bytes", r.Bytes, "summaries", r.Summaries,
			"droppedBytes", r.DroppedBytes, "droppedFiles", r.DroppedFiles)
		poke(s.ckptWork)
	}
	if r.unsettled || s.cache.grown() {
		// A full disk is no reason to keep a store closed whose space others want to give back.
		if err := s.Checkpoint(); err != nil && (r.unsettled || !errors.Is(err, ErrNoSpace)) {
			return fmt.Errorf("checkpoint after replay: %w", err)
		}
	}
	return s.clear(left)
}

// release closes files and gives the lock back.
func (s *Store) release() error {
	errs := []error{s.slots.closeAll()}
	if s.wal != nil {
		errs = append(errs, s.wal.stock.close(), s.wal.mark.close())
	}
	if s.meta != nil {
		errs = append(errs, s.meta.Close())
	}
	if s.shared != nil { // not all of it is known to be in the files
		errs = append(errs, s.shared.close())
	}
	if s.fs != nil && s.opts.fs == nil {
		errs = append(errs, s.fs.Close())
	}
	if s.lock != nil {
		errs = append(errs, s.lock.Close())
	}
	return errors.Join(append(errs, s.cache.close(), s.in.Close())...)
}

// Close makes everything durable with a last checkpoint and gives the store
// up. Devices must be closed before (ErrBusy). After a failure of the log it only closes.
func (s *Store) Close() error {
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return ErrClosed
	}
	for _, v := range s.catalog.volumes {
		if v.writer || v.readers > 0 {
			s.mu.Unlock()
			return fmt.Errorf("close store: volume %s is open: %w", v.Name, ErrBusy)
		}
	}
	s.closed = true
	s.wal.close()
	s.frozen.Broadcast()
	s.mu.Unlock()
	close(s.quit)
	s.wg.Wait()
	s.tasks.Wait() // they end at quit
	if s.readOnly != nil {
		return s.release()
	}
	err := s.wal.err()
	if err == nil {
		// Also when the table cannot be written: the log alone is enough to go on from.
		err = errors.Join(s.finish(), s.wal.sync())
	}
	s.wal.stop()
	if err == nil {
		err = s.removeSharedBuffers()
	}
	return errors.Join(err, s.release())
}

// closeReaping bounds how long Close goes on giving space back; the next owner does the rest.
const closeReaping = 2 * time.Second

// finish writes the last checkpoint, lets the reaper work a little, and gives back
// what was allocated ahead.
func (s *Store) finish() error {
	s.mu.Lock()
	last := s.wal.retire()
	s.mu.Unlock()
	for until := time.Now().Add(closeReaping); s.changed() && time.Now().Before(until); {
		if err := s.checkpoint(); err != nil {
			return err
		}
	}
	return s.trim(last)
}

// trim gives back what was allocated ahead: the rest of the last chunk, and the
// chunk made in advance.
func (s *Store) trim(last *chunk) error {
	s.wal.waitIdle()
	s.mu.Lock()
	var err error
	if last != nil && s.slots.get(last.slot) == last {
		err = last.file.Truncate(int64(last.size))
	}
	if c := s.wal.next; c != nil {
		s.slots.remove(c.slot)
		err = errors.Join(err, c.file.Close(), s.fs.Remove(c.name()))
	}
	s.mu.Unlock()
	_, perr := s.wal.pool.empty()
	return errors.Join(err, perr)
}

// usable refuses changes to a store that is closed or has failed. mu is held.
func (s *Store) usable() error {
	if s.closed {
		return ErrClosed
	}
	return s.wal.err()
}
