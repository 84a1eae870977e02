package e2e

import (
	"bufio"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"os"
	"syscall"
)

// disk is a disk that the oracle writes to.
type disk interface {
	io.ReaderAt
	io.WriterAt
	Sync() error
	io.Closer
}

// nbdDisk is the least NBD client there is: one request at a time, simple replies. Numbers: the protocol's
// doc/proto.md, "Values".
type nbdDisk struct {
	c net.Conn
	r *bufio.Reader
}

const (
	nbdMagic      = 0x4e42444d41474943 // "NBDMAGIC"
	optMagic      = 0x49484156454f5054 // "IHAVEOPT"
	requestMagic  = 0x25609513
	replyMagic    = 0x67446698
	optExportName = 1
	cmdRead       = 0
	cmdWrite      = 1
	cmdDisconnect = 2
	cmdFlush      = 3
	fixedNoZeroes = 3
	flagSendFlush = 1 << 2
)

func dialNBD(socket, export string) (*nbdDisk, error) {
	c, err := net.Dial("unix", socket)
	if err != nil {
		return nil, err
	}
	d := &nbdDisk{c, bufio.NewReaderSize(c, 128<<10)}
	if err := d.handshake(export); err != nil {
		c.Close()
		return nil, fmt.Errorf("handshake: %w", err)
	}
	return d, nil
}

func (d *nbdDisk) handshake(export string) error {
	var hello [18]byte
	if _, err := io.ReadFull(d.r, hello[:]); err != nil {
		return err
	}
	if binary.BigEndian.Uint64(hello[:]) != nbdMagic || binary.BigEndian.Uint64(hello[8:]) != optMagic {
		return fmt.Errorf("greeting %x", hello)
	}
	b := binary.BigEndian.AppendUint32(nil, fixedNoZeroes)
	b = binary.BigEndian.AppendUint64(b, optMagic)
	b = binary.BigEndian.AppendUint32(b, optExportName)
	b = binary.BigEndian.AppendUint32(b, uint32(len(export)))
	if _, err := d.c.Write(append(b, export...)); err != nil {
		return err
	}
	var info [10]byte
	if _, err := io.ReadFull(d.r, info[:]); err != nil {
		return err
	}
	if binary.BigEndian.Uint16(info[8:])&flagSendFlush == 0 {
		return fmt.Errorf("transmission flags %x: no flush", info[8:])
	}
	return nil
}

// request sends one request and reads its reply.
func (d *nbdDisk) request(cmd uint16, off int64, n int, out, in []byte) error {
	b := binary.BigEndian.AppendUint32(nil, requestMagic)
	b = binary.BigEndian.AppendUint16(b, 0)
	b = binary.BigEndian.AppendUint16(b, cmd)
	b = binary.BigEndian.AppendUint64(b, 7)
	b = binary.BigEndian.AppendUint64(b, uint64(off))
	b = binary.BigEndian.AppendUint32(b, uint32(n))
	if _, err := d.c.Write(append(b, out...)); err != nil || cmd == cmdDisconnect {
		return err
	}
	var reply [16]byte
	if _, err := io.ReadFull(d.r, reply[:]); err != nil {
		return err
	}
	if binary.BigEndian.Uint32(reply[:]) != replyMagic {
		return fmt.Errorf("reply %x", reply)
	}
	if e := binary.BigEndian.Uint32(reply[4:]); e != 0 {
		return fmt.Errorf("server's error: %w", syscall.Errno(e))
	}
	_, err := io.ReadFull(d.r, in)
	return err
}

func (d *nbdDisk) ReadAt(p []byte, off int64) (int, error) {
	return len(p), d.request(cmdRead, off, len(p), nil, p)
}

func (d *nbdDisk) WriteAt(p []byte, off int64) (int, error) {
	return len(p), d.request(cmdWrite, off, len(p), p, nil)
}

func (d *nbdDisk) Sync() error { return d.request(cmdFlush, 0, 0, nil, nil) }

func (d *nbdDisk) Close() error {
	_ = d.request(cmdDisconnect, 0, 0, nil, nil) // a server that is gone is no error here
	return d.c.Close()
}

// openDevice opens a block device with O_DIRECT, so that reads return the server's data.
func openDevice(path string) (disk, error) {
	return os.OpenFile(path, os.O_RDWR|syscall.O_DIRECT, 0)
}
