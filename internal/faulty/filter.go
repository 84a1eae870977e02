package faulty

import (
	"fmt"
	"os"
	"runtime"
	"slices"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// shape says where a system call has what the package wants to know.
type shape struct {
	name string
	at   int  // the argument with the descriptor
	path int  // the argument with a path relative to it; 0: none
	size int  // the argument with the number of bytes to transfer, next to the one with their place; 0: none
	pos  bool // the argument after size is the position in the file
	in   bool // the transfer is into memory
}

// calls are the system calls that a filter stops.
var calls = map[uintptr]shape{
	unix.SYS_OPENAT:          {name: "open", path: 1},
	unix.SYS_READ:            {name: "read", size: 2, in: true},
	unix.SYS_PREAD64:         {name: "read", size: 2, pos: true, in: true},
	unix.SYS_PREADV2:         {name: "tryread"},
	unix.SYS_WRITE:           {name: "write", size: 2},
	unix.SYS_PWRITE64:        {name: "write", size: 2, pos: true},
	unix.SYS_COPY_FILE_RANGE: {name: "copy", at: 2},
	unix.SYS_FSYNC:           {name: "sync"},
	unix.SYS_FDATASYNC:       {name: "sync"},
	unix.SYS_SYNC_FILE_RANGE: {name: "startwrite"},
	unix.SYS_FALLOCATE:       {name: "allocate"},
	unix.SYS_FTRUNCATE:       {name: "truncate"},
	unix.SYS_UNLINKAT:        {name: "remove", path: 1},
	unix.SYS_RENAMEAT:        {name: "rename", path: 1},
	unix.SYS_RENAMEAT2:       {name: "rename", path: 1},
	unix.SYS_MKDIRAT:         {name: "mkdir", path: 1},
	unix.SYS_GETDENTS64:      {name: "list"},
	unix.SYS_FSTATFS:         {name: "statfs"},
	unix.SYS_FSTAT:           {name: "stat"},
	fstatat:                  {name: "stat", path: 1},
	unix.SYS_FLOCK:           {name: "lock"},
	unix.SYS_FCHMOD:          {name: "chmod"},
}

// install makes those system calls of the calling thread wait for an answer, which the holder of the listener gives.
func install() (listener int, err error) {
	prog := []unix.SockFilter{
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: 4}, // seccomp_data.arch
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: auditArch, Jt: 1},
		{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ALLOW},
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: 0}, // seccomp_data.nr
	}
	n := len(calls)
	i := 0
	for nr := range calls {
		prog = append(prog, unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: uint32(nr), Jt: uint8(n - i)})
		i++
	}
	prog = append(prog,
		unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ALLOW},
		unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_USER_NOTIF})
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return -1, fmt.Errorf("prctl: %w", err)
	}
	p := unix.SockFprog{Len: uint16(len(prog)), Filter: &prog[0]}
	// A call that was handed over is not interrupted by the signals with which Go preempts: it would be made twice.
	const flags = unix.SECCOMP_FILTER_FLAG_NEW_LISTENER | unix.SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV
	fd, _, errno := unix.RawSyscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, flags, uintptr(unsafe.Pointer(&p)))
	if errno != 0 {
		return -1, fmt.Errorf("seccomp: %w", errno)
	}
	return int(fd), nil
}

// commandEnv makes a test binary install the filter and become the command that the variable names.
const commandEnv = "VDISK_FAULTY_COMMAND"

// listenerSocket is the descriptor of the socket over which it sends the listener.
const listenerSocket = 3

func init() {
	path := os.Getenv(commandEnv)
	if path == "" {
		return
	}
	runtime.LockOSThread()
	env := slices.DeleteFunc(os.Environ(), func(e string) bool { return len(e) > len(commandEnv) && e[:len(commandEnv)] == commandEnv })
	fd, err := install()
	if err == nil {
		err = unix.Sendmsg(listenerSocket, []byte{0}, unix.UnixRights(fd), nil, 0)
	}
	if err == nil {
		unix.CloseOnExec(fd)
		unix.CloseOnExec(listenerSocket)
		err = syscall.Exec(path, os.Args, env)
	}
	println("faulty:", err.Error()) // not through the filter
	os.Exit(97)
}
