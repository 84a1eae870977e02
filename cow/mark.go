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
	// markName is the file's name in the store's folder, where older programs leave it alone.
	markName  = "durable"
	markPlace = 4096 // from one mark to the next: they share no page
	markCount = 2
)

// durableMark is the file that says how far the log is durable: docs/format.md, Durable mark. Without it what was flushed
// last could not be told from what a crash cut short. It is a hint that is always true, so a failure to write it is no
// failure of the log.
type durableMark struct {
	fs   storage.FS
	uuid [16]byte
	log  *slog.Logger

	file storage.File // nil: there is none; set by open or begin

	// One sets at a time: recordLog.syncMu.
	seq   uint64 // of the file
	whole bool   // both places have a mark of this store
	next  int    // place
	off   bool   // a write has failed, and no other is tried

	fresh atomic.Bool // written since the last push

	scrap [format.DurableMarkSize]byte
}

// open reads the mark; 0: there is none. Nothing is changed.
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

// begin makes the file ready for an owner that writes, whose log is durable up to seq. Where a repair has given up what
// lay behind, that is less than the mark says.
func (m *durableMark) begin(seq uint64) {
	if m.file != nil && m.whole && m.seq <= seq {
		return
	}
	if err := m.make(seq); err != nil {
		m.giveUp(err)
	}
}

// make writes the whole file, and syncs it, so that its blocks are there.
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

// set writes that every record before seq is durable. One sets at a time, and never less than before.
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

// giveUp leaves the file as it is: what it says stays true.
func (m *durableMark) giveUp(err error) {
	m.off = true
	m.log.Warn("how far the log is durable is not written down any more: after a crash, damage to what is flushed now may look like the end of the log",
		"file", markName, "err", err)
}

// push tells the system to begin writing what was set, so that a power cut takes only the last of it.
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
