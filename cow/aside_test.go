package cow

import (
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/vdisk/vdisk/cow/internal/fault"
	"github.com/vdisk/vdisk/cow/internal/wal"
	"github.com/vdisk/vdisk/internal/storage"
)

// fullAside returns ENOSPC for the first calls of SetAside, as many as times says.
type fullAside struct {
	storage.FS
	times int
}

func (f *fullAside) SetAside(name, as string) error {
	if f.times > 0 {
		f.times--
		return fault.NoSpace(syscall.ENOSPC)
	}
	return f.FS.SetAside(name, as)
}

// TestSetAsideOnFullDisk checks that on a full file system a part of the reserve is freed to set a file aside. If that
// is not enough, Open refuses the store and names the reason, and the file stays where it is.
func TestSetAsideOnFullDisk(t *testing.T) {
	for _, c := range []struct {
		name  string
		times int
		opens bool
	}{{"reserve", 1, true}, {"none", 1 << 30, false}} {
		t.Run(c.name, func(t *testing.T) {
			s, dir := newStore(t, Options{checkpointInterval: -1})
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
			chunks := filepath.Join(dir, chunksDir)
			name := filepath.Join(chunks, wal.ChunkName(0x7777))
			content := append(make([]byte, 8192), "nobody knows what this is"...)
			if err := os.WriteFile(name, content, 0o600); err != nil {
				t.Fatal(err)
			}
			in, err := storage.OpenFolder(chunks, false)
			if err != nil {
				t.Fatal(err)
			}
			defer in.Close()
			s, err = Open(dir, Options{fs: &fullAside{in.Files(), c.times}, checkpointInterval: -1, Logger: slog.New(slog.DiscardHandler)})
			if !c.opens {
				if !errors.Is(err, ErrNoSpace) {
					t.Fatalf("Open: %v", err)
				}
				if got, err := os.ReadFile(name); err != nil || len(got) != len(content) {
					t.Fatalf("the file has %d bytes: %v", len(got), err)
				}
				s, err = Open(dir, Options{checkpointInterval: -1, Logger: slog.New(slog.DiscardHandler)}) // there is room again
			}
			if err != nil {
				t.Fatal(err)
			}
			if i := s.Info(); i.AsideFiles != 1 || i.AsideBytes != int64(len(content)) {
				t.Errorf("%d files of %d bytes are aside", i.AsideFiles, i.AsideBytes)
			}
			mustEnd(t, s)
		})
	}
}
