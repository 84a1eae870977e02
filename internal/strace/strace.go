// Package strace runs a program under strace(1) for a test, and returns what it did to the files of one folder, in
// order.
package strace

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
)

// Event is the beginning or the end of a system call that changes a file, or makes it durable.
type Event struct {
	Call  string // "make", "write", "sync", "truncate", "allocate", "rename", "remove"
	File  string // relative to the folder; "": the folder itself. Of a rename, the old name
	Off   int64  // of a write
	Ended bool
	Line  string // strace's line
}

var (
	begun   = regexp.MustCompile(`^(\d+) +(\w+)\((.*)$`)
	resumed = regexp.MustCompile(`^(\d+) +<\.\.\. (\w+) resumed>`)
	result  = regexp.MustCompile(`= (-?\d+)[^=]*$`)
	inDir   = regexp.MustCompile(`(?:\d+|AT_FDCWD)<([^>]*)>, "([^"]*)"`)
	ofFile  = regexp.MustCompile(`^\d+<([^>]*)>`)
	atEnd   = regexp.MustCompile(`, (\d+)( <unfinished|\) )`)
)

// Run runs a program, and returns the events in a folder. A call has two events, its beginning and its end, which
// other events may come between. A call that failed has none. What the program says is in the error if it fails.
func Run(cmd *exec.Cmd, folder string) (events []Event, err error) {
	dir, err := os.MkdirTemp("", "strace")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	out := filepath.Join(dir, "trace")
	under := exec.Command("strace", append([]string{
		"-f", "-y", "-qq", "-s", "0", "-o", out,
		"-e", "trace=openat,write,pwrite64,fdatasync,fsync,ftruncate,fallocate,renameat,renameat2,unlinkat",
	}, cmd.Args...)...)
	under.Env, under.Dir, under.Stdin = cmd.Env, cmd.Dir, cmd.Stdin
	if text, err := under.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("%v under strace: %w: %s", cmd.Args, err, text)
	}
	text, err := os.ReadFile(out)
	if err != nil {
		return nil, err
	}
	if events = parseAll(string(text), folder); len(events) == 0 {
		return nil, fmt.Errorf("strace saw nothing in %s: %s", folder, text)
	}
	return events, nil
}

func parseAll(text, folder string) (events []Event) {
	unfinished := map[string]Event{} // by thread
	for line := range strings.Lines(text) {
		line = strings.TrimSpace(line)
		if m := resumed.FindStringSubmatch(line); m != nil {
			if e, ok := unfinished[m[1]]; ok && !failed(line) {
				e.Ended = true
				events = append(events, e)
			}
			delete(unfinished, m[1])
			continue
		}
		m := begun.FindStringSubmatch(line)
		if m == nil {
			continue
		}
		e, ok := parse(m[2], m[3], folder)
		if !ok || failed(line) {
			continue
		}
		e.Line = line
		events = append(events, e)
		if strings.HasSuffix(line, "<unfinished ...>") {
			unfinished[m[1]] = e
			continue
		}
		e.Ended = true
		events = append(events, e)
	}
	return events
}

// failed reports whether a line has the result of a call that failed.
func failed(line string) bool {
	m := result.FindStringSubmatch(line)
	return m != nil && strings.HasPrefix(m[1], "-")
}

// parse returns the event of a call; ok is false if it changes nothing in the folder.
func parse(call, args, folder string) (e Event, ok bool) {
	relative := func(path string) (string, bool) {
		if path == folder {
			return "", true
		}
		return strings.CutPrefix(path, folder+"/")
	}
	var paths []string
	for _, m := range inDir.FindAllStringSubmatch(args, -1) {
		path := m[2]
		if !filepath.IsAbs(path) {
			path = filepath.Join(m[1], path)
		}
		p, ours := relative(path)
		if !ours {
			return e, false
		}
		paths = append(paths, p)
	}
	file, ours := "", false
	if m := ofFile.FindStringSubmatch(args); m != nil {
		file, ours = relative(m[1])
	}
	switch call {
	case "openat":
		return named("make", paths, 1, strings.Contains(args, "O_CREAT|O_EXCL"))
	case "renameat", "renameat2":
		return named("rename", paths, 2, true)
	case "unlinkat":
		return named("remove", paths, 1, true)
	case "fdatasync", "fsync":
		return Event{Call: "sync", File: file}, ours
	case "ftruncate":
		return Event{Call: "truncate", File: file}, ours
	case "fallocate":
		return Event{Call: "allocate", File: file}, ours
	case "pwrite64":
		m := atEnd.FindStringSubmatch(args)
		if m == nil {
			return e, false
		}
		off, err := strconv.ParseInt(m[1], 10, 64)
		return Event{Call: "write", File: file, Off: off}, ours && err == nil
	case "write":
		return Event{Call: "write", File: file}, ours
	}
	return e, false
}

// named returns the event of a call that has n names in the folder.
func named(call string, paths []string, n int, does bool) (e Event, ok bool) {
	if len(paths) != n || !does {
		return e, false
	}
	return Event{Call: call, File: paths[0]}, true
}
