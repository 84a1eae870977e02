package cow

import (
	"errors"
	"testing"

	"github.com/vdisk/vdisk/cow/internal/leafcache"
	"github.com/vdisk/vdisk/format"
)

// newWritten returns a store with a volume of 1 MiB whose first block is written.
func newWritten(t *testing.T) (*Store, *Device) {
	t.Helper()
	s, _ := newStore(t, Options{checkpointInterval: -1})
	_, err := s.CreateVolume("v", VolumeOptions{Size: 1 << 20, Codec: format.Raw})
	must(t, err)
	d, err := s.OpenDevice(Ref{Volume: "v"}, false)
	must(t, err)
	_, err = d.WriteAt(randomBytes(4096, 1), 0)
	must(t, err)
	return s, d
}

// A write of part of a block read the block before. An entry of the same value means another record, if the slot has
// another chunk by now.
func TestSameEntryInAnotherChunk(t *testing.T) {
	s, d := newWritten(t)
	must(t, s.cache.View(d.b.leaf(0, head), func(lf *leafcache.Leaf) {
		e := lf.Entry(0)
		here, other := s.slots.get(e.Slot()), newChunk(e.Slot(), 1<<40, s.fs)
		for c, same := range map[*chunk]bool{here: true, other: false} {
			ex := expect{first: 0, wasFirst: content{e, c}, last: none}
			if got := s.unchangedSince(d, &ex, lf, 0, 1); got != same {
				t.Errorf("the block is unchanged: %t", got)
			}
			ex = expect{first: none, last: 0, wasLast: content{e, c}}
			if got := s.unchangedSince(d, &ex, lf, 0, 1); got != same {
				t.Errorf("the last block is unchanged: %t", got)
			}
		}
	}))
	mustEnd(t, s, d)
}

// A write that has begun when its device is closed and the volume shrinks finds the new end when it comes to the log.
func TestWriteAfterShrink(t *testing.T) {
	s, d := newWritten(t)
	must(t, errors.Join(d.Close(), s.Resize("v", 512<<10, true)))
	payload := randomBytes(4096, 2)
	before := s.wal.NextSeq()
	for _, kind := range []format.Kind{format.KindData, format.KindHole} {
		for block, want := range map[uint64]error{127: nil, 128: ErrInvalid, 200: ErrInvalid} {
			h := format.RecordHeader{Block: block, Branch: d.b.ID, Kind: kind, Blocks: 1, Codec: format.Raw, PayloadLen: len(payload), PayloadCRC: format.Checksum(payload)}
			p := payload
			if kind == format.KindHole {
				var hole [format.HoleSize]byte
				format.EncodeHole(hole[:], 1)
				p = hole[:]
				h.Codec, h.PayloadLen, h.PayloadCRC = 0, len(p), format.Checksum(p)
			}
			if err := s.writeRecord(d, &h, p, 1, nil, false); !errors.Is(err, want) {
				t.Errorf("kind %d, block %d: %v", kind, block, err)
			}
		}
	}
	if n := s.wal.NextSeq() - before; n != 2 {
		t.Errorf("%d records were written", n)
	}
	mustEnd(t, s)
}
