package image

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/vdisk/vdisk/cow"
	"github.com/vdisk/vdisk/internal/owner/sparse"
)

// variant is an image that qemu-img makes.
type variant struct{ format, options string }

var variants = []variant{
	{"qcow2", "compat=0.10"},
	{"qcow2", "compat=1.1"},
	{"qcow2", "-c"},
	{"qcow2", "-c,compression_type=zstd"},
	{"qcow2", "cluster_size=512"},
	{"qcow", ""},
	{"qed", ""},
	{"vmdk", "subformat=monolithicSparse"},
	{"vmdk", "subformat=streamOptimized"},
	{"vmdk", "subformat=monolithicFlat"},
	{"vmdk", "subformat=twoGbMaxExtentSparse"},
	{"vdi", ""},
	{"vhdx", ""},
	{"vpc", "subformat=fixed,force_size=on"},
	{"vpc", "subformat=dynamic,force_size=on"},
	{"parallels", ""},
}

// some returns the variants, or a few of them with -short.
func some() []variant {
	if testing.Short() {
		return []variant{variants[2], variants[10], variants[13]}
	}
	return variants
}

func (v variant) name() string {
	return strings.NewReplacer(",", "-", "=", "-").Replace(v.format + "-" + v.options)
}

// size is the size of the test's disk.
const size = 16 << 20

// disk16 returns a disk with data here and there, which is no multiple of a cluster.
func disk16() []byte {
	p := make([]byte, size)
	r := rand.NewChaCha8([32]byte{1})
	for _, run := range [][2]int{{0, 300 << 10}, {4 << 20, 64 << 10}, {7340032, 4096}, {9<<20 + 512, 1024}, {size - 192<<10, 192 << 10}} {
		_, _ = r.Read(p[run[0] : run[0]+run[1]])
	}
	copy(p[4<<20:], bytes.Repeat([]byte("compressible "), 2000))
	return p
}

// make makes an image of the raw disk at raw, in dir.
func (v variant) make(t *testing.T, dir, raw string) string {
	t.Helper()
	path := filepath.Join(dir, v.name())
	args := []string{"convert", "-f", "raw", "-O", v.format}
	options := v.options
	if rest, is := strings.CutPrefix(options, "-c"); is {
		args, options = append(args, "-c"), strings.TrimPrefix(rest, ",")
	}
	if options != "" {
		args = append(args, "-o", options)
	}
	if out, err := exec.Command("qemu-img", append(args, raw, path)...).CombinedOutput(); err != nil {
		t.Fatalf("qemu-img %v: %v: %s", args, err, out)
	}
	return path
}

// memory is a disk in memory, which notes where it was written to.
type memory struct {
	mu      sync.Mutex
	p       []byte
	written int64
}

func (m *memory) WriteAt(p []byte, off int64) (int, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.written += int64(len(p))
	return copy(m.p[off:], p), nil
}

// read imports an image into memory.
func read(ctx context.Context, path string, o Options) (*memory, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	d, err := Open(ctx, f, o)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	m := &memory{p: make([]byte, d.Size())}
	_, err = sparse.Copy(ctx, m, d, nil, nil)
	return m, err
}

func format(t *testing.T, name string) Format {
	f, err := Parse(name)
	if err != nil {
		t.Fatal(err)
	}
	return f
}

// rawFile writes a disk to a sparse file.
func rawFile(t *testing.T, dir string, p []byte) string {
	t.Helper()
	f, err := os.Create(filepath.Join(dir, "raw"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := sparse.Copy(t.Context(), f, sparse.FromStream(bytes.NewReader(p)), nil, nil); err != nil {
		t.Fatal(err)
	}
	if err := f.Truncate(int64(len(p))); err != nil {
		t.Fatal(err)
	}
	return f.Name()
}

// TestOpen reads an image of each kind: the content is right, and holes are left out. A cut image is an error, or, if
// only padding was cut, right.
func TestOpen(t *testing.T) {
	want := disk16()
	dir := t.TempDir()
	raw := rawFile(t, dir, want)
	for _, v := range some() {
		t.Run(v.name(), func(t *testing.T) {
			t.Parallel()
			path := v.make(t, dir, raw)
			o := Options{Format: format(t, v.format)}
			m, err := read(t.Context(), path, o)
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(m.p, want) {
				t.Error("the content differs")
			}
			if m.written > 700<<10 {
				t.Errorf("%d bytes were written", m.written)
			}
			checkRecognised(t, path, v.format)
			checkCut(t, path, o, want)
		})
	}
}

// checkRecognised checks that an image is told from a raw disk.
func checkRecognised(t *testing.T, path, format string) {
	t.Helper()
	p, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	f, is := Recognise(p[:HeadSize], p[len(p)-FootSize:])
	if !is || f.Format != format {
		t.Errorf("recognised %v %+v, want %s", is, f, format)
	}
}

// checkCut checks that a cut image is an error, and never a disk with other content.
func checkCut(t *testing.T, path string, o Options, want []byte) {
	t.Helper()
	if strings.HasSuffix(path, "Flat") || strings.HasSuffix(path, "ExtentSparse") { // the data is beside it
		path = map[bool]string{true: path + "-flat", false: path + "-s001"}[strings.HasSuffix(path, "monolithicFlat")]
	}
	fi, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	whole := strings.TrimSuffix(strings.TrimSuffix(path, "-flat"), "-s001")
	cuts := []int64{fi.Size() - 1<<10}
	if o.Format.Name == "qcow2" || strings.HasSuffix(path, "streamOptimized") { // compressed data is not in the map
		cuts = append(cuts, fi.Size()/2)
	}
	for _, n := range cuts {
		if err := os.Truncate(path, n); err != nil {
			t.Fatal(err)
		}
		if m, err := read(t.Context(), whole, o); err == nil && !bytes.Equal(m.p, want) {
			t.Errorf("cut at %d of %d, it has other content", n, fi.Size())
		} else if err == nil && n == fi.Size()/2 {
			t.Errorf("cut at %d of %d, it is no error", n, fi.Size())
		}
	}
}

// TestReferences: what an image refers to is refused, and followed if that is permitted.
func TestReferences(t *testing.T) {
	want := disk16()
	dir := t.TempDir()
	raw := rawFile(t, dir, want)
	run := func(args ...string) {
		t.Helper()
		c := exec.Command("qemu-img", args...)
		c.Dir = dir
		if out, err := c.CombinedOutput(); err != nil {
			t.Fatalf("qemu-img %v: %v: %s", args, err, out)
		}
	}
	for _, f := range []string{"qcow2", "qcow", "qed", "vmdk"} {
		base := "raw"
		if f == "vmdk" {
			base = filepath.Base(variant{"vmdk", ""}.make(t, dir, raw))
		}
		baseFormat := map[bool]string{true: "vmdk", false: "raw"}[f == "vmdk"]
		run("create", "-q", "-f", f, "-b", base, "-F", baseFormat, "over."+f)
		checkReferring(t, filepath.Join(dir, "over."+f), f, want)
	}
	run("create", "-q", "-f", "qcow2", "-o", "data_file="+filepath.Join(dir, "data")+",data_file_raw=on", "ext.qcow2", "16M")
	if err := os.Rename(raw, filepath.Join(dir, "data")); err != nil {
		t.Fatal(err)
	}
	checkReferring(t, filepath.Join(dir, "ext.qcow2"), "qcow2", want)
}

func checkReferring(t *testing.T, path, name string, want []byte) {
	t.Helper()
	o := Options{Format: format(t, name)}
	if _, err := read(t.Context(), path, o); !errors.Is(err, cow.ErrInvalid) || !strings.Contains(err.Error(), "--backing") {
		t.Errorf("%s: %v", path, err)
	}
	o.Backing = true
	if m, err := read(t.Context(), path, o); err != nil || !bytes.Equal(m.p, want) {
		t.Errorf("%s with its files: %v", path, err)
	}
}

// TestDescriptors: a VMDK descriptor may only name plain files in its folder.
func TestDescriptors(t *testing.T) {
	dir := t.TempDir()
	secret := filepath.Join(t.TempDir(), "secret")
	for path, text := range map[string]string{secret: "secret", filepath.Join(dir, "flat"): strings.Repeat("x", 4096)} {
		if err := os.WriteFile(path, []byte(strings.Repeat(text, 1000)), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink(secret, filepath.Join(dir, "link")); err != nil {
		t.Fatal(err)
	}
	sparseHead := make([]byte, 64<<10) // refers to the descriptor behind it
	copy(sparseHead, "KDMV\x01\x00\x00\x00\x03\x00\x00\x00")
	sparseHead[28], sparseHead[36] = 1, 1
	copy(sparseHead[512:], descriptor(`RW 8 FLAT "`+secret+`" 0`))
	if err := os.WriteFile(filepath.Join(dir, "nested"), sparseHead, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ extents, want string }{
		{`RW 8 FLAT "flat" 0`, ""},
		{`RW 8 FLAT "` + secret + `" 0`, "outside"},
		{`RW 8 FLAT "../` + filepath.Base(filepath.Dir(secret)) + `/secret" 0`, "outside"},
		{`RW 8 FLAT "nbd:unix:x" 0`, "outside"},
		{`RW 8 FLAT "link" 0`, "no plain file"},
		{"RW\n8\vFLAT\f\n\"" + secret + "\" 0", "outside"},
		{"RW +8 FLAT \"" + secret, "outside"},
		{"RW 8 FLAT \r\n \"link", "no plain file"},
		{`RW 8 SPARSE "nested"`, "refers to other files"},
		{"RW 8 FLAT \"flat\" 0\nRW 8 FLAT \"" + secret + "\" 0", "outside"},
		{`RW 8 FLAT "missing" 0`, "no such file"},
		{`RW 9000 FLAT "flat" 0`, "incomplete"},
		{`RDONLY 8 FLAT "flat" 0`, "cannot be read"},
		{`parentFileNameHint="` + secret + `"` + "\n" + `RW 8 FLAT "flat" 0`, "parent"},
	} {
		path := filepath.Join(dir, "d.vmdk")
		if err := os.WriteFile(path, []byte(descriptor(c.extents)), 0o600); err != nil {
			t.Fatal(err)
		}
		_, err := read(t.Context(), path, Options{Format: format(t, "vmdk")})
		if c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
			t.Errorf("%s: %v, want %q", c.extents, err, c.want)
		}
	}
	if _, err := read(t.Context(), filepath.Join(dir, "nested"), Options{Format: format(t, "vmdk")}); !errors.Is(err, cow.ErrInvalid) {
		t.Error("a descriptor in a sparse file:", err)
	}
}

func descriptor(extents string) string {
	return "# Disk DescriptorFile\nversion=1\nCID=12345678\nparentCID=ffffffff\ncreateType=\"twoGbMaxExtentFlat\"\n\n" + extents + "\n\nddb.adapterType = \"ide\"\n"
}

// TestCloseEnds: a disk that nobody wants any more ends qemu-img, whether or not it has begun.
func TestCloseEnds(t *testing.T) {
	dir := t.TempDir()
	path := variant{"qcow2", ""}.make(t, dir, rawFile(t, dir, disk16()))
	for _, reads := range []int{0, 1, 100} {
		f, err := os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		d, err := Open(t.Context(), f, Options{Format: format(t, "qcow2")})
		if err != nil {
			t.Fatal(err)
		}
		for range reads {
			if _, _, err = d.Next(make([]byte, 8192)); err != nil {
				break
			}
		}
		if err != nil && err != io.EOF {
			t.Error(err)
		}
		if err := errors.Join(d.Close(), f.Close()); err != nil {
			t.Error(err)
		}
	}
}
