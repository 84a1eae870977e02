package cow

import (
	"bytes"
	"testing"

	"github.com/vdisk/vdisk/format"
	"github.com/vdisk/vdisk/internal/storage"
	"github.com/vdisk/vdisk/internal/storage/crashfs"
)

// slowFile holds up writes until it is let go.
type slowFS struct {
	storage.FS
	hold chan struct{}
}

type slowFile struct {
	storage.File
	hold chan struct{}
}

func (s *slowFS) Create(name string, size int64) (storage.File, error) {
	f, err := s.FS.Create(name, size)
	return &slowFile{f, s.hold}, err
}

func (f *slowFile) WriteAt(p []byte, off int64) (int, error) {
	if off >= format.ChunkHeaderSize {
		<-f.hold
	}
	return f.File.WriteAt(p, off)
}

// A record in the buffer after one that was cut early, and is being written, is read
// from its own buffer.
func TestReadBehindCutBuffer(t *testing.T) {
	fs := &slowFS{crashfs.New(), make(chan struct{})}
	s, _ := newStore(t, Options{fs: fs, checkpointInterval: -1})
	s.mu.Lock()
	for i := range byte(3) {
		if err := s.wal.reserve(4096, forData); err != nil {
			t.Fatal(err)
		}
		payload := bytes.Repeat([]byte{i + 1}, 1000)
		h := format.RecordHeader{Kind: format.KindEvent, Blocks: 1, PayloadLen: len(payload), PayloadCRC: format.Checksum(payload)}
		c, off := s.wal.append(&h, payload)
		s.wal.cut()
		s.mu.Unlock()
		got := make([]byte, h.Size())
		if !s.wal.read(c, off, got) {
			t.Fatalf("record %d is in no buffer", i)
		}
		if !bytes.Equal(got[format.RecordHeaderSize:][:1000], payload) {
			t.Fatalf("record %d: %x…", i, got[format.RecordHeaderSize:][:4])
		}
		s.mu.Lock()
	}
	s.mu.Unlock()
	close(fs.hold)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
}
