package owner

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"

	"github.com/vdisk/vdisk/ublk"
)

// fakeDriver keeps devices like the kernel: they outlive their servers.
type fakeDriver struct {
	mu       sync.Mutex // guards what follows, and the devices' fields
	devices  map[int]*fakeDevice
	next     int
	features ublk.Feature
	backing  []int
	fail     map[string]error // by operation: the next call fails
	blind    bool             // not all processes can be seen
	hidden   bool             // the devices are not listed
	onCreate func()           // called when the device is added, before it is live
}

func newFakeDriver() *fakeDriver {
	return &fakeDriver{devices: map[int]*fakeDevice{}, features: ^ublk.Feature(0), fail: map[string]error{}}
}

type fakeDevice struct {
	info   ublk.DeviceInfo
	server *fakeBlock
}

// fakeBlock is a server of a fakeDevice.
type fakeBlock struct {
	d     *fakeDriver
	id    int
	opts  ublk.Options
	h     ublk.Handler
	state ublk.State
	err   error
	done  chan struct{}
	inUse bool
	stats ublk.QueueStats
}

func (d *fakeDriver) failing(op string) error {
	err := d.fail[op]
	delete(d.fail, op)
	return err
}

func (d *fakeDriver) Create(_ context.Context, o ublk.Options, h ublk.Handler) (block, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.failing("create"); err != nil {
		return nil, err
	}
	id := d.next
	d.next++
	dev := &fakeDevice{info: ublk.DeviceInfo{ID: id, Cookie: o.Cookie, Size: o.Size, ReadOnly: o.ReadOnly, Features: d.features, State: ublk.KernelDead}}
	d.devices[id] = dev
	if d.onCreate != nil {
		d.onCreate()
	}
	return d.serve(dev, o, h), nil
}

func (d *fakeDriver) serve(dev *fakeDevice, o ublk.Options, h ublk.Handler) *fakeBlock {
	b := &fakeBlock{d: d, id: dev.info.ID, opts: o, h: h, state: ublk.StateLive, done: make(chan struct{})}
	dev.info.State, dev.server = ublk.KernelLive, b
	return b
}

func (d *fakeDriver) Recover(_ context.Context, id int, o ublk.RecoverOptions, h ublk.Handler) (block, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	dev, ok := d.devices[id]
	switch {
	case !ok:
		return nil, ublk.ErrNotFound
	case dev.info.Cookie != o.Cookie:
		return nil, fmt.Errorf("another cookie: %w", ublk.ErrInvalid)
	case dev.info.State != ublk.KernelQuiesced:
		return nil, ublk.ErrBusy
	}
	if err := d.failing("recover"); err != nil {
		return nil, err
	}
	return d.serve(dev, ublk.Options{Size: dev.info.Size}, h), nil
}

func (d *fakeDriver) Devices(context.Context) (list []ublk.DeviceInfo, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.failing("devices"); err != nil || d.hidden {
		return nil, err
	}
	for id := range d.next {
		if dev, ok := d.devices[id]; ok {
			list = append(list, dev.info)
		}
	}
	return list, nil
}

func (d *fakeDriver) Delete(_ context.Context, id int, force bool) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	dev, ok := d.devices[id]
	switch {
	case !ok:
		return ublk.ErrNotFound
	case dev.info.State == ublk.KernelLive, dev.info.State == ublk.KernelQuiesced && !force:
		return ublk.ErrBusy
	}
	if err := d.failing("delete"); err != nil {
		return err
	}
	delete(d.devices, id)
	return nil
}

func (d *fakeDriver) Server(id int) (pid int, sure bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if dev := d.devices[id]; dev != nil && dev.info.State == ublk.KernelLive {
		return os.Getpid(), true
	}
	return 0, !d.blind
}

func (d *fakeDriver) BackingDevices(string) ([]int, error) { return d.backing, nil }

func (b *fakeBlock) ID() int                { return b.id }
func (b *fakeBlock) Path() string           { return pathOf(b.id) }
func (b *fakeBlock) Options() ublk.Options  { return b.opts }
func (b *fakeBlock) Features() ublk.Feature { return b.d.features }
func (b *fakeBlock) MemoryLocked() bool     { return true }
func (b *fakeBlock) Stats() ublk.Stats      { return ublk.Stats{Queues: []ublk.QueueStats{b.stats}} }
func (b *fakeBlock) Done() <-chan struct{}  { return b.done }

func (b *fakeBlock) State() ublk.State {
	b.d.mu.Lock()
	defer b.d.mu.Unlock()
	return b.state
}

func (b *fakeBlock) Err() error {
	b.d.mu.Lock()
	defer b.d.mu.Unlock()
	return b.err
}

func (b *fakeBlock) Resize(_ context.Context, size int64) error {
	b.d.mu.Lock()
	defer b.d.mu.Unlock()
	b.d.devices[b.id].info.Size = size
	return nil
}

// end changes the device as the end of its server does. d.mu is held.
func (b *fakeBlock) end(s ublk.State, err error) {
	if b.state != ublk.StateLive {
		return
	}
	b.state, b.err = s, err
	if s == ublk.StateDead {
		delete(b.d.devices, b.id)
	} else {
		b.d.devices[b.id].info.State = ublk.KernelQuiesced
	}
	close(b.done)
}

func (b *fakeBlock) Stop(context.Context) error {
	b.d.mu.Lock()
	defer b.d.mu.Unlock()
	if b.inUse {
		return ublk.ErrBusy
	}
	b.end(ublk.StateDead, nil)
	return nil
}

func (b *fakeBlock) Close(context.Context) error {
	b.d.mu.Lock()
	defer b.d.mu.Unlock()
	b.end(ublk.StateDead, nil)
	return b.d.failing("flush")
}

func (b *fakeBlock) Quiesce(context.Context) error {
	b.d.mu.Lock()
	defer b.d.mu.Unlock()
	if err := b.d.failing("quiesce"); err != nil {
		return err
	}
	b.end(ublk.StateQuiesced, nil)
	return nil
}

// loseServers ends all servers, as when their process is killed.
func (d *fakeDriver) loseServers() {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, dev := range d.devices {
		if dev.server != nil {
			dev.server.end(ublk.StateQuiesced, errors.New("killed"))
		}
	}
}

func (d *fakeDriver) count() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return len(d.devices)
}
