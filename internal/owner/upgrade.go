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
)

// An upgrade, seen from the old program:
//
//	the new program is asked what it is → nobody begins a session any more, and those there are end → the devices are
//	quiesced → the client is answered → the store is closed → the new program is executed, in this process
//
// and from the new one: it opens the store, finds the devices waiting, and recovers them. Where that fails it
// executes the old program again, which it got as an open file, since its path has the new one's file.

// HandoverVersion is what a program must have in common with the one that it takes over from.
const HandoverVersion = 1

const (
	programTimeout = 20 * time.Second // for the new program to say its version
	quiesceTimeout = 60 * time.Second // for the devices' requests
	upgradeTimeout = 3 * time.Minute  // for all of it, seen from the client
)

// Program is a version of vdisk.
type Program struct {
	Path     string `json:"-"`
	Version  string `json:"version"`
	Format   int    `json:"store_format"` // the newest that it knows
	Handover int    `json:"handover"`
}

// Upgrade is what an upgrade leads from and to.
type Upgrade struct {
	From, To string
	Program  string `json:",omitempty"` // the file that is executed
	Same     bool   `json:",omitempty"` // which is the very one that runs already
}

// askProgram has a program say what it is.
func askProgram(ctx context.Context, path string) (Program, error) {
	ctx, cancel := context.WithTimeout(ctx, programTimeout)
	defer cancel()
	p := Program{Path: path}
	out, err := exec.CommandContext(ctx, path, "version", "--json").Output()
	if err != nil {
		return p, fmt.Errorf("asking %s for its version: %w", path, err)
	}
	if err := json.Unmarshal(out, &p); err != nil || p.Version == "" {
		return p, fmt.Errorf("%s does not tell its version (%.80q): %w", path, out, cow.ErrInvalid)
	}
	return p, nil
}

// findHeir checks the program that would take over.
func (o *Owner) findHeir(ctx context.Context) (*Program, error) {
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

// Upgrade makes the owner ready to hand over to the program that is now where this one was started from: the owner's
// CloseWhen… returns, and Heir tells what to execute. When it fails everything is as before.
func (o *Owner) Upgrade(ctx context.Context) (Upgrade, error) { return o.upgrade(ctx, 0) }

// upgrade is Upgrade, asked for in one of the sessions, or in none.
func (o *Owner) upgrade(ctx context.Context, asking int) (Upgrade, error) {
	u := Upgrade{From: o.opts.Version}
	if !o.opts.Replaceable {
		return u, fmt.Errorf("the store is in use by %s, which is no daemon: %w: let it end, the next owner is the new program", o.holder(), cow.ErrBusy)
	}
	if err := o.noServices(); err != nil {
		return u, err
	}
	next, err := o.findHeir(ctx)
	if err != nil {
		return u, err
	}
	u.To, u.Program, u.Same = next.Version, next.Path, runs(next.Path)
	if err := o.shutDoors(ctx, asking); err != nil {
		return u, err
	}
	if err := o.noServices(); err != nil { // a session that was waited for may have become one
		o.openDoors()
		return u, err
	}
	// From here on the client may go: the upgrade is done or undone.
	bounded, cancel := context.WithTimeout(context.WithoutCancel(ctx), quiesceTimeout)
	defer cancel()
	err = o.endServing(bounded, func(b block) error { return b.Quiesce(bounded) })
	o.mu.Lock()
	o.accepting = err != nil
	if err == nil {
		o.successor = next
	}
	o.mu.Unlock()
	if err != nil {
		_, rerr := o.Recover(o.life, "")
		return u, errors.Join(fmt.Errorf("the devices cannot be quiesced: %w", err), rerr)
	}
	o.opts.Logger.Info("handing over", "to", next.Version, "program", next.Path)
	err = o.record()
	o.notify()
	return u, err
}

// noServices refuses an upgrade that would end other commands' services.
func (o *Owner) noServices() error {
	o.mu.Lock()
	defer o.mu.Unlock()
	var names []string
	for _, s := range o.services {
		i := s.info()
		names = append(names, fmt.Sprintf("%s (%d clients)", i.Socket, i.Clients))
	}
	if len(names) == 0 {
		return nil
	}
	return fmt.Errorf("NBD clients are served at %s and would be cut off: %w: end those 'vdisk serve' first", strings.Join(names, ", "), cow.ErrBusy)
}

// shutDoors lets no session begin, and waits for those there are, beside the one that asks.
func (o *Owner) shutDoors(ctx context.Context, asking int) error {
	ctx, cancel := context.WithTimeout(ctx, o.opts.sessionTimeout)
	defer cancel()
	o.mu.Lock()
	defer o.mu.Unlock()
	if !o.accepting || o.stopping {
		return errStopping
	}
	o.accepting = false
	for o.sessions > asking {
		changed := o.changed
		o.mu.Unlock()
		select {
		case <-changed:
		case <-ctx.Done():
		}
		o.mu.Lock()
		if ctx.Err() != nil && o.sessions > asking {
			o.accepting = true
			return fmt.Errorf("%d other commands are at work with the store: %w: try again when they have ended", o.sessions-asking, cow.ErrBusy)
		}
	}
	return nil
}

func (o *Owner) openDoors() {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.accepting = true
	o.notifyLocked()
}

// Heir is the program to execute after the owner was closed by an upgrade; else nil.
func (o *Owner) Heir() *Program {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.successor
}

// heirProcess is who the store is meant for next, if it is handed over.
func (o *Owner) heirProcess() *process {
	if o.Heir() == nil {
		return nil
	}
	p := thisProcess()
	return &p
}

// Handover is what a program is told by the one that executed it.
type Handover struct {
	From   string // the version of that program
	Back   int    // a descriptor of that program; 0: there is no way back
	Failed string // why the way back was taken
	// Program is the path where the next version is looked for: the one that this process was started from at first.
	Program string `json:",omitempty"`
}

const handoverEnv = "VDISK_HANDOVER"

// TakeHandover returns what the program is told that was executed by an upgrade; nil for others.
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
	return h
}

// execute replaces the program of this process. It returns only when that fails.
func execute(path string, h Handover) error {
	h.Program = startedFrom
	b, err := json.Marshal(h)
	if err == nil {
		err = syscall.Exec(path, os.Args, append(os.Environ(), handoverEnv+"="+string(b)))
	}
	return fmt.Errorf("executing %s: %w", path, err)
}

// Execute replaces this program, of version from, with p. It returns only when that fails.
func (p *Program) Execute(from string) error {
	back, err := unix.Open("/proc/self/exe", unix.O_RDONLY, 0) // not O_CLOEXEC: p shall have it
	if err != nil {
		return fmt.Errorf("keeping the present program: %w", err)
	}
	err = execute(p.Path, Handover{From: from, Back: back})
	_ = unix.Close(back)
	return err
}

// Return goes back to the program that executed this one, of version self, after cause. It returns only when that
// fails.
func (h *Handover) Return(self string, cause error) error {
	if h.Back == 0 {
		return cause
	}
	err := execute(fmt.Sprintf("/proc/self/fd/%d", h.Back), Handover{From: self, Failed: oneLine(cause)})
	return errors.Join(cause, err)
}

// Done is called when there is no way back any more.
func (h *Handover) Done() {
	if h.Back != 0 {
		_ = unix.Close(h.Back)
		h.Back = 0
	}
}

// UpgradeDaemon has the daemon that owns the store at dir hand over to the program that is now where it was started
// from, and waits until that one answers. Nobody owning the store matches ErrNoOwner.
func UpgradeDaemon(ctx context.Context, dir string, o Options) (Upgrade, error) {
	if err := refuseWaiting(ctx, dir, o.withDefaults()); err != nil {
		return Upgrade{}, err
	}
	c, old, err := connect(ctx, dir, o)
	if errors.Is(err, errStopping) {
		err = fmt.Errorf("%w: %w", cow.ErrBusy, err)
	}
	if err != nil {
		return Upgrade{}, err
	}
	var u Upgrade
	err = c.call(ctx, "upgrade", request{}, &u)
	_ = c.Close()
	if err != nil {
		return u, err
	}
	ctx, cancel := context.WithTimeout(ctx, upgradeTimeout)
	defer cancel()
	for {
		now, err := Running(ctx, dir, o)
		switch {
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

// servesAgain compares the devices before and after an upgrade. pending says that some are still to be recovered;
// otherwise the error has all that were served before and are not now.
func servesAgain(before, after []Device) (pending bool, err error) {
	var errs []error
	for _, b := range before {
		if b.Waits {
			continue // as it did before
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

// Running asks the process that owns the store and offers it to others; ErrNoOwner when there is none.
func Running(ctx context.Context, dir string, o Options) (Status, error) {
	c, s, err := connect(ctx, dir, o)
	if err != nil {
		return s, err
	}
	return s, c.Close()
}
