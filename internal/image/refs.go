package image

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
)

// references returns what an image refers to outside of itself, in words. qemu-img would open most of it. The files
// beside a VMDK descriptor that hold its data do not count, as long as they are plain files.
func references(f *os.File, format string) ([]string, error) {
	h := make([]byte, 1<<10)
	n, err := f.ReadAt(h, 0)
	if err != nil && err != io.EOF {
		return nil, err
	}
	clear(h[n:])
	switch format {
	case "qcow2":
		return qcow2References(f, h), nil
	case "qcow":
		if be.Uint64(h[8:]) != 0 {
			return []string{backingFile(f, int64(be.Uint64(h[8:])), be.Uint32(h[16:]))}, nil
		}
	case "qed":
		if le.Uint64(h[16:])&1 != 0 {
			return []string{backingFile(f, int64(le.Uint32(h[56:])), le.Uint32(h[60:]))}, nil
		}
	case "vpc":
		return vpcReferences(f, h)
	case "vmdk":
		return vmdkReferences(f, h)
	}
	return nil, nil
}

func qcow2References(f *os.File, h []byte) (refs []string) {
	if be.Uint64(h[8:]) != 0 {
		refs = append(refs, backingFile(f, int64(be.Uint64(h[8:])), be.Uint32(h[16:])))
	}
	if be.Uint32(h[4:]) >= 3 && be.Uint64(h[72:])&4 != 0 {
		refs = append(refs, "a data file")
	}
	return refs
}

// backingFile describes a backing file whose name is at off.
func backingFile(f *os.File, off int64, n uint32) string {
	name := make([]byte, min(n, 1023))
	if _, err := f.ReadAt(name, off); err != nil || len(name) == 0 {
		return "a backing file"
	}
	return fmt.Sprintf("the backing file %q", name)
}

// vpcReferences looks at the footer of a VHD, which is also at the beginning unless the VHD is of fixed size.
func vpcReferences(f *os.File, h []byte) ([]string, error) {
	if !bytes.HasPrefix(h, []byte("conectix")) {
		fi, err := f.Stat()
		if err != nil {
			return nil, err
		}
		if _, err := f.ReadAt(h[:FootSize], max(0, fi.Size()-FootSize)); err != nil && err != io.EOF {
			return nil, err
		}
	}
	const differencing = 4
	if be.Uint32(h[60:]) == differencing {
		return []string{"a parent disk"}, nil
	}
	return nil, nil
}

// maxDescriptor is how much of a VMDK descriptor is read; VMware's have some KiB.
const maxDescriptor = 1 << 20

func vmdkReferences(f *os.File, h []byte) ([]string, error) {
	if bytes.HasPrefix(h, []byte("COWD")) {
		return nil, errors.New("it holds only the data of a VMDK: name the descriptor file that belongs to it")
	}
	if bytes.HasPrefix(h, []byte("KDMV")) {
		text, err := embedded(f, h)
		if err != nil {
			return nil, err
		}
		refs := parentOf(text)
		if le.Uint64(h[12:]) == 0 { // qemu takes such a descriptor for one that stands alone
			refs = append(refs, "other files, which hold its data")
		}
		return refs, nil
	}
	text, err := io.ReadAll(io.NewSectionReader(f, 0, maxDescriptor))
	if err != nil {
		return nil, err
	}
	refs := parentOf(text)
	extents, err := extentsOf(text)
	if err != nil {
		return nil, err
	}
	for _, e := range extents {
		ref, err := e.check(filepath.Dir(f.Name()))
		if err != nil {
			return nil, err
		}
		if ref != "" {
			refs = append(refs, ref)
		}
	}
	return refs, nil
}

// embedded returns the descriptor within a sparse VMDK file that begins with h.
func embedded(f *os.File, h []byte) ([]byte, error) {
	off, n := le.Uint64(h[28:])*512, le.Uint64(h[36:])*512
	if off == 0 || off > 1<<40 {
		return nil, nil
	}
	text, err := io.ReadAll(io.NewSectionReader(f, int64(off), int64(min(max(n, 20*512), maxDescriptor))))
	if i := bytes.IndexByte(text, 0); i >= 0 {
		text = text[:i]
	}
	return text, err
}

func parentOf(descriptor []byte) []string {
	if bytes.Contains(descriptor, []byte("parentFileNameHint")) {
		return []string{"a parent disk"}
	}
	return nil
}

// extent is a line of a VMDK descriptor, which says where a part of the disk is.
type extent struct {
	sectors, from int64
	kind, name    string
}

// extentText finds all that qemu could take for an extent. qemu uses sscanf(3), which takes line breaks for blanks, and a
// name without its second quotation mark for one. So this looks anywhere in the text.
var extentText = regexp.MustCompile(`(RW|RDONLY|NOACCESS)[\s\v]+([+-]?\d+)[\s\v]*([^\s\v"]+)[\s\v]*"([^\n\r"]*)(?:"[\s\v]+(\d+))?`)

func extentsOf(descriptor []byte) (list []extent, err error) {
	descriptor, _, _ = bytes.Cut(descriptor, []byte{0}) // as qemu does
	for _, m := range extentText.FindAllStringSubmatch(string(descriptor), -1) {
		if m[1] != "RW" {
			return nil, fmt.Errorf("a part of it cannot be read: %s", strings.TrimSpace(m[0]))
		}
		e := extent{kind: m[3], name: m[4]}
		if e.sectors, err = strconv.ParseInt(m[2], 10, 50); err == nil && m[5] != "" {
			e.from, err = strconv.ParseInt(m[5], 10, 50)
		}
		if err != nil {
			return nil, err
		}
		list = append(list, e)
	}
	return list, nil
}

// check looks at the file of an extent, which belongs in the folder dir. It returns a reference in words if that is not
// a plain file there.
func (e extent) check(dir string) (ref string, err error) {
	if strings.ContainsAny(e.name, "/:") {
		return fmt.Sprintf("%q, outside of its folder", e.name), nil
	}
	path := filepath.Join(dir, e.name)
	fi, err := os.Lstat(path)
	if err != nil {
		return "", err
	}
	if !fi.Mode().IsRegular() {
		return fmt.Sprintf("%q, which is no plain file", e.name), nil
	}
	if need := (e.from + e.sectors) * 512; (e.kind == "FLAT" || e.kind == "VMFS") && fi.Size() < need {
		return "", fmt.Errorf("%s has %d bytes, and the descriptor says %d: %w", path, fi.Size(), need, errTruncated)
	}
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	h := make([]byte, 64)
	if _, err := f.ReadAt(h, 0); err == nil && e.kind != "FLAT" && bytes.HasPrefix(h, []byte("KDMV")) && le.Uint64(h[12:]) == 0 {
		return fmt.Sprintf("%q, which refers to other files", e.name), nil
	}
	return "", nil
}
