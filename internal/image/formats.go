package image

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"slices"
	"strings"
)

// Format is a format of images that can be imported and exported.
type Format struct {
	Name string // as users write it
	what string // how people call it
	kind kind
}

type kind int

const (
	plain  kind = iota // the raw disk itself
	packed             // a raw disk, compressed as a whole: a stream
	disk               // qemu-img reads and writes it, by its Name
)

// Formats are all formats. The first is raw.
var Formats = []Format{
	{"raw", "a raw image", plain},
	{"gzip", "gzip", packed},
	{"xz", "xz", packed},
	{"zstd", "zstd", packed},
	{"qcow2", "qcow2", disk},
	{"qcow", "qcow (version 1)", disk},
	{"qed", "QED", disk},
	{"vmdk", "VMDK", disk},
	{"vdi", "VDI", disk},
	{"vhdx", "VHDX", disk},
	{"vpc", "VHD", disk},
	{"parallels", "Parallels", disk},
}

// Parse returns the format that a user names.
func Parse(name string) (Format, error) {
	i := slices.IndexFunc(Formats, func(f Format) bool { return f.Name == name })
	if i < 0 {
		return Format{}, fmt.Errorf("the format %q is unknown; known are %s", name, Names())
	}
	return Formats[i], nil
}

// Names lists the names of all formats.
func Names() string {
	var names []string
	for _, f := range Formats {
		names = append(names, f.Name)
	}
	return strings.Join(names, ", ")
}

// IsRaw reports whether an image is the disk itself.
func (f Format) IsRaw() bool { return f.kind == plain }

// IsStream reports whether an image can be read and written from its beginning to its end.
func (f Format) IsStream() bool { return f.kind != disk }

// Foreign is what a content seems to be that is no raw disk.
type Foreign struct {
	What   string // such as VMDK
	Format string // the name of its Format; empty: it has none
	Use    string // the command of ours that reads it; empty: there is none
}

// magic is what identifies a format of images or archives.
type magic struct {
	Foreign
	at    int // offset of text in the head
	text  string
	place place
}

type place int

const (
	head place = iota
	foot       // text is at the start of the last FootSize bytes
)

// magics lists formats that can be told from raw disks. A disk may be encrypted or hold any file system, so the list has
// nothing that is known to be on disks. Of two that match, the first counts.
var magics = []magic{
	{Foreign{"qcow (version 1)", "qcow", ""}, 0, "QFI\xfb\x00\x00\x00\x01", head},
	{Foreign{"qcow2", "qcow2", ""}, 0, "QFI\xfb", head},
	{Foreign{"VMDK", "vmdk", ""}, 0, "KDMV", head},
	{Foreign{"VMDK", "vmdk", ""}, 0, "COWD", head},
	{Foreign{"VDI", "vdi", ""}, 64, "\x7f\x10\xda\xbe", head},
	{Foreign{"VHDX", "vhdx", ""}, 0, "vhdxfile", head},
	{Foreign{"VHD", "vpc", ""}, 0, "conectix", head},
	{Foreign{"VHD", "vpc", ""}, 0, "conectix", foot}, // of fixed size: raw content and a footer
	{Foreign{"DMG", "", ""}, 0, "koly", foot},
	{Foreign{"QED", "qed", ""}, 0, "QED\x00", head},
	{Foreign{"Parallels", "parallels", ""}, 0, "WithoutFreeSpace", head},
	{Foreign{"Parallels", "parallels", ""}, 0, "WithouFreSpacExt", head},
	{Foreign{"Bochs", "", ""}, 0, "Bochs Virtual HD Image", head},
	{Foreign{"cloop", "", ""}, 0, "#!/bin/sh\n#V2.0 Format\nmodprobe cloop", head},
	{Foreign{"EWF", "", ""}, 0, "EVF\x09\x0d\x0a\xff\x00", head},
	{Foreign{"an Android sparse image", "", ""}, 0, "\x3a\xff\x26\xed\x01\x00", head},
	{Foreign{"gzip", "gzip", ""}, 0, "\x1f\x8b\x08", head},
	{Foreign{"bzip2", "", ""}, 4, "1AY&SY", head},
	{Foreign{"xz", "xz", ""}, 0, "\xfd7zXZ\x00", head},
	{Foreign{"zstd", "zstd", ""}, 0, "\x28\xb5\x2f\xfd", head},
	{Foreign{"zstd", "zstd", ""}, 0, "\x50\x2a\x4d\x18\x04\x00\x00\x00", head}, // of pzstd: a frame that says how long the next one is
	{Foreign{"LZ4", "", ""}, 0, "\x04\x22\x4d\x18", head},
	{Foreign{"LZ4", "", ""}, 0, "\x02\x21\x4c\x18", head},
	{Foreign{"lzip", "", ""}, 0, "LZIP\x01", head},
	{Foreign{"lzop", "", ""}, 0, "\x89LZO\x00\r\n\x1a\n", head},
	{Foreign{"7z", "", ""}, 0, "7z\xbc\xaf\x27\x1c", head},
	{Foreign{"zip", "", ""}, 0, "PK\x03\x04", head},
	{Foreign{"RAR", "", ""}, 0, "Rar!\x1a\x07", head},
	{Foreign{"tar (as OVA)", "", ""}, 257, "ustar", head},
	{Foreign{"a stream of 'vdisk send'", "", "receive"}, 0, "VDSF", head},
	{Foreign{"a difference in the format of 'rbd export-diff'", "", "import-diff"}, 0, "rbd diff v", head},
	{Foreign{"an image in a format of 'rbd export'", "", ""}, 0, "rbd image v", head},
}

// HeadSize and FootSize are how much of a content's beginning and end Recognise wants.
const (
	HeadSize = 512
	FootSize = 512
)

// Recognise reports whether a content is of another format than raw, as which it would be useless. first and last are
// the content's first and last bytes, as far as they are known.
func Recognise(first, last []byte) (Foreign, bool) {
	for _, m := range magics {
		in := first
		if m.place == foot {
			in = last
		}
		if len(in) > m.at && bytes.HasPrefix(in[m.at:], []byte(m.text)) {
			return m.Foreign, true
		}
	}
	if isDescriptor(first) {
		return Foreign{"a VMDK descriptor (the data is in the files that it names)", "vmdk", ""}, true
	}
	if isLZMA(first) {
		return Foreign{"lzma", "", ""}, true
	}
	return Foreign{}, false
}

// isDescriptor reports whether a text begins as a descriptor of VMDK does: its version, perhaps behind comments.
func isDescriptor(first []byte) bool {
	if bytes.HasPrefix(first, []byte("# Disk DescriptorFile")) {
		return true
	}
	for line := range bytes.Lines(first) {
		line = bytes.TrimRight(line, "\r\n")
		switch blank := len(bytes.Trim(line, " ")) == 0; {
		case blank, line[0] == '#':
		default:
			return len(line) == len("version=1") && bytes.HasPrefix(line, []byte("version=")) && line[8] >= '1' && line[8] <= '3'
		}
	}
	return false
}

// isLZMA reports whether a content begins as what xz --format=lzma writes: with the usual properties, the size of a
// dictionary, and no length.
func isLZMA(first []byte) bool {
	return len(first) >= 13 && bytes.HasPrefix(first, []byte("\x5d\x00\x00")) && bytes.Equal(first[5:13], bytes.Repeat([]byte{0xff}, 8))
}

// be and le read integers of an image's header.
var (
	be = binary.BigEndian
	le = binary.LittleEndian
)
