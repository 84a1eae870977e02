package cow

import (
	"github.com/vdisk/vdisk/format"
	"github.com/vdisk/vdisk/metadata"
)

// checkEngine is what a check needs of the engine.
type checkEngine interface {
	// checkpoint makes a checkpoint, and returns the table as it then is. pages checks the table's pages. An error
	// of it that matches format.ErrCorrupt is damage that the check reports.
	checkpoint() (tx *metadata.Tx, pages func() error, err error)

	// begin returns the table as of the last checkpoint.
	begin() (*metadata.Tx, error)

	// interrupted returns an error if the check has to end.
	interrupted() error

	// hold returns the chunk that a row of the table describes, or nil if it has gone since that state of the table.
	// The chunk's file stays until the chunk is released.
	hold(row format.Chunk) checkedChunk

	// chunkName returns the name of the file of the chunk in a slot.
	chunkName(slot uint32) string
}

// checkedChunk is a chunk that is held.
type checkedChunk interface {
	// header reads the header of the file.
	header() (format.ChunkHeader, error)

	// size returns the size of the file.
	size() (int64, error)

	// read reads up to len(p) bytes at offset off. It reads fewer only at the end of the file.
	read(p []byte, off int64) (n int, err error)

	// hasDied reports whether the chunk has died. If it has, what was seen of its file means nothing.
	hasDied() bool

	release()
}
