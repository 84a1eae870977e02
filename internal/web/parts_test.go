package web

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vdisk/vdisk/cow"
	"github.com/vdisk/vdisk/internal/journal"
	"github.com/vdisk/vdisk/internal/owner"
	"github.com/vdisk/vdisk/internal/storage"
)

func dialTo(path string) func(context.Context, string, string) (net.Conn, error) {
	return func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", path)
	}
}

// volume returns a volume with snapshots.
func volume(name, origin string, snapshots ...string) owner.Volume {
	v := owner.Volume{VolumeInfo: cow.VolumeInfo{Name: name, Origin: origin}}
	for _, s := range snapshots {
		v.Snapshots = append(v.Snapshots, cow.SnapshotInfo{Volume: name, Name: s})
	}
	return v
}

// drawn returns a tree as 'vdisk ls --tree' draws it.
func drawn(t tree) string {
	var text strings.Builder
	for _, r := range t.Rows {
		for _, g := range r.Guides {
			text.WriteString(map[string]string{"pipe": "│ ", "none": "  ", "tee": "├ ", "elbow": "└ "}[g])
		}
		text.WriteString(r.Name)
		if r.Origin != "" {
			text.WriteString(" from " + r.Origin)
		}
		text.WriteString("\n")
	}
	return text.String()
}

// TestTree draws a tree of everything, and parts of it.
func TestTree(t *testing.T) {
	volumes := []owner.Volume{
		volume("db", "", "a", "b"), volume("golden", "", "v1", "v2"), volume("lost", "(deleted)"), volume("vm1", "golden@v1", "x"),
		volume("vm2", "golden@v1"), volume("vm3", "golden@gone"), volume("vm4", "vm1@x"),
	}
	for _, x := range []struct{ find, want string }{
		{"", "db\n├ db@a\n└ db@b\ngolden\n├ golden@v1\n│ ├ vm1\n│ │ └ vm1@x\n│ │   └ vm4\n│ └ vm2\n├ golden@v2\n└ vm3 from golden@gone\nlost from (deleted)\n"},
		{"VM", "vm1 from golden@v1\n└ vm1@x\n  └ vm4\nvm2 from golden@v1\nvm3 from golden@gone\n"},
		{"@", "db@a\ndb@b\ngolden@v1\ngolden@v2\nvm1@x\n"},
		{"nothing", ""},
	} {
		if got := drawn(treeOf(volumes, x.find)); got != x.want {
			t.Errorf("%q:\n%s\nnot\n%s", x.find, got, x.want)
		}
	}
	// A volume that was rolled back comes from a snapshot of its own.
	back := []owner.Volume{volume("db", "db@a", "a", "b"), volume("copy", "db@a")}
	for _, x := range []struct{ find, want string }{
		{"", "db from db@a\n├ db@a\n│ └ copy\n└ db@b\n"},
		{"@", "db@a\ndb@b\n"},
	} {
		if got := drawn(treeOf(back, x.find)); got != x.want {
			t.Errorf("%q:\n%s\nnot\n%s", x.find, got, x.want)
		}
	}
	if r := treeOf(back, "").Rows[0]; r.Kind != "volume" {
		t.Errorf("a volume that was rolled back is a %s", r.Kind)
	}
	if x := treeOf(volumes, "db"); x.All != 12 || x.Found != 3 {
		t.Errorf("%d of %d", x.Found, x.All)
	}
}

// TestTreeIsBounded draws trees that are far too wide, long and deep.
func TestTreeIsBounded(t *testing.T) {
	var wide, deep []owner.Volume
	for i := range 2 * shownRows {
		wide = append(wide, volume(fmt.Sprint("v", i), "", "a", "b"))
		deep = append(deep, volume(fmt.Sprint("d", i), fmt.Sprintf("d%d@s", i-1), "s"))
	}
	for _, volumes := range [][]owner.Volume{wide, deep, append(deep, wide...)} {
		x := treeOf(volumes, "")
		if len(x.Rows) != shownRows {
			t.Errorf("%d rows", len(x.Rows))
		}
		for i, r := range x.Rows {
			if len(r.Guides) > shownGuides || volumes[0].Name == "d0" && len(r.Guides)+r.Deeper != i {
				t.Fatalf("%s, row %d: %d lines, %d left out", r.Name, i, len(r.Guides), r.Deeper)
			}
		}
	}
}

// TestTreeIsCheap makes the tree of a store with many snapshots: those without a row cost little.
func TestTreeIsCheap(t *testing.T) {
	const snapshots = 20000
	volumes := []owner.Volume{volume("v", "")}
	for i := range snapshots {
		volumes[0].Snapshots = append(volumes[0].Snapshots, cow.SnapshotInfo{Volume: "v", Name: fmt.Sprint("auto-20261130T175320Z-", i)})
	}
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	x := treeOf(volumes, "")
	runtime.ReadMemStats(&after)
	if each := (after.TotalAlloc - before.TotalAlloc) / snapshots; each > 400 || x.All != snapshots+1 || len(x.Rows) != shownRows {
		t.Errorf("%d rows of %d, %d bytes for each", len(x.Rows), x.All, each)
	}
}

// TestBars gives the widest row a bar of 100 percent.
func TestBars(t *testing.T) {
	x := treeOf([]owner.Volume{volume("a", ""), volume("b", ""), volume("c", "")}, "")
	x.addUsage(map[string]cow.Usage{"a": {Referenced: 400, Exclusive: 100, Shared: 300, Mapped: 800}, "b": {Referenced: 200, Exclusive: 200}})
	if a, b, c := x.Rows[0], x.Rows[1], x.Rows[2]; a.Alone != 25 || a.Common != 75 || a.Ratio() != "2.00" || b.Alone != 50 || b.Common != 0 || c.Barred || c.Ratio() != "–" {
		t.Errorf("%+v", x.Rows)
	}
}

// TestChunkMap makes maps of ever more chunks. They have a bounded number of cells, and lose no chunk and no byte.
func TestChunkMap(t *testing.T) {
	for _, n := range []int{0, 1, maxCells, maxCells + 1, 5*maxCells + 3, 20 * maxCells} {
		var m chunkMap
		for i := range n {
			c := cow.ChunkInfo{Slot: uint32(2 * i), Kind: cow.ChunkFull, FileBytes: 100, RecordBytes: 90, LiveBytes: 55}
			if i == n/2 {
				c.Kind = cow.ChunkDamaged
			}
			m.add(c)
		}
		var chunks, damaged int
		var live int64
		next := uint32(0)
		for _, c := range m.Cells {
			if chunks += c.chunks; c.first != next || c.chunks > m.Each {
				t.Errorf("of %d: %+v after slot %d", n, c, next)
			}
			next, live = c.last+2, live+c.live
			if c.kind == cow.ChunkDamaged {
				damaged++
			}
		}
		if len(m.Cells) > maxCells || len(m.Cells) < min(n, maxCells/2) || chunks != n || m.Chunks != n || live != int64(55*n) || m.Live != live || damaged != min(n, 1) {
			t.Errorf("of %d: %d cells with %d chunks, %d bytes; %d damaged", n, len(m.Cells), chunks, live, damaged)
		}
	}
	for _, x := range []struct {
		live, size int64
		want       string
	}{{0, 100, "k-full l0"}, {1, 1000, "k-full l1"}, {500, 1000, "k-full l10"}, {1000, 1000, "k-full l20"}, {0, 0, "k-full l0"}} {
		if got := (cell{kind: cow.ChunkFull, live: x.live, size: x.size}).Class(); got != x.want {
			t.Errorf("%d of %d: %s", x.live, x.size, got)
		}
	}
}

// TestEvents reads more events than are shown, and then only what is new.
func TestEvents(t *testing.T) {
	in, err := storage.OpenFolder(t.TempDir(), true)
	if err != nil {
		t.Fatal(err)
	}
	log := journal.New(in, slog.New(slog.DiscardHandler))
	opened := 0
	open := func() (*journal.Tail, error) { opened++; return journal.NewTail(in), nil }
	var x events
	defer x.close()
	added := 0
	for _, n := range []int{0, 1, 2*shownEvents + 7, 0, 3} {
		for range n {
			log.Add(journal.Entry{Kind: "create", Names: []string{fmt.Sprint("v", added)}})
			added++
		}
		list, err := x.newest(open)
		if err != nil || len(list) != min(added, shownEvents) {
			t.Fatalf("after %d: %d events, %v", added, len(list), err)
		}
		for i, e := range list {
			if want := fmt.Sprint("v", added-1-i); e.Text != want {
				t.Fatalf("after %d: event %d is %s, not %s", added, i, e.Text, want)
			}
		}
	}
	if opened != 1 {
		t.Errorf("the journal was opened %d times", opened)
	}
	log.Add(journal.Entry{Kind: "create", Names: []string{"last"}})
	_ = in.Close() // what follows the entry cannot be read
	for range 2 {
		if list, err := x.newest(open); err == nil || list[0].Text != "last" || list[1].Text != fmt.Sprint("v", added-1) {
			t.Errorf("%v, %+v", err, list[0])
		}
	}
	now := time.Unix(1e9, 0)
	for _, want := range []bool{true, false, false} {
		if x.tell(now) != want {
			t.Error("the log is told as often as somebody asks")
		}
	}
}

// TestNotOpen asks for the page of a store that is not open yet, again and again. It has all parts that the script exchanges
// later, and the log is not filled.
func TestNotOpen(t *testing.T) {
	f := newFake(t)
	o := f.options()
	var log bytes.Buffer
	o.Source, o.Log = func() Source { return nil }, slog.New(slog.NewTextHandler(&log, nil))
	ctx, cancel := context.WithCancel(context.Background())
	s := newServer(ctx, o)
	var text string
	for range 10 {
		text = s.get(t, "/")
		f.pass(5 * time.Second)
	}
	cancel()
	s.close()
	if n := strings.Count(log.String(), "\n"); n != 2 {
		t.Errorf("%d lines for two parts in a minute:\n%s", n, log.String())
	}
	for _, id := range []string{"head", "tiles", "tree", "map", "journal", "foot"} {
		if !strings.Contains(text, `id="`+id+`" data-part`) {
			t.Errorf("there is no part %s", id)
		}
	}
	if !strings.Contains(text, "the store is not open") || strings.Contains(text, `class="tile `) || !strings.Contains(text, unread) {
		t.Error(text)
	}
	if got := why(time.Time{}, nil); got == "" || got == unread {
		t.Errorf("a part that takes long: %q", got)
	}
}

// TestSocketIsForItsUser connects to a socket of root's in a folder of another user, whom the socket's file belongs to.
func TestSocketIsForItsUser(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root can become another user")
	}
	const nobody = 65534
	dir := t.TempDir()
	if err := errors.Join(os.Chmod(filepath.Dir(dir), 0o755), os.Chown(dir, nobody, nobody)); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "web.sock")
	l, remove, err := Listen("unix:" + path)
	if err != nil {
		t.Fatal(err)
	}
	defer remove()
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- Serve(ctx, l, newFake(t).options()) }()
	ask := func() (answer string) {
		c, err := net.Dial("unix", path)
		if err != nil {
			return err.Error()
		}
		defer c.Close()
		_, _ = io.WriteString(c, "GET /live HTTP/1.0\r\nHost: localhost\r\n\r\n") // it may be closed already
		text, _ := io.ReadAll(c)
		return string(text)
	}
	answers := make(chan string)
	go func() {
		runtime.LockOSThread() // the thread is not used again
		if _, _, e := unix.RawSyscall(unix.SYS_SETRESUID, nobody, nobody, nobody); e != 0 {
			answers <- e.Error()
			return
		}
		answers <- ask()
	}()
	if a := <-answers; a != "" {
		t.Errorf("another user gets %q", a)
	}
	if a := ask(); !strings.HasPrefix(a, "HTTP/1.0 200") {
		t.Errorf("root gets %q", a)
	}
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}
