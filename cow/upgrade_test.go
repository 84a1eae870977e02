package cow

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"
)

// A store of version 1 opens, and is of the present version from then on: an older program would take its first moved record for
// the end of the log.
func TestOlderStoreIsUpgraded(t *testing.T) {
	s, dir := newStore(t, Options{})
	must(t, s.Close())
	path := filepath.Join(dir, formatFile)
	text, err := os.ReadFile(path)
	must(t, err)
	older := bytes.Replace(text, []byte(`"version":2`), []byte(`"version":1`), 1)
	must(t, os.WriteFile(path, older, 0o600))
	s, err = Open(dir, Options{})
	must(t, err)
	must(t, s.Close())
	if got, err := os.ReadFile(path); err != nil || !bytes.Equal(got, text) || bytes.Equal(older, text) {
		t.Errorf("the format file is %q, %v", got, err)
	}
}
