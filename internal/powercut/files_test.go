package powercut

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
)

// files is a writer that replaces files on a file system, each by a new one, a sync, a rename, and a sync of the folder.
type files struct {
	rng          *rand.Rand
	mu           sync.Mutex // guards what follows
	sent, synced []int      // by file: versions
	syncs        int        // since the last cut
}

func newFiles(rng *rand.Rand) *files {
	return &files{rng: rng, sent: make([]int, 16), synced: make([]int, 16)}
}

func (f *files) name(i int) string { return filepath.Join(upper, fmt.Sprintf("file%d", i)) }

func fileContent(i, version int) []byte {
	line := fmt.Sprintf("%d %d\n", i, version)
	return bytes.Repeat([]byte(line), 1+version*7919%4000)
}

// load replaces files until the file system fails.
func (f *files) load() error {
	for {
		i := f.rng.IntN(len(f.sent))
		f.mu.Lock()
		f.sent[i]++
		version := f.sent[i]
		f.mu.Unlock()
		if err := replaceFile(f.name(i), fileContent(i, version)); err != nil {
			return err
		}
		f.mu.Lock()
		f.synced[i] = version
		f.syncs++
		f.mu.Unlock()
	}
}

func replaceFile(name string, content []byte) error {
	w, err := os.Create(name + ".new")
	if err != nil {
		return err
	}
	_, err = w.Write(content)
	if err = errors.Join(err, w.Sync(), w.Close()); err != nil {
		return err
	}
	if err := os.Rename(name+".new", name); err != nil {
		return err
	}
	d, err := os.Open(filepath.Dir(name))
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

func (f *files) count() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.syncs
}

func (f *files) promise() []int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.synced)
}

// check compares the files with what may be there. From then on it expects what is there.
func (f *files) check(promise []int) error {
	for i := range promise {
		content, err := os.ReadFile(f.name(i))
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		var n, version int
		if err == nil {
			if _, err := fmt.Sscanf(string(content[:min(len(content), 40)]), "%d %d\n", &n, &version); err != nil {
				return fmt.Errorf("file %d: %q: %w", i, content[:min(len(content), 40)], err)
			}
			if !bytes.Equal(content, fileContent(i, version)) {
				return fmt.Errorf("file %d has another content than its version %d", i, version)
			}
		}
		if version < promise[i] || version > f.sent[i] {
			return fmt.Errorf("file %d has version %d; %d was synced, %d sent", i, version, promise[i], f.sent[i])
		}
		f.synced[i] = version
	}
	return nil
}

// table is a writer that commits transactions to an SQLite database. Each adds a row to two tables.
type table struct {
	journal         string
	mu              sync.Mutex // guards what follows
	sent, committed int        // the last row
	commits         int        // since the last cut
}

func (d *table) file() string { return filepath.Join(upper, "rows.db") }

// synchronous names the setting under which SQLite promises that a commit survives a power cut
// (https://sqlite.org/pragma.html#pragma_synchronous).
func (d *table) synchronous() string {
	if d.journal == "WAL" {
		return "FULL"
	}
	return "EXTRA"
}

func row(n int) string { return strings.Repeat(strconv.Itoa(n)+" ", 1+n*31%200) }

// load commits until the file system fails or the context ends.
func (d *table) load(ctx context.Context) error {
	cmd := exec.CommandContext(ctx, "sqlite3", "-batch", "-bail", d.file())
	in, err := cmd.StdinPipe()
	if err != nil {
		return err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	if err := cmd.Start(); err != nil {
		return err
	}
	err = d.commit(in, bufio.NewScanner(out))
	_ = in.Close()
	return fmt.Errorf("%w: %w: %s", err, cmd.Wait(), stderr.String())
}

var errAnswer = errors.New("sqlite3 has not answered")

func (d *table) commit(in io.Writer, out *bufio.Scanner) error {
	fmt.Fprintf(in, `PRAGMA journal_mode=%s; PRAGMA synchronous=%s;
CREATE TABLE IF NOT EXISTS a(n INTEGER PRIMARY KEY, x TEXT); CREATE TABLE IF NOT EXISTS b(n INTEGER PRIMARY KEY, x TEXT);
SELECT 'ready';
`, d.journal, d.synchronous())
	for out.Scan() && out.Text() != "ready" {
	}
	for {
		d.mu.Lock()
		d.sent++
		n := d.sent
		d.mu.Unlock()
		if _, err := fmt.Fprintf(in, "BEGIN; INSERT INTO a VALUES(%[1]d, '%[2]s'); INSERT INTO b VALUES(%[1]d, '%[2]s'); COMMIT; SELECT 'row %[1]d';\n", n, row(n)); err != nil {
			return err
		}
		if !out.Scan() || out.Text() != fmt.Sprintf("row %d", n) {
			return errAnswer
		}
		d.mu.Lock()
		d.committed = n
		d.commits++
		d.mu.Unlock()
	}
}

func (d *table) count() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.commits
}

func (d *table) promise() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.committed
}

// check reads the database: it must be whole, and have each row up to the promised one. From then on it expects the rows
// that are there.
func (d *table) check(ctx context.Context, promise int) error {
	if _, err := os.Stat(d.file()); errors.Is(err, fs.ErrNotExist) && promise == 0 {
		return nil
	}
	out, err := try(ctx, nil, "sqlite3", "-batch", "-bail", d.file(), "PRAGMA integrity_check; SELECT count(*) FROM sqlite_master WHERE type='table';")
	if whole := strings.HasPrefix(out, "ok\n"); err != nil || !whole {
		return fmt.Errorf("integrity check of the database: %s (%w)", out, err)
	} else if out != "ok\n2\n" && promise == 0 {
		return nil // not both tables are there yet
	}
	out, err = try(ctx, nil, "sqlite3", "-batch", "-bail", d.file(), "SELECT * FROM a ORDER BY n; SELECT * FROM b ORDER BY n;")
	if err != nil {
		return fmt.Errorf("rows of the database: %s (%w)", out, err)
	}
	lines := strings.Split(strings.TrimSuffix(out, "\n"), "\n")
	if out == "" {
		lines = nil
	}
	n := len(lines) / 2
	for i, line := range lines {
		if want := 1 + i%max(n, 1); line != fmt.Sprintf("%d|%s", want, row(want)) {
			return fmt.Errorf("line %d of the database's rows: %.60q", i, line)
		}
	}
	if len(lines)%2 != 0 || n < promise || n > d.sent {
		return fmt.Errorf("the database has %d lines in two tables; %d rows were committed, %d sent", len(lines), promise, d.sent)
	}
	d.sent, d.committed = n, n
	return nil
}
