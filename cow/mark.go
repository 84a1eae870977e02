package cow

import (
	"errors"
	"io/fs"
	"log/slog"
	"sync/atomic"

	"github.com/vdisk/vdisk/format"
	"github.com/vdisk/vdisk/internal/storage"
)

const (
	// markName is the name of the file in the store's folder. Older programs leave the file alone.
	markName  = "durable"
	markPlace = 4096 // distance between the two marks, so that they share no page
	markCount = 2
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
	seq   uint64 // sequence number in the file
	whole bool   // both places hold a mark of this store
	next  int    // the place to write next
	off   bool   // a write has failed, and no more are tried

	fresh atomic.Bool // written since the last push

	scrap [format.DurableMarkSize]byte
}

// open opens the file, and returns the highest mark in it; 0: there is none. It changes nothing.
func (m *durableMark) open(fsys storage.FS, uuid [16]byte, log *slog.Logger) (seq uint64) {
	m.fs, m.uuid, m.log = fsys, uuid, log
	f, err := fsys.Open(markName)
	if errors.Is(err, fs.ErrNotExist) {
		return 0
	}
	if err != nil {
		log.Warn("how far the log is durable cannot be read", "file", markName, "err", err)
		return 0
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
	return m.seq
}

// read reads and verifies one of the two marks.
func (m *durableMark) read(place int) (format.DurableMark, error) {
	n, err := readFull(m.file, m.scrap[:], int64(place)*markPlace)
	if err != nil {
		return format.DurableMark{}, err
	}
	mark, err := format.DecodeDurableMark(m.scrap[:n])
	if err == nil && mark.UUID != m.uuid {
		err = corruptf("it belongs to store %x", mark.UUID)
	}
	return mark, err
}

// begin prepares the file for an owner that writes, and whose log is durable up to seq. After a repair has
// given up records, seq is less than the mark in the file.
func (m *durableMark) begin(seq uint64) {
	if m.file != nil && m.whole && m.seq <= seq {
		return
	}
	if err := m.make(seq); err != nil {
		m.giveUp(err)
	}
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

// set records that every record before seq is durable. The mark never goes back. The caller holds
// recordLog.syncMu.
func (m *durableMark) set(seq uint64) {
	if m.off || seq <= m.seq {
		return
	}
	mark := format.DurableMark{UUID: m.uuid, Seq: seq}
	mark.Encode(m.scrap[:])
	if _, err := m.file.WriteAt(m.scrap[:], int64(m.next)*markPlace); err != nil {
		m.giveUp(err)
		return
	}
	m.seq, m.next = seq, (m.next+1)%markCount
	m.fresh.Store(true)
}

// giveUp stops writing marks. The file stays as it is, and what it says remains true.
func (m *durableMark) giveUp(err error) {
	m.off = true
	m.log.Warn("how far the log is durable is not written down any more: after a crash, damage to what is flushed now may look like the end of the log",
		"file", markName, "err", err)
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
