package cow

import (
	"bytes"
	"encoding/binary"
	"testing"

	"github.com/vdisk/vdisk/cow/internal/wal"
	"github.com/vdisk/vdisk/format"
	"github.com/vdisk/vdisk/internal/storage"
	"github.com/vdisk/vdisk/internal/storage/crashfs"
)

// FuzzSharedBuffers puts back what a killed owner has left in memory, with arbitrary heads of the buffers. Each buffer must
// be written where its head says, if that is a place for records in a chunk that is still the same, and nothing else may
// be written.
func FuzzSharedBuffers(f *testing.F) {
	const headSize = 24 // chunk seq 8, slot 4, offset 4, used 4, zero 4: of a head of 32 bytes
	head := func(seq uint64, slot, off, used uint32) []byte {
		b := binary.NativeEndian.AppendUint64(nil, seq)
		for _, v := range []uint32{slot, off, used, 0} {
			b = binary.NativeEndian.AppendUint32(b, v)
		}
		return b
	}
	f.Add(head(101, 1, 4096, 100))
	f.Add(append(head(101, 1, 4096, 1<<20), head(102, 2, 8192, 16)...))
	f.Add(append(head(99, 1, 4096, 100), head(103, 3, 4096, 100)...))
	f.Add(append(head(101, 1, 64<<20-50, 100), head(101, 1, 64<<20-100, 100)...))
	f.Add(append(head(101, 1, 0, 100), head(102, 2, 1<<32-1, 100)...))
	f.Add(append(head(101, 1<<24, 4096, 100), head(101, 1, 4096, 1<<32-1)...))
	mem := make([]byte, sharedFileSize)
	for i := range mem[sharedHead:] {
		mem[sharedHead+i] = byte(i>>10) | 1
	}
	b := &sharedBuffers{mem: mem}
	uuid := [16]byte{1}
	f.Fuzz(func(t *testing.T, heads []byte) {
		fs := crashfs.New()
		before := map[string][]byte{}
		for slot := uint32(1); slot <= 2; slot++ { // chunks 101 and 102
			file, err := fs.Create(wal.ChunkName(slot), 64<<10)
			must(t, err)
			p := make([]byte, format.ChunkHeaderSize)
			(&format.ChunkHeader{Slot: slot, Seq: 100 + uint64(slot), UUID: uuid}).Encode(p)
			_, err = file.WriteAt(p, 0)
			must(t, err)
			must(t, file.Close())
			before[wal.ChunkName(slot)] = contentOf(t, fs, wal.ChunkName(slot))
		}
		clear(mem[sharedTable : sharedTable+32*wal.BufferCount])
		want := int64(0)
		for i := 0; i < wal.BufferCount && len(heads) >= headSize; i, heads = i+1, heads[headSize:] {
			copy(mem[sharedTable+32*i:], heads[:headSize])
			h := b.head(i)
			used := h.Used.Load()
			if int64(h.Off)+int64(used) <= format.MaxChunkSize {
				h.Off %= 1 << 20 // larger files take long
			}
			if off := int64(h.Off); (h.Seq == 101 && h.Slot == 1 || h.Seq == 102 && h.Slot == 2) && used <= wal.BufferSize &&
				off >= format.ChunkHeaderSize && off+int64(used) <= format.MaxChunkSize {
				want += int64(used)
				name := wal.ChunkName(h.Slot)
				content := before[name]
				if more := off + int64(used) - int64(len(content)); more > 0 && used > 0 {
					content = append(content, make([]byte, more)...)
				}
				if used > 0 {
					copy(content[off:], b.data(i)[:used])
				}
				before[name] = content
			}
		}
		log := wal.New(fs, nil, uuid, nil, nil, nil)
		n, err := b.restore(fs, func(name string, slot uint32) (format.ChunkHeader, error) { return log.Header(name, slot) })
		if err != nil || n != want {
			t.Fatalf("%d bytes, want %d (%v)", n, want, err)
		}
		sameFiles(t, fs, before)
	})
}

// sameFiles checks that a directory has these files and no others.
func sameFiles(t *testing.T, fs storage.FS, want map[string][]byte) {
	names, err := fs.List()
	must(t, err)
	if len(names) != len(want) {
		t.Fatalf("the files are %v", names)
	}
	for name, content := range want {
		if got := contentOf(t, fs, name); !bytes.Equal(got, content) {
			t.Fatalf("%s has %d bytes, want %d, or others", name, len(got), len(content))
		}
	}
}
