package cow

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/vdisk/vdisk/format"
)

// A store of an older version opens, and is of the present version from then on: an older program would take its first
// moved record for the end of the log, and a unit without the zeros at its end for damage.
func TestOlderStoreIsUpgraded(t *testing.T) {
	s, dir := newStore(t, Options{})
	must(t, s.Close())
	for version := 1; version < format.StoreVersion; version++ {
		upgradeFrom(t, dir, version)
	}
}

// makeOlder makes a store one of an older version. It returns the file that says so, as it was and as it is.
func makeOlder(t *testing.T, dir string, version int) (was, is []byte) {
	t.Helper()
	path := filepath.Join(dir, formatFile)
	was, err := os.ReadFile(path)
	must(t, err)
	is = bytes.Replace(was, fmt.Appendf(nil, `"version":%d`, format.StoreVersion), fmt.Appendf(nil, `"version":%d`, version), 1)
	must(t, os.WriteFile(path, is, 0o600))
	return was, is
}

func upgradeFrom(t *testing.T, dir string, version int) {
	path := filepath.Join(dir, formatFile)
	text, older := makeOlder(t, dir, version)
	s, err := Open(dir, Options{})
	must(t, err)
	must(t, s.Close())
	if got, err := os.ReadFile(path); err != nil || !bytes.Equal(got, text) || bytes.Equal(older, text) {
		t.Errorf("the format file is %q, %v", got, err)
	}
}
