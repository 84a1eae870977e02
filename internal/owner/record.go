package owner

import (
	"crypto/rand"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io/fs"
	"os"
	"strconv"
	"strings"

	"github.com/vdisk/vdisk/cow"
	"github.com/vdisk/vdisk/internal/storage"
)

// recordName is the file in a store that lists its block devices, while there are any. A device outlives its killed
// server; the file tells the next owner what the device shows. docs/ublk.md, Recovery and upgrade, has the order of the
// writes.
const recordName = "devices"

// record is the content of the file of devices.
type record struct {
	Boot      string         `json:"boot"`           // the kernel's boot id: no device outlives a boot
	Dev       uint64         `json:"dev,omitempty"`  // the file system that the store's folder is on
	Ino       uint64         `json:"ino,omitempty"`  // the folder's inode there
	Successor *process       `json:"heir,omitempty"` // the next owner, during a hand-over
	Devices   []deviceRecord `json:"devices"`
	Sum       uint32         `json:"sum,omitempty"` // CRC of the record without it; 0: older programs write none
}

func (r record) sum() uint32 {
	r.Sum = 0
	text, _ := json.Marshal(r) // cannot fail: there are only texts, numbers and booleans in it
	return crc32.Checksum(text, crc32.MakeTable(crc32.Castagnoli))
}

// deviceRecord is one device. Only its cookie identifies it in the kernel: its id is not known yet when the record is
// written, and may belong to another device later.
type deviceRecord struct {
	Cookie   cookie `json:"cookie"`
	Ref      string `json:"ref"`
	Renaming string `json:"renaming,omitempty"` // the new name of Ref during a rename: one of the two exists
	ReadOnly bool   `json:"readonly,omitempty"`
	// The server's acknowledged data is lost: the device must not be recovered.
	Lost bool `json:"lost,omitempty"`
	// Dev is the file system that the store's folder was on, if it is on another one now. Either it is the same file
	// system, mounted again, or the one that this is a copy of; this process cannot tell which.
	Dev uint64 `json:"dev,omitempty"`
}

// cookie identifies a device in the driver. The high half is the store's mark, the low half is random.
type cookie uint64

func (c cookie) String() string { return fmt.Sprintf("%016x", uint64(c)) }

// MarshalText encodes the cookie as text, so that JSON keeps all 64 bits.
func (c cookie) MarshalText() ([]byte, error) { return []byte(c.String()), nil }

// UnmarshalText decodes what MarshalText returns.
func (c *cookie) UnmarshalText(text []byte) error {
	n, err := strconv.ParseUint(string(text), 16, 64)
	*c = cookie(n)
	return err
}

// mark is the half of a cookie that identifies the store of a device.
type mark uint32

func (c cookie) mark() mark { return mark(c >> 32) }

// markOf returns the mark of the store in a folder. It depends on the folder's inode, so that a copy of a store does
// not take the original's devices for its own.
func markOf(in *storage.Folder, uuid string) (mark, error) {
	st, err := in.Stat()
	if err != nil {
		return 0, err
	}
	sum := crc32.ChecksumIEEE([]byte(fmt.Sprintf("%s %d", uuid, st.Ino)))
	return mark(max(sum, 1)), nil // 0 is the cookie of other programs' devices
}

// newCookie returns a new cookie with the store's mark. It is never 0, which means any cookie to package ublk.
func (m mark) newCookie() cookie {
	var b [4]byte
	_, _ = rand.Read(b[:]) // never fails
	return cookie(m)<<32 | cookie(binary.LittleEndian.Uint32(b[:]))
}

// process is one process of this boot. Its start time tells it from a later process with the same id; executing another
// program does not change the start time.
type process struct {
	PID   int    `json:"pid"`
	Start string `json:"start"` // field 22 of proc_pid_stat(5)
}

func thisProcess() process { return process{os.Getpid(), startOf(os.Getpid())} }

// alive reports whether the process exists.
func (p process) alive() bool { return p.Start != "" && startOf(p.PID) == p.Start }

// startOf returns the start time of a process, or "" if there is none. A process whose first thread is a zombie exists
// while it has other threads: a thread that executes another program becomes the first thread once that has ended.
func startOf(pid int) string {
	for range 2 { // a zombie may have been replaced after the first look
		state, start := readStat(pid)
		if state == "" || state != "Z" && state != "X" {
			return start
		}
		if threads, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", pid)); err == nil && len(threads) > 1 {
			return start
		}
	}
	return ""
}

func readStat(pid int) (state, start string) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return "", ""
	}
	text := string(b)
	fields := strings.Fields(text[strings.LastIndexByte(text, ')')+1:]) // starts at field 3
	if len(fields) < 20 {
		return "", ""
	}
	return fields[0], fields[19]
}

// readRecord reads the file of devices in a store's folder. A file from another boot, or one that came with a copy of
// the folder, counts as empty. A device that may belong to a store that this one is a block-level copy of has Dev set.
func readRecord(in *storage.Folder) (record, error) {
	r, err := parseRecord(in)
	if err != nil {
		return record{}, fmt.Errorf("reading which devices the store has: %w", err)
	}
	return r, nil
}

func parseRecord(in *storage.Folder) (r record, err error) {
	b, err := in.Read(recordName)
	if errors.Is(err, fs.ErrNotExist) {
		return r, nil
	}
	if err != nil {
		return r, err
	}
	if err := json.Unmarshal(b, &r); err != nil {
		return record{}, fmt.Errorf("%s: %w", in.Join(recordName), err)
	}
	// Damage must not look like another boot, nor make a device show another volume.
	if r.Sum != 0 && r.Sum != r.sum() {
		return record{}, fmt.Errorf("%s: %w: its checksum is %08x, and should be %08x", in.Join(recordName), cow.ErrCorrupt, r.Sum, r.sum())
	}
	r.Sum = 0
	st, err := in.Stat()
	if err != nil {
		return record{}, err
	}
	boot, err := storage.BootID()
	if err != nil {
		return record{}, err
	}
	if r.Boot != boot || r.Ino != 0 && r.Ino != st.Ino {
		return record{}, nil
	}
	for i := range r.Devices {
		d := &r.Devices[i]
		if d.Dev == 0 {
			d.Dev = r.Dev
		}
		if d.Dev == st.Dev {
			d.Dev = 0
		}
	}
	return r, nil
}

// write replaces the file of devices atomically. The file need not survive a power cut, because no device does.
func (r record) write(in *storage.Folder) error {
	if len(r.Devices) == 0 && r.Successor == nil {
		if err := in.Remove(recordName); !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		return nil
	}
	st, err := in.Stat()
	if err != nil {
		return err
	}
	if r.Boot, err = storage.BootID(); err != nil {
		return err
	}
	r.Dev, r.Ino = st.Dev, st.Ino
	r.Sum = r.sum()
	b, err := json.Marshal(r)
	if err != nil {
		return err
	}
	return in.Replace(recordName, append(b, '\n'), false)
}
