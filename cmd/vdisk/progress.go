package main

import (
	"io"
	"time"

	"github.com/schollz/progressbar/v3"
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
	return newBar(rawOf(a.stderr), time.Now, what, total, how...)
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
}

// of is set for a progress that comes with its total.
func (b *bar) of(done, total int64) {
	if b.bar != nil {
		b.bar.ChangeMax64(total)
		b.set(done)
	}
}
