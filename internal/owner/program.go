package owner

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// startedFrom is the path by which this program was started. An upgrade looks for the next version there.
// /proc/self/exe cannot tell the path later: it follows the file if that is renamed to make way for a new one.
var startedFrom = startPath(os.Args[0])

// startPath returns the absolute path that arg0, the first argument, stands for. If that is not this program, as when
// the starter chose another name, startPath returns the present path of the program's file.
func startPath(arg0 string) string {
	path := arg0
	if !strings.Contains(path, "/") {
		path, _ = exec.LookPath(path)
	}
	if path, err := filepath.Abs(path); err == nil && runs(path) {
		return path
	}
	exe, _ := os.Readlink("/proc/self/exe")
	return strings.TrimSuffix(exe, " (deleted)")
}

// runs reports whether this process runs the program in the file at path.
func runs(path string) bool {
	is, err := os.Stat("/proc/self/exe")
	if err != nil {
		return false
	}
	there, err := os.Stat(path)
	return err == nil && os.SameFile(is, there)
}
