package faulty

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Call is a system call on a file that is about to be made.
type Call struct {
	Name string // "open", "create", "write" …; see calls
	Path string // of the file, or of the name
	Size int    // bytes to transfer, of a read and a write
}

// String returns the call for a message.
func (c Call) String() string { return c.Name + " " + c.Path }

// Transfers reports whether the call can be half done.
func (c Call) Transfers() bool { return c.Size > 1 }

// Fault says what becomes of a call. The zero value lets it be made.
type Fault struct {
	Err  syscall.Errno   // what the call returns; 0: that it was made
	Half bool            // only the first half of the bytes is transferred, whatever the call returns
	Wait <-chan struct{} // the call waits for this before anything else
}

// Judge is asked what becomes of a call. It is asked for one call at a time.
type Judge func(Call) Fault

// Run calls fn on a thread of its own, and makes that thread's calls faulty. What fn does in other goroutines is not.
func Run(judge Judge, fn func()) error {
	end, atEnd, err := os.Pipe()
	if err != nil {
		return err
	}
	defer end.Close()
	listener, done := make(chan int, 1), make(chan error, 1)
	go func() {
		defer close(done)
		defer atEnd.Close()
		runtime.LockOSThread() // for ever: the thread ends with the goroutine, and the filter with the thread
		fd, err := install()
		listener <- fd
		if err != nil {
			done <- err
			return
		}
		fn()
	}()
	fd := <-listener
	if fd < 0 {
		return <-done
	}
	err = supervise(fd, int(end.Fd()), judge)
	return errors.Join(err, <-done)
}

// Start starts a command whose calls are faulty; it must have no ExtraFiles. The caller calls wait instead of cmd.Wait.
func Start(cmd *exec.Cmd, judge Judge) (wait func() error, err error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	ours, theirs := os.NewFile(uintptr(pair[0]), "listener"), os.NewFile(uintptr(pair[1]), "listener")
	defer ours.Close()
	if cmd.Env == nil {
		cmd.Env = os.Environ()
	}
	cmd.Env = append(cmd.Env, commandEnv+"="+cmd.Path)
	cmd.Path, cmd.ExtraFiles = self, []*os.File{theirs}
	err = cmd.Start()
	_ = theirs.Close()
	if err != nil {
		return nil, err
	}
	fd, err := receive(pair[0])
	if err != nil {
		return nil, fmt.Errorf("no filter: %w; %w", err, cmd.Wait())
	}
	ended := make(chan error, 1)
	go func() { ended <- supervise(fd, -1, judge) }()
	return func() error {
		err := cmd.Wait()
		if serr := <-ended; serr != nil {
			return serr
		}
		return err
	}, nil
}

func receive(socket int) (fd int, err error) {
	p, oob := make([]byte, 1), make([]byte, unix.CmsgSpace(4))
	n, oobn, _, _, err := unix.Recvmsg(socket, p, oob, unix.MSG_CMSG_CLOEXEC)
	if err != nil || n == 0 {
		return -1, fmt.Errorf("receive it: %d bytes, %w", n, err)
	}
	msgs, err := unix.ParseSocketControlMessage(oob[:oobn])
	if err != nil {
		return -1, err
	}
	fds, err := unix.ParseUnixRights(&msgs[0])
	if err != nil {
		return -1, err
	}
	return fds[0], nil
}

// notification is struct seccomp_notif, and answer is struct seccomp_notif_resp.
type notification struct {
	id    uint64
	pid   uint32 // of the thread
	flags uint32
	nr    int32
	arch  uint32
	ip    uint64
	args  [6]uint64
}

type answer struct {
	id    uint64
	val   int64
	err   int32
	flags uint32
}

func ioctl(fd int, req uintptr, p unsafe.Pointer) error {
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), req, uintptr(p))
	if errno != 0 {
		return errno
	}
	return nil
}

// supervise answers calls until nobody has the filter any more, or until end is readable. (The main thread does not end
// with its goroutine.) It closes the listener.
func supervise(listener, end int, judge Judge) error {
	var mu sync.Mutex
	var wg sync.WaitGroup
	defer unix.Close(listener)
	defer wg.Wait()
	for {
		p := []unix.PollFd{{Fd: int32(listener), Events: unix.POLLIN}, {Fd: int32(end), Events: unix.POLLIN}}
		if _, err := unix.Poll(p, -1); err == unix.EINTR {
			continue
		} else if err != nil {
			return fmt.Errorf("wait for calls: %w", err)
		}
		if p[0].Revents&unix.POLLIN == 0 {
			return nil
		}
		n := new(notification)
		switch err := ioctl(listener, unix.SECCOMP_IOCTL_NOTIF_RECV, unsafe.Pointer(n)); err {
		case nil:
		case unix.ENOENT, unix.EINTR: // it was killed, or a signal came first
			continue
		default:
			return fmt.Errorf("receive a call: %w", err)
		}
		wg.Go(func() {
			c := n.call()
			mu.Lock()
			f := judge(c)
			mu.Unlock()
			if f.Wait != nil {
				<-f.Wait
			}
			a := n.answer(c, f)
			_ = ioctl(listener, unix.SECCOMP_IOCTL_NOTIF_SEND, unsafe.Pointer(&a)) // it may have been killed
		})
	}
}

// call returns what the test is told of a call.
func (n *notification) call() Call {
	s := calls[uintptr(n.nr)]
	c := Call{Name: s.name}
	if s.size > 0 {
		c.Size = int(n.args[s.size])
	}
	if n.nr == unix.SYS_OPENAT && n.args[2]&(unix.O_CREAT|unix.O_TMPFILE&^unix.O_DIRECTORY) != 0 {
		c.Name = "create"
	}
	at := int32(n.args[s.at])
	if at != unix.AT_FDCWD {
		c.Path, _ = os.Readlink(fmt.Sprintf("/proc/%d/fd/%d", n.pid, at))
		c.Path = strings.TrimSuffix(c.Path, " (deleted)")
	} else {
		c.Path, _ = os.Readlink(fmt.Sprintf("/proc/%d/cwd", n.pid))
	}
	if s.path > 0 {
		if p := n.text(n.args[s.path]); filepath.IsAbs(p) {
			c.Path = filepath.Clean(p)
		} else {
			c.Path = filepath.Join(c.Path, p)
		}
	}
	return c
}

// text returns the string at an address of the caller, up to the end of its page if it is longer.
func (n *notification) text(addr uint64) string {
	var p [4096]byte
	most := min(len(p), 4096-int(addr%4096))
	got, err := n.copy(p[:most], addr, false)
	if err != nil {
		return ""
	}
	s, _, _ := strings.Cut(string(p[:got]), "\x00")
	return s
}

// copy copies from the caller's memory at an address, or to it.
func (n *notification) copy(p []byte, addr uint64, to bool) (int, error) {
	ours := []unix.Iovec{{Base: &p[0]}}
	ours[0].SetLen(len(p))
	theirs := []unix.RemoteIovec{{Base: uintptr(addr), Len: len(p)}}
	if to {
		return unix.ProcessVMWritev(int(n.pid), ours, theirs, 0)
	}
	return unix.ProcessVMReadv(int(n.pid), ours, theirs, 0)
}

// answer does what a fault says, and returns what the call returns.
func (n *notification) answer(c Call, f Fault) answer {
	a := answer{id: n.id, err: -int32(f.Err)}
	if f.Half && c.Transfers() {
		done, err := n.transfer(c.Size / 2)
		switch {
		case err != nil:
			a.err = -int32(unix.EPROTO) // a fault of this package: no test expects that error
		case f.Err == 0:
			a.val = int64(done)
		}
		return a
	}
	if f.Err == 0 {
		a.flags = unix.SECCOMP_USER_NOTIF_FLAG_CONTINUE
	}
	return a
}

// transfer does the first size bytes of a read or a write, through the caller's own open file.
func (n *notification) transfer(size int) (done int, err error) {
	s := calls[uintptr(n.nr)]
	fd, err := n.descriptor(int(int32(n.args[s.at])))
	if err != nil {
		return 0, err
	}
	defer unix.Close(fd)
	p, addr, off := make([]byte, size), n.args[s.size-1], int64(n.args[s.size+1])
	if !s.in {
		if _, err := n.copy(p, addr, false); err != nil {
			return 0, err
		}
		if s.pos {
			return unix.Pwrite(fd, p, off)
		}
		return unix.Write(fd, p)
	}
	if s.pos {
		done, err = unix.Pread(fd, p, off)
	} else {
		done, err = unix.Read(fd, p)
	}
	if err != nil || done == 0 {
		return done, err
	}
	return n.copy(p[:done], addr, true)
}

// descriptor returns a descriptor of the caller's open file.
func (n *notification) descriptor(fd int) (int, error) {
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", n.pid))
	if err != nil {
		return -1, err
	}
	_, rest, _ := strings.Cut(string(status), "\nTgid:")
	var pid int
	if _, err := fmt.Sscan(rest, &pid); err != nil {
		return -1, err
	}
	process, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return -1, err
	}
	defer unix.Close(process)
	return unix.PidfdGetfd(process, fd, 0)
}
