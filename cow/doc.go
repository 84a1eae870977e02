// Package cow is the engine: a store of copy-on-write volumes over a log of compressed records, with a bbolt table that
// says where each block is in the log. DESIGN.md has the terms and the invariants, docs/engine.md the order of writes
// and syncs, docs/reclaim.md how space comes back.
//
// It is made for the programs of this module. What others can rely on is the meaning of a store on disk; the API may
// change with any minor version.
//
// # The way of a write
//
//	Device.WriteAt        write.go        cut into units; merge partial blocks; compress: no lock is held
//	  │
//	  ├─ Store.mu ─────────────────────────────────────────────────────────────────────────────
//	  │  Store.install      install.go    the commit point, of writers and of the cleaner:
//	  │    Log.Reserve      wal             wait for a buffer and a chunk, or for the cleaner; ErrNoSpace
//	  │    Cache.Lock       leafcache       the leaf that maps the block; if it was evicted, load it and begin again
//	  │    MakeWritable     leafcache       the leaf becomes one of the branch's present epoch
//	  │    Log.Append       wal             the next sequence number, a place in the chunk, a copy in the buffer
//	  │    Store.applyData  leafmap.go      the leaf's entry; what was there before is accounted dead
//	  ├────────────────────────────────────────────────────────────────────────────────────────
//	  ▼
//	acknowledged
//	  ┊  Log.drain          wal           the flusher writes full buffers to the chunk file, in order
//	  ┊  Log.Sync           wal           a flush: write the rest, fdatasync the chunks, write the durable mark
//	  ┊  Store.checkpoint   checkpoint.go changed leaves and rows go to the table in one transaction
//	  ┊  mover              cleaner_copy.go  the cleaner copies the live data of a chunk to the log's end
//
// Creating, snapshotting, cloning and deleting are events (event.go, volume.go), which are records too. [Open] replays
// what no checkpoint has (recover.go).
//
// # The way of a read
//
//	Device.PlanRead       read.go         for each block, its entry: from the leaf of the branch, or of its origins
//	ReadPlan.Fetch        read.go         from the log's buffers, the unit cache, or the chunk files
//	ReadPlan.Finish       read.go         verify, decompress, copy; holes are zeros
//
// # Checks and figures
//
// Store.Check (check.go) and Store.Usage (usage.go) make a checkpoint, and then read the table as it is in the package
// internal/audit.
//
// # Locks
//
// In this order; a goroutine that holds one takes only those below it:
//
//	Store.cleaner.mu → Store.checkpoints.mu → wal.Log.syncMu → wal.Log.writeMu → Store.mu → shard.mu → forwards.mu
//
// docs/engine.md, Locks and goroutines, says what each guards, and which locks take no other.
package cow
