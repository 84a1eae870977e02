package audit

import (
	"github.com/vdisk/vdisk/metadata"
)

// Pass reads and verifies the data of a store in small steps, in the order of the versions of leaves. The caller rests
// between two steps, and may go on in another process. What is written behind the place that a pass has come to is not
// read. What is moved there was verified when it was moved.
type Pass struct{ c *Checker }

// passSlice is for how long a step of a pass may keep a state of the table.
const passSlice = checkSlice / 4

// NewPass returns a pass that passes every violation to problem. Of an Engine, it uses neither Checkpoint nor
// ChunkName for more than reports.
func NewPass(e Engine, problem func(Problem)) *Pass {
	c := NewChecker(e, CheckOptions{ReadData: true}, problem)
	c.alone, c.Slice = true, passSlice
	return &Pass{c}
}

// FirstVersion is where a pass begins.
func FirstVersion() metadata.Version { return metadata.Version{Epoch: ^uint32(0)} }

// Step goes on from a version until it has read most bytes of records, or has worked for a while. It goes over at least
// one version. It returns the version to go on with, and whether there is one.
func (p *Pass) Step(from metadata.Version, most int64) (next metadata.Version, more bool, err error) {
	p.c.most = most
	return p.c.slice(from, &p.c.report.Versions)
}

// Report says what the pass has read and found so far. Versions counts the versions of leaves that were gone over.
func (p *Pass) Report() CheckReport { return p.c.report }
