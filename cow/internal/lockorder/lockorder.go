// Package lockorder names the order of the engine's locks (docs/engine.md, The order of locks). A Mutex of it is a
// sync.Mutex. With the build tag lockcheck it also checks the order: it panics if a goroutine takes a lock while it
// holds one that comes later, or the same one.
package lockorder

// A level is a place in the order. A goroutine that holds a lock takes only locks of greater levels.
type level interface{ level() int }

// The levels, in order.
type (
	Cleaner     struct{} // Store.cleaner.mu
	Checkpoints struct{} // Store.checkpoints.mu
	Sync        struct{} // wal.Log.syncMu
	Write       struct{} // wal.Log.writeMu
	Store       struct{} // Store.mu
	Shard       struct{} // the mu of a shard of the cache of leaves
	Forwards    struct{} // forwards.mu
)

func (Cleaner) level() int     { return 1 }
func (Checkpoints) level() int { return 2 }
func (Sync) level() int        { return 3 }
func (Write) level() int       { return 4 }
func (Store) level() int       { return 5 }
func (Shard) level() int       { return 6 }
func (Forwards) level() int    { return 7 }
