package cow

import (
	"log/slog"
	"time"

	"github.com/vdisk/vdisk/internal/storage"
)

// Options are for Open; the zero value is ready to use.
type Options struct {
	// LockTimeout is how long to wait for the store's lock.
	LockTimeout time.Duration
	// Holder names this owner in the lock file, as "vdisk serve".
	Holder string
	// Logger gets warnings, errors and what Open found (default: slog.Default()).
	Logger *slog.Logger
	// CacheBytes is the most memory that the block map takes (docs/memory.md, Memory): MinCacheBytes to MaxCacheBytes,
	// default 256 MiB.
	CacheBytes int64
	// ColdAfter is how long a leaf must not have changed before the cold pass writes it again, better compressed and in
	// order (default 10 min; negative: never).
	ColdAfter time.Duration
	// MaxBytes limits the size of all chunk files together; 0: the file system is the limit. Data that does not fit
	// waits for the cleaner, or fails with ErrNoSpace.
	MaxBytes int64
	// AllowReadOnly opens a store for reading that cannot be written to, because of its file system or its folder's
	// permissions: see Store.ReadOnly. Nothing is changed then. Without it that is an error that matches ErrReadOnly.
	AllowReadOnly bool
	// Look is for a command that only looks at the store. If the log ends before some of its records, an owner that
	// writes sets these aside; with Look they stay where they are, the store can only be read, as it is up to there, and
	// Store.ReadOnly says why.
	Look bool
	// Outlive keeps the log's buffers in shared memory, so that the next owner finds what was acknowledged if this
	// process is killed; see Store.SurvivesKill. Set it when clients outlive this process. It takes 16 MiB of shared memory;
	// if there is no room for them, writes are slower.
	Outlive bool
	// SharedMemory is the directory for that (default /dev/shm).
	SharedMemory string
	// ForgetElsewhere opens the store even if the writes that its last owner had acknowledged, and not written, are in
	// another shared memory than this one; they are given up. See ErrElsewhere.
	ForgetElsewhere bool
	// Foreign opens a store whose folder belongs to another user, or that other users may change (ErrForeign).
	Foreign bool
	// Repair is asked, before anything is changed, whether Open shall end a damaged log at the damage and set aside what
	// lies behind. Its error is Open's. Without Repair, Open returns the damage.
	Repair func(*LogDamage) error

	// The rest is for the tests of this package.

	fs storage.FS // the chunk files; nil: the store's folder

	// When a checkpoint begins: after so many bytes of log (default 256 MiB), after so many dirty leaves (default and at
	// most a part of the cache), or so long after a change (default 10 s; negative: never by itself).
	checkpointBytes    int64
	checkpointLeaves   int
	checkpointInterval time.Duration

	chunkBytes  int64         // size of a new chunk file (default 64 MiB, less where there is little room)
	reapBatch   int           // leaf versions that are reaped in one batch (default 32)
	reapTime    time.Duration // for how long a checkpoint begins another batch
	replayBatch int           // changes that Open applies at once (default 2 Mi)
	takeAll     bool          // new mappings may take what is kept for overwrites

	onCommit    func(done bool) error // called before and after each commit of the table; an error before lets it fail
	growTable   func(n int64) error   // called before the table's file grows by n bytes; an error keeps it from that
	noTableSync bool                  // the table is not synced
}

func (o *Options) setDefaults() {
	if o.CacheBytes <= 0 {
		o.CacheBytes = 256 << 20
	}
	o.CacheBytes = min(o.CacheBytes, MaxCacheBytes)
	if o.Logger == nil {
		o.Logger = slog.Default()
	}
	if o.checkpointBytes <= 0 {
		o.checkpointBytes = 256 << 20
	}
	if o.checkpointLeaves <= 0 {
		o.checkpointLeaves = dirtyLimit(o.CacheBytes) * 3 / 4
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
	if o.replayBatch <= 0 {
		o.replayBatch = batchMost
	}
	if o.SharedMemory == "" {
		o.SharedMemory = sharedMemory
	}
	if o.onCommit == nil {
		o.onCommit = func(bool) error { return nil }
	}
	if o.growTable == nil {
		o.growTable = func(int64) error { return nil }
	}
}

// MinMaxBytes is the least that Options.MaxBytes can be.
const MinMaxBytes = 64 << 20
