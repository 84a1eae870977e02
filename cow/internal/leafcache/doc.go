// Package leafcache keeps the leaves of a store's map in memory: those that were looked up lately, and those that have
// changed since the last checkpoint. DESIGN.md has the terms, docs/memory.md the sizes.
//
// # Leaves
//
// A leaf in memory is merged: it has the entries of its branch's newest version, and below it those of everything
// older. So a look-up goes to one leaf, whatever the depth of snapshots and clones. The leaf of a head changes, the
// leaf of a point does not; [Key] names either.
//
//   - A clean leaf is the same in the table. It is packed, and may be evicted at any time.
//   - A dirty leaf is to be written by the next checkpoint. It is open, which means that it can be changed in place,
//     and it is never evicted.
//   - A pre-image is an older state of a dirty leaf that a checkpoint still has to write: see preimage.go.
//
// The dirty leaves and pre-images since the last checkpoint began are a [Generation]. The way of a change:
//
//	Cache.Ensure          load.go        loads the leaf if it is not in memory; no lock is held
//	Cache.Lock            locked.go      locks it; if it was evicted meanwhile, the caller begins again
//	Locked.MakeWritable   locked.go      unpacks it, leaves a pre-image if need be, and makes it dirty
//	Cache.Begin           generation.go  a checkpoint takes what is dirty
//	Generation.Each       generation.go  and writes it,
//	Generation.Finish     generation.go  after which the leaves are clean, and the pre-images go
//
// # What the cache is given
//
// The cache knows no volumes, and no table. It is given:
//
//   - a function that loads a leaf. [Cache.Newest] tells this function what memory has; it looks in memory before it
//     looks in the table, because a version leaves memory only after the table has it.
//   - of each branch a [Branch], which the catalog's branch holds: what never changes, and a count of the cache's own.
//     A branch's present epoch changes under the store's lock. So the cache does not keep it: the caller, which holds
//     that lock, passes it to each call that needs it.
//
// The cache does not count live and dead entries. Code that changes the content of a leaf does that itself.
//
// # Memory
//
// The cache is divided into shards by a hash of branch and index. The memory of a shard lies outside of Go's heap
// (memory.go). It consists of the buckets of a hash table, and of segments, which leaves are appended to one after
// another (arena.go). Leaves refer to one another by handles. A leaf moves when its segment is compacted, when others
// in its segment are evicted, and when it is opened. So no leaf may be used without its shard's lock, and each
// allocation in the shard may move all others in it.
//
// # Locks
//
//	the store's lock → shard.mu
//
// The store's lock, Store.mu, orders all changes. It guards the list and the number of what is dirty. shard.mu guards
// all that a shard has: which leaves and pre-images there are, where they are, and what they are, except for the bit
// that says that a leaf was used. So the content, the epoch and the generation of a leaf change under both locks. Only
// Generation.Finish, which makes leaves clean, does without the store's. Nobody holds the locks of two shards. No lock
// is held while a leaf is loaded, but the caller may hold the store's lock.
//
//	who holds                              may call
//	the store's lock                       Unwritten, Begin, Abort, Forget; IsWritable, MakeWritable, AddPreimage; and
//	                                       may change the content that MakeWritable and AddPreimage return
//	that, while no generation is written   Reopen, DropVersion; and may change what Reopen and Preimage return
//	the lock of checkpoints                Each, Finish
//	any of these, or none                  everything else
//
// A generation is written from Begin to Finish or Abort, under the lock of checkpoints (Store.checkpoints.mu). So the
// reaper, which holds both locks, meets no generation that is being written.
//
// A replay is alone with the cache, on several goroutines. A lock of its own takes the place of the store's there. It
// is taken for MakeWritable only, under the lock of a shard.
package leafcache
