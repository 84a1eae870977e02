package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/mattn/go-runewidth"
	"golang.org/x/sys/unix"
	"golang.org/x/term"

	"github.com/vdisk/vdisk/internal/metrics"
)

// What top tells the terminal (XTerm Control Sequences): the alternate screen leaves the user's own as it was.
const (
	enterScreen = "\x1b[?1049h\x1b[?25l\x1b[?7l" // alternate screen, no cursor, no wrapping of long lines
	leaveScreen = "\x1b[?7h\x1b[?25h\x1b[?1049l"
	toTop       = "\x1b[H"
	clearLine   = "\x1b[K"
	clearRest   = "\x1b[J"
	reverse     = "\x1b[7m"
	plainText   = "\x1b[0m"
)

// screen is top on a terminal.
type screen struct {
	a           *app
	view        topView
	out         io.Writer
	was         *term.State    // of the terminal, while it is raw
	signals     chan os.Signal // changes of its size, and what would leave it as it is
	before, now metrics.Reading
}

// topScreen shows top on the terminal until the user or ctx ends it, and leaves the terminal as it was.
func (a *app) topScreen(ctx context.Context, v topView, read readFunc) (err error) {
	s := &screen{a: a, view: v, out: rawOf(a.stdout), signals: make(chan os.Signal, 1)}
	if s.now, err = read(ctx); err != nil {
		return err
	}
	s.before = s.now
	defer s.leave()
	for _, sig := range []os.Signal{syscall.SIGWINCH, syscall.SIGTSTP, syscall.SIGQUIT} {
		if !signal.Ignored(sig) {
			signal.Notify(s.signals, sig)
		}
	}
	defer signal.Stop(s.signals)
	if err := s.enter(); err != nil {
		return err
	}
	return s.loop(ctx, read, keysOf(a.stdin))
}

// enter makes the terminal raw, and begins the screen.
func (s *screen) enter() (err error) {
	if isTerminal(s.a.stdin) {
		if s.was, err = term.MakeRaw(int(s.a.stdin.Fd())); err != nil {
			return err
		}
	}
	_, err = io.WriteString(s.out, enterScreen)
	return err
}

// signalled does what a signal asks for. One that stops or ends the process does so when the terminal is as it was.
func (s *screen) signalled(sig os.Signal) error {
	n, ok := sig.(syscall.Signal)
	if !ok || n == syscall.SIGWINCH {
		return nil // the size is read at each drawing
	}
	s.leave()
	signal.Reset(sig)
	runtime.LockOSThread() // this thread must not go on before the signal has come
	defer runtime.UnlockOSThread()
	err := unix.Tgkill(os.Getpid(), unix.Gettid(), n)
	signal.Notify(s.signals, sig)
	return errors.Join(err, s.enter())
}

// leave leaves the screen, and the terminal as it was, also after a signal, which ends other writes to standard output.
func (s *screen) leave() {
	w := s.out
	if o, ok := w.(output); ok {
		w = diagnostics{o.File, new(atomic.Int64)}
	}
	_, _ = io.WriteString(w, leaveScreen) // fails if the terminal is gone
	if s.was != nil {
		_ = term.Restore(int(s.a.stdin.Fd()), s.was) // as above
		s.was = nil
	}
}

// loop draws after each interval, each key, and each change of the terminal's size.
func (s *screen) loop(ctx context.Context, read readFunc, keys <-chan string) (err error) {
	tick := time.NewTicker(s.view.interval)
	defer tick.Stop()
	for n := 0; s.view.count == 0 || n < s.view.count; {
		if err := s.draw(); err != nil {
			return err
		}
		again := false
		select {
		case <-ctx.Done():
			return ctx.Err()
		case sig := <-s.signals:
			if err := s.signalled(sig); err != nil {
				return err
			}
		case key, there := <-keys:
			if !there { // the terminal is gone
				keys = nil
			} else if s.key(key) {
				return nil
			}
			again = key == " "
		case <-tick.C:
			again = true
		}
		if !again {
			continue
		}
		n++
		before := s.now
		if s.now, err = read(ctx); err != nil {
			return err
		}
		s.before = before
	}
	return nil
}

// keysOf sends what is typed. Its goroutine ends with the terminal or the process: a read of a terminal cannot be
// cancelled.
func keysOf(f *os.File) <-chan string {
	keys := make(chan string)
	go func() {
		defer close(keys)
		b := make([]byte, 16)
		for isTerminal(f) {
			n, err := f.Read(b)
			if err != nil {
				return
			}
			keys <- string(b[:n])
		}
	}()
	return keys
}

// key does what keys ask for, and reports whether that is the end. Several that were typed at once may come together.
func (s *screen) key(typed string) (end bool) {
	for len(typed) > 0 {
		n := 1
		if strings.HasPrefix(typed, "\x1b[") && len(typed) > 2 {
			n = 3
		}
		switch typed[:n] {
		case "q", "Q", "\x03", "\x04": // and ^C and ^D
			return true
		case "i":
			s.view.order = "iops"
		case "b":
			s.view.order = "bytes"
		case "p":
			s.view.order = "p99"
		case "n":
			s.view.order = "name"
		case "a":
			s.view.all = !s.view.all
		case "j", "\x1b[B":
			s.view.first++
		case "k", "\x1b[A":
			s.view.first = max(0, s.view.first-1)
		}
		typed = typed[n:]
	}
	return false
}

// draw draws the whole screen anew, in one write.
func (s *screen) draw() error {
	width, height := terminalWidth(s.a.stdout), 24
	if f, ok := s.out.(interface{ Fd() uintptr }); ok {
		if _, h, err := term.GetSize(int(f.Fd())); err == nil {
			height = h
		}
	}
	j := topOf(s.before, s.now, s.view)
	head, table := s.a.topHead(j), s.a.topTable(j, width)
	room := max(1, height-len(head)-2) // for the list, without its head and the last line
	list := table[1:]
	s.view.first = min(s.view.first, max(0, len(list)-room))
	last := min(len(list), s.view.first+room)

	var text strings.Builder
	text.WriteString(toTop)
	put := func(line, before, after string) {
		text.WriteString(before + runewidth.Truncate(line, width, "…") + after + clearLine + "\r\n")
	}
	lines := 0
	for _, line := range head {
		if lines++; lines < height {
			put(line, "", "")
		}
	}
	if lines++; lines < height {
		put(runewidth.FillRight(table[0], width), reverse, plainText)
	}
	for _, line := range list[s.view.first:last] {
		if lines++; lines < height {
			put(line, "", "")
		}
	}
	help := fmt.Sprintf("q quit   sort: i iops  b bytes  p p99  n name (%s)   a all", s.view.order)
	if len(list) > room {
		help = fmt.Sprintf("%d-%d of %d, arrows scroll   ", s.view.first+1, last, len(list)) + help
	}
	text.WriteString(clearRest + runewidth.Truncate(help, width, "…"))
	_, err := io.WriteString(s.out, text.String())
	return err
}
