package nbd

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"syscall"
	"testing"
	"time"
)

// BenchmarkFio runs fio's nbd engine for 3 s a workload against this server and others:
//
//	go test ./nbd -run '^$' -bench Fio -benchtime 1x
//
// ram is a device that costs nothing, ram6us one that takes 6 µs of CPU for each request, and file a file with
// O_DIRECT. qemu-nbd serves such a file too.
func BenchmarkFio(b *testing.B) {
	const size = 1 << 30
	cheap, cost := newRAM(size), newRAM(size)
	for i := 0; i < size; i += 4096 { // no page faults while measuring
		for _, d := range []*ramDevice{cheap, cost} {
			d.data[i], d.present[i/ramBlock] = 1, true
		}
	}
	cost.cost = 6 * time.Microsecond
	own := func(d Device) func(*testing.B, string) {
		return func(b *testing.B, sock string) { serveAt(b, sock, exportMap{"": {Device: d}}) }
	}
	for _, s := range []struct {
		name  string
		start func(b *testing.B, sock string)
	}{
		{"ram", own(cheap)},
		{"ram6us", own(cost)},
		{"file", func(b *testing.B, sock string) { own(newFileDevice(b, size))(b, sock) }},
		{"nbdkit-memory", func(b *testing.B, sock string) {
			startPeer(b, sock, "nbdkit", "-f", "-U", sock, "memory", strconv.Itoa(size))
		}},
		{"qemu-nbd-raw", func(b *testing.B, sock string) {
			startPeer(b, sock, "qemu-nbd", "-t", "-e", "8", "-k", sock, "--cache=none", "--aio=io_uring",
				"-f", "raw", newBenchFile(b, size))
		}},
	} {
		b.Run(s.name, func(b *testing.B) {
			sock := filepath.Join(b.TempDir(), "s")
			s.start(b, sock)
			for _, w := range []struct {
				rw, bs string
				depth  int
				extra  string
			}{
				{"randwrite", "4k", 32, ""},
				{"randread", "4k", 32, ""},
				{"randread", "4k", 1, ""},
				{"randwrite", "4k", 1, "--fsync=1"},
				{"write", "1M", 4, ""},
				{"read", "1M", 4, ""},
			} {
				b.Run(fmt.Sprintf("%s-%s-%d%s", w.rw, w.bs, w.depth, w.extra), func(b *testing.B) {
					benchFio(b, sock, w.rw, w.bs, w.depth, w.extra)
				})
			}
		})
	}
}

func benchFio(b *testing.B, sock, rw, bs string, depth int, extra string) {
	args := []string{
		"--name=j", "--ioengine=nbd", "--uri=nbd+unix:///?socket=" + sock, "--rw=" + rw,
		"--bs=" + bs, "--iodepth=" + strconv.Itoa(depth), "--size=1G", "--time_based", "--runtime=3",
		"--buffer_compress_percentage=50", "--buffer_compress_chunk=4k", "--refill_buffers",
		"--output-format=json",
	}
	if extra != "" {
		args = append(args, extra)
	}
	var before, after syscall.Rusage
	_ = syscall.Getrusage(syscall.RUSAGE_SELF, &before)
	out, err := exec.Command("fio", args...).Output()
	_ = syscall.Getrusage(syscall.RUSAGE_SELF, &after)
	if err != nil {
		b.Fatalf("fio: %v\n%s", err, out)
	}
	if i := bytes.IndexByte(out, '{'); i > 0 { // after notes of fio's
		out = out[i:]
	}
	var r struct {
		Jobs []struct {
			Read, Write struct {
				IOPS float64 `json:"iops"`
				Clat struct {
					Percentile map[string]float64 `json:"percentile"`
				} `json:"clat_ns"`
			}
		}
	}
	if err := json.Unmarshal(out, &r); err != nil {
		b.Fatal(err)
	}
	j := r.Jobs[0].Read
	if j.IOPS == 0 {
		j = r.Jobs[0].Write
	}
	cpu := after.Utime.Nano() + after.Stime.Nano() - before.Utime.Nano() - before.Stime.Nano()
	b.ReportMetric(j.IOPS, "IOPS")
	b.ReportMetric(j.Clat.Percentile["50.000000"]/1e3, "p50-us")
	b.ReportMetric(j.Clat.Percentile["99.000000"]/1e3, "p99-us")
	b.ReportMetric(float64(cpu)/1e3/(j.IOPS*3), "server-us/op")
	b.ReportMetric(0, "ns/op")
}

// serveAt serves exports on a unix socket until the test ends.
func serveAt(tb testing.TB, sock string, exports Exports) *Server {
	tb.Helper()
	l, err := net.Listen("unix", sock)
	if err != nil {
		tb.Fatal(err)
	}
	s := New(exports, Options{})
	done := make(chan error, 1)
	go func() { done <- s.Serve(context.Background(), l) }()
	tb.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		if err := s.Shutdown(ctx); err != nil {
			tb.Errorf("Shutdown: %v", err)
		}
		if err := <-done; err != ErrServerClosed {
			tb.Errorf("Serve: %v", err)
		}
	})
	return s
}

// startPeer starts another server, and waits for its socket.
func startPeer(b *testing.B, sock string, name string, args ...string) {
	cmd := exec.Command(name, args...)
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		_ = cmd.Wait()
	})
	for range 100 {
		if _, err := os.Stat(sock); err == nil {
			return
		}
		time.Sleep(50 * time.Millisecond)
	}
	b.Fatalf("%s: no socket", name)
}

// newBenchFile returns a file that is fully written, so that its blocks must be read.
func newBenchFile(b *testing.B, size int) string {
	name := filepath.Join(b.TempDir(), "f")
	f, err := os.Create(name)
	if err != nil {
		b.Fatal(err)
	}
	defer f.Close()
	chunk := make([]byte, 4<<20)
	for i := range chunk {
		chunk[i] = byte(i * 7)
	}
	for n := 0; n < size; n += len(chunk) {
		if _, err := f.Write(chunk); err != nil {
			b.Fatal(err)
		}
	}
	if err := f.Sync(); err != nil {
		b.Fatal(err)
	}
	return name
}

// fileDevice is a file with O_DIRECT. Buffers that are not aligned go through a copy.
type fileDevice struct {
	ramDevice // for what is not measured
	f         *os.File
	size      int64
	bufs      chan []byte
}

func newFileDevice(b *testing.B, size int) *fileDevice {
	fd, err := syscall.Open(newBenchFile(b, size), syscall.O_RDWR|syscall.O_DIRECT, 0)
	if err != nil {
		b.Fatal(err)
	}
	d := &fileDevice{f: os.NewFile(uintptr(fd), "bench"), size: int64(size), bufs: make(chan []byte, 64)}
	b.Cleanup(func() { d.f.Close() })
	for range cap(d.bufs) {
		m, err := syscall.Mmap(-1, 0, 1<<20, syscall.PROT_READ|syscall.PROT_WRITE, syscall.MAP_ANON|syscall.MAP_PRIVATE)
		if err != nil {
			b.Fatal(err)
		}
		d.bufs <- m
	}
	return d
}

func (d *fileDevice) ReadAt(p []byte, off int64) (int, error) {
	m := <-d.bufs
	defer func() { d.bufs <- m }()
	n, err := d.f.ReadAt(m[:len(p)], off)
	copy(p, m[:n])
	return n, err
}

func (d *fileDevice) WriteAt(p []byte, off int64) (int, error) {
	m := <-d.bufs
	defer func() { d.bufs <- m }()
	copy(m, p)
	return d.f.WriteAt(m[:len(p)], off)
}

func (d *fileDevice) Flush() error { return syscall.Fdatasync(int(d.f.Fd())) }
func (d *fileDevice) Size() int64  { return d.size }
func (d *fileDevice) Extents(off, length int64, fn func(off, length int64, hole bool) bool) error {
	fn(off, length, false)
	return nil
}
