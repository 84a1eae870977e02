package stream

import (
	"bytes"
	"errors"
	"flag"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/iotest"
	"time"

	"github.com/vdisk/vdisk/format"
)

var update = flag.Bool("update", false, "write the golden file")

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func testHeader() *format.StreamHeader {
	return &format.StreamHeader{
		Features: []string{format.FeatureZstd}, Volume: "golden", Snapshot: "v2", GUID: format.GUID{1, 2}, Base: format.GUID{3}, BaseName: "golden@v1",
		Size: 4<<20 - 512, LogicalBlock: 512, Codec: format.Zstd, Level: 5, Created: time.Date(2026, 3, 1, 12, 0, 0, 1e6, time.UTC),
		Properties: map[string]string{"org:owner": "Zoë"},
	}
}

// testItems are units of all codecs, and holes, of a part of the volume.
func testItems(t testing.TB, rng *rand.Rand, from uint64, n int) (items []format.StreamItem) {
	t.Helper()
	for i := range n {
		it := format.StreamItem{First: from, Blocks: 1}
		if it.Codec = []format.Codec{format.Raw, format.S2, format.Zstd, format.Raw}[i%4]; it.Codec != format.Raw {
			it.Blocks += i % int(format.UnitBlocks-it.First%format.UnitBlocks)
		}
		unit := make([]byte, it.Blocks*format.BlockSize) // mostly zeros, which cost no time
		for j := range 100 {
			unit[j] = byte(rng.Uint32() & 3)
		}
		comp, err := format.NewCompressor(it.Codec, 0)
		must(t, err)
		it.Unit, _ = comp.Compress(nil, unit)
		if it.Unit = bytes.Clone(it.Unit); i%4 == 3 { // a hole
			it.Unit, it.Blocks = nil, 1+i%int(format.LeafBlocks-it.First%format.LeafBlocks)
		}
		items = append(items, it)
		from = it.End() + uint64(i%3)
	}
	return items
}

// encode writes a stream whose frames have so many items, and in which every so many bytes have a mark.
func encode(t testing.TB, h *format.StreamHeader, items []format.StreamItem, perFrame int, every uint64) []byte {
	t.Helper()
	var out bytes.Buffer
	w, err := NewWriter(&out, h)
	must(t, err)
	for i := range items {
		must(t, w.Put(&items[i]))
		if i%perFrame == perFrame-1 {
			must(t, w.Flush())
			if w.mark.Bytes-w.marked >= every {
				must(t, w.putMark(format.FrameMark, w.at))
			}
		}
	}
	must(t, w.End())
	if w.Length() != int64(out.Len()) {
		t.Error(w.Length(), out.Len())
	}
	return out.Bytes()
}

// read reads all streams, and returns what is in them.
func read(r io.Reader) (headers []format.StreamHeader, items [][]format.StreamItem, totals []Totals, err error) {
	for in := NewReader(r); ; {
		h, err := in.Next()
		if err == io.EOF {
			return headers, items, totals, nil
		}
		if err != nil {
			return headers, items, totals, err
		}
		var all []format.StreamItem
		for {
			f, err := in.Frame()
			if err == io.EOF {
				break
			}
			if err != nil {
				return headers, items, totals, err
			}
			for _, it := range f.Items {
				it.Unit = bytes.Clone(it.Unit)
				all = append(all, it)
			}
		}
		headers, items, totals = append(headers, h), append(items, all), append(totals, in.Totals())
	}
}

func sameItems(a, b []format.StreamItem) bool {
	return slices.EqualFunc(a, b, func(a, b format.StreamItem) bool {
		return a.First == b.First && a.Blocks == b.Blocks && a.Codec == b.Codec && bytes.Equal(a.Unit, b.Unit)
	})
}

// TestStreams reads what was written, also in small pieces, also several streams in one file.
func TestStreams(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 1))
	full := testHeader()
	full.Base, full.BaseName, full.Properties = format.GUID{}, "", nil
	resumed := testHeader()
	resumed.From = 100
	var file []byte
	var want [][]format.StreamItem
	for i, h := range []*format.StreamHeader{full, testHeader(), resumed} {
		items := testItems(t, rng, h.From, 10*i)
		want = append(want, items)
		file = append(file, encode(t, h, items, 3, 10<<10)...)
	}
	for _, r := range []io.Reader{bytes.NewReader(file), iotest.OneByteReader(bytes.NewReader(file)), iotest.DataErrReader(bytes.NewReader(file))} {
		headers, items, totals, err := read(r)
		must(t, err)
		length := int64(0)
		for i := range want {
			if !sameItems(items[i], want[i]) || totals[i].Units+totals[i].Holes != uint64(10*i) {
				t.Error(i, items[i], totals[i])
			}
			length += totals[i].Length
		}
		if len(items) != 3 || headers[1].Properties["org:owner"] != "Zoë" || headers[2].From != 100 || totals[2].Marks < 2 || length != int64(len(file)) {
			t.Error(headers, totals)
		}
	}
	if _, _, _, err := read(bytes.NewReader(nil)); err != nil {
		t.Error(err)
	}
}

// goldenItems are few, so that each bit can be flipped.
func goldenItems(t testing.TB) []format.StreamItem {
	t.Helper()
	return slices.Delete(testItems(t, rand.New(rand.NewPCG(1, 1)), 5, 8), 4, 5) // one raw unit is enough
}

// TestGolden reads the stream that version 1 wrote, and writes it again. A codec may compress differently in a later
// version, so the units are those of the file.
func TestGolden(t *testing.T) {
	path := filepath.Join("..", "..", "testdata", "format", "stream")
	if *update {
		must(t, os.WriteFile(path, encode(t, testHeader(), goldenItems(t), 2, 100), 0o644))
	}
	file, err := os.ReadFile(path)
	must(t, err)
	headers, items, totals, err := read(bytes.NewReader(file))
	must(t, err)
	want := Totals{Frames: 9, Marks: 4, Units: 5, Holes: 2, Blocks: 15, Bytes: totals[0].Bytes, Length: int64(len(file))}
	if totals[0] != want {
		t.Errorf("%+v", totals[0])
	}
	if again := encode(t, &headers[0], items[0], 2, 100); !bytes.Equal(again, file) {
		t.Errorf("it is written in %d bytes, and has %d", len(again), len(file))
	}
}

// frameAt returns the number and the offset of the frame of a stream that has a byte.
func frameAt(t *testing.T, file []byte, at int) (number uint64, offset int64) {
	t.Helper()
	for off := 0; ; number++ {
		f, err := format.DecodeFrame(file[off:])
		must(t, err)
		if next := off + format.FrameHeaderSize + f.Length; at < next {
			return number, int64(off)
		} else {
			off = next
		}
	}
}

// TestEveryFlippedBitIsFound flips bits of streams: each bit of the golden one, and 10,000 of a larger one (with -short,
// a twentieth of them). The error names the frame that has the bit.
func TestEveryFlippedBitIsFound(t *testing.T) {
	file, err := os.ReadFile(filepath.Join("..", "..", "testdata", "format", "stream"))
	must(t, err)
	in := NewReader(nil)
	flip := func(file []byte, bit int) {
		number, offset := frameAt(t, file, bit/8)
		file[bit/8] ^= 1 << (bit % 8)
		in.r, in.stream, in.offset = bytes.NewReader(file), 0, 0 // which saves making another
		_, err := in.Next()
		for err == nil {
			_, err = in.Frame()
		}
		file[bit/8] ^= 1 << (bit % 8)
		var wrong *FrameError
		if !errors.As(err, &wrong) || wrong.Frame != number || wrong.Offset != offset || wrong.Stream != 1 {
			t.Fatalf("bit %d of frame %d at %d: %v", bit, number, offset, err)
		}
		if !errors.Is(err, ErrDamaged) && !errors.Is(err, ErrCut) {
			t.Fatalf("bit %d: %v", bit, err)
		}
	}
	n, step := 10_000, 1
	if testing.Short() {
		n, step = 500, 19
	}
	for bit := 0; bit < 8*len(file); bit += step {
		flip(file, bit)
	}
	rng := rand.New(rand.NewPCG(3, 3))
	h := testHeader()
	h.Size = 1 << 40
	large := encode(t, h, testItems(t, rng, 0, 48), 1, 8<<10)
	for range n {
		flip(large, rng.IntN(8*len(large)))
	}
	t.Logf("%d and %d bytes", len(file), len(large))
}

// TestCut cuts a stream at each byte: the error names the frame that is not whole, and says that it is a cut.
func TestCut(t *testing.T) {
	file, err := os.ReadFile(filepath.Join("..", "..", "testdata", "format", "stream"))
	must(t, err)
	for n := 1; n < len(file); n++ {
		number, offset := frameAt(t, file, n)
		_, _, _, err := read(bytes.NewReader(file[:n]))
		var wrong *FrameError
		if !errors.As(err, &wrong) || wrong.Frame != number || wrong.Offset != offset || !errors.Is(err, ErrCut) || errors.Is(err, ErrDamaged) {
			t.Fatalf("cut at %d, in frame %d: %v", n, number, err)
		}
	}
	broken := errors.New("broken")
	_, _, _, err = read(io.MultiReader(bytes.NewReader(file[:100]), iotest.ErrReader(broken)))
	if !errors.Is(err, broken) || errors.Is(err, ErrCut) || errors.Is(err, ErrDamaged) {
		t.Error(err)
	}
}

// TestWrongStreams writes streams whose frames are each sound, and which are wrong all the same.
func TestWrongStreams(t *testing.T) {
	unit := bytes.Repeat([]byte{7}, format.BlockSize)
	item := func(first uint64) *format.StreamItem { return &format.StreamItem{First: first, Blocks: 1, Unit: unit} }
	write := func(h *format.StreamHeader, do func(w *Writer)) []byte {
		var out bytes.Buffer
		w, err := NewWriter(&out, h)
		must(t, err)
		do(w)
		must(t, w.End())
		return out.Bytes()
	}
	put := func(items ...*format.StreamItem) func(*Writer) {
		return func(w *Writer) {
			for _, it := range items {
				must(t, w.Put(it))
			}
		}
	}
	plain, from := testHeader(), testHeader()
	plain.Features, from.From = nil, 7
	comp, err := format.NewCompressor(format.Zstd, 0)
	must(t, err)
	packed, codec := comp.Compress(nil, unit)
	for name, c := range map[string]struct {
		file []byte
		want string
	}{
		"twice":           {write(testHeader(), put(item(5), item(5))), "block 5 after block 6"},
		"backwards":       {write(testHeader(), put(item(5), item(3))), "block 3 after block 6"},
		"before from":     {write(from, put(item(6))), "block 6 after block 7"},
		"behind the end":  {write(testHeader(), put(item(1024))), "block 1024 of 1024"},
		"a feature":       {write(plain, put(&format.StreamItem{First: 1, Blocks: 1, Codec: codec, Unit: packed})), "without that feature"},
		"no unit of s2":   {write(testHeader(), put(&format.StreamItem{First: 1, Blocks: 1, Codec: format.S2, Unit: []byte("xyz")})), "s2"},
		"a wrong sum":     {write(testHeader(), func(w *Writer) { put(item(1))(w); w.sum.Write([]byte{1}) }), "SHA-256"},
		"a wrong count":   {write(testHeader(), func(w *Writer) { put(item(1))(w); w.mark.Units++ }), "want 2 in"},
		"a wrong length":  {write(testHeader(), func(w *Writer) { put(item(1))(w); w.mark.Bytes++ }), "want 1 in"},
		"an early end":    {write(testHeader(), func(w *Writer) { put(item(1))(w); w.blocks = 1023 }), "block 1023 after"},
		"a mark behind":   {write(testHeader(), func(w *Writer) { put(item(9))(w); must(t, w.Flush()); must(t, w.putMark(format.FrameMark, 9)) }), "block 9 after block 10"},
		"two headers":     {write(testHeader(), func(w *Writer) { must(t, w.put(format.FrameHeader, []byte("{}"))) }), "second header"},
		"no header":       {write(testHeader(), put())[frameLength(t, write(testHeader(), put())):], "number 1"},
		"a skipped frame": {write(testHeader(), func(w *Writer) { w.number++ }), "number 2"},
	} {
		_, _, _, err := read(bytes.NewReader(c.file))
		if !errors.Is(err, ErrDamaged) || !errors.Is(err, format.ErrCorrupt) || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func frameLength(t *testing.T, file []byte) int {
	t.Helper()
	f, err := format.DecodeFrame(file)
	must(t, err)
	return format.FrameHeaderSize + f.Length
}

// TestMarksAreOften proves that a stream without marks is refused, and that the writer makes enough of them.
func TestMarksAreOften(t *testing.T) {
	h := testHeader()
	h.Size = 1 << 40
	unit := make([]byte, format.BlockSize)
	write := func(w *Writer) {
		for i := range uint64(17 << 10) {
			must(t, w.Put(&format.StreamItem{First: i, Blocks: 1, Unit: unit}))
		}
		must(t, w.End())
	}
	for _, never := range []bool{false, true} {
		r, out := io.Pipe()
		go func() {
			w, err := NewWriter(&pretender{out, never, 0}, h)
			must(t, err)
			write(w)
			must(t, out.Close())
		}()
		_, _, totals, err := read(r)
		if never && (!errors.Is(err, ErrDamaged) || !strings.Contains(err.Error(), "no mark")) {
			t.Error(err)
		}
		if !never && (err != nil || totals[0].Marks != 5) {
			t.Error(totals, err)
		}
		_, _ = io.Copy(io.Discard, r)
	}
}

// pretender passes frames on, or leaves out the marks and numbers the other frames anew.
type pretender struct {
	io.Writer
	never  bool
	number uint64
}

func (p *pretender) Write(frame []byte) (int, error) {
	f, err := format.DecodeFrame(frame)
	if err != nil || p.never && f.Kind == format.FrameMark {
		return len(frame), err
	}
	if p.never {
		_, err = p.Writer.Write(format.AppendFrame(nil, f.Kind, p.number, frame[format.FrameHeaderSize:]))
		p.number++
		return len(frame), err
	}
	return p.Writer.Write(frame)
}

// FuzzStream holds the reader to its promise for any input: it ends with an error that names a frame, or what it read
// is written to the same items again. The target corrects the checksums, which would keep the fuzzer out.
func FuzzStream(f *testing.F) {
	file, err := os.ReadFile(filepath.Join("..", "..", "testdata", "format", "stream"))
	must(f, err)
	f.Add(file)
	f.Add(append(bytes.Clone(file), file...))
	f.Add(file[:len(file)/2])
	f.Fuzz(func(t *testing.T, b []byte) {
		b = bytes.Clone(b)
		for rest := b; ; {
			frame, err := format.DecodeFrame(rest)
			end := format.FrameHeaderSize + frame.Length
			if err != nil || end > len(rest) {
				break
			}
			again := format.AppendFrame(nil, frame.Kind, frame.Number, rest[format.FrameHeaderSize:end])
			copy(rest, again)
			rest = rest[end:]
		}
		headers, items, _, err := read(bytes.NewReader(b))
		var wrong *FrameError
		if err != nil && !errors.As(err, &wrong) {
			t.Fatal(err)
		}
		if err != nil && !errors.Is(err, ErrDamaged) && !errors.Is(err, ErrCut) && !errors.Is(err, format.ErrVersion) {
			t.Fatal(err)
		}
		for i := range headers {
			_, again, _, err := read(bytes.NewReader(encode(t, &headers[i], items[i], 2, 10)))
			must(t, err)
			if !sameItems(again[0], items[i]) {
				t.Fatal("it is written differently")
			}
		}
	})
}
