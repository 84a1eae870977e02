package guest

import (
	"bytes"
	_ "embed"
	"fmt"
	"os"
	"path/filepath"
)

//go:embed scripts/init.sh
var initScript []byte

//go:embed scripts/guest.sh
var guestScript []byte

// writeInitrd writes the initrd of kernel k to a file.
func (img *Image) writeInitrd(k Kernel, file string) error {
	busybox, err := os.ReadFile(filepath.Join(img.root, "busybox"))
	if err != nil {
		return fmt.Errorf("guest: initrd: %w", err)
	}
	var a cpio
	for _, d := range []string{"bin", "boot", "dev", "proc", "sys", "newroot"} {
		a.add(d, modeDir|0o755, nil)
	}
	a.add("bin/busybox", modeFile|0o755, busybox)
	a.add("init", modeFile|0o755, initScript)
	a.add("guest.sh", modeFile|0o644, guestScript)
	modules, err := filepath.Glob(filepath.Join(k.dir, "boot", "*.ko"))
	if err != nil {
		return fmt.Errorf("guest: initrd: %w", err)
	}
	for _, m := range modules {
		data, err := os.ReadFile(m)
		if err != nil {
			return fmt.Errorf("guest: initrd: %w", err)
		}
		a.add("boot/"+filepath.Base(m), modeFile|0o644, data)
	}
	return os.WriteFile(file, a.finish(), 0o644)
}

// File types, as in st_mode.
const (
	modeDir  = 0o040000
	modeFile = 0o100000
)

// cpio builds an archive in the "newc" format (Linux, Documentation/driver-api/early-userspace/buffer-format.rst).
type cpio struct {
	buf   bytes.Buffer
	inode int
}

func (a *cpio) add(name string, mode int, data []byte) {
	a.inode++
	// magic, ino, mode, uid, gid, nlink, mtime, filesize, 4 device numbers, namesize, check
	fmt.Fprintf(&a.buf, "070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x",
		a.inode, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name)+1, 0)
	a.buf.WriteString(name)
	a.buf.WriteByte(0)
	a.pad()
	a.buf.Write(data)
	a.pad()
}

func (a *cpio) pad() {
	for a.buf.Len()%4 != 0 {
		a.buf.WriteByte(0)
	}
}

func (a *cpio) finish() []byte {
	a.add("TRAILER!!!", 0, nil)
	return a.buf.Bytes()
}
