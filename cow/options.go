package cow

import (
	"log/slog"
	"os"
	"time"

	"github.com/vdisk/vdisk/cow/internal/leafcache"
	"github.com/vdisk/vdisk/internal/storage"
	"github.com/vdisk/vdisk/metadata"
)

// MinCacheBytes and MaxCacheBytes bound Options.CacheBytes: values beyond them are taken for the nearest one.
const (
	MinCacheBytes = leafcache.MinBytes
	MaxCacheBytes = leafcache.MaxBytes
)

// Options are the options of Open; the zero value is ready to use.
type Options struct {
	// LockTimeout is how long to wait for the store's lock.
	LockTimeout time.Duration
	// Holder names this owner in the lock file, for example "vdisk serve".
	Holder string
	// Logger gets warnings, errors and what Open found (default: slog.Default()).
	Logger *slog.Logger
	// CacheBytes is the most memory that the block map may take (docs/memory.md): MinCacheBytes to MaxCacheBytes,
	// default 256 MiB.
	CacheBytes int64
	// ColdAfter is the time after which an unchanged leaf is rewritten by the cold pass, better compressed and in order
	// (default 10 min; negative: never).
	ColdAfter time.Duration
	// ScrubEvery is the time from the beginning of one scrub to the beginning of the next. If it is negative, no scrub begins
	// by itself, but one that an earlier owner did not end goes on. If it is 0, only StartScrub begins one or goes on.
	ScrubEvery time.Duration
	// MaxBytes limits the total size of the chunk files; 0: the file system is the limit. Data that does not fit waits
	// for the cleaner, or fails with ErrNoSpace.
	MaxBytes int64
	// Reserve is how many bytes new data leaves, beside what the store keeps in any case, to everything else: names,
	// overwrites, and what gives space back.
	Reserve int64
	// AllowReadOnly opens a store only for reading if this process cannot write to it, because of its file system or
	// its permissions: see Store.ReadOnly. Nothing is changed then. Without AllowReadOnly, Open returns an error that
	// matches ErrReadOnly.
	AllowReadOnly bool
	// Look is for commands that only look at the store. If the log ends before some of its records, an owner that
	// writes sets those records aside. With Look they stay where they are, and the store is opened read-only, as it is
	// up to that end; Store.ReadOnly says why.
	Look bool
	// Outlive keeps the log's buffers in shared memory, so that the next owner finds the acknowledged writes if this
	// process is killed; see Store.SurvivesKill. Set it when clients outlive this process. It takes 16 MiB of shared
	// memory; if there is no room for them, writes are slower.
	Outlive bool
	// SharedMemory is the directory for these buffers (default /dev/shm).
	SharedMemory string
	// Brief is for an owner that ends soon, and itself reports damage that it meets: the log has it only at the level Info.
	Brief bool
	// Notice, unless nil, is called when something happens to the store. It may be called as soon as Open has begun, by
	// several goroutines, which hold no lock that Store's methods take for long; it must not call Close.
	Notice func(Notice)
	// ForgetElsewhere opens the store even if writes that its last owner acknowledged but did not write are in a shared
	// memory other than this one. Those writes are given up. See ErrElsewhere.
	ForgetElsewhere bool
	// Foreign allows a store whose folder belongs to another user, or can be changed by other users (ErrForeign).
	Foreign bool
	// Repair is called before anything is changed if the log is damaged. If it returns nil, Open ends the log at the
	// damage and sets aside what lies behind it; otherwise Open returns Repair's error. Without Repair, Open returns
	// the damage.
	Repair func(*LogDamage) error

	// Replaced, unless nil, is called when RebuildTable or RestoreTable has replaced the table of the store in that folder.
	// The store can have no owner before it returns.
	Replaced func(*storage.Folder, *Rebuilt)

	// The fields below are for this package, most of them for its tests.

	fs         storage.FS // holds the chunk files; nil: the store's folder
	copyFS     storage.FS // holds the copy of the table; nil: there is none if fs is set
	noCopy     bool       // no copy of the table is kept
	table      string     // name of the table's file (default meta.db)
	proves     bool       // the store is only opened to find out whether that table is sound
	unwritable error      // why the store can only be read; nil: what the system says

	// syncCopy is metadata.Options.SyncCopy.
	syncCopy func(storage.File) (wait func() error)

	// A checkpoint begins after this many bytes of log (default 256 MiB), after this many dirty leaves (default and at
	// most a part of the cache), or this long after a change (default 10 s; negative: never by itself).
	checkpointBytes    int64
	checkpointLeaves   int
	checkpointInterval time.Duration

	now         func() time.Time // of snapshots (default Now)
	chunkBytes  int64            // size of a new chunk file (default 64 MiB, or less if there is little room)
	reapBatch   int              // leaf versions reaped in one batch (default 32)
	reapTime    time.Duration    // time during which a checkpoint begins further batches
	replayBatch int              // changes that Open applies at once (default 2 Mi)
	takeAll     bool             // new mappings may take what is kept for overwrites
	countWait   time.Duration    // how long opening a volume waits for its count (default 2 s)

	onCommit    func(done bool) error    // called before and after each commit; an error before fails it
	growTable   func(n int64) error      // called before the table's file grows by n bytes; an error prevents it
	noTableSync bool                     // do not sync the table
	syncTable   func(*os.File) error     // metadata.Options.Sync
	onTable     func(*metadata.DB) error // called when the table is open; an error prevents it
}

func (o *Options) setDefaults() {
	if o.CacheBytes <= 0 {
		o.CacheBytes = 256 << 20
	}
	o.CacheBytes = min(o.CacheBytes, MaxCacheBytes)
	if o.table == "" {
		o.table = tableFile
	}
	if o.Logger == nil {
		o.Logger = slog.Default()
	}
	if o.checkpointBytes <= 0 {
		o.checkpointBytes = 256 << 20
	}
	if o.checkpointLeaves <= 0 {
		o.checkpointLeaves = leafcache.MostDirty(o.CacheBytes) * 3 / 4
	}
	if o.checkpointInterval == 0 {
		o.checkpointInterval = 10 * time.Second
	}
	if o.ColdAfter == 0 {
		o.ColdAfter = 10 * time.Minute
	}
	if o.MaxBytes > 0 && o.MaxBytes < MinMaxBytes {
		o.MaxBytes = MinMaxBytes
	}
	if o.reapBatch <= 0 {
		o.reapBatch, o.reapTime = defaultReapBatch, defaultReapTime
	}
	if o.countWait <= 0 {
		o.countWait = defaultCountWait
	}
	if o.replayBatch <= 0 {
		o.replayBatch = batchMost
	}
	if o.SharedMemory == "" {
		o.SharedMemory = sharedMemory
	}
	if o.now == nil {
		o.now = Now
	}
	if o.Notice == nil {
		o.Notice = func(Notice) {}
	}
	if o.onCommit == nil {
		o.onCommit = func(bool) error { return nil }
	}
	if o.onTable == nil {
		o.onTable = func(*metadata.DB) error { return nil }
	}
	if o.growTable == nil {
		o.growTable = func(int64) error { return nil }
	}
}

// MinMaxBytes is the lowest limit that Options.MaxBytes can set.
const MinMaxBytes = 64 << 20
