package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/schollz/progressbar/v3"
	"golang.org/x/sys/unix"
	"golang.org/x/term"
)

func isTerminal(stream any) bool {
	f, ok := stream.(interface{ Fd() uintptr })
	return ok && term.IsTerminal(int(f.Fd()))
}

// settle is how long a bar shows nothing. What is done within the first moment says nothing about the rate, and what
// has ended by then needs no bar.
const settle = 500 * time.Millisecond

// bar shows progress to people. Its zero value shows nothing.
type bar struct {
	bar     *progressbar.ProgressBar
	claim   *os.File // of the terminal
	since   time.Time
	now     func() time.Time
	settled bool
}

// progress starts a progress bar of bytes on standard error if that is a terminal. total is -1 if it is unknown.
func (a *app) progress(what string, total int64) *bar {
	return a.bar(what, total, ofBytes...)
}

// ofBytes are the options of a bar of bytes.
var ofBytes = []progressbar.Option{progressbar.OptionShowBytes(true), progressbar.OptionShowCount(), progressbar.OptionUseIECUnits(true)}

func (a *app) bar(what string, total int64, how ...progressbar.Option) *bar {
	if a.quiet || a.json || !isTerminal(rawOf(a.stderr)) {
		return &bar{}
	}
	claim, ok := claimTerminal(rawOf(a.stderr))
	if !ok {
		return &bar{}
	}
	b := newBar(rawOf(a.stderr), time.Now, what, total, how...)
	b.claim = claim
	return b
}

// claimTerminal reports whether this process may draw on a terminal. Of the processes that would, as in 'vdisk send |
// vdisk receive', the first one may, until the file is closed. Where that cannot be known, each may, and the file is nil.
func claimTerminal(stream any) (*os.File, bool) {
	f, ok := stream.(interface{ Fd() uintptr })
	if !ok {
		return nil, true
	}
	// The lock belongs to the open file, and processes of a pipeline share the one that the shell opened.
	own, err := os.OpenFile(fmt.Sprintf("/proc/self/fd/%d", f.Fd()), os.O_WRONLY|unix.O_NOCTTY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, true
	}
	if err := flock(own); err != nil {
		_ = own.Close() // nothing was written
		return nil, !errors.Is(err, unix.EWOULDBLOCK)
	}
	return own, true
}

func flock(f *os.File) error {
	raw, err := f.SyscallConn()
	if err != nil {
		return err
	}
	if cerr := raw.Control(func(fd uintptr) { err = unix.Flock(int(fd), unix.LOCK_EX|unix.LOCK_NB) }); cerr != nil {
		return cerr
	}
	return err
}

func newBar(w io.Writer, now func() time.Time, what string, total int64, how ...progressbar.Option) *bar {
	b := progressbar.NewOptions64(total, append(how[:len(how):len(how)],
		progressbar.OptionSetWriter(w),
		progressbar.OptionSetDescription(what),
		progressbar.OptionThrottle(100*time.Millisecond),
		progressbar.OptionClearOnFinish(),
		progressbar.OptionFullWidth(),
	)...)
	b.StartWithoutRender() // the rate counts from here
	return &bar{bar: b, since: now(), now: now}
}

func (b *bar) set(done int64) {
	if b.bar == nil {
		return
	}
	if b.settled = b.settled || b.now().Sub(b.since) >= settle; b.settled {
		_ = b.bar.Set64(done) // an error does not matter: it is only a picture
	}
}

func (b *bar) finish() {
	if b.bar != nil && b.settled {
		_ = b.bar.Clear()
	}
	if b.claim != nil {
		_ = b.claim.Close() // nothing was written
	}
}

// of is set for a progress that comes with its total.
func (b *bar) of(done, total int64) {
	if b.bar != nil {
		b.bar.ChangeMax64(total)
		b.set(done)
	}
}
