package metadata

import (
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
)

// TestMendChanges: a list of changes with one too many and one missing becomes what it was, in a table beside the old one.
func TestMendChanges(t *testing.T) {
	dir := memoryDir(t)
	path := filepath.Join(dir, "t")
	db, err := Open(path, Options{NoSync: true, Create: true})
	must(t, err)
	must(t, db.Update(func(tx *Tx) error { return scripted(tx, 7, rand.New(rand.NewPCG(1, 1))) }))
	want, err := content(db)
	must(t, err)
	must(t, db.Update(func(tx *Tx) error {
		k, _ := tx.tx.Bucket(bucketChanges).Cursor().First()
		none := Version{Branch: 77, Leaf: 7, Epoch: 1}.changeKey()
		return errors.Join(tx.drop(bucketChanges, append([]byte{}, k...)), tx.set(bucketChanges, none[:], []byte{}))
	}))
	must(t, db.Close())
	was, err := os.ReadFile(path)
	must(t, err)
	_, err = Mended(folderOf(t, dir), "t", "new", (*Tx).MendChanges)
	must(t, err)
	if got, err := contentOf(filepath.Join(dir, "new")); err != nil || got != want {
		t.Errorf("the list is another: %v", err)
	}
	if now, err := os.ReadFile(path); err != nil || string(now) != string(was) {
		t.Errorf("the old table has changed: %v", err)
	}
}
