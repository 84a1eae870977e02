package sparse

import (
	"bytes"
	"errors"
	"io"
	"math"
	"testing"
	"testing/iotest"
)

// frame returns a frame of a stream.
func frame(off int64, n uint32, data string) []byte {
	h := make([]byte, frameHeader)
	putFrame(h, off, n)
	return append(h, data...)
}

// FuzzFrames decodes arbitrary streams. What is returned must lie within the content, in ascending order, and must not
// take more memory than the stream has. A stream that is accepted encodes to itself; any other is an error, and never
// content that seems whole.
func FuzzFrames(f *testing.F) {
	whole := append(append(frame(0, 5, "first"), frame(4096, 6, "second")...), frame(8192, 0, "")...)
	f.Add(whole, int64(-1), uint16(5000))
	f.Add(whole, int64(8192), uint16(2))
	f.Add(whole, int64(8191), uint16(1))
	f.Add(whole[:20], int64(-1), uint16(100))
	f.Add(append(frame(0, 5, "first"), frame(7, frameError, "it went wrong")...), int64(-1), uint16(100))
	f.Add(frame(math.MaxInt64-2, 5, "xxxxx"), int64(-1), uint16(100))
	f.Add(frame(-1, frameError, "xxxxx"), int64(-1), uint16(100))
	f.Add(append(frame(10, 5, "xxxxx"), frame(12, 5, "xxxxx")...), int64(20), uint16(100))
	f.Add(append(frame(10, 5, "xxxxx"), frame(12, 0, "")...), int64(12), uint16(100))
	f.Add(append(frame(30, 5, "xxxxx"), frame(35, 0, "")...), int64(20), uint16(100))
	f.Fuzz(func(t *testing.T, stream []byte, size int64, piece uint16) {
		size = max(size, -1)
		in := bytes.NewReader(stream)
		src := Decode(iotest.OneByteReader(in), size)
		p := make([]byte, 1+int(piece))
		var again bytes.Buffer
		at := int64(0)
		for {
			n, off, err := src.Next(p)
			if err != nil {
				if n != 0 {
					t.Fatalf("%d bytes and %v", n, err)
				}
				checkStreamEnd(t, src, err, size, at)
				break
			}
			if n < 1 || n > len(p) || off < at || off > math.MaxInt64-int64(n) || size >= 0 && off+int64(n) > size {
				t.Fatalf("%d bytes at %d, after %d, of %d", n, off, at, size)
			}
			at = off + int64(n)
		}
		used := len(stream) - in.Len()
		err := Encode(t.Context(), &again, Decode(bytes.NewReader(stream), size), func(error) []byte { return nil })
		if err == nil && !bytes.Equal(again.Bytes(), stream[:used]) {
			t.Fatalf("%x encodes to %x", stream[:used], again.Bytes())
		}
	})
}

// checkStreamEnd checks what a stream ended with: the content is whole, or there is an error that says why not.
func checkStreamEnd(t *testing.T, src Source, err error, size, at int64) {
	if err == io.EOF {
		if got := src.Size(); got < at || size >= 0 && got != size {
			t.Fatalf("the content ends at %d, after %d, and %d were announced", got, at, size)
		}
		if n, _, err := src.Next(make([]byte, 10)); n != 0 || err != io.EOF {
			t.Fatal("behind the end:", n, err)
		}
		return
	}
	var remote *RemoteError
	if errors.As(err, &remote) && len(remote.Message) > maxMessage {
		t.Fatalf("a message of %d bytes", len(remote.Message))
	}
	if err.Error() == "" && remote == nil {
		t.Fatal("an error that says nothing")
	}
}

// FuzzStream moves content through a plain stream and a framed one. Nothing may be lost; zeros must be left out.
func FuzzStream(f *testing.F) {
	f.Add([]byte("abc"), uint32(0), uint16(1))
	f.Add(bytes.Repeat([]byte("x"), Block), uint32(3*Block), uint16(0))
	f.Add([]byte{}, uint32(2*Block+1), uint16(2))
	f.Fuzz(func(t *testing.T, text []byte, zeros uint32, copies uint16) {
		hole := make([]byte, zeros%(1<<16))
		want := bytes.Clone(hole)
		for range 1 + copies%4 {
			want = append(append(want, text...), hole...)
		}
		if len(want) > 1<<20 {
			return
		}
		var framed, plain bytes.Buffer
		if err := Encode(t.Context(), &framed, FromStream(iotest.HalfReader(bytes.NewReader(want))), nil); err != nil {
			t.Fatal(err)
		}
		blocks := 0
		for b := want; len(b) > 0; b = b[min(len(b), Block):] {
			if !isZero(b[:min(len(b), Block)]) {
				blocks++
			}
		}
		if framed.Len() > blocks*(Block+frameHeader)+frameHeader {
			t.Fatalf("%d bytes for %d blocks", framed.Len(), blocks)
		}
		if err := WriteTo(t.Context(), &plain, Decode(&framed, int64(len(want))), nil); err != nil || !bytes.Equal(plain.Bytes(), want) {
			t.Fatalf("%d bytes became %d: %v", len(want), plain.Len(), err)
		}
	})
}
