package cow

import (
	"context"
	"encoding/binary"
	"os"
	"path/filepath"
	"testing"

	"github.com/vdisk/vdisk/format"
)

func fillLeaves(t *testing.T, d *Device, n int64) {
	p := randomBytes(4096, 9)
	for i := range n {
		for j := range int64(8) {
			p[0]++
			_, err := d.WriteAt(p, i<<20+j<<15)
			must(t, err)
		}
	}
}

// A page of the table rots while the store is open; then somebody checks.
func TestCheckOfDamagedPage(t *testing.T) {
	dir := setup(t, 8<<30, format.Raw)
	s := open(t, dir, Options{checkpointInterval: -1})
	d, err := s.OpenDevice(Ref{Volume: "v"}, false)
	must(t, err)
	fillLeaves(t, d, 1000)
	must(t, s.Checkpoint())
	path := filepath.Join(dir, tableFile)
	b, err := os.ReadFile(path)
	must(t, err)
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	must(t, err)
	n := 0
	for at := 2 * 4096; at+4096 <= len(b); at += 4096 {
		if binary.LittleEndian.Uint16(b[at+8:]) == 1 && int(binary.LittleEndian.Uint64(b[at:])) == at/4096 {
			_, err = f.WriteAt([]byte{0, 0, 0, 0, 0x02, 0, 0, 0}, int64(at+16+8)) // child page number
			must(t, err)
			n++
		}
	}
	rep, err := s.Check(context.Background(), CheckOptions{}, func(Problem) {})
	if n == 0 || err != nil || rep.Corrupt == 0 {
		t.Errorf("%d branch pages damaged: check says %+v, %v", n, rep, err)
	}
}
