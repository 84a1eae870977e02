package image

import (
	"bytes"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/vdisk/vdisk/nbd"
)

// served is a disk in memory that an NBD server has.
type served struct{ p []byte }

func (d served) ReadAt(p []byte, off int64) (int, error) { return copy(p, d.p[off:]), nil }
func (d served) Size() int64                             { return int64(len(d.p)) }

func (served) WriteAt([]byte, int64) (int, error)   { return 0, unix.EROFS }
func (served) Flush() error                         { return nil }
func (served) Discard(int64, int64) error           { return unix.EROFS }
func (served) WriteZeroes(int64, int64, bool) error { return unix.EROFS }
func (d served) List() ([]string, error)            { return []string{"d"}, nil }
func (d served) Describe(string) (nbd.Info, error) {
	return nbd.Info{Size: d.Size(), ReadOnly: true}, nil
}

func (d served) Open(name string) (*nbd.Export, error) {
	return &nbd.Export{Device: d, Name: name, ReadOnly: true}, nil
}

// serve serves a disk and returns the socket.
func serve(t *testing.T, p []byte) string {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	go func() { _ = nbd.New(served{p}, nbd.Options{}).Serve(t.Context(), l) }()
	return socket
}

// TestConvert writes an image of each kind. It holds the disk, takes no more space than it needs, and comes in again
// identical.
func TestConvert(t *testing.T) {
	want := disk16()
	socket := serve(t, want)
	for _, v := range some() {
		o := Output{Format: format(t, v.format), Options: v.options}
		if rest, is := strings.CutPrefix(v.options, "-c"); is {
			o.Compress, o.Options = true, strings.TrimPrefix(rest, ",")
		}
		if o.Check() != nil { // several files
			continue
		}
		t.Run(v.name(), func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			f, err := os.Create(filepath.Join(dir, "out.img"))
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			last := 0.0
			if err := o.Convert(t.Context(), socket, "d", f, t.TempDir(), func(percent float64) { last = percent }); err != nil {
				t.Fatal(err)
			}
			if last != 100 {
				t.Errorf("the last progress was %v", last)
			}
			m, err := read(t.Context(), f.Name(), Options{Format: o.Format})
			if err != nil || !bytes.Equal(m.p, want) {
				t.Errorf("it comes in again with other content, or not: %v", err)
			}
			var st unix.Stat_t
			if err := unix.Stat(f.Name(), &st); err != nil || st.Blocks*512 > 7<<20 {
				t.Errorf("it takes %d bytes (%v)", st.Blocks*512, err)
			}
		})
	}
}

// TestOutputOfSeveralFiles: an export is one file.
func TestOutputOfSeveralFiles(t *testing.T) {
	for _, options := range []string{"subformat=monolithicFlat", "adapter_type=ide,subformat=twoGbMaxExtentSparse", "data_file=x", "backing_file=x,backing_fmt=raw"} {
		if err := (Output{Options: options}).Check(); err == nil {
			t.Errorf("%s is permitted", options)
		}
	}
	if err := (Output{Options: "subformat=streamOptimized,adapter_type=ide"}).Check(); err != nil {
		t.Error(err)
	}
}

// pack compresses p.
func pack(t *testing.T, f Format, p []byte) []byte {
	t.Helper()
	var out bytes.Buffer
	z, err := Pack(t.Context(), &out, f)
	if err == nil {
		_, err = z.Write(p)
	}
	if err == nil {
		err = z.Close()
	}
	if err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

func unpack(t *testing.T, f Format, p []byte) ([]byte, error) {
	z, err := Unpack(t.Context(), bytes.NewReader(p), f)
	if err != nil {
		return nil, err
	}
	defer z.Close()
	return io.ReadAll(z)
}

// TestPack: compressed streams come in again, the usual programs read them, and none that is cut or damaged passes for
// another one.
func TestPack(t *testing.T) {
	want := disk16()[:5<<20+100]
	small := []byte(strings.Repeat("small but not too small ", 20))
	for name, program := range map[string]string{"gzip": "gzip", "xz": "xz", "zstd": "zstd"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f := format(t, name)
			p := pack(t, f, want)
			if got, err := unpack(t, f, p); err != nil || !bytes.Equal(got, want) {
				t.Errorf("%d bytes become %d: %v", len(want), len(got), err)
			}
			if got, err := unpack(t, f, append(bytes.Clone(p), p...)); err != nil || len(got) != 2*len(want) {
				t.Errorf("two streams are %d bytes: %v", len(got), err)
			}
			c := exec.Command(program, "-dc")
			c.Stdin = bytes.NewReader(p)
			if got, err := c.Output(); err != nil || !bytes.Equal(got, want) {
				t.Errorf("%s: %d bytes, %v", program, len(got), err)
			}
			if at, is := Recognise(p[:HeadSize], nil); !is || at.Format != name {
				t.Errorf("recognised as %+v", at)
			}
			p = pack(t, f, small)
			step := map[bool]int{true: 41, false: 1}[name == "xz"] // a process each
			for n := 1; n < len(p); n += step {
				if got, err := unpack(t, f, p[:n]); err == nil {
					t.Errorf("cut at %d of %d: %d bytes and no error", n, len(p), len(got))
				}
				bad := bytes.Clone(p)
				bad[n] ^= 0x10
				if got, err := unpack(t, f, bad); err == nil && !bytes.Equal(got, small) {
					t.Errorf("damaged at %d: other content and no error", n)
				}
			}
		})
	}
}

// TestConvertNamesTheFile: what qemu-img complains of has the names that the user knows.
func TestConvertNamesTheFile(t *testing.T) {
	private, path := t.TempDir(), filepath.Join(t.TempDir(), "mine.qcow2")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	format, err := Parse("qcow2")
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		o            Output
		socket, name string
	}{
		{Output{Format: format, Options: "cluster_size=7"}, serve(t, make([]byte, 1<<20)), path},
		{Output{Format: format}, filepath.Join(private, "socket"), "vol@snap"},
	} {
		err := c.o.Convert(t.Context(), c.socket, "vol@snap", f, private, nil)
		if err == nil || strings.Contains(err.Error(), "json:") || strings.Contains(err.Error(), private+"/mine") || !strings.Contains(err.Error(), c.name) {
			t.Errorf("%q: %v", c.o.Options, err)
		}
	}
}
