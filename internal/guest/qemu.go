package guest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// boot is one try at a run.
type boot struct {
	run     Run
	kernel  Kernel
	machine machine
	dir     string
	disks   disks
}

// qemuProgram returns $VDISK_GUEST_QEMU, or else the installed QEMU; "" if there is none.
func qemuProgram() string {
	if p := os.Getenv("VDISK_GUEST_QEMU"); p != "" {
		return p
	}
	return lookTool("qemu-system-x86_64")
}

// baseArgs returns the arguments for every machine: it has no devices but those asked for and no network, and a reset
// ends it.
func baseArgs(m machine, cpus, memory int) []string {
	return []string{
		"-accel", m.accel, "-cpu", m.cpu, "-smp", strconv.Itoa(cpus), "-m", strconv.Itoa(memory),
		"-nodefaults", "-no-user-config", "-display", "none", "-net", "none", "-no-reboot",
	}
}

// kernelArgs is the kernel's command line. Panics and oopses reset the machine, which ends QEMU. The initial console
// level shows only warnings.
//
// no_timer_check leaves out a test of the timer's interrupt, which panics on emulated processors when the host is busy.
//
// tsc=nowatchdog makes the kernel trust the time stamp counter, which is the host's clock. Otherwise the kernel
// compares it with the emulated timer, which is read late, and gives the counter up. For that the kernel patches its
// own code, which emulated processors of QEMU 7.2 may execute half patched ("Oops: int3" in sched_clock_cpu).
const kernelArgs = "console=ttyS0 panic=-1 oops=panic no_timer_check tsc=nowatchdog quiet loglevel=5 mitigations=off"

// args returns QEMU's arguments for this boot. File descriptor 3 is the socket behind the guest's port.
func (b boot) args(nonce, console string) []string {
	a := baseArgs(b.machine, b.run.CPUs, b.run.Memory)
	a = append(a, "-kernel", b.kernel.vmlinuz(), "-initrd", b.disks.initrd,
		"-append", strings.TrimSpace(kernelArgs+" vdisk.nonce="+nonce+b.systemdArgs()+" "+b.run.Append),
		"-chardev", "file,id=console,path="+escape(console), "-serial", "chardev:console")
	if b.run.Terminal {
		a = append(a, "-chardev", "stdio,id=terminal,signal=off", "-serial", "chardev:terminal")
	}
	a = append(a, "-device", "virtio-serial-pci", "-chardev", "socket,id=port,fd=3", "-device", "virtserialport,chardev=port,name=vdisk.0")
	scratchCache := "unsafe"
	if b.run.Durable {
		scratchCache = "writeback"
	}
	root, options := b.disks.root, "format=raw,snapshot=on,cache=unsafe"
	if b.disks.overlay != "" {
		root, options = b.disks.overlay, "format=qcow2,cache=unsafe"
	}
	for _, d := range []struct{ name, file, options string }{
		{"root", root, options},
		{"modules", b.disks.modules, "format=raw,readonly=on"},
		{"payload", b.disks.payload, "format=raw,readonly=on"},
		{"scratch", b.disks.scratch, "format=raw,discard=unmap,cache=" + scratchCache},
		{"results", b.disks.results, "format=raw,cache=unsafe"},
	} {
		if d.file == "" {
			continue
		}
		a = append(a, "-drive", fmt.Sprintf("if=none,id=%s,file=%s,%s", d.name, escape(d.file), d.options),
			"-device", fmt.Sprintf("virtio-blk-pci,drive=%s,serial=%s", d.name, d.name))
	}
	return a
}

// systemdArgs are for the first program of the guest, and for systemd.
func (b boot) systemdArgs() string {
	if !b.run.Systemd {
		return ""
	}
	return " vdisk.systemd systemd.unit=multi-user.target systemd.show_status=no"
}

// patience is limit, or longer with systemd.
func (b boot) patience(limit time.Duration) time.Duration {
	if b.run.Systemd {
		return systemdTimes * limit
	}
	return limit
}

// escape doubles commas, as the values of QEMU's options need.
func escape(s string) string { return strings.ReplaceAll(s, ",", ",,") }

// progress is what the guest's events have reported. The reader of the port sets it. Others read it only after that
// reader has ended, or after a channel was closed.
type progress struct {
	ready    chan struct{} // closed when the script starts
	exited   chan struct{} // closed when it has ended
	cut      chan struct{} // closed when it asks for a power cut
	exitCode int           // valid once exited is closed
}

func (p *progress) event(words []string, answer io.Writer) {
	switch {
	case len(words) == 1 && words[0] == "ready":
		closeOnce(p.ready)
	case len(words) == 1 && words[0] == "powercut":
		closeOnce(p.cut)
	case len(words) == 2 && words[0] == "exit" && !isClosed(p.exited):
		code, err := strconv.Atoi(words[1])
		if err != nil {
			return
		}
		p.exitCode = code
		close(p.exited)
		io.WriteString(answer, "done\n")
	}
}

func closeOnce(c chan struct{}) {
	if !isClosed(c) {
		close(c)
	}
}

func isClosed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

// bootOnce starts QEMU, passes on the payload's output, and makes sure that QEMU ends.
func bootOnce(ctx context.Context, b boot) (*Result, error) {
	console := filepath.Join(b.dir, "console.log")
	os.Remove(console) // left by an earlier try
	ours, theirs, err := portPair()
	if err != nil {
		return nil, err
	}
	defer ours.Close()
	nonce := newNonce()
	cmd := exec.Command(qemuProgram(), b.args(nonce, console)...)
	cmd.ExtraFiles = []*os.File{theirs}
	cmd.Env = append(os.Environ(), "TMPDIR="+b.dir) // for the overlay of the root disk
	var stderr tailBuffer
	cmd.Stderr = &stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if b.run.Terminal {
		cmd.Stdin, cmd.Stdout = os.Stdin, os.Stdout
	} else {
		cmd.SysProcAttr.Setpgid = true // a ^C is for the caller to handle
	}

	start := time.Now()
	q, err := startProcess(cmd)
	theirs.Close()
	if err != nil {
		return nil, fmt.Errorf("guest: %w", err)
	}
	p := &progress{ready: make(chan struct{}), exited: make(chan struct{}), cut: make(chan struct{}), exitCode: -1}
	out := newStream(nonce, b.run.Stdout, func(words []string) { p.event(words, ours) })
	read := make(chan struct{})
	go func() { // ends at the port's end of file, which comes when QEMU ends
		defer close(read)
		io.Copy(out, ours)
		out.flush()
	}()
	var bootTime time.Duration
	why := q.supervise(ctx, p, b.patience, func() { bootTime = time.Since(start) })
	// All that QEMU wrote is in the socket. The deadline is for a stray process that has inherited QEMU's end of it.
	ours.SetReadDeadline(time.Now().Add(5 * time.Second))
	<-read

	res := &Result{
		ExitCode: p.exitCode, PowerCut: isClosed(p.cut), Release: b.kernel.Release, Machine: b.machine.accel + " " + b.machine.cpu,
		Boot: bootTime, Elapsed: time.Since(start),
	}
	text, _ := os.ReadFile(console) // not there if QEMU did not start
	res.Console = string(text)
	res.Alerts = findAlerts(res.Console)
	if err := b.verdict(why, p, res, stderr.tail(10)); err != nil {
		return res, err
	}
	if out.err != nil {
		return res, fmt.Errorf("guest: passing the output on: %w", out.err)
	}
	return res, nil
}

// verdict turns the way in which a boot ended into the error of the run; nil if the payload ended or asked for a power
// cut.
func (b boot) verdict(why error, p *progress, res *Result, stderr string) error {
	detail := func(err error, text string) error {
		return fmt.Errorf("%w (kernel %s, %s, after %.1fs)%s\n%s%s", err, res.Release, res.Machine, res.Elapsed.Seconds(), text, stderr, lastLines(res.Console, 40))
	}
	switch {
	case isClosed(p.exited), isClosed(p.cut):
		return nil
	case errors.Is(why, context.DeadlineExceeded):
		return detail(ErrTimeout, fmt.Sprintf(": QEMU was killed after %v", b.run.Timeout))
	case errors.Is(why, context.Canceled):
		return detail(why, ": QEMU was killed")
	case !isClosed(p.ready):
		return detail(ErrBoot, "")
	case strings.Contains(res.Console, "Kernel panic"):
		return detail(ErrPanic, "")
	}
	return detail(ErrDied, "")
}

// portPair makes the socket behind the guest's port, and returns our end and QEMU's end.
func portPair() (ours net.Conn, theirs *os.File, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("guest: socket: %w", err)
	}
	f := os.NewFile(uintptr(fds[0]), "port")
	defer f.Close()
	theirs = os.NewFile(uintptr(fds[1]), "port of QEMU")
	if ours, err = net.FileConn(f); err != nil {
		theirs.Close()
		return nil, nil, fmt.Errorf("guest: socket: %w", err)
	}
	return ours, theirs, nil
}

// process is a started QEMU.
type process struct {
	cmd   *exec.Cmd
	ended chan struct{} // closed after Wait has returned
}

// startProcess starts cmd on a thread that lives as long as cmd runs, because PR_SET_PDEATHSIG fires when the starting
// thread ends.
func startProcess(cmd *exec.Cmd) (*process, error) {
	q := &process{cmd: cmd, ended: make(chan struct{})}
	started := make(chan error, 1)
	go func() { // ends when QEMU ends, which supervise makes sure of
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		started <- err
		if err == nil {
			cmd.Wait() // the guest's events, not QEMU's status, tell how it ended
			close(q.ended)
		}
	}()
	return q, <-started
}

// supervise returns when QEMU has ended. It kills QEMU when the context ends (and returns the context's error), when
// the guest does not come up or down in time, and when the guest asks for a power cut.
func (q *process) supervise(ctx context.Context, p *progress, patience func(time.Duration) time.Duration, onReady func()) error {
	defer func() { <-q.ended }()
	kill := func() {
		q.cmd.Process.Kill()
		if q.cmd.SysProcAttr.Setpgid {
			syscall.Kill(-q.cmd.Process.Pid, syscall.SIGKILL)
		}
	}
	limit := time.NewTimer(patience(bootTimeout))
	defer limit.Stop()
	ready, exited, cut := p.ready, p.exited, p.cut
	for {
		select {
		case <-q.ended:
			return nil
		case <-ctx.Done():
			kill()
			return ctx.Err()
		case <-limit.C:
			kill()
			return nil
		case <-cut:
			kill()
			return nil
		case <-ready:
			ready = nil
			onReady()
			if !isClosed(p.exited) {
				limit.Stop()
			}
		case <-exited:
			exited = nil
			limit.Reset(patience(endTimeout))
		}
	}
}
