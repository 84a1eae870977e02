package ublk_test

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vdisk/vdisk/internal/testwatch"
	"github.com/vdisk/vdisk/ublk"
)

// serverVariable is the environment variable with the serverConfig of a test binary that must be a server.
const serverVariable = "UBLK_TEST_PROCESS"

func TestMain(m *testing.M) {
	if config := os.Getenv(serverVariable); config != "" {
		os.Exit(serve(config))
	}
	os.Exit(testwatch.Run(m))
}

// serverConfig configures a server process.
type serverConfig struct {
	ID        *int // nil: the kernel chooses
	Memory    string
	Size      int64
	Queues    int
	Depth     int
	Copy      ublk.CopyMode
	Recovery  ublk.Recovery
	Discard   bool
	Devices   int    // so many of them, ID being the first; 0 is 1
	Handler   string // "ram", "later", "hold" (keeps writes for ever), "deaf" (keeps everything)
	DieAt     int64  // SIGKILLs itself in this write, counted from 1
	DieAfter  bool   // and has applied it
	Recover   bool   // take the device over instead of making it
	FetchOnly int    // offer so many tags of the first queue, and die
}

// serve is the server process. It prints READY or FAIL, and then executes commands from its standard input.
func serve(config string) int {
	var c serverConfig
	if err := json.Unmarshal([]byte(config), &c); err != nil {
		fmt.Println("FAIL", err)
		return 1
	}
	devices, err := c.start()
	if err != nil {
		fmt.Println("FAIL", strings.ReplaceAll(err.Error(), "\n", "; "))
		return 1
	}
	fmt.Println("READY")
	for in := bufio.NewScanner(os.Stdin); in.Scan(); {
		fmt.Println(c.obey(devices, in.Text()))
	}
	select {} // its parent kills it
}

func (c *serverConfig) start() ([]*ublk.Device, error) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	var devices []*ublk.Device
	for i := range max(c.Devices, 1) {
		h, err := c.handler()
		if err != nil {
			return nil, err
		}
		o := c.options(i)
		var d *ublk.Device
		switch {
		case c.FetchOnly > 0:
			return nil, ublk.DieFetchingForTest(ctx, o, c.Recover, c.FetchOnly)
		case c.Recover:
			d, err = ublk.Recover(ctx, *o.ID, ublk.RecoverOptions{}, h)
		default:
			d, err = ublk.Create(ctx, o, h)
		}
		if err != nil {
			return nil, err
		}
		devices = append(devices, d)
	}
	return devices, nil
}

func (c *serverConfig) options(i int) ublk.Options {
	o := ublk.Options{ID: c.ID, Size: c.Size, Queues: c.Queues, Depth: c.Depth, Copy: c.Copy, Recovery: c.Recovery, Discard: c.Discard}
	if i > 0 {
		o.ID = new(*c.ID + i)
	}
	return o
}

// obey executes one command: quiesce, stop or close.
func (c *serverConfig) obey(devices []*ublk.Device, line string) string {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	var errs error
	for _, d := range devices {
		end := map[string]func(context.Context) error{"quiesce": d.Quiesce, "stop": d.Stop, "close": d.Close}[line]
		errs = errors.Join(errs, end(ctx))
	}
	if errs != nil {
		return "FAIL " + strings.ReplaceAll(errs.Error(), "\n", "; ")
	}
	return "OK"
}

// handler makes the handler of one device.
func (c *serverConfig) handler() (ublk.Handler, error) {
	disk, err := openShmDisk(c.Memory, c.Size)
	if err != nil {
		return nil, err
	}
	var writes atomic.Int64
	apply := func(r *ublk.Request) error {
		if r.Op != ublk.OpWrite {
			return disk.ServeUBLK(r)
		}
		n := writes.Add(1)
		if n == c.DieAt && !c.DieAfter {
			_ = unix.Kill(os.Getpid(), unix.SIGKILL)
		}
		err := disk.ServeUBLK(r)
		if n == c.DieAt && c.DieAfter {
			_ = unix.Kill(os.Getpid(), unix.SIGKILL)
		}
		return err
	}
	return handlerFunc(func(r *ublk.Request) error {
		switch {
		case c.Handler == "deaf" || c.Handler == "hold" && r.Op == ublk.OpWrite:
			return ublk.ErrAsync
		case c.Handler == "later":
			go func() {
				time.Sleep(time.Duration(rand.IntN(2000)) * time.Microsecond)
				r.Complete(apply(r))
			}()
			return ublk.ErrAsync
		}
		return apply(r)
	}), nil
}

// shmDisk is a RAM disk in a file of a memory file system, so that it outlives its server. It reads and writes each
// aligned 4 KiB atomically.
type shmDisk struct {
	data  []byte
	locks [64]sync.RWMutex // by 4 KiB block
}

func openShmDisk(path string, size int64) (*shmDisk, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if err := f.Truncate(size); err != nil {
		return nil, err
	}
	data, err := unix.Mmap(int(f.Fd()), 0, int(size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, err
	}
	return &shmDisk{data: data}, nil
}

func (d *shmDisk) ServeUBLK(r *ublk.Request) error {
	for off := r.Offset; off < r.Offset+int64(r.Length); {
		end := min((off/4096+1)*4096, r.Offset+int64(r.Length))
		lock := &d.locks[off/4096%int64(len(d.locks))]
		switch r.Op {
		case ublk.OpRead:
			lock.RLock()
			copy(r.Buf[off-r.Offset:], d.data[off:end])
			lock.RUnlock()
		case ublk.OpWrite:
			lock.Lock()
			copy(d.data[off:end], r.Buf[off-r.Offset:])
			lock.Unlock()
		case ublk.OpDiscard, ublk.OpWriteZeroes:
			lock.Lock()
			clear(d.data[off:end])
			lock.Unlock()
		}
		off = end
	}
	return nil
}

// memoryFile returns the path of a file for a shmDisk.
func memoryFile(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "ublk-test-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return filepath.Join(dir, "disk")
}

// serverProcess is a server process that was started.
type serverProcess struct {
	config serverConfig
	cmd    *exec.Cmd
	in     io.Writer
	out    chan string
	gone   chan struct{}
}

// spawn starts a server process and does not wait for it. The end of the test kills it and removes its devices.
func spawn(t testing.TB, c serverConfig) *serverProcess {
	t.Helper()
	text, err := json.Marshal(c)
	if err != nil {
		t.Fatal(err)
	}
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	s := &serverProcess{config: c, cmd: exec.Command(exe), out: make(chan string, 16), gone: make(chan struct{})}
	s.cmd.Env = append(os.Environ(), serverVariable+"="+string(text))
	s.cmd.Stderr = os.Stderr
	if s.in, err = s.cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	out, err := s.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := s.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		for lines := bufio.NewScanner(out); lines.Scan(); {
			s.out <- lines.Text()
		}
		_ = s.cmd.Wait()
		close(s.gone)
	}()
	t.Cleanup(func() {
		s.kill(t)
		for i := range max(c.Devices, 1) {
			if c.ID != nil {
				remove(t, *c.ID+i)
			}
		}
	})
	return s
}

// startProcess starts a server process and waits until its devices are live.
func startProcess(t testing.TB, c serverConfig) *serverProcess {
	t.Helper()
	s := spawn(t, c)
	if line := s.line(t); line != "READY" {
		t.Fatalf("the server says %q", line)
	}
	return s
}

// line returns the next line that the server prints, or "" when the server has ended.
func (s *serverProcess) line(t testing.TB) string {
	t.Helper()
	select {
	case line := <-s.out:
		return line
	case <-s.gone:
		select {
		case line := <-s.out:
			return line
		default:
			return ""
		}
	case <-time.After(90 * time.Second):
		t.Fatalf("the server says nothing: %v\n%s", noHangs(), testwatch.Stacks())
		return ""
	}
}

// ask sends a line to the server and returns its answer.
func (s *serverProcess) ask(t testing.TB, line string) string {
	t.Helper()
	if _, err := io.WriteString(s.in, line+"\n"); err != nil {
		t.Fatal(err)
	}
	return s.line(t)
}

// kill ends the server with SIGKILL. It fails the test if the process does not end.
func (s *serverProcess) kill(t testing.TB) {
	t.Helper()
	_ = s.cmd.Process.Kill()
	s.wait(t)
}

func (s *serverProcess) wait(t testing.TB) {
	t.Helper()
	ended(t, stepLimit, "the server", s.gone)
}

// remove deletes, by force, a device whose server is gone, and waits until the device is gone.
func remove(t testing.TB, id int) {
	t.Helper()
	within(t, 30*time.Second, "the device of a dead server is left", func() error {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		if err := ublk.Delete(ctx, id, true); err != nil && !errors.Is(err, ublk.ErrNotFound) {
			return err
		}
		return nil
	})
}

// mustBecome waits for a state of a device in the driver. If the server held every request of a queue when it died,
// that takes 30 s before Linux 6.15: the block layer's timeout.
func mustBecome(t testing.TB, id int, want ublk.KernelState) {
	t.Helper()
	within(t, stepLimit, "state", func() error {
		got, err := stateOf(id)
		if err == nil && got != want {
			err = fmt.Errorf("device %d is %v, want %v", id, got, want)
		}
		return err
	})
}

func stateOf(id int) (ublk.KernelState, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	infos, err := ublk.Devices(ctx)
	for _, i := range infos {
		if i.ID == id {
			return i.State, nil
		}
	}
	return 0, errors.Join(err, fmt.Errorf("no device %d: %w", id, ublk.ErrNotFound))
}

// fioRun is an fio in the background.
type fioRun struct {
	cmd  *exec.Cmd
	out  bytes.Buffer
	done chan error
}

// startFIO runs fio with libaio and direct I/O. The end of the test kills it.
func startFIO(t testing.TB, path string, args ...string) *fioRun {
	t.Helper()
	f := &fioRun{done: make(chan error, 1)}
	f.cmd = exec.Command("fio", append([]string{
		"--name=f", "--filename=" + path, "--ioengine=libaio", "--direct=1", "--bs=4k",
		"--group_reporting",
	}, args...)...)
	f.cmd.Stdout, f.cmd.Stderr = &f.out, &f.out
	f.cmd.Dir = t.TempDir() // fio leaves its verify state there
	f.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := f.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() { f.done <- f.cmd.Wait(); close(ended) }()
	t.Cleanup(func() {
		_ = syscall.Kill(-f.cmd.Process.Pid, syscall.SIGKILL)
		select {
		case <-ended:
		case <-time.After(60 * time.Second):
			t.Errorf("fio does not end: %v", noHangs())
		}
	})
	return f
}

// wait waits until fio has ended, and returns an error with its output if it failed.
func (f *fioRun) wait(t testing.TB, limit time.Duration) error {
	t.Helper()
	select {
	case err := <-f.done:
		if err != nil {
			return fmt.Errorf("fio: %w\n%s", err, f.out.String())
		}
		return nil
	case <-time.After(limit):
		return fmt.Errorf("%w within %v: %v", errNoEnd, limit, noHangs())
	}
}

var errNoEnd = errors.New("fio does not end")

// fails waits for an fio whose disk has gone, which must notice.
func (f *fioRun) fails(t testing.TB) {
	t.Helper()
	if err := f.wait(t, stepLimit); err == nil || errors.Is(err, errNoEnd) {
		t.Errorf("fio without its disk: %v", err)
	}
}

// sectorsWritten returns how many sectors were written to a block device (Documentation/block/stat.rst: the seventh
// field).
func sectorsWritten(path string) int {
	text, _ := os.ReadFile("/sys/block/" + filepath.Base(path) + "/stat")
	fields := strings.Fields(string(text))
	if len(fields) < 7 {
		return 0
	}
	n, _ := strconv.Atoi(fields[6])
	return n
}

// untilWritten waits until so many bytes have been written to the device.
func untilWritten(t testing.TB, path string, bytes int) {
	t.Helper()
	within(t, stepLimit, "load on "+path, func() error {
		if n := sectorsWritten(path) * 512; n < bytes {
			return fmt.Errorf("%d bytes written, want %d; %d requests under way", n, bytes, inFlight(path))
		}
		return nil
	})
}

// copyMode is a way of copying that the kernel has.
type copyMode struct {
	name string
	mode ublk.CopyMode
}

// copyModes lists the copy modes of the running kernel; inEachMode sees the others refused.
func copyModes(t testing.TB) []copyMode {
	t.Helper()
	set, err := ublk.Features()
	if err != nil {
		t.Fatal(err)
	}
	var all []copyMode
	for _, m := range modes {
		if set.Has(m.need) {
			all = append(all, copyMode{m.name, m.mode})
		}
	}
	return all
}

// someModes lists the copy modes in which a test runs: all, or with -short one that is chosen at random.
func someModes(t testing.TB) []copyMode {
	t.Helper()
	all := copyModes(t)
	if !testing.Short() {
		return all
	}
	i := rand.IntN(len(all))
	return all[i : i+1]
}
