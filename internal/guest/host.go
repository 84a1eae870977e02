package guest

import (
	"context"
	"fmt"
	"net/url"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strings"
)

var (
	runTools = []string{"qemu-system-x86_64", "qemu-img", "mke2fs", "debugfs"}

	buildTools = []string{"debootstrap", "dpkg-deb", "depmod", "xz", "zstd", "apt-get"}

	packageOf = map[string]string{
		"qemu-system-x86_64": "qemu-system-x86",
		"qemu-img":           "qemu-utils",
		"mke2fs":             "e2fsprogs",
		"debugfs":            "e2fsprogs",
		"debootstrap":        "debootstrap",
		"dpkg-deb":           "dpkg",
		"depmod":             "kmod",
		"xz":                 "xz-utils",
		"zstd":               "zstd",
		"apt-get":            "apt",
	}
)

// keyring has Debian's archive keys, on Debian and on Ubuntu (package debian-archive-keyring).
const keyring = "/usr/share/keyrings/debian-archive-keyring.gpg"

func missingPackages(programs []string) []string {
	var missing []string
	for _, p := range programs {
		if lookTool(p) != "" {
			continue
		}
		if pkg := packageOf[p]; len(missing) == 0 || missing[len(missing)-1] != pkg {
			missing = append(missing, pkg)
		}
	}
	return missing
}

// lookTool finds a program. It also looks in the sbin folders, which a plain user's PATH lacks.
func lookTool(program string) string {
	if p, err := exec.LookPath(program); err == nil {
		return p
	}
	for _, dir := range []string{"/usr/local/sbin", "/usr/sbin", "/sbin"} {
		if p, err := exec.LookPath(filepath.Join(dir, program)); err == nil {
			return p
		}
	}
	return ""
}

// install installs the packages of the missing programs. With debootstrap it installs Debian's keys, too.
func (b *builder) install(ctx context.Context, programs []string) error {
	missing := missingPackages(programs)
	if _, err := os.Stat(keyring); err != nil && slices.Contains(programs, "debootstrap") {
		missing = append(missing, "debian-archive-keyring")
	}
	if len(missing) == 0 {
		return nil
	}
	if os.Geteuid() != 0 {
		return fmt.Errorf("%w: missing %s: as root, apt-get install %[2]s", ErrUnavailable, strings.Join(missing, " "))
	}
	if lookTool("apt-get") == "" {
		return fmt.Errorf("%w: missing %s and there is no apt-get: use a Debian or Ubuntu machine, or install them by hand", ErrUnavailable, strings.Join(missing, " "))
	}
	b.say("installing %s", strings.Join(missing, " "))
	args := append([]string{"-o", "DPkg::Lock::Timeout=120", "install", "-y", "-q", "--no-install-recommends"}, missing...)
	get := func(args ...string) error {
		cmd := exec.CommandContext(ctx, lookTool("apt-get"), args...)
		cmd.Env = append(os.Environ(), "DEBIAN_FRONTEND=noninteractive")
		_, err := command(cmd)
		return err
	}
	if get(args...) == nil { // fails on a machine whose package lists are missing or old
		return nil
	}
	if err := get("-q", "update"); err != nil {
		b.say("%v", err) // some other source may be down; the install reports whether it matters
	}
	if err := get(args...); err != nil {
		return fmt.Errorf("%w: apt-get cannot install %s: %w", ErrUnavailable, strings.Join(missing, " "), err)
	}
	return nil
}

// mirrors are the addresses of Debian's archive and of its security archive.
type mirrors struct{ main, security string }

// hostMirrors takes the addresses from the machine's apt sources. An Ubuntu machine names none, so it gets Debian's
// own.
func hostMirrors() mirrors {
	var text strings.Builder
	files := []string{"/etc/apt/sources.list"}
	for _, ext := range []string{"*.list", "*.sources"} {
		more, _ := filepath.Glob(filepath.Join("/etc/apt/sources.list.d", ext))
		files = append(files, more...)
	}
	for _, f := range files {
		if b, err := os.ReadFile(f); err == nil {
			text.Write(b)
			text.WriteByte('\n')
		}
	}
	return findMirrors(text.String())
}

// findMirrors reads sources in both of apt's formats (sources.list(5)). A source is Debian's if its address ends in
// /debian or /debian-security, as on every public mirror.
func findMirrors(sources string) mirrors {
	var m mirrors
	for line := range strings.Lines(sources) {
		line, _, _ = strings.Cut(line, "#")
		fields := strings.Fields(line)
		if len(fields) < 2 || (fields[0] != "deb" && !strings.EqualFold(fields[0], "URIs:")) {
			continue
		}
		for _, f := range fields[1:] {
			u, err := url.Parse(f)
			if err != nil || (u.Scheme != "http" && u.Scheme != "https") {
				continue
			}
			addr := strings.TrimRight(f, "/")
			switch path.Base(strings.TrimRight(u.Path, "/")) {
			case "debian":
				if m.main == "" {
					m.main = addr
				}
			case "debian-security":
				if m.security == "" {
					m.security = addr
				}
			}
		}
	}
	if m.main == "" {
		m.main = "http://deb.debian.org/debian"
	}
	if m.security == "" {
		m.security = m.main + "-security"
	}
	return m
}

// aptArea is a private apt: it has its own sources, lists and cache, and the machine's other settings, such as proxies.
type aptArea struct {
	dir     string
	mirrors mirrors
}

func newAptArea(ctx context.Context, dir string, say func(string, ...any)) (*aptArea, error) {
	a := &aptArea{dir: dir, mirrors: hostMirrors()}
	for _, d := range []string{"lists/partial", "cache/archives/partial"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			return nil, err
		}
	}
	var list strings.Builder
	for _, s := range []struct{ addr, suite string }{
		{a.mirrors.security, "bookworm-security"},
		{a.mirrors.main, "trixie"},
		{a.mirrors.main, "trixie-backports"},
	} {
		fmt.Fprintf(&list, "deb [arch=amd64 signed-by=%s] %s %s main\n", keyring, s.addr, s.suite)
	}
	if err := os.WriteFile(filepath.Join(dir, "sources.list"), []byte(list.String()), 0o644); err != nil {
		return nil, err
	}
	say("reading package lists of %s", a.mirrors.main)
	if _, err := a.run(ctx, dir, "apt-get", "-q", "update"); err != nil {
		return nil, fmt.Errorf("%w: no Debian packages: %w", ErrUnavailable, err)
	}
	return a, nil
}

func (a *aptArea) run(ctx context.Context, dir, program string, args ...string) (string, error) {
	settings := []string{
		"-o", "Dir::Etc::sourcelist=" + filepath.Join(a.dir, "sources.list"),
		"-o", "Dir::Etc::sourceparts=/dev/null",
		"-o", "Dir::State::lists=" + filepath.Join(a.dir, "lists"),
		"-o", "Dir::Cache=" + filepath.Join(a.dir, "cache"),
		"-o", "APT::Architecture=amd64",
		"-o", "APT::Sandbox::User=root", // the cache folder may be closed to _apt
		"-o", "Acquire::Retries=3",
	}
	cmd := exec.CommandContext(ctx, lookTool(program), append(settings, args...)...)
	cmd.Dir = dir
	return command(cmd)
}

// names lists the offered packages whose names begin with prefix.
func (a *aptArea) names(ctx context.Context, prefix string) ([]string, error) {
	out, err := a.run(ctx, a.dir, "apt-cache", "pkgnames", prefix)
	return strings.Fields(out), err
}

// proxy returns the HTTP proxy that apt is set to use. It is for debootstrap, which does not read apt's settings.
func (a *aptArea) proxy(ctx context.Context) string {
	out, err := exec.CommandContext(ctx, "apt-config", "dump", "--format", "%v%n", "Acquire::http::Proxy").Output()
	if v, _, _ := strings.Cut(string(out), "\n"); err == nil && v != "DIRECT" {
		return v
	}
	return ""
}
