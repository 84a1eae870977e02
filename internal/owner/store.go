package owner

import (
	"context"
	"log/slog"
	"net"
	"time"

	"github.com/vdisk/vdisk/cow"
	"github.com/vdisk/vdisk/internal/bench"
	"github.com/vdisk/vdisk/internal/owner/sparse"
	"github.com/vdisk/vdisk/internal/storage"
	"github.com/vdisk/vdisk/ublk"
)

// Store is a store as commands see it, whichever process has it open. The methods' errors match the engine's (cow.Err…)
// and ErrUnsupported with errors.Is.
type Store interface {
	Status(ctx context.Context) (Status, error)
	Info(ctx context.Context) (cow.StoreInfo, error)
	Volumes(ctx context.Context) ([]Volume, error)
	Volume(ctx context.Context, name string) (Volume, error)
	// Usage says what volumes and snapshots take: those named, as far as they are there, or all. It reads their maps.
	Usage(ctx context.Context, refs ...cow.Ref) ([]cow.Usage, error)
	VolumeUsage(ctx context.Context, names ...string) ([]cow.Usage, error)

	CreateVolume(ctx context.Context, name string, o cow.VolumeOptions) (cow.VolumeInfo, error)
	Snapshot(ctx context.Context, refs ...cow.Ref) error
	Clone(ctx context.Context, src cow.Ref, name string) error
	Rollback(ctx context.Context, to cow.Ref) error
	Rename(ctx context.Context, from, to cow.Ref) error
	Resize(ctx context.Context, name string, size int64, shrink bool) error
	Remove(ctx context.Context, r cow.Ref, recursive bool) error
	Check(ctx context.Context, o cow.CheckOptions, problem func(cow.Problem)) (cow.CheckReport, error)
	// Clean gives back the space of every chunk file of which at least the part waste (0 to 1) is dead.
	Clean(ctx context.Context, waste float64) (cow.CleanReport, error)
	// Bench measures the engine, in the process that owns the store, on a scratch volume that it removes. Each step's
	// outcome is passed to each.
	Bench(ctx context.Context, o bench.Options, each func(bench.Result)) error
	// Cold makes a whole cold pass: what has been written is compressed again, better and in order.
	Cold(ctx context.Context) (cow.ColdReport, error)

	// Import makes a volume with the content of src. o.Size is at least the size of src, or 0 for that size, rounded
	// up to a logical block. The volume appears with all of its content, durably, or not at all. progress, unless
	// nil, is told how far src has come.
	Import(ctx context.Context, name string, o cow.VolumeOptions, src sparse.Source, progress func(off int64)) (cow.VolumeInfo, error)
	// Export calls use with the content of r. A volume that is open for writing is busy: its content is not of one
	// moment.
	Export(ctx context.Context, r cow.Ref, use func(src sparse.Source) error) error

	// Attach makes a block device of a volume or snapshot, which lives as long as the process that owns the store.
	Attach(ctx context.Context, o AttachOptions) (Device, error)
	// Detach removes the block device with that path, or that serves the volume or snapshot of that name. A device
	// that is open, or waits for its server, is left alone (cow.ErrBusy) unless forced: then its users' requests
	// fail.
	Detach(ctx context.Context, what string, force bool) error
	// Recover serves the devices again that wait for a server: the one that what names as for Detach, or all for an
	// empty what. An empty outcome says that there was nothing to do.
	Recover(ctx context.Context, what string) ([]Recovery, error)
	// Claim takes devices that wait, named as for Recover, for the store's, although its folder was on another file system
	// when they were made: the caller knows that it is the same one, mounted anew, and no copy.
	Claim(ctx context.Context, what string) error
	// Stats are the counters of a block device, which what names as for Detach.
	Stats(ctx context.Context, what string) (DeviceStats, error)
	// Serve serves NBD clients that connect to l until ctx ends, which is no error, and closes l.
	Serve(ctx context.Context, l net.Listener, o ServeOptions) error

	Close() error
}

// Options are how to open a store.
type Options struct {
	// LockTimeout is how long to wait for a store that is busy and whose owner does not answer.
	LockTimeout time.Duration
	// Command is what to call this process when others ask who holds the store, as "vdisk import".
	Command string
	// Offer lets other processes work with the store while this one has it open.
	Offer bool
	// Temporary says that this process is about to end: it lets no device or NBD service depend on it.
	Temporary bool
	// MaxBytes limits what the chunk files take while this process owns the store; 0: only the file system does.
	MaxBytes int64
	// Logger gets what happens to devices and services (none).
	Logger *slog.Logger
	// MapCache is cow.Options.CacheBytes.
	MapCache int64
	// ColdAfter is cow.Options.ColdAfter.
	ColdAfter time.Duration
	// Foreign opens a store whose folder belongs to another user, or that other users may change: cow.ErrForeign.
	Foreign bool
	// Look is cow.Options.Look: for a command that only looks.
	Look bool
	// Repair is cow.Options.Repair.
	Repair func(*cow.LogDamage) error
	// Version is this program's.
	Version string
	// Replaceable says that this process can become another version of the program: it ends the owner by CloseWhenDone
	// or CloseWhenIdle, and executes Heir.
	Replaceable bool
	// Handover says why an upgrade that this process has tried did not come about, for Status.
	Handover string

	// Tests have their own.
	driver         driver // the kernel's
	sharedMemory   string // the system's
	memory         func() []memory
	threads        func() []room
	fs             storage.FS    // of the chunk files: the store's folder
	program        string        // what an upgrade leads to: the file that this program was started from
	sessionTimeout time.Duration // how long an upgrade waits for commands that are at work
}

// lasts reports whether the owner serves others until it is told to end, and so may change what is said of its devices.
func (o Options) lasts() bool { return o.Offer && !o.Temporary }

func (o Options) withDefaults() Options {
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.driver == nil {
		o.driver = kernel{}
	}
	if o.memory == nil {
		o.memory = func() []memory { return readMemory("/") }
	}
	if o.threads == nil {
		o.threads = func() []room { return readThreads("/") }
	}
	if o.sessionTimeout == 0 {
		o.sessionTimeout = 10 * time.Second
	}
	return o
}

// Status says who owns a store and what hangs on it.
type Status struct {
	PID          int
	ProcessStart string // as proc_pid_stat(5) has it
	Command      string
	Version      string
	Handover     string // why the last upgrade failed
	Temporary    bool
	Started      time.Time // when it opened the store
	Reclaim      *Reclaim  // nil before the first device
	Devices      []Device
	Services     []Service
}

func (s Status) process() process { return process{s.PID, s.ProcessStart} }

// Volume is a volume and the block devices of it and its snapshots.
type Volume struct {
	cow.VolumeInfo
	Devices []Device
}

// Device is an attached block device.
type Device struct {
	Ref      cow.Ref
	ID       int
	Path     string // /dev/ublkbN
	ReadOnly bool
	Waits    bool   // it has no server, and its users wait for one
	Error    string // why the last try to recover it failed
}

// DeviceStats are the counters of a block device.
type DeviceStats struct {
	Device Device
	Stats  ublk.Stats
}

// AttachOptions are how to attach a device. Zero Queues and Depth leave the choice to the driver's library.
type AttachOptions struct {
	Ref           cow.Ref
	ReadOnly      bool
	Queues, Depth int
	// PartScan is whether the kernel shall read the partition table: "yes", "no" (which a kernel before 7.0 cannot),
	// or empty: that of a volume, and of a snapshot only where the kernel cannot be kept from it.
	PartScan string `json:",omitempty"`
}

// Service is an NBD service.
type Service struct {
	Socket   string
	ReadOnly bool
	Exports  []string // empty: all
	Clients  int      // connections at the moment
}

// ServeOptions are what to serve.
type ServeOptions struct {
	Socket   string    // where the socket is, for Status
	Exports  []cow.Ref // empty: every volume and snapshot, also those to come
	ReadOnly bool
	Once     bool // end when the last client has left

	// MaxConnections and MaxMemory are nbd.Options', of this service alone; 0 is the default of each.
	MaxConnections int   `json:",omitempty"`
	MaxMemory      int64 `json:",omitempty"`
}
