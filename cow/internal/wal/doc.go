// Package wal is the write-ahead log of the engine, which is also where the data stays: records in chunk files. A log
// appends records, writes and syncs them, makes the next chunk file before it is needed, and reads records back.
//
// # The way of a record
//
//	Reserve     log.go      waits for a buffer and a chunk that the record fits in
//	Append      log.go      sequence number, place in the chunk, copy in the active buffer
//	  cut       buffer.go   a full buffer goes to the queue
//	drain       write.go    the flusher writes the queue to the chunk files, in order
//	Sync        write.go    writes the rest, syncs each chunk file that was written to, and sets the durable mark
//	rotate      log.go      a full chunk is sealed, and its summary is queued; the log goes on in the next chunk
//	makeChunk   make.go     a new file, or one from the pool: header, sync of the file, sync of the folder
//
// A [Reader] reads the records of a chunk back, for the replay and for the cleaner. [Log.Read] reads a record that is
// still in a buffer.
//
// # What the log is given
//
// The log knows no volumes and no blocks, and it does not decide what is alive. It is given:
//
//   - the store's lock, mu. A change of the store is a record and the change in memory, in one critical section, so the
//     log appends under the caller's lock instead of one of its own. It gives the lock up only where it waits: Reserve.
//   - a [Space], the store's account of the chunks and of the room for them. The log asks it for slots and room, and
//     reports new, full and reused chunks to it.
//   - the [ReserveFile] and the [Mark], which the store opens and closes.
//
// # Locks
//
//	syncMu → writeMu → mu → bufMu
//
// A goroutine that holds one takes only those to the right of it.
package wal
