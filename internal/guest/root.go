package guest

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
)

const rootSuite = "trixie"

// rootSize is the size of the root file system. The file is sparse, and what a run writes goes to its overlay.
const rootSize = 4 << 30

// rootPackages are what tests in a guest need, besides Debian's essential packages.
var rootPackages = []string{
	"busybox-static", // copied out of the root image, for initrds
	"systemd",        // process 1 of runs that ask for it
	"fio", "e2fsprogs", "xfsprogs", "btrfs-progs", "util-linux", "coreutils", "kmod", "udev", "procps", "psmisc", "iproute2",
	"libnbd-bin", "nbd-client", "qemu-utils", "fuse3", "dmsetup", "sqlite3", "strace", "python3-minimal", "xxd",
}

// rootDropped is left out of the image to make it smaller.
var rootDropped = []string{"var/cache/apt", "var/lib/apt/lists", "usr/share/doc", "usr/share/man", "usr/share/locale", "usr/lib/modules"}

func rootRecipe() []string {
	parts := append([]string{"root 1", rootSuite}, rootPackages...)
	return append(append(parts, "without"), rootDropped...)
}

// makeRoot fills dir with root.img and busybox.
func (b *builder) makeRoot(ctx context.Context, dir string) error {
	tree := dir + ".tree"
	if err := b.debootstrap(ctx, tree); err != nil {
		return err
	}
	for _, d := range rootDropped {
		if err := os.RemoveAll(filepath.Join(tree, d)); err != nil {
			return err
		}
	}
	for _, d := range []string{"var/cache/apt/archives/partial", "var/lib/apt/lists/partial", "usr/lib/modules", "payload", "scratch", "results"} {
		if err := os.MkdirAll(filepath.Join(tree, d), 0o755); err != nil {
			return err
		}
	}
	busybox := firstFile(tree, "usr/bin/busybox", "bin/busybox")
	if err := copyFile(filepath.Join(dir, "busybox"), busybox); err != nil {
		return err
	}
	b.say("writing the root image")
	return makeExt4(ctx, filepath.Join(dir, "root.img"), rootSize, tree)
}

func (b *builder) debootstrap(ctx context.Context, tree string) error {
	b.say("getting Debian %s from %s (about a minute)", rootSuite, b.apt.mirrors.main)
	args := []string{
		"--variant=minbase", "--arch=amd64", "--keyring=" + keyring, "--include=" + strings.Join(rootPackages, ","),
		rootSuite, tree, b.apt.mirrors.main,
	}
	if _, err := os.Stat("/usr/share/debootstrap/scripts/" + rootSuite); err != nil {
		// debootstrap is older than the suite.
		args = append(args, "/usr/share/debootstrap/scripts/sid")
	}
	cmd := exec.CommandContext(ctx, lookTool("debootstrap"), args...)
	cmd.Env = append(os.Environ(), "DEBIAN_FRONTEND=noninteractive", "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
	if p := b.apt.proxy(ctx); p != "" {
		cmd.Env = append(cmd.Env, "http_proxy="+p)
	}
	cmd.ExtraFiles = []*os.File{b.lock}
	// debootstrap mounts /proc and /sys in a namespace of its own. So the mounts go with it even if it is killed, and
	// removing the tree cannot reach through them. The process group makes sure that its children are killed, too.
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS, Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	_, err := command(cmd)
	return err
}

// makeExt4 writes a sparse ext4 image, with the content of a folder unless from is "".
func makeExt4(ctx context.Context, file string, size int64, from string, options ...string) error {
	if err := createSparse(file, size); err != nil {
		return err
	}
	args := append([]string{"-q", "-F", "-t", "ext4", "-m", "0", "-E", "lazy_itable_init=1,lazy_journal_init=1,nodiscard"}, options...)
	if from != "" {
		args = append(args, "-d", from)
	}
	if _, err := command(exec.CommandContext(ctx, lookTool("mke2fs"), append(args, file)...)); err != nil {
		return fmt.Errorf("%s: %w", file, err)
	}
	return nil
}

func createSparse(file string, size int64) error {
	f, err := os.OpenFile(file, os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o644)
	if err != nil {
		return err
	}
	if err := f.Truncate(size); err != nil {
		f.Close()
		return err
	}
	return f.Close()
}

func copyFile(to, from string) error {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o755)
	if err != nil {
		return err
	}
	if _, err := io.Copy(out, in); err != nil {
		out.Close()
		return err
	}
	return out.Close()
}
