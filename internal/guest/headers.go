package guest

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
)

// headersPackage has the kernel's user headers, from the suite that the newest kernel comes from.
const headersPackage = "linux-libc-dev/trixie-backports"

// Headers returns two folders of C headers: the user ABI of the newest kernel, and the part of it that depends on the
// processor. The first use gets them. Unlike a guest, they need no root.
func Headers(ctx context.Context, opts Options) ([]string, error) {
	b, err := newBuilder(opts)
	if err != nil {
		return nil, err
	}
	place := b.headersPath()
	err = b.getPackage(ctx, place, headersPackage, opts.Force, func(tree, dir string) error {
		if err := os.Rename(filepath.Join(tree, "usr/include"), filepath.Join(dir, "include")); err != nil {
			return err
		}
		return os.Rename(filepath.Join(tree, "usr/lib"), filepath.Join(dir, "lib"))
	})
	if err != nil {
		return nil, fmt.Errorf("guest: headers: %w", err)
	}
	return []string{filepath.Join(place, "include"), filepath.Join(place, "lib/linux/uapi/x86")}, nil
}

func (b *builder) headersPath() string {
	return filepath.Join(b.dir, "headers-"+recipeHash([]string{"headers 1", headersPackage}))
}

// Package returns a folder with the files of a package from the root image's suite, without those of its dependencies.
// The first use gets it. It is for programs that only one run in a guest needs. Unlike a guest, it needs no root.
func Package(ctx context.Context, opts Options, name string) (string, error) {
	b, err := newBuilder(opts)
	if err != nil {
		return "", err
	}
	name += "/" + rootSuite
	place := filepath.Join(b.dir, "package-"+recipeHash([]string{"package 1", name}))
	// The part's own folder has the time when it was made, this one the time of the package.
	files := filepath.Join(place, "files")
	err = b.getPackage(ctx, place, name, opts.Force, func(tree, dir string) error {
		return os.Rename(tree, filepath.Join(dir, "files"))
	})
	if err != nil {
		return "", fmt.Errorf("guest: package: %w", err)
	}
	return files, nil
}

// KernelFiles returns a folder with a kernel: vmlinuz, and in boot the modules that it needs to mount ext4 from a virtio
// disk, with names in the order of loading. The first use gets it. Unlike a guest, it needs no root.
func KernelFiles(ctx context.Context, opts Options, name string) (string, error) {
	specs, err := pickSpecs([]string{name})
	if err != nil {
		return "", err
	}
	b, err := newBuilder(opts)
	if err != nil {
		return "", err
	}
	place := b.kernelPath(specs[0])
	tools := []string{"dpkg-deb", "apt-get", "depmod", "xz", "zstd", "mke2fs"}
	err = b.download(ctx, place, tools, opts.Force, func(ctx context.Context, dir string) error { return b.makeKernel(ctx, specs[0], dir) })
	if err != nil {
		return "", fmt.Errorf("guest: kernel %s: %w", name, err)
	}
	return place, nil
}

// getPackage makes a part from the tree of an unpacked package, with fill, unless the part is there.
func (b *builder) getPackage(ctx context.Context, place, name string, force bool, fill func(tree, dir string) error) error {
	return b.download(ctx, place, []string{"dpkg-deb", "apt-get"}, force, func(ctx context.Context, dir string) error {
		b.say("getting %s", name)
		tree := dir + ".tree"
		if err := b.unpack(ctx, []string{name}, tree); err != nil {
			return err
		}
		return fill(tree, dir)
	})
}

// download makes a part of what Debian offers, with fill and the named tools, unless the part is there.
func (b *builder) download(ctx context.Context, place string, tools []string, force bool, fill func(context.Context, string) error) error {
	if !force && isDir(place) {
		return nil
	}
	if err := os.MkdirAll(b.dir, 0o755); err != nil {
		return fmt.Errorf("cache folder: %w", err)
	}
	lock, err := b.takeLock(ctx)
	if err != nil {
		return err
	}
	defer lock.Close()
	if err := b.install(ctx, tools); err != nil {
		return err
	}
	if _, err := os.Stat(keyring); err != nil {
		return fmt.Errorf("%w: no %s: install debian-archive-keyring", ErrUnavailable, keyring)
	}
	return b.part(ctx, place, fill)
}
