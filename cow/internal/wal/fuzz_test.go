package wal

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"log/slog"
	"regexp"
	"strconv"
	"syscall"
	"testing"

	"github.com/vdisk/vdisk/format"
	"github.com/vdisk/vdisk/internal/storage"
	"github.com/vdisk/vdisk/internal/storage/crashfs"
)

var le = binary.LittleEndian

// badDisk is a chunk's file: its content, and a range that cannot be read. What is written to it must be what it holds,
// because the reader only writes back.
type badDisk struct {
	storage.File // panics where it is used
	t            *testing.T
	content      []byte
	from, to     int // the range that cannot be read
	piece        int // the most that one read returns
	written      int // where the last write ended
	durable      *uint32
}

func (f *badDisk) ReadAt(p []byte, off int64) (int, error) {
	if off >= int64(len(f.content)) {
		return 0, io.EOF
	}
	n := min(len(p), f.piece, len(f.content)-int(off))
	if from := int(off); from < f.to && from+n > f.from {
		return 0, syscall.EIO
	}
	return copy(p, f.content[off:][:n]), nil
}

func (f *badDisk) WriteAt(p []byte, off int64) (int, error) {
	if int(off)+len(p) > len(f.content) || !bytes.Equal(p, f.content[off:][:len(p)]) {
		f.t.Errorf("%d bytes were written at %d that were not there", len(p), off)
	}
	if int(off) < int(*f.durable) {
		f.t.Errorf("what was durable is written back from %d on", off)
	}
	f.written = int(off) + len(p)
	return len(p), nil
}

func (f *badDisk) Size() (int64, error) { return int64(len(f.content)), nil }
func (f *badDisk) Close() error         { return nil }

const fuzzChunkSeq = 0x1122334455667788

// chunkOf makes the content of a chunk: records as the program says, four bytes each, with numbers from first on.
func chunkOf(program []byte, first uint64) []byte {
	b := make([]byte, format.ChunkHeaderSize)
	for seq := first; len(program) >= 4 && len(b) < 200<<10; program, seq = program[4:], seq+1 {
		kind, n, fill, branch := program[0], int(program[1]), program[2], uint32(program[3])
		h := format.RecordHeader{Seq: seq, Blocks: 1, Branch: 1 + branch, Block: uint64(fill) * format.UnitBlocks}
		switch kind % 5 {
		case 0:
			h.Kind, h.Branch, h.Block, h.PayloadLen = format.KindEvent, 0, 0, 1+n*16
		case 1:
			h.Kind, h.PayloadLen = format.KindHole, format.HoleSize
		case 2:
			h.Kind, h.Blocks = format.KindData, 1+n%format.UnitBlocks
			h.PayloadLen = h.Blocks * format.BlockSize
		case 3:
			h.Kind, h.Codec, h.Blocks = format.KindData, format.S2, 1+n%format.UnitBlocks
			h.PayloadLen = 1 + n
		case 4:
			h.Kind, h.Codec, h.Blocks = format.KindMoved, format.Zstd, 1+n%format.UnitBlocks
			h.PayloadLen = format.MovedSize + 1 + n
		}
		rec := make([]byte, h.Size())
		payload := rec[format.RecordHeaderSize:][:h.PayloadLen]
		for i := range payload {
			payload[i] = fill
		}
		h.PayloadCRC = format.Checksum(payload)
		h.Encode(rec, fuzzChunkSeq, uint32(len(b)))
		b = append(b, rec...)
	}
	return b
}

// damage edits the content of a chunk. An edit has six bytes: what, where (three), how (two).
func damage(b, edits []byte) []byte {
	for ; len(edits) >= 6 && len(b) > 0; edits = edits[6:] {
		at := int(edits[1])<<16 | int(edits[2])<<8 | int(edits[3])
		at %= len(b)
		how := int(edits[4])<<8 | int(edits[5])
		switch edits[0] % 6 {
		case 0:
			b[at] ^= 1 | edits[4]
		case 1:
			b = b[:at]
		case 2: // a part of the chunk comes twice, in the wrong place
			copy(b[at:], b[how%len(b):][:min(512, len(b)-how%len(b))])
		case 3:
			clear(b[at:min(at+how, len(b))])
		case 4: // a header with other fields, and a right checksum
			at &^= format.RecordAlign - 1
			if at+format.RecordHeaderSize <= len(b) {
				b[at+4+how>>8%28] = byte(how)
				le.PutUint32(b[at:], refSalted(uint32(at), b[at+4:at+format.RecordHeaderSize]))
			}
		case 5: // a payload with another byte, and a right checksum
			at &^= format.RecordAlign - 1
			if n, payload := refRecord(b, at); n > 0 && len(payload) > 0 {
				payload[how%len(payload)]++
				le.PutUint32(b[at+4:], crc32.Checksum(payload, crc32.MakeTable(crc32.Castagnoli)))
				le.PutUint32(b[at:], refSalted(uint32(at), b[at+4:at+format.RecordHeaderSize]))
			}
		}
	}
	return b
}

// refSalted is the checksum of a header, as docs/format.md describes it.
func refSalted(off uint32, p []byte) uint32 {
	salted := le.AppendUint32(le.AppendUint64(nil, fuzzChunkSeq), off)
	return crc32.Checksum(append(salted, p...), crc32.MakeTable(crc32.Castagnoli))
}

// refRecord is the reference: it returns the size of the record whose header is at off and is valid, and its payload,
// or nil if the file ends before the record does. The size is 0 if there is no such header. It is written after the
// drawings in package format, and uses none of that package's code.
func refRecord(b []byte, off int) (size int, payload []byte) {
	if off+32 > len(b) || le.Uint32(b[off:]) != refSalted(uint32(off), b[off+4:off+32]) {
		return 0, nil
	}
	seq, block, branch, word := le.Uint64(b[off+8:]), le.Uint64(b[off+16:]), le.Uint32(b[off+24:]), le.Uint32(b[off+28:])
	codec, kind, n, blocks := word&15, word>>4&15, int(word>>8&0xfffff), int(word>>28)+1
	unit := n
	if kind == 4 {
		unit -= 16
	}
	ok := seq > 0
	switch kind {
	case 1, 4:
		ok = ok && branch > 0 && block < 1<<40 && int(block%16)+blocks <= 16 && codec <= 2 && unit > 0 && unit <= blocks*4096 && (codec > 0 || unit == blocks*4096)
	case 2:
		ok = ok && branch > 0 && block < 1<<40 && codec == 0 && blocks == 1 && n == 8
	case 3:
		ok = ok && branch == 0 && block == 0 && codec == 0 && blocks == 1 && n > 0
	default:
		ok = false
	}
	align := 16 * blocks
	size = (32 + n + align - 1) / align * align
	if !ok || off%16 != 0 || off < 4096 || off+size > 64<<20 {
		return 0, nil
	}
	if off+size > len(b) {
		return size, nil
	}
	return size, b[off+32 : off+32+n]
}

func (f *badDisk) readable(from, to int) bool { return to <= f.from || from >= f.to || f.from >= f.to }

// FuzzReader reads a chunk that is damaged anyhow, through windows of all sizes, from a disk that returns short reads
// and cannot read a part. The reader must return exactly the records that a simple decoder of the whole file finds, and
// say why when there is none; it must never read past the end, and write back nothing but what it has verified.
func FuzzReader(f *testing.F) {
	all := []byte{0, 3, 1, 0, 1, 0, 2, 1, 2, 1, 3, 0, 3, 200, 4, 2, 4, 100, 5, 0, 2, 15, 6, 0, 0, 255, 7, 0}
	f.Add(all, []byte{}, uint32(0), uint32(0), uint16(0))
	f.Add(all, []byte{0, 0, 0x10, 200, 1, 0}, uint32(0), uint32(0), uint16(100))
	f.Add(all, []byte{1, 0, 0x20, 3, 0, 0}, uint32(0), uint32(0), uint16(5000))
	f.Add(all, []byte{2, 0, 0x10, 0x40, 0x10, 0}, uint32(5000), uint32(300), uint16(65535))
	f.Add(all, []byte{4, 0, 0x10, 0, 8, 0, 5, 0, 0x10, 0, 0, 1}, uint32(20000), uint32(1), uint16(7))
	f.Fuzz(func(t *testing.T, program, edits []byte, badAt, badLen uint32, window uint16) {
		if len(program) > 400 || len(edits) > 120 {
			return
		}
		const first = 1000
		disk := &badDisk{t: t, content: damage(chunkOf(program, first), edits), piece: []int{333, 4096, 1 << 17}[badAt%3]}
		if badLen > 0 {
			disk.from = int(badAt) % (len(disk.content) + 1)
			disk.to = disk.from + int(badLen)%10000
		}
		c := NewChunk(1, fuzzChunkSeq, nil)
		c.file = disk
		end, seq := checkNext(t, c, disk, first, int(window))
		checkAny(t, c, disk, int(window))
		checkFirstSeq(t, c, disk)
		checkTail(t, c, disk, end, seq)
	})
}

// checkNext compares Next with the reference. It returns where the log ends, and the number of the next record.
func checkNext(t *testing.T, c *Chunk, disk *badDisk, first uint64, window int) (end int, seq uint64) {
	var r Reader
	disk.durable = &r.Durable
	other := NewChunk(2, fuzzChunkSeq-1, nil) // whose bytes must not be taken for those of c
	other.file = &badDisk{t: t, content: make([]byte, len(disk.content)), piece: 1 << 17, durable: &r.Durable}
	if err := r.Begin(other, format.ChunkHeaderSize, window); err != nil {
		t.Fatal(err)
	}
	if h, _, err := r.Next(first); h != nil || err != nil {
		t.Fatal("zeros are a record: ", h, err)
	}
	if err := r.Begin(c, format.ChunkHeaderSize, window); err != nil {
		t.Fatal(err)
	}
	r.Rewrites = true
	off, seq := format.ChunkHeaderSize, first
	for ; ; seq++ {
		size, payload := refRecord(disk.content, off)
		head := size > 0 && disk.readable(off, off+32)
		whole := head && payload != nil && disk.readable(off, off+size)
		is := head && le.Uint64(disk.content[off+8:]) == seq
		good := is && whole && crc32.Checksum(payload, crc32.MakeTable(crc32.Castagnoli)) == le.Uint32(disk.content[off+4:])
		h, got, err := r.Next(seq)
		if err != nil {
			t.Fatalf("record at %d: %v", off, err)
		}
		if (h != nil) != is || (got != nil) != good || (r.Why == nil) != good {
			t.Fatalf("record at %d: header %v payload %v, want %v %v (%v)", off, h != nil, got != nil, is, good, r.Why)
		}
		if !good {
			break
		}
		if !bytes.Equal(got, payload) || h.Size() != size || h.Seq != seq {
			t.Fatalf("record at %d: %+v", off, h)
		}
		off += size
		if seq%3 == 0 {
			r.Durable = uint32(off)
		}
	}
	if int(r.Off) != off {
		t.Fatalf("the reader is at %d, not at %d", r.Off, off)
	}
	if err := r.WriteBack(); err != nil {
		t.Fatal(err)
	}
	if disk.written > off {
		t.Fatalf("written back up to %d, and verified up to %d", disk.written, off)
	}
	return off, seq
}

// checkAny compares Any with the reference.
func checkAny(t *testing.T, c *Chunk, disk *badDisk, window int) {
	var r Reader
	if err := r.Begin(c, format.ChunkHeaderSize, window); err != nil {
		t.Fatal(err)
	}
	for off := format.ChunkHeaderSize; ; {
		size, payload := refRecord(disk.content, off)
		want := size > 0 && payload != nil && disk.readable(off, off+size)
		h, got, err := r.Any()
		if (err == nil) != want || err != nil && !errors.Is(err, format.ErrCorrupt) {
			t.Fatalf("record at %d: %v, want %v", off, err, want)
		}
		if err != nil {
			return
		}
		if off += size; !bytes.Equal(got, payload) || int(r.Off) != off || h.PayloadLen != len(payload) {
			t.Fatalf("record at %d: %+v", off-size, h)
		}
	}
}

func checkFirstSeq(t *testing.T, c *Chunk, disk *badDisk) {
	const off = format.ChunkHeaderSize
	want := uint64(0)
	if size, payload := refRecord(disk.content, off); size > 0 && payload != nil && disk.readable(off, off+size) &&
		format.Checksum(payload) == le.Uint32(disk.content[off+4:]) {
		want = le.Uint64(disk.content[off+8:])
	}
	if got, err := c.FirstSeq(); got != want || err != nil {
		t.Fatalf("the first record is %d, want %d (%v)", got, want, err)
	}
}

// checkTail compares Tail with a search of the whole rest of the file, which is where no part of it is unreadable.
func checkTail(t *testing.T, c *Chunk, disk *badDisk, end int, seq uint64) {
	got, err := c.Tail(uint32(end), seq)
	if err != nil {
		t.Fatal(err)
	}
	if got < 0 || got > format.MaxChunkSize {
		t.Fatal(got)
	}
	if !disk.readable(end, len(disk.content)) {
		return
	}
	last := end
	if b := disk.content[min(end, len(disk.content)):]; len(b) >= 32 {
		p := bytes.Clone(b[:32])
		le.PutUint64(p[8:], seq)
		if le.Uint64(b[8:]) == seq || le.Uint32(p) == refSalted(uint32(end), p[4:]) {
			last += 32
		}
	}
	for off := end; off-last < ReplayWindow && off+32 <= len(disk.content); {
		if size, _ := refRecord(disk.content, off); size > 0 {
			off += size
			last = off
			continue
		}
		off += 16
	}
	if got != int64(last-end) {
		t.Fatalf("%d bytes behind the end at %d, want %d", got, end, last-end)
	}
}

// FuzzSummaryOfFile reads the summary at the end of a chunk's file. It must be the entries that lie there, of records
// that follow one another without a gap and end where the footer says; or none; or an error.
func FuzzSummaryOfFile(f *testing.F) {
	seed := func(program ...byte) {
		var entries []byte
		content := chunkOf(program, 1)
		var r Reader
		c := NewChunk(1, fuzzChunkSeq, nil)
		c.file = &badDisk{content: content, piece: 1 << 20}
		_ = r.Begin(c, format.ChunkHeaderSize, MoveWindow)
		for h, _, err := r.Any(); err == nil; h, _, err = r.Any() {
			entries = format.AppendSummary(entries, h, 1)
		}
		f.Add(entries, uint64(1), uint32(len(content)), uint16(100))
	}
	seed(0, 3, 1, 0, 1, 0, 2, 1, 2, 1, 3, 0)
	seed(4, 3, 1, 0)
	f.Add([]byte{}, uint64(0), uint32(0), uint16(0))
	f.Fuzz(func(t *testing.T, entries []byte, first uint64, end uint32, gap uint16) {
		if len(entries) > 12000 || end > 1<<18 {
			return
		}
		content := append(make([]byte, int(end)+int(gap)), entries...)
		size := len(content) + format.SummaryFooterSize
		foot := format.SummaryFooter{FirstSeq: first, Records: len(entries) / format.SummaryEntrySize, End: end, EntriesCRC: format.Checksum(entries)}
		content = append(content, make([]byte, format.SummaryFooterSize)...)
		foot.Encode(content[size-format.SummaryFooterSize:], fuzzChunkSeq, uint32(size))
		c := NewChunk(1, fuzzChunkSeq, nil)
		c.file, c.Size = &badDisk{t: t, content: content, piece: 1000 + int(gap)}, uint32(size)
		sum, err := c.Summary()
		if err != nil {
			t.Fatal(err)
		}
		if sum == nil {
			if len(entries) > 0 && len(entries)%12 == 0 && first > 0 && end > format.ChunkHeaderSize && len(entries)/12 <= int(end-format.ChunkHeaderSize)/48 {
				t.Fatal("a summary that is right was not taken")
			}
			return
		}
		n, at := 0, uint32(format.ChunkHeaderSize)
		err = sum.Each(func(seq uint64, off uint32, e *format.SummaryEntry) bool {
			if seq != first+uint64(n) || off != at || e.Size <= 0 || e.Blocks < 1 {
				t.Fatalf("record %d at %d: %+v, want record %d at %d", seq, off, e, first+uint64(n), at)
			}
			n, at = n+1, at+uint32(e.Size)
			return true
		})
		if (err == nil) != (n == foot.Records && at == end) || err != nil && !errors.Is(err, format.ErrCorrupt) {
			t.Fatalf("%d of %d records end at %d of %d: %v", n, foot.Records, at, end, err)
		}
		if sum.Before(first) || first+uint64(foot.Records) > first && !sum.Before(first+uint64(foot.Records)) {
			t.Fatal("it does not know which records it has")
		}
	})
}

// FuzzMark is a program of what happens to the durable mark: it is set, the owner ends and another begins, one of its
// two places is damaged. After every step the mark must say no more than was set, and, unless both places were damaged
// since, no less than the last that is not damaged.
func FuzzMark(f *testing.F) {
	f.Add([]byte{0, 5, 0, 9, 1, 0, 0, 20, 2, 0, 1, 0, 3, 7})
	f.Add([]byte{0, 1, 2, 1, 2, 4100 & 255, 1, 0, 0, 3, 4, 16, 1, 0})
	f.Fuzz(func(t *testing.T, program []byte) {
		if len(program) > 200 {
			return
		}
		fs, uuid := crashfs.New(), [16]byte{7}
		m := new(Mark)
		m.Open(fs, uuid, slog.New(slog.DiscardHandler))
		if err := m.Begin(1); err != nil || m.Seq() != 1 {
			t.Fatal(err)
		}
		places := [MarkCount]uint64{1, 1} // what each place says; 0: it is damaged
		next := m.next
		for ; len(program) >= 2; program = program[2:] {
			arg := program[1]
			switch program[0] % 4 {
			case 0: // set
				if seq := m.Seq() + uint64(arg); arg > 0 {
					m.set(seq)
					places[next] = seq
					next = (next + 1) % MarkCount
				}
			case 1: // another owner, whose log is durable up to the mark or not so far
				if err := m.Close(); err != nil {
					t.Fatal(err)
				}
				m = new(Mark)
				m.Open(fs, uuid, slog.New(slog.DiscardHandler))
				if want := max(places[0], places[1]); m.Seq() != want {
					t.Fatalf("the mark is %d, and its places say %d", m.Seq(), places)
				}
				whole := places[0] > 0 && places[1] > 0
				seq := max(m.Seq(), 1) - min(uint64(arg)%3, max(m.Seq(), 1)-1)
				given := m.Seq() > seq
				if err := m.Begin(seq); err != nil {
					t.Fatal(err)
				}
				if given || !whole {
					places = [MarkCount]uint64{seq, seq}
				}
				next = m.next
			case 2: // damage
				place := int(arg) % MarkCount
				file, err := fs.Open(MarkName)
				if err == nil {
					_, err = file.WriteAt([]byte{arg ^ 0x55}, int64(place)*MarkPlace+int64(arg)%format.DurableMarkSize)
				}
				if err != nil {
					t.Fatal(err)
				}
				var p [format.DurableMarkSize]byte
				_, err = file.ReadAt(p[:], int64(place)*MarkPlace)
				mark, derr := format.DecodeDurableMark(p[:])
				if places[place] = mark.Seq; err != nil || derr != nil || mark.UUID != uuid {
					places[place] = 0
				} // else the byte is what it was before, or was before it was damaged
				_ = file.Close()
			case 3:
				m.push()
			}
		}
	})
}

// FuzzChunkName holds the names of chunk files to be eight hexadecimal digits of a slot, and no other spelling.
func FuzzChunkName(f *testing.F) {
	for _, s := range []string{"00000000", "00ffffff", "01000000", "0000000A", "+0000001", "0x000001", "0_000001", "durable", "0000000a "} {
		f.Add(s)
	}
	digits := regexp.MustCompile(`\A[0-9a-f]{8}\z`)
	f.Fuzz(func(t *testing.T, name string) {
		slot, ok := ParseChunkName(name)
		n, _ := strconv.ParseUint(name, 16, 64)
		if want := digits.MatchString(name) && n < format.MaxSlots; ok != want || ok && (ChunkName(slot) != name || uint64(slot) != n) {
			t.Fatal(fmt.Sprintf("%q", name), slot, ok)
		}
	})
}
