package nbd

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// These tests run the clients that people use. They are part of what must work, so a client that is missing is a
// failure; Debian has them in libnbd-bin, python3-libnbd, qemu-utils and fio.

// run runs a program, which must succeed, and returns its standard output.
func run(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := try(t, name, args...)
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return out
}

// try runs a program, for a minute at most.
func try(t *testing.T, name string, args ...string) (string, error) {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		t.Fatalf("%s is needed to test the server with, install libnbd-bin, python3-libnbd, qemu-utils and fio: %v", name, err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, path, args...)
	cmd.Dir = t.TempDir() // fio leaves state files
	// nbdsh runs the python3 that is first; its module is the system's.
	cmd.Env = append(os.Environ(), "PATH=/usr/bin:/bin:"+os.Getenv("PATH"))
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		err = fmt.Errorf("%w: %s", err, stderr.String())
	}
	return string(out), err
}

// serveURI serves exports on a unix socket, and returns what makes an export's URI.
func serveURI(t *testing.T, exports Exports) func(name string) string {
	sock := filepath.Join(t.TempDir(), "s")
	serveAt(t, sock, exports)
	return func(name string) string { return "nbd+unix:///" + name + "?socket=" + sock }
}

// sparseImage makes a raw image with data in some places.
func sparseImage(t *testing.T, size int64) string {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "image"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	rng := rand.New(rand.NewPCG(3, 4))
	for range 40 {
		p := make([]byte, 1+rng.IntN(500_000))
		for i := range p {
			p[i] = byte(rng.Uint32())
		}
		if _, err := f.WriteAt(p, rng.Int64N(size-int64(len(p)))); err != nil {
			t.Fatal(err)
		}
	}
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	return f.Name()
}

func sameAsFile(t *testing.T, d *ramDevice, file string) {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(b, d.content()) {
		t.Fatalf("%s differs from the device", file)
	}
}

func TestNbdinfo(t *testing.T) {
	d := newRAM(64 << 20)
	d.WriteAt(make([]byte, 8192), 1<<20)
	uri := serveURI(t, exportMap{
		"disk": {Device: d, Description: "the disk"},
		"ro":   {Device: d, ReadOnly: true},
	})
	var info struct {
		Protocol string
		Exports  []map[string]any
	}
	if err := json.Unmarshal([]byte(run(t, "nbdinfo", "--json", uri("disk"))), &info); err != nil {
		t.Fatal(err)
	}
	e := info.Exports[0]
	for key, want := range map[string]any{
		"export-size": float64(64 << 20), "description": "the disk", "contexts": []any{"base:allocation"},
		"is_read_only": false, "can_cache": true, "can_df": true, "can_fast_zero": true, "can_flush": true,
		"can_fua": true, "can_multi_conn": true, "can_trim": true, "can_zero": true,
		"block_size_minimum": 1.0, "block_size_preferred": 4096.0, "block_size_maximum": float64(MaxPayload),
	} {
		if fmt.Sprint(e[key]) != fmt.Sprint(want) {
			t.Errorf("%s: %v, want %v; all: %v", key, e[key], want, e)
		}
	}
	if info.Protocol != "newstyle-fixed" {
		t.Errorf("protocol %q", info.Protocol)
	}
	out := strings.Fields(run(t, "nbdinfo", "--map", uri("disk")))
	want := strings.Fields("0 1048576 3 hole,zero 1048576 8192 0 data 1056768 66052096 3 hole,zero")
	if !slices.Equal(out, want) {
		t.Errorf("map %v, want %v", out, want)
	}
	if out := run(t, "nbdinfo", "--list", uri("")); !strings.Contains(out, `export="disk"`) || !strings.Contains(out, `export="ro"`) {
		t.Errorf("list: %s", out)
	}
	run(t, "nbdinfo", "--is", "read-only", uri("ro"))
	if out, err := try(t, "nbdinfo", uri("other")); err == nil || !strings.Contains(err.Error(), "No such file") {
		t.Errorf("unknown export: %s %v", out, err)
	}
}

func TestNbdcopy(t *testing.T) {
	const size = 64<<20 + 512
	image := sparseImage(t, size)
	d := newRAM(size)
	uri := serveURI(t, serveRAM(d))
	run(t, "nbdcopy", "--flush", image, uri("disk"))
	sameAsFile(t, d, image)
	if d.flushes.Load() == 0 {
		t.Error("not flushed")
	}
	if n := d.opens.Load(); n < 2 {
		t.Errorf("%d connections, MULTI_CONN gives several", n)
	}
	back := filepath.Join(t.TempDir(), "back")
	run(t, "nbdcopy", uri("disk"), back)
	sameAsFile(t, d, back)
	// Between two servers' exports.
	d2 := newRAM(size)
	d2.WriteAt([]byte(pattern(size, 7)), 0)
	run(t, "nbdcopy", uri("disk"), serveURI(t, serveRAM(d2))("disk"))
	sameAsFile(t, d2, image)
}

func TestNbdsh(t *testing.T) {
	d := newRAM(8 << 20)
	uri := serveURI(t, exportMap{"disk": {Device: d}, "ro": {Device: d, ReadOnly: true}})
	run(t, "nbdsh", "--base-allocation", "-u", uri("disk"), "-c", `
import errno
def fails(err, f, *args):
    try: f(*args)
    except nbd.Error as e: assert e.errnum == err, (e.errnum, err)
    else: assert False, "no error"
h.set_strict_mode(0)   # let the server see what is wrong
size = h.get_size()
assert size == 8 << 20
h.pwrite(b"hello", 4090, nbd.CMD_FLAG_FUA)
assert h.pread(7, 4089) == b"\0hello\0"
h.zero(1, 4091, nbd.CMD_FLAG_NO_HOLE)
h.zero(1, 4092, nbd.CMD_FLAG_FAST_ZERO)
fails(errno.ENOTSUP, h.zero, 2, 4091, nbd.CMD_FLAG_NO_HOLE | nbd.CMD_FLAG_FAST_ZERO)
fails(errno.EINVAL, h.trim, 512, size)
assert h.pread(5, 4090) == b"h\0\0lo"
h.pwrite(b"x" * 65536, 65536)
h.trim(65536, 65536, nbd.CMD_FLAG_FUA)
assert h.pread(65536, 65536) == bytes(65536)
h.cache(size, 0)
h.flush()
fails(errno.EINVAL, h.pread, 2, size - 1)
fails(errno.ENOSPC, h.pwrite, b"xx", size - 1)
fails(errno.EINVAL, h.pread, 512, 0, nbd.CMD_FLAG_REQ_ONE)
h.pread(512, 0, nbd.CMD_FLAG_DF)
seen = []
def chunk(buf, off, status, err): seen.append((off, len(buf), status))
h.pread_structured(1 << 20, 0, chunk)
assert [(0, 4096, nbd.READ_DATA), (4096, (1 << 20) - 4096, nbd.READ_HOLE)] == seen, seen
seen = []
def extent(ctx, off, entries, err): seen.append((ctx, off, entries))
h.block_status(size, 0, extent)
assert seen == [("base:allocation", 0, [4096, 0, size - 4096, 3])], seen
seen = []
h.block_status(size, 0, extent, nbd.CMD_FLAG_REQ_ONE)
assert seen == [("base:allocation", 0, [4096, 0])], seen
`)
	run(t, "nbdsh", "-u", uri("ro"), "-c", `
import errno
h.set_strict_mode(0)
for f in (lambda: h.pwrite(b"x", 0), lambda: h.trim(1, 0), lambda: h.zero(1, 0)):
    try: f()
    except nbd.Error as e: assert e.errnum == errno.EPERM
    else: assert False
h.flush()
`)
	// Without structured replies.
	run(t, "nbdsh", "-c", `
h.set_request_structured_replies(False)
h.connect_uri("`+uri("disk")+`")
assert not h.get_structured_replies_negotiated()
assert h.pread(5, 4090) == b"h\0\0lo"
`)
}

func TestQemuImg(t *testing.T) {
	const size = 64 << 20
	image := sparseImage(t, size)
	d := newRAM(size)
	uri := serveURI(t, serveRAM(d))("disk")
	run(t, "qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", image, uri)
	sameAsFile(t, d, image)
	run(t, "qemu-img", "compare", "-f", "raw", "-F", "raw", image, uri)

	qcow := filepath.Join(t.TempDir(), "q")
	run(t, "qemu-img", "convert", "-f", "raw", "-O", "qcow2", uri, qcow)
	run(t, "qemu-img", "compare", "-f", "qcow2", "-F", "raw", qcow, uri)

	type extent struct {
		Start, Length int64
		Data          bool
	}
	var got []extent
	if err := json.Unmarshal([]byte(run(t, "qemu-img", "map", "-f", "raw", "--output=json", uri)), &got); err != nil {
		t.Fatal(err)
	}
	var want []extent
	pieces, _ := extents(d, 0, size, maxDescriptors, nil)
	for _, p := range pieces {
		want = append(want, extent{p.off, p.length, !p.hole()})
	}
	if !slices.Equal(got, want) {
		t.Errorf("map\n%v, want\n%v", got, want)
	}
	d.WriteAt([]byte{d.data[0] ^ 1}, 0)
	if out, err := try(t, "qemu-img", "compare", "-f", "raw", "-F", "raw", image, uri); err == nil {
		t.Errorf("compare does not see a difference: %s", out)
	}
}

func TestQemuIO(t *testing.T) {
	d := newRAM(64 << 20)
	uri := serveURI(t, serveRAM(d))("disk")
	out := run(t, "qemu-io", "-f", "raw",
		"-c", "write -P 0xaa 0 1M", "-c", "write -f -P 0xbb 1000 3000", "-c", "write -z 64k 64k",
		"-c", "write -z -u 256k 64k", "-c", "discard 128k 64k", "-c", "aio_write -P 0xcc 2M 32M", "-c", "aio_flush", "-c", "flush",
		"-c", "read -P 0xaa 0 1000", "-c", "read -P 0xbb 1000 3000", "-c", "read -P 0 64k 128k",
		"-c", "read -P 0 256k 64k", "-c", "read -P 0xaa 320k 704k", "-c", "read -P 0xcc 2M 32M", "-c", "read -P 0 34M 30M", uri)
	if strings.Contains(out, "failed") {
		t.Fatal(out)
	}
	if d.flushes.Load() < 2 {
		t.Errorf("%d flushes", d.flushes.Load())
	}
}

// fio checks all data that it wrote, in mixed sizes from several connections, with flushes between.
func TestFioVerify(t *testing.T) {
	d := newRAM(128 << 20)
	uri := serveURI(t, serveRAM(d))("disk")
	out := run(t, "fio", "--name=v", "--ioengine=nbd", "--uri="+uri, "--rw=randwrite", "--bsrange=512-256k",
		"--bs_unaligned=0", "--numjobs=4", "--size=24M", "--offset_increment=32M", "--iodepth=16", "--fsync=64",
		"--verify=crc32c", "--do_verify=1", "--verify_fatal=1", "--trim_percentage=0", "--output-format=json")
	if i := strings.IndexByte(out, '{'); i >= 0 {
		out = out[i:]
	}
	var r struct {
		Jobs []struct {
			Error       int
			Read, Write struct {
				Bytes int64 `json:"io_bytes"`
			}
		}
	}
	if err := json.Unmarshal([]byte(out), &r); err != nil {
		t.Fatal(err)
	}
	if len(r.Jobs) != 4 {
		t.Fatalf("%d jobs", len(r.Jobs))
	}
	for i, j := range r.Jobs {
		if j.Error != 0 || j.Write.Bytes < 20<<20 || j.Read.Bytes < j.Write.Bytes {
			t.Errorf("job %d: error %d, %d bytes written, %d verified", i, j.Error, j.Write.Bytes, j.Read.Bytes)
		}
	}
	if d.flushes.Load() == 0 {
		t.Error("no flushes")
	}
}

// A file of nbdfuse is the device.
func TestNbdfuse(t *testing.T) {
	for _, need := range []string{"nbdfuse", "fusermount3"} {
		if _, err := exec.LookPath(need); err != nil {
			t.Fatalf("%s is needed to test the server with, install libnbd-bin and fuse3: %v", need, err)
		}
	}
	d := newRAM(16 << 20)
	uri := serveURI(t, serveRAM(d))("disk")
	dir := t.TempDir()
	cmd := exec.Command("nbdfuse", filepath.Join(dir, "nbd"), uri)
	if err := os.WriteFile(filepath.Join(dir, "nbd"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, "nbd")
	t.Cleanup(func() {
		_ = exec.Command("fusermount3", "-u", file).Run()
		_ = cmd.Process.Signal(syscall.SIGTERM)
		_ = cmd.Wait()
	})
	mounted := func() bool { st, err := os.Stat(file); return err == nil && st.Size() == d.Size() }
	for began := time.Now(); !mounted(); time.Sleep(20 * time.Millisecond) {
		if time.Since(began) > 10*time.Second {
			t.Fatalf("not mounted: %s", stderr.String())
		}
	}
	f, err := os.OpenFile(file, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	p := []byte(pattern(3<<20+77, 6))
	if _, err := f.WriteAt(p, 1234567); err != nil {
		t.Fatal(err)
	}
	if err := f.Sync(); err != nil {
		t.Fatal(err)
	}
	if d.flushes.Load() == 0 {
		t.Error("fsync did not flush")
	}
	if !bytes.Equal(d.content()[1234567:][:len(p)], p) {
		t.Error("data differ")
	}
}
