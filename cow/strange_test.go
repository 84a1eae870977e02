package cow

import (
	"bytes"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// However many files there are among the chunks that are not ours, one line warns of them, with their number.
func TestStrangeFilesAreOneWarning(t *testing.T) {
	dir := t.TempDir()
	if err := Create(dir); err != nil {
		t.Fatal(err)
	}
	for i := range 5 {
		if err := os.WriteFile(filepath.Join(dir, chunksDir, fmt.Sprintf("stray%d", i)), []byte("x"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	var log bytes.Buffer
	s, err := Open(dir, Options{checkpointInterval: -1, Logger: slog.New(slog.NewTextHandler(&log, nil))})
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if n := strings.Count(log.String(), "not ours"); n != 1 || !strings.Contains(log.String(), "files=5 first=\"[stray0 stray1 stray2]\"") {
		t.Errorf("%d warnings:\n%s", n, log.String())
	}
	for i := range 5 {
		if _, err := os.Stat(filepath.Join(dir, chunksDir, fmt.Sprintf("stray%d", i))); err != nil {
			t.Error(err)
		}
	}
}
