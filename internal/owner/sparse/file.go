package sparse

import (
	"errors"
	"fmt"
	"io"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// fileSource is a Source over a regular file or a block device.
type fileSource struct {
	f    *os.File
	size int64
	at   int64 // everything before it has been handed out, or is zeros
	// The end of the file's run of data that contains at; if at == end, the next run must be found.
	end   int64
	plain bool // the file system cannot distinguish holes from data

	cached bool // the file cannot be read without filling the page cache
}

// FromFile returns the content of a regular file or a block device. It does not read holes, and leaves out blocks of
// zeros.
func FromFile(f *os.File) (Source, error) {
	fi, err := f.Stat()
	if err != nil {
		return nil, err
	}
	device := fi.Mode()&os.ModeDevice != 0 && fi.Mode()&os.ModeCharDevice == 0
	if !fi.Mode().IsRegular() && !device {
		return nil, fmt.Errorf("%s is neither a regular file nor a block device", f.Name())
	}
	size, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return nil, err
	}
	return &fileSource{f: f, size: size, plain: device}, nil
}

func (s *fileSource) Size() int64 { return s.size }

func (s *fileSource) Next(p []byte) (int, int64, error) {
	p = p[:len(p)/Block*Block]
	for {
		if s.at >= s.end {
			if err := s.nextRun(); err != nil {
				return 0, 0, err
			}
		}
		buf := p[:min(int64(len(p)), s.end-s.at)]
		n, err := s.readAt(buf, s.at)
		if n < len(buf) {
			if err == nil || errors.Is(err, io.EOF) {
				err = fmt.Errorf("it shrank while it was read: %w", io.ErrUnexpectedEOF)
			}
			return 0, 0, fmt.Errorf("reading %s at %d: %w", s.f.Name(), s.at, err)
		}
		skip, n := DataRun(buf)
		off := s.at + int64(skip)
		s.at = off + int64(n)
		if n > 0 {
			copy(p, buf[skip:skip+n])
			return n, off, nil
		}
	}
}

// readAt is ReadAt of the file. On Linux 6.14 and later, what it brings into the page cache is dropped again. That takes
// the kernel less time than finding new pages for all of a large file, and the pages that others have cached stay.
func (s *fileSource) readAt(p []byte, off int64) (done int, err error) {
	for !s.cached && done < len(p) {
		n, err := unix.Preadv2(int(s.f.Fd()), [][]byte{p[done:]}, off+int64(done), unix.RWF_DONTCACHE)
		switch {
		case err == unix.EINTR:
		case err == unix.EOPNOTSUPP, err == unix.ENOSYS, err == unix.EINVAL:
			s.cached = true
		case err != nil:
			return done, os.NewSyscallError("preadv2", err)
		case n == 0:
			return done, io.EOF
		default:
			done += n
		}
	}
	if done == len(p) {
		return done, nil
	}
	n, err := s.f.ReadAt(p[done:], off+int64(done))
	return done + n, err
}

// nextRun sets at and end to the file's next run of data, rounded to multiples of Block, or returns io.EOF if there is
// none.
func (s *fileSource) nextRun() error {
	if s.at >= s.size {
		return io.EOF
	}
	if s.plain {
		s.end = s.size
		return nil
	}
	start, err := s.f.Seek(s.at, unix.SEEK_DATA)
	switch {
	case errors.Is(err, syscall.ENXIO): // a hole up to the end
		s.at = s.size
		return io.EOF
	case errors.Is(err, syscall.EINVAL), errors.Is(err, syscall.EOPNOTSUPP):
		s.plain = true
		return s.nextRun()
	case err != nil:
		return fmt.Errorf("looking for data in %s: %w", s.f.Name(), err)
	}
	end, err := s.f.Seek(start, unix.SEEK_HOLE)
	if err != nil {
		return fmt.Errorf("looking for a hole in %s: %w", s.f.Name(), err)
	}
	s.at = max(s.at, start/Block*Block)
	s.end = min((end+Block-1)/Block*Block, s.size)
	return nil
}
