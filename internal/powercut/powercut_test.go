package powercut

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"testing"
	"time"
)

const diskMiB = 1024

// number returns a number from the environment.
func number(t *testing.T, name string, otherwise int) int {
	t.Helper()
	text := os.Getenv(name)
	if text == "" {
		return otherwise
	}
	n, err := strconv.Atoi(text)
	if err != nil || n < 0 {
		t.Fatalf("%s=%s: not a number", name, text)
	}
	return n
}

var begun = time.Now()

// timeIsUp reports whether a share of the time of all tests (go test -timeout) has passed. A test then ends with what it
// has proved until then, and says how much that is: a slow machine is no failure.
func timeIsUp(t *testing.T, share float64) bool {
	end, ok := t.Deadline()
	return ok && float64(time.Since(begun)) > share*float64(end.Sub(begun))
}

// machine is a store on a file system on a disk that can lose its power, and the users of the store's volumes.
type machine struct {
	kind, upperKind string // of the file systems
	loop, disk      string
	rawDev          string // where the volume raw is attached
	rng             *rand.Rand
	raw             []*blocks // on the volume raw
	files           *files    // these three are on the file system of the volume fs
	table           *table
	fio             *fio
	snapshots       *snapshots // of the volume raw
}

// TestPowerCuts lets a disk lose its power under load, again and again: VDISK_POWER_CUTS times (or until its time is up),
// half of them with the store on ext4, half on xfs; with -short once, on either. Programs use a raw volume and a file
// system on another one. From a moment on the disk drops all writes, or fails them. Then the server is killed, and
// everything is unmounted. What had been synced before that moment, or at any time while the disk failed, must be there.
//
// In a cut that drops writes, the disk keeps what it was sent before that moment, synced or not. TestLoggedWrites is
// about a disk that keeps only what was flushed.
func TestPowerCuts(t *testing.T) {
	needGuest(t)
	few, kinds := 2, []string{"ext4", "xfs"}
	if testing.Short() {
		i := rand.IntN(2)
		few, kinds = 1, kinds[i:i+1]
	}
	n := number(t, "VDISK_POWER_CUTS", few)
	each := max(1, min(10, n/2))
	var sum tally
	for i := 0; sum.cuts < n && (i == 0 || !timeIsUp(t, 0.85)); i++ {
		cuts := min(each, n-sum.cuts)
		kind := kinds[i%len(kinds)]
		if !t.Run(fmt.Sprintf("%s%d", kind, i/2), func(t *testing.T) { cutPower(t, kind, uint64(i), cuts, &sum) }) {
			t.Fatalf("after %d cuts", sum.cuts)
		}
	}
	t.Logf("proof: power cuts in the guest, dm-flakey: %d", sum.cuts) // fewer than n if the time was up
}

// tally counts: promised are the snapshots that had to be there after a cut.
type tally struct{ cuts, failing, syncs, replaced, commits, rounds, promised int }

func cutPower(t *testing.T, kind string, seed uint64, cuts int, sum *tally) {
	m := newMachine(t, kind, seed)
	for i := 0; i < cuts && (i == 0 || !timeIsUp(t, 0.85)); i++ {
		failing := m.rng.IntN(3) == 0
		m.cut(t, failing, i%4 == 3, sum)
		sum.cuts++
		if failing {
			sum.failing++
		}
		t.Logf("cut %d: %+v", sum.cuts, *sum)
	}
	unmount(t, upper)
	vdisk(t, "detach", "raw")
	vdisk(t, "detach", "fs")
	wait(t, "the daemon to end", func() bool {
		_, err := os.Stat(filepath.Join(storeDir, "control.sock"))
		return err != nil
	})
	vdisk(t, "check", "--read-data")
	unmount(t, lower)
}

func newMachine(t *testing.T, kind string, seed uint64) *machine {
	m := &machine{kind: kind, upperKind: "ext4", rng: rand.New(rand.NewPCG(seed, uint64(time.Now().UnixNano())))}
	if kind == "ext4" {
		m.upperKind = "xfs"
	}
	random := func() *rand.Rand { return rand.New(rand.NewPCG(m.rng.Uint64(), 0)) }
	m.raw = []*blocks{newBlocks(0, 1024, 4, 4, random()), newBlocks(1024, 1024, 8, 8, random()), newBlocks(2048, 2048, 64, 32, random())}
	m.files = newFiles(random())
	m.table = &table{journal: []string{"WAL", "DELETE"}[m.rng.IntN(2)]}
	m.fio = &fio{}
	m.snapshots = &snapshots{volume: "raw", rng: random()}

	m.loop, _ = loopDevice(t, "disk", diskMiB)
	m.disk = dmDevice(t, "powercut", m.power(""))
	mkfs(t, kind, m.disk)
	sh(t, "mount", "-t", kind, m.disk, lower)
	vdisk(t, "create", "raw", "--size", "16M")
	vdisk(t, "create", "fs", "--size", "384M")
	dev := vdisk(t, "attach", "fs")
	mkfs(t, m.upperKind, dev)
	sh(t, "mount", "-t", m.upperKind, dev, upper)
	m.rawDev = vdisk(t, "attach", "raw")
	return m
}

// power returns the table of a disk that works, or does something else with writes.
func (m *machine) power(instead string) string {
	if instead == "" {
		return fmt.Sprintf("0 %d linear %s 0", sectors(diskMiB), m.loop)
	}
	return fmt.Sprintf("0 %d flakey %s 0 0 3600 1 %s", sectors(diskMiB), m.loop, instead)
}

// replug gives the disk another table. While nothing can reach it, it calls between.
func (m *machine) replug(t *testing.T, instead string, between func()) {
	t.Helper()
	sh(t, "dmsetup", "suspend", "--nolockfs", "--noflush", "powercut")
	between()
	sh(t, "dmsetup", "load", "powercut", "--table", m.power(instead))
	sh(t, "dmsetup", "resume", "--noudevsync", "powercut")
}

// promised is what has to be there.
type promised struct {
	raw       [][]uint64
	files     []int
	rows      int
	fio       written
	snapshots []snapshot
}

func (m *machine) promise() (p promised) {
	for _, b := range m.raw {
		p.raw = append(p.raw, b.promise())
	}
	p.files, p.rows, p.fio, p.snapshots = m.files.promise(), m.table.promise(), m.fio.promise(), m.snapshots.promise()
	return p
}

// cut loads the store until the power goes, gives the power back, and checks. An early cut may come before anything was
// synced.
func (m *machine) cut(t *testing.T, failing, early bool, sum *tally) {
	t.Helper()
	users := m.start()
	if !early {
		wait(t, "all users of the volumes to be promised something", func() bool {
			users.mustBeActive(t)
			return m.hasPromises()
		})
	}
	time.Sleep(time.Duration(m.rng.IntN(4000)) * time.Millisecond)
	var p promised
	if failing {
		m.replug(t, "error_writes", func() {})
		users.waitEnded(t) // all of them see errors, and nothing more is promised
		p = m.promise()
	} else {
		// Whatever was synced before the disk was suspended has reached it.
		m.replug(t, "drop_writes", func() { p = m.promise() })
		time.Sleep(time.Duration(m.rng.IntN(300)) * time.Millisecond)
	}
	powerOff(t, func() {
		users.cancel()
		users.waitEnded(t)
	})
	sh(t, "blockdev", "--flushbufs", m.disk)
	m.replug(t, "", func() {})
	reboot(t)
	m.check(t, p)
	sum.add(m, p)
}

// hasPromises reports whether each user has had at least one success since the last cut.
func (m *machine) hasPromises() bool {
	for _, b := range m.raw {
		if b.count() == 0 {
			return false
		}
	}
	return m.files.count() > 0 && m.table.count() > 0 && m.fio.count() > 0 && m.snapshots.count() > 0
}

func (s *tally) add(m *machine, p promised) {
	for _, b := range m.raw {
		s.syncs += b.syncs
		b.syncs = 0
	}
	s.replaced, m.files.syncs = s.replaced+m.files.syncs, 0
	s.commits, m.table.commits = s.commits+m.table.commits, 0
	s.rounds, m.fio.syncs = s.rounds+m.fio.syncs, 0
	s.promised += len(p.snapshots)
	m.snapshots.taken = 0
}

// check opens the store after a power cut, and leaves it in use.
func (m *machine) check(t *testing.T, p promised) {
	t.Helper()
	replayAndCheck(t, m.kind, m.disk, lower)
	vdisk(t, "check", "--read-data")
	m.rawDev = vdisk(t, "attach", "raw")
	dev := vdisk(t, "attach", "fs")
	r, err := openDevice(m.rawDev)
	if err != nil {
		t.Fatal(err)
	}
	for i, b := range m.raw {
		if err := b.check(r, p.raw[i]); err != nil {
			t.Fatalf("volume raw: %v", err)
		}
	}
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	m.snapshots.check(t, p.snapshots)
	replayAndCheck(t, m.upperKind, dev, upper)
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if err := errors.Join(m.files.check(p.files), m.table.check(ctx, p.rows), m.fio.check(ctx, p.fio)); err != nil {
		t.Fatal(err)
	}
}

// users are the users of the volumes. They end when their file systems and devices fail.
type users struct {
	cancel context.CancelFunc
	mu     sync.Mutex       // guards what follows
	active map[string]bool  // by name
	ends   map[string]error // why the others have ended
}

func (m *machine) start() *users {
	ctx, cancel := context.WithCancel(context.Background())
	u := &users{cancel: cancel, active: map[string]bool{}, ends: map[string]error{}}
	for i, b := range m.raw {
		u.run(fmt.Sprint("raw", i), func() error { return b.load(m.rawDev) })
	}
	u.run("files", m.files.load)
	u.run("table", func() error { return m.table.load(ctx) })
	u.run("fio", func() error { return m.fio.load(ctx) })
	u.run("snapshots", func() error { return m.snapshots.load(ctx) })
	return u
}

func (u *users) run(name string, load func() error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.active[name] = true
	go func() {
		err := load()
		u.mu.Lock()
		defer u.mu.Unlock()
		delete(u.active, name)
		u.ends[name] = err
	}()
}

// mustBeActive fails the test if a user has ended.
func (u *users) mustBeActive(t *testing.T) {
	t.Helper()
	u.mu.Lock()
	defer u.mu.Unlock()
	if len(u.ends) > 0 {
		t.Fatalf("users of the volumes have ended while the disk worked: %v", u.ends)
	}
}

// waitEnded waits until all users have ended.
func (u *users) waitEnded(t *testing.T) {
	t.Helper()
	defer func() {
		u.mu.Lock()
		defer u.mu.Unlock()
		if t.Failed() {
			t.Logf("still active: %v; the ends of the others: %v", u.active, u.ends)
		}
	}()
	wait(t, "the users of the volumes to end", func() bool {
		u.mu.Lock()
		defer u.mu.Unlock()
		return len(u.active) == 0
	})
}
