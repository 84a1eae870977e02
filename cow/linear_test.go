package cow

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/vdisk/vdisk/internal/nbdclient"
	"github.com/vdisk/vdisk/internal/registers"
	"github.com/vdisk/vdisk/internal/testwatch"
	"github.com/vdisk/vdisk/nbd"
)

// linearHistories returns how many histories a test makes: short in make test, or VDISK_LINEAR.
func linearHistories(t *testing.T, short int) int {
	t.Helper()
	if n, err := strconv.Atoi(os.Getenv("VDISK_LINEAR")); err == nil {
		return n
	}
	if raceEnabled {
		return 8
	}
	return short
}

// TestLinearizable lets clients write, read, flush and snapshot registers of a busy store, and cuts its power again and
// again. Then it asks whether some order of all operations explains what each client has seen, what each snapshot holds,
// and what each power cut has left. VDISK_LINEAR is the number of such histories, of 160 operations each.
func TestLinearizable(t *testing.T) {
	t.Parallel()
	l := newLinearStore(t)
	l.run(linearHistories(t, 96), func() (disks []map[string]registers.Disk) {
		for range 4 {
			disks = append(disks, map[string]registers.Disk{"a": engineDisk{l.devs["a"]}, "b": engineDisk{l.devs["b"]}})
		}
		return disks
	})
	t.Logf("proof: linearizable histories, engine: %d", l.histories)
}

// TestLinearizableNBD is TestLinearizable through a server of package nbd. Each volume has two connections, with three
// requests in flight on each.
func TestLinearizableNBD(t *testing.T) {
	t.Parallel()
	l := newLinearStore(t)
	l.run(linearHistories(t, 40), func() (disks []map[string]registers.Disk) {
		socket := l.serve()
		for range 2 {
			conns := map[string]registers.Disk{"a": l.dial(socket, "a"), "b": l.dial(socket, "b")}
			disks = append(disks, conns, conns, conns)
		}
		return disks
	})
	t.Logf("proof: linearizable histories, NBD: %d", l.histories)
}

// linearStore is a busy store whose registers are known.
type linearStore struct {
	*busyStore
	values    registers.Values
	histories int
	names     atomic.Int64
	endServer func()

	keepMu sync.Mutex
	keep   bool // snapshots stay, and are kept
	kept   []keptSnapshot
}

// keptSnapshot is a snapshot of both volumes.
type keptSnapshot struct {
	name   string
	taken  int64 // no later than this
	values registers.Values
}

func newLinearStore(t *testing.T) *linearStore {
	return &linearStore{busyStore: newBusyStore(t), endServer: func() {}}
}

// run makes n histories. Every fourth ends with a power cut, after which the store goes on with what is left. After 64
// there is a new store.
func (l *linearStore) run(n int, connect func() []map[string]registers.Disk) {
	for l.histories < n {
		if l.histories%64 == 0 && l.histories > 0 {
			l.close()
			l.harness.giveBack(l.dir)
			l.create()
			l.values = registers.Values{}
		}
		l.noise()
		disks := connect()
		for range 3 {
			h := registers.New(l.values)
			l.clients(h, disks, 40).Wait()
			l.values = l.all(h.All, h.Now())
			l.check(h)
		}
		l.powerCut(disks)
	}
	mustCheck(l.t, l.s)
	l.close()
}

func (l *linearStore) check(h *registers.History) {
	l.t.Helper()
	if err := h.Check(); err != nil {
		l.t.Fatalf("history %d: %v", l.histories, err)
	}
	if l.histories++; l.t.Failed() {
		l.t.FailNow()
	}
}

// clients lets clients do some operations each.
func (l *linearStore) clients(h *registers.History, disks []map[string]registers.Disk, operations int) *sync.WaitGroup {
	seldom := 10
	if l.keep { // a snapshot makes durable what a flush has left out
		seldom = 200
	}
	var wg sync.WaitGroup
	for i, d := range disks {
		wg.Go(func() {
			c := registers.Client{ID: i, Disks: d, Snapshot: func(taken func()) (registers.Values, error) { return l.snapshot(h, taken) }, Durable: true, Seldom: seldom}
			if err := c.Run(h, rand.New(rand.NewPCG(rand.Uint64(), 0)), operations*4/len(disks)); err != nil {
				l.t.Error(err)
			}
		})
	}
	return &wg
}

// snapshot takes a snapshot of both volumes. It reads what the snapshot holds after it was taken, since that cannot
// change.
func (l *linearStore) snapshot(h *registers.History, taken func()) (registers.Values, error) {
	name := fmt.Sprint("s", l.names.Add(1))
	if err := l.s.Snapshot(Ref{"a", name}, Ref{"b", name}); err != nil {
		return registers.Values{}, err
	}
	taken()
	at := h.Now()
	v, err := l.read(name)
	if err != nil {
		return v, err
	}
	l.keepMu.Lock()
	defer l.keepMu.Unlock()
	if l.keep {
		l.kept = append(l.kept, keptSnapshot{name, at, v})
		return v, nil
	}
	return v, l.removeSnapshot(name)
}

func (l *linearStore) removeSnapshot(name string) error {
	return errors.Join(l.s.Remove(Ref{"a", name}, false), l.s.Remove(Ref{"b", name}, false))
}

// read reads all registers of a snapshot, or of the volumes if its name is empty.
func (l *linearStore) read(snapshot string) (v registers.Values, err error) {
	disks := map[string]io.ReaderAt{}
	for _, volume := range busyVolumes[:2] {
		d, err := l.s.OpenDevice(Ref{volume, snapshot}, true)
		if err != nil {
			return v, err
		}
		defer func() { err = errors.Join(err, d.Close()) }()
		disks[volume] = d
	}
	return registers.ReadAll(disks)
}

// all reads all registers of the volumes, which nobody changes, and notes them.
func (l *linearStore) all(note func(int64, registers.Values), call int64) registers.Values {
	l.t.Helper()
	v, err := l.read("")
	if err != nil {
		l.t.Fatal(err)
	}
	note(call, v)
	return v
}

// powerCut makes a history, cuts the power in the middle of it, and opens what is left.
func (l *linearStore) powerCut(disks []map[string]registers.Disk) {
	h := registers.New(l.values)
	r := rand.New(rand.NewPCG(rand.Uint64(), 0))
	l.keep = true
	noisy := r.IntN(2) == 0
	if !noisy { // then fewer syncs make durable what a flush has left out
		l.quiet()
	}
	l.arm()
	must(l.t, l.devs["a"].Flush()) // the history begins with a durable state
	wg := l.clients(h, disks, 40)
	for enough := r.IntN(100); h.Len() < enough && !l.t.Failed(); {
		time.Sleep(50 * time.Microsecond)
	}
	img, before, after := l.cutPower(r, h.Now)
	wg.Wait()
	if noisy {
		l.quiet()
	}
	l.endServer()
	l.close()
	l.harness.giveBack(l.dir)
	l.open(img)
	l.openDevices()
	l.values = l.all(func(_ int64, v registers.Values) { h.PowerCut(before, after, v) }, 0)
	l.check(h)
	for _, k := range l.kept {
		l.checkKept(k, k.taken < before)
	}
	l.keep, l.kept = false, nil
	for _, v := range l.s.Volumes() {
		if v.Name != "a" && v.Name != "b" && v.Name != "c" {
			must(l.t, l.s.Remove(Ref{Volume: v.Name}, true))
			continue
		}
		for _, sn := range v.Snapshots {
			must(l.t, l.s.Remove(Ref{v.Name, sn.Name}, false))
		}
	}
	for more := true; more; { // or more and more would wait for the reaper
		must(l.t, l.s.Checkpoint())
		l.s.mu.Lock()
		more = l.s.reapable()
		l.s.mu.Unlock()
	}
	if l.histories%32 == 0 {
		mustCheck(l.t, l.s)
	}
}

// checkKept checks a snapshot after a power cut. It must be there if it was taken before, and hold what it held.
func (l *linearStore) checkKept(k keptSnapshot, mustBe bool) {
	l.t.Helper()
	v, err := l.read(k.name)
	switch {
	case errors.Is(err, ErrNotFound) && !mustBe:
	case err != nil:
		l.t.Errorf("a snapshot after a power cut: %v", err)
	case v != k.values:
		l.t.Errorf("after a power cut a snapshot holds %x, and held %x", v, k.values)
	}
}

// engineDisk is a device without a server.
type engineDisk struct{ *Device }

func (d engineDisk) Sync() error                  { return d.Flush() }
func (d engineDisk) Zero(off, length int64) error { return d.WriteZeroes(off, length, false) }

func (d engineDisk) WriteDurable(p []byte, off int64) error {
	_, err := d.WriteAt(p, off)
	return errors.Join(err, d.Flush())
}

// serve serves the devices until endServer is called.
func (l *linearStore) serve() (socket string) {
	socket = filepath.Join(l.t.TempDir(), "s")
	listener, err := net.Listen("unix", socket)
	if err != nil {
		l.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	server := nbd.New(deviceExports(l.devs), nbd.Options{})
	go func() { ended <- server.Serve(ctx, listener) }()
	l.endServer = func() {
		cancel()
		if err := testwatch.Wait(l.t, testwatch.Long, "the NBD server", ended); !errors.Is(err, context.Canceled) {
			l.t.Error(err)
		}
	}
	return socket
}

func (l *linearStore) dial(socket, volume string) registers.NBD {
	d, err := nbdclient.Dial(socket, volume)
	if err != nil {
		l.t.Fatal(err)
	}
	return registers.NBD{Client: d}
}

// deviceExports are devices for package nbd.
type deviceExports map[string]*Device

func (deviceExports) List() ([]string, error)           { return nil, nil }
func (deviceExports) Describe(string) (nbd.Info, error) { return nbd.Info{}, os.ErrNotExist }
func (x deviceExports) Open(name string) (*nbd.Export, error) {
	return &nbd.Export{Device: x[name], Name: name}, nil
}
