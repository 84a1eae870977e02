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

	"github.com/vdisk/vdisk/internal/storage"
)

// recordName is the file in a store that lists its block devices while there are any. A device outlives a process that
// is killed; the file tells the next owner what the device shows. docs/ublk.md, Recovery and upgrade, has the order of writes.
const recordName = "devices"

// record is the content of the file.
type record struct {
	Boot    string         `json:"boot"`           // the kernel's boot id: no device outlives a boot
	Dev     uint64         `json:"dev,omitempty"`  // which file system the store's folder is on, and
	Ino     uint64         `json:"ino,omitempty"`  // where there
	Heir    *process       `json:"heir,omitempty"` // who the store is meant for next, while it is handed over
	Devices []deviceRecord `json:"devices"`
}

// deviceRecord is one device. It is found in the kernel by its cookie alone: the id is not known yet when it is
// recorded, and may later be another device's.
type deviceRecord struct {
	Cookie   cookie `json:"cookie"`
	Ref      string `json:"ref"`
	Renaming string `json:"renaming,omitempty"` // what Ref is being renamed to: one of the two is there
	ReadOnly bool   `json:"readonly,omitempty"`
	Lost     bool   `json:"lost,omitempty"` // what its server had answered is gone: it must not be recovered
	// Dev is where the store's folder was, if that is another file system than now: the same one, mounted anew, or one
	// that this is a copy of. Which of the two cannot be told from here.
	Dev uint64 `json:"dev,omitempty"`
}

// cookie is a device's mark in the driver. The high half says which store it is of, the low half is random.
type cookie uint64

func (c cookie) String() string { return fmt.Sprintf("%016x", uint64(c)) }

// MarshalText makes JSON keep all 64 bits.
func (c cookie) MarshalText() ([]byte, error) { return []byte(c.String()), nil }

// UnmarshalText is its reverse.
func (c *cookie) UnmarshalText(text []byte) error {
	n, err := strconv.ParseUint(string(text), 16, 64)
	*c = cookie(n)
	return err
}

// mark is the half of a cookie that says which store a device is of.
type mark uint32

func (c cookie) mark() mark { return mark(c >> 32) }

// markOf is the mark of the store in a folder. The folder's inode is part of it, so that a copy of a store does not take the
// devices of the original for its own.
func markOf(in *storage.Folder, uuid string) (mark, error) {
	st, err := in.Stat()
	if err != nil {
		return 0, err
	}
	sum := crc32.ChecksumIEEE([]byte(fmt.Sprintf("%s %d", uuid, st.Ino)))
	return mark(max(sum, 1)), nil // 0 is what other programs leave in their devices
}

// newCookie is never 0, which the driver's library takes for any.
func (m mark) newCookie() cookie {
	var b [4]byte
	_, _ = rand.Read(b[:]) // never fails
	return cookie(m)<<32 | cookie(binary.LittleEndian.Uint32(b[:]))
}

// process is one process of this boot, told from a later one with the same id by its start, which executing another
// program does not change.
type process struct {
	PID   int    `json:"pid"`
	Start string `json:"start"` // field 22 of proc_pid_stat(5)
}

func thisProcess() process { return process{os.Getpid(), startOf(os.Getpid())} }

// alive reports whether the process is there.
func (p process) alive() bool { return p.Start != "" && startOf(p.PID) == p.Start }

// startOf is empty when there is no such process. One whose first thread is a zombie is there as long as it has others:
// the thread that executes another program becomes the first one, when that has ended.
func startOf(pid int) string {
	for range 2 { // what was a zombie may have been replaced after the first look
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
	fields := strings.Fields(text[strings.LastIndexByte(text, ')')+1:]) // from field 3 on
	if len(fields) < 20 {
		return "", ""
	}
	return fields[0], fields[19]
}

// readRecord reads the file of the store in a folder. What is of another boot, or came with a copy of the folder, is
// nothing. Devices that may be those of a store that this is a block-level copy of have Dev.
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

// write replaces the file in one step. It need not survive the power: no device does.
func (r record) write(in *storage.Folder) error {
	if len(r.Devices) == 0 && r.Heir == nil {
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
	b, err := json.Marshal(r)
	if err != nil {
		return err
	}
	return in.Replace(recordName, append(b, '\n'), false)
}
