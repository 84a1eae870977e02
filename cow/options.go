package cow

import (
	"log/slog"
	"time"

	"github.com/vdisk/vdisk/internal/storage"
)

// Options are for Open; the zero value is ready to use.
type Options struct {
	FS          storage.FS    // the chunk files; nil: the store's directory
	LockTimeout time.Duration // how long to wait for the store's lock
	Holder      string        // what to say of this owner in the lock file, e.g. "vdisk serve"
	CacheBytes  int64         // the most that the map takes in memory (docs/memory.md, Memory); default 256 MiB, MinCacheBytes to MaxCacheBytes
	Logger      *slog.Logger  // default: slog.Default()

	// When a checkpoint begins: after so many bytes of log (default 256 MiB),
	// so many dirty leaves (default and at most a part of the cache, which see), so long after a
	// change (default 10 s; negative: never by time or size, for tests).
	CheckpointBytes    int64
	CheckpointLeaves   int
	CheckpointInterval time.Duration

	// ColdAfter is how long a leaf must not have changed for the cold pass to write it once more, compressed better
	// and in order (default 10 min; negative: never).
	ColdAfter time.Duration

	// MaxBytes limits what the chunk files take together; 0: the file system does. What has not room is cleaned for, or
	// fails with ErrNoSpace.
	MaxBytes int64

	// ChunkBytes is the size of a new chunk file (default 64 MiB, less where there is little room), ReapBatch how
	// many leaf versions the reaper looks at in each checkpoint (default: batches of 32, for 50 ms), and ReplayBatch
	// how many changes Open applies at once (default 2 Mi). Tests make them small, so that chunks come and go and
	// batches end often.
	ChunkBytes  int64
	ReapBatch   int
	ReplayBatch int
	reapTime    time.Duration // for how long a checkpoint begins another batch
	takeAll     bool          // new mappings may take what is kept for overwrites; for tests of the cleaner on stores of few chunks
	// AllowReadOnly opens a store that cannot be written to, because of its file system or of its folder's permissions,
	// to be read: see Store.ReadOnly. Nothing is changed then. Else that is an error, which matches ErrReadOnly.
	AllowReadOnly bool
	// Look is for a command that only looks at the store. Where the log ends before some of its records, which an owner
	// that writes would set aside, they stay where they are: the store can be read as it is up to there, and
	// Store.ReadOnly says why no more.
	Look bool
	// Outlive keeps the log's buffers in shared memory, so that the next owner finds what was answered when this
	// process is killed; see Store.Outlives. It costs 16 MiB of it; without them, writes are slower. For owners that
	// serve somebody who goes on when they die.
	Outlive bool
	// SharedMemory is the directory for that; default /dev/shm.
	SharedMemory string
	// ForgetElsewhere opens the store also when what its last owner had answered and not written is in another shared
	// memory than this one, and gives that up; see ErrElsewhere.
	ForgetElsewhere bool
	// Foreign opens a store whose directory belongs to another user, or that other users may change (ErrForeign).
	Foreign bool
	// Repair is asked, before anything is changed, whether Open shall go on where the log is damaged: it ends the log
	// there, and sets aside what lies behind. An error of its is Open's. Without it the damage is.
	Repair func(*LogDamage) error
	// OnCommit is called around each commit of the table, and with an error before it lets it fail: for tests that
	// cut the power.
	OnCommit func(done bool) error
	// GrowTable is called before the table's file becomes n bytes larger, and with an error keeps it from that: for
	// tests whose disk is not the file system's.
	GrowTable func(n int64) error
	// NoTableSync leaves out the table's own fdatasyncs: for tests that copy its file.
	NoTableSync bool
}

func (o *Options) setDefaults() {
	if o.CacheBytes <= 0 {
		o.CacheBytes = 256 << 20
	}
	o.CacheBytes = min(o.CacheBytes, MaxCacheBytes)
	if o.Logger == nil {
		o.Logger = slog.Default()
	}
	if o.CheckpointBytes <= 0 {
		o.CheckpointBytes = 256 << 20
	}
	if o.CheckpointLeaves <= 0 {
		o.CheckpointLeaves = dirtyLimit(o.CacheBytes) * 3 / 4
	}
	if o.CheckpointInterval == 0 {
		o.CheckpointInterval = 10 * time.Second
	}
	if o.ColdAfter == 0 {
		o.ColdAfter = 10 * time.Minute
	}
	if o.MaxBytes > 0 && o.MaxBytes < MinMaxBytes {
		o.MaxBytes = MinMaxBytes
	}
	if o.ReapBatch <= 0 {
		o.ReapBatch, o.reapTime = defaultReapBatch, defaultReapTime
	}
	if o.ReplayBatch <= 0 {
		o.ReplayBatch = batchMost
	}
	if o.SharedMemory == "" {
		o.SharedMemory = sharedMemory
	}
	if o.OnCommit == nil {
		o.OnCommit = func(bool) error { return nil }
	}
	if o.GrowTable == nil {
		o.GrowTable = func(int64) error { return nil }
	}
}

// MinMaxBytes is the least that Options.MaxBytes can be.
const MinMaxBytes = 64 << 20
