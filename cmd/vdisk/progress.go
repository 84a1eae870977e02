package main

import (
	"time"

	"github.com/schollz/progressbar/v3"
	"golang.org/x/term"
)

func isTerminal(stream any) bool {
	f, ok := stream.(interface{ Fd() uintptr })
	return ok && term.IsTerminal(int(f.Fd()))
}

// bar shows progress to people. Its zero value shows nothing.
type bar struct{ bar *progressbar.ProgressBar }

// progress starts a progress bar of bytes on standard error if that is a terminal. total is -1 if it is unknown.
func (a *app) progress(what string, total int64) *bar {
	return a.bar(what, total, progressbar.OptionShowBytes(true), progressbar.OptionUseIECUnits(true))
}

func (a *app) bar(what string, total int64, how ...progressbar.Option) *bar {
	if a.quiet || a.json || !isTerminal(rawOf(a.stderr)) {
		return &bar{}
	}
	return &bar{progressbar.NewOptions64(total, append(how,
		progressbar.OptionSetWriter(rawOf(a.stderr)),
		progressbar.OptionSetDescription(what),
		progressbar.OptionThrottle(100*time.Millisecond),
		progressbar.OptionClearOnFinish(),
		progressbar.OptionFullWidth(),
	)...)}
}

func (b *bar) set(done int64) {
	if b.bar != nil {
		_ = b.bar.Set64(done) // an error does not matter: it is only a picture
	}
}

func (b *bar) finish() {
	if b.bar != nil {
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
