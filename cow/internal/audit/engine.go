package audit

import (
	"github.com/vdisk/vdisk/format"
	"github.com/vdisk/vdisk/metadata"
)

// Engine is what a check needs of the engine.
type Engine interface {
	// Checkpoint makes a checkpoint, and returns the table as it then is. If the store can make none any more, the
	// table is as of the last one.
	Checkpoint() (State, error)

	// Begin returns the table as of the last checkpoint. A check that reads data asks for it again and again.
	Begin() (*metadata.Tx, error)

	// Interrupted returns an error if the check has to end.
	Interrupted() error

	// Hold takes a reference to the chunk that a row of the table describes. It returns nil if the chunk has gone since
	// that state of the table.
	Hold(row format.Chunk) Chunk

	// Sound is told of each record that was read and verified.
	Sound(Record)

	// ChunkName returns the name of the file of the chunk in a slot.
	ChunkName(slot uint32) string
}

// State is the table as of a checkpoint, with what checks it.
type State struct {
	Tx *metadata.Tx
	// Pages checks the table's pages. If its error matches format.ErrCorrupt, it is damage, which the check reports.
	Pages func() error
	// Copy checks the copy of the table, and has to be called. If its error matches metadata.ErrBadCopy, it is damage. sound
	// says that nothing else was found to be wrong with the table. If something was, the copy is not compared with it.
	Copy func(sound bool) error
}

// Chunk is a chunk with a reference that the check holds: its file can be read until Release.
type Chunk interface {
	// Header reads the header of the file.
	Header() (format.ChunkHeader, error)

	// Size returns the size of the file.
	Size() (int64, error)

	// ReadFull reads up to len(p) bytes at offset off. It reads fewer only at the end of the file.
	ReadFull(p []byte, off int64) (n int, err error)

	// HasDied reports whether the chunk has died. If it has, what was seen of its file means nothing.
	HasDied() bool

	// Release gives the reference back.
	Release()
}
