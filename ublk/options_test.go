package ublk

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/vdisk/vdisk/internal/testwatch"
)

func TestOptionsAreChecked(t *testing.T) {
	good := Options{Size: 1 << 20}
	if err := good.withDefaults().validate(); err != nil {
		t.Fatalf("the defaults: %v", err)
	}
	for name, change := range map[string]func(*Options){
		"Size 0":                    func(o *Options) { o.Size = 0 },
		"Size -512":                 func(o *Options) { o.Size = -512 },
		"Size 1000":                 func(o *Options) { o.Size = 1000 },
		"Size 1049088":              func(o *Options) { o.Size, o.LogicalBlock = 1<<20+512, 4096 },
		"LogicalBlock 1024":         func(o *Options) { o.LogicalBlock = 1024 },
		"PhysicalBlock 512":         func(o *Options) { o.LogicalBlock, o.PhysicalBlock = 4096, 512 },
		"PhysicalBlock 3000":        func(o *Options) { o.PhysicalBlock = 3000 },
		"IOMin 256":                 func(o *Options) { o.IOMin = 256 },
		"IOOpt 5000":                func(o *Options) { o.IOOpt = 5000 },
		"Queues -1":                 func(o *Options) { o.Queues = -1 },
		"Queues 5000":               func(o *Options) { o.Queues = 5000 },
		"Depth 4097":                func(o *Options) { o.Depth = 4097 },
		"Depth -1":                  func(o *Options) { o.Depth = -1 },
		"MaxIOBytes 1000":           func(o *Options) { o.MaxIOBytes = 1000 },
		"MaxIOBytes 67108864":       func(o *Options) { o.MaxIOBytes = 64 << 20 },
		"locked memory":             func(o *Options) { o.MaxIOBytes, o.Depth = 32<<20, 4096 },
		"FUA without VolatileCache": func(o *Options) { o.FUA = true },
		"read-only":                 func(o *Options) { o.Discard, o.ReadOnly = true, true },
		"DiscardGranularity 100":    func(o *Options) { o.DiscardGranularity = 100 },
		"IOMin 2147483648":          func(o *Options) { o.IOMin = 1 << 31 },
		"IOOpt 1099511627776":       func(o *Options) { o.IOOpt = 1 << 40 },
		"Require SUPPORT_ZERO_COPY, NEED_GET_DATA": func(o *Options) {
			o.Require = FeatureZeroCopy | FeatureNeedGetData | FeatureUpdateSize
		},
		"ID 2000000": func(o *Options) { o.ID = new(2000000) },
	} {
		o := good
		change(&o)
		_, err := Create(context.Background(), o, nil)
		if !errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), name) {
			t.Errorf("%s: got %v", name, err)
		}
	}
}

func TestParams(t *testing.T) {
	p := Options{Size: 1<<30 + 512, Discard: true, VolatileCache: true, FUA: true}.withDefaults().params()
	want := paramsBasic{
		attrs: attrVolatileCache | attrFUA, logicalShift: 9, physicalShift: 12, ioMinShift: 12, ioOptShift: 12,
		maxSectors: 512, devSectors: 1<<21 + 1,
	}
	if p.basic != want || p.types != paramBasic|paramDiscard {
		t.Errorf("basic %+v, types %d", p.basic, p.types)
	}
	// The largest discard must fit 32 bits of bytes, and be whole granules.
	d := p.discard
	if bytes := uint64(d.maxSectors) << 9; bytes > 1<<32-1 || bytes%4096 != 0 || bytes < 1<<31 || d.maxSegments != 1 || d.granularity != 4096 {
		t.Errorf("discard %+v", d)
	}
	for _, id := range []*int{nil, new(-1)} {
		if got := must(t)(Options{ID: id}.info(0)).devID; got != 1<<32-1 {
			t.Errorf("no id becomes %d", got)
		}
	}
	if got := must(t)(Options{ID: new(0)}.info(0)).devID; got != 0 {
		t.Errorf("id 0 becomes %d", got)
	}
}

// TestNoDriver shows the errors of a machine that cannot serve: no driver, no permission, no ublk behind the file.
func TestNoDriver(t *testing.T) {
	if _, err := newControlRing(filepath.Join(t.TempDir(), "ublk-control")); !errors.Is(err, ErrNoDriver) ||
		!errors.Is(err, unix.ENOENT) || !strings.Contains(err.Error(), "modprobe ublk_drv") {
		t.Errorf("missing control device: %v", err)
	}
	if err := controlOpenError(controlPath, unix.EACCES); !errors.Is(err, ErrPermission) {
		t.Errorf("no right: %v", err)
	}
	// If the driver is loaded there may be devices, even if it cannot be asked about them.
	was := miscDevices
	miscDevices = filepath.Join(t.TempDir(), "misc")
	for what, text := range map[string]string{"cannot be determined": "", "loaded": "259 cpu_dma_latency\n122 ublk-control\n"} {
		if text != "" {
			if err := os.WriteFile(miscDevices, []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		if err := controlOpenError(controlPath, unix.ENOENT); !errors.Is(err, ErrPermission) || errors.Is(err, ErrNoDriver) {
			t.Errorf("no node in /dev, the driver %s: %v", what, err)
		}
		_ = os.Remove(miscDevices)
	}
	miscDevices = was
	if _, err := os.Stat(controlPath); err == nil {
		return // this machine has a driver, and the tests of it are elsewhere
	}
	ctx := context.Background()
	set, err := Features()
	if !errors.Is(err, ErrNoDriver) || set.Kernel == "" || set.Bits != 0 {
		t.Errorf("Features: %+v, %v", set, err)
	}
	if _, err := Create(ctx, Options{Size: 1 << 20}, nil); !errors.Is(err, ErrNoDriver) {
		t.Errorf("Create: %v", err)
	}
	if _, err := Devices(ctx); !errors.Is(err, ErrNoDriver) {
		t.Errorf("Devices: %v", err)
	}
	if err := Delete(ctx, 0, false); !errors.Is(err, ErrNoDriver) {
		t.Errorf("Delete: %v", err)
	}
}

// TestControlRing runs the control connection on a file that answers every command.
func TestControlRing(t *testing.T) {
	needNullCommands(t)
	r, err := newControlRing("/dev/null")
	if err != nil {
		t.Fatal(err)
	}
	c := newControl(r)
	for range 200 {
		if err := c.change(context.Background(), cmdDelDev, target{id: 1}, nil); err != nil {
			t.Fatal(err)
		}
	}
	r.mu.Lock()
	left := len(r.pending)
	r.mu.Unlock()
	if left != 0 {
		t.Errorf("%d commands are still pending", left)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := c.change(ctx, cmdDelDev, target{id: 1}, nil); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled context: %v", err)
	}
}

// TestControlCancel: a command that never ends returns when it is cancelled.
func TestControlCancel(t *testing.T) {
	needNullCommands(t)
	c, err := newControlRing("/dev/null")
	if err != nil {
		t.Fatal(err)
	}
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	// A read from an empty pipe stands for the command; a cancel ends it.
	buf := new([8]byte)
	call := &ctrlCall{buf: unsafe.Pointer(buf), done: make(chan int32, 1)}
	id, err := c.submit(call, func(e *sqe) {
		e.opcode, e.fd, e.addr, e.len = opRead, int32(r.Fd()), uint64(uintptr(call.buf)), 8
	})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.submit(nil, func(e *sqe) { e.opcode, e.fd, e.addr = opAsyncCancel, -1, id }); err != nil {
		t.Fatal(err)
	}
	res := testwatch.Wait(t, testwatch.Long, "the cancelled command", call.done)
	if res != -int32(unix.ECANCELED) && res != -int32(unix.EINTR) {
		t.Errorf("result %d", res)
	}
}

func TestFeatureNames(t *testing.T) {
	s := FeatureSet{Bits: FeatureUserCopy | FeatureQuiesce | 1<<40}
	if got := strings.Join(s.Names(), " "); got != "USER_COPY QUIESCE bit 40" {
		t.Errorf("names %q", got)
	}
	for i, k := range knownFeatures {
		if k.Feature != 1<<i {
			t.Errorf("%s is not bit %d", k.Name, i)
		}
	}
}

// must unwraps a pair that cannot fail here.
func must(t *testing.T) func(*devInfo, error) *devInfo {
	return func(i *devInfo, err error) *devInfo {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return i
	}
}
