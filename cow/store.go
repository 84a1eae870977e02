package cow

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"math"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/vdisk/vdisk/cow/internal/fault"
	"github.com/vdisk/vdisk/cow/internal/leafcache"
	"github.com/vdisk/vdisk/cow/internal/lockorder"
	"github.com/vdisk/vdisk/cow/internal/wal"
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
	in   *storage.Folder // the folder at dir
	info format.StoreInfo
	opts Options
	log  *slog.Logger
	lock *os.File // holds the flock; nil: there is none, and none is needed
	fs   storage.FS
	copy storage.FS // holds the copy of the table; nil: none is kept
	meta *metadata.DB

	readOnly error // why nothing can be written, or nil; set by Open

	shared sharedLog

	reserve    wal.ReserveFile
	mark       wal.Mark
	cache      *leafcache.Cache
	dirtyLimit int // most dirty leaves and pre-images in one generation
	forwards   forwards
	slots      slotTable
	units      unitCache
	scratch    sync.Pool // *scratch
	unpacked   sync.Pool // *format.Leaf

	// mu orders every change: see docs/engine.md, Locks and goroutines.
	mu      lockorder.Mutex[lockorder.Store]
	wal     *wal.Log
	catalog catalog
	changes changes
	packed  packed // what was written to all volumes
	closed  bool

	// Each of these is guarded by a lock of its own or by mu, as its type says.
	checkpoints checkpoints
	copying     sync.Mutex // held while a new base of the table's copy is made
	cleaner     cleaner
	cold        coldState
	damage      damageRegister
	scrub       scrubber
	fill        fillWatch
	reads       atomic.Uint64

	quit  chan struct{}
	wg    sync.WaitGroup
	tasks sync.WaitGroup // long tasks of callers, such as Check and Clean; Add under mu, while not closed

	recovery Recovery
}

// OpenOver is Open with the chunk files in files instead of the store's folder. It is for tests of this module whose
// disk fails.
func OpenOver(dir string, files storage.FS, o Options) (*Store, error) {
	o.fs = files
	return Open(dir, o)
}

// openFolder opens the folder of a store. The error matches ErrNotFound if there is none.
func openFolder(dir string, foreign bool) (*storage.Folder, error) {
	in, err := storage.OpenFolder(dir, foreign)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("no store at %s: %w", dir, errors.Join(ErrNotFound, err))
	}
	if err != nil {
		return nil, fmt.Errorf("open store %s: %w", dir, err)
	}
	return in, nil
}

// Open opens the store in dir and replays what its last checkpoint does not have. The caller owns the store until
// Close.
func Open(dir string, o Options) (*Store, error) {
	o.setDefaults()
	in, err := openFolder(dir, o.Foreign)
	if err != nil {
		return nil, err
	}
	s, err := openIn(in, o)
	if err != nil {
		_ = in.Close() // in case release has not done it
		return nil, err
	}
	return s, nil
}

// openIn opens the store in a folder. The store's Close closes the folder.
func openIn(in *storage.Folder, o Options) (*Store, error) {
	dir := in.Path()
	// Read the format first, so that nothing is written, not even a lock, into a directory that is not ours.
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
	readOnly := cmp.Or(o.unwritable, unwritable(in))
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
	s, err := build(in, info, o, lock, readOnly)
	if err != nil {
		return nil, err
	}
	s.loadDamage()
	s.loadScrub()
	s.wg.Go(s.damageRoutine)
	if s.readOnly != nil {
		return s, nil
	}
	s.wg.Go(s.checkpointRoutine)
	s.wg.Go(s.failureRoutine)
	if s.opts.ScrubEvery != 0 {
		s.resumeScrub()
		s.scrub.started = true
		s.wg.Go(s.scrubRoutine)
	}
	if s.opts.checkpointInterval >= 0 {
		s.wg.Go(s.cleanRoutine)
		s.wg.Go(s.copyRoutine)
		if s.opts.ColdAfter > 0 {
			s.wg.Go(s.coldRoutine)
		}
	}
	return s, nil
}

// build makes the Store in a folder, up to the end of its log. It starts no goroutine that changes anything by itself.
// If it fails, it has closed the folder and given the lock back. The folder's lock, if there is one, is held.
func build(in *storage.Folder, info format.StoreInfo, o Options, lock *os.File, readOnly error) (*Store, error) {
	dir := in.Path()
	s := &Store{
		dir: dir, in: in, info: info, opts: o, log: o.Logger.With("store", dir), lock: lock, readOnly: readOnly, fs: o.fs,
		catalog: newCatalog(), damage: newDamageRegister(), quit: make(chan struct{}),
		changes:     changes{gen: 1, dropping: map[metadata.Version]struct{}{}},
		checkpoints: checkpoints{reapCursor: map[uint32]reapCursor{}, work: make(chan struct{}, 1)},
		cleaner:     cleaner{work: make(chan struct{}, 1)},
		fill:        fillWatch{work: make(chan struct{}, 1), due: math.MaxInt64},
	}
	s.scratch.New = newScratch
	s.unpacked.New = func() any { return new(format.Leaf) }
	s.changes.taken = sync.NewCond(&s.mu)
	s.dirtyLimit = min(leafcache.MostDirty(o.CacheBytes), 4*o.checkpointLeaves)
	s.forwards.load = s.loadForwards
	var err error
	if s.cache, err = leafcache.New(o.CacheBytes, s.loadLeaf); err != nil {
		return nil, errors.Join(fmt.Errorf("open store %s: %w", dir, err), lock.Close())
	}
	if err := s.openChunks(); err != nil {
		return nil, errors.Join(fmt.Errorf("open store %s: %w", dir, err), s.release())
	}
	if err := s.openFiles(); err != nil {
		return nil, errors.Join(fmt.Errorf("open store %s: %w", dir, fault.NoSpace(err)), s.release())
	}
	return s, nil
}

// upgrade raises the version of the store to this program's. It does so before anything is written that an older
// program would misread.
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

// openChunks opens the folder of the chunks, the durable mark and the reserve, and makes sure that there is room for
// what opening writes.
func (s *Store) openChunks() (err error) {
	in := s.fs // folder of the reserve and the durable mark
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
	if s.copy = s.opts.copyFS; s.opts.fs == nil && !s.opts.noCopy {
		s.copy = in
	}
	s.mark.Open(in, uuid, s.log)
	s.wal = wal.New(s.fs, &s.mu, uuid, logSpace{s}, &s.reserve, &s.mark)
	if s.readOnly != nil {
		return nil
	}
	if err := s.reserve.Open(in); err != nil {
		s.log.Warn("the reserve cannot be used", "err", err)
	}
	s.makeElbowRoom()
	return nil
}

// openFiles opens the table, takes over what a killed owner left in memory, replays the log, and makes the store ready
// to serve. A store that can only be read ends with readLog.
func (s *Store) openFiles() (err error) {
	uuid := s.wal.UUID()
	s.meta, err = metadata.Open(s.in.Join(s.opts.table), metadata.Options{
		In: s.in, Store: uuid, Timeout: time.Second, NoSync: s.opts.noTableSync, Allocate: s.allocateTable, Sync: s.opts.syncTable,
		ReadOnly: s.readOnly != nil, Distrust: s.opts.proves, Copy: s.copy, CopyLost: s.copyLost, SyncCopy: s.opts.syncCopy, WrongItem: wrongItem,
	})
	if err != nil {
		return unusable(err)
	}
	if err := s.opts.onTable(s.meta); err != nil {
		return err
	}
	if s.readOnly != nil {
		return s.readLog()
	}
	forget, err := s.recoverSharedBuffers(uuid)
	if err != nil {
		return err
	}
	// Nothing has been changed so far that a store with a missing part, or a part of another store, would need.
	left, err := s.loadAndReplay()
	if err != nil {
		return unusable(err)
	}
	if s.onlyLooks(left) {
		return nil
	}
	if err := errors.Join(forget(), s.upgrade(), s.meta.Adopt()); err != nil {
		return err
	}
	if err := s.mark.Begin(s.wal.Durable()); err != nil {
		return err
	}
	if s.opts.Outlive {
		s.outlive(uuid)
	}
	if err := s.sizeChunks(); err != nil {
		return err
	}
	s.fillReserve()
	s.wal.Start()
	if err := s.resumeAfterReplay(left); err != nil {
		s.wal.Stop()
		return err
	}
	return nil
}

// sizeChunks makes chunks smaller if there is little room: the cleaner needs a chunk to work with, and frees whole
// chunks.
func (s *Store) sizeChunks() error {
	s.wal.Limit, s.wal.ChunkBytes = s.opts.MaxBytes, s.opts.chunkBytes
	if s.wal.ChunkBytes > 0 && s.wal.ChunkBytes <= format.MaxChunkSize {
		return nil
	}
	free, err := s.fs.Free()
	if err != nil {
		return fmt.Errorf("free space of the store: %w", err)
	}
	room := free + s.slots.files + s.reserve.Bytes()
	if s.wal.Limit > 0 {
		room = min(room, s.wal.Limit)
	}
	for s.wal.ChunkBytes = format.MaxChunkSize; s.wal.ChunkBytes > wal.MinChunkSize && s.wal.ChunkBytes > room/128; {
		s.wal.ChunkBytes /= 2
	}
	return nil
}

// resumeAfterReplay prepares the log for records behind the replayed ones. It removes or sets aside the files behind
// the end of the log before the next chunk is made; making that chunk makes this durable, too. The checkpoint that a
// replay calls for can come later, except in two cases: a chunk keeps a summary of records that it does not have, or
// the cache had to grow beyond its limit.
func (s *Store) resumeAfterReplay(left []leaving) error {
	r := &s.recovery
	if r.Records > 0 || len(left) > 0 || r.DroppedBytes > 0 {
		s.log.Info("replayed the log", "records", r.Records, "bytes", r.Bytes, "summaries", r.Summaries,
			"droppedBytes", r.DroppedBytes, "droppedFiles", r.DroppedFiles)
		wal.Poke(s.checkpoints.work)
	}
	if r.unsettled || s.cache.Grown() {
		// A full disk is no reason to keep a store closed: its users may want to give back space.
		if err := s.Checkpoint(); err != nil && (r.unsettled || !errors.Is(err, ErrNoSpace)) {
			return fmt.Errorf("checkpoint after replay: %w", err)
		}
	}
	return s.clear(left)
}

// release closes all files and gives the lock back.
func (s *Store) release() error {
	errs := []error{s.slots.closeAll()}
	if s.wal != nil {
		errs = append(errs, s.reserve.Close(), s.mark.Close())
	}
	if s.meta != nil {
		errs = append(errs, s.meta.Close())
	}
	if s.shared.buffers != nil { // some of it may not be in the chunk files
		errs = append(errs, s.shared.buffers.close())
	}
	if s.fs != nil && s.opts.fs == nil {
		errs = append(errs, s.fs.Close())
	}
	if s.lock != nil {
		errs = append(errs, s.lock.Close())
	}
	return errors.Join(append(errs, s.cache.Close(), s.in.Close())...)
}

// Close makes everything durable with a last checkpoint and gives the store up. All devices must be closed first;
// otherwise Close returns ErrBusy. After a failure of the log it only closes the files.
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
	s.wal.Close()
	s.changes.taken.Broadcast()
	s.mu.Unlock()
	close(s.quit)
	s.wg.Wait()
	s.tasks.Wait() // they end when quit is closed
	s.saveDamage()
	if s.readOnly != nil {
		return s.release()
	}
	err := s.wal.Err()
	if err == nil {
		// Sync the log even if the table cannot be written: the log alone is enough to go on from.
		err = errors.Join(s.finish(), s.wal.Sync())
	}
	s.wal.Stop()
	if err == nil {
		err = s.removeSharedBuffers()
	}
	return errors.Join(err, s.release())
}

// closeReaping bounds the time that Close spends on giving space back. The next owner does the rest.
const closeReaping = 2 * time.Second

// finish writes the last checkpoint, lets the reaper work for up to closeReaping, and gives back what was allocated
// ahead.
func (s *Store) finish() error {
	s.mu.Lock()
	last := s.wal.Retire()
	s.mu.Unlock()
	for until := time.Now().Add(closeReaping); s.changed() && time.Now().Before(until); {
		if err := s.checkpoint(); err != nil {
			return err
		}
	}
	return s.trim(last)
}

// trim gives back what was allocated ahead: the rest of the last chunk, the chunk that was made in advance, and the
// pool.
func (s *Store) trim(last *wal.Chunk) error {
	s.wal.WaitIdle()
	s.mu.Lock()
	var err error
	if last != nil && s.isIn(last) {
		err = last.Truncate(last.Size)
	}
	err = errors.Join(err, s.wal.DropNext())
	s.mu.Unlock()
	_, perr := s.wal.Pool.Empty()
	return errors.Join(err, perr)
}

// usable returns an error if the store is closed or has failed. The caller holds mu.
func (s *Store) usable() error {
	if s.closed {
		return ErrClosed
	}
	return s.wal.Err()
}

// live is usable for callers that do not hold mu.
func (s *Store) live() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.usable()
}
