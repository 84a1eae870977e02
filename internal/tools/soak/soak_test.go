package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/vdisk/vdisk/internal/testwatch"
)

func TestMain(m *testing.M) { os.Exit(testwatch.Run(m)) }

func build(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "vdisk")
	if out, err := exec.Command("go", "build", "-o", path, "../../../cmd/vdisk").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return path
}

// TestSoak soaks for some seconds in two pieces. `make soak HOURS=n` soaks for long. In the end a byte of the shadow is
// changed, and the next piece must notice.
func TestSoak(t *testing.T) {
	c := defaults()
	c.vdisk, c.dir = build(t), t.TempDir()
	c.duration, c.life, c.cores, c.maxSize, c.volumeSize = 3*time.Second, time.Second, 2, 96, 12
	if testing.Short() {
		c.duration = time.Second
	}
	c.log = t.Logf
	for piece := 1; piece <= 2; piece++ {
		c.seed = uint64(time.Now().UnixNano())
		total, err := run(context.Background(), c)
		if err != nil {
			text, _ := os.ReadFile(filepath.Join(c.dir, "server.log"))
			t.Fatalf("%v\n%s", err, text[max(0, len(text)-8000):])
		}
		if total.Lives < 2*piece || total.Counts["requests"] == 0 || total.Kills+total.Ends+total.Quits < piece {
			t.Errorf("this proves little: %v", total)
		}
	}
	files, err := filepath.Glob(filepath.Join(c.dir, "shadow", "*"))
	if err != nil || len(files) == 0 {
		t.Fatal(files, err)
	}
	f, err := os.OpenFile(files[0], os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt([]byte("not in the store"), 70000); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	c.duration = 0
	for want := range 2 { // the second time it refuses to begin
		if _, err := run(context.Background(), c); err == nil || !strings.Contains(err.Error(), "difference is at 70000") {
			t.Errorf("%d: after the shadow was changed: %v", want, err)
		}
	}
}

// TestFlat shows what may grow how far.
func TestFlat(t *testing.T) {
	grow := func(by int64) (s []sample) {
		for i := range int64(90) {
			s = append(s, sample{Memory: 100<<20 + i*by, Descriptors: 50, Threads: 12})
		}
		return s
	}
	if err := flat(grow(1<<20), t.Logf); err != nil {
		t.Error(err)
	}
	if err := flat(grow(3<<20), t.Logf); err == nil || !strings.Contains(err.Error(), "memory grew") {
		t.Error("memory grew, and nothing says so:", err)
	}
	if err := flat(grow(30 << 20)[:5], t.Logf); err != nil {
		t.Error("of too few samples:", err)
	}
}

// lines is a disk whose blocks say what they are.
type lines map[int64]string

func (l lines) ReadAt(p []byte, off int64) (int, error) {
	clear(p)
	for b, text := range l {
		if at := b*blockSize - off; at >= 0 && at < int64(len(p)) {
			copy(p[at:], text)
		}
	}
	return len(p), nil
}

// TestDoubt: a block that was being written is old or new, and nothing else. That is so for the snapshots that were
// taken meanwhile, too, and every answered write must be there.
func TestDoubt(t *testing.T) {
	im, err := newImage(filepath.Join(t.TempDir(), "im"), 4*blockSize)
	if err != nil {
		t.Fatal(err)
	}
	write := func(block int64, text string) *change {
		data := make([]byte, blockSize)
		copy(data, text)
		c := &change{off: block * blockSize, n: blockSize, data: data}
		if !im.claim(c.off, c.n) {
			t.Fatalf("block %d is taken", block)
		}
		if err := im.begin(c); err != nil {
			t.Fatal(err)
		}
		return c
	}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(im.done(write(0, "a")))
	v, err := im.capture()
	must(err)
	must(im.done(write(0, "b")))
	must(im.done(write(0, "c")))
	snap, err := im.captured(v, im.path+"-snap")
	must(err)
	write(1, "x") // never answered
	if im.claim(blockSize, 1) || !im.doubtful() || !snap.doubtful() {
		t.Fatal("what is under way can be used")
	}
	for _, c := range []struct {
		im   *image
		disk lines
		ok   bool
	}{
		{snap, lines{0: "d"}, false},
		{snap, lines{}, false},
		{snap, lines{0: "b"}, true},
		{snap, lines{0: "b"}, true},
		{im, lines{0: "c", 1: "y"}, false},
		{im, lines{0: "c", 1: "x"}, true},
		{im, lines{0: "c", 1: "x"}, true},
	} {
		w := &world{}
		w.brake.cores = 100
		err := c.im.settleAll("it", c.disk)
		if err == nil {
			err = w.compareWith("it", c.im, c.disk)
		}
		if (err == nil) != c.ok {
			t.Error(fmt.Sprint(c.disk), err)
		}
	}
	w := &world{}
	w.brake.cores = 100
	if err := w.compareWith("it", im, lines{0: "b", 1: "x"}); err == nil {
		t.Error("an answered write is lost, and nothing says so")
	}
}
