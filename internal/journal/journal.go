// Package journal keeps what was done in a store and what happened to it, for people: 'vdisk events' and 'vdisk history'
// print it. docs/events.md describes the file.
package journal

import (
	"encoding/json"
	"errors"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"slices"
	"sync"
	"time"
	"unicode/utf8"

	"golang.org/x/sys/unix"

	"github.com/vdisk/vdisk/internal/storage"
)

// The names of the two files in the store's folder. The first becomes the second when it is full.
const (
	FileName    = "events"
	OldFileName = "events.old"
)

const (
	// MaxBytes is the size of a file that is full.
	MaxBytes = 1 << 20
	// maxLine is longer than any line that is written: a longer one is damage.
	maxLine = 256 << 10
	// maxNames is how many names an entry has at most.
	maxNames = 1000
	// maxText is the most bytes of the text of an error, and of all details together.
	maxText = 4 << 10
)

// Entry is a line of the journal. Other programs read it: docs/events.md and docs/json.md list the fields.
type Entry struct {
	Time time.Time `json:"time"`
	// Kind is the verb of a command for what one has done, and another word for what happened.
	Kind string `json:"kind"`
	// Names are the volumes and snapshots that it was done to, or that it made: VOL and VOL@SNAP.
	Names []string `json:"names"`
	// LeftOut is the number of names that did not fit.
	LeftOut int `json:"names_left_out,omitempty"`
	// From is where they come from: what was cloned or rolled back to, or the name before.
	From string `json:"from,omitempty"`
	// Phase is empty, or of what takes long Start or End.
	Phase string `json:"phase,omitempty"`
	// By is the process that asked for it; nil: the owner itself did it, or it happened.
	By *Caller `json:"by,omitempty"`
	// Details depend on the kind.
	Details map[string]any `json:"details,omitempty"`
	// Error is why it failed; empty: it did not.
	Error string `json:"error,omitempty"`
}

// The phases of what takes long.
const (
	Start = "start"
	End   = "end"
)

// Caller is a process that asked for something.
type Caller struct {
	UID     uint32 `json:"uid"`
	PID     int    `json:"pid"`
	Command string `json:"command,omitempty"`
}

// Log appends to the journal of a store. Only the store's owner has one. A nil Log keeps nothing.
type Log struct {
	in  *storage.Folder
	log *slog.Logger
	now func() time.Time

	mu sync.Mutex // held while a line is appended
}

// New returns the log of the store in a folder, which stays open for as long as the log is used. Nothing is made before
// the first entry.
func New(in *storage.Folder, log *slog.Logger) *Log { return &Log{in: in, log: log, now: time.Now} }

// Add appends an entry, and gives it the time. It never fails: an entry that cannot be written is logged. What the entry
// says has happened all the same.
func (l *Log) Add(e Entry) {
	if l == nil {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	e.Time = l.now().UTC()
	line, err := encode(e)
	if err == nil {
		err = l.append(line)
	}
	if err != nil {
		l.log.Warn("an event cannot be noted", "file", l.in.Join(FileName), "kind", e.Kind, "names", e.Names, "err", err)
	}
}

// append appends a line to the file. If the file is full, it becomes the old one first. The caller holds mu.
func (l *Log) append(line []byte) error {
	f, size, err := l.open()
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }()
	if size > 0 && size+int64(len(line)) > MaxBytes {
		// If somebody has given the file both names, a rename does nothing, unless the old one goes first.
		if err := l.in.Remove(OldFileName); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		if err := l.in.Rename(FileName, OldFileName); err != nil {
			return err
		}
		_ = f.Close() // nothing was written
		if f, size, err = l.open(); err != nil {
			return err
		}
	}
	if size > 0 {
		// A line that a crash or a full disk cut off must not take the next one with it.
		var last [1]byte
		if _, err := f.ReadAt(last[:], size-1); err != nil {
			return err
		}
		if last[0] != '\n' {
			line = slices.Insert(line, 0, '\n')
		}
	}
	_, err = f.Write(line)
	return err
}

// open opens the present file, which it makes if there is none, and returns its size.
func (l *Log) open() (*os.File, int64, error) {
	f, err := l.in.Open(FileName, unix.O_RDWR|unix.O_APPEND|unix.O_CREAT)
	if err != nil {
		return nil, 0, err
	}
	fi, err := f.Stat()
	if err != nil {
		return nil, 0, errors.Join(err, f.Close())
	}
	return f, fi.Size(), nil
}

// encode returns the line of an entry, of at most maxLine bytes.
func encode(e Entry) ([]byte, error) {
	if e.Names == nil {
		e.Names = []string{}
	}
	if n := len(e.Names); n > maxNames {
		e.Names, e.LeftOut = e.Names[:maxNames], n-maxNames
	}
	e.Error = short(e.Error)
	if text, err := json.Marshal(e.Details); err != nil || len(text) > maxText {
		e.Details = map[string]any{"left_out": slices.Sorted(maps.Keys(e.Details))[:min(len(e.Details), 16)]}
	}
	line, err := json.Marshal(e)
	if err == nil && len(line) >= maxLine {
		err = errors.New("it is too long")
	}
	return append(line, '\n'), err
}

// short returns the beginning of a text.
func short(text string) string {
	if len(text) <= maxText {
		return text
	}
	n := maxText
	for n > 0 && !utf8.RuneStart(text[n]) {
		n--
	}
	return text[:n] + "…"
}

// Here returns this process as the caller.
func Here(command string) *Caller {
	return &Caller{UID: uint32(os.Getuid()), PID: os.Getpid(), Command: command}
}
