package guest

import (
	"bufio"
	"context"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// Kernel is a kernel that a guest can boot.
type Kernel struct {
	Name    string // "stable" or "newest"
	Release string // as uname -r prints it
	dir     string
}

func (k Kernel) vmlinuz() string { return filepath.Join(k.dir, "vmlinuz") }
func (k Kernel) modules() string { return filepath.Join(k.dir, "modules.img") }

// Kernels lists the image's kernels.
func (img *Image) Kernels() []Kernel { return slices.Clone(img.kernels) }

func (img *Image) kernel(name string) (Kernel, error) {
	for _, k := range img.kernels {
		if k.Name == name || (name == "" && k.Name == kernelSpecs[0].name) {
			return k, nil
		}
	}
	return Kernel{}, fmt.Errorf("guest: no kernel %q in this image", name)
}

// kernelSpec selects the releases that may be a kernel. Each pattern matches the text between "linux-image-" (or
// "linux-modules-", since 7.2) and "-unsigned". A release that matches an earlier pattern is preferred, then the
// newest.
type kernelSpec struct {
	name     string
	releases []string
}

var kernelSpecs = []kernelSpec{
	// The oldest kernel with ublk that Debian still supports: the one built for bookworm, or trixie's when that has
	// gone.
	{"stable", []string{`6\.12\.[0-9]+\+deb12[^-]*-cloud-amd64`, `6\.12\.[0-9]+\+deb[^-]*-cloud-amd64`}},
	{"newest", []string{`[0-9]+\.[0-9]+\.[0-9]+\+deb13[^-]*-cloud-amd64`}},
}

// bootModules are needed before the root image can be mounted. Those that are built into a kernel are not among its
// modules.
var bootModules = []string{"virtio_pci", "virtio_blk", "virtio_console", "ext4"}

// recipe changes if a build from the same packages would make another folder.
func (s kernelSpec) recipe() []string {
	return append(append([]string{"kernel 2"}, s.releases...), bootModules...)
}

func pickSpecs(names []string) ([]kernelSpec, error) {
	if len(names) == 0 {
		return kernelSpecs, nil
	}
	var specs []kernelSpec
	for _, n := range names {
		i := slices.IndexFunc(kernelSpecs, func(s kernelSpec) bool { return s.name == n })
		if i < 0 {
			return nil, fmt.Errorf("guest: no kernel %q: there are stable and newest", n)
		}
		specs = append(specs, kernelSpecs[i])
	}
	return specs, nil
}

// candidates lists the releases among the offered packages that match, best first.
func (s kernelSpec) candidates(offered []string) []string {
	var all []string
	for _, pattern := range s.releases {
		re := regexp.MustCompile(`^linux-(?:image|modules)-(` + pattern + `)(?:-unsigned)?$`)
		var fit []string
		for _, name := range offered {
			if m := re.FindStringSubmatch(name); m != nil && !slices.Contains(all, m[1]) && !slices.Contains(fit, m[1]) {
				fit = append(fit, m[1])
			}
		}
		slices.SortFunc(fit, func(a, b string) int { return compareVersions(b, a) })
		all = append(all, fit...)
	}
	return all
}

// kernelPackages picks from the offered packages those that together contain a release: one package up to 7.1, and the
// packages binary, modules and base since then. Signed and unsigned packages contain the same code.
func kernelPackages(offered []string, release string) []string {
	var pkgs []string
	for _, choice := range [][]string{
		{"linux-image-" + release + "-unsigned", "linux-image-" + release},
		{"linux-binary-" + release, "linux-binary-unsigned-" + release},
		{"linux-modules-" + release},
		{"linux-base-" + release},
	} {
		for _, name := range choice {
			if slices.Contains(offered, name) {
				pkgs = append(pkgs, name)
				break
			}
		}
	}
	return pkgs
}

// compareVersions compares runs of digits as numbers, and the text between them as text, like sort -V.
func compareVersions(a, b string) int {
	for a != "" && b != "" {
		na, nb := digits(a), digits(b)
		if na > 0 && nb > 0 {
			x, _ := strconv.ParseUint(a[:na], 10, 64)
			y, _ := strconv.ParseUint(b[:nb], 10, 64)
			if x != y {
				if x < y {
					return -1
				}
				return 1
			}
			a, b = a[na:], b[nb:]
			continue
		}
		if a[0] != b[0] {
			return int(a[0]) - int(b[0])
		}
		a, b = a[1:], b[1:]
	}
	return len(a) - len(b)
}

func digits(s string) int {
	n := 0
	for n < len(s) && s[n] >= '0' && s[n] <= '9' {
		n++
	}
	return n
}

// makeKernel fills dir with release, vmlinuz, modules.img and boot/NN-module.ko.
func (b *builder) makeKernel(ctx context.Context, s kernelSpec, dir string) error {
	offered, err := b.apt.names(ctx, "linux-")
	if err != nil {
		return err
	}
	tree := dir + ".tree"
	for _, release := range s.candidates(offered) {
		b.say("kernel %s: getting %s", s.name, release)
		if err := os.RemoveAll(tree); err != nil {
			return err
		}
		if err := b.unpack(ctx, kernelPackages(offered, release), tree); err != nil {
			return err
		}
		vmlinuz := firstFile(tree, "boot/vmlinuz-"+release, "usr/lib/modules/"+release+"/vmlinuz", "lib/modules/"+release+"/vmlinuz")
		modules := firstFile(tree, "usr/lib/modules/"+release+"/kernel", "lib/modules/"+release+"/kernel")
		if vmlinuz == "" || modules == "" {
			b.say("kernel %s: the packages of %s are not complete, trying an older one", s.name, release)
			continue
		}
		return b.fillKernel(ctx, dir, release, vmlinuz, filepath.Dir(modules))
	}
	return fmt.Errorf("%w: no package of a %s kernel at %s", ErrUnavailable, s.name, b.apt.mirrors.main)
}

func (b *builder) unpack(ctx context.Context, pkgs []string, tree string) error {
	debs := tree + ".debs"
	for _, d := range []string{tree, debs} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			return err
		}
	}
	defer os.RemoveAll(debs)
	if _, err := b.apt.run(ctx, debs, "apt-get", append([]string{"-q", "download"}, pkgs...)...); err != nil {
		return err
	}
	files, err := filepath.Glob(filepath.Join(debs, "*.deb"))
	if err != nil {
		return err
	}
	for _, f := range files {
		if _, err := command(exec.CommandContext(ctx, "dpkg-deb", "-x", f, tree)); err != nil {
			return err
		}
	}
	return nil
}

func firstFile(root string, names ...string) string {
	for _, n := range names {
		if _, err := os.Stat(filepath.Join(root, n)); err == nil {
			return filepath.Join(root, n)
		}
	}
	return ""
}

// fillKernel makes a kernel's folder from an unpacked vmlinuz and the folder of its modules.
func (b *builder) fillKernel(ctx context.Context, dir, release, vmlinuz, modules string) error {
	// depmod looks below BASE/lib/modules, so the modules move to a tree of exactly that shape.
	base := filepath.Join(filepath.Dir(dir), "base")
	if err := os.MkdirAll(filepath.Join(base, "lib/modules"), 0o755); err != nil {
		return err
	}
	if err := copyFile(filepath.Join(dir, "vmlinuz"), vmlinuz); err != nil {
		return err
	}
	mods := filepath.Join(base, "lib/modules", release)
	if err := os.Rename(modules, mods); err != nil {
		return err
	}
	if err := os.RemoveAll(filepath.Join(mods, "vmlinuz")); err != nil {
		return err
	}
	if err := decompressModules(ctx, mods); err != nil {
		return err
	}
	if _, err := command(exec.CommandContext(ctx, lookTool("depmod"), "-b", base, release)); err != nil {
		return err
	}
	if err := bootModuleFiles(mods, filepath.Join(dir, "boot")); err != nil {
		return err
	}
	if err := makeExt4(ctx, filepath.Join(dir, "modules.img"), 512<<20, filepath.Dir(mods)); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, "release"), []byte(release+"\n"), 0o644)
}

// bootModuleFiles copies the boot modules and their dependencies, with names in the order of loading.
func bootModuleFiles(mods, to string) error {
	dep, err := os.ReadFile(filepath.Join(mods, "modules.dep"))
	if err != nil {
		return err
	}
	if err := os.MkdirAll(to, 0o755); err != nil {
		return err
	}
	for i, f := range loadOrder(string(dep), bootModules) {
		if err := copyFile(filepath.Join(to, fmt.Sprintf("%02d-%s", i, path.Base(f))), filepath.Join(mods, f)); err != nil {
			return err
		}
	}
	return nil
}

// loadOrder reads modules.dep and lists the files of the named modules, each after those that it needs. A line of
// modules.dep is "file: needed files", the last needed first (modules.dep(5)).
func loadOrder(dep string, names []string) []string {
	needs := map[string][]string{}
	file := map[string]string{}
	sc := bufio.NewScanner(strings.NewReader(dep))
	for sc.Scan() {
		f, rest, ok := strings.Cut(sc.Text(), ":")
		if !ok {
			continue
		}
		name, _, _ := strings.Cut(path.Base(f), ".ko")
		file[strings.ReplaceAll(name, "-", "_")] = f
		needs[f] = strings.Fields(rest)
	}
	var order []string
	for _, n := range names {
		f, ok := file[n]
		if !ok {
			continue // it is built in
		}
		for _, need := range slices.Backward(append([]string{f}, needs[f]...)) {
			if !slices.Contains(order, need) {
				order = append(order, need)
			}
		}
	}
	return order
}

// decompressModules replaces compressed modules by plain ones, because an emulated processor takes seconds to unpack
// xfs.
func decompressModules(ctx context.Context, mods string) error {
	files := map[string][]string{} // by the tool that unpacks them
	err := filepath.WalkDir(mods, func(file string, d fs.DirEntry, err error) error {
		switch {
		case strings.HasSuffix(file, ".ko.xz"):
			files["xz"] = append(files["xz"], file)
		case strings.HasSuffix(file, ".ko.zst"):
			files["zstd"] = append(files["zstd"], file)
		}
		return err
	})
	if err != nil {
		return err
	}
	for tool, list := range files {
		args := []string{"-d", "-q"}
		if tool == "zstd" {
			args = append(args, "--rm")
		}
		for part := range slices.Chunk(list, 200) {
			if _, err := command(exec.CommandContext(ctx, tool, append(args, part...)...)); err != nil {
				return err
			}
		}
	}
	return nil
}

// openKernel reads a kernel's folder back.
func openKernel(name, dir string) (Kernel, error) {
	release, err := os.ReadFile(filepath.Join(dir, "release"))
	if err != nil {
		return Kernel{}, err
	}
	return Kernel{Name: name, Release: strings.TrimSpace(string(release)), dir: dir}, nil
}
