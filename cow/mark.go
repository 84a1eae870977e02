package cow

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
	// markName is the name of the file in the store's folder. Older programs leave the file alone.
	markName  = "durable"
	markPlace = 4096 // distance between the two marks, so that they share no page
	markCount = 2
	markEvery = time.Second // how often the system is told to begin writing the mark
	markRetry = time.Second // from a failed write to the next try
)

// durableMark is the file that says how far the log is durable: docs/format.md, Durable mark. Without it,
// records that were flushed last could not be told from records that a crash cut short. The mark is a hint
// that is always true, so a failure to write it is not a failure of the log.
type durableMark struct {
	fs   storage.FS
	uuid [16]byte
	log  *slog.Logger

	file storage.File // nil: there is no file; set by open or begin

	// Guarded by recordLog.syncMu.
	seq   uint64 // the highest sequence number in the file; 0: none
	whole bool   // both places hold a mark of this store
	next  int    // the place to write next

	failedAt time.Time // when the last write failed; zero: it did not

	fresh atomic.Bool // written since the last push

	scrap [format.DurableMarkSize]byte
}

// open opens the file, if there is one, and reads the marks. It changes nothing.
func (m *durableMark) open(fsys storage.FS, uuid [16]byte, log *slog.Logger) {
	m.fs, m.uuid, m.log = fsys, uuid, log
	f, err := fsys.Open(markName)
	if errors.Is(err, fs.ErrNotExist) {
		return
	}
	if err != nil {
		log.Warn("how far the log is durable cannot be read", "file", markName, "err", err)
		return
	}
	m.file, m.whole = f, true
	for place := range markCount {
		mark, err := m.read(place)
		if err != nil {
			m.whole = false
			log.Debug("a mark of how far the log is durable cannot be read", "file", markName, "place", place, "err", err)
		} else if mark.Seq >= m.seq {
			m.seq, m.next = mark.Seq, (place+1)%markCount
		}
	}
	if m.seq == 0 {
		log.Warn("how far the log is durable is not known", "file", markName)
	}
}

// read reads and verifies one of the two marks.
func (m *durableMark) read(place int) (format.DurableMark, error) {
	n, err := readFull(m.file, m.scrap[:], int64(place)*markPlace)
	if err != nil {
		return format.DurableMark{}, err
	}
	mark, err := format.DecodeDurableMark(m.scrap[:n])
	if err == nil && mark.UUID != m.uuid {
		err = fault.Corruptf("it belongs to store %x", mark.UUID)
	}
	return mark, err
}

// begin prepares the file for an owner that writes, and whose log is durable up to seq. If a repair has given up
// records, the file says more than that, which is false from now on. It must be gone before the log goes on, so
// a failure to remove it is an error. A file that cannot be written is none.
func (m *durableMark) begin(seq uint64) error {
	if m.file != nil && m.seq > seq {
		if err := m.remove(); err != nil {
			return fmt.Errorf("remove the file %s, which speaks of records that are given up: %w", markName, err)
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
func (m *durableMark) remove() error {
	err := errors.Join(m.file.Close(), m.fs.Remove(markName), m.fs.SyncDir())
	m.file, m.seq, m.whole, m.next = nil, 0, false, 0
	return err
}

// make writes both marks, and syncs the file and the directory, so that the file's blocks are allocated and
// written.
func (m *durableMark) make(seq uint64) (err error) {
	if m.file == nil {
		if m.file, err = m.fs.Create(markName, markCount*markPlace); err != nil {
			return err
		}
	}
	p := make([]byte, markCount*markPlace)
	mark := format.DurableMark{UUID: m.uuid, Seq: seq}
	for place := range markCount {
		mark.Encode(p[place*markPlace:])
	}
	if _, err = m.file.WriteAt(p, 0); err != nil {
		return err
	}
	m.seq, m.whole = seq, true
	return errors.Join(m.file.Sync(), m.fs.SyncDir())
}

// set records that every record before seq is durable. The caller holds recordLog.syncMu. After a failure it
// tries again, but not with each flush.
func (m *durableMark) set(seq uint64) {
	if m.file == nil || seq <= m.seq || !m.failedAt.IsZero() && time.Since(m.failedAt) < markRetry {
		return
	}
	mark := format.DurableMark{UUID: m.uuid, Seq: seq}
	mark.Encode(m.scrap[:])
	if _, err := m.file.WriteAt(m.scrap[:], int64(m.next)*markPlace); err != nil {
		m.failed(err) // the other place is whole
		return
	}
	if !m.failedAt.IsZero() {
		m.failedAt = time.Time{}
		m.log.Info("how far the log is durable is written down again", "file", markName)
	}
	m.seq, m.next = seq, (m.next+1)%markCount
	m.fresh.Store(true)
}

// failed notes that the mark could not be written. What the file says remains true.
func (m *durableMark) failed(err error) {
	if m.failedAt.IsZero() {
		m.log.Warn("how far the log is durable is not written down: after a crash, damage to what is flushed now may look like the end of the log",
			"file", markName, "err", err)
	}
	m.failedAt = time.Now()
}

// push tells the system to begin writing the marks that were set, so that a power cut loses only the latest.
func (m *durableMark) push() {
	if m.fresh.Swap(false) {
		m.file.StartWrite(0, markCount*markPlace)
	}
}

func (m *durableMark) close() error {
	if m.file == nil {
		return nil
	}
	return m.file.Close()
}
