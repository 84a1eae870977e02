package wal

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"sync/atomic"
	"time"

	"github.com/vdisk/vdisk/cow/internal/fault"
	"github.com/vdisk/vdisk/format"
	"github.com/vdisk/vdisk/internal/storage"
)

const (
	// MarkName is the name of the file in the store's folder. Older programs leave the file alone.
	MarkName  = "durable"
	MarkPlace = 4096 // distance between the two marks, so that they share no page
	MarkCount = 2
	markEvery = time.Second // how often the system is told to begin writing the mark
	markRetry = time.Second // from a failed write to the next try
)

// Mark is the file that says how far the log is durable: docs/format.md, Durable mark. Without it, records that were
// flushed last could not be told from records that a crash cut short. The mark is a hint that is always true, so a
// failure to write it is not a failure of the log.
type Mark struct {
	fs   storage.FS
	uuid [16]byte
	log  *slog.Logger

	file storage.File // nil: there is no file; set by open or begin

	// Guarded by Log.syncMu.
	seq   uint64 // the highest sequence number in the file; 0: none
	whole bool   // both places hold a mark of this store
	next  int    // the place to write next

	failedAt time.Time // when the last write failed; zero: it did not

	fresh atomic.Bool // written since the last push

	scrap [format.DurableMarkSize]byte
}

// Open opens the file, if there is one, and reads the marks. It changes nothing.
func (m *Mark) Open(fsys storage.FS, uuid [16]byte, log *slog.Logger) {
	m.fs, m.uuid, m.log = fsys, uuid, log
	f, err := fsys.Open(MarkName)
	if errors.Is(err, fs.ErrNotExist) {
		return
	}
	if err != nil {
		log.Warn("how far the log is durable cannot be read", "file", MarkName, "err", err)
		return
	}
	m.file, m.whole = f, true
	for place := range MarkCount {
		mark, err := m.read(place)
		if err != nil {
			m.whole = false
			log.Debug("a mark of how far the log is durable cannot be read", "file", MarkName, "place", place, "err", err)
		} else if mark.Seq >= m.seq {
			m.seq, m.next = mark.Seq, (place+1)%MarkCount
		}
	}
	if m.seq == 0 {
		log.Warn("how far the log is durable is not known", "file", MarkName)
	}
}

// read reads and verifies one of the two marks.
func (m *Mark) read(place int) (format.DurableMark, error) {
	n, err := ReadFull(m.file, m.scrap[:], int64(place)*MarkPlace)
	if err != nil {
		return format.DurableMark{}, err
	}
	mark, err := format.DecodeDurableMark(m.scrap[:n])
	if err == nil && mark.UUID != m.uuid {
		err = fault.Corruptf("it belongs to store %x", mark.UUID)
	}
	return mark, err
}

// Begin prepares the file for an owner that writes, and whose log is durable up to seq. If a repair has given up
// records, the file says more than that, which is false from now on. It must be gone before the log goes on, so a
// failure to remove it is an error. A file that cannot be written is none.
func (m *Mark) Begin(seq uint64) error {
	if m.file != nil && m.seq > seq {
		if err := m.remove(); err != nil {
			return fmt.Errorf("remove the file %s, which speaks of records that are given up: %w", MarkName, err)
		}
	}
	if m.file != nil && m.whole {
		return nil
	}
	if err := m.make(seq); err != nil {
		m.failed(err)
	}
	return nil
}

// remove removes the file durably.
func (m *Mark) remove() error {
	err := errors.Join(m.file.Close(), m.fs.Remove(MarkName), m.fs.SyncDir())
	m.file, m.seq, m.whole, m.next = nil, 0, false, 0
	return err
}

// make writes both marks, and syncs the file and the directory, so that the file's blocks are allocated and written.
func (m *Mark) make(seq uint64) (err error) {
	if m.file == nil {
		if m.file, err = m.fs.Create(MarkName, MarkCount*MarkPlace); err != nil {
			return err
		}
	}
	p := make([]byte, MarkCount*MarkPlace)
	mark := format.DurableMark{UUID: m.uuid, Seq: seq}
	for place := range MarkCount {
		mark.Encode(p[place*MarkPlace:])
	}
	if _, err = m.file.WriteAt(p, 0); err != nil {
		return err
	}
	m.seq, m.whole = seq, true
	return errors.Join(m.file.Sync(), m.fs.SyncDir())
}

// set records that every record before seq is durable. The caller holds Log.syncMu. After a failure it tries again, but
// not with each flush.
func (m *Mark) set(seq uint64) {
	if m.file == nil || seq <= m.seq || !m.failedAt.IsZero() && time.Since(m.failedAt) < markRetry {
		return
	}
	mark := format.DurableMark{UUID: m.uuid, Seq: seq}
	mark.Encode(m.scrap[:])
	if _, err := m.file.WriteAt(m.scrap[:], int64(m.next)*MarkPlace); err != nil {
		m.failed(err) // the other place is whole
		return
	}
	if !m.failedAt.IsZero() {
		m.failedAt = time.Time{}
		m.log.Info("how far the log is durable is written down again", "file", MarkName)
	}
	m.seq, m.next = seq, (m.next+1)%MarkCount
	m.fresh.Store(true)
}

// failed notes that the mark could not be written. What the file says remains true.
func (m *Mark) failed(err error) {
	if m.failedAt.IsZero() {
		m.log.Warn("how far the log is durable is not written down: after a crash, damage to what is flushed now may look like the end of the log",
			"file", MarkName, "err", err)
	}
	m.failedAt = time.Now()
}

// push tells the system to begin writing the marks that were set, so that a power cut loses only the latest.
func (m *Mark) push() {
	if m.fresh.Swap(false) {
		m.file.StartWrite(0, MarkCount*MarkPlace)
	}
}

// Seq returns the sequence number before which every record is durable, as the file says; 0: it does not say.
func (m *Mark) Seq() uint64 { return m.seq }

// Close closes the file.
func (m *Mark) Close() error {
	if m.file == nil {
		return nil
	}
	return m.file.Close()
}
