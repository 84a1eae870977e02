package owner

import (
	"context"
	"io"
	"log/slog"
	"net"
	"time"

	"github.com/vdisk/vdisk/cow"
	"github.com/vdisk/vdisk/internal/bench"
	"github.com/vdisk/vdisk/internal/metrics"
	"github.com/vdisk/vdisk/internal/owner/sparse"
	"github.com/vdisk/vdisk/internal/storage"
	"github.com/vdisk/vdisk/ublk"
)

// Store is a store as commands see it, whichever process owns it. The methods' errors match the engine's errors
// (cow.Err…) and ErrUnsupported with errors.Is.
type Store interface {
	Status(ctx context.Context) (Status, error)
	Info(ctx context.Context) (cow.StoreInfo, error)
	Volumes(ctx context.Context) ([]Volume, error)
	Volume(ctx context.Context, name string) (Volume, error)
	// Usage returns the space that volumes and snapshots take: the named ones that exist, or all of them. It reads
	// their maps.
	Usage(ctx context.Context, refs ...cow.Ref) ([]cow.Usage, error)
	VolumeUsage(ctx context.Context, names ...string) ([]cow.Usage, error)

	CreateVolume(ctx context.Context, name string, o cow.VolumeOptions) (cow.VolumeInfo, error)
	Snapshot(ctx context.Context, refs ...cow.Ref) error
	// SnapshotAuto takes a snapshot, named by the time, of each volume that has changed since its newest one. Prune removes
	// snapshots that nothing needs, and that are still those which were meant; with dry, it only says which:
	// docs/retention.md.
	SnapshotAuto(ctx context.Context, volumes ...string) (cow.AutoReport, error)
	Prune(ctx context.Context, dry bool, targets ...cow.PruneTarget) (cow.PruneReport, error)
	// Clone makes volumes from a snapshot, all of them or none.
	Clone(ctx context.Context, src cow.Ref, names ...string) error
	Rollback(ctx context.Context, to cow.Ref) error
	Rename(ctx context.Context, from, to cow.Ref) error
	Resize(ctx context.Context, name string, size int64, shrink bool) error
	Remove(ctx context.Context, r cow.Ref, recursive bool) error
	// Hold and Release give and take a hold with a tag, which keeps snapshots from being removed.
	Hold(ctx context.Context, tag string, refs ...cow.Ref) error
	Release(ctx context.Context, tag string, refs ...cow.Ref) error
	// SetProperties changes properties of a volume. An empty value removes one.
	SetProperties(ctx context.Context, name string, changes map[string]string) error
	// DumpTable writes the table as text: see cow.Store.DumpTable.
	DumpTable(ctx context.Context, w io.Writer) error
	// Flatten copies all blocks that a volume shares with its origin, and then cuts it from its origin.
	Flatten(ctx context.Context, name string) (cow.FlattenReport, error)
	Check(ctx context.Context, o cow.CheckOptions, problem func(cow.Problem)) (cow.CheckReport, error)
	// Scrub starts, pauses or stops the scrub of the store (ScrubStart and so on), and returns what is then known of it.
	// The scrub runs in the process that owns the store.
	Scrub(ctx context.Context, what string, o cow.ScrubOptions) (cow.ScrubStatus, error)
	// Clean reclaims the space of every chunk file whose dead fraction is at least waste (0 to 1).
	Clean(ctx context.Context, waste float64) (cow.CleanReport, error)
	// Bench measures the engine, in the process that owns the store, on a scratch volume that it then removes. It calls
	// each with the result of each step.
	Bench(ctx context.Context, o bench.Options, each func(bench.Result)) error
	// Cold runs a whole cold pass: it compresses written data again, better and in order.
	Cold(ctx context.Context) (cow.ColdReport, error)

	// Import makes a volume with the content of src. o.Size is at least the size of src; 0 means that size, rounded up
	// to a logical block. The volume appears with its whole content, durably, or not at all. If progress is not nil, it
	// is called with the offset in src that has been reached.
	Import(ctx context.Context, name string, o cow.VolumeOptions, src sparse.Source, progress func(off int64)) (cow.VolumeInfo, error)
	// Repair writes the content of src over those blocks of a volume that cannot be read: see cow.Store.Repair.
	Repair(ctx context.Context, name string, src sparse.Source, progress func(off int64)) (cow.RepairReport, error)
	// Export calls use with the content of r. It fails if r is a volume that is open for writing, because its content
	// would not be of one moment.
	Export(ctx context.Context, r cow.Ref, use func(src sparse.Source) error) error

	// Salvage is Export of what can be read. It calls lost with each range that cannot be, before the data behind it is
	// handed out; there the content has zeros.
	Salvage(ctx context.Context, r cow.Ref, lost func(off, length int64), use func(src sparse.Source) error) error
	// Damage returns the damage that the owner has met, as far as it takes something of the volumes and snapshots in refs,
	// and what it takes of these; without refs, of any.
	Damage(ctx context.Context, refs ...cow.Ref) (KnownDamage, error)

	// Difference calls each with the extents in which to may be other than from, in order, some at a time. Without from,
	// these are all extents of data. It returns the sizes of both.
	Difference(ctx context.Context, from, to cow.Ref, each func([]Extent) error) (sizes [2]int64, err error)
	// Compare compares the contents of two volumes or snapshots. Like Export, it fails if one is open for writing.
	Compare(ctx context.Context, a, b cow.Ref) (Comparison, error)

	// ExportDiff calls use with the difference from one snapshot to another, or to a volume that is not open for writing,
	// in the format of package rbddiff. Without from it is all data.
	ExportDiff(ctx context.Context, from, to cow.Ref, use func(src sparse.Source) error) error
	// ImportDiff applies such a difference to a volume, and takes the snapshot to which it goes. See Owner.ImportDiff.
	ImportDiff(ctx context.Context, name string, v cow.VolumeOptions, force bool, src sparse.Source, progress func(off int64)) (ImportedDiff, error)

	// Send writes snapshots to w as streams, and Receive makes snapshots of the streams in r: docs/streams.md. A read of
	// r must end with ctx. AbortReceive gives up what has been received of a volume.
	Send(ctx context.Context, o cow.SendOptions, w io.Writer) ([]cow.Sent, error)
	Receive(ctx context.Context, r io.Reader, o cow.ReceiveOptions) ([]cow.Received, error)
	AbortReceive(ctx context.Context, name string) error

	// Attach makes a block device for a volume or snapshot. The device lives as long as the process that owns the
	// store.
	Attach(ctx context.Context, o AttachOptions) (Device, error)
	// Detach removes the block device that what names by its path, or by its volume or snapshot. A device that is open,
	// or that waits for its server, is refused (cow.ErrBusy) without force; with force its users' requests fail.
	Detach(ctx context.Context, what string, force bool) error
	// Recover serves waiting devices again: the one that what names as for Detach, or all if what is empty. An empty
	// outcome means that there was nothing to do.
	Recover(ctx context.Context, what string) ([]Recovery, error)
	// Claim declares that waiting devices, named as for Recover, belong to this store, although the store's folder was
	// on another file system when they were made. The caller knows that it is the same file system, mounted again, and
	// not a copy.
	Claim(ctx context.Context, what string) error
	// Stats returns the counters of the block device that what names as for Detach.
	Stats(ctx context.Context, what string) (DeviceStats, error)
	// Clients lists the connections of NBD clients, the oldest first.
	Clients(ctx context.Context) ([]NBDClient, error)
	// Disconnect ends connections of NBD clients, and returns them: those that have a volume or snapshot open, the one with
	// an ID, or those of a process (pid:N).
	Disconnect(ctx context.Context, what string) ([]NBDClient, error)
	// Reading reads the counters of the store, its clients and its block devices, and Metrics writes them in Prometheus's
	// text format: docs/metrics.md.
	Reading(ctx context.Context) (metrics.Reading, error)
	Metrics(ctx context.Context, w io.Writer) error
	// Serve serves the NBD clients that connect to l until ctx ends, which is not an error, and closes l.
	Serve(ctx context.Context, l net.Listener, o ServeOptions) error

	Close() error
}

// Options control how a store is opened.
type Options struct {
	// LockTimeout is how long to wait for a busy store whose owner does not answer.
	LockTimeout time.Duration
	// Command is the name of this process for others that ask who holds the store, such as "vdisk import".
	Command string
	// Offer lets other processes use the store while this one owns it.
	Offer bool
	// Temporary means that this process will end soon. It lets no device or NBD service depend on it.
	Temporary bool
	// MaxBytes limits the space of the chunk files while this process owns the store. With 0, only the file system
	// limits it.
	MaxBytes int64
	// Reserve is cow.Options.Reserve.
	Reserve int64
	// Logger logs events of devices and services. The default discards them.
	Logger *slog.Logger
	// MapCache is cow.Options.CacheBytes.
	MapCache int64
	// ColdAfter is cow.Options.ColdAfter.
	ColdAfter time.Duration
	// ScrubEvery is cow.Options.ScrubEvery, for an owner that lasts; 0: no scrub begins by itself.
	ScrubEvery time.Duration
	// FillLevels are the levels of cow.Store.WatchFill, for an owner that lasts.
	FillLevels []int
	// Foreign permits a store whose folder belongs to another user, or that other users may change (cow.ErrForeign).
	Foreign bool
	// Look is cow.Options.Look, for a command that only looks at the store.
	Look bool
	// Repair is cow.Options.Repair.
	Repair func(*cow.LogDamage) error
	// Version is the version of this program.
	Version string
	// Replaceable means that this process can execute another version of the program: it ends the owner by
	// CloseWhenDone or CloseWhenIdle, and then executes Successor.
	Replaceable bool
	// Starts means that GoOn will be called, and that there is no upgrade before.
	Starts bool
	// Handed has the NBD clients that another program handed over. All that they have open is held until GoOn.
	Handed *Handover
	// Handover is the reason why an upgrade that this process tried has failed. Status reports it.
	Handover string

	// Tests set the fields below. The trailing comments give the defaults.
	driver       driver // the kernel's
	names        names  // the system's, and nothing is told with another driver
	sharedMemory string // the system's
	memory       func() []memory
	threads      func() []room
	fs           storage.FS // of the chunk files; the store's folder
	// The program that an upgrade executes; the file that this program was started from.
	program        string
	sessionTimeout time.Duration // how long an upgrade waits for running commands
}

// lasts reports whether the owner serves others until it is told to end. Only then may it drop recorded devices that
// are gone, and delete dead ones.
func (o Options) lasts() bool { return o.Offer && !o.Temporary }

func (o Options) withDefaults() Options {
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.driver == nil {
		o.driver = kernel{}
		o.names = systemNames()
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

// Status describes the owner of a store, its devices and its services.
type Status struct {
	PID          int
	ProcessStart string // field 22 of proc_pid_stat(5)
	Command      string
	Version      string
	Handover     string // why the last upgrade failed; empty: it did not
	Temporary    bool
	Started      time.Time // when the owner opened the store
	Starting     bool      // it does not serve all of its NBD clients yet, and cannot be upgraded
	Reclaim      *Reclaim  // nil before the first device
	Devices      []Device
	Services     []Service
}

func (s Status) process() process { return process{s.PID, s.ProcessStart} }

// Volume is a volume, and the block devices of the volume and its snapshots.
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
	Waits    bool   // it waits for a server, and its users with it
	Error    string // why the last attempt to recover it failed
}

// DeviceStats are the counters of a block device.
type DeviceStats struct {
	Device Device
	Stats  ublk.Stats
}

// AttachOptions control how a device is attached. If Queues or Depth is 0, the owner chooses.
type AttachOptions struct {
	Ref           cow.Ref
	ReadOnly      bool
	Queues, Depth int
	// PartScan selects whether the kernel reads the partition table: "yes", "no" (an error on kernels before 7.0), or
	// empty. If it is empty, the kernel reads a volume's table. It reads a snapshot's only if the kernel cannot leave
	// that out.
	PartScan string `json:",omitempty"`
}

// Service is an NBD service.
type Service struct {
	Socket   string
	ReadOnly bool
	Exports  []string // empty: all
	Clients  int      // present connections
}

// ServeOptions select what to serve, and to whom.
type ServeOptions struct {
	Socket   string    // path of the socket, for Status
	Exports  []cow.Ref // empty: all volumes and snapshots, including future ones
	ReadOnly bool
	Shared   bool `json:",omitempty"` // all clients may write to a volume at once
	Once     bool // end when the last client has left
	// Fixed is for a command that reads all of its exports: they do not change. They are read-only, a volume that is open
	// for writing is refused, and none can be opened for writing until the service ends. The owner does not end before.
	Fixed bool `json:",omitempty"`

	// MaxConnections and MaxMemory are those of nbd.Options, for this service alone. 0 means the default.
	MaxConnections int `json:",omitempty"`
	// Certificates is a folder with the certificates of TLSConfig. Without it there is no TLS, and only a Unix socket can
	// be served.
	Certificates string `json:",omitempty"`
	MaxMemory    int64  `json:",omitempty"`
}
