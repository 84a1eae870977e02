package cow

import (
	"bytes"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"go.etcd.io/bbolt"

	"github.com/vdisk/vdisk/cow/internal/wal"
	"github.com/vdisk/vdisk/format"
	"github.com/vdisk/vdisk/internal/storage/crashfs"
	"github.com/vdisk/vdisk/metadata"
)

// image is the files of a store, by their path in its folder. A nil content stands for a file that is not there.
type image map[string][]byte

// specimen is an intact store on a real file system, to be damaged, and what it holds.
type specimen struct {
	name  string
	files image
	m     *model
	floor uint64 // records before are durable
}

// specimens are the states of one store, and two stores whose files do not belong to it.
type specimens struct {
	first    *specimen // an early state, closed
	killed   *specimen // a later one, with a log behind its checkpoint, and some of it not flushed
	closed   *specimen // the last one
	fork     *specimen // a copy of the first that went another way: it has the same id
	stranger *specimen // another store
}

// specimenOptions are for chunks of a few records, so that many come and go.
func specimenOptions() Options {
	return Options{
		// A chunk has room for the largest record: in one that had not, the log would make chunks for ever.
		checkpointInterval: -1, noTableSync: true, chunkBytes: 96 << 10, reapBatch: 3, replayBatch: 20,
		CacheBytes: 1 << 20, Logger: slog.New(slog.DiscardHandler),
	}
}

// onDisk opens a store that is in a folder, and gives it a model.
func onDisk(dir string, m *model, o Options) (*modelStore, error) {
	s, err := Open(dir, o)
	if err != nil {
		return nil, err
	}
	s.cold.codec = quickCodec
	w := &modelStore{harness: &crashHarness{}, dir: dir, s: s, m: m, devs: map[string]*Device{}, buf: make([]byte, 64<<10)}
	w.injector = &crashInjector{rng: rand.New(rand.NewPCG(1, 1)), every: never, fs: crashfs.New(), m: m, floor: m.next()}
	return w, nil
}

// live does n operations.
func (w *modelStore) live(t *testing.T, rng *rand.Rand, n int, kinds string) {
	t.Helper()
	all := strings.Fields(kinds)
	for range n {
		o := op{all[rng.IntN(len(all))], rng.Uint32(), rng.Uint32(), rng.Uint32()}
		switch o.kind {
		case "create":
			name := w.newName("v")
			w.volume(t, name, 128<<10+int64(rng.IntN(512))*512, []format.Codec{format.S2, format.Zstd, format.Raw}[o.c%3])
			continue
		case "resize":
			o.c |= 1 // a little
		case "write", "zero":
			o.c -= o.c % 5 // little ones
			o.c += uint32(rng.IntN(4))
		}
		if err := w.do(o); err != nil {
			t.Fatalf("%v: %v", o, err)
		}
	}
}

const (
	// lively is what happens between the first state and the last.
	lively = "write write write write write discard zero flush snapshot snapshot clone unsnap resize rename rollback " +
		"checkpoint clean clean cold churn reap between"
	// logged is what happens behind the checkpoint of the store that is killed.
	logged = "write write write write discard zero flush snapshot clone clean cold resize skip"
)

// newSpecimens makes the states of a store that has everything.
func newSpecimens(t *testing.T, seed uint64) *specimens {
	t.Helper()
	for ; ; seed++ { // most have all; a few may lack something
		if x := makeSpecimens(t, seed); x != nil {
			return x
		}
	}
}

func makeSpecimens(t *testing.T, seed uint64) *specimens {
	t.Helper()
	rng := rand.New(rand.NewPCG(seed, 13))
	dir, other := filepath.Join(memoryDir(t), "store"), filepath.Join(memoryDir(t), "other")
	must(t, Create(dir))
	x := &specimens{}
	m := newModel(1, state{})
	begin := func(dir string, m *model) *modelStore {
		w, err := onDisk(dir, m, specimenOptions())
		must(t, err)
		w.names, w.writes = int(m.next())*100, rng.Uint64() // as nobody else has made them
		return w
	}
	take := func(name, dir string, w *modelStore) *specimen {
		return &specimen{name, readImage(t, dir), w.m.fork(), w.injector.floor}
	}
	w := begin(dir, m)
	w.live(t, rng, 3, "create")
	w.live(t, rng, 50, lively)
	must(t, w.close())
	x.first = take("first", dir, w)

	w = begin(dir, m)
	w.live(t, rng, 40, lively)
	must(t, w.event(w.s.Checkpoint()))
	w.live(t, rng, 30, logged)
	for _, name := range slices.Sorted(maps.Keys(w.m.now())) {
		w.write(t, name, 4096*int64(rng.IntN(8)), 8192, 3)
	}
	must(t, w.event(w.s.wal.Sync()))
	r := Ref{slices.Sorted(maps.Keys(w.m.now()))[0], w.newName("s")}
	w.m.snapshot(r)
	must(t, w.event(w.s.Snapshot(r)))
	w.write(t, r.Volume, 0, 8192, 3) // in the files, and not durable
	must(t, w.s.wal.WriteOut())
	must(t, w.letGo())
	killStore(w.s)
	x.killed = take("killed", dir, w)

	w = begin(dir, m)
	w.live(t, rng, 12, lively)
	must(t, w.close())
	x.closed = take("closed", dir, w)

	must(t, lay(other, x.first.files))
	w = begin(other, x.first.m.fork())
	w.live(t, rng, 40, lively)
	must(t, w.close())
	x.fork = take("fork", other, w)

	must(t, os.RemoveAll(other))
	must(t, Create(other))
	w = begin(other, newModel(1, state{}))
	w.live(t, rng, 3, "create")
	w.live(t, rng, 40, lively)
	must(t, w.close())
	x.stranger = take("stranger", other, w)
	return x.whole(t)
}

// whole returns the specimens if they have everything that can be damaged, and otherwise nil.
func (x *specimens) whole(t *testing.T) *specimens {
	t.Helper()
	has := map[string]int{}
	for _, s := range []*specimen{x.killed, x.closed} {
		for _, r := range s.files.regions(t) {
			has[r.what]++
		}
		if len(s.m.now()) < 2 {
			return nil
		}
	}
	for _, what := range []string{
		"header of a data record", "header of a hole record", "header of an event record", "header of a moved record",
		"payload of a moved record", "entries of a summary", "leaf page of the table", "free page of the table",
	} {
		if has[what] == 0 {
			t.Logf("no %s: another seed is taken", what)
			return nil
		}
	}
	return x
}

// readImage reads the files of a store that nobody has open. The reserve holds nothing.
func readImage(t *testing.T, dir string) image {
	t.Helper()
	img := image{}
	must(t, eachFile(dir, func(path string, content []byte) error { img[path] = content; return nil }))
	return img
}

func eachFile(dir string, fn func(path string, content []byte) error) error {
	return filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() || e.Name() == wal.ReserveName {
			return err
		}
		p, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		return fn(strings.TrimPrefix(path, dir+"/"), p)
	})
}

// lay makes the files in a folder those of an image. It writes only what differs.
func lay(dir string, img image) error {
	if err := os.MkdirAll(filepath.Join(dir, chunksDir), 0o700); err != nil {
		return err
	}
	same := map[string]bool{}
	err := eachFile(dir, func(path string, content []byte) error {
		want := img[path]
		if same[path] = want != nil && bytes.Equal(content, want); want == nil {
			return os.Remove(filepath.Join(dir, path))
		}
		return nil
	})
	for path, content := range img {
		if err == nil && content != nil && !same[path] {
			err = os.WriteFile(filepath.Join(dir, path), content, 0o600)
		}
	}
	return err
}

// changed says how the files in a folder differ from an image, but for the lock, which says who looked last.
func changed(dir string, img image) error {
	seen := map[string]bool{}
	err := eachFile(dir, func(path string, content []byte) error {
		seen[path] = true
		if path != lockFile && (img[path] == nil || !bytes.Equal(content, img[path])) {
			return fmt.Errorf("%s has changed, or is new", path)
		}
		return nil
	})
	for path, content := range img {
		if err == nil && content != nil && !seen[path] && path != lockFile {
			err = fmt.Errorf("%s is gone", path)
		}
	}
	return err
}

// stretch is a range of a file that means one thing.
type stretch struct {
	file   string
	off, n int
	what   string
	data   bool // content of blocks, which is sampled; otherwise each byte is damaged
	free   bool // nothing reads it
}

// regions cuts all files into regions without gaps, each file in order.
func (img image) regions(t *testing.T) (all []stretch) {
	t.Helper()
	for _, file := range slices.Sorted(maps.Keys(img)) {
		p := img[file]
		switch {
		case strings.HasPrefix(file, chunksDir+"/"):
			all = append(all, chunkRegions(file, p)...)
		case file == tableFile:
			all = append(all, tableRegions(t, p)...)
		case file == wal.MarkName:
			for place := range wal.MarkCount {
				at := place * wal.MarkPlace
				all = append(all, stretch{file, at, format.DurableMarkSize, "durable mark", false, false},
					stretch{file, at + format.DurableMarkSize, wal.MarkPlace - format.DurableMarkSize, "rest of a durable mark's page", true, true})
			}
		case file == lockFile:
			all = append(all, stretch{file, 0, len(p), "text of the lock", true, true})
		case file == tableFile+metadata.VerifiedSuffix:
			all = append(all, stretch{file, 0, len(p), "note about the table", false, false})
		default:
			all = append(all, stretch{file, 0, len(p), "file " + file, false, false})
		}
	}
	return slices.DeleteFunc(all, func(r stretch) bool { return r.n == 0 })
}

func chunkRegions(file string, p []byte) (all []stretch) {
	const fields = 68 // of the header; the rest of its page is padding
	all = append(all, stretch{file, 0, fields, "chunk header", false, false},
		stretch{file, fields, format.ChunkHeaderSize - fields, "padding of a chunk header", true, true})
	head, err := format.DecodeChunkHeader(p)
	if err != nil {
		return []stretch{{file, 0, len(p), "chunk without a header", true, false}}
	}
	off := format.ChunkHeaderSize
	for len(p)-off >= format.RecordHeaderSize {
		h, err := format.DecodeRecordHeader(p[off:], head.Seq, uint32(off))
		if err != nil {
			break
		}
		kind, payload := h.Kind.String(), off+format.RecordHeaderSize
		article := "a"
		if h.Kind == format.KindEvent {
			article = "an"
		}
		what := fmt.Sprintf(" of %s %s record", article, kind)
		own := 0 // bytes of the payload that are no content
		switch h.Kind {
		case format.KindMoved:
			own = 16
			all = append(all, stretch{file, off, format.RecordHeaderSize, "header" + what, false, false},
				stretch{file, payload, own, "place in the payload" + what, false, false})
		default:
			all = append(all, stretch{file, off, format.RecordHeaderSize, "header" + what, false, false})
		}
		isData := h.Kind == format.KindData || h.Kind == format.KindMoved
		all = append(all, stretch{file, payload + own, h.PayloadLen - own, "payload" + what, isData, false},
			stretch{file, payload + h.PayloadLen, h.Size() - format.RecordHeaderSize - h.PayloadLen, "padding" + what, true, true})
		off += h.Size()
	}
	end := len(p)
	if len(p) > format.SummaryFooterSize {
		if f, err := format.DecodeSummaryFooter(p[len(p)-format.SummaryFooterSize:], head.Seq, uint32(len(p))); err == nil {
			end -= f.Size()
			all = append(all, stretch{file, off, end - off, "room before a summary", true, true},
				stretch{file, end, f.Size() - format.SummaryFooterSize, "entries of a summary", false, false},
				stretch{file, len(p) - format.SummaryFooterSize, 40, "footer of a summary", false, false},
				stretch{file, len(p) - 24, 24, "zeros of a summary's footer", true, true})
			return all
		}
	}
	return append(all, stretch{file, off, end - off, "room behind the records", true, false})
}

func tableRegions(t *testing.T, p []byte) (all []stretch) {
	t.Helper()
	path := filepath.Join(t.TempDir(), tableFile)
	must(t, os.WriteFile(path, p, 0o600))
	db, err := bbolt.Open(path, 0o600, &bbolt.Options{ReadOnly: true, PreLoadFreelist: true})
	must(t, err)
	defer db.Close()
	size := db.Info().PageSize
	must(t, db.View(func(tx *bbolt.Tx) error {
		for id := 0; id*size < len(p); {
			info, err := tx.Page(id)
			if err != nil {
				return err
			}
			if info == nil { // behind the pages
				all = append(all, stretch{tableFile, id * size, len(p) - id*size, "room behind the table's pages", true, true})
				return nil
			}
			n := (1 + info.OverflowCount) * size
			if info.Type == "free" {
				n = size
			}
			all = append(all, stretch{tableFile, id * size, n, info.Type + " page of the table", info.Type == "free", info.Type == "free"})
			id += n / size
		}
		return nil
	}))
	return all
}
