package main

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vdisk/vdisk/cow"
	"github.com/vdisk/vdisk/internal/metrics"
	"github.com/vdisk/vdisk/internal/testwatch"
	"github.com/vdisk/vdisk/ublk"
)

// readingAt is a reading with requests on two volumes, n times as many on the second.
func readingAt(at time.Time, n uint64) metrics.Reading {
	r := metrics.Reading{Store: "/st", At: at}
	r.Counters.WrittenBytes, r.Counters.CompressedBytes, r.Counters.MapLookups, r.Counters.MapLoads = 300, 100, 100*n, n
	r.Counters.FileBytes, r.Counters.RoomBytes, r.Counters.Syncs, r.Counters.SyncTime = 1<<30, 3<<30, n, time.Duration(n)*time.Millisecond
	r.Counters.Volumes = []cow.VolumeCounters{{Name: "b", WrittenBytes: 40, CompressedBytes: 10}, {Name: "c"}, {Name: "a"}}
	for i, name := range []string{"a", "b", "b@s"} {
		var s ublk.OpStats
		s.Requests = n * uint64(i+1)
		s.Bytes, s.Errors = s.Requests*4096, n
		for range s.Requests {
			s.Latency.Add(time.Duration(3-i) * 100 * time.Microsecond)
		}
		ref, _ := cow.ParseRef(name)
		t := metrics.Traffic{Ref: ref}
		t.Ops[1] = metrics.OperationOf(&s)
		r.Traffic = append(r.Traffic, t)
	}
	return r
}

// TestTop computes what two readings show, in each order, and formats it for narrow and wide terminals.
func TestTop(t *testing.T) {
	start := time.Unix(1000, 0)
	before, now := readingAt(start, 10), readingAt(start.Add(2*time.Second), 30)
	for order, want := range map[string]string{"iops": "b@s b a c", "bytes": "b@s b a c", "p99": "a b b@s c", "name": "a b b@s c"} {
		var names []string
		for _, v := range topOf(before, now, topView{order: order, all: true}).Volumes {
			names = append(names, v.Name)
		}
		if got := strings.Join(names, " "); got != want {
			t.Errorf("by %s: %s", order, got)
		}
	}
	j := topOf(before, now, topView{order: "name"})
	if len(j.Volumes) != 3 || j.Fill != 0.25 || j.Ratio != 3 || j.MapHits != 0.99 || j.Syncs != 10 || j.SyncNs != 1e6 || j.Seconds != 2 {
		t.Errorf("%+v", j)
	}
	v := j.Volumes[1]
	if v.Name != "b" || v.Writes != 20 || v.WriteBytes != 20*4096 || v.Errors != 10 || v.Ratio != 4 || v.Reads != 0 || v.ReadP99 != 0 || v.WriteP99 < 190e3 || v.WriteP99 > 210e3 {
		t.Errorf("%+v", v)
	}
	if again := topOf(now, before, topView{order: "name"}).Volumes[0]; again.Writes < 0 || again.WriteP50 <= 0 {
		t.Errorf("after a new owner began: %+v", again)
	}
	a := &app{}
	for width, want := range map[int][]string{
		0:  {"VOLUME", "R/s", "W/s", "F/s", "READ/s", "WRITE/s", "R-P50", "R-P99", "W-P50", "W-P99", "RATIO", "ERR/s"},
		70: {"VOLUME", "R/s", "W/s", "READ/s", "WRITE/s", "R-P50", "R-P99", "W-P50", "W-P99", "RATIO"},
		55: {"VOLUME", "R/s", "W/s", "READ/s", "WRITE/s", "R-P99", "W-P99", "RATIO"},
		20: {"VOLUME", "R/s", "W/s", "READ/s", "WRITE/s"},
	} {
		lines := a.topTable(j, width)
		if got := strings.Fields(lines[0]); !reflect.DeepEqual(got, want) || len(lines) != 4 {
			t.Errorf("%d columns: %q", width, lines)
		}
	}
	now.Counters.Failed, now.Counters.DamagedPlaces, now.Waiting = true, 2, 1
	if head := strings.Join(a.topHead(topOf(before, now, topView{order: "name"})), "\n"); !strings.Contains(head, "WRITING HAS FAILED") ||
		!strings.Contains(head, "2 DAMAGED PLACES") || !strings.Contains(head, "1 DEVICES WAIT") || !strings.Contains(head, "compressed 3.00") {
		t.Error(head)
	}
	for n, want := range map[float64]string{0: "0B", 1023: "1023B", 1536: "1.50KiB", 1 << 30: "1.00GiB", 1 << 62: "4096PiB"} {
		if got := a.short(n); got != want {
			t.Errorf("%v bytes: %s", n, got)
		}
	}
	for ns, want := range map[int64]string{0: "-", 950: "0.95µs", 12_300: "12.3µs", 999_900: "1000µs", 1_500_000: "1.50ms", 2e9: "2.00s"} {
		if got := latency(ns); got != want {
			t.Errorf("%d ns: %s", ns, got)
		}
	}
}

// terminal is a pseudo terminal with a program on it.
type terminal struct {
	t      *testing.T
	master *os.File
	before unix.Termios
	cmd    *exec.Cmd
	ended  chan error

	from  int // how much of seen was waited for
	stops int // how often it was stopped

	mu   sync.Mutex // guards seen
	seen bytes.Buffer
}

// onTerminal starts a command of vdisk on a terminal of 80 columns and 24 lines.
func onTerminal(t *testing.T, args ...string) *terminal {
	t.Helper()
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Skip(err)
	}
	t.Cleanup(func() { _ = master.Close() })
	x := &terminal{t: t, master: master, ended: make(chan error, 1)}
	fd := int(master.Fd())
	n, err := unix.IoctlGetInt(fd, unix.TIOCGPTN)
	if err == nil {
		err = unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0)
	}
	if err != nil {
		t.Fatal(err)
	}
	x.resize(80, 24)
	slave, err := os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Skip(err)
	}
	defer slave.Close()
	x.before = x.state()
	program, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	x.cmd = &exec.Cmd{
		Path: program, Args: append([]string{"vdisk"}, args...), Env: append(os.Environ(), "TERM=xterm"), Stdin: slave, Stdout: slave, Stderr: slave,
		SysProcAttr: &syscall.SysProcAttr{Setsid: true, Setctty: true},
	}
	if err := x.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() { x.ended <- x.cmd.Wait() }()
	t.Cleanup(func() { _ = x.cmd.Process.Kill() })
	go func() {
		b := make([]byte, 4096)
		for {
			n, err := master.Read(b)
			x.mu.Lock()
			x.seen.Write(b[:n])
			x.mu.Unlock()
			if err != nil {
				return
			}
		}
	}()
	return x
}

// state returns the modes of the terminal.
func (x *terminal) state() unix.Termios {
	x.t.Helper()
	s, err := unix.IoctlGetTermios(int(x.master.Fd()), unix.TCGETS)
	if err != nil {
		x.t.Fatal(err)
	}
	return *s
}

func (x *terminal) resize(columns, lines uint16) {
	x.t.Helper()
	if err := unix.IoctlSetWinsize(int(x.master.Fd()), unix.TIOCSWINSZ, &unix.Winsize{Col: columns, Row: lines}); err != nil {
		x.t.Fatal(err)
	}
}

func (x *terminal) typed(keys string) {
	x.t.Helper()
	if _, err := x.master.WriteString(keys); err != nil {
		x.t.Fatal(err)
	}
}

// shows waits until a whole screen has a text, from the last one that was waited for on, and returns that screen.
func (x *terminal) shows(text string) string {
	x.t.Helper()
	for end := time.Now().Add(testwatch.Long); ; time.Sleep(time.Millisecond) {
		x.mu.Lock()
		all := x.seen.String()
		x.mu.Unlock()
		for at := x.from; ; {
			s, rest, more := strings.Cut(all[at:], toTop)
			if _, last, whole := strings.Cut(s, clearRest); (more || whole && strings.Contains(last, text)) && strings.Contains(s, text) {
				x.from = at
				return s
			}
			if !more {
				break
			}
			at = len(all) - len(rest)
		}
		if time.Now().After(end) {
			x.t.Fatalf("never shows %q: %q", text, all)
		}
	}
}

// left waits for the end, and checks that the terminal is as it was.
func (x *terminal) left(exit int) {
	x.t.Helper()
	_ = testwatch.Wait(x.t, testwatch.Long, "the end of the command", x.ended)
	if got := x.cmd.ProcessState.ExitCode(); got != exit {
		x.t.Errorf("exit code %d, not %d", got, exit)
	}
	for end := time.Now().Add(testwatch.Long); ; time.Sleep(time.Millisecond) {
		x.mu.Lock()
		all := x.seen.String()
		x.mu.Unlock()
		if strings.Count(all, enterScreen) == 1+x.stops && strings.Count(all, leaveScreen) == 1+x.stops {
			break
		}
		if time.Now().After(end) {
			x.t.Fatalf("the screen is not left: %q", all)
		}
	}
	if now := x.state(); now != x.before {
		x.t.Errorf("the terminal's modes were %+v and are %+v", x.before, now)
	}
}

// TestTopScreen shows top on a terminal: keys, a smaller window, the end by a key and by a signal.
func TestTopScreen(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "st")
	for _, name := range []string{"one", "two"} {
		if code := run([]string{"vdisk", "-q", "--store", dir, "create", name, "1G"}); code != 0 {
			t.Fatal(code)
		}
	}
	x := onTerminal(t, "--store", dir, "top", "--all", "--interval", "10ms")
	screen := x.shows("(iops)")
	for _, want := range []string{"fill ", "cache hits: ", "VOLUME", "one ", "two ", "W-P99", "RATIO"} {
		if !strings.Contains(screen, want) {
			t.Errorf("the screen has no %q: %q", want, screen)
		}
	}
	if x.state() == x.before {
		t.Error("the terminal waits for whole lines, and echoes them")
	}
	x.typed("n")
	x.shows("(name)")
	x.typed("\x1b[Bp")
	x.shows("(p99)")
	x.resize(40, 8)
	screen = x.shows("1-1 of 2")
	if strings.Contains(screen, "W-P99") || strings.Contains(screen, "two") || strings.Count(screen, "\r\n") != 7 {
		t.Errorf("40 columns and 8 lines: %q", screen)
	}
	x.typed("j")
	if screen = x.shows("2-2 of 2"); !strings.Contains(screen, "two") {
		t.Errorf("scrolled: %q", screen)
	}
	x.typed("q")
	x.left(0)

	x = onTerminal(t, "--store", dir, "top", "--interval", "1h")
	x.shows("(iops)")
	if err := x.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	x.left(exitSignal + int(syscall.SIGTERM))

	x = onTerminal(t, "--store", dir, "top", "--interval", "1h")
	x.shows("(iops)")
	if err := x.cmd.Process.Signal(syscall.SIGTSTP); err != nil { // does not stop it: nobody could continue it
		t.Fatal(err)
	}
	x.shows(leaveScreen + enterScreen)
	x.stops = 1
	if err := x.cmd.Process.Signal(syscall.SIGQUIT); err != nil {
		t.Fatal(err)
	}
	x.left(2) // with all stacks

	x = onTerminal(t, "--store", dir, "top", "--interval", "10ms", "-n", "2")
	x.left(0)
}
