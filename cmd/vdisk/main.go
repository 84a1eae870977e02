// Command vdisk makes, snapshots, clones and serves copy-on-write virtual disks.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/vdisk/vdisk/cow"
	"github.com/vdisk/vdisk/internal/freeze"
	"github.com/vdisk/vdisk/internal/owner"
)

func main() {
	setGOMAXPROCS()
	os.Exit(run(os.Args))
}

// setGOMAXPROCS lets twice as many threads run Go code as there are processors, unless GOMAXPROCS is set. The kernel
// gives a processor at once to a thread whose flush has ended. The Go scheduler would let it wait until a computing
// goroutine, such as a checkpoint, has used up its 10 ms (docs/engine.md, Locks and goroutines).
func setGOMAXPROCS() {
	if os.Getenv("GOMAXPROCS") == "" {
		runtime.GOMAXPROCS(2 * runtime.GOMAXPROCS(0))
	}
}

// app is what the commands share: the streams and the global flags.
type app struct {
	stdin          *os.File
	stdout, stderr io.Writer

	dir          string
	json         bool
	quiet        bool
	verbose      bool
	bytes        bool
	color        string
	lockTimeout  time.Duration
	maxSize      string
	maxBytes     int64 // parsed maxSize
	reserve      string
	reserveBytes int64 // parsed reserve
	foreign      bool
	mapCache     string // a size, as text
	cacheBytes   int64  // parsed mapCache
	coldAfter    time.Duration
	scrubEvery   time.Duration
	warnAt       string
	fillLevels   []int // of warnAt
	log          *slog.Logger

	freezer      freeze.System              // freezes file systems
	devicesBelow func(path string) []string // the block devices that a file system is on
}

// defaultStore is the store if none is named.
const defaultStore = "/var/lib/vdisk"

// run runs one command and returns its exit code.
func run(args []string) int {
	syscall.Umask(0o077) // stores, sockets and images are only for their owner
	// Writing to a pipe without a reader must not kill the process in the middle of its work. This holds for the output
	// and for diagnostics.
	signal.Ignore(syscall.SIGPIPE)
	ctx, stop := interruptible(context.Background())
	defer stop()
	out := newOutput(ctx, os.Stdout)
	a := &app{stdin: os.Stdin, stdout: plainWriter{out}, stderr: plainWriter{diagnostics{os.Stderr, new(atomic.Int64)}}, freezer: freeze.Kernel{}, devicesBelow: freeze.DevicesBelow}
	program := a.program()
	if len(args) < 2 || args[1] != completeVerb {
		args = reorderArgs(program, args)
	}
	err := program.RunContext(ctx, args)
	if err == nil {
		err = out.err()
	}
	if err == nil {
		return exitOK
	}
	return a.fail(withCause(ctx, err))
}

// withCause puts the signal that ended ctx, if any, before the error that resulted from it.
func withCause(ctx context.Context, err error) error {
	cause := context.Cause(ctx)
	if cause == nil || errors.Is(err, cause) {
		return err
	}
	var closing closeError
	if errors.As(err, &closing) {
		return fmt.Errorf("%w: %w", cause, closing)
	}
	if errors.Is(err, context.Canceled) {
		return cause
	}
	return fmt.Errorf("%w: %w", cause, err)
}

// together is how long after the first signal further ones count as the same: timeout(1) sends its signal to the
// process and then to its process group.
const together = time.Second

// interruptible returns a context that the first SIGINT, SIGTERM or SIGHUP ends, with a signalError as its cause. After
// together has passed, a further signal kills the process as if it were not caught.
func interruptible(parent context.Context) (context.Context, func()) {
	ctx, cancel := context.WithCancelCause(parent)
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM)
	if !signal.Ignored(syscall.SIGHUP) { // nohup(1) ignores it
		signal.Notify(signals, syscall.SIGHUP)
	}
	ended := make(chan struct{})
	go func() {
		select {
		case s := <-signals:
			cancel(signalError{s.(syscall.Signal)})
		case <-ended:
			return
		}
		select {
		case <-time.After(together):
			signal.Stop(signals)
		case <-ended:
		}
	}()
	return ctx, func() { close(ended); signal.Stop(signals); cancel(nil) }
}

// The environment variables for --map-cache, --cold-after, --scrub-every and --warn-at.
const (
	mapCacheEnv   = "VDISK_MAP_CACHE"
	coldAfterEnv  = "VDISK_COLD_AFTER"
	scrubEveryEnv = "VDISK_SCRUB_EVERY"
	warnAtEnv     = "VDISK_WARN_AT"
	reserveEnv    = "VDISK_RESERVE"
)

func (a *app) program() *cli.App {
	cli.VersionFlag = &cli.BoolFlag{Name: "version", Usage: "print the version"}
	return &cli.App{
		Name:            "vdisk",
		Usage:           "virtual disks with instant snapshots and clones, compressed and checksummed",
		Version:         version(),
		HideHelpCommand: true,
		Writer:          a.stdout,
		ErrWriter:       a.stderr,
		Flags:           a.globalFlags(),
		Before:          a.prepare,
		Action: func(c *cli.Context) error {
			if c.Args().Present() {
				return unknownCommand(c.App, c.Args().First())
			}
			cli.HelpPrinter(a.stderr, cli.AppHelpTemplate, c.App)
			return usagef("no command")
		},
		OnUsageError:   func(c *cli.Context, err error, _ bool) error { return flagError(c, err) },
		ExitErrHandler: func(*cli.Context, error) {}, // run determines the exit code
		Commands: []*cli.Command{
			a.createCommand(), a.lsCommand(), a.infoCommand(), a.snapshotCommand(), a.cloneCommand(), a.rollbackCommand(),
			a.renameCommand(), a.resizeCommand(), a.rmCommand(), a.pruneCommand(), a.holdCommand(), a.releaseCommand(), a.holdsCommand(), a.setCommand(), a.getCommand(), a.flattenCommand(),
			a.attachCommand(), a.detachCommand(), a.recoverCommand(), a.devicesCommand(), a.statsCommand(),
			a.serveCommand(), a.clientsCommand(), a.disconnectCommand(), a.daemonCommand(), a.upgradeCommand(),
			a.importCommand(), a.exportCommand(), a.diffCommand(), a.mapCommand(), a.compareCommand(),
			a.exportDiffCommand(), a.importDiffCommand(), a.sendCommand(), a.receiveCommand(), a.streamCommand(),
			a.checkCommand(), a.scrubCommand(), a.metadataCommand(), a.gcCommand(), a.eventsCommand(), a.historyCommand(), a.benchCommand(), a.topCommand(), a.metricsCommand(), a.featuresCommand(), a.versionCommand(),
			a.completionCommand(), a.completeCommand(), a.manCommand(),
		},
	}
}

// globalFlags returns the flags that every command takes.
func (a *app) globalFlags() []cli.Flag {
	return []cli.Flag{
		&cli.PathFlag{Name: "store", Usage: "the `DIR` that holds the volumes", EnvVars: []string{"VDISK_STORE"}, Value: defaultStore, Destination: &a.dir},
		&cli.BoolFlag{Name: "json", Usage: "print JSON, with sizes in bytes", Destination: &a.json},
		&cli.BoolFlag{Name: "bytes", Usage: "print sizes in bytes", Destination: &a.bytes},
		&cli.StringFlag{Name: "color", Usage: "colours: auto (on a terminal, unless NO_COLOR is set), always or never", Value: colorAuto, Destination: &a.color},
		&cli.BoolFlag{Name: "quiet", Aliases: []string{"q"}, Usage: "print neither notes nor progress", Destination: &a.quiet},
		&cli.BoolFlag{Name: "verbose", Aliases: []string{"v"}, Usage: "log what is done", EnvVars: []string{"VDISK_VERBOSE"}, Destination: &a.verbose},
		&cli.DurationFlag{Name: "lock-timeout", Usage: "how long to wait for a busy store", EnvVars: []string{"VDISK_LOCK_TIMEOUT"}, Value: 5 * time.Second, Destination: &a.lockTimeout},
		&cli.BoolFlag{Name: "foreign", Usage: "open a store even if its folder belongs to another user, or others may change it", EnvVars: []string{"VDISK_FOREIGN"}, Destination: &a.foreign},
		&cli.StringFlag{Name: "max-size", Usage: "limit the store's data to `SIZE` while this process owns it", EnvVars: []string{"VDISK_MAX_SIZE"}, Destination: &a.maxSize},
		&cli.StringFlag{Name: "reserve", Usage: "while this process owns the store, new data leaves `SIZE` of it to snapshots, overwrites and removals", EnvVars: []string{reserveEnv}, Value: "0", Destination: &a.reserve},
		&cli.DurationFlag{Name: "cold-after", Usage: "recompress, in idle time, data that has not changed for `DURATION`; 0: never", EnvVars: []string{coldAfterEnv}, Value: 10 * time.Minute, Destination: &a.coldAfter},
		&cli.DurationFlag{Name: "scrub-every", Usage: "read and verify all data once in `DURATION`, in the background, while a daemon or serve owns the store; 0: never", EnvVars: []string{scrubEveryEnv}, Value: 30 * 24 * time.Hour, Destination: &a.scrubEvery},
		&cli.StringFlag{Name: "warn-at", Usage: "while a daemon or serve owns the store, log and note when it is filled to `PERCENT,...`; off: never", EnvVars: []string{warnAtEnv}, Value: defaultWarnAt, Destination: &a.warnAt},
		&cli.StringFlag{Name: "map-cache", Usage: "limit the memory of the owner's block map to `SIZE`", EnvVars: []string{mapCacheEnv}, Value: "256M", Destination: &a.mapCache},
	}
}

// prepare checks the global flags before every command.
func (a *app) prepare(*cli.Context) error {
	level := slog.LevelWarn
	if a.verbose {
		level = slog.LevelDebug
	}
	a.log = slog.New(slog.NewTextHandler(a.stderr, &slog.HandlerOptions{Level: level}))
	if a.dir == "" {
		return usagef("--store is empty: it names the folder that holds the volumes")
	}
	if !slices.Contains([]string{colorAuto, colorAlways, colorNever}, a.color) {
		return usagef("--color %s: auto, always and never are possible", a.color)
	}
	if a.lockTimeout < 0 {
		return usagef("--lock-timeout %v is below zero", a.lockTimeout)
	}
	if a.coldAfter < 0 {
		return usagef("--cold-after %v is below zero", a.coldAfter)
	}
	if a.scrubEvery < 0 {
		return usagef("--scrub-every %v is below zero", a.scrubEvery)
	}
	var err error
	if a.fillLevels, err = parseFillLevels(a.warnAt); err != nil {
		return err
	}
	if a.maxSize != "" {
		if a.maxBytes, err = a.sizeBetween("--max-size", a.maxSize, cow.MinMaxBytes, math.MaxInt64); err != nil {
			return err
		}
	}
	if a.reserveBytes, err = a.sizeBetween("--reserve", a.reserve, 0, math.MaxInt64); err != nil {
		return err
	}
	if a.cacheBytes, err = a.sizeBetween("--map-cache", a.mapCache, cow.MinCacheBytes, cow.MaxCacheBytes); err != nil {
		return err
	}
	// These are for a daemon that this command starts, and for the programs that follow the daemon in an upgrade, which
	// may be older.
	if err := errors.Join(os.Setenv(mapCacheEnv, a.mapCache), os.Setenv(coldAfterEnv, a.coldAfter.String()), os.Setenv(scrubEveryEnv, a.scrubEvery.String()), os.Setenv(warnAtEnv, a.warnAt), os.Setenv(reserveEnv, a.reserve)); err != nil {
		return err
	}
	dir, err := filepath.Abs(a.dir)
	a.dir = dir
	return err
}

// Groups of commands in the help text.
const (
	groupVolumes     = "volumes"
	groupAccess      = "access"
	groupData        = "data"
	groupMaintenance = "maintenance"
)

// arity is the number of arguments that a command takes. most is -1 if there is no limit.
type arity struct{ least, most int }

// command completes a command: it checks the number of arguments, and makes usage errors short.
func (a *app) command(n arity, c *cli.Command, do func(*cli.Context) error) *cli.Command {
	c.HideHelpCommand = true
	c.UseShortOptionHandling = true
	c.CustomHelpTemplate = a.helpOf(c.Name)
	c.OnUsageError = func(c *cli.Context, err error, _ bool) error { return flagError(c, err) }
	c.Before = func(ctx *cli.Context) error {
		if k := ctx.NArg(); k < n.least || n.most >= 0 && k > n.most {
			return usageError{ctx, errors.New(miscounted(k, n))}
		}
		return nil
	}
	c.Action = do
	return c
}

func miscounted(k int, n arity) string {
	switch {
	case k < n.least && k == 0:
		return "arguments are missing"
	case k < n.least:
		return "an argument is missing"
	}
	return "too many arguments"
}

// options returns how a command opens the store.
func (a *app) options(c *cli.Context) owner.Options {
	cold := a.coldAfter
	if cold == 0 {
		cold = -1
	}
	return owner.Options{
		LockTimeout: a.lockTimeout, Command: "vdisk " + c.Command.Name, Logger: a.log, Version: version(), MaxBytes: a.maxBytes, Reserve: a.reserveBytes, MapCache: a.cacheBytes,
		ColdAfter: cold, ScrubEvery: a.scrubEvery, FillLevels: a.fillLevels, Foreign: a.foreign,
	}
}

// with opens the store, calls do and closes the store.
func (a *app) with(c *cli.Context, do func(owner.Store) error) error {
	return use(do)(owner.Open(c.Context, a.dir, a.options(c)))
}

// look is with for a command that only looks at the store.
func (a *app) look(c *cli.Context, do func(owner.Store) error) error {
	o := a.options(c)
	o.Look = true
	return use(do)(owner.Open(c.Context, a.dir, o))
}

// during is with for a command that may take long. Other commands can use the store through it meanwhile.
func (a *app) during(c *cli.Context, do func(owner.Store) error) error {
	o := a.options(c)
	o.Offer, o.Temporary = true, true
	return use(do)(owner.Open(c.Context, a.dir, o))
}

// lookLong is during for a command that only looks at the store.
func (a *app) lookLong(c *cli.Context, do func(owner.Store) error) error {
	o := a.options(c)
	o.Offer, o.Temporary, o.Look = true, true, true
	return use(do)(owner.Open(c.Context, a.dir, o))
}

// duringNew is during, and creates the store if there is none.
func (a *app) duringNew(c *cli.Context, do func(owner.Store) error) error {
	o := a.options(c)
	o.Offer, o.Temporary = true, true
	return use(do)(owner.OpenOrCreate(c.Context, a.dir, o))
}

// use returns a function that calls do with a store, if it could be opened, and closes the store.
func use(do func(owner.Store) error) func(owner.Store, error) error {
	return func(s owner.Store, err error) error {
		if errors.Is(err, cow.ErrNotFound) {
			return noStoreError{err}
		}
		if err != nil {
			return err
		}
		err = do(s)
		if cerr := s.Close(); cerr != nil {
			err = errors.Join(err, closeError{cerr})
		}
		return err
	}
}

// noStoreError is an error that there is no store.
type noStoreError struct{ error }

func (e noStoreError) Unwrap() error { return e.error }

// ref parses the n-th argument as a volume or snapshot.
func ref(c *cli.Context, n int) (cow.Ref, error) { return cow.ParseRef(c.Args().Get(n)) }

// argsFrom parses the n-th argument and all behind it.
func argsFrom[T any](c *cli.Context, n int, parse func(*cli.Context, int) (T, error)) (all []T, err error) {
	for ; n < c.NArg(); n++ {
		x, err := parse(c, n)
		if err != nil {
			return nil, err
		}
		all = append(all, x)
	}
	return all, nil
}

// snapshotRef parses the n-th argument as a snapshot.
func snapshotRef(c *cli.Context, n int) (cow.Ref, error) {
	r, err := ref(c, n)
	if err == nil && r.Snapshot == "" {
		err = usageError{c, fmt.Errorf("%v is a volume, and a snapshot is needed: %v@NAME", r, r)}
	}
	return r, err
}

// baseRef parses the value of a flag that names a snapshot from which something goes on: @NAME is one of the volume.
func baseRef(c *cli.Context, flag, volume string) (cow.Ref, error) {
	text := c.String(flag)
	if strings.HasPrefix(text, "@") {
		text = volume + text
	}
	r, err := cow.ParseRef(text)
	if err == nil && r.Snapshot == "" {
		err = usageError{c, fmt.Errorf("--%s %v is a volume, and a snapshot is needed: @NAME, or VOL@NAME", flag, r)}
	}
	return r, err
}

// volumeName parses the n-th argument as a volume.
func volumeName(c *cli.Context, n int) (string, error) {
	r, err := ref(c, n)
	if err == nil && r.Snapshot != "" {
		err = usageError{c, fmt.Errorf("%v is a snapshot, and a volume is needed", r)}
	}
	return r.Volume, err
}
