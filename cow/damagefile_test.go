package cow

import (
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/vdisk/vdisk/format"
	"github.com/vdisk/vdisk/metadata"
)

// again closes the store and opens it with other options.
func (x *damaging) again(t *testing.T, o Options) {
	t.Helper()
	if x.d != nil {
		must(t, x.d.Close())
		x.d = nil
	}
	must(t, x.s.Close())
	o.checkpointInterval, o.Logger = -1, slog.New(slog.NewTextHandler(&x.log, nil))
	x.s = open(t, x.dir, o)
}

// meets reads damage at an offset of v.
func (x *damaging) meets(t *testing.T, off int64) {
	t.Helper()
	if _, err := x.d.ReadAt(make([]byte, 4096), off); !errors.Is(err, ErrCorrupt) {
		t.Errorf("damage at %d reads: %v", off, err)
	}
}

// file returns the content of the file of known damage.
func (x *damaging) file(t *testing.T) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(x.dir, damageFile))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Error(err)
	}
	return string(b)
}

// TestDamageIsKept: what one owner met, the next one knows, and so does a command that only looks, which changes nothing.
func TestDamageIsKept(t *testing.T) {
	all := []string{"c 0+16384", "v 0+4096", "v 8192+8192", "v@a 0+16384"}
	x := newDamaging(t)
	x.rot(t, 0)
	x.rot(t, 1020)
	x.meets(t, 0)
	x.wants(t, x.known(t), all...)
	x.again(t, Options{Look: true})
	was := x.file(t)
	x.wants(t, x.known(t), all...)
	if rep, err := x.s.Check(t.Context(), CheckOptions{ReadData: true}, func(Problem) {}); err != nil || rep.Corrupt != 2 {
		t.Error(rep, err)
	}
	x.wants(t, x.known(t), all[0], "c 4177920+15872", all[1], "v 4177920+15872", all[2], all[3], "v@a 4177920+15872")
	x.again(t, Options{})
	if now := x.file(t); now != was || was == "" {
		t.Errorf("the file was %q, and is %q", was, now)
	}
	x.wants(t, x.known(t), all...)
	if n := strings.Count(x.log.String(), "data is damaged"); n != 2 || strings.Count(x.log.String(), "known from before") != 2 {
		t.Errorf("%d lines of damage in the log: %s", n, x.log.String())
	}
	must(t, x.s.Close())
}

// TestDamageIsKeptAtOnce: an owner that is killed has noted what it met.
func TestDamageIsKeptAtOnce(t *testing.T) {
	x := newDamaging(t)
	x.rot(t, 0)
	x.meets(t, 0)
	for deadline := time.Now().Add(time.Minute); x.file(t) == ""; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("there is no file")
		}
	}
	must(t, errors.Join(x.d.Close(), x.s.Close()))
}

// TestKeptDamageGoes: what reads again, what is gone and what nobody refers to is forgotten, and at last the file goes.
func TestKeptDamageGoes(t *testing.T) {
	x := newDamaging(t)
	x.rot(t, 0)
	x.rot(t, 40)
	e := x.entry(t, 0)
	path, at := filepath.Join(x.dir, chunksDir, x.s.slots.get(e.Slot()).Name()), int64(e.Offset())+format.RecordHeaderSize+100
	x.meets(t, 0)
	x.meets(t, 40*4096)
	x.wants(t, x.known(t, Ref{Volume: "c"}), "c 0+16384", "c 163840+16384")
	x.again(t, Options{})
	change(t, path, at, flip, 1)
	x.s.Close()
	x.s = open(t, x.dir, Options{checkpointInterval: -1, Logger: slog.New(slog.DiscardHandler)})
	x.wants(t, x.known(t, Ref{Volume: "c"}), "c 163840+16384")
	must(t, errors.Join(x.s.Remove(Ref{Volume: "v"}, true), x.s.Remove(Ref{Volume: "c"}, false), x.s.reclaimDeleted(t.Context())))
	x.wants(t, x.known(t))
	x.forgets(t)
}

// forgets opens the store once more, which leaves no file, and closes it.
func (x *damaging) forgets(t *testing.T) {
	t.Helper()
	x.again(t, Options{})
	if got := x.file(t); got != "" {
		t.Errorf("the file is still there: %s", got)
	}
	must(t, x.s.Close())
}

// TestKeptDamageToLeaf: a leaf is read again, too.
func TestKeptDamageToLeaf(t *testing.T) {
	x := newDamaging(t)
	v := metadata.Version{Branch: x.d.b.ID, Leaf: 0, Epoch: 1}
	var whole format.Leaf
	must(t, x.s.meta.View(func(tx *metadata.Tx) error { _, err := tx.Leaf(v, &whole); return err }))
	put := func(value []byte) {
		t.Helper()
		must(t, x.s.meta.Update(func(tx *metadata.Tx) error { return tx.PutLeaf(v, value) }))
	}
	put([]byte("rotten"))
	_, err := x.s.Check(t.Context(), CheckOptions{}, func(Problem) {})
	must(t, err)
	x.wants(t, x.known(t), "c 0+1048576", "v@a 0+1048576")
	for range 2 {
		x.again(t, Options{})
		x.wants(t, x.known(t, Ref{Volume: "c"}), "c 0+1048576")
	}
	if x.file(t) == "" {
		t.Error("there is no file")
	}
	put(format.AppendLeaf(nil, &whole))
	x.again(t, Options{})
	x.wants(t, x.known(t, Ref{Volume: "c"}))
	x.forgets(t)
}

// TestStrangeDamageFile: whatever is in the file, the store opens, and knows no damage that is none.
func TestStrangeDamageFile(t *testing.T) {
	x := newDamaging(t)
	e := x.entry(t, 0)
	sound, _ := badPlace{record: unitKey{x.s.slots.get(e.Slot()).Seq, e.WithIndex(0), 0}}.saved(ErrCorrupt)
	for _, text := range []string{
		"", "x", "{}", `{"places":null}`, `{"places":[{"chunk_seq":7}]}`, `{"places":[{"branch":1,"leaf":4294967295,"epoch":4294967295}]}`,
		`{"places":[{"chunk_seq":1,"slot":16777215,"offset":4096,"size":4128,"blocks":1,"block":18446744073709551615}]}`,
		`{"places":[{"chunk_seq":1,"slot":16777215,"offset":4096,"size":4128,"blocks":1}]}`,
	} {
		must(t, os.WriteFile(filepath.Join(x.dir, damageFile), []byte(text), 0o600))
		x.again(t, Options{})
		x.wants(t, x.known(t))
		x.again(t, Options{})
		if got := x.file(t); got != "" {
			t.Errorf("%q became %q", text, got)
		}
	}
	must(t, x.s.replaceDamage([]savedPlace{sound}, false))
	x.again(t, Options{})
	x.wants(t, x.known(t))
	must(t, x.s.Close())
}
