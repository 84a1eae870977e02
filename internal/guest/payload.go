package guest

import (
	"archive/tar"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
)

const payloadDir = "payload"

// writePayload writes the archive that the guest unpacks: the files of the host, and the script.
func writePayload(file string, files map[string]string, script string) error {
	f, err := os.Create(file)
	if err != nil {
		return err
	}
	defer f.Close()
	p := &payload{tar: tar.NewWriter(f)}
	for _, to := range slices.Sorted(maps.Keys(files)) {
		name := strings.TrimPrefix(path.Clean("/"+to), "/")
		if !path.IsAbs(to) {
			name = path.Join(payloadDir, name)
		}
		if err := p.add(name, files[to]); err != nil {
			return fmt.Errorf("payload %s: %w", to, err)
		}
	}
	if err := p.data(payloadDir+"/.script", []byte(script)); err != nil {
		return err
	}
	return errors.Join(p.tar.Close(), f.Close())
}

type payload struct{ tar *tar.Writer }

func (p *payload) data(name string, data []byte) error {
	if err := p.tar.WriteHeader(&tar.Header{Name: name, Typeflag: tar.TypeReg, Mode: 0o755, Size: int64(len(data))}); err != nil {
		return err
	}
	_, err := p.tar.Write(data)
	return err
}

// add puts a file, or a folder with everything in it, at name. It follows a link that the caller names; links inside a
// folder stay links.
func (p *payload) add(name, from string) error {
	from, err := filepath.EvalSymlinks(from)
	if err != nil {
		return err
	}
	return filepath.WalkDir(from, func(file string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(from, file)
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		return p.entry(path.Join(name, filepath.ToSlash(rel)), file, info)
	})
}

func (p *payload) entry(name, file string, info fs.FileInfo) error {
	link := ""
	if info.Mode()&fs.ModeSymlink != 0 {
		var err error
		if link, err = os.Readlink(file); err != nil {
			return err
		}
	}
	h, err := tar.FileInfoHeader(info, link)
	if err != nil {
		return err
	}
	h.Name, h.Uid, h.Gid, h.Uname, h.Gname = name, 0, 0, "", ""
	if err := p.tar.WriteHeader(h); err != nil || !info.Mode().IsRegular() {
		return err
	}
	f, err := os.Open(file)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = io.Copy(p.tar, f)
	return err
}
