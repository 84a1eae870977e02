package owner

import (
	"errors"
	"math"
	"path/filepath"
	"strings"
	"testing"

	"github.com/vdisk/vdisk/cow"
)

// A volume that is filled from a stream grows up to the largest possible size. A longer stream is refused as too large.
func TestImportUpToTheLargestVolume(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "store")
	if err := cow.Create(dir); err != nil {
		t.Fatal(err)
	}
	s, err := cow.Open(dir, cow.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	im := &importing{store: s, name: "v"}
	for _, n := range []int64{cow.MaxVolume + 1, math.MaxInt64 - 1, math.MaxInt64} {
		if _, err := im.create(n); !errors.Is(err, cow.ErrInvalid) || !strings.Contains(err.Error(), "64 TiB") {
			t.Errorf("%d bytes: %v", n, err)
		}
	}
	if _, err := im.create(33 << 40); err != nil {
		t.Fatal(err)
	}
	for _, n := range []int64{33<<40 + 1, 40 << 40, cow.MaxVolume} {
		if err := im.grow(n); err != nil || im.size < n || im.size > cow.MaxVolume {
			t.Errorf("%d bytes: size %d, %v", n, im.size, err)
		}
	}
	for _, n := range []int64{cow.MaxVolume + 1, math.MaxInt64} {
		if err := im.grow(n); !errors.Is(err, cow.ErrInvalid) || !strings.Contains(err.Error(), "64 TiB") {
			t.Errorf("%d bytes: %v", n, err)
		}
	}
}
