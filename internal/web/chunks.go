package web

import (
	"fmt"

	"github.com/vdisk/vdisk/cow"
)

// maxCells is how many cells a map of chunks has at most.
const maxCells = 1024

// chunkMap is a map of the chunks of a store: a cell for each. If there are more chunks than maxCells, a cell stands for
// several that follow one another.
type chunkMap struct {
	Cells  []cell
	Each   int // chunks to a cell
	Chunks int
	Counts map[cow.ChunkKind]int
	Live   int64
	Files  int64
}

// cell is one or several chunks.
type cell struct {
	first, last  uint32 // slots
	chunks       int
	kind         cow.ChunkKind // of several, the first in kinds
	live, record int64
	size         int64
}

// kinds are the kinds of chunks, those first that a person looks for.
var kinds = []cow.ChunkKind{cow.ChunkDamaged, cow.ChunkCleaning, cow.ChunkOpen, cow.ChunkFull, cow.ChunkDead}

func rank(k cow.ChunkKind) int {
	for i, other := range kinds {
		if k == other {
			return i
		}
	}
	return len(kinds)
}

// add adds the next chunk.
func (m *chunkMap) add(c cow.ChunkInfo) {
	if m.Counts == nil {
		m.Counts, m.Each = map[cow.ChunkKind]int{}, 1
	}
	m.Chunks++
	m.Counts[c.Kind]++
	m.Live += c.LiveBytes
	m.Files += c.FileBytes
	one := cell{first: c.Slot, last: c.Slot, chunks: 1, kind: c.Kind, live: c.LiveBytes, record: c.RecordBytes, size: c.FileBytes}
	if n := len(m.Cells); n > 0 && m.Cells[n-1].chunks < m.Each {
		m.Cells[n-1].join(one)
		return
	}
	if len(m.Cells) == maxCells { // all cells are full: make each of two
		for i := range maxCells / 2 {
			m.Cells[i] = m.Cells[2*i]
			m.Cells[i].join(m.Cells[2*i+1])
		}
		m.Cells, m.Each = m.Cells[:maxCells/2], 2*m.Each
	}
	m.Cells = append(m.Cells, one)
}

func (c *cell) join(o cell) {
	c.last, c.chunks, c.live, c.record, c.size = o.last, c.chunks+o.chunks, c.live+o.live, c.record+o.record, c.size+o.size
	if rank(o.kind) < rank(c.kind) {
		c.kind = o.kind
	}
}

// levels is how many levels of filling the style sheet tells apart.
const levels = 20

// Class returns the classes of the cell: its kind, and how much of its file is live, in 1/levels. Some is never none.
func (c cell) Class() string {
	level := int64(0)
	if c.size > 0 {
		level = min(levels, (c.live*levels+c.size-1)/c.size)
	}
	return fmt.Sprintf("k-%s l%d", c.kind, level)
}

// Text says what the cell is.
func (c cell) Text() string {
	what := fmt.Sprintf("chunk %08x, %s", c.first, c.kind)
	if c.chunks > 1 {
		what = fmt.Sprintf("%d chunks, %08x to %08x", c.chunks, c.first, c.last)
	}
	return fmt.Sprintf("%s: %s live of %s in records, file %s", what, byteSize(c.live), byteSize(c.record), byteSize(c.size))
}
