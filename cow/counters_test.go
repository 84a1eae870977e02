package cow

import (
	"bytes"
	"context"
	"errors"
	"testing"

	"github.com/vdisk/vdisk/format"
)

// TestCounters does a known number of things, and expects the counters to say so.
func TestCounters(t *testing.T) {
	s, dir := newStore(t, Options{checkpointInterval: -1})
	for _, name := range []string{"v", "w"} {
		_, err := s.CreateVolume(name, VolumeOptions{Size: 8 << 20, Codec: format.S2})
		must(t, err)
	}
	must(t, s.Snapshot(Ref{"v", "a"}))
	d, err := s.OpenDevice(Ref{Volume: "v"}, false)
	must(t, err)
	before := s.Counters()
	unit := bytes.Repeat([]byte("counted "), 64<<10/8)
	for i := range 4 {
		_, err = d.WriteAt(unit, int64(i)*int64(len(unit)))
		must(t, err)
	}
	if c := s.Counters(); c.Records != before.Records+16 || c.DurableRecords == c.Records || c.ReplayBytes != c.AppendedBytes {
		t.Errorf("after 16 records, of 16 KiB each: %+v; before: %+v", c, before)
	}
	must(t, d.Flush())
	c := s.Counters()
	if c.DurableRecords != c.Records || c.Syncs != before.Syncs+1 || c.SyncTime <= before.SyncTime || c.Checkpoints != before.Checkpoints {
		t.Errorf("after a flush: %+v; before: %+v", c, before)
	}
	if c.WrittenBytes != 256<<10 || c.CompressedBytes == 0 || c.CompressedBytes > 64<<10 {
		t.Errorf("256 KiB that compress well: %d became %d", c.WrittenBytes, c.CompressedBytes)
	}
	for _, v := range c.Volumes {
		want := VolumeCounters{Name: "v", Size: 8 << 20, Snapshots: 1, Open: 1, WrittenBytes: c.WrittenBytes, CompressedBytes: c.CompressedBytes}
		if v.Name == "w" {
			want = VolumeCounters{Name: "w", Size: 8 << 20}
		}
		if v != want {
			t.Errorf("%+v is not %+v", v, want)
		}
	}
	must(t, s.Checkpoint())
	if c = s.Counters(); c.Checkpoints != before.Checkpoints+1 || c.LastCheckpoint.IsZero() || c.ReplayBytes != 0 || c.CheckpointTime <= before.CheckpointTime {
		t.Errorf("after a checkpoint: %+v", c)
	}
	must(t, errors.Join(d.Close(), s.Close()))

	s, err = Open(dir, Options{checkpointInterval: -1})
	must(t, err)
	defer s.Close()
	d, err = s.OpenDevice(Ref{Volume: "v"}, false)
	must(t, err)
	defer d.Close()
	before = s.Counters()
	for i := range 4 { // the first loads the leaf, and makes the unit
		_, err = d.ReadAt(make([]byte, 4096), int64(i)*4096)
		must(t, err)
	}
	c = s.Counters()
	if c.MapLookups != before.MapLookups+4 || c.MapLoads != before.MapLoads+1 || c.UnitHits != 3 || c.UnitMisses != 1 {
		t.Errorf("after four reads: %+v; before: %+v", c, before)
	}
	for range 2 {
		_, err = d.WriteAt(unit, 0)
		must(t, err)
	}
	report, err := s.Clean(context.Background(), worthwhile)
	must(t, err)
	if c = s.Counters(); c.CleanedChunks != uint64(report.Chunks) || report.Chunks == 0 || c.MovedBytes != uint64(report.Moved) || c.ReclaimedBytes == 0 || c.Cleaning {
		t.Errorf("after %+v: %+v", report, c)
	}
	if c.FileBytes == 0 || c.RoomBytes == 0 || c.Failed || c.Paced || c.DamagedPlaces != 0 {
		t.Errorf("%+v", c)
	}
}
