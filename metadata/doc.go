// Package metadata is the durable allocation table of a store: a bbolt file. It holds the volumes, snapshots and
// branches, every version of every leaf, and the accounting of the chunks, all as of one place in the log.
//
// The package serves this module only, and promises no stability to anybody outside of it: any identifier may change or
// go in any version.
//
// The table is a checkpoint, and never on the path of a write. The engine changes memory and the log, and brings the
// table up to date from time to time, in one transaction for each checkpoint ([DB.Update]).
//
// # Buckets
//
// Package format has the bytes of the values. Integers in keys are big-endian, so that they sort. A number in
// parentheses is a size in bytes.
//
//	bucket       key                                        value
//	store        "checkpoint"                               format.Checkpoint
//	             "cold"                                     format.ColdMark
//	             "uuid"                                     CRC (4), the store's id (16)
//	             "sum"                                      sum (8) over all other keys and values
//	volumes      id (4)                                     format.Volume
//	snapshots    id (4)                                     format.Snapshot
//	branches     id (4)                                     format.Branch
//	leaves       branch (4), leaf (4), inverted epoch (4)   format.Leaf
//	changes      branch (4), epoch (4), leaf (4)            empty: the leaf has a version of that epoch
//	chunks       slot (4)                                   format.Chunk
//	forwarded    slot (4)                                   format.Forwarded
//	forwards     slot (4), region (2)                       format.Forward of each moved record in the region
//
// # Damage
//
// bbolt has checksums of its two meta pages only. It panics on other damage, and faults if its file was cut short.
// Every method here turns both into an error that matches format.ErrCorrupt. Code that uses a transaction of [DB.Begin]
// has to run in [Guard] for that. [Open] also verifies all pages of the file, once a boot; docs/format.md, The table,
// says why and how.
package metadata
