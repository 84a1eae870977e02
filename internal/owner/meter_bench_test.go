package owner

import (
	"bytes"
	"context"
	"encoding/binary"
	"io"
	"math/rand/v2"
	"net"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vdisk/vdisk/cow"
	"github.com/vdisk/vdisk/nbd"
)

// BenchmarkMeter is what counting a request takes, by itself.
func BenchmarkMeter(b *testing.B) {
	m := new(meter)
	for i := range b.N {
		m.observe(nbd.OpRead, 4096, time.Duration(3000+i%4096), nil)
	}
}

// bare is an exported device that does not count.
type bare struct {
	nbd.Device
	nbd.TryReader
}

// oneExport is the only export of a service.
type oneExport struct{ e nbd.Export }

func (x oneExport) List() ([]string, error) { return []string{"v"}, nil }
func (x oneExport) Describe(string) (nbd.Info, error) {
	return nbd.Info{Name: "v", Size: x.e.Device.Size()}, nil
}
func (x oneExport) Open(string) (*nbd.Export, error) { e := x.e; return &e, nil }

// BenchmarkMetered reads and writes 4 KiB at random places over NBD, 16 at a time, on a device that counts and on one
// that does not, 2048 requests in turns. It reports the processor time of the process for a request, with client,
// server and engine.
func BenchmarkMetered(b *testing.B) {
	dir := filepath.Join(b.TempDir(), "store")
	if err := cow.Create(dir); err != nil {
		b.Fatal(err)
	}
	s, err := cow.Open(dir, cow.Options{Brief: true})
	if err != nil {
		b.Fatal(err)
	}
	defer s.Close()
	if _, err := s.CreateVolume("v", cow.VolumeOptions{Size: 64 << 20}); err != nil {
		b.Fatal(err)
	}
	d, err := s.OpenDevice(cow.Ref{Volume: "v"}, false)
	if err != nil {
		b.Fatal(err)
	}
	defer d.Close()
	block := bytes.Repeat([]byte("some text "), 16<<10/10+1)[:16<<10]
	for off := int64(0); off < 64<<20; off += int64(len(block)) {
		if _, err := d.WriteAt(block, off); err != nil {
			b.Fatal(err)
		}
	}
	full := exportedDevice{Device: d, meter: new(meter)}
	clients := []nbdClient{serveOne(b, bare{full, full}), serveOne(b, full)}
	for typ, name := range []string{"read", "write"} {
		b.Run(name, func(b *testing.B) {
			var spent [2]int64
			for i := range 2 * b.N {
				spent[i%2] += askMany(clients[i%2], uint16(typ), block[:4096])
			}
			b.ReportMetric(float64(spent[0])/float64(b.N*2048), "bare-ns")
			b.ReportMetric(float64(spent[1])/float64(b.N*2048), "metered-ns")
			b.ReportMetric(float64(spent[1])/float64(spent[0]), "ratio")
		})
	}
}

// serveOne serves a device until the benchmark ends, and returns a client of it.
func serveOne(b *testing.B, dev nbd.Device) nbdClient {
	l, err := net.Listen("unix", filepath.Join(b.TempDir(), "s"))
	if err != nil {
		b.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_ = serveUntil(ctx, nbd.New(oneExport{nbd.Export{Device: dev, Name: "v"}}, nbd.Options{}), l, time.Second)
	}()
	b.Cleanup(func() { cancel(); <-ended })
	c, refusal := openNBD(b, l.Addr().String(), "v")
	if refusal != "" {
		b.Fatal(refusal)
	}
	return c
}

// askMany sends 2048 requests, 16 at a time, and returns the processor time that they took.
func askMany(c nbdClient, typ uint16, block []byte) int64 {
	const depth = 16
	be := binary.BigEndian
	replies := make([]byte, depth*16)
	if typ != nbdWrite {
		replies = make([]byte, depth*(16+4096))
	}
	var out []byte
	_ = c.SetDeadline(time.Now().Add(time.Minute))
	before := processorTime()
	for range 2048 / depth {
		out = out[:0]
		for range depth {
			out = be.AppendUint32(out, 0x25609513)
			out = be.AppendUint32(out, uint32(typ))
			out = be.AppendUint64(out, 1)
			out = be.AppendUint64(out, rand.Uint64N(64<<20/4096)*4096)
			out = be.AppendUint32(out, 4096)
			if typ == nbdWrite {
				out = append(out, block...)
			}
		}
		c.put(out)
		if _, err := io.ReadFull(c, replies); err != nil {
			c.t.Fatal(err)
		}
	}
	return processorTime() - before
}

// processorTime returns what the process has taken so far, in nanoseconds.
func processorTime() int64 {
	var u unix.Rusage
	_ = unix.Getrusage(unix.RUSAGE_SELF, &u) // cannot fail
	return u.Utime.Nano() + u.Stime.Nano()
}
