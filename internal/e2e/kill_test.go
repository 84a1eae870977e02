package e2e

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/vdisk/vdisk/internal/nbdclient"
	"github.com/vdisk/vdisk/internal/testwatch"
)

var kills = flag.Int("kills", 50, "how often TestKill kills the owner")

// inGuest: the harness's guest, which has ublk, and the vdisk to test on its PATH.
var inGuest = os.Getenv("VDISK_GUEST") == "1"

var vdiskBinary = sync.OnceValues(func() (string, error) {
	if inGuest {
		return exec.LookPath("vdisk")
	}
	dir, err := os.MkdirTemp("", "vdisk-e2e")
	if err != nil {
		return "", err
	}
	path := filepath.Join(dir, "vdisk")
	cmd := exec.Command("go", "build", "-o", path, "../../cmd/vdisk")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("%w: %s", err, out)
	}
	return path, nil
})

func TestMain(m *testing.M) {
	code := testwatch.Run(m)
	if path, err := vdiskBinary(); err == nil && !inGuest {
		os.RemoveAll(filepath.Dir(path))
	}
	os.Exit(code)
}

// store is a store, and the vdisk program for it.
type store struct {
	t        *testing.T
	bin, dir string
	limit    string // VDISK_MAX_SIZE
}

func newStore(t *testing.T) *store {
	t.Helper()
	bin, err := vdiskBinary()
	if err != nil {
		t.Fatal(err)
	}
	base := t.TempDir()
	if s := os.Getenv("VDISK_SCRATCH"); s != "" { // the guest's /tmp is memory
		if base, err = os.MkdirTemp(s, "e2e"); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { os.RemoveAll(base) })
	}
	return &store{t: t, bin: bin, dir: filepath.Join(base, "store")}
}

func (s *store) env() []string {
	env := append(os.Environ(), "VDISK_STORE="+s.dir)
	if s.limit != "" {
		env = append(env, "VDISK_MAX_SIZE="+s.limit)
	}
	if inGuest { // everything is emulated there
		env = append(env, "VDISK_LOCK_TIMEOUT=60s")
	}
	return env
}

func (s *store) command(args ...string) *exec.Cmd {
	cmd := exec.Command(s.bin, args...)
	cmd.Env = s.env()
	return cmd
}

// run runs a command to its end and returns what it printed.
func (s *store) run(args ...string) string {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, s.bin, args...)
	cmd.Env = s.env()
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		s.t.Fatalf("vdisk %s: %v\n%s%s", strings.Join(args, " "), err, out, stderr.String())
	}
	return strings.TrimSpace(string(out))
}

// owner is a process that serves the volume v, with the means to access the volume.
type owner interface {
	open() (disk, error)
	kill() // SIGKILL; returns when it is gone
	stop() // as a user does
}

type nbdOwner struct {
	s      *store
	socket string
	cmd    *exec.Cmd
	beside *exec.Cmd // a command that runs when the owner is killed; may be nil
}

func startNBD(s *store) owner { return serveNBD(s, "v") }

// serveNBD serves volumes; all of them if none is named.
func serveNBD(s *store, volumes ...string) *nbdOwner {
	s.t.Helper()
	o := &nbdOwner{s: s, socket: s.dir + ".sock"}
	o.cmd = s.command(append([]string{"-q", "serve", "--socket", o.socket}, volumes...)...)
	o.cmd.Stderr = os.Stderr
	if err := o.cmd.Start(); err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { _ = o.cmd.Process.Kill() }) // of a test that failed; else it is gone
	for range 600 {
		if c, err := net.Dial("unix", o.socket); err == nil {
			_ = c.Close()
			return o
		}
		time.Sleep(20 * time.Millisecond)
	}
	s.t.Fatal("vdisk serve made no socket in 12 s")
	return nil
}

func (o *nbdOwner) open() (disk, error) { return nbdclient.Dial(o.socket, "v") }

func (o *nbdOwner) kill() {
	_ = o.cmd.Process.Kill()
	_ = o.cmd.Wait() // its error is that it was killed
}

func (o *nbdOwner) stop() {
	_ = o.cmd.Process.Signal(syscall.SIGTERM)
	if err := o.cmd.Wait(); err != nil && o.cmd.ProcessState.ExitCode() != 143 {
		o.s.t.Errorf("vdisk serve after SIGTERM: %v", err)
	}
}

type ublkOwner struct {
	s   *store
	dev string
	pid int
}

func startUblk(s *store) owner {
	s.t.Helper()
	dev := s.run("attach", "v")
	return &ublkOwner{s: s, dev: dev, pid: s.owner()}
}

// owner returns the process that owns the store.
func (s *store) owner() (pid int) {
	s.t.Helper()
	text, err := os.ReadFile(filepath.Join(s.dir, "lock"))
	if err != nil {
		s.t.Fatal(err)
	}
	if _, err := fmt.Sscanf(string(text), "pid %d", &pid); err != nil {
		s.t.Fatalf("lock file %q: %v", text, err)
	}
	return pid
}

func (o *ublkOwner) open() (disk, error) { return openDevice(o.dev) }

func (o *ublkOwner) kill() {
	if err := syscall.Kill(o.pid, syscall.SIGKILL); err != nil {
		o.s.t.Fatal(err)
	}
	o.s.run("detach", "--force", "v") // or its users would wait for the next server
	for range 1500 {
		if _, err := os.Stat(o.dev); errors.Is(err, fs.ErrNotExist) {
			return
		}
		time.Sleep(20 * time.Millisecond)
	}
	o.s.t.Fatalf("%s stays after its owner was killed", o.dev)
}

func (o *ublkOwner) stop() { o.s.run("detach", "v") }

// killing kills the owner of a volume v again and again while writers with an oracle, and fio, write and sync. Everything
// that was answered must read back from the next owner, and a check must find nothing.
type killing struct {
	t            *testing.T
	s            *store
	start        func(*store) owner
	check        func() bool // whether a check comes before the next owner; it recovers the store
	fio          func() bool // whether fio writes, too
	writers      []*oracle
	lives, kills int
}

func (k *killing) begin() {
	k.t.Helper()
	k.s.run("create", "v", "--size", "64M")
	for i := range 3 {
		w := newOracle(fmt.Sprintf("writer %d", i), int64(i)*4096, 4096, uint64(i))
		w.lazy = i == 2
		k.writers = append(k.writers, w)
	}
	k.t.Cleanup(func() {
		if text, err := os.ReadFile(filepath.Join(k.s.dir, "daemon.log")); k.t.Failed() && err == nil {
			k.t.Logf("daemon.log:\n%s", text)
		}
	})
}

// life starts an owner, and lets it be killed under load.
func (k *killing) life(kill func(owner) int) {
	k.t.Helper()
	o := k.start(k.s)
	verifyAll(k.t, o, k.writers)
	var load *exec.Cmd
	if k.fio() {
		load = startFio(k.t, o)
	}
	var wg sync.WaitGroup
	for _, w := range k.writers {
		d, err := o.open()
		if err != nil {
			k.t.Fatal(err)
		}
		wg.Go(func() {
			_ = w.run(d) // ends when the owner dies
			_ = d.Close()
		})
	}
	k.kills += kill(o)
	k.lives++
	wg.Wait()
	if load != nil {
		_ = load.Wait() // fio fails with its server
	}
	if k.check() {
		k.s.run("check", "--read-data")
	}
}

func (k *killing) end() {
	k.t.Helper()
	o := k.start(k.s)
	verifyAll(k.t, o, k.writers)
	o.stop()
	k.s.run("check", "--read-data")
	var rounds int64
	for _, w := range k.writers {
		rounds += w.rounds.Load()
	}
	if rounds < int64(k.lives) {
		k.t.Errorf("only %d syncs in %d lives: this proves little", rounds, k.lives)
	}
	k.t.Logf("%d kills, %d syncs by the oracle's writers, nothing lost", k.kills, rounds)
}

func verifyAll(t *testing.T, o owner, writers []*oracle) {
	t.Helper()
	d, err := o.open()
	if err != nil {
		t.Fatal(err)
	}
	for _, w := range writers {
		if err := w.verify(d); err != nil {
			t.Fatal(err)
		}
	}
	if err := d.Close(); err != nil {
		t.Error(err)
	}
}

// startFio loads the last quarter of the volume with writes and fsyncs.
func startFio(t *testing.T, o owner) *exec.Cmd {
	t.Helper()
	args := []string{
		"--name=load", "--rw=randwrite", "--bs=4k", "--iodepth=8", "--fsync=16", "--offset=48M", "--size=16M",
		"--time_based", "--runtime=60", "--allow_file_create=0", "--buffer_compress_percentage=50", "--refill_buffers", "--output=/dev/null",
	}
	switch o := o.(type) {
	case *nbdOwner:
		args = append(args, "--ioengine=nbd", "--uri=nbd+unix:///v?socket="+o.socket)
	case *ublkOwner:
		args = append(args, "--ioengine=libaio", "--direct=1", "--filename="+o.dev)
	}
	cmd := exec.Command("fio", args...)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	return cmd
}
