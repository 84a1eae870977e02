package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/vdisk/vdisk/internal/nbdclient"
)

// patience limits every wait. What takes longer hangs.
const patience = 3 * time.Minute

// server is a process `vdisk serve`.
type server struct {
	cmd    *exec.Cmd
	socket string
	log    *os.File
	dying  atomic.Bool   // from before it is told to end
	gone   chan struct{} // closed when it has ended
	err    error         // of its end; valid once gone is closed
	since  time.Time
}

func (w *world) store() string { return filepath.Join(w.dir, "store") }

func (w *world) command(args ...string) *exec.Cmd {
	cmd := exec.Command(w.vdisk, args...)
	cmd.Env = append(os.Environ(), "VDISK_STORE="+w.store(), fmt.Sprintf("VDISK_MAX_SIZE=%dM", w.maxSize), "VDISK_COLD_AFTER=20s",
		"VDISK_LOCK_TIMEOUT=60s", "VDISK_MAP_CACHE=4M")
	return cmd
}

// start starts a server. It does not wait until it serves.
func (w *world) start() (*server, error) {
	s := &server{socket: filepath.Join(w.dir, "nbd.sock"), gone: make(chan struct{}), since: time.Now()}
	if len(s.socket) > 100 { // sockets have short paths
		s.socket = filepath.Join(os.TempDir(), fmt.Sprintf("vdisk-soak-%d.sock", os.Getpid()))
	}
	var err error
	if s.log, err = os.OpenFile(filepath.Join(w.dir, "server.log"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600); err != nil {
		return nil, err
	}
	if fi, err := s.log.Stat(); err == nil && fi.Size() > 16<<20 {
		_ = s.log.Truncate(0) // the last lives are enough
	}
	fmt.Fprintf(s.log, "== life %d\n", w.state.Lives)
	s.cmd = w.command("serve", "--socket", s.socket)
	s.cmd.Stderr = s.log
	// A signal for the soak's group is not the server's; and if the soak is killed, the server goes with it.
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	if err := s.cmd.Start(); err != nil {
		return nil, err
	}
	go func() {
		s.err = s.cmd.Wait()
		_ = s.log.Close() // nobody reads it from here
		close(s.gone)
	}()
	return s, nil
}

// ready waits until the server serves.
func (s *server) ready() error {
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		if c, err := net.Dial("unix", s.socket); err == nil {
			c.Close()
			return nil
		}
		select {
		case <-s.gone:
			return fmt.Errorf("vdisk serve ended before it served: %w", s.err)
		default:
		}
	}
	s.stacks()
	return fmt.Errorf("vdisk serve does not serve after %v", patience)
}

// stacks makes the server print all its stacks to its log, and end.
func (s *server) stacks() {
	if s.cmd != nil {
		_ = s.cmd.Process.Signal(syscall.SIGQUIT) // it may be gone
	}
}

// end ends the server by a signal, and waits.
func (s *server) end(sig syscall.Signal) error {
	s.dying.Store(true)
	select {
	case <-s.gone:
		return fmt.Errorf("vdisk serve ended by itself: %w", s.err)
	default:
	}
	if err := s.cmd.Process.Signal(sig); err != nil {
		return err
	}
	select {
	case <-s.gone:
	case <-time.After(patience):
		s.stacks()
		return fmt.Errorf("vdisk serve has not ended %v after %v", patience, sig)
	}
	if code := s.cmd.ProcessState.ExitCode(); sig == syscall.SIGTERM && code != 128+int(sig) {
		return fmt.Errorf("vdisk serve after SIGTERM: %w", s.err)
	}
	return nil
}

// dial opens an export.
func (s *server) dial(name string) (*nbdclient.Client, error) {
	d, err := nbdclient.Dial(s.socket, name)
	if err == nil {
		d.Patience = patience
	}
	return d, err
}

// Exit codes of vdisk that the soak expects somewhere (docs/operations.md).
const (
	exitOK   = 0
	exitBusy = 5
	exitFull = 9
)

// outcome is how a command ended.
type outcome struct {
	args    []string
	code    int
	out     []byte
	message string
	doubt   bool // it failed while the server was ended, or was killed: it may have been done or not
}

func (o outcome) String() string {
	return fmt.Sprintf("vdisk %s: exit code %d: %s", strings.Join(o.args, " "), o.code, strings.TrimSpace(o.message))
}

// do runs a command. Every exit code but 0 and those in also fails the soak, unless the server was ended meanwhile.
func (w *world) do(args []string, also ...int) outcome { return w.doKilled(0, args, also...) }

// doKilled is do, and kills the command after a time, if that is not 0.
func (w *world) doKilled(after time.Duration, args []string, also ...int) outcome {
	var stderr, stdout bytes.Buffer
	cmd := w.command(append([]string{"-q"}, args...)...)
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	o := outcome{args: args}
	if err := cmd.Start(); err != nil {
		w.fail(err)
		return outcome{doubt: true}
	}
	var killed, hung atomic.Bool
	if after > 0 {
		defer time.AfterFunc(after, func() { killed.Store(true); _ = cmd.Process.Kill() }).Stop()
	}
	defer time.AfterFunc(2*patience, func() {
		hung.Store(true)
		w.server.stacks()
		_ = cmd.Process.Signal(syscall.SIGQUIT)
	}).Stop()
	if changes(args[0]) {
		w.atWork.Add(1)
		defer w.atWork.Add(-1)
	}
	err := cmd.Wait()
	o.code, o.out, o.message = cmd.ProcessState.ExitCode(), stdout.Bytes(), stderr.String()
	w.state.count("vdisk " + args[slices.IndexFunc(args, func(a string) bool { return a[0] != '-' })])
	switch {
	case hung.Load():
		w.fail(fmt.Errorf("%v: it hung", o))
		o.doubt = true
	case err == nil:
	case killed.Load() || w.server.dying.Load():
		o.doubt = true
	case !slices.Contains(also, o.code):
		w.fail(errors.New(o.String()))
	case o.code == exitFull:
		w.full.Add(1)
	}
	return o
}

// changes reports whether a command changes names, sizes or whole contents.
func changes(command string) bool {
	return slices.Contains([]string{"create", "snapshot", "clone", "import", "rollback", "resize", "rename", "rm"}, command)
}

// listed is what `vdisk ls --json` says of a volume.
type listed struct {
	Name      string `json:"name"`
	Size      int64  `json:"size"`
	Snapshots []struct {
		Name string `json:"name"`
		Size int64  `json:"size"`
	} `json:"snapshots"`
}

// list returns the sizes of all volumes and snapshots by name.
func (w *world) list() (map[string]int64, error) {
	o := w.do([]string{"--json", "ls", "-t", "all"})
	if o.code != exitOK {
		return nil, errors.New(o.String())
	}
	var l struct {
		Volumes []listed `json:"volumes"`
	}
	if err := json.NewDecoder(bytes.NewReader(o.out)).Decode(&l); err != nil && !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("%v: %w", o, err)
	}
	names := map[string]int64{}
	for _, v := range l.Volumes {
		names[v.Name] = v.Size
		for _, s := range v.Snapshots {
			names[s.Name] = s.Size
		}
	}
	return names, nil
}

// cpu returns the processor time that a process has taken.
func cpu(pid int) time.Duration {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0
	}
	f := strings.Fields(string(text[bytes.LastIndexByte(text, ')')+1:]))
	if len(f) < 13 {
		return 0
	}
	user, uerr := strconv.ParseInt(f[11], 10, 64)
	system, serr := strconv.ParseInt(f[12], 10, 64)
	if uerr != nil || serr != nil {
		return 0
	}
	return time.Duration(user+system) * 10 * time.Millisecond // USER_HZ is 100
}

// sleep waits, unless ctx ends.
func sleep(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}
