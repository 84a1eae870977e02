package format

import (
	"bytes"
	"math/rand/v2"
	"reflect"
	"testing"
)

// testCopy is a copy of a table with two buckets: a part of the base, its end, and one batch of changes.
func testCopy() []byte {
	batch := func(dst []byte, h CopyHead, items ...CopyItem) []byte {
		var b []byte
		for i := range items {
			b = AppendCopyItem(b, &items[i])
		}
		h.Length, h.Items = uint64(len(b)), Checksum(b)
		head := h.Encode(int64(len(dst)))
		return append(append(dst, head[:]...), b...)
	}
	old := bytes.Repeat([]byte("the value "), 12)
	patch, _ := AppendPatch(nil, old, append(append(bytes.Clone(old[:50]), "another"...), old[57:]...), 100)
	b := AppendCopyHeader(nil, testUUID)
	l, key := testLeaf(), []byte("branch-leaf!")
	leaf := AppendLeaf(nil, l)
	l.Entries[77] = MakeEntry(9, 4096, 2112, 1, 0)
	l.SetChanged(77)
	puts := AppendPuts(nil, l, [4]uint64{1: 1 << (77 - 64)})
	b = batch(b, CopyHead{Kind: CopyBase, Number: 9}, CopyItem{CopyPut, 1, []byte{0, 0, 0, 1}, old}, CopyItem{CopyPut, 4, key, leaf}, CopyItem{CopyPut, 5, []byte("k"), nil})
	b = batch(b, CopyHead{Kind: CopyBaseEnd, Number: 10, Sum: 1 << 60})
	return batch(b, CopyHead{Kind: CopyChanges, Number: 11, Sum: 1<<60 + 1}, CopyItem{CopyPatch, 1, []byte{0, 0, 0, 1}, patch}, CopyItem{CopyPuts, 4, key, puts}, CopyItem{CopyRemove, 5, []byte("k"), nil})
}

// readCopy decodes a copy as a reader does, and returns its batches and items.
func readCopy(b []byte) (heads []CopyHead, items []CopyItem, err error) {
	if _, err = DecodeCopyHeader(b); err != nil {
		return nil, nil, err
	}
	for off := CopyHeaderSize; off < len(b); {
		h, err := DecodeCopyHead(b[off:], int64(off))
		if err != nil {
			return nil, nil, err
		}
		off += CopyHeadSize
		if h.Length > uint64(len(b)-off) {
			return nil, nil, corrupt("batch of the copy", "%d bytes", h.Length)
		}
		body := b[off : off+int(h.Length)]
		off += len(body)
		if Checksum(body) != h.Items {
			return nil, nil, corrupt("batch of the copy", "its items")
		}
		for len(body) > 0 {
			it, rest, need, err := DecodeCopyItem(body)
			if err != nil {
				return nil, nil, err
			}
			if need > 0 {
				return nil, nil, corrupt("batch of the copy", "it ends in an item of %d bytes", need)
			}
			items, body = append(items, it), rest
		}
		heads = append(heads, h)
	}
	return heads, items, nil
}

// wholeCopy decodes the golden copy. A file that ends between two batches is a copy, too, of an older state.
func wholeCopy(b []byte) error {
	heads, _, err := readCopy(b)
	if err == nil && len(heads) != 3 {
		err = corrupt("copy", "%d batches", len(heads))
	}
	return err
}

func TestGoldenCopy(t *testing.T) {
	b := goldenFile(t, "table-copy")
	heads, items, err := readCopy(b)
	must(t, err)
	if store, err := DecodeCopyHeader(b); store != testUUID || err != nil {
		t.Error(store, err)
	}
	if len(heads) != 3 || len(items) != 6 || heads[2].Number != 11 || heads[1].Kind != CopyBaseEnd || heads[2].Sum != 1<<60+1 {
		t.Fatal(heads, items)
	}
	got, err := items[3].Apply(items[0].Value)
	if want := "the value the value the value the value the value another"; err != nil || !bytes.HasPrefix(got, []byte(want)) || len(got) != 120 {
		t.Errorf("%q, %v", got, err)
	}
	want := testLeaf()
	want.Entries[77] = MakeEntry(9, 4096, 2112, 1, 0)
	want.SetChanged(77)
	if got, err := items[4].Apply(items[1].Value); err != nil || !bytes.Equal(got, AppendLeaf(nil, want)) {
		t.Error(got, err)
	}
	if !reflect.DeepEqual(items[5], CopyItem{CopyRemove, 5, []byte("k"), []byte{}}) {
		t.Error(items[3])
	}
}

// FuzzCopyBatch decodes arbitrary bytes as items. What is decoded encodes to the same bytes.
func FuzzCopyBatch(f *testing.F) {
	f.Add(testCopy()[CopyHeaderSize+CopyHeadSize:], int64(7))
	f.Fuzz(func(t *testing.T, b []byte, off int64) {
		if it, rest, need, err := DecodeCopyItem(b); err != nil {
			rejected(t, err)
		} else if need > 0 {
			if need <= len(b) {
				t.Fatalf("%d bytes are needed of %d", need, len(b))
			}
		} else if again := append(AppendCopyItem(nil, &it), rest...); !bytes.Equal(again, b) {
			t.Fatalf("%x encodes to %x", b, again)
		}
		head := append(bytes.Clone(b), make([]byte, CopyHeadSize)...)[:CopyHeadSize]
		copy(head, CopyBatchMagic)
		le.PutUint32(head[36:], headChecksum(head[:36], off))
		h, err := DecodeCopyHead(head, off)
		if err != nil {
			rejected(t, err)
		} else if again := h.Encode(off); !bytes.Equal(again[:], head) {
			t.Fatalf("%x encodes to %x", head, again)
		}
		if _, err := DecodeCopyHead(head, off+1); err == nil {
			t.Fatal("a head is accepted in another place")
		}
	})
}

// FuzzPatch makes patches between arbitrary values, and applies arbitrary ones.
func FuzzPatch(f *testing.F) {
	l := testLeaf()
	old := AppendLeaf(nil, l)
	for _, i := range []int{3, 80, 200} {
		l.Entries[i] = MakeEntry(9, 4096, 2112, 1, 0)
		f.Add(old, AppendLeaf(nil, l))
	}
	f.Add([]byte("short"), []byte{})
	f.Fuzz(func(t *testing.T, old, value []byte) {
		patch, ok := AppendPatch([]byte("x"), old, value, 4*(len(old)+len(value)+8))
		if !ok {
			t.Fatal("the patch is longer than four times both values")
		}
		if got, err := ApplyPatch(nil, old, patch[1:]); err != nil || !bytes.Equal(got, value) {
			t.Fatalf("%x makes %x of %x, not %x: %v", patch, got, old, value, err)
		}
		if got, err := ApplyPatch(nil, old, value); err != nil {
			rejected(t, err)
		} else if len(got) > len(old)+len(value) {
			t.Fatalf("%d bytes of %d and %d", len(got), len(old), len(value))
		}
	})
}

// TestPatchOfALeaf checks that a patch takes little where few blocks of a full leaf change, in places far apart.
func TestPatchOfALeaf(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	var l Leaf
	for i := range l.Entries {
		l.Entries[i] = MakeEntry(rng.Uint32N(5000), 4096+16*rng.Uint32N(1<<20), 48+16*rng.IntN(250), 1, 0)
	}
	for _, changes := range []int{1, 4, 16} {
		old := AppendLeaf(nil, &l)
		for range changes {
			i := rng.IntN(LeafBlocks)
			l.Entries[i] = MakeEntry(5000, 4096+16*rng.Uint32N(1<<20), 2112, 1, 0)
			l.SetChanged(i)
		}
		value := AppendLeaf(nil, &l)
		patch, ok := AppendPatch(nil, old, value, len(value))
		if got, err := ApplyPatch(nil, old, patch); !ok || err != nil || !bytes.Equal(got, value) {
			t.Fatal(ok, err)
		}
		t.Logf("%d changes of %d bytes take %d bytes", changes, len(value), len(patch))
		if len(patch) > 30+24*changes {
			t.Errorf("%d changes take %d bytes", changes, len(patch))
		}
	}
}

func BenchmarkPatch(b *testing.B) {
	rng := rand.New(rand.NewPCG(1, 2))
	var l Leaf
	for i := range l.Entries {
		l.Entries[i] = MakeEntry(rng.Uint32N(5000), 4096+16*rng.Uint32N(1<<20), 48+16*rng.IntN(250), 1, 0)
	}
	old := AppendLeaf(nil, &l)
	for range 4 {
		l.Entries[rng.IntN(LeafBlocks)] = MakeEntry(5000, 4096+16*rng.Uint32N(1<<20), 2112, 1, 0)
	}
	value := AppendLeaf(nil, &l)
	var patch []byte
	b.ReportAllocs()
	for b.Loop() {
		patch, _ = AppendPatch(patch[:0], old, value, len(value))
	}
}

// TestPuts puts entries of all kinds into leaves, and makes the leaf anew from its earlier state.
func TestPuts(t *testing.T) {
	rng := rand.New(rand.NewPCG(3, 4))
	var l Leaf
	for range 2000 {
		old := AppendLeaf(nil, &l)
		var blocks [4]uint64
		for range 1 + rng.IntN(5) {
			blockCount, first := []int{1, 1, 4, 16}[rng.IntN(4)], rng.IntN(LeafBlocks/16)*16
			e := MakeEntry(rng.Uint32N(5000), 4096+16*rng.Uint32N(1<<20), 48*blockCount, blockCount, 0)
			runs := []int{1, 1, 3, 16}[rng.IntN(4)] / blockCount
			for i := range min(runs*blockCount, 16) + blockCount {
				at := (first + i) % LeafBlocks
				l.Entries[at] = e.WithIndex(i % blockCount)
				if blockCount == 1 {
					e += Entry(e.Share() / RecordAlign) // runs end to end
				}
				if rng.IntN(20) == 0 {
					l.Entries[at] = 0
				}
				l.SetChanged(at)
				blocks[at/64] |= 1 << (at % 64)
			}
		}
		puts := AppendPuts(nil, &l, blocks)
		it := CopyItem{Op: CopyPuts, Value: puts}
		if got, err := it.Apply(old); err != nil || !bytes.Equal(got, AppendLeaf(nil, &l)) {
			t.Fatalf("%x of %x: %v", puts, old, err)
		}
		if len(puts) > MaxPutsSize {
			t.Fatal(len(puts))
		}
	}
}

// FuzzPuts applies arbitrary bytes to a leaf. What is accepted leaves a leaf.
func FuzzPuts(f *testing.F) {
	l := testLeaf()
	f.Add(AppendPuts(nil, l, [4]uint64{1, 1 << 63, 0xff, ^uint64(0)}))
	f.Fuzz(func(t *testing.T, puts []byte) {
		it := CopyItem{Op: CopyPuts, Value: puts}
		got, err := it.Apply(AppendLeaf(nil, l))
		if err != nil {
			rejected(t, err)
			return
		}
		var again Leaf
		if err := DecodeLeaf(got, &again); err != nil {
			t.Fatalf("%x makes a leaf that does not decode: %v", puts, err)
		}
	})
}

func BenchmarkPuts(b *testing.B) {
	l := testLeaf()
	var puts []byte
	b.ReportAllocs()
	for b.Loop() {
		puts = AppendPuts(puts[:0], l, [4]uint64{1 << 3, 1 << 9, 1 << 60, 1})
	}
}
