package powercut

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// The log of dm-log-writes (Linux, Documentation/admin-guide/device-mapper/log-writes.rst and drivers/md/dm-log-writes.c)
// is a row of sectors. All numbers are little-endian.
//
//	sector 0   magic, version, number of entries (64 bits each), size of a sector (32 bits)
//	then, for each entry:
//	  a sector: first sector, number of sectors, flags, length of a mark's text (64 bits each); the text
//	  the data that was written, unless the entry is a discard
//
// A write is logged once a flush that was sent after its completion is complete, so the log is what a disk has without
// its cache.
const (
	logMagic     = 0x6a736677736872
	logVersion   = 1
	logEntrySize = 32

	flagFlush   = 1 << 0
	flagFUA     = 1 << 1
	flagDiscard = 1 << 2
	flagMark    = 1 << 3
)

// logEntry is one entry of the log. Offsets are in bytes.
type logEntry struct {
	off, size int64
	flags     uint64
	mark      string // only if flagMark is set
	data      int64  // where the data is in the log
}

// readLog reads the entries of a log, but not their data.
func readLog(r io.ReaderAt) ([]logEntry, error) {
	var super [28]byte
	if _, err := r.ReadAt(super[:], 0); err != nil {
		return nil, fmt.Errorf("super block: %w", err)
	}
	magic, version := binary.LittleEndian.Uint64(super[:]), binary.LittleEndian.Uint64(super[8:])
	count, sector := binary.LittleEndian.Uint64(super[16:]), int64(binary.LittleEndian.Uint32(super[24:]))
	if magic != logMagic || version != logVersion || sector < 512 || sector > 1<<16 {
		return nil, fmt.Errorf("super block %x: not a log that this program knows", super)
	}
	var entries []logEntry
	head := make([]byte, sector)
	for at := sector; uint64(len(entries)) < count; {
		if _, err := r.ReadAt(head, at); err != nil {
			return nil, fmt.Errorf("entry %d at %d: %w", len(entries), at, err)
		}
		word := func(i int) int64 { return int64(binary.LittleEndian.Uint64(head[8*i:])) }
		e := logEntry{off: word(0) * sector, size: word(1) * sector, flags: uint64(word(2)), data: at + sector}
		if n := word(3); n < 0 || n > sector-logEntrySize || e.off < 0 || e.size < 0 {
			return nil, fmt.Errorf("entry %d at %d: %x", len(entries), at, head[:logEntrySize])
		} else if e.flags&flagMark != 0 {
			e.mark = string(bytes.TrimRight(head[logEntrySize:][:n], "\x00"))
		}
		at += sector
		if e.flags&flagDiscard == 0 {
			at += e.size
		}
		entries = append(entries, e)
	}
	return entries, nil
}

// apply does to a disk's image what an entry says.
func (e logEntry) apply(image *os.File, log io.ReaderAt) error {
	if e.flags&flagDiscard != 0 {
		return unix.Fallocate(int(image.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, e.off, e.size)
	}
	_, err := io.Copy(io.NewOffsetWriter(image, e.off), io.NewSectionReader(log, e.data, e.size))
	return err
}

// changes reports whether the entry changes the disk.
func (e logEntry) changes() bool { return e.size > 0 }

// TestReadLog reads a small log with each kind of entry.
func TestReadLog(t *testing.T) {
	const sector = 512
	var log []byte
	words := func(w ...uint64) {
		for _, v := range w {
			log = binary.LittleEndian.AppendUint64(log, v)
		}
	}
	pad := func() { log = append(log, make([]byte, -len(log)&(sector-1))...) }
	words(logMagic, logVersion, 5, sector)
	pad()
	words(2, 1, 0, 0) // a write of one sector
	pad()
	log = append(log, bytes.Repeat([]byte("a"), sector)...)
	words(0, 0, flagFlush, 0)
	pad()
	words(0, 0, flagMark, 5)
	log = append(log, "synced"[:5]...)
	pad()
	words(0, 3, flagDiscard, 0)
	pad()
	words(1, 1, flagFlush|flagFUA, 0)
	pad()
	log = append(log, bytes.Repeat([]byte("b"), sector)...)
	entries, err := readLog(bytes.NewReader(log))
	if err != nil {
		t.Fatal(err)
	}
	image, err := os.Create(filepath.Join(t.TempDir(), "image"))
	if err != nil {
		t.Fatal(err)
	}
	defer image.Close()
	if err := image.Truncate(4 * sector); err != nil {
		t.Fatal(err)
	}
	z, a, b := string(make([]byte, sector)), string(bytes.Repeat([]byte("a"), sector)), string(bytes.Repeat([]byte("b"), sector))
	want := []string{z + z + a + z, z + z + a + z, z + z + a + z, z + z + z + z, z + b + z + z}
	for i, e := range entries {
		if err := e.apply(image, bytes.NewReader(log)); errors.Is(err, unix.EOPNOTSUPP) {
			t.Skip("the file system of temporary files cannot punch holes")
		} else if err != nil {
			t.Fatalf("entry %d: %v", i, err)
		}
		got, err := os.ReadFile(image.Name())
		if err != nil || string(got) != want[i] {
			t.Errorf("after entry %d, %+v: %q, %v", i, e, got, err)
		}
	}
	if len(entries) != 5 || entries[2].mark != "synce" {
		t.Errorf("entries: %+v", entries)
	}
	if _, err := readLog(bytes.NewReader(log[:len(log)-2*sector])); err == nil {
		t.Error("a log that is cut off was read")
	}
}
