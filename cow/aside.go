package cow

import (
	"errors"
	"io/fs"
)

// asideDir is the folder for chunk files that were set aside: docs/engine.md, Files that are removed or set aside.
const asideDir = chunksDir + ".aside"

// setAsideSoFar returns how many files were set aside, and their bytes. It changes nothing.
func (s *Store) setAsideSoFar() (files int, bytes int64, err error) {
	if _, err := s.in.Lstat(asideDir); errors.Is(err, fs.ErrNotExist) {
		return 0, 0, nil
	}
	in, err := s.in.Sub(asideDir)
	if err != nil {
		return 0, 0, err
	}
	defer func() { err = errors.Join(err, in.Close()) }()
	names, err := in.Names()
	for _, name := range names {
		st, serr := in.Lstat(name)
		if errors.Is(serr, fs.ErrNotExist) {
			continue // it was deleted meanwhile
		}
		if serr != nil {
			return 0, 0, serr
		}
		files++
		bytes += st.Size
	}
	return files, bytes, err
}
