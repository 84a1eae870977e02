package owner

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/vdisk/vdisk/cow"
	"github.com/vdisk/vdisk/internal/journal"
	"github.com/vdisk/vdisk/internal/storage"
)

// Owner is a store that this process owns: the engine, the control socket, the block devices and the NBD services.
type Owner struct {
	dir     string
	in      *storage.Folder // the store's folder, at dir
	opts    Options
	store   *cow.Store
	started time.Time
	exports *exports
	control *control     // nil unless Options.Offer
	journal *journal.Log // nil: nothing is noted

	unfinished unfinished // volumes that imports and measurements have not finished

	// life ends when the owner must end at once. Clients' operations and the services end with it.
	life context.Context
	kill context.CancelFunc

	uuid        string // of the store
	mark        mark   // marks the store in its devices' cookies
	prepareOnce sync.Once
	repairs     sync.WaitGroup      // recoveries of disks whose server failed; Add under mu, while not stopping
	own         sync.WaitGroup      // the services of ServeOwn
	held        map[int]*heldClient // by descriptor; nil after GoOn
	connections atomic.Int64        // the number of the latest NBD connection

	recording sync.Mutex     // guards the file of devices and leftovers; mu may be taken while it is held
	leftovers []deviceRecord // devices of earlier owners that are not held, and may still exist
	unread    error          // why the file of devices cannot be read; it is not written then; set by own

	mu          sync.Mutex // guards the fields below
	stopping    bool       // no new session begins
	starting    bool       // GoOn is still to be called: no upgrade begins
	accepting   bool       // sessions may begin; false during an upgrade
	successor   *Program   // the program that takes over, after an upgrade
	keepDevices bool       // the disks stay for the next owner, whichever that is
	sessions    int        // client connections
	hadSession  bool       // there has been a session
	disks       []*disk    // in the order of attaching
	services    []*service
	reclaim     *Reclaim      // nil before the first device
	unheard     error         // errors at the end of devices that no command ended
	changed     chan struct{} // closed and replaced when a field above changes
}

// own makes this process the owner of the store, which must exist. ctx limits what is done for others while the store
// is owned. A store that cannot be written to is opened only if mayRead is set. It then has no control socket and no
// devices, and others may read it at the same time.
func own(ctx context.Context, dir string, o Options, mayRead bool) (*Owner, error) {
	opts := cow.Options{ // its clients and devices continue when it is killed
		LockTimeout: o.LockTimeout, Holder: o.Command, Logger: o.Logger, CacheBytes: o.MapCache, MaxBytes: o.MaxBytes, Reserve: o.Reserve, ColdAfter: o.ColdAfter,
		Brief: !o.lasts(), Outlive: o.lasts(), SharedMemory: o.sharedMemory, Foreign: o.Foreign,
		AllowReadOnly: mayRead, Look: o.Look, Repair: o.Repair,
	}
	if o.lasts() {
		opts.ScrubEvery = cmp.Or(o.ScrubEvery, -1)
	}
	notices := new(notices)
	opts.Notice = notices.take
	store, err := openStore(dir, o, opts)
	if errors.Is(err, cow.ErrElsewhere) {
		store, err = openElsewhere(ctx, dir, o, opts, err)
	}
	if err != nil {
		return nil, err
	}
	in, err := storage.OpenFolder(dir, o.Foreign)
	if err != nil {
		return nil, errors.Join(err, store.Close())
	}
	life, kill := context.WithCancel(ctx)
	owner := &Owner{dir: dir, in: in, opts: o, store: store, started: time.Now(), life: life, kill: kill, starting: o.Starts, accepting: true, changed: make(chan struct{})}
	owner.unfinished.in = in
	owner.exports = &exports{store: store, explain: owner.inUse, attached: owner.attached, meters: newMeters(store.Has)}
	if store.ReadOnly() != nil {
		return owner, nil
	}
	if !o.Look { // a command that only looks changes nothing
		owner.journal = journal.New(in, o.Logger)
	}
	owner.uuid = store.Info().UUID
	if owner.mark, err = markOf(in, owner.uuid); err == nil {
		err = owner.adopt(ctx)
	}
	if err == nil && store.ReadOnly() == nil {
		owner.removeUnfinished()
	}
	if err == nil && o.lasts() {
		err = store.WatchFill(o.FillLevels, owner.noteFill)
	}
	if err == nil {
		owner.holdHanded(o.Handed)
	}
	if err == nil && o.Offer {
		owner.control, err = listenControl(owner)
	}
	if err != nil {
		kill()
		return nil, errors.Join(err, owner.releaseHeld(), owner.closeDisks(ctx), store.Close(), in.Close())
	}
	owner.noteStart()
	notices.giveTo(owner)
	return owner, nil
}

// openStore opens the engine, on a test's file layer if there is one.
func openStore(dir string, o Options, opts cow.Options) (*cow.Store, error) {
	if o.fs != nil {
		return cow.OpenOver(dir, o.fs, opts)
	}
	return cow.Open(dir, opts)
}

// stopTimeout limits each step of ending: a client's last operation, a device's last requests.
const stopTimeout = 20 * time.Second

// closeTimeout limits the closing of the store, which writes what is in memory. Only an unresponsive disk takes longer.
const closeTimeout = 2 * time.Minute

// inTime returns the result of f, or an error if f takes longer than limit; f then continues.
func inTime(limit time.Duration, what string, f func() error) error {
	done := make(chan error, 1)
	go func() { done <- f() }()
	timer := time.NewTimer(limit)
	defer timer.Stop()
	select {
	case err := <-done:
		return err
	case <-timer.C:
		return fmt.Errorf("%s takes more than %v, so it is given up: does its file system answer? What was flushed is safe", what, limit)
	}
}

// Close ends the owner. It waits for the clients of the control socket, unless the context that the owner was opened
// with has ended; stops the services and devices; and closes the store.
func (o *Owner) Close() error {
	o.wait(func() bool { o.stopping = o.stopping || o.sessions == 0; return o.stopping })
	return o.close()
}

// CloseWhenIdle does what Close does, once no device, service or client is left. It waits up to grace for the first of
// them. It does not wait after the context that the owner was opened with has ended, or after Upgrade.
func (o *Owner) CloseWhenIdle(grace time.Duration) error {
	timer := time.AfterFunc(grace, o.notify)
	defer timer.Stop()
	until := o.started.Add(grace)
	o.wait(func() bool {
		served := slices.ContainsFunc(o.disks, func(d *disk) bool { return d.block != nil || d.busy })
		idle := o.accepting && o.sessions == 0 && !served && !slices.ContainsFunc(o.services, (*service).inUse)
		o.stopping = o.stopping || o.successor != nil || idle && (o.hadSession || time.Now().After(until))
		return o.stopping
	})
	return o.close()
}

// CloseWhenDone does what Close does, once the context that the owner was opened with has ended, or after Upgrade.
func (o *Owner) CloseWhenDone() error {
	o.wait(func() bool { return o.successor != nil })
	return o.close()
}

// WritesThrough reports whether writes are slower for lack of shared memory.
func (o *Owner) WritesThrough() bool { return o.store.WritesThrough() }

// LeaveDisks keeps the disks in the kernel when the owner closes, and their users wait for the next owner. It reports
// whether this process serves any disk.
func (o *Owner) LeaveDisks() bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.keepDevices = true
	return slices.ContainsFunc(o.disks, func(d *disk) bool { return d.block != nil })
}

// CloseLeaving calls LeaveDisks and closes the owner at once.
func (o *Owner) CloseLeaving() error {
	o.LeaveDisks()
	return o.close()
}

// leaving reports whether the disks outlive the owner. An upgrade has quiesced them all, but a disk whose server failed
// may have got a new server since.
func (o *Owner) leaving() bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.keepDevices || o.successor != nil
}

func (o *Owner) close() error {
	o.mu.Lock()
	o.stopping = true
	o.mu.Unlock()
	o.kill()
	var errs []error
	if o.control != nil {
		errs = append(errs, o.control.close())
	}
	bounded, cancel := context.WithTimeout(context.Background(), stopTimeout)
	defer cancel()
	o.waitServices(bounded)
	o.own.Wait()     // they end with life, and each step of that is bounded
	o.repairs.Wait() // recoveries end with life
	errs = append(errs, o.closeDisks(bounded))
	errs = append(errs, o.releaseHeld(), o.exports.close())
	errs = append(errs, inTime(closeTimeout, "closing the store "+o.dir, o.store.Close))
	o.noteStop(errors.Join(errs...))
	errs = append(errs, o.in.Close())
	o.mu.Lock()
	defer o.mu.Unlock()
	return errors.Join(append(errs, o.unheard)...)
}

// wait waits until done returns true, or life ends. done is called with mu held.
func (o *Owner) wait(done func() bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for !done() && o.life.Err() == nil {
		o.waitLocked(o.life)
	}
}

// waitLocked releases mu until notify is called or ctx ends, and then takes it again.
func (o *Owner) waitLocked(ctx context.Context) {
	changed := o.changed
	o.mu.Unlock()
	select {
	case <-changed:
	case <-ctx.Done():
	}
	o.mu.Lock()
}

// notify wakes the callers of wait and waitLocked.
func (o *Owner) notify() {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.notifyLocked()
}

func (o *Owner) notifyLocked() {
	close(o.changed)
	o.changed = make(chan struct{})
}

// begin counts a new session of a client, and end counts its end.
func (o *Owner) begin() {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.sessions++
	o.hadSession = true
	o.notifyLocked()
}

func (o *Owner) end() {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.sessions--
	o.notifyLocked()
}

// lasting refuses an operation that must outlive an owner that is about to end, or one that would lose acknowledged
// data when it is killed.
func (o *Owner) lasting() error {
	if !o.store.SurvivesKill() {
		return fmt.Errorf("%w until the command that uses it ends", &cow.LockedError{Dir: o.dir, Holder: o.holder()})
	}
	return nil
}

func (o *Owner) holder() string { return fmt.Sprintf("pid %d (%s)", os.Getpid(), o.opts.Command) }

// ReadOnly returns the reason why the store can only be read, or nil.
func (o *Owner) ReadOnly() error { return o.store.ReadOnly() }

// Status describes the owner of the store, its devices and its services.
func (o *Owner) Status(context.Context) (Status, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.stopping || !o.accepting {
		return Status{}, errStopping
	}
	s := Status{
		PID: os.Getpid(), ProcessStart: startOf(os.Getpid()), Command: o.opts.Command, Version: o.opts.Version,
		Handover: o.opts.Handover, Temporary: o.opts.Temporary, Started: o.started, Starting: o.starting, Reclaim: o.reclaim,
		Devices: []Device{}, Services: []Service{},
	}
	for _, d := range o.disks {
		if d.listed() {
			s.Devices = append(s.Devices, d.info())
		}
	}
	for _, v := range o.services {
		s.Services = append(s.Services, v.info())
	}
	return s, nil
}
