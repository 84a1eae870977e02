package owner

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// startedFrom is the path that this program was started by, where an upgrade finds the next version. /proc/self/exe does
// not tell that later on: it follows the file when that is renamed to make place for a new one.
var startedFrom = startPath(os.Args[0])

// startPath makes the path absolute that arg0, the first argument, stands for. If that is not this program, as when the
// starter gave it another name, it is the path of the program's file as it is now.
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

// runs reports whether the file at path is the program of this process.
func runs(path string) bool {
	is, err := os.Stat("/proc/self/exe")
	if err != nil {
		return false
	}
	there, err := os.Stat(path)
	return err == nil && os.SameFile(is, there)
}
