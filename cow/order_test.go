package cow

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/vdisk/vdisk/cow/internal/wal"
	"github.com/vdisk/vdisk/format"
	"github.com/vdisk/vdisk/internal/storage"
	"github.com/vdisk/vdisk/internal/strace"
)

var updateOrder = flag.Bool("update.order", false, "write testdata/order/engine anew")

const orderFile = "../testdata/order/engine"

// TestGoldenOrder compares the order of the file operations of each deed of the engine with the one in
// testdata/order/engine. A change of order shows there as a difference, to be read and agreed to: the rules are in
// docs/engine.md. The operations of the goroutine that makes the next chunk are listed apart ("beside"). If a deed ends
// chunks, the log's other goroutines write and sync beside it, in an order of their own; the operations of such a deed
// are listed by file, each once, in the order of their first times.
func TestGoldenOrder(t *testing.T) {
	if dir := os.Getenv(orderRun); dir != "" {
		must(t, os.WriteFile(filepath.Join(dir, orderSaid), recordOrder(t, dir, true), 0o600))
		return
	}
	got := recordOrder(t, t.TempDir(), false)
	if *updateOrder {
		must(t, os.WriteFile(orderFile, got, 0o644))
		return
	}
	want, err := os.ReadFile(orderFile)
	must(t, err)
	if bytes.Equal(got, want) {
		return
	}
	t.Errorf("%s is another (go test -update.order writes it anew): %s", orderFile, firstDifference(string(got), string(want)))
}

// firstDifference shows the neighbourhood of the first line in which two texts differ.
func firstDifference(got, want string) string {
	g, w := strings.Split(got, "\n"), strings.Split(want, "\n")
	at := 0
	for at < len(g) && at < len(w) && g[at] == w[at] {
		at++
	}
	return fmt.Sprintf("line %d:\nit is\n%s\nand should be\n%s", at+1,
		strings.Join(g[max(at-5, 0):min(at+15, len(g))], "\n"), strings.Join(w[max(at-5, 0):min(at+15, len(w))], "\n"))
}

// orderRun, in the environment, makes TestGoldenOrder do its deeds in a store in the folder that it names, and nothing
// else. At the beginning of each it makes and removes the file orderMark, which strace shows.
const (
	orderRun  = "VDISK_TEST_ORDER"
	orderMark = "deed"
	orderSaid = "asked" // gets what the engine has asked for
)

// TestOrderOfTheRealFiles does the deeds of TestGoldenOrder in a process under strace. The system calls on the files
// must be what the engine asked of its file layer: without this, a sync that does nothing would be believed.
func TestOrderOfTheRealFiles(t *testing.T) {
	if _, err := exec.LookPath("strace"); err != nil {
		t.Fatal("strace is needed; make test installs it")
	}
	dir := t.TempDir()
	cmd := exec.Command(os.Args[0], "-test.run=^TestGoldenOrder$")
	cmd.Env = append(os.Environ(), orderRun+"="+dir)
	events, err := strace.Run(cmd, dir)
	must(t, err)
	for i := range events {
		events[i].File = strings.TrimPrefix(events[i].File, "store/")
	}
	asked, err := os.ReadFile(filepath.Join(dir, orderSaid))
	must(t, err)
	if got := doneBySystemCalls(events); got != string(asked) {
		t.Errorf("%s", firstDifference(got, string(asked)))
	}
}

// doneBySystemCalls lists the system calls of each deed as operations by file.
func doneBySystemCalls(events []strace.Event) string {
	var text strings.Builder
	r := &recorder{}
	deed, metaWritten := -1, false
	end := func() {
		if deed >= 0 {
			fmt.Fprintf(&text, "%s\n%s\n", deeds[deed].name, r.end(true))
		}
		deed++
		r.begin()
	}
	for _, e := range events {
		name, isChunk := strings.CutPrefix(e.File, chunksDir+"/")
		switch {
		case e.File == orderMark:
			if e.Call == "make" && e.Ended {
				end()
			}
		case e.Call == "sync" != e.Ended:
		case e.Call == "sync" && e.File == chunksDir:
			r.add("folder", "sync")
		case e.File == tableFile && e.Call == "write":
			metaWritten = e.Off < 2*4096 // one of bbolt's two meta pages, which it writes last
			r.add("table", "commit")
		case e.File == tableFile && e.Call == "sync" && metaWritten:
			metaWritten = false
			r.add("table", "committed")
		case !isChunk:
		case e.Call == "make":
			r.add(name, "create")
		case e.Call == "write" && e.Off == 0 && name != wal.MarkName:
			r.add(name, "write the header")
		case e.Call != "allocate" || name == wal.ReserveName:
			r.add(name, e.Call)
		}
	}
	end()
	return text.String()
}

// deeds are what TestGoldenOrder does with a store, in order, with the chunk size of orderOptions.
var deeds = []struct {
	name   string
	do     func(t *testing.T, o *orderStore)
	byFile bool // the log's goroutines work beside it
}{
	{"open a new store", func(t *testing.T, o *orderStore) { o.open(t) }, false},
	{"create a volume", func(t *testing.T, o *orderStore) {
		_, err := o.s.CreateVolume("v", VolumeOptions{Size: 64 << 20, Codec: format.Raw})
		must(t, err)
	}, false},
	{"write 64 KiB", func(t *testing.T, o *orderStore) { o.write(t, 0, 64<<10) }, false},
	{"flush", func(t *testing.T, o *orderStore) { must(t, o.dev(t, "v").Flush()) }, false},
	{"flush without a write", func(t *testing.T, o *orderStore) { must(t, o.dev(t, "v").Flush()) }, false},
	{"snapshot", func(t *testing.T, o *orderStore) { must(t, o.s.Snapshot(Ref{"v", "a"})) }, false},
	{"checkpoint", func(t *testing.T, o *orderStore) { must(t, o.s.Checkpoint()) }, false},
	{"fill a chunk", func(t *testing.T, o *orderStore) { o.write(t, 0, 1<<20) }, true},
	{"checkpoint", func(t *testing.T, o *orderStore) { must(t, o.s.Checkpoint()) }, false},
	{"clone", func(t *testing.T, o *orderStore) { must(t, o.s.Clone(Ref{"v", "a"}, "c")) }, false},
	{"discard", func(t *testing.T, o *orderStore) { must(t, o.dev(t, "v").Discard(128<<10, 256<<10)) }, false},
	{"write zeroes", func(t *testing.T, o *orderStore) { must(t, o.dev(t, "v").WriteZeroes(512<<10, 64<<10, false)) }, false},
	{"resize", func(t *testing.T, o *orderStore) { must(t, o.s.Resize("c", 128<<20, false)) }, false},
	{"rename", func(t *testing.T, o *orderStore) { must(t, o.s.Rename(Ref{Volume: "c"}, Ref{Volume: "d"})) }, false},
	{"roll back", func(t *testing.T, o *orderStore) {
		must(t, o.dev(t, "v").Close())
		delete(o.devs, "v")
		must(t, o.s.Rollback(Ref{"v", "a"}))
	}, false},
	{"overwrite two chunks", func(t *testing.T, o *orderStore) { o.write(t, 0, 2<<20) }, true},
	{"remove the snapshot and the clone", func(t *testing.T, o *orderStore) {
		must(t, o.s.Remove(Ref{Volume: "d"}, true))
		must(t, o.s.Remove(Ref{"v", "a"}, false))
	}, false},
	{"checkpoint: the names go", func(t *testing.T, o *orderStore) { must(t, o.s.Checkpoint()) }, false},
	{"checkpoint: the reaper and dead chunks", func(t *testing.T, o *orderStore) { must(t, o.s.Checkpoint()) }, false},
	{"clean", func(t *testing.T, o *orderStore) {
		_, err := o.s.Clean(context.Background(), 0.05)
		must(t, err)
	}, true},
	{"cold pass", func(t *testing.T, o *orderStore) {
		_, err := o.s.Cold(context.Background())
		must(t, err)
	}, false},
	{"overwrite three chunks", func(t *testing.T, o *orderStore) { o.write(t, 0, 3<<20) }, true},
	{"checkpoint: dead chunks are kept to be recycled", func(t *testing.T, o *orderStore) { must(t, o.s.Checkpoint()) }, false},
	{"overwrite three chunks, into recycled files", func(t *testing.T, o *orderStore) { o.write(t, 0, 3<<20) }, true},
	{"close", func(t *testing.T, o *orderStore) { o.close(t) }, true},
	{"open a closed store", func(t *testing.T, o *orderStore) { o.open(t) }, false},
	{"write and flush", func(t *testing.T, o *orderStore) { o.write(t, 0, 64<<10); must(t, o.dev(t, "v").Flush()) }, false},
	{"write without a flush", func(t *testing.T, o *orderStore) { o.write(t, 1<<20, 64<<10) }, false},
	{"the process dies", func(t *testing.T, o *orderStore) { o.kill() }, false},
	{"open, with a replay", func(t *testing.T, o *orderStore) { o.open(t) }, false},
	{"close", func(t *testing.T, o *orderStore) { o.close(t) }, true},
}

// orderStore is the store that TestGoldenOrder works on.
type orderStore struct {
	dir  string
	s    *Store
	devs map[string]*Device
	rec  *recorder
}

// recordOrder does the deeds in a store in dir, and returns what they asked of the file layer.
func recordOrder(t *testing.T, dir string, byFile bool) []byte {
	o := &orderStore{dir: filepath.Join(dir, "store"), devs: map[string]*Device{}}
	must(t, Create(o.dir))
	files, err := storage.OpenDir(filepath.Join(o.dir, chunksDir))
	must(t, err)
	o.rec = &recorder{FS: files}
	var text bytes.Buffer
	for _, d := range deeds {
		mark := filepath.Join(dir, orderMark)
		f, err := os.OpenFile(mark, os.O_CREATE|os.O_EXCL, 0o600)
		must(t, err)
		must(t, errors.Join(f.Close(), os.Remove(mark)))
		o.rec.begin()
		d.do(t, o)
		if o.s != nil {
			o.s.wal.WaitIdle()
			if d.byFile {
				must(t, o.s.wal.Sync()) // after it the other goroutines have nothing left to do
			}
		}
		fmt.Fprintf(&text, "%s\n%s\n", d.name, o.rec.end(d.byFile || byFile))
	}
	return text.Bytes()
}

func (o *orderStore) open(t *testing.T) {
	o.s = open(t, o.dir, Options{
		fs: o.rec, copyFS: o.rec, chunkBytes: 1 << 20, checkpointInterval: -1, ColdAfter: -1,
		syncCopy: func(f storage.File) func() error { return f.Sync }, // as late as it can be, so that the order is one
		onCommit: func(done bool) error {
			if done {
				o.rec.add("table", "committed")
			} else {
				o.rec.add("table", "commit")
			}
			return nil
		},
	})
}

func (o *orderStore) dev(t *testing.T, name string) *Device {
	d := o.devs[name]
	if d == nil {
		var err error
		d, err = o.s.OpenDevice(Ref{Volume: name}, false)
		must(t, err)
		o.devs[name] = d
	}
	return d
}

func (o *orderStore) write(t *testing.T, off, n int64) {
	for at := off; at < off+n; at += 64 << 10 {
		_, err := o.dev(t, "v").WriteAt(randomBytes(64<<10, uint64(at)), at)
		must(t, err)
	}
}

func (o *orderStore) close(t *testing.T) {
	for _, d := range o.devs {
		must(t, d.Close())
	}
	clear(o.devs)
	must(t, o.s.Close())
	o.s = nil
}

func (o *orderStore) kill() {
	killStore(o.s)
	clear(o.devs)
	o.s = nil
}

// recorder notes the operations that change files, and their order.
type recorder struct {
	storage.FS
	mu     sync.Mutex
	caller string // the goroutine that does the deeds
	done   []operation
}

// operation is an operation on a file, or a commit of the table.
type operation struct {
	by, file, what string
}

func (r *recorder) begin() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.caller, r.done = goroutine(), nil
}

// end returns what was done since begin.
func (r *recorder) end(byFile bool) string {
	r.mu.Lock()
	defer r.mu.Unlock()
	var text strings.Builder
	list := func(title string, belongs func(operation) bool, key func(operation) string) {
		seen := map[string]bool{}
		last := ""
		for _, op := range r.done {
			k := key(op)
			if !belongs(op) || byFile && seen[k] || k == last {
				continue
			}
			if len(seen) == 0 {
				text.WriteString(title)
			}
			seen[k], last = true, k
			fmt.Fprintf(&text, "    %s: %s\n", op.file, op.what)
		}
	}
	key := func(op operation) string { return op.file + ": " + op.what }
	if !byFile {
		list("", func(op operation) bool { return op.by == r.caller }, key)
		list("  beside\n", func(op operation) bool { return op.by != r.caller }, key)
		return text.String()
	}
	var files []string
	for _, op := range r.done {
		files = append(files, op.file)
	}
	slices.Sort(files)
	for _, f := range slices.Compact(files) {
		list("", func(op operation) bool { return op.file == f }, key)
	}
	return text.String()
}

func (r *recorder) add(file, what string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if slot, ok := wal.ParseChunkName(file); ok {
		file = fmt.Sprint("chunk ", slot)
	}
	r.done = append(r.done, operation{goroutine(), file, what})
}

// goroutine returns the number of this goroutine.
func goroutine() string {
	var p [64]byte
	text, _, _ := strings.Cut(strings.TrimPrefix(string(p[:runtime.Stack(p[:], false)]), "goroutine "), " ")
	return text
}

// Overwrites is the same on every machine.
func (r *recorder) Overwrites() bool { return true }

func (r *recorder) Create(name string, size int64) (storage.File, error) {
	f, err := r.FS.Create(name, size)
	if err != nil {
		return nil, err
	}
	r.add(name, "create")
	return &recordedFile{f, r, name}, nil
}

func (r *recorder) Open(name string) (storage.File, error) {
	f, err := r.FS.Open(name)
	if err != nil {
		return nil, err
	}
	return &recordedFile{f, r, name}, nil
}

func (r *recorder) Remove(name string) error {
	err := r.FS.Remove(name)
	if !errors.Is(err, fs.ErrNotExist) {
		r.add(name, "remove")
	}
	return err
}

func (r *recorder) SetAside(name, as string) error {
	r.add(name, "set aside")
	return r.FS.SetAside(name, as)
}

func (r *recorder) SyncDir() error {
	err := r.FS.SyncDir()
	r.add("folder", "sync")
	return err
}

type recordedFile struct {
	storage.File
	r    *recorder
	name string
}

func (f *recordedFile) WriteAt(p []byte, off int64) (int, error) {
	what := "write"
	if off == 0 && f.name != wal.MarkName {
		what = "write the header"
	}
	f.r.add(f.name, what)
	return f.File.WriteAt(p, off)
}

func (f *recordedFile) Sync() error {
	err := f.File.Sync()
	f.r.add(f.name, "sync")
	return err
}

func (f *recordedFile) Truncate(size int64) error {
	f.r.add(f.name, "truncate")
	return f.File.Truncate(size)
}

func (f *recordedFile) Allocate(size int64) error {
	err := f.File.Allocate(size)
	if !errors.Is(err, errors.ErrUnsupported) {
		f.r.add(f.name, "allocate")
	}
	return err
}
