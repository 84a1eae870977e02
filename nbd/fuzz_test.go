package nbd

import (
	"bytes"
	"context"
	"net"
	"testing"
	"time"
)

// streamConn is a connection whose input is given in advance and comes in pieces. Its output is checked and dropped.
type streamConn struct {
	net.Conn // panics where it is used
	in       *bytes.Reader
	piece    int
	sent     int
}

func (c *streamConn) Read(p []byte) (int, error)      { return c.in.Read(p[:min(len(p), c.piece)]) }
func (c *streamConn) Write(p []byte) (int, error)     { c.sent += len(p); return len(p), nil }
func (c *streamConn) Close() error                    { return nil }
func (c *streamConn) SetDeadline(time.Time) error     { return nil }
func (c *streamConn) SetReadDeadline(time.Time) error { return nil }

// fuzzDevice checks that requests to the device are within its size.
type fuzzDevice struct {
	tb   testing.TB
	size int64
}

func (d fuzzDevice) within(off, n int64) error {
	if off < 0 || n < 0 || off > d.size || n > d.size-off {
		d.tb.Errorf("%d bytes at %d of %d", n, off, d.size)
	}
	return nil
}

func (d fuzzDevice) ReadAt(p []byte, off int64) (int, error) {
	return len(p), d.within(off, int64(len(p)))
}

func (d fuzzDevice) WriteAt(p []byte, off int64) (int, error) {
	return len(p), d.within(off, int64(len(p)))
}
func (d fuzzDevice) Flush() error                           { return nil }
func (d fuzzDevice) Discard(off, n int64) error             { return d.within(off, n) }
func (d fuzzDevice) WriteZeroes(off, n int64, _ bool) error { return d.within(off, n) }
func (d fuzzDevice) Size() int64                            { return d.size }
func (d fuzzDevice) Extents(off, n int64, fn func(off, length int64, hole bool) bool) error {
	fn(off, n/2, true)
	return d.within(off, n)
}

// FuzzConnection serves arbitrary bytes as a connection, the transmission phase included. It must end, without a panic,
// with the export closed, and never call the device outside its size.
func FuzzConnection(f *testing.F) {
	open := u32(3) + u64(magicOption) + u32(optStructuredReply) + u32(0) +
		u64(magicOption) + u32(optSetMeta) + u32(30) + str("disk") + u32(1) + str(contextAllocation) +
		u64(magicOption) + u32(optGo) + u32(10) + str("disk") + u16(0)
	f.Add([]byte(u32(3)+u64(magicOption)+u32(optList)+u32(0)), byte(0))
	f.Add([]byte(u32(3)+u64(magicOption)+u32(optInfo)+u32(12)+str("disk")+u16(1)+u16(3)), byte(3))
	f.Add([]byte(u32(3)+u64(magicOption)+u32(optExportName)+u32(4)+"disk"+reqBytes(0, cmdRead, 1, 0, 512)), byte(50))
	f.Add([]byte(open+reqBytes(0, cmdWrite, 1, 0, 10)+"0123456789"+reqBytes(cmdFlagFUA, cmdTrim, 2, 4096, 4096)), byte(255))
	f.Add([]byte(open+reqBytes(0, cmdRead, 1, 0, 1<<17)+reqBytes(0, cmdBlockStatus, 2, 0, 1<<17)), byte(9))
	f.Add([]byte(open+reqBytes(0, cmdCache, 1, 0, 1<<17)+reqBytes(0, cmdFlush, 2, 0, 0)+reqBytes(0, cmdDisc, 0, 0, 0)), byte(9))
	f.Fuzz(func(t *testing.T, data []byte, piece byte) {
		conn := &streamConn{in: bytes.NewReader(data), piece: 1 + int(piece)}
		opened, closed := 0, 0
		exports := fuzzExports(func() *Export {
			opened++
			return &Export{Device: fuzzDevice{t, 1 << 20}, Close: func() error { closed++; return nil }}
		})
		_ = New(exports, Options{Workers: 2}).ServeConn(context.Background(), conn)
		if opened != closed {
			t.Errorf("%d opens, %d closes", opened, closed)
		}
	})
}

type fuzzExports func() *Export

func (f fuzzExports) List() ([]string, error)       { return []string{"disk"}, nil }
func (f fuzzExports) Open(string) (*Export, error)  { return f(), nil }
func (f fuzzExports) Describe(string) (Info, error) { return Info{Name: "disk", Size: 1 << 20}, nil }
