package guest

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
)

// headersPackage is the kernel's user headers, from the suite that the newest kernel comes from.
const headersPackage = "linux-libc-dev/trixie-backports"

// Headers returns two folders of C headers, the user ABI of the newest kernel and the part of it that depends on the
// processor, getting them on first use. Unlike a guest they need no root.
func Headers(ctx context.Context, opts Options) ([]string, error) {
	b, err := newBuilder(opts)
	if err != nil {
		return nil, err
	}
	place := b.headersPath()
	if opts.Force || !isDir(place) {
		if err := b.buildHeaders(ctx, place); err != nil {
			return nil, err
		}
	}
	return []string{filepath.Join(place, "include"), filepath.Join(place, "lib/linux/uapi/x86")}, nil
}

func (b *builder) headersPath() string {
	return filepath.Join(b.dir, "headers-"+recipeHash([]string{"headers 1", headersPackage}))
}

func (b *builder) buildHeaders(ctx context.Context, place string) error {
	if err := os.MkdirAll(b.dir, 0o755); err != nil {
		return fmt.Errorf("guest: cache folder: %w", err)
	}
	lock, err := b.takeLock(ctx)
	if err != nil {
		return err
	}
	defer lock.Close()
	tools := slices.DeleteFunc(slices.Clone(buildTools), func(p string) bool { return p != "dpkg-deb" && p != "apt-get" })
	if err := b.install(ctx, tools); err != nil {
		return err
	}
	if _, err := os.Stat(keyring); err != nil {
		return fmt.Errorf("%w: no %s: install debian-archive-keyring", ErrUnavailable, keyring)
	}
	err = b.part(ctx, place, func(ctx context.Context, dir string) error {
		b.say("getting %s", headersPackage)
		if err := b.unpack(ctx, []string{headersPackage}, dir+".tree"); err != nil {
			return err
		}
		if err := os.Rename(filepath.Join(dir+".tree", "usr/include"), filepath.Join(dir, "include")); err != nil {
			return err
		}
		return os.Rename(filepath.Join(dir+".tree", "usr/lib"), filepath.Join(dir, "lib"))
	})
	if err != nil {
		return fmt.Errorf("guest: headers: %w", err)
	}
	return nil
}
