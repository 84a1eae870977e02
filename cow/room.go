package cow

import (
	"os"

	"github.com/vdisk/vdisk/metadata"
)

// allocateTable gives the table's file blocks.
func (s *Store) allocateTable(f *os.File, from, to int64) error {
	if err := s.opts.GrowTable(to - from); err != nil {
		return err
	}
	return metadata.Allocate(f, from, to)
}
