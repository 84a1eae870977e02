package guest

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Options select what Build makes, and where.
type Options struct {
	Dir     string    // cache folder; empty: DefaultDir
	Kernels []string  // names of the kernels wanted; empty: all
	Force   bool      // build again even if the recipe did not change, to get newer packages
	Log     io.Writer // progress, one line a step; nil: nowhere
}

// Image is a guest that was built: a root image and kernels.
type Image struct {
	dir     string // cache folder; it also holds the folders of runs
	root    string // folder of root.img and busybox
	kernels []Kernel
	accel   accelProbe
}

// staleAfter is how long a build of another recipe is kept, because guests of another checkout may be using it.
const staleAfter = 24 * time.Hour

// DefaultDir returns $VDISK_GUEST_DIR if it is set, else .guest in the folder of the nearest go.mod at or above the
// working folder.
func DefaultDir() (string, error) {
	if dir := os.Getenv("VDISK_GUEST_DIR"); dir != "" {
		return filepath.Abs(dir)
	}
	wd, err := os.Getwd()
	if err != nil {
		return "", fmt.Errorf("guest: cache folder: %w", err)
	}
	for dir := wd; ; dir = filepath.Dir(dir) {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			return filepath.Join(dir, ".guest"), nil
		}
		if dir == filepath.Dir(dir) {
			return "", fmt.Errorf("guest: no go.mod above %s: set VDISK_GUEST_DIR to a cache folder", wd)
		}
	}
}

// Build returns the guest for opts, and makes what the cache folder does not have yet. It may be interrupted, and may
// be called from several processes at once.
func Build(ctx context.Context, opts Options) (*Image, error) {
	b, err := newBuilder(opts)
	if err != nil {
		return nil, err
	}
	specs, err := pickSpecs(opts.Kernels)
	if err != nil {
		return nil, err
	}
	if !opts.Force {
		if img, ok := b.open(specs); ok {
			return img, b.install(ctx, runTools)
		}
	}
	if err := b.build(ctx, specs, opts.Force); err != nil {
		return nil, err
	}
	img, ok := b.open(specs)
	if !ok {
		return nil, fmt.Errorf("guest: the build in %s left parts out", b.dir)
	}
	return img, nil
}

// builder makes the parts of a guest. Each part is a folder <part>-<hash of its recipe>, which appears by a rename.
type builder struct {
	dir string
	log io.Writer
	// Both are set while building.
	apt *aptArea
	// debootstrap holds the lock, too: if this process is killed, debootstrap and its children may go on for a while.
	lock *os.File
}

func newBuilder(opts Options) (*builder, error) {
	b := &builder{log: opts.Log, dir: opts.Dir}
	if b.log == nil {
		b.log = io.Discard
	}
	if b.dir == "" {
		dir, err := DefaultDir()
		if err != nil {
			return nil, err
		}
		b.dir = dir
	}
	return b, nil
}

func (b *builder) takeLock(ctx context.Context) (*os.File, error) {
	return lockFile(ctx, filepath.Join(b.dir, "lock"), func() { b.say("waiting for another builder of %s", b.dir) })
}

func (b *builder) say(format string, args ...any) {
	fmt.Fprintf(b.log, "guest: "+format+"\n", args...)
}

// open returns the image if every part of the present recipe is there, else false.
func (b *builder) open(specs []kernelSpec) (*Image, bool) {
	img := &Image{dir: b.dir, root: b.rootPath()}
	if !isDir(img.root) {
		return nil, false
	}
	for _, s := range specs {
		k, err := openKernel(s.name, b.kernelPath(s))
		if err != nil {
			return nil, false
		}
		img.kernels = append(img.kernels, k)
	}
	return img, true
}

func (b *builder) rootPath() string {
	return filepath.Join(b.dir, "root-"+recipeHash(rootRecipe()))
}

func (b *builder) kernelPath(s kernelSpec) string {
	return filepath.Join(b.dir, "kernel-"+s.name+"-"+recipeHash(s.recipe()))
}

// recipeHash returns a name for a part, made of everything that we choose and that determines the part's content.
func recipeHash(parts []string) string {
	h := sha256.New()
	for _, p := range parts {
		fmt.Fprintf(h, "%d:%s,", len(p), p)
	}
	return hex.EncodeToString(h.Sum(nil))[:12]
}

// build makes the missing parts, or with force all of them, under the cache folder's lock.
func (b *builder) build(ctx context.Context, specs []kernelSpec, force bool) error {
	if os.Geteuid() != 0 {
		return fmt.Errorf("%w: building one runs debootstrap, which needs root: run `guest build` once as root, then any user can run it", ErrUnavailable)
	}
	if err := os.MkdirAll(b.dir, 0o755); err != nil {
		return fmt.Errorf("guest: cache folder: %w", err)
	}
	lock, err := b.takeLock(ctx)
	if err != nil {
		return err
	}
	defer lock.Close()
	b.lock = lock
	if err := b.sweep(); err != nil {
		return err
	}
	if err := b.install(ctx, slices.Concat(buildTools, runTools)); err != nil {
		return err
	}
	if force || !isDir(b.rootPath()) {
		if err := b.part(ctx, b.rootPath(), b.makeRoot); err != nil {
			return fmt.Errorf("guest: root image: %w", err)
		}
	}
	for _, s := range specs {
		if !force && isDir(b.kernelPath(s)) {
			continue
		}
		if err := b.part(ctx, b.kernelPath(s), func(ctx context.Context, dir string) error { return b.makeKernel(ctx, s, dir) }); err != nil {
			return fmt.Errorf("guest: kernel %s: %w", s.name, err)
		}
	}
	return nil
}

// part calls fill to make a folder's content in a temporary folder, and renames that to place.
func (b *builder) part(ctx context.Context, place string, fill func(context.Context, string) error) error {
	tmp, err := os.MkdirTemp(b.dir, "build-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp)
	if b.apt == nil {
		area, err := newAptArea(ctx, filepath.Join(b.dir, "apt"), b.say)
		if err != nil {
			return err
		}
		b.apt = area
	}
	part := filepath.Join(tmp, "part")
	if err := os.Mkdir(part, 0o755); err != nil {
		return err
	}
	if err := fill(ctx, part); err != nil {
		return err
	}
	if isDir(place) { // a forced build; guests that use the old part have its files open
		if err := os.Rename(place, filepath.Join(tmp, "old")); err != nil {
			return err
		}
	}
	return os.Rename(part, place)
}

// sweep removes what interrupted builds left, and parts of other recipes that can no longer be in use. The caller holds
// the lock, so no build is under way.
func (b *builder) sweep() error {
	entries, err := os.ReadDir(b.dir)
	if err != nil {
		return fmt.Errorf("guest: cache folder: %w", err)
	}
	for _, e := range entries {
		path := filepath.Join(b.dir, e.Name())
		switch {
		case strings.HasPrefix(e.Name(), "build-"):
		case strings.HasPrefix(e.Name(), "root-"), strings.HasPrefix(e.Name(), "kernel-"),
			strings.HasPrefix(e.Name(), "headers-"), strings.HasPrefix(e.Name(), "package-"):
			info, err := e.Info()
			if err != nil || time.Since(info.ModTime()) < staleAfter || b.current(path) {
				continue
			}
		default:
			continue
		}
		if err := os.RemoveAll(path); err != nil {
			return fmt.Errorf("guest: old build: %w", err)
		}
	}
	return nil
}

func (b *builder) current(path string) bool {
	if path == b.rootPath() || path == b.headersPath() {
		return true
	}
	for _, s := range kernelSpecs {
		if path == b.kernelPath(s) {
			return true
		}
	}
	return false
}

func isDir(path string) bool {
	info, err := os.Stat(path)
	return err == nil && info.IsDir()
}

// lockFile takes an exclusive flock on path. If it has to wait, it calls waiting once. Closing the file releases the
// lock.
func lockFile(ctx context.Context, path string, waiting func()) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o644)
	if err != nil {
		return nil, fmt.Errorf("guest: lock: %w", err)
	}
	for told := false; ; told = true {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return f, nil
		}
		if err != unix.EWOULDBLOCK && err != unix.EINTR {
			f.Close()
			return nil, fmt.Errorf("guest: lock %s: %w", path, err)
		}
		if !told {
			waiting()
		}
		select {
		case <-ctx.Done():
			f.Close()
			return nil, fmt.Errorf("guest: lock %s: %w", path, ctx.Err())
		case <-time.After(200 * time.Millisecond):
		}
	}
}

// command runs a tool and returns its output. An error contains the last lines that the tool printed.
func command(cmd *exec.Cmd) (string, error) {
	var out strings.Builder
	var all tailBuffer
	cmd.Stdout, cmd.Stderr = io.MultiWriter(&out, &all), &all
	cmd.WaitDelay = 5 * time.Second
	if err := cmd.Run(); err != nil {
		return out.String(), fmt.Errorf("%s: %w\n%s", filepath.Base(cmd.Path), err, all.tail(15))
	}
	return out.String(), nil
}
