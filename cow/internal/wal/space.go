package wal

const (
	// Spare is the free space of the file system below which no chunk is made for data or for the cleaner: checkpoints,
	// deletes and discards use it to go on. The cleaner has room for one chunk more than data has.
	Spare = 64 << 20
	// MinChunkSize is the least size of a chunk for data, on a disk that is nearly full.
	MinChunkSize = 4 << 20
	// EventChunkSize is the size of a chunk for events, from the reserve.
	EventChunkSize = 1 << 20

	// eventRoom is the space that data leaves free at the end of a chunk while there is no next chunk, so that names
	// can be deleted and blocks discarded on a full disk.
	eventRoom = 64 << 10
)

// Purpose says what room in the log is wanted for. A higher purpose may use more of the space that is kept free.
type Purpose uint8

const (
	ForData   Purpose = iota
	ForMoves          // for the cleaner, which gives back more than it takes
	ForEvents         // for events and holes: deleting gives back room
)

// Space is the store's account of the chunks and of the room for them. The log asks it, and reports to it. The caller
// of each method but Held holds mu.
type Space interface {
	// FreeSlot returns a slot without a chunk; ok is false if there is none.
	FreeSlot() (slot uint32, ok bool)
	// FreeSlots returns the number of slots without a chunk.
	FreeSlots() int
	// Used returns the size of all chunk files.
	Used() int64
	// Held returns how much of the space that has to stay free the store holds already.
	Held() int64
	// ForCleaner returns the space that data leaves to the cleaner.
	ForCleaner() int64

	// Add puts a chunk into its slot, in place of the dead chunk that was there.
	Add(c *Chunk)
	// Drop makes a slot free.
	Drop(slot uint32)
	// Changed notes that the chunk's size or end has changed, or that it was sealed.
	Changed(c *Chunk)
	// Freed counts n bytes of a dead chunk whose file was removed or reused.
	Freed(n int64)

	// NeedRoom wakes the cleaner for a writer that finds no room. It returns false if the cleaner can give none.
	NeedRoom() bool
	// Rotated notes that the log goes on in a new chunk, which was made for p.
	Rotated(p Purpose)
}
