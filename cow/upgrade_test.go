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

func upgradeFrom(t *testing.T, dir string, version int) {
	path := filepath.Join(dir, formatFile)
	text, err := os.ReadFile(path)
	must(t, err)
	older := bytes.Replace(text, fmt.Appendf(nil, `"version":%d`, format.StoreVersion), fmt.Appendf(nil, `"version":%d`, version), 1)
	must(t, os.WriteFile(path, older, 0o600))
	s, err := Open(dir, Options{})
	must(t, err)
	must(t, s.Close())
	if got, err := os.ReadFile(path); err != nil || !bytes.Equal(got, text) || bytes.Equal(older, text) {
		t.Errorf("the format file is %q, %v", got, err)
	}
}
