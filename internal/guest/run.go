package guest

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"time"
)

// Run is one boot of a guest, and what the guest does.
type Run struct {
	Kernel string // "stable" (also if empty) or "newest"
	// Files maps a file or folder in the guest (below /payload unless absolute) to one of the host.
	Files  map[string]string
	Script string // bash, run as root in /payload; its exit status is the run's

	CPUs    int           // default 2
	Memory  int           // MiB; default 3072
	Timeout time.Duration // from the start of QEMU, with all tries at booting; default 5 minutes
	// Systemd lets systemd be process 1. The script runs once the guest has come up, and then the guest goes down in order.
	Systemd bool
	Append  string // added to the kernel's command line

	ScratchSize int64  // bytes; default 8 GiB; negative: no scratch disk
	ScratchFile string // kept between runs; formatted only if it does not exist. Empty: a temporary file
	Durable     bool   // flushes of the scratch disk reach the host's disk; else ignored (cache=unsafe)

	RootFile string // overlay of the root image, kept between runs; made if it does not exist. Empty: a temporary one

	Results string    // host folder that gets the content of /results; empty: no such disk
	Stdout  io.Writer // the payload's stdout and stderr, live; nil: dropped

	// Terminal connects the guest's second serial port, /dev/ttyS1, to the calling process's stdin and stdout.
	Terminal bool
}

// Result describes the outcome of a run.
type Result struct {
	ExitCode int           // of the script; -1 if it did not end
	PowerCut bool          // the payload asked for a power cut, and got it
	Console  string        // everything that the kernel printed on its console
	Alerts   []Alert       // trouble in that
	Release  string        // of the kernel
	Machine  string        // QEMU's -accel and -cpu
	Boot     time.Duration // from the start of QEMU to the start of the script
	Elapsed  time.Duration // from the start of QEMU to its end
	Failed   []error       // earlier tries, which did not boot
}

const (
	defaultTimeout = 5 * time.Minute
	defaultMemory  = 3072
	defaultScratch = 8 << 30
	resultsSize    = 4 << 30
	// bootTimeout is for one try. An emulated guest takes 6 s on an idle machine, and 40 s on a very busy one.
	bootTimeout = 120 * time.Second
	// endTimeout is how long the guest may take to reset once its payload has ended.
	endTimeout = 60 * time.Second
	// systemdTimes is how many times as long both may take with systemd.
	systemdTimes = 4
)

// Run boots the guest, runs the script, and waits for its end. The result is nil only if nothing could be started. A
// script that fails is not an error.
func (img *Image) Run(ctx context.Context, r Run) (*Result, error) {
	r.setDefaults()
	k, err := img.kernel(r.Kernel)
	if err != nil {
		return nil, err
	}
	if qemuProgram() == "" {
		return nil, fmt.Errorf("%w: no qemu-system-x86_64: apt-get install qemu-system-x86", ErrUnavailable)
	}
	dir, release, err := img.runDir()
	if err != nil {
		return nil, err
	}
	defer release()
	ctx, cancel := context.WithTimeout(ctx, r.Timeout)
	defer cancel()
	disks, err := img.prepare(ctx, k, r, dir)
	if err != nil {
		return nil, fmt.Errorf("guest: preparing the run: %w", err)
	}
	var res *Result
	var failed []error
	machines := img.machines(ctx, k)
	for i, m := range machines {
		res, err = bootOnce(ctx, boot{run: r, kernel: k, machine: m, dir: dir, disks: disks})
		if res != nil {
			res.Failed = failed
		}
		if !errors.Is(err, ErrBoot) || i == len(machines)-1 {
			break
		}
		failed = append(failed, err)
	}
	if r.Results != "" && res != nil {
		if cerr := copyResults(disks.results, r.Results); cerr != nil && err == nil {
			err = fmt.Errorf("guest: results: %w", cerr)
		}
	}
	return res, err
}

func (r *Run) setDefaults() {
	if r.CPUs == 0 {
		r.CPUs = 2
	}
	if r.Memory == 0 {
		r.Memory = defaultMemory
	}
	if r.Timeout == 0 {
		r.Timeout = defaultTimeout
	}
	if r.ScratchSize == 0 {
		r.ScratchSize = defaultScratch
	}
	if r.Stdout == nil {
		r.Stdout = io.Discard
	}
}

// runDir makes a folder for a run's files, and returns a function that removes it. It also removes the folders of runs
// that were killed: their locks are free.
func (img *Image) runDir() (dir string, release func(), err error) {
	done, cancel := context.WithCancel(context.Background())
	cancel() // do not wait for a lock that is taken
	old, _ := filepath.Glob(filepath.Join(img.dir, "run-*.lock"))
	for _, lock := range old {
		if f, err := lockFile(done, lock, func() {}); err == nil {
			os.RemoveAll(lock[:len(lock)-len(".lock")])
			os.Remove(lock)
			f.Close()
		}
	}
	base := img.dir
	id := newNonce()
	dir = filepath.Join(base, "run-"+id)
	lock, err := lockFile(done, dir+".lock", func() {})
	if err != nil { // the cache folder belongs to another user
		if base, err = os.MkdirTemp("", "vdisk-guest-"); err != nil {
			return "", nil, fmt.Errorf("guest: run folder: %w", err)
		}
		return base, func() { os.RemoveAll(base) }, nil
	}
	release = func() {
		os.RemoveAll(dir)
		os.Remove(dir + ".lock")
		lock.Close()
	}
	if err := os.Mkdir(dir, 0o755); err != nil {
		release()
		return "", nil, fmt.Errorf("guest: run folder: %w", err)
	}
	return dir, release, nil
}

func newNonce() string {
	var b [8]byte
	rand.Read(b[:])
	return hex.EncodeToString(b[:])
}

// disks are the files behind a guest's disks; "" means that there is no such disk.
type disks struct{ root, overlay, modules, payload, scratch, results, initrd string }

func (img *Image) prepare(ctx context.Context, k Kernel, r Run, dir string) (disks, error) {
	d := disks{
		root: filepath.Join(img.root, "root.img"), modules: k.modules(),
		payload: filepath.Join(dir, "payload.tar"), initrd: filepath.Join(dir, "initrd"),
	}
	if err := img.writeInitrd(k, d.initrd); err != nil {
		return d, err
	}
	if r.RootFile != "" {
		d.overlay = r.RootFile
		if err := makeOverlay(ctx, d.overlay, d.root); err != nil {
			return d, err
		}
	}
	if err := writePayload(d.payload, r.Files, r.Script); err != nil {
		return d, err
	}
	if r.ScratchSize > 0 {
		d.scratch = r.ScratchFile
		if d.scratch == "" {
			d.scratch = filepath.Join(dir, "scratch.img")
		}
		if _, err := os.Stat(d.scratch); errors.Is(err, os.ErrNotExist) {
			if err := makeExt4(ctx, d.scratch, r.ScratchSize, ""); err != nil {
				return d, err
			}
		}
	}
	if r.Results != "" {
		d.results = filepath.Join(dir, "results.img")
		// No journal: what a killed guest had written can be read without a replay.
		if err := makeExt4(ctx, d.results, resultsSize, "", "-O", "^has_journal"); err != nil {
			return d, err
		}
	}
	return d, nil
}

// makeOverlay makes a file that has what is written to the root image, unless it exists.
func makeOverlay(ctx context.Context, file, root string) error {
	if _, err := os.Stat(file); err == nil || !errors.Is(err, os.ErrNotExist) {
		return err
	}
	base, err := filepath.Abs(root)
	if err != nil {
		return err
	}
	_, err = command(exec.CommandContext(ctx, lookTool("qemu-img"), "create", "-q", "-f", "qcow2", "-F", "raw", "-b", base, file))
	return err
}

// copyResults copies the files out of a results disk.
func copyResults(image, to string) error {
	if err := os.MkdirAll(to, 0o755); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	_, err := command(exec.CommandContext(ctx, lookTool("debugfs"), "-R", fmt.Sprintf("rdump / %q", to), image))
	os.Remove(filepath.Join(to, "lost+found"))
	return err
}
