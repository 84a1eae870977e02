package owner

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vdisk/vdisk/cow"
	"github.com/vdisk/vdisk/internal/journal"
)

// An upgrade, as the old program sees it:
//
//	the new program is asked for its version → no new session begins, and the present ones end
//	→ the NBD services are paused → the devices are quiesced → the client is answered → the store is closed
//	→ this process executes the new program
//
// The new program opens the store, finds the waiting devices and recovers them. If that fails, it executes the old
// program again. It was given the old program as an open file, since the old program's path now has the new file.

// HandoverVersion is the version of the hand-over. A program can take over only from one with the same version.
const HandoverVersion = 1

const (
	programTimeout = 20 * time.Second // for the new program to print its version
	quiesceTimeout = 60 * time.Second // for the requests of the devices to finish
	upgradeTimeout = 3 * time.Minute  // for the whole upgrade, as the client sees it
)

// Program is a version of the vdisk program.
type Program struct {
	Path     string `json:"-"`
	Version  string `json:"version"`
	Format   int    `json:"store_format"` // the newest store format that it knows
	Handover int    `json:"handover"`
	NBD      int    `json:"handover_nbd"`

	handed *handed // what it gets of NBD services; nil: nothing
}

// Upgrade describes an upgrade.
type Upgrade struct {
	From, To string
	Program  string `json:",omitempty"` // the file that is executed
	Same     bool   `json:",omitempty"` // it is the running program itself
	Clients  int    `json:",omitempty"` // connections of NBD clients that are handed over
	Ended    int    `json:",omitempty"` // those that cannot be, as they have TLS or have opened nothing yet
}

// askProgram runs the program at path to learn its version.
func askProgram(ctx context.Context, path string) (Program, error) {
	ctx, cancel := context.WithTimeout(ctx, programTimeout)
	defer cancel()
	p := Program{Path: path}
	out, err := exec.CommandContext(ctx, path, "version", "--json").Output()
	if err != nil {
		return p, fmt.Errorf("asking %s for its version: %w", path, err)
	}
	if err := json.Unmarshal(out, &p); err != nil || p.Version == "" {
		return p, fmt.Errorf("%s does not print its version (%.80q): %w", path, out, cow.ErrInvalid)
	}
	return p, nil
}

// findSuccessor returns the program that would take over, if it can.
func (o *Owner) findSuccessor(ctx context.Context) (*Program, error) {
	path := o.opts.program
	if path == "" {
		path = startedFrom
	}
	p, err := askProgram(ctx, path)
	if err != nil {
		return nil, err
	}
	if have := o.store.Info().Version; p.Format < have {
		return nil, fmt.Errorf("%s (version %s) knows store formats up to %d, and the store has %d: %w", path, p.Version, p.Format, have, cow.ErrVersion)
	}
	if p.Handover != HandoverVersion {
		return nil, fmt.Errorf("%s (version %s) cannot take over from a running daemon: %w: detach the devices and stop this one (pid %d)",
			path, p.Version, ErrUnsupported, os.Getpid())
	}
	return &p, nil
}

// Upgrade prepares the hand-over to the program that is now at the path from which this one was started. The owner's
// CloseWhen… methods then return, and Successor returns the program to execute. If Upgrade fails, everything is as
// before.
func (o *Owner) Upgrade(ctx context.Context) (Upgrade, error) { return o.upgrade(ctx, 0) }

// upgrade is Upgrade. asking is the number of sessions that ask for it: 1 from a client, otherwise 0.
func (o *Owner) upgrade(ctx context.Context, asking int) (Upgrade, error) {
	u := Upgrade{From: o.opts.Version}
	if !o.opts.Replaceable {
		return u, fmt.Errorf("the store is in use by %s, which is no daemon: %w: let it end, the next owner is the new program", o.holder(), cow.ErrBusy)
	}
	next, err := o.findSuccessor(ctx)
	if err == nil && next.NBD != NBDHandoverVersion {
		err = o.noServices(next)
	}
	if err != nil {
		return u, err
	}
	u.To, u.Program, u.Same = next.Version, next.Path, runs(next.Path)
	if err := o.stopAccepting(ctx, asking); err != nil {
		return u, err
	}
	// From here on the client may leave: the upgrade will be completed or undone.
	bounded, cancel := context.WithTimeout(context.WithoutCancel(ctx), quiesceTimeout)
	defer cancel()
	if err := o.quiesce(bounded, next, &u); err != nil {
		return u, err
	}
	o.opts.Logger.Info("handing over", "to", next.Version, "program", next.Path)
	o.note(ctx, journal.Entry{Kind: "upgrade", Details: map[string]any{"from": u.From, "to": next.Version}}, nil)
	err = o.record()
	o.notify()
	return u, err
}

// quiesce stops all that is served, and makes next the successor. If it fails, all is served as before.
func (o *Owner) quiesce(ctx context.Context, next *Program, u *Upgrade) (err error) {
	if next.NBD == NBDHandoverVersion {
		next.handed, err = o.pauseServices(ctx)
	} else { // a session that ended meanwhile may have become a service
		err = o.noServices(next)
	}
	if err != nil {
		o.startAccepting()
		return err
	}
	if next.handed != nil {
		u.Clients = next.handed.clients()
		u.Ended = o.nbdConnections() - u.Clients
	}
	err = o.endServing(ctx, func(b block) error { return b.Quiesce(ctx) })
	o.mu.Lock()
	o.accepting = err != nil
	if err == nil {
		o.successor = next
	}
	o.mu.Unlock()
	if err != nil {
		if next.handed != nil {
			next.handed.close()
			o.continueServices()
		}
		_, rerr := o.Recover(o.life, "")
		return errors.Join(fmt.Errorf("the devices cannot be quiesced: %w", err), rerr)
	}
	return nil
}

// handsOver reports whether another program goes on with the NBD services.
func (o *Owner) handsOver() bool {
	next := o.Successor()
	return next != nil && next.handed != nil
}

// nbdConnections returns how many connections NBD clients have.
func (o *Owner) nbdConnections() (n int) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for _, s := range o.services {
		n += int(s.listener.open.Load())
	}
	return n
}

// noServices returns an error if there are services that somebody depends on, since next cannot go on with them.
func (o *Owner) noServices(next *Program) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	var names []string
	for _, s := range o.services {
		i := s.info()
		switch {
		case s.inUse():
			names = append(names, fmt.Sprintf("%s (%d clients)", i.Socket, i.Clients))
		case !s.made:
			names = append(names, i.Socket+" (from the service manager)")
		}
	}
	if len(names) == 0 {
		return nil
	}
	return fmt.Errorf("NBD clients are served at %s, and version %s cannot take them over: %w: end those clients ('vdisk disconnect'), or that 'vdisk serve', first, or restart the service",
		strings.Join(names, ", "), next.Version, cow.ErrBusy)
}

// stopAccepting prevents new sessions, and waits for the present ones, except the number that ask for the upgrade. If
// they do not end in time, it permits sessions again and fails.
func (o *Owner) stopAccepting(ctx context.Context, asking int) error {
	ctx, cancel := context.WithTimeout(ctx, o.opts.sessionTimeout)
	defer cancel()
	o.mu.Lock()
	defer o.mu.Unlock()
	if !o.accepting || o.stopping || o.starting { // its services would be lost that are still to go on
		return errStopping
	}
	o.accepting = false
	for o.sessions > asking {
		o.waitLocked(ctx)
		if ctx.Err() != nil && o.sessions > asking {
			o.accepting = true
			return fmt.Errorf("%d other commands are at work with the store: %w: try again when they have ended", o.sessions-asking, cow.ErrBusy)
		}
	}
	return nil
}

func (o *Owner) startAccepting() {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.accepting = true
	o.notifyLocked()
}

// Successor returns the program to execute after an upgrade has closed the owner, or nil if there was no upgrade.
func (o *Owner) Successor() *Program {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.successor
}

// successorProcess returns the process that the store is handed over to, or nil outside a hand-over.
func (o *Owner) successorProcess() *process {
	if o.Successor() == nil {
		return nil
	}
	p := thisProcess()
	return &p
}

// Handover is what a program passes to the one that it executes.
type Handover struct {
	From   string // the version of the passing program
	Back   int    // a file descriptor of the passing program; 0: there is no way back
	Failed string // why the new program went back to the old one
	// Program is the path where the next version is looked for: the one that the first of these programs was started
	// from.
	Program string `json:",omitempty"`
	// NBD is the file descriptor of the file about NBD services; 0: there is none.
	NBD int `json:",omitempty"`

	handed *handed
	unread error // why that file could not be read
}

const handoverEnv = "VDISK_HANDOVER"

// TakeHandover returns the hand-over to a program that an upgrade executed, or nil if there was no upgrade.
func TakeHandover() *Handover {
	text := os.Getenv(handoverEnv)
	if text == "" {
		return nil
	}
	_ = os.Unsetenv(handoverEnv)
	h := new(Handover)
	if json.Unmarshal([]byte(text), h) != nil {
		return nil
	}
	if h.Back != 0 {
		syscall.CloseOnExec(h.Back)
	}
	if h.Program != "" {
		startedFrom = h.Program
	}
	if h.NBD != 0 {
		h.handed, h.unread = readHanded(h.NBD)
	}
	return h
}

// execute replaces the program of this process. It returns only if that fails.
func execute(path string, h Handover) error {
	h.Program = startedFrom
	if h.handed != nil {
		h.NBD = int(h.handed.file.Fd())
		h.handed.keepInExec(true)
		defer h.handed.keepInExec(false)
	}
	b, err := json.Marshal(h)
	if err == nil {
		err = syscall.Exec(path, os.Args, append(os.Environ(), handoverEnv+"="+string(b)))
	}
	return fmt.Errorf("executing %s: %w", path, err)
}

// Execute replaces this program, whose version is from, with p. It returns only if that fails.
func (p *Program) Execute(from string) error {
	back, err := unix.Open("/proc/self/exe", unix.O_RDONLY, 0) // not O_CLOEXEC: p needs it
	if err != nil {
		return fmt.Errorf("keeping the present program: %w", err)
	}
	err = execute(p.Path, Handover{From: from, Back: back, handed: p.handed})
	_ = unix.Close(back)
	return err
}

// Undone returns the hand-over from a program, whose version is from, to itself, after Execute has failed.
func (p *Program) Undone(from string) *Handover { return &Handover{From: from, handed: p.handed} }

// Return executes the program that executed this one, because of cause. self is this program's version. Return returns
// only if that fails.
func (h *Handover) Return(self string, cause error) error {
	if h.Back == 0 {
		return cause
	}
	back := Handover{From: self, Failed: oneLine(cause), handed: h.handed}
	if h.unread != nil {
		back.NBD = h.NBD // the descriptors are as they were
	}
	err := execute(fmt.Sprintf("/proc/self/fd/%d", h.Back), back)
	return errors.Join(cause, err)
}

// Done closes the way back, and the descriptors that GoOn has taken over, once they are no longer needed.
func (h *Handover) Done() {
	if h.Back != 0 {
		_ = unix.Close(h.Back)
		h.Back = 0
	}
	h.handed.close()
	h.handed = nil
}

// UpgradeDaemon makes the daemon that owns the store at dir hand over to the program that is now at the path from which
// the daemon was started, and waits until the new program has recovered the devices and serves all NBD clients. It fails
// with ErrNoOwner if nobody owns the store.
func UpgradeDaemon(ctx context.Context, dir string, o Options) (Upgrade, error) {
	if err := refuseWaiting(ctx, dir, o.withDefaults()); err != nil {
		return Upgrade{}, err
	}
	u, old, err := askUpgrade(ctx, dir, o)
	if errors.Is(err, errStopping) {
		err = fmt.Errorf("%w: %w", cow.ErrBusy, err)
	}
	if err != nil {
		return u, err
	}
	ctx, cancel := context.WithTimeout(ctx, upgradeTimeout)
	defer cancel()
	for {
		now, err := Running(ctx, dir, o)
		switch {
		case err == nil && now.Starting:
		case err == nil && now.Handover != "":
			return u, fmt.Errorf("the new program gave the store back to version %s: %s", now.Version, now.Handover)
		case err == nil && (now.PID != old.PID || !now.Started.Equal(old.Started)):
			u.To = now.Version
			if pending, err := servesAgain(old.Devices, now.Devices); !pending {
				return u, err
			}
		case !old.process().alive():
			return u, errors.New("the daemon ended while it was upgraded: its log is STORE/daemon.log, or its service's; 'vdisk recover' goes on")
		}
		select {
		case <-ctx.Done():
			return u, fmt.Errorf("the daemon (pid %d) does not answer after its upgrade: %w", old.PID, context.Cause(ctx))
		case <-time.After(retryEvery):
		}
	}
}

// askUpgrade waits until the daemon has started, and asks it for an upgrade. It returns the status before.
func askUpgrade(ctx context.Context, dir string, o Options) (u Upgrade, old Status, err error) {
	ctx, cancel := context.WithTimeout(ctx, upgradeTimeout)
	defer cancel()
	for {
		c, old, err := connect(ctx, dir, o)
		if err != nil {
			return u, old, err
		}
		if !old.Starting {
			err = c.call(ctx, "upgrade", request{}, &u)
		}
		_ = c.Close()
		if !old.Starting {
			return u, old, err
		}
		select {
		case <-ctx.Done():
			return u, old, fmt.Errorf("the daemon (pid %d) has not started: %w", old.PID, context.Cause(ctx))
		case <-time.After(retryEvery):
		}
	}
}

// servesAgain compares the devices before and after an upgrade. pending reports whether some are still to be recovered.
// If none are, the error names all devices that were served before and are not now.
func servesAgain(before, after []Device) (pending bool, err error) {
	var errs []error
	for _, b := range before {
		if b.Waits {
			continue // it waited before the upgrade
		}
		i := slices.IndexFunc(after, func(a Device) bool { return a.Path == b.Path })
		switch {
		case i < 0:
			errs = append(errs, fmt.Errorf("%s (%v) is not there any more", b.Path, b.Ref))
		case after[i].Waits && after[i].Error == "":
			pending = true
		case after[i].Waits:
			errs = append(errs, fmt.Errorf("%s (%v) waits for a server: %s", b.Path, b.Ref, after[i].Error))
		}
	}
	if err = errors.Join(errs...); err != nil {
		err = fmt.Errorf("the new program runs, but does not serve all that the old one did: %w: 'vdisk recover' tries again", err)
	}
	return pending, err
}

// Running returns the status of the process that owns the store at dir and offers it to others. It fails with
// ErrNoOwner if there is none.
func Running(ctx context.Context, dir string, o Options) (Status, error) {
	c, s, err := connect(ctx, dir, o)
	if err != nil {
		return s, err
	}
	return s, c.Close()
}
