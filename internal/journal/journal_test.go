package journal

import (
	"bytes"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vdisk/vdisk/internal/storage"
)

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// journal is a journal for a test. What the log says goes to said.
type journal struct {
	*Log
	dir  string
	in   *storage.Folder
	said bytes.Buffer
}

func newJournal(t *testing.T) *journal {
	t.Helper()
	j := &journal{dir: t.TempDir()}
	in, err := storage.OpenFolder(j.dir, true)
	must(t, err)
	t.Cleanup(func() { must(t, in.Close()) })
	j.in, j.Log = in, New(in, slog.New(slog.NewTextHandler(&j.said, nil)))
	j.now = func() time.Time { return time.Date(2026, 11, 30, 12, 0, 0, 0, time.UTC) }
	return j
}

func (j *journal) tail(t *testing.T) *Tail {
	t.Helper()
	in, err := storage.OpenFolder(j.dir, true)
	must(t, err)
	tail := NewTail(in)
	t.Cleanup(func() { must(t, tail.Close()) })
	return tail
}

// rest returns the kinds of all entries up to the end.
func rest(t *testing.T, tail *Tail) (kinds []string) {
	t.Helper()
	for {
		e, err := tail.Next()
		if err == io.EOF {
			return kinds
		}
		must(t, err)
		kinds = append(kinds, e.Kind)
	}
}

func (j *journal) write(t *testing.T, name, text string) {
	t.Helper()
	f, err := os.OpenFile(filepath.Join(j.dir, name), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	must(t, err)
	_, err = f.WriteString(text)
	must(t, err)
	must(t, f.Close())
}

// TestTail: a tail has all entries in their order, whenever the files change their names. The entries are large, so that
// a file has only a few.
func TestTail(t *testing.T) {
	j := newJournal(t)
	follows := j.tail(t) // reads after each few entries
	if got := rest(t, follows); len(got) != 0 {
		t.Fatal(got)
	}
	names := make([]string, maxNames+1)
	for i := range names {
		names[i] = strings.Repeat("n", 127)
	}
	var want, got []string
	for n := range 40 {
		want = append(want, fmt.Sprint(n))
		j.Add(Entry{Kind: want[n], Names: names})
		if n%5 == 4 { // a file has 8
			got = append(got, rest(t, follows)...)
		}
		if n == 6 { // in the middle of a file
			if all := rest(t, j.tail(t)); !slices.Equal(all, want) {
				t.Errorf("at first a reader sees %v", all)
			}
		}
	}
	if !slices.Equal(got, want) {
		t.Errorf("a tail has %v", got)
	}
	all := rest(t, j.tail(t))
	if len(all) < 9 || len(all) > 16 || !slices.Equal(all, want[40-len(all):]) {
		t.Errorf("the two files have %v", all)
	}
	for _, name := range []string{FileName, OldFileName} {
		if fi, err := os.Stat(filepath.Join(j.dir, name)); err != nil || fi.Size() > MaxBytes || fi.Mode() != 0o600 {
			t.Errorf("%s: %v, %v", name, fi, err)
		}
	}
	if e, err := j.tail(t).Next(); err != nil || len(e.Names) != maxNames || e.LeftOut != 1 {
		t.Errorf("%d names, %d left out, %v", len(e.Names), e.LeftOut, err)
	}
	if j.said.Len() > 0 || follows.Skipped() > 0 {
		t.Error(j.said.String(), follows.Skipped())
	}
}

// TestTailThatIsLate: a tail that has missed more than one file goes on with the oldest that is there.
func TestTailThatIsLate(t *testing.T) {
	j := newJournal(t)
	j.Add(Entry{Kind: "first"})
	tail := j.tail(t)
	if got := rest(t, tail); !slices.Equal(got, []string{"first"}) {
		t.Fatal(got)
	}
	for _, kind := range []string{"second", "third", "fourth"} {
		j.Add(Entry{Kind: kind + " of a file"})
		must(t, j.in.Rename(FileName, OldFileName))
	}
	if got := rest(t, tail); !slices.Equal(got, []string{"second of a file", "fourth of a file"}) { // the third is gone
		t.Error(got)
	}
	j.Add(Entry{Kind: "fifth"})
	if got := rest(t, tail); !slices.Equal(got, []string{"fifth"}) {
		t.Error(got)
	}
}

// TestDamagedJournal: what is no entry costs no other one.
func TestDamagedJournal(t *testing.T) {
	j := newJournal(t)
	j.Add(Entry{Kind: "a"})
	j.write(t, FileName, `{"time":"2026-11-30T12:00:00Z","kind":"to`) // a crash
	tail := j.tail(t)
	if got := rest(t, tail); !slices.Equal(got, []string{"a"}) || tail.Skipped() != 0 {
		t.Error(got, tail.Skipped())
	}
	j.Add(Entry{Kind: "b"})
	j.write(t, FileName, strings.Repeat("\x00", 100)) // a power cut, on some file systems
	j.Add(Entry{Kind: "c"})
	j.write(t, FileName, "[]\n{}\n\n"+strings.Repeat("x", 2*maxLine)+"\n"+`{"kind":"of a later program","new":1}`+"\n")
	if got := rest(t, tail); !slices.Equal(got, []string{"b", "c", "of a later program"}) || tail.Skipped() != 6 {
		t.Error(got, tail.Skipped())
	}
	if j.said.Len() > 0 {
		t.Error(j.said.String())
	}
}

// TestEntryThatCannotBeNoted is logged. The next one is noted again.
func TestEntryThatCannotBeNoted(t *testing.T) {
	j := newJournal(t)
	must(t, os.Mkdir(filepath.Join(j.dir, FileName), 0o700))
	j.Add(Entry{Kind: "lost", Names: []string{"v"}})
	if said := j.said.String(); !strings.Contains(said, "an event cannot be noted") || !strings.Contains(said, "kind=lost") {
		t.Errorf("said %q", said)
	}
	must(t, os.Remove(filepath.Join(j.dir, FileName)))
	j.Add(Entry{Kind: "noted"})
	if got := rest(t, j.tail(t)); !slices.Equal(got, []string{"noted"}) {
		t.Error(got)
	}
	(*Log)(nil).Add(Entry{Kind: "nothing"})
}

// TestLongEntries are cut.
func TestLongEntries(t *testing.T) {
	j := newJournal(t)
	j.Add(Entry{Kind: "a", Error: strings.Repeat("ü", maxText), Details: map[string]any{"b": strings.Repeat("x", maxText), "c": 1}})
	e, err := j.tail(t).Next()
	must(t, err)
	if len(e.Error) > maxText+len("…") || !strings.HasSuffix(e.Error, "ü…") || fmt.Sprint(e.Details) != "map[left_out:[b c]]" || !e.Time.Equal(j.now()) {
		t.Errorf("%+v", e)
	}
}

// TestHugeJournal: of a file that somebody else has made far too large, only the end is read.
func TestHugeJournal(t *testing.T) {
	j := newJournal(t)
	j.write(t, FileName, `{"kind":"first"}`+"\n")
	must(t, os.Truncate(filepath.Join(j.dir, FileName), 1<<40)) // has a line that is larger than all memory
	j.write(t, FileName, "\n"+`{"kind":"last","names":null}`+"\n")
	tail := j.tail(t)
	e, err := tail.Next()
	must(t, err)
	if e.Kind != "last" || e.Names == nil || tail.Skipped() != 0 || tail.LeftOut() < 1<<40-MaxBytes {
		t.Errorf("%+v, %d lines skipped, %d bytes left out", e, tail.Skipped(), tail.LeftOut())
	}
	if got := rest(t, tail); len(got) != 0 {
		t.Error(got)
	}
}

// TestOneFileWithBothNames: a full file that somebody else has given both names is left, as any other.
func TestOneFileWithBothNames(t *testing.T) {
	j := newJournal(t)
	j.write(t, FileName, strings.Repeat("x", MaxBytes-1)+"\n")
	must(t, os.Link(filepath.Join(j.dir, FileName), filepath.Join(j.dir, OldFileName)))
	j.Add(Entry{Kind: "a"})
	if fi, err := os.Stat(filepath.Join(j.dir, FileName)); err != nil || fi.Size() > 1000 || j.said.Len() > 0 {
		t.Errorf("%v, %v, %s", fi, err, j.said.String())
	}
	if got := rest(t, j.tail(t)); !slices.Equal(got, []string{"a"}) {
		t.Error(got)
	}
}
