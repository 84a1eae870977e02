package cow

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"

	"github.com/vdisk/vdisk/format"
	"github.com/vdisk/vdisk/metadata"
)

// A leaf rots on disk while the store is open, is rewritten from memory, nothing is lost; then Open.
func TestDamagedLeafIsReplaced(t *testing.T) {
	dir := setup(t, 64<<20, format.Raw)
	s := open(t, dir, Options{checkpointInterval: -1})
	d, err := s.OpenDevice(Ref{Volume: "v"}, false)
	must(t, err)
	_, err = d.WriteAt(randomBytes(4096, 1), 0)
	must(t, err)
	must(t, s.Checkpoint())
	var enc []byte
	must(t, s.meta.View(func(tx *metadata.Tx) error {
		return tx.Versions(func(_ metadata.Version, l *format.Leaf, _ error) error { enc = format.AppendLeaf(nil, l); return nil })
	}))
	path := filepath.Join(dir, tableFile)
	b, err := os.ReadFile(path)
	must(t, err)
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	must(t, err)
	for at := 0; ; {
		i := bytes.Index(b[at:], enc)
		if i < 0 {
			break
		}
		at += i
		_, err = f.WriteAt([]byte{enc[44] ^ 1}, int64(at+44))
		must(t, err)
		at++
	}
	_, err = d.WriteAt(randomBytes(4096, 2), 0) // from the cache, which is right
	must(t, err)
	must(t, s.Checkpoint())
	mustCheck(t, s) // finds nothing wrong
	d.Close()
	must(t, s.Close())
	s, err = Open(dir, Options{checkpointInterval: -1})
	if err != nil {
		t.Fatalf("Check found no problem, and: %v", err)
	}
	s.Close()
}
