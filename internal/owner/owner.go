package owner

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/vdisk/vdisk/cow"
)

// Owner is the process's hold of a store: the engine, the control socket, the block devices and the NBD services.
type Owner struct {
	dir     string
	opts    Options
	store   *cow.Store
	started time.Time
	exports *exports
	control *control // nil unless Options.Offer

	// life ends when the owner is to end at once; operations for others, and services, end with it.
	life context.Context
	kill context.CancelFunc

	recording sync.Mutex // guards the file of devices, and the two fields below; mu may be taken under it
	swept     bool       // sweep was called
	leftovers []int      // ids of an earlier owner's devices that could not be deleted yet

	mu       sync.Mutex  // guards the fields below
	stopping bool        // no session begins any more
	sessions int         // connections of clients
	visited  bool        // there has been a session
	devices  []*attached // in the order they were attached
	services []*service
	changed  chan struct{} // closed, and made anew, when one of the above has changed
}

// own takes the store, which must be there. ctx bounds what is done for others while it is owned.
func own(ctx context.Context, dir string, o Options) (*Owner, error) {
	o = o.withDefaults()
	store, err := cow.Open(dir, cow.Options{LockTimeout: o.LockTimeout, Holder: o.Command, Logger: o.Logger,
		Outlive: o.Offer && !o.Temporary}) // its clients and devices go on when it is killed
	if err != nil {
		return nil, err
	}
	life, kill := context.WithCancel(ctx)
	owner := &Owner{dir: dir, opts: o, store: store, started: time.Now(), life: life, kill: kill, changed: make(chan struct{})}
	owner.exports = &exports{store: store}
	if o.Offer {
		if owner.control, err = listenControl(owner, filepath.Join(dir, controlName)); err != nil {
			kill()
			return nil, errors.Join(err, store.Close())
		}
	}
	return owner, nil
}

// stopTimeout bounds each step of ending: a client's last operation, a device's last requests.
const stopTimeout = 20 * time.Second

// Close ends the owner: it waits for the clients of the control socket, unless the context that it was opened with has
// ended, stops the services and the devices, and closes the store.
func (o *Owner) Close() error {
	o.wait(func() bool { o.stopping = o.stopping || o.sessions == 0; return o.stopping })
	return o.close()
}

// CloseWhenIdle is Close at the moment when no device, service or client is left; it waits up to grace for the first of
// them. It does not wait when the context that the owner was opened with has ended.
func (o *Owner) CloseWhenIdle(grace time.Duration) error {
	timer := time.AfterFunc(grace, o.notify)
	defer timer.Stop()
	until := o.started.Add(grace)
	o.wait(func() bool {
		idle := o.sessions == 0 && len(o.devices) == 0 && len(o.services) == 0
		o.stopping = o.stopping || idle && (o.visited || time.Now().After(until))
		return o.stopping
	})
	return o.close()
}

// CloseWhenDone is Close when the context that the owner was opened with has ended.
func (o *Owner) CloseWhenDone() error {
	<-o.life.Done()
	return o.close()
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
	errs = append(errs, o.stopDevices(bounded))
	errs = append(errs, o.exports.close())
	errs = append(errs, o.store.Close())
	return errors.Join(errs...)
}

// wait returns when done, which is called with mu held, says so, or life ends.
func (o *Owner) wait(done func() bool) {
	for {
		o.mu.Lock()
		ready, changed := done(), o.changed
		o.mu.Unlock()
		if ready {
			return
		}
		select {
		case <-changed:
		case <-o.life.Done():
			return
		}
	}
}

// notify wakes those in wait.
func (o *Owner) notify() {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.notifyLocked()
}

func (o *Owner) notifyLocked() {
	close(o.changed)
	o.changed = make(chan struct{})
}

// begin and end count the sessions of clients.
func (o *Owner) begin() {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.sessions++
	o.visited = true
	o.notifyLocked()
}

func (o *Owner) end() {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.sessions--
	o.notifyLocked()
}

// lasting refuses what must outlive a temporary owner.
func (o *Owner) lasting() error {
	if o.opts.Temporary {
		return fmt.Errorf("%w until the command that uses it ends", &cow.LockedError{Dir: o.dir, Holder: o.holder()})
	}
	return nil
}

func (o *Owner) holder() string { return fmt.Sprintf("pid %d (%s)", os.Getpid(), o.opts.Command) }

// Status says who owns the store and what hangs on it.
func (o *Owner) Status(context.Context) (Status, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.stopping {
		return Status{}, errStopping
	}
	s := Status{PID: os.Getpid(), Command: o.opts.Command, Temporary: o.opts.Temporary, Started: o.started,
		Devices: []Device{}, Services: []Service{}}
	for _, d := range o.devices {
		s.Devices = append(s.Devices, d.info())
	}
	for _, v := range o.services {
		s.Services = append(s.Services, v.info())
	}
	return s, nil
}
