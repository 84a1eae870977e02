package ublk

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestCallsOfAllThreads: system calls that Go makes on every thread of the process, as for syscall.Setgid, do not wait
// for an idle queue.
func TestCallsOfAllThreads(t *testing.T) {
	needNullCommands(t)
	if os.Getenv("UBLK_TEST_ALL_THREADS") != "1" { // it stops the process if it does not work
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		defer cancel()
		cmd := exec.CommandContext(ctx, os.Args[0], "-test.run=^TestCallsOfAllThreads$")
		cmd.Env = append(os.Environ(), "UBLK_TEST_ALL_THREADS=1")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("%v\n%s", errors.Join(err, ctx.Err()), out)
		}
		return
	}
	waits := make(chan struct{}, 2)
	q, end := nullQueue(t, 2, handlerFunc(func(*Request) error { waits <- struct{}{}; return ErrAsync }))
	<-waits
	<-waits
	for !q.asleep.Load() {
		time.Sleep(time.Millisecond)
	}
	time.Sleep(50 * time.Millisecond) // to be in its system call
	for range 3 {
		if _, _, errno := syscall.AllThreadsSyscall(unix.SYS_GETPID, 0, 0, 0); errno != 0 && errno != syscall.ENOTSUP {
			t.Error(errno)
		}
	}
	waitEnd(t, q, end)
}
