package cow

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/vdisk/vdisk/format"
	"github.com/vdisk/vdisk/metadata"
)

// session opens a store, works with it, and closes it, as a command does.
func session(t *testing.T, dir string, work func(s *Store)) {
	t.Helper()
	s := open(t, dir, Options{checkpointInterval: -1, chunkBytes: 1 << 20})
	work(s)
	must(t, s.Close())
}

// filledVolume makes a volume of random data, as import does.
func filledVolume(t *testing.T, s *Store, name string, mib int, seed uint64) {
	t.Helper()
	_, err := s.CreateVolume(name, VolumeOptions{Size: int64(mib) << 20, Codec: format.Raw})
	must(t, err)
	d, err := s.OpenDevice(Ref{Volume: name}, false)
	must(t, err)
	_, err = d.WriteAt(randomBytes(mib<<20, seed), 0)
	must(t, errors.Join(err, d.Flush(), d.Close()))
}

// A table that is not the one that belongs to the chunk files is damage, and nothing is touched. With the right one all
// is there.
func TestWrongTable(t *testing.T) {
	dir, other := t.TempDir(), t.TempDir()
	must(t, errors.Join(Create(dir), Create(other)))
	table := func(dir string) []byte {
		p, err := os.ReadFile(filepath.Join(dir, tableFile))
		must(t, err)
		return p
	}
	born, empty := table(dir), table(other)
	session(t, dir, func(s *Store) { filledVolume(t, s, "a", 3, 1) })
	first := table(dir)
	session(t, dir, func(s *Store) { filledVolume(t, s, "b", 5, 2) })
	second := table(dir)
	session(t, dir, func(s *Store) { must(t, s.Remove(Ref{Volume: "a"}, false)) })
	session(t, dir, func(s *Store) { filledVolume(t, s, "c", 3, 3) })
	third := table(dir)
	session(t, dir, func(s *Store) { must(t, s.Snapshot(Ref{"b", "s"})) }) // no chunk of it is left
	session(t, other, func(s *Store) { filledVolume(t, s, "a", 3, 1) })

	path := filepath.Join(dir, tableFile)
	right, theirs := table(dir), table(other)
	note, err := os.ReadFile(path + metadata.VerifiedSuffix)
	must(t, err)
	for name, c := range map[string]struct {
		table  []byte // nil: none
		noNote bool   // as after a copy that left the note out
	}{
		"missing":            {nil, false},
		"empty":              {[]byte{}, false},
		"empty, no note":     {[]byte{}, true},
		"cut":                {right[:8292], false},
		"two pages":          {right[:8192], true},
		"zeros":              {make([]byte, len(right)), true},
		"new, of the store":  {born, true},
		"new, of another":    {empty, true},
		"of another":         {theirs, false},
		"of another, alone":  {theirs, true},
		"of the first year":  {first, true},
		"before a removal":   {second, true},
		"before a snapshot":  {third, false},
		"before much, noted": {first, false},
	} {
		t.Run(name, func(t *testing.T) {
			must(t, os.Remove(path))
			if c.table != nil {
				must(t, os.WriteFile(path, c.table, 0o600))
			}
			if c.noNote {
				must(t, os.Remove(path+metadata.VerifiedSuffix))
			}
			was := folder(t, dir)
			for _, o := range []Options{{}, {Outlive: true}, {Repair: func(*LogDamage) error { return nil }}} {
				o.checkpointInterval, o.SharedMemory = -1, t.TempDir()
				if s, err := Open(dir, o); !errors.Is(err, ErrCorrupt) {
					if err == nil {
						killStore(s)
					}
					t.Fatalf("Open: %v", err)
				}
				unchanged(t, dir, was)
			}
			must(t, os.WriteFile(path, right, 0o600))
			must(t, os.WriteFile(path+metadata.VerifiedSuffix, note, 0o600))
		})
	}
	session(t, dir, func(s *Store) {
		for name, want := range map[string][]byte{"b": randomBytes(5<<20, 2), "c": randomBytes(3<<20, 3)} {
			if !holdsAt(t, s, name, 0, want) {
				t.Errorf("%s is not what it was", name)
			}
		}
		_, _, err := s.lookup(Ref{"b", "s"})
		must(t, err)
		mustCheck(t, s)
	})
}

// A file among the chunks that nobody knows is kept.
func TestUnknownChunkFile(t *testing.T) {
	dir := t.TempDir()
	must(t, Create(dir))
	session(t, dir, func(s *Store) { filledVolume(t, s, "a", 3, 1) })
	session(t, dir, func(s *Store) { filledVolume(t, s, "b", 3, 2) })
	names := files(t, filepath.Join(dir, chunksDir))
	chunks := filepath.Join(dir, chunksDir)
	p, err := os.ReadFile(filepath.Join(chunks, names[0]))
	must(t, err)
	clear(p[:format.ChunkHeaderSize]) // rot, or a chunk that was being made
	must(t, os.WriteFile(filepath.Join(chunks, "0000ffff"), p, 0o600))
	must(t, os.WriteFile(filepath.Join(chunks, "0000fffe"), make([]byte, 1<<20), 0o600))
	must(t, os.WriteFile(filepath.Join(chunks, "0000fffd"), p[len(p)-1000:], 0o600)) // shorter than a header
	must(t, os.WriteFile(filepath.Join(chunks, "0000fffc"), nil, 0o600))
	session(t, dir, func(s *Store) { mustCheck(t, s) })
	aside := files(t, chunks+".aside")
	if len(aside) != 2 || aside[0] != "unknown-0000000000000000-0000fffd" || aside[1] != "unknown-0000000000000000-0000ffff" {
		t.Errorf("set aside: %v", aside)
	}
	if now := files(t, chunks); len(now) != len(names) {
		t.Errorf("chunk files: %v, were %v", now, names)
	}
}

// A chunk's header says which checkpoint was committed before it was written: an older table is not the store's.
func TestInTime(t *testing.T) {
	for seq, want := range map[uint64]error{9: ErrCorrupt, 10: nil, 11: nil} {
		if err := inTime(format.ChunkHeader{Checkpoint: 10}, format.Checkpoint{Seq: seq}); !errors.Is(err, want) {
			t.Errorf("a table as of record %d: %v", seq, err)
		}
	}
}
