package powercut

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"
)

const loggedMiB = 512

// TestLoggedWrites records every write to the disk below a store, while a volume is written, synced and snapshotted.
// After each sync and each snapshot it puts a mark into the record. Then it makes the disk as of every mark and every
// flush or write with FUA anew, which is what a disk has that loses its cache, and opens the store there: what was synced
// before must be there, and the snapshots must be exactly what they were.
//
// VDISK_POWER_SYNCS is the number of syncs, on ext4 and on xfs each. VDISK_POWER_STATES is the number of such disks that
// are looked at in each, 0 for all; those that are left out are random. If its time is up, it leaves out the last ones.
func TestLoggedWrites(t *testing.T) {
	needGuest(t)
	syncs, states := number(t, "VDISK_POWER_SYNCS", 8), number(t, "VDISK_POWER_STATES", 2)
	kinds := []string{"ext4", "xfs"}
	if testing.Short() {
		i := rand.IntN(2)
		kinds = kinds[i : i+1]
	}
	all, images := 0, 0
	for k, kind := range kinds {
		t.Run(kind, func(t *testing.T) {
			a, i := record(t, kind, syncs).replay(t, states, 0.25*float64(k+1))
			all, images = all+a, images+i
		})
	}
	if t.Failed() {
		return
	}
	t.Logf("%d flushes, writes with FUA and marks, %d different disks", all, images)
	t.Logf("proof: power cuts in the guest, dm-log-writes: %d", all)
}

// moment is what must be there from a mark on.
type moment struct {
	synced    []uint64
	sent      []uint64 // when the mark was put
	snapshots map[string][]uint64
}

// recording is a load on a volume, and all that reached the disk meanwhile.
type recording struct {
	kind, log string
	raw       *blocks
	moments   []moment // the mark of moment i is "i"
}

func record(t *testing.T, kind string, syncs int) *recording {
	disk, _ := loopDevice(t, "logged", loggedMiB)
	logDev, log := loopDevice(t, "log", 4*loggedMiB)
	dev := dmDevice(t, "logged", fmt.Sprintf("0 %d log-writes %s %s", sectors(loggedMiB), disk, logDev))
	mkfs(t, kind, dev)
	sh(t, "mount", "-t", kind, dev, lower)
	r := &recording{kind: kind, log: log, raw: newBlocks(0, 2048, 8, 4, rand.New(rand.NewPCG(uint64(syncs), 0)))}
	vdisk(t, "create", "raw", "--size", "8M")
	held := map[string][]uint64{}
	mark := func() {
		m := moment{r.raw.promise(), slices.Clone(r.raw.sent), map[string][]uint64{}}
		for name, content := range held {
			m.snapshots[name] = content
		}
		sh(t, "dmsetup", "message", "logged", "0", "mark", fmt.Sprint(len(r.moments)))
		r.moments = append(r.moments, m)
	}
	mark()
	path := vdisk(t, "attach", "raw")
	f, err := openDevice(path)
	if err != nil {
		t.Fatal(err)
	}
	for i := range syncs {
		r.write(t, f, i)
		mark()
		switch name := fmt.Sprintf("raw@%d", i); {
		case i%8 == 3:
			vdisk(t, "snapshot", name) // nothing is written beside it
			held[name] = slices.Clone(r.raw.sent)
			copy(r.raw.synced, r.raw.sent) // a snapshot is durable with what it holds
			mark()
		case i%24 == 20:
			name = fmt.Sprintf("raw@%d", i-17)
			vdisk(t, "rm", name)
			delete(held, name)
			mark()
		case i%16 == 9:
			vdisk(t, "ls", "-l") // commits the table
		}
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	vdisk(t, "detach", "raw")
	powerOff(t, func() {})
	sh(t, "dmsetup", "remove", "--noudevsync", "logged")
	return r
}

// write writes some runs of blocks, and in each fourth round much, so that chunks become full. Then it syncs, but before
// a snapshot now and then it does not.
func (r *recording) write(t *testing.T, f *os.File, round int) {
	t.Helper()
	n := 1 + r.raw.rng.IntN(8)
	if round%4 == 1 {
		n = 200
	}
	for range n {
		if err := r.raw.write(f); err != nil {
			t.Fatal(err)
		}
	}
	if round%16 == 11 {
		return // the snapshot that follows makes it durable
	}
	if err := r.raw.sync(f); err != nil {
		t.Fatal(err)
	}
}

// bounds returns what must be there at least and may be there at most, while the last mark is that of moment i.
func (r *recording) bounds(i int) (least, most moment) {
	return r.moments[i], r.moments[min(i+1, len(r.moments)-1)]
}

// replay looks at the disk as of each flush and mark, until a share of the time of all tests has passed. It returns how
// many flushes and marks there were, and how many different disks.
func (r *recording) replay(t *testing.T, states int, share float64) (all, looked int) {
	log, err := os.Open(r.log)
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	entries, err := readLog(log)
	if err != nil {
		t.Fatal(err)
	}
	image, err := os.Create(filepath.Join(images, "replayed"))
	if err != nil {
		t.Fatal(err)
	}
	defer os.Remove(image.Name())
	defer image.Close()
	if err := image.Truncate(loggedMiB << 20); err != nil {
		t.Fatal(err)
	}
	points := pointsOf(entries)
	every := len(points)
	if states > 0 {
		rand.Shuffle(len(points), func(i, j int) { points[i], points[j] = points[j], points[i] })
		points = points[:min(states, len(points))]
		slices.SortFunc(points, func(a, b point) int { return a.end - b.end })
	}
	at := 0
	for _, p := range points {
		if looked > 0 && timeIsUp(t, share) {
			break
		}
		for ; at < p.end; at++ {
			if err := entries[at].apply(image, log); err != nil {
				t.Fatal(err)
			}
		}
		r.look(t, image, p)
		all += p.count
		looked++
	}
	t.Logf("%d entries, %d marks, %d of %d different disks looked at", len(entries), len(r.moments), looked, every)
	return all, looked
}

// point is a place in the log that a power cut may leave. Flushes and marks with nothing written between them are one.
type point struct {
	end         int // the entries before it are on the disk
	first, last int // the marks of the moments that it begins and ends with
	count       int
}

func pointsOf(entries []logEntry) (points []point) {
	moment, same := -1, false
	for i, e := range entries {
		if e.changes() {
			same = false
		}
		if e.flags&flagMark != 0 {
			if _, err := fmt.Sscan(e.mark, &moment); err != nil {
				break // dm-log-writes puts a mark at its end
			}
		}
		switch {
		case moment < 0 || e.flags&(flagMark|flagFlush|flagFUA) == 0:
		case same && len(points) > 0:
			p := &points[len(points)-1]
			p.last = moment
			p.count++
		default:
			points = append(points, point{i + 1, moment, moment, 1})
			same = true
		}
	}
	return points
}

// look opens the store on a copy of the image.
func (r *recording) look(t *testing.T, image *os.File, p point) {
	t.Helper()
	reboot(t)
	copied := filepath.Join(images, "copy")
	sh(t, "cp", "--sparse=always", image.Name(), copied)
	dev := sh(t, "losetup", "-f", "--show", copied)
	defer os.Remove(copied)
	defer func() { _ = exec.Command("losetup", "-d", dev).Run() }()
	replayAndCheck(t, r.kind, dev, lower)
	vdisk(t, "check", "--read-data")
	least, _ := r.bounds(p.last)
	_, most := r.bounds(p.first)
	found, err := versionsOf("raw", len(r.raw.sent))
	if err == nil {
		err = within(found, least.synced, most.sent, 0)
	}
	if err != nil {
		t.Fatalf("after %d entries, between the marks %d and %d: %v", p.end, p.first, p.last+1, err)
	}
	for name, content := range least.snapshots {
		if _, still := most.snapshots[name]; !still {
			continue // it was being removed
		}
		found, err := versionsOf(name, len(r.raw.sent))
		if err == nil {
			err = within(found, content, content, 0)
		}
		if err != nil {
			t.Fatalf("after %d entries, between the marks %d and %d: %s: %v", p.end, p.first, p.last+1, name, err)
		}
	}
	unmount(t, lower)
}

// versionsOf exports a volume or snapshot, and returns the version of each block.
func versionsOf(name string, n int) ([]uint64, error) {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	r, w := io.Pipe()
	failed := make(chan error, 1)
	go func() {
		out, err := try(ctx, w, "vdisk", "export", name, "-")
		if err != nil {
			err = fmt.Errorf("%w: %s", err, out)
		}
		failed <- err
		_ = w.Close()
	}()
	versions := make([]uint64, n)
	p := make([]byte, blockSize)
	for i := range versions {
		_, err := io.ReadFull(r, p)
		if err == nil {
			versions[i], err = versionOf(p, int64(i))
		}
		if err != nil {
			_ = r.CloseWithError(err)
			return nil, errors.Join(err, <-failed)
		}
	}
	_, err := io.Copy(io.Discard, r)
	return versions, errors.Join(err, <-failed)
}
