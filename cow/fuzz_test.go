package cow

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/vdisk/vdisk/cow/internal/wal"
	"github.com/vdisk/vdisk/format"
	"github.com/vdisk/vdisk/internal/fuzzcode"
	"github.com/vdisk/vdisk/internal/storage/crashfs"
)

// fuzzCode makes damage and records as a program says.
type fuzzCode struct{ fuzzcode.Code }

// spoil edits a file as the program says, four bytes an edit. certain says that a store whose log ends before the damage
// has to say so: there was one flipped bit, and nothing else.
func (c *fuzzCode) spoil(b []byte) (out []byte, certain bool) {
	n := 1 + int(c.Byte())%3
	certain = n == 1
	for range n {
		how, at := c.Byte(), (c.U16()<<3|int(c.Byte()&7))%len(b)
		size := min(len(b)-at, 1+c.U16()%8192)
		switch how % 8 {
		default:
			b[at] ^= 1 << (how >> 3 & 7)
			continue
		case 4:
			b = b[:max(at, 1)]
		case 5:
			clear(b[at:][:size])
		case 6:
			copy(b[at:][:size], b[len(b)/2:])
		case 7:
			copy(b[at:][:size], b[max(0, at-size):])
		}
		certain = false
	}
	return b, certain
}

// logEndOf returns where the log of an intact store ends: the name of its last chunk, the offset there, and the number of
// the next record.
func logEndOf(f *testing.F, fs *crashfs.FS) (name string, h format.ChunkHeader, end uint32, next uint64) {
	for _, n := range chunkFiles(f, fs) {
		head, err := format.DecodeChunkHeader(contentOf(f, fs, n))
		if err != nil || head.Seq < h.Seq {
			continue
		}
		c := wal.NewChunk(head.Slot, head.Seq, fs)
		var r wal.Reader
		if err := r.Begin(c, format.ChunkHeaderSize, wal.MoveWindow); err != nil {
			f.Fatal(err)
		}
		seq := uint64(0)
		for rec, _, err := r.Any(); err == nil; rec, _, err = r.Any() {
			seq = rec.Seq
		}
		if seq > 0 {
			name, h, end, next = n, head, r.Off, seq+1
		}
		_ = c.Close()
	}
	if name == "" {
		f.Fatal("there is no log")
	}
	return name, h, end, next
}

// event makes an event of arbitrary rows with small numbers, or arbitrary text.
func (c *fuzzCode) event() []byte {
	if c.Byte()%8 == 7 {
		n := min(1+int(c.Byte()), len(c.B))
		text := bytes.Clone(c.B[:n])
		c.B = c.B[n:]
		return append(text, ' ')
	}
	e := format.Event{Op: "fuzz"}
	small := func() uint32 { return uint32(c.Byte()) % 48 }
	for range 1 + c.Byte()%4 {
		switch c.Byte() % 5 {
		case 0, 1:
			e.Branches = append(e.Branches, format.Branch{ID: small(), Epoch: small(), OriginBranch: small(), OriginEpoch: small()})
		case 2:
			e.Volumes = append(e.Volumes, format.Volume{ID: small(), Name: string(rune('a' + small()%26)), Size: 4096 * (1 + int64(c.U16())), Codec: format.S2, LogicalBlock: 512, Branch: small()})
		case 3:
			e.Snapshots = append(e.Snapshots, format.Snapshot{ID: small(), Volume: small(), Name: string(rune('a' + small()%26)), Branch: small(), Epoch: small(), Size: 4096 * (1 + int64(c.U16()))})
		case 4:
			e.DropVolumes = append(e.DropVolumes, small())
		}
	}
	text, err := format.AppendEvent(nil, &e)
	if err != nil { // rows that no decoder takes; they are tried as text, too
		return []byte("{}")
	}
	return text
}

// records makes records that verify, of arbitrary content, as they would follow in the log.
func (c *fuzzCode) records(chunkSeq uint64, off uint32, seq uint64) (b []byte) {
	for n := 0; len(c.B) > 0 && n < 12 && len(b) < 64<<10; n++ {
		h := format.RecordHeader{Seq: seq, Blocks: 1, Branch: uint32(c.Byte()) % 48}
		var payload []byte
		unit := uint64(c.U16()) % 512 * format.UnitBlocks
		switch c.Byte() % 5 {
		case 0, 1:
			h.Kind, h.Branch, payload = format.KindEvent, 0, c.event()
		case 2:
			h.Kind, h.Block, payload = format.KindHole, unit, make([]byte, format.HoleSize)
			format.EncodeHole(payload, uint64(c.U16()))
		case 3:
			h.Kind, h.Codec, h.Block, h.Blocks = format.KindData, format.S2, unit, 1+int(c.Byte())%format.UnitBlocks
			payload = bytes.Repeat([]byte{c.Byte()}, 1+int(c.Byte()))
		case 4:
			h.Kind, h.Codec, h.Block, h.Blocks = format.KindMoved, format.S2, unit, 1+int(c.Byte())%format.UnitBlocks
			payload = make([]byte, format.MovedSize+1+int(c.Byte()))
			from := format.MakeEntry(uint32(c.Byte())%8, uint32(c.U16())*format.RecordAlign, int(c.Byte())*h.Blocks*format.RecordAlign, h.Blocks, 0)
			format.Moved{From: from, Mask: uint16(c.U16()) & (1<<h.Blocks - 1)}.Encode(payload)
		}
		h.PayloadLen, h.PayloadCRC = len(payload), format.Checksum(payload)
		rec := make([]byte, h.Size())
		h.Encode(rec, chunkSeq, off)
		copy(rec[format.RecordHeaderSize:], payload)
		b, off = append(b, rec...), off+uint32(len(rec))
		if seq++; n%5 == 4 && c.Byte()%4 == 0 { // a gap in the numbers
			seq++
		}
	}
	return b
}

// lives opens a store whose files anybody may have made, and uses it: it may refuse whatever it likes, with an error that
// is about damage, but neither panic nor hang.
func (s *sound) lives(t *testing.T, fs *crashfs.FS) {
	dir, err := os.MkdirTemp(s.root, "crafted")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	must(t, errors.Join(os.WriteFile(filepath.Join(dir, formatFile), s.format, 0o600), os.WriteFile(filepath.Join(dir, tableFile), s.table, 0o600)))
	for range 2 {
		st, err := Open(dir, Options{fs: fs, checkpointInterval: -1, noTableSync: true, CacheBytes: 1 << 20, Logger: slog.New(slog.DiscardHandler)})
		if err != nil {
			if !errors.Is(err, ErrCorrupt) && !errors.Is(err, ErrExhausted) {
				t.Fatalf("not an error about damage: %v", err)
			}
			return
		}
		s.use(t, st)
		if err := st.Close(); err != nil && !errors.Is(err, ErrCorrupt) && !errors.Is(err, ErrFailed) {
			t.Logf("Close: %v", err)
		}
	}
}

// use does everything once. What it gets for it does not matter.
func (s *sound) use(t *testing.T, st *Store) {
	buf := make([]byte, 64<<10)
	for _, v := range st.Volumes() {
		if d, err := st.OpenDevice(Ref{Volume: v.Name}, false); err == nil {
			_, _ = d.ReadAt(buf[:min(int64(len(buf)), d.Size())], 0)
			_, _ = d.WriteAt(buf[:min(4096, d.Size())], 0)
			_ = d.Close()
		}
		_ = st.Snapshot(Ref{v.Name, "fuzz"})
		_ = st.Clone(Ref{v.Name, "fuzz"}, "fuzz-"+v.Name)
		for _, sn := range v.Snapshots {
			if d, err := st.OpenDevice(Ref{v.Name, sn.Name}, true); err == nil {
				_, _ = d.ReadAt(buf[:min(int64(len(buf)), d.Size())], 0)
				_ = d.Close()
			}
		}
	}
	_, _ = st.Check(context.Background(), CheckOptions{ReadData: true}, func(Problem) {})
	_, _ = st.Usage(context.Background())
	for _, v := range st.Volumes() {
		_ = st.Remove(Ref{Volume: v.Name}, true)
	}
	_, _ = st.Clean(context.Background(), 0)
}

// FuzzRecovery opens stores whose chunk files are damaged, or end in records that verify but that no vdisk wrote. A
// damaged store must be refused, or hold exactly what it held after some record, and say what it has left out. A crafted
// one may hold anything, but must neither end the process nor hang.
func FuzzRecovery(f *testing.F) {
	s := newSound(f)
	names := chunkFiles(f, s.fs)
	last, head, end, next := logEndOf(f, s.fs)
	f.Add([]byte{0, 0, 0, 0, 4, 0, 0, 0, 0})
	f.Add([]byte{0, 1, 0, 4, 3, 0, 0, 1, 0})
	f.Add([]byte{2, 2, 2, 5, 8, 0, 0, 4, 0, 6, 16, 0, 0, 1, 0, 7, 3, 0, 0, 9, 0})
	f.Add([]byte{1, 0, 0, 0, 0, 0, 1, 0, 40, 1, 0, 0, 2, 41, 3, 0, 1, 40})
	f.Add([]byte{1, 1, 0, 3, 3, 2, 9, 9, 1, 0, 8, 4, 3, 7, 1, 0, 1, 9, 0, 3, 2, 0, 0, 2, 0, 255})
	f.Add(append([]byte{1, 0, 0, 0, 0, 7, 40}, `{"op":"x","drop_volumes":[1,2,3,4,5,6]}`...))
	f.Fuzz(func(t *testing.T, program []byte) {
		if len(program) > 400 {
			return
		}
		c := &fuzzCode{fuzzcode.Code{B: program}}
		fs := s.fs.Clone()
		if c.Byte()%2 == 1 {
			content := contentOf(t, fs, last)
			b := append(bytes.Clone(content[:end]), c.records(head.Seq, end, next)...)
			replace(t, fs, last, append(b, content[min(len(b), len(content)):]...))
			s.lives(t, fs)
			return
		}
		name := names[int(c.Byte())%len(names)]
		content := contentOf(t, fs, name)
		used := len(bytes.TrimRight(content, "\x00"))
		bad, certain := c.spoil(bytes.Clone(content)[:used])
		replace(t, fs, name, append(bad, make([]byte, len(content)-used)...))
		if _, err := s.holds(fs, s.table, s.format, !certain); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
	})
}

// FuzzRef compares the parser of VOL and VOL@SNAP with the form of names.
func FuzzRef(f *testing.F) {
	for _, text := range []string{"v", "v@s", "@s", "v@", "v@s@t", "", "a/b", "v @s", "v@2026-11-30T12:00:00+01:00", "v:w@s", "v@:", strings.Repeat("x", 64) + "@s"} {
		f.Add(text)
	}
	name := `[A-Za-z0-9][A-Za-z0-9._-]{0,62}`
	snapshot := `[A-Za-z0-9][A-Za-z0-9._:+-]{0,62}`
	form := regexp.MustCompile(`\A` + name + `(@` + snapshot + `)?\z`)
	f.Fuzz(func(t *testing.T, text string) {
		r, err := ParseRef(text)
		if (err == nil) != form.MatchString(text) || err != nil && !errors.Is(err, ErrInvalid) {
			t.Fatalf("%q: %v", text, err)
		}
		if err != nil {
			return
		}
		if again, err := ParseRef(r.String()); r.String() != text || err != nil || again != r {
			t.Fatalf("%q is %q", text, r)
		}
	})
}

// FuzzOwnerFiles opens a store beside whose log there are arbitrary files: that of the owner, the lock's, and the note
// about the table. They are hints: the store opens with all that it holds, or, where it cannot be known whether anything
// is left in memory, is refused.
func FuzzOwnerFiles(f *testing.F) {
	dir := filepath.Join(f.TempDir(), "store")
	shm := f.TempDir()
	must(f, Create(dir))
	o := Options{SharedMemory: shm, checkpointInterval: -1, Logger: slog.New(slog.DiscardHandler), CacheBytes: 1 << 20}
	s, err := Open(dir, o)
	must(f, err)
	_, err = s.CreateVolume("v", VolumeOptions{Size: 1 << 20})
	must(f, err)
	record, err := s.newOwnerRecord()
	must(f, err)
	must(f, s.Close())
	boot := record.Boot
	dyingTime = 20 * time.Millisecond
	f.Add([]byte(`{"boot":"BOOT","dev":1,"ino":2,"buffers":"00000000000000000000000000000000"}`), []byte("pid 1 x\n"), []byte("{}"), byte(0))
	f.Add([]byte(`{"boot":"BOOT","dev":DEV,"ino":INO,"shm":SHM,"buffers":"00112233445566778899aabbccddeeff"}`), []byte{}, []byte(`{"boot":"BOOT","checkpoint":0}`), byte(1))
	f.Add([]byte(`{"boot":"BOOT","dev":DEV,"ino":INO,"buffers":"../../../../etc/passwd"}`), []byte("\x00\x1b"), []byte(`{"checkpoint":99999}`), byte(2))
	f.Add([]byte(`{"boot":"BOOT","dev":DEV,"ino":INO,"buffers":"0011"}`), []byte("no line"), []byte(`{"writing":true`), byte(3))
	f.Add([]byte(``), []byte(nil), []byte(`[]`), byte(0))
	f.Fuzz(func(t *testing.T, owner, lock, note []byte, flags byte) {
		if len(owner)+len(lock)+len(note) > 3000 {
			return
		}
		put := strings.NewReplacer("BOOT", boot, "DEV", itoa(record.Dev), "INO", itoa(record.Ino), "SHM", itoa(record.Shm)).Replace
		must(t, os.WriteFile(filepath.Join(dir, ownerFile), []byte(put(string(owner))), 0o600))
		must(t, os.WriteFile(filepath.Join(dir, lockFile), lock, 0o600))
		if text := holderText(bytes.Clone(lock)); text == "" || strings.ContainsAny(text, "\n\x1b\x00") {
			t.Fatalf("the holder is %q", text)
		}
		if flags&4 != 0 {
			must(t, os.WriteFile(filepath.Join(dir, tableFile+".verified"), []byte(put(string(note))), 0o600))
		}
		o := o
		o.Outlive, o.ForgetElsewhere = flags&1 != 0, flags&2 != 0
		s, err := Open(dir, o)
		if err != nil {
			if !errors.Is(err, ErrElsewhere) && !errors.Is(err, ErrCorrupt) {
				t.Fatalf("refused: %v", err)
			}
			must(t, os.Remove(filepath.Join(dir, ownerFile)))
			_ = os.Remove(filepath.Join(dir, tableFile+".verified"))
			return
		}
		v := s.Volumes()
		must(t, s.Close())
		if len(v) != 1 || v[0].Name != "v" || v[0].Size != 1<<20 {
			t.Fatalf("the store holds %v", v)
		}
	})
}

func itoa(n uint64) string { return strconv.FormatUint(n, 10) }
