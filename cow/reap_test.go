package cow

import (
	"errors"
	"fmt"
	"testing"

	"github.com/vdisk/vdisk/format"
)

// Deletions of several snapshots of one volume come to their end, one after the other, however many leaves each has to look at.
func TestReaperEndsWithManyLeaves(t *testing.T) {
	const leaves = 100
	s, _ := newStore(t, Options{CheckpointInterval: -1, ReapBatch: 1})
	_, err := s.CreateVolume("v", VolumeOptions{Size: 4 * leaves << 20, Codec: format.Raw})
	must(t, err)
	d, err := s.OpenDevice(Ref{Volume: "v"}, false)
	must(t, err)
	for i := range int64(3) {
		for j := range int64(leaves) { // of which none is written again
			_, err := d.WriteAt(randomBytes(format.BlockSize, uint64(i+1)), (i*leaves+j)<<20)
			must(t, err)
		}
		must(t, s.Snapshot(Ref{"v", fmt.Sprint("s", i)}))
	}
	must(t, s.Checkpoint())
	for i := range 2 {
		must(t, s.Remove(Ref{"v", fmt.Sprint("s", i)}, false))
	}
	n := 0
	for ; s.changed() && n < 12*leaves; n++ {
		must(t, s.Checkpoint())
	}
	t.Logf("%d checkpoints", n)
	if s.changed() {
		t.Error("there is no end to it")
	}
	mustCheck(t, s)
	must(t, errors.Join(d.Close(), s.Close()))
}
