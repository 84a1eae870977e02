package cow

import (
	"context"
	"encoding/binary"
	"errors"
	"log/slog"
	"math/rand/v2"
	"runtime"
	"sync"
	"testing"

	"github.com/vdisk/vdisk/cow/internal/wal"
	"github.com/vdisk/vdisk/format"
	"github.com/vdisk/vdisk/internal/storage"
	"github.com/vdisk/vdisk/internal/storage/crashfs"
)

// TestOrderOfFlushes lets writers write and flush at once, beside checkpoints, and holds the file operations to the rules
// that make a flush a promise:
//
//   - A flush is answered only after a sync of each chunk file, which began when every write that was answered before the
//     flush had been written out.
//   - A durable mark, and the same in a chunk's header, is written only after such a sync of all records before it.
//   - A record goes into a chunk only after a sync of the chunk's header, and one of the folder with its name.
//
// The golden order (TestGoldenOrder) is about one deed at a time.
func TestOrderOfFlushes(t *testing.T) {
	t.Parallel()
	const writers, operations, blocks = 4, 200, 16
	dir := t.TempDir()
	must(t, Create(dir))
	w := &flushWatch{FS: crashfs.New(), t: t, records: map[uint64]*watchedRecord{}, answered: map[uint64]int64{}, written: map[uint64]*watchedRecord{}, files: map[string]*watchedChunk{}}
	s := open(t, dir, Options{fs: w, chunkBytes: 256 << 10, checkpointInterval: -1, noTableSync: true, Logger: slog.New(slog.DiscardHandler)})
	_, err := s.CreateVolume("v", VolumeOptions{Size: writers * blocks * format.BlockSize, Codec: format.Raw})
	must(t, err)
	d, err := s.OpenDevice(Ref{Volume: "v"}, false)
	must(t, err)

	ctx, cancel := context.WithCancel(t.Context())
	var wg, beside sync.WaitGroup
	beside.Go(func() {
		for ctx.Err() == nil {
			if err := s.Checkpoint(); err != nil {
				t.Error(err)
			}
		}
	})
	for n := range writers {
		wg.Go(func() {
			r := rand.New(rand.NewPCG(rand.Uint64(), 0))
			p := make([]byte, format.BlockSize)
			for i := range operations {
				if r.IntN(4) == 0 {
					asked := w.now()
					if err := d.Flush(); err != nil {
						t.Error(err)
					}
					w.flushed(asked)
					continue
				}
				id := uint64(1 + n*operations + i)
				binary.LittleEndian.PutUint64(p, id)
				if _, err := d.WriteAt(p, int64(n*blocks+r.IntN(blocks))*format.BlockSize); err != nil {
					t.Error(err)
				}
				w.wrote(id)
			}
		})
	}
	wg.Wait()
	cancel()
	beside.Wait()
	must(t, errors.Join(d.Close(), s.Close()))
	if w.flushes == 0 || w.marks == 0 || w.headers < 4 {
		t.Errorf("%d flushes, %d marks and %d chunk headers were seen", w.flushes, w.marks, w.headers)
	}
}

// flushWatch checks the operations on its files. It has a clock that counts them.
type flushWatch struct {
	storage.FS
	t *testing.T

	mu                      sync.Mutex // guards the fields below
	clock                   int64
	records                 map[uint64]*watchedRecord // by sequence number
	written                 map[uint64]*watchedRecord // those of the writers, by the number in their content
	answered                map[uint64]int64          // when these were answered
	files                   map[string]*watchedChunk
	flushes, marks, headers int
}

// watchedRecord is a record that was given to a file.
type watchedRecord struct {
	out     bool // the write has ended
	durable bool // a sync that began after it has ended
}

// watchedChunk is a chunk file since its last header.
type watchedChunk struct {
	seq                    uint64
	headerOut, header, dir bool // the header is written; the header, and the file's name, are durable
	records                []*watchedRecord
}

// now moves the clock on, and returns it.
func (w *flushWatch) now() int64 {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.clock++
	return w.clock
}

// wrote notes that a write was answered.
func (w *flushWatch) wrote(id uint64) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.clock++
	w.answered[id] = w.clock
}

// flushed checks a flush that was asked for then, and has been answered now.
func (w *flushWatch) flushed(asked int64) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.flushes++
	for id, at := range w.answered {
		if r := w.written[id]; at < asked && (r == nil || !r.durable) {
			w.t.Errorf("a flush is answered, and write %d, which was answered before it was asked for, is %v", id, r)
		}
	}
}

// claims checks that every record before seq is durable, since something that is written now says so.
func (w *flushWatch) claims(what string, seq uint64) {
	for n := uint64(1); n < seq; n++ {
		if r := w.records[n]; r == nil || !r.durable {
			w.t.Errorf("%s says that the log is durable up to record %d, and record %d is %v", what, seq, n, r)
			return
		}
	}
}

// begin looks at a write that begins, and returns the records in it.
func (w *flushWatch) begin(name string, p []byte, off int64) (records []*watchedRecord) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if name == wal.MarkName {
		for ; len(p) > 0; p = p[min(wal.MarkPlace, len(p)):] {
			if m, err := format.DecodeDurableMark(p); err != nil {
				w.t.Error(err)
			} else {
				w.marks++
				w.claims("the mark", m.Seq)
			}
		}
		return nil
	}
	c := w.files[name]
	if c == nil {
		return nil // no chunk
	}
	if off == 0 {
		h, err := format.DecodeChunkHeader(p)
		if err != nil {
			w.t.Error(err)
		}
		w.headers++
		w.claims("the header of chunk "+name, h.Durable)
		*c = watchedChunk{seq: h.Seq, dir: c.dir}
		return nil
	}
	for len(p) >= format.RecordHeaderSize {
		h, err := format.DecodeRecordHeader(p, c.seq, uint32(off))
		if err != nil {
			break // zeros, or a summary
		}
		if !c.header || !c.dir {
			w.t.Errorf("record %d goes into chunk %s: its header is durable: %v, its name: %v", h.Seq, name, c.header, c.dir)
		}
		r := &watchedRecord{}
		records = append(records, r)
		w.records[h.Seq] = r
		if h.Kind == format.KindData {
			w.written[binary.LittleEndian.Uint64(p[format.RecordHeaderSize:])] = r
		}
		p, off = p[h.Size():], off+int64(h.Size())
	}
	c.records = append(c.records, records...)
	return records
}

// end notes that a write has ended.
func (w *flushWatch) end(name string, off int64, records []*watchedRecord) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, r := range records {
		r.out = true
	}
	if c := w.files[name]; c != nil && off == 0 {
		c.headerOut = true
	}
}

// covered returns a function that notes that a sync of a file which begins now has ended.
func (w *flushWatch) covered(name string) (ended func()) {
	w.mu.Lock()
	defer w.mu.Unlock()
	c := w.files[name]
	if c == nil {
		return func() {}
	}
	var records []*watchedRecord
	for _, r := range c.records {
		if r.out && !r.durable {
			records = append(records, r)
		}
	}
	seq, header := c.seq, c.headerOut
	return func() {
		w.mu.Lock()
		defer w.mu.Unlock()
		for _, r := range records {
			r.durable = true
		}
		c.header = c.header || header && c.seq == seq
	}
}

func (w *flushWatch) file(f storage.File, name string, err error) (storage.File, error) {
	if err != nil {
		return nil, err
	}
	return &watchedFile{f, w, name}, nil
}

func (w *flushWatch) Create(name string, size int64) (storage.File, error) {
	f, err := w.FS.Create(name, size)
	if _, isChunk := wal.ParseChunkName(name); isChunk && err == nil {
		w.mu.Lock()
		w.files[name] = &watchedChunk{}
		w.mu.Unlock()
	}
	return w.file(f, name, err)
}

func (w *flushWatch) Open(name string) (storage.File, error) {
	f, err := w.FS.Open(name)
	return w.file(f, name, err)
}

func (w *flushWatch) SyncDir() error {
	w.mu.Lock()
	var named []*watchedChunk
	for _, c := range w.files {
		named = append(named, c)
	}
	w.mu.Unlock()
	err := w.FS.SyncDir()
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, c := range named {
		c.dir = true
	}
	return err
}

type watchedFile struct {
	storage.File
	w    *flushWatch
	name string
}

func (f *watchedFile) WriteAt(p []byte, off int64) (int, error) {
	records := f.w.begin(f.name, p, off)
	runtime.Gosched() // others go on while this is under way
	n, err := f.File.WriteAt(p, off)
	f.w.end(f.name, off, records)
	return n, err
}

func (f *watchedFile) Sync() error {
	ended := f.w.covered(f.name)
	runtime.Gosched()
	err := f.File.Sync()
	if err == nil {
		ended()
	}
	return err
}

func (r *watchedRecord) String() string {
	switch {
	case r == nil:
		return "in no file"
	case !r.out:
		return "being written"
	case !r.durable:
		return "written, and no sync that began since has ended"
	}
	return "durable"
}
