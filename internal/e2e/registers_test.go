package e2e

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/vdisk/vdisk/cow"
	"github.com/vdisk/vdisk/internal/nbdclient"
	control "github.com/vdisk/vdisk/internal/owner"
	"github.com/vdisk/vdisk/internal/owner/sparse"
	"github.com/vdisk/vdisk/internal/registers"
	"github.com/vdisk/vdisk/internal/testwatch"
)

// TestRegisters lets clients write, read, flush and snapshot registers of two volumes, while the store works, other
// volumes come and go and are rolled back, and the server is killed with SIGKILL again and again. Then it asks whether
// some order of all operations explains what each client has seen and what each snapshot holds. On the host the volumes
// are served over NBD, and the requests that a kill left without an answer may have been made or not. In the guest they
// are block devices, whose users must not notice that the server is killed and recovered.
// VDISK_LINEAR is the number of histories, of 160 operations each.
func TestRegisters(t *testing.T) {
	s := newStore(t)
	for _, volume := range []string{"a", "b"} {
		s.run("create", volume, "--size", "4M")
	}
	name, n, m := "NBD", 24, &registerTest{store: s, server: &nbdRegisters{store: s}}
	if inGuest {
		loadDriver(t)
		name, n, m.server = "ublk", 8, &ublkRegisters{store: s}
	}
	if testing.Short() {
		n = min(n, 12)
	}
	if long, err := strconv.Atoi(os.Getenv("VDISK_LINEAR")); err == nil {
		n = long
	}
	m.server.restart()
	for m.histories < n {
		m.life()
	}
	m.server.end()
	s.run("check", "--read-data")
	t.Logf("proof: linearizable histories, %s: %d, with %d kills", name, m.histories, m.kills)
}

// registerServer serves the volumes a and b.
type registerServer interface {
	// connect returns what each client uses, beginning with one for the noise.
	connect() []map[string]registers.Disk
	// disrupt kills the server. What connect returned goes on to work, or all its requests fail.
	disrupt()
	// restart serves again.
	restart()
	outlived() bool // what connect returned goes on to work
	end()
}

// registerTest is a store whose registers are known.
type registerTest struct {
	*store
	server           registerServer
	values           registers.Values
	histories, kills int
	names            atomic.Int64
	client           control.Store
	dying            atomic.Bool // the server is being killed

	keepMu sync.Mutex // guards kept
	kept   map[string]registers.Values
}

// life makes some histories. During the last one the server is killed.
func (m *registerTest) life() {
	disks := m.server.connect()
	m.open()
	stop := m.noise(disks[0]["a"])
	for range 3 {
		h := registers.New(m.values)
		m.clients(h, disks[1:])()
		m.finish(h, disks)
	}
	h := registers.New(m.values)
	m.keepMu.Lock()
	m.kept = map[string]registers.Values{}
	m.keepMu.Unlock()
	wait := m.clients(h, disks[1:])
	for enough := rand.IntN(100); h.Len() < enough && !m.t.Failed(); {
		time.Sleep(100 * time.Microsecond)
	}
	m.dying.Store(true)
	killed := h.Now()
	m.server.disrupt()
	m.kills++
	if m.server.outlived() {
		h.Killed(killed, h.Now())
		m.server.restart()
		wait()
		stop()
	} else {
		wait()
		stop()
		m.server.restart()
	}
	for _, d := range disks {
		_ = errors.Join(d["a"].(io.Closer).Close(), d["b"].(io.Closer).Close()) // some are of a server that is gone
	}
	_ = m.client.Close() // its owner is gone
	m.dying.Store(false)
	m.open()
	m.finish(h, m.server.connect())
	for name, want := range m.kept {
		if got, err := m.snapshotValues(name); err != nil || got != want {
			m.t.Errorf("snapshot %s holds %x after a kill, and held %x: %v", name, got, want, err)
		}
	}
	m.kept = nil
	m.tidy()
	if err := m.client.Close(); err != nil {
		m.t.Error(err)
	}
}

// open opens the store through its owner.
func (m *registerTest) open() {
	m.t.Helper()
	s, err := control.Open(context.Background(), m.dir, control.Options{Command: "test", LockTimeout: time.Minute})
	if err != nil {
		m.t.Fatal(err)
	}
	if _, ok := s.(*control.Client); !ok {
		m.t.Fatal("the store has no owner")
	}
	m.client = s
}

// tidy removes what the noise and the clients have left.
func (m *registerTest) tidy() {
	m.t.Helper()
	ctx := context.Background()
	volumes, err := m.client.Volumes(ctx)
	if err != nil {
		m.t.Fatal(err)
	}
	for _, v := range volumes {
		if v.Name != "a" && v.Name != "b" {
			err = errors.Join(err, m.client.Remove(ctx, cow.Ref{Volume: v.Name}, true))
			continue
		}
		for _, sn := range v.Snapshots {
			err = errors.Join(err, m.client.Remove(ctx, cow.Ref{Volume: v.Name, Snapshot: sn.Name}, false))
		}
	}
	if err != nil {
		m.t.Fatal(err)
	}
}

// finish reads all registers, which nobody changes, and checks the history.
func (m *registerTest) finish(h *registers.History, disks []map[string]registers.Disk) {
	m.t.Helper()
	call := h.Now()
	v, err := registers.ReadAll(map[string]io.ReaderAt{"a": disks[0]["a"], "b": disks[0]["b"]})
	if err != nil {
		m.t.Fatal(err)
	}
	h.All(call, v)
	m.values = v
	if err := h.Check(); err != nil {
		m.t.Fatalf("history %d: %v", m.histories, err)
	}
	if m.histories++; m.t.Failed() {
		m.t.FailNow()
	}
}

// clients lets clients do some operations each, and returns a function that waits for them.
func (m *registerTest) clients(h *registers.History, disks []map[string]registers.Disk) (wait func()) {
	var wg sync.WaitGroup
	for i, d := range disks {
		wg.Go(func() {
			c := registers.Client{ID: i, Disks: d, Snapshot: m.snapshot, Seldom: 40}
			err := c.Run(h, rand.New(rand.NewPCG(rand.Uint64(), 0)), 160/len(disks))
			if err != nil && (m.server.outlived() || !m.dying.Load()) {
				m.t.Error(err)
			}
		})
	}
	return func() { testwatch.Do(m.t, 3*testwatch.Long, "the clients", wg.Wait) }
}

// snapshot takes a snapshot of both volumes, and reads it.
func (m *registerTest) snapshot(taken func()) (v registers.Values, err error) {
	name := fmt.Sprint("s", m.names.Add(1))
	ctx := context.Background()
	err = m.client.Snapshot(ctx, cow.Ref{Volume: "a", Snapshot: name}, cow.Ref{Volume: "b", Snapshot: name})
	taken()
	if err == nil {
		v, err = m.snapshotValues(name)
	}
	if err != nil && m.dying.Load() {
		return v, registers.ErrNotTaken
	}
	m.keepMu.Lock()
	defer m.keepMu.Unlock()
	if err == nil && m.kept != nil {
		m.kept[name] = v
	}
	return v, err
}

// snapshotValues exports a snapshot of both volumes, and returns the values in it.
func (m *registerTest) snapshotValues(name string) (registers.Values, error) {
	images := map[string]io.ReaderAt{}
	for _, volume := range []string{"a", "b"} {
		var image image
		err := m.client.Export(context.Background(), cow.Ref{Volume: volume, Snapshot: name}, image.fill)
		if err != nil {
			return registers.Values{}, err
		}
		images[volume] = image
	}
	return registers.ReadAll(images)
}

// image is the content of a volume.
type image []byte

func (i *image) fill(src sparse.Source) error {
	*i = make([]byte, src.Size())
	buf := make([]byte, 256<<10)
	for {
		n, off, err := src.Next(buf)
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		copy((*i)[off:], buf[:n])
	}
}

func (i image) ReadAt(p []byte, off int64) (int, error) { return copy(p, i[off:]), nil }

// noise works on the store until stop is called, or the server is killed: it writes behind the registers of a volume,
// and lets other volumes come and go.
func (m *registerTest) noise(d registers.Disk) (stop func()) {
	var wg sync.WaitGroup
	end, pause := make(chan struct{}), 3*time.Millisecond
	if inGuest { // it is emulated, and clients would wait for a processor more than for the disk
		pause = 50 * time.Millisecond
	}
	for _, work := range []func(r *rand.Rand) error{
		func(r *rand.Rand) error {
			p := make([]byte, registers.Size*(1+r.IntN(16)))
			for i := range len(p) / 2 {
				p[i] = byte(r.Uint32())
			}
			off := 2<<20 + r.Int64N((512<<10-int64(len(p)))/registers.Size)*registers.Size // snapshots are exported
			if r.IntN(8) == 0 {
				return d.Zero(off, int64(len(p)))
			}
			_, err := d.WriteAt(p, off)
			return err
		},
		m.others,
	} {
		wg.Go(func() {
			for r := rand.New(rand.NewPCG(rand.Uint64(), 0)); ; time.Sleep(rand.N(pause)) {
				select {
				case <-end:
					return
				default:
				}
				if err := work(r); err != nil {
					if !m.dying.Load() {
						m.t.Error(err)
					}
					return
				}
			}
		})
	}
	return func() {
		close(end)
		testwatch.Do(m.t, 3*testwatch.Long, "the noise", wg.Wait)
	}
}

// others makes a volume and a clone of it, rolls it back, changes its size, removes both, and lets the store work.
func (m *registerTest) others(r *rand.Rand) error {
	ctx, n := context.Background(), m.names.Add(1)
	c, d := cow.Ref{Volume: fmt.Sprint("c", n)}, cow.Ref{Volume: fmt.Sprint("d", n)}
	sn := cow.Ref{Volume: c.Volume, Snapshot: "s"}
	steps := []func() error{
		func() error {
			_, err := m.client.CreateVolume(ctx, c.Volume, cow.VolumeOptions{Size: 1 << 20})
			return err
		},
		func() error {
			return m.client.Snapshot(ctx, sn, cow.Ref{Volume: "a", Snapshot: fmt.Sprint("noise", n)})
		},
		func() error { return m.client.Clone(ctx, sn, d.Volume) },
		func() error { return m.client.Resize(ctx, c.Volume, 2<<20, false) },
		func() error { return m.client.Rollback(ctx, sn) },
		func() error {
			switch r.IntN(3) {
			case 0:
				_, err := m.client.Cold(ctx)
				return err
			case 1:
				_, err := m.client.Clean(ctx, 0.05)
				return err
			}
			var found []error
			_, err := m.client.Check(ctx, cow.CheckOptions{ReadData: true}, func(p cow.Problem) { found = append(found, fmt.Errorf("check: %+v", p)) })
			return errors.Join(append(found, err)...)
		},
		func() error { return m.client.Remove(ctx, c, true) },
		func() error { return m.client.Remove(ctx, d, true) },
		func() error {
			return m.client.Remove(ctx, cow.Ref{Volume: "a", Snapshot: fmt.Sprint("noise", n)}, false)
		},
	}
	for _, step := range steps {
		if err := step(); err != nil {
			return err
		}
	}
	return nil
}

// nbdRegisters serves by vdisk serve. Each volume has two connections, with three requests in flight on each, and one
// for the noise.
type nbdRegisters struct {
	*store
	o *nbdOwner
}

func (n *nbdRegisters) connect() (disks []map[string]registers.Disk) {
	n.t.Helper()
	for _, users := range []int{1, 3, 3} {
		conns := map[string]registers.Disk{}
		for _, volume := range []string{"a", "b"} {
			d, err := nbdclient.Dial(n.o.socket, volume)
			if err != nil {
				n.t.Fatal(err)
			}
			conns[volume] = registers.NBD{Client: d}
		}
		for range users {
			disks = append(disks, conns)
		}
	}
	return disks
}

func (n *nbdRegisters) disrupt()       { n.o.kill() }
func (n *nbdRegisters) restart()       { n.o = serveNBD(n.store) }
func (n *nbdRegisters) outlived() bool { return false }
func (n *nbdRegisters) end()           { n.o.stop() }

// ublkRegisters are block devices. Each client opens them for itself.
type ublkRegisters struct {
	*store
	paths map[string]string
}

func (u *ublkRegisters) connect() (disks []map[string]registers.Disk) {
	u.t.Helper()
	for range 5 {
		opened := map[string]registers.Disk{}
		for volume, path := range u.paths {
			d, err := openDevice(path)
			if err != nil {
				u.t.Fatal(err)
			}
			opened[volume] = d
		}
		disks = append(disks, opened)
	}
	return disks
}

func (u *ublkRegisters) disrupt() {
	if err := syscall.Kill(u.owner(), syscall.SIGKILL); err != nil {
		u.t.Fatal(err)
	}
}

func (u *ublkRegisters) restart() {
	if u.paths == nil {
		u.paths = map[string]string{"a": u.run("attach", "a"), "b": u.run("attach", "b")}
		return
	}
	u.run("recover")
}

func (u *ublkRegisters) outlived() bool { return true }

func (u *ublkRegisters) end() {
	u.run("detach", "a")
	u.run("detach", "b")
}
