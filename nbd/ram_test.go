package nbd

import (
	"io/fs"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

const (
	ramStripe = 1 << 20
	ramBlock  = 4096
)

// ramDevice is a Device in memory that knows its holes in blocks of 4 KiB.
type ramDevice struct {
	data    []byte
	present []bool         // a block that was written, guarded by the lock of its stripe
	locks   []sync.RWMutex // of each MiB of data
	cost    time.Duration  // CPU time that each read and write takes besides

	flushes, opens, closes atomic.Int64

	// Hooks of tests; nil, or called with no lock held.
	onRead, onWrite func(p []byte, off int64) error
	onFlush         func() error
	onZero          func(off, length int64, noHole bool) error
}

func newRAM(size int) *ramDevice {
	return &ramDevice{
		data:    make([]byte, size),
		present: make([]bool, (size+ramBlock-1)/ramBlock),
		locks:   make([]sync.RWMutex, (size+ramStripe-1)/ramStripe),
	}
}

// spin takes d of CPU time.
func spin(d time.Duration) {
	for began := time.Now(); d > 0 && time.Since(began) < d; {
	}
}

// stripes calls fn for the part of [off, off+n) in each stripe.
func (d *ramDevice) stripes(off, n int64, fn func(l *sync.RWMutex, from, to int64)) {
	for end := off + n; off < end; {
		to := min(end, (off/ramStripe+1)*ramStripe)
		fn(&d.locks[off/ramStripe], off, to)
		off = to
	}
}

func (d *ramDevice) ReadAt(p []byte, off int64) (int, error) {
	if d.onRead != nil {
		if err := d.onRead(p, off); err != nil {
			return 0, err
		}
	}
	spin(d.cost)
	d.stripes(off, int64(len(p)), func(l *sync.RWMutex, from, to int64) {
		l.RLock()
		copy(p[from-off:], d.data[from:to])
		l.RUnlock()
	})
	return len(p), nil
}

func (d *ramDevice) WriteAt(p []byte, off int64) (int, error) {
	if d.onWrite != nil {
		if err := d.onWrite(p, off); err != nil {
			return 0, err
		}
	}
	spin(d.cost)
	d.stripes(off, int64(len(p)), func(l *sync.RWMutex, from, to int64) {
		l.Lock()
		copy(d.data[from:to], p[from-off:])
		for b := from / ramBlock; b <= (to-1)/ramBlock; b++ {
			d.present[b] = true
		}
		l.Unlock()
	})
	return len(p), nil
}

// content returns a copy of the whole content.
func (d *ramDevice) content() []byte {
	b := make([]byte, len(d.data))
	d.stripes(0, d.Size(), func(l *sync.RWMutex, from, to int64) {
		l.RLock()
		copy(b[from:], d.data[from:to])
		l.RUnlock()
	})
	return b
}

func (d *ramDevice) Flush() error {
	d.flushes.Add(1)
	if d.onFlush != nil {
		return d.onFlush()
	}
	return nil
}

func (d *ramDevice) Discard(off, length int64) error { return d.WriteZeroes(off, length, false) }

func (d *ramDevice) WriteZeroes(off, length int64, noHole bool) error {
	if d.onZero != nil {
		if err := d.onZero(off, length, noHole); err != nil {
			return err
		}
	}
	d.stripes(off, length, func(l *sync.RWMutex, from, to int64) {
		l.Lock()
		clear(d.data[from:to])
		for b := from / ramBlock; b <= (to-1)/ramBlock; b++ {
			whole := from <= b*ramBlock && (b+1)*ramBlock <= to
			d.present[b] = noHole || d.present[b] && !whole
		}
		l.Unlock()
	})
	return nil
}

func (d *ramDevice) Size() int64 { return int64(len(d.data)) }

func (d *ramDevice) Extents(off, length int64, fn func(off, length int64, hole bool) bool) error {
	for end := off + length; off < end; {
		l := &d.locks[off/ramStripe]
		l.RLock()
		hole := !d.present[off/ramBlock]
		l.RUnlock()
		to := min(end, (off/ramBlock+1)*ramBlock)
		if !fn(off, to-off, hole) {
			return nil
		}
		off = to
	}
	return nil
}

// exportMap serves devices by name.
type exportMap map[string]*Export

func (m exportMap) List() ([]string, error) {
	var names []string
	for name := range m {
		names = append(names, name)
	}
	return names, nil
}

// Describe does not open the export, so it works even if the export is in use.
func (m exportMap) Describe(name string) (Info, error) {
	switch name {
	case "secret":
		return Info{}, fs.ErrPermission
	case "busy":
		return Info{Name: name, Size: ramBlock}, nil
	}
	name, e, ok := m.find(name)
	if !ok {
		return Info{}, fs.ErrNotExist
	}
	info := e.info()
	info.Name = name
	return info, nil
}

// find finds an export; the empty name is the only one.
func (m exportMap) find(name string) (string, *Export, bool) {
	if name == "" && len(m) == 1 {
		for name = range m {
		}
	}
	e, ok := m[name]
	return name, e, ok
}

func (m exportMap) Open(name string) (*Export, error) {
	switch name {
	case "secret":
		return nil, fs.ErrPermission
	case "busy":
		return nil, syscall.EBUSY
	}
	_, e, ok := m.find(name)
	if !ok {
		return nil, fs.ErrNotExist
	}
	if d, ok := e.Device.(*ramDevice); ok {
		d.opens.Add(1)
		open := *e
		open.Close = func() error { d.closes.Add(1); return nil }
		return &open, nil
	}
	return e, nil
}

// serveRAM is the common case: one device, called disk.
func serveRAM(d *ramDevice) exportMap { return exportMap{"disk": {Device: d}} }
