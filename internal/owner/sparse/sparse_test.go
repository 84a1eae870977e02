package sparse

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"testing/iotest"

	"pgregory.net/rapid"
)

// memory is a disk to be written to.
type memory struct {
	mu   sync.Mutex // guards p and fail
	p    []byte
	fail error
}

func (m *memory) WriteAt(p []byte, off int64) (int, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.fail != nil {
		return 0, m.fail
	}
	return copy(m.p[off:], p), nil
}

// content draws a disk that has holes, and zeros that are no holes.
func content(t *rapid.T) []byte {
	size := rapid.IntRange(0, 3*Piece).Draw(t, "size")
	p := make([]byte, size)
	random := rand.NewChaCha8([32]byte{rapid.Byte().Draw(t, "seed")})
	for range rapid.IntRange(0, 6).Draw(t, "runs") {
		if size == 0 {
			break
		}
		from := rapid.IntRange(0, size-1).Draw(t, "from")
		n := rapid.IntRange(1, size-from).Draw(t, "length")
		_, _ = random.Read(p[from : from+n])
	}
	return p
}

// sparseFile writes p to a file without its zeros.
func sparseFile(t *rapid.T, p []byte) *os.File {
	f, err := os.CreateTemp("", "sparse")
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(os.Remove(f.Name()), f.Truncate(int64(len(p)))); err != nil {
		t.Fatal(err)
	}
	for at := 0; at < len(p); {
		skip, n := DataRun(p[at:])
		if _, err := f.WriteAt(p[at+skip:at+skip+n], int64(at+skip)); err != nil {
			t.Fatal(err)
		}
		at += skip + n
	}
	return f
}

func readAll(t *rapid.T, src Source, size int) []byte {
	m := &memory{p: make([]byte, size)}
	if _, err := Copy(t.Context(), m, src, nil, nil); err != nil {
		t.Fatal(err)
	}
	if src.Size() != int64(size) {
		t.Fatalf("size %d, want %d", src.Size(), size)
	}
	return m.p
}

// TestSources moves content through every kind of source, and over the framed stream.
func TestSources(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		want := content(t)
		f := sparseFile(t, want)
		defer f.Close()
		file := func() Source {
			src, err := FromFile(f)
			if err != nil {
				t.Fatal(err)
			}
			return src
		}
		cached := func() Source { // as on an older kernel, and on some file systems
			src := file()
			src.(*fileSource).cached = true
			return src
		}
		framed := func(src Source) Source {
			var b bytes.Buffer
			if err := Encode(t.Context(), &b, src, nil); err != nil {
				t.Fatal(err)
			}
			return Decode(&b, -1)
		}
		for name, src := range map[string]Source{
			"file":          file(),
			"cached file":   cached(),
			"stream":        FromStream(iotest.HalfReader(bytes.NewReader(want))),
			"framed file":   framed(file()),
			"framed stream": framed(FromStream(bytes.NewReader(want))),
		} {
			if got := readAll(t, src, len(want)); !bytes.Equal(got, want) {
				t.Fatalf("%s: the content differs", name)
			}
		}
		var b bytes.Buffer
		if err := WriteTo(t.Context(), &b, file(), nil); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(b.Bytes(), want) {
			t.Fatal("WriteTo: the content differs")
		}
	})
}

// TestHolesAreNotRead sees to it that a hole of a terabyte costs nothing.
func TestHolesAreNotRead(t *testing.T) {
	f, err := os.Create(filepath.Join(t.TempDir(), "f"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	const far = 1 << 40
	if _, err := f.WriteAt([]byte("x"), far); err != nil {
		t.Skip("the file system has no files of a terabyte:", err)
	}
	src, err := FromFile(f)
	if err != nil {
		t.Fatal(err)
	}
	p := make([]byte, Piece)
	n, off, err := src.Next(p)
	if err != nil || off != far || n != 1 || p[0] != 'x' {
		t.Fatalf("%d bytes at %d, %v", n, off, err)
	}
	if _, _, err := src.Next(p); err != io.EOF {
		t.Fatal(err)
	}
}

// TestFramesDamaged cuts and spoils a stream at every place: it must never pass for a whole one, nor panic.
func TestFramesDamaged(t *testing.T) {
	want := make([]byte, 6*Block)
	copy(want, "first")
	copy(want[4*Block:], "second")
	var b bytes.Buffer
	if err := Encode(t.Context(), &b, FromStream(bytes.NewReader(want)), nil); err != nil {
		t.Fatal(err)
	}
	whole := b.Bytes()
	drain := func(p []byte) error {
		src := Decode(bytes.NewReader(p), -1)
		buf := make([]byte, Piece)
		for {
			if _, _, err := src.Next(buf); err != nil {
				return err
			}
		}
	}
	if err := drain(whole); err != io.EOF {
		t.Fatal(err)
	}
	for n := range whole {
		if err := drain(whole[:n]); !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Fatalf("cut at %d: %v", n, err)
		}
	}
	for i := range min(len(whole), 64) {
		for bit := range 8 {
			p := bytes.Clone(whole)
			p[i] ^= 1 << bit
			_ = drain(p) // an error or other content, but no panic and no hang
		}
	}
}

func TestEncodeTellsTheError(t *testing.T) {
	cause := errors.New("the disk is bad")
	var b bytes.Buffer
	src := FromStream(iotest.ErrReader(cause))
	err := Encode(t.Context(), &b, src, func(err error) []byte { return []byte("told: " + err.Error()) })
	if !errors.Is(err, cause) {
		t.Fatal(err)
	}
	_, _, err = Decode(&b, -1).Next(make([]byte, Piece))
	var remote *RemoteError
	if !errors.As(err, &remote) || !bytes.Contains(remote.Message, []byte("told: ")) {
		t.Fatal(err)
	}
}

func TestCopyEndsWithAFailedWrite(t *testing.T) {
	cause := errors.New("no")
	endless := FromStream(iotest.OneByteReader(rand.NewChaCha8([32]byte{})))
	if _, err := Copy(t.Context(), &memory{fail: cause}, FromStream(io.LimitReader(rand.NewChaCha8([32]byte{}), 64<<20)), nil, nil); !errors.Is(err, cause) {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := Copy(ctx, &memory{}, endless, nil, nil); !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	grow := func(int64) error { return cause }
	if _, err := Copy(t.Context(), &memory{p: make([]byte, Piece)}, FromStream(bytes.NewReader([]byte("x"))), grow, nil); !errors.Is(err, cause) {
		t.Fatal(err)
	}
}

func TestFileThatShrinks(t *testing.T) {
	f, err := os.Create(filepath.Join(t.TempDir(), "f"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.Write(bytes.Repeat([]byte("x"), 1<<20)); err != nil {
		t.Fatal(err)
	}
	src, err := FromFile(f)
	if err != nil {
		t.Fatal(err)
	}
	p := make([]byte, Block)
	if _, _, err := src.Next(p); err != nil {
		t.Fatal(err)
	}
	if err := f.Truncate(Block); err != nil {
		t.Fatal(err)
	}
	if _, _, err := src.Next(p); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Fatal(err)
	}
}

// TestStreamThatEndsTooEarly: only io.EOF is an end. A reader of compressed data tells a cut by io.ErrUnexpectedEOF.
func TestStreamThatEndsTooEarly(t *testing.T) {
	r := io.MultiReader(bytes.NewReader(bytes.Repeat([]byte("x"), 3*Block)), iotest.ErrReader(io.ErrUnexpectedEOF))
	m := &memory{p: make([]byte, Piece)}
	if _, err := Copy(t.Context(), m, FromStream(r), nil, nil); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Fatal(err)
	}
}
