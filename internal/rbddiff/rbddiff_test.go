package rbddiff

import (
	"bytes"
	"errors"
	"io"
	"strings"
	"testing"
	"testing/iotest"
)

// example is a difference, made by hand from the published format.
const example = "rbd diff v1\n" +
	"t\x03\x00\x00\x00tue" + "f\x03\x00\x00\x00mon" + "s\x00\x20\x00\x00\x00\x00\x00\x00" +
	"w\x05\x00\x00\x00\x00\x00\x00\x00\x04\x00\x00\x00\x00\x00\x00\x00data" +
	"z\x00\x10\x00\x00\x00\x00\x00\x00\x00\x10\x00\x00\x00\x00\x00\x00" + "e"

// disk is what a difference writes, applied to a disk of the byte x.
func disk(text []byte) (Header, string, error) {
	d, err := NewReader(bytes.NewReader(text))
	if err != nil {
		return Header{}, "", err
	}
	if d.Header().Size > 1<<20 {
		return d.Header(), "", ErrFormat
	}
	out := bytes.Repeat([]byte("x"), int(d.Header().Size))
	p := make([]byte, 3)
	for {
		off, length, zero, err := d.Next(p)
		switch {
		case errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF):
			return d.Header(), string(out), nil
		case err != nil:
			return d.Header(), "", err
		case zero:
			clear(out[off:][:length])
		default:
			copy(out[off:][:length], p)
		}
	}
}

func TestReader(t *testing.T) {
	want := bytes.Repeat([]byte("x"), 8192)
	copy(want[5:], "data")
	clear(want[4096:])
	h, got, err := disk([]byte(example))
	if err != nil || h != (Header{"mon", "tue", 8192}) || got != string(want) {
		t.Error(h, err)
	}
	for n := range len(example) {
		if _, _, err := disk([]byte(example[:n])); err == nil || n > len(magic) && !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("cut at %d: %v", n, err)
		}
	}
	for name, bad := range map[string]string{
		"version 2":       "rbd diff v2\n" + example[12:],
		"behind":          example + "e",
		"late header":     example[:len(example)-1] + "s\x00\x20\x00\x00\x00\x00\x00\x00e",
		"no size":         "rbd diff v1\ne",
		"unknown":         "rbd diff v1\nq",
		"behind the disk": "rbd diff v1\ns\x00\x20\x00\x00\x00\x00\x00\x00z\x01\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00e",
		"over the end":    "rbd diff v1\ns\x00\x20\x00\x00\x00\x00\x00\x00z\x00\x10\x00\x00\x00\x00\x00\x00\x01\x10\x00\x00\x00\x00\x00\x00e",
		"long name":       "rbd diff v1\nf\xff\xff\xff\xffx",
		"two names":       "rbd diff v1\nf\x01\x00\x00\x00xf\x01\x00\x00\x00x",
		"negative":        "rbd diff v1\ns\x00\x00\x00\x00\x00\x00\x00\x80e",
	} {
		if _, _, err := disk([]byte(bad)); !errors.Is(err, ErrFormat) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestErrorAtEnd reads a difference whose input fails at its end. Nothing is wrong with the format then.
func TestErrorAtEnd(t *testing.T) {
	broken := errors.New("broken")
	d, err := NewReader(io.MultiReader(strings.NewReader("rbd diff v1\ns\x00\x20\x00\x00\x00\x00\x00\x00e"), iotest.ErrReader(broken)))
	if err != nil {
		t.Fatal(err)
	}
	if _, _, _, err := d.Next(nil); !errors.Is(err, broken) || errors.Is(err, ErrFormat) {
		t.Error(err)
	}
}

func TestWriter(t *testing.T) {
	var b bytes.Buffer
	w := NewWriter(&b, Header{"mon", "tue", 8192})
	if err := errors.Join(w.Data([]byte("data"), 5), w.Zero(4096, 4096), w.End()); err != nil {
		t.Fatal(err)
	}
	h, got, err := disk(b.Bytes())
	_, want, _ := disk([]byte(example))
	if err != nil || h != (Header{"mon", "tue", 8192}) || got != want || b.Len() != len(example) {
		t.Error(h, err, b.Len())
	}
}

// FuzzReader reads arbitrary differences. It takes no more memory than the content has, and only what is whole passes.
func FuzzReader(f *testing.F) {
	f.Add([]byte(example))
	f.Add([]byte(example[:40]))
	f.Fuzz(func(t *testing.T, text []byte) {
		_, _, err := disk(text)
		if err == nil && text[len(text)-1] != 'e' {
			t.Fatal("it does not end with its end")
		}
	})
}
