package owner

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/vdisk/vdisk/cow"
	"github.com/vdisk/vdisk/internal/storage"
)

// ReadyFD is the file descriptor on which a daemon reports to its starter whether it could start.
const ReadyFD = 3

const (
	daemonLog      = "daemon.log"
	daemonLogBytes = 1 << 20 // a larger log is renamed at the next start, and a new one begun
)

// readyAnswer is what a daemon sends when it is ready. A daemon that fails sends an Error.
var readyAnswer = []byte("{}")

// OpenLasting opens the store at dir through a lasting owner: the present one, or a daemon that it starts by running
// this program with args. started reports whether it started one. The daemon must call Ready.
func OpenLasting(ctx context.Context, dir string, o Options, args []string) (c *Client, started bool, err error) {
	if err := refuseWaiting(ctx, dir, o.withDefaults()); err != nil {
		return nil, false, err
	}
	c, err = retry(ctx, o, func() (*Client, error) {
		c, s, err := connect(ctx, dir, o)
		if errors.Is(err, ErrNoOwner) {
			if err := startDaemon(ctx, dir, args); err != nil {
				return nil, err
			}
			started = true
			c, s, err = connect(ctx, dir, o)
		}
		if err == nil && s.Temporary {
			return nil, errors.Join(&cow.LockedError{Dir: dir, Holder: fmt.Sprintf("pid %d (%s)", s.PID, s.Command)}, c.Close())
		}
		return c, err
	})
	return c, started, err
}

// startDaemon starts a daemon and waits until it is ready or has failed.
func startDaemon(ctx context.Context, dir string, args []string) error {
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	defer r.Close()
	cmd := exec.Command("/proc/self/exe", args...)
	cmd.Args[0] = startedFrom // the daemon looks for its next version there
	cmd.Dir = "/"
	cmd.ExtraFiles = []*os.File{w} // becomes ReadyFD
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	err = cmd.Start()
	_ = w.Close()
	if err != nil {
		return fmt.Errorf("starting the daemon: %w", err)
	}
	stop := context.AfterFunc(ctx, func() { _ = cmd.Process.Signal(syscall.SIGTERM) })
	defer stop()
	answer, err := io.ReadAll(io.LimitReader(r, maxRequest))
	if err == nil && bytes.Equal(answer, readyAnswer) {
		return cmd.Process.Release()
	}
	werr := cmd.Wait()
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	e := new(Error)
	if json.Unmarshal(answer, e) == nil && e.Message != "" {
		return e.original(dir)
	}
	return fmt.Errorf("the daemon ended before it was ready: %w", errors.Join(err, werr))
}

// original turns a daemon's error that the store is locked into a cow.LockedError again, so that it is retried.
func (e *Error) original(dir string) error {
	if errors.Is(e, errLocked) {
		return &cow.LockedError{Dir: dir, Holder: Holder(dir)}
	}
	return e
}

// Ready tells the process that started this daemon that it works (err is nil), or why it does not. From then on the
// daemon's output goes to the store's log, since its starter may be gone. If the folder could not be opened as a store,
// there is no log.
func Ready(dir string, foreign bool, err error) error {
	w := os.NewFile(ReadyFD, "ready pipe")
	syscall.CloseOnExec(ReadyFD)
	if err == nil {
		err = printToLog(dir, foreign)
	}
	answer := readyAnswer
	if err != nil {
		answer = message(err)
	}
	_, werr := w.Write(answer)
	return errors.Join(err, werr, w.Close())
}

// printToLog redirects standard output and standard error to the store's log.
func printToLog(dir string, foreign bool) error {
	in, err := storage.OpenFolder(dir, foreign)
	if err != nil {
		return err
	}
	defer in.Close()
	if st, err := in.Lstat(daemonLog); err == nil && st.Size > daemonLogBytes {
		if err := in.Rename(daemonLog, daemonLog+".old"); err != nil {
			return err
		}
	}
	f, err := in.Open(daemonLog, os.O_WRONLY|os.O_CREATE|os.O_APPEND)
	if err != nil {
		return err
	}
	defer f.Close()
	for _, fd := range []int{1, 2} {
		if err := unix.Dup3(int(f.Fd()), fd, 0); err != nil {
			return fmt.Errorf("connecting descriptor %d with %s: %w", fd, f.Name(), err)
		}
	}
	return nil
}
