package cow

import (
	"bytes"
	"fmt"
	"maps"
	"math/rand/v2"
	"path/filepath"
	"slices"
	"testing"

	"github.com/vdisk/vdisk/cow/internal/wal"
	"github.com/vdisk/vdisk/format"
	"github.com/vdisk/vdisk/metadata"
)

// damagedFile is a specimen and a damage to whole files of it.
type damagedFile struct {
	x    *specimen
	d    *damage
	what string // the kind of damage
}

// chimeras lists damages to whole files.
type chimeras struct {
	all []damagedFile
	rng *rand.Rand
}

// with returns an image with other contents of some files; nil: the file is not there.
func (img image) with(others image) image {
	img = maps.Clone(img)
	maps.Copy(img, others)
	maps.DeleteFunc(img, func(_ string, p []byte) bool { return p == nil })
	return img
}

// add adds the damage that changes some files of x into others.
func (c *chimeras) add(x *specimen, what, text string, others image) *damage {
	d := &damage{what: what + ": " + text, files: func(img image) image { return img.with(others) }}
	c.all = append(c.all, damagedFile{x, d, what})
	return d
}

// one adds a damage to one file, which can be taken back.
func (c *chimeras) one(x *specimen, what, file string, content []byte) {
	right := x.files[file]
	if bytes.Equal(content, right) && (content == nil) == (right == nil) {
		return
	}
	d := c.add(x, what, fmt.Sprintf("%s, %d bytes instead of %d", file, len(content), len(right)), image{file: content})
	d.file, d.gone = file, content == nil
	switch {
	case filepath.Dir(file) == chunksDir:
		d.undo = func(now []byte) ([]byte, bool) {
			n := min(len(now), len(right), format.ChunkHeaderSize)
			return right, bytes.Equal(now[:n], right[:n]) // otherwise it was recycled
		}
	case file == wal.MarkName, file == tableFile+metadata.VerifiedSuffix, file == lockFile:
		d.harmless = true
	}
}

// cuts cuts, empties and removes each file.
func (c *chimeras) cuts(t *testing.T, x *specimen) {
	for _, r := range x.files.regions(t) {
		if r.off > 0 {
			c.one(x, "cut before a structure", r.file, x.files[r.file][:r.off])
		}
	}
	for file, p := range x.files {
		c.one(x, "missing", file, nil)
		c.one(x, "empty", file, []byte{})
		for range min(3, len(p)) {
			c.one(x, "cut somewhere", file, p[:c.rng.IntN(len(p))])
		}
	}
}

// exchanges puts files of other stores, and of other times, into a store.
func (c *chimeras) exchanges(x *specimen, others ...*specimen) {
	chunks := slices.DeleteFunc(slices.Sorted(maps.Keys(x.files)), func(f string) bool { return filepath.Dir(f) != chunksDir })
	for i, a := range chunks {
		c.add(x, "doubled", a, image{chunksDir + "/0000ffff": x.files[a]})
		for _, b := range chunks[i+1:] {
			c.add(x, "swapped", a+" and "+b, image{a: x.files[b], b: x.files[a]})
		}
	}
	for _, o := range others {
		what := "one file of the " + o.name + " store"
		put := func(text string, files image) {
			d := c.add(x, what, text, files)
			if _, ok := files[tableFile]; ok && o.name == "fork" { // it has the same id: only the chunks are missing to it
				d.m, d.floor = o.m, 1
			}
		}
		for file, p := range o.files {
			if !bytes.Equal(p, x.files[file]) {
				put(file, image{file: p})
			}
		}
		note := tableFile + metadata.VerifiedSuffix
		put("the table and its note", image{tableFile: o.files[tableFile], note: o.files[note]})
		put("the table, and no note", image{tableFile: o.files[tableFile], note: nil})
		put("the table and the durable mark", image{tableFile: o.files[tableFile], note: nil, wal.MarkName: o.files[wal.MarkName]})
	}
}

// mixes makes of an older copy and the present store what is older but for one file, and older but for all chunks.
func (c *chimeras) mixes(old, x *specimen) {
	mixed := func(text string, files image) {
		d := c.add(old, "older but for one", "the "+x.name+" store's "+text, files)
		d.floor, d.m = old.floor, x.m
	}
	chunks := image{}
	for file := range old.files {
		if filepath.Dir(file) == chunksDir {
			chunks[file] = nil
		}
	}
	for file, p := range x.files {
		if filepath.Dir(file) == chunksDir {
			chunks[file] = p
		}
		if !bytes.Equal(p, old.files[file]) {
			mixed(file, image{file: p})
		}
	}
	note := tableFile + metadata.VerifiedSuffix
	mixed("table and note", image{tableFile: x.files[tableFile], note: x.files[note]})
	mixed("table, and no note", image{tableFile: x.files[tableFile], note: nil})
	mixed("chunks", chunks)
	chunks[wal.MarkName] = x.files[wal.MarkName]
	mixed("chunks and durable mark", chunks)
}

// TestDamagedFiles cuts, removes and exchanges files of a store, and mixes it with older copies of itself, a copy that
// went another way, and another store: the store is refused, or each block is right or an error that names the place,
// and nothing else is lost by going on. The long size, -damage.every, takes all of these.
func TestDamagedFiles(t *testing.T) {
	t.Logf("-damage.seed=%d", *damageSeed)
	x := newSpecimens(t, *damageSeed)
	c := &chimeras{rng: rand.New(rand.NewPCG(*damageSeed, 15))}
	newer := *x.killed // with what came later
	newer.m = x.closed.m
	c.cuts(t, x.killed)
	c.cuts(t, x.closed)
	c.exchanges(&newer, x.first, x.closed, x.fork, x.stranger)
	c.exchanges(x.closed, x.first, x.killed, x.fork, x.stranger)
	c.mixes(x.first, x.killed)
	c.mixes(x.first, x.closed)
	c.mixes(&newer, x.closed)
	c.rng.Shuffle(len(c.all), func(i, j int) { c.all[i], c.all[j] = c.all[j], c.all[i] })
	n := len(c.all)
	if !*damageEvery {
		n = min(n, *damageFiles)
	}
	done := try(t, n, func(i int) (*specimen, *damage, string) { return c.all[i].x, c.all[i].d, c.all[i].what })
	t.Logf("proof: files cut, swapped, missing or foreign: %d", done)
}
