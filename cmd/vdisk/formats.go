package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/vdisk/vdisk/cow"
)

// imageFormat is a format of disk images or archives, and the magic bytes that identify it.
type imageFormat struct {
	name  string
	at    int // offset of magic in the head
	magic string
	foot  bool // magic is at the start of the footer instead
}

// imageFormats lists formats that can be told from raw images. A disk may be encrypted or hold any file system, so the
// list has nothing that is known to be on disks.
var imageFormats = []imageFormat{
	{"qcow2", 0, "QFI\xfb", false},
	{"VMDK", 0, "KDMV", false},
	{"VMDK", 0, "COWD", false},
	{"a VMDK descriptor (the data is in the files that it names)", 0, "# Disk DescriptorFile", false},
	{"VDI", 64, "\x7f\x10\xda\xbe", false},
	{"VHDX", 0, "vhdxfile", false},
	{"VHD", 0, "conectix", false},
	{"VHD", 0, "conectix", true}, // of fixed size: raw content and a footer
	{"DMG", 0, "koly", true},
	{"QED", 0, "QED\x00", false},
	{"Parallels", 0, "WithoutFreeSpace", false},
	{"Parallels", 0, "WithouFreSpacExt", false},
	{"Bochs", 0, "Bochs Virtual HD Image", false},
	{"EWF", 0, "EVF\x09\x0d\x0a\xff\x00", false},
	{"gzip", 0, "\x1f\x8b\x08", false},
	{"bzip2", 4, "1AY&SY", false},
	{"xz", 0, "\xfd7zXZ\x00", false},
	{"zstd", 0, "\x28\xb5\x2f\xfd", false},
	{"LZ4", 0, "\x04\x22\x4d\x18", false},
	{"lzop", 0, "\x89LZO\x00\r\n\x1a\n", false},
	{"7z", 0, "7z\xbc\xaf\x27\x1c", false},
	{"zip", 0, "PK\x03\x04", false},
	{"tar (as OVA)", 257, "ustar", false},
}

const (
	headSize   = 512
	footerSize = 512
)

// refuseImageFormats returns an error if the content is an image in another format, which would be useless as a raw
// disk. It only refuses. It never selects a format, because the disk's user controls the first bytes of a raw disk.
// head and foot are the content's first and last bytes, as far as they are known.
func refuseImageFormats(name string, head, foot []byte) error {
	for _, k := range imageFormats {
		in := head
		if k.foot {
			in = foot
		}
		if len(in) > k.at && bytes.HasPrefix(in[k.at:], []byte(k.magic)) {
			return fmt.Errorf("%s looks like %s, and a raw image is needed: convert it (qemu-img convert -O raw) or unpack it; "+
				"--format raw takes it as it is: %w", name, k.name, cow.ErrInvalid)
		}
	}
	return nil
}

// refuseImageFile applies refuseImageFormats to a file or block device.
func refuseImageFile(name string, f *os.File) error {
	size, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return err
	}
	head, foot := make([]byte, min(headSize, size)), make([]byte, min(footerSize, size))
	_, err = f.ReadAt(head, 0)
	if _, ferr := f.ReadAt(foot, size-int64(len(foot))); err == nil {
		err = ferr
	}
	if err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	return refuseImageFormats(name, head, foot)
}

// rawStream applies refuseImageFormats to a stream. A stream's footer is known only at its end, so the stream ends with
// the error.
type rawStream struct {
	r    io.Reader
	name string
	foot []byte // the last bytes read, at most footerSize
}

// newRawStream waits for the first bytes of r and checks them.
func newRawStream(r io.Reader, name string) (*rawStream, error) {
	head := make([]byte, headSize)
	n, err := io.ReadFull(r, head)
	if err != nil && err != io.EOF && err != io.ErrUnexpectedEOF {
		return nil, err
	}
	if err := refuseImageFormats(name, head[:n], nil); err != nil {
		return nil, err
	}
	return &rawStream{r: io.MultiReader(strings.NewReader(string(head[:n])), r), name: name}, nil
}

func (s *rawStream) Read(p []byte) (int, error) {
	n, err := s.r.Read(p)
	s.foot = append(s.foot, p[max(0, n-footerSize):n]...)
	s.foot = append(s.foot[:0], s.foot[max(0, len(s.foot)-footerSize):]...)
	if err == io.EOF {
		if ferr := refuseImageFormats(s.name, nil, s.foot); ferr != nil {
			err = ferr
		}
	}
	return n, err
}
