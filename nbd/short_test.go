package nbd

import (
	"errors"
	"io"
	"syscall"
	"testing"
)

// shortDevice reads and writes n bytes and returns err, whatever it is asked for.
type shortDevice struct {
	n   int
	err error
}

func (d shortDevice) ReadAt([]byte, int64) (int, error)  { return d.n, d.err }
func (d shortDevice) WriteAt([]byte, int64) (int, error) { return d.n, d.err }

// TestShortDevice: a device that does less than it was asked for, and says nothing of it, has failed.
func TestShortDevice(t *testing.T) {
	for _, c := range []struct {
		d           shortDevice
		read, write error
	}{
		{shortDevice{8, nil}, nil, nil},
		{shortDevice{8, io.EOF}, nil, io.EOF},
		{shortDevice{5, nil}, io.ErrUnexpectedEOF, io.ErrShortWrite},
		{shortDevice{0, syscall.EIO}, syscall.EIO, syscall.EIO},
	} {
		if err := readFull(c.d, make([]byte, 8), 100); !errors.Is(err, c.read) {
			t.Errorf("%+v: a read ends with %v", c.d, err)
		}
		if err := writeFull(c.d, make([]byte, 8), 100); !errors.Is(err, c.write) {
			t.Errorf("%+v: a write ends with %v", c.d, err)
		}
	}
}
