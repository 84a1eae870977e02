// Command guest builds a virtual machine with a ublk kernel and runs programs in it; see package guest.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/vdisk/vdisk/internal/guest"
)

// Exit statuses beside the payload's own.
const (
	exitUnavailable = 77  // as automake's for a test that could not be run
	exitTimeout     = 124 // as timeout(1)'s
	exitFailed      = 125 // the harness or the guest failed, not the payload
)

const usage = `usage: guest COMMAND [flags]

  build    make the root image and all kernels or those named, unless they are there: guest build [KERNEL...]
  kernels  list the kernels of the image
  run      run a command as root in a guest: guest run [flags] -- COMMAND [ARG...]
  shell    open a shell in a guest
  headers  get the newest kernel's user headers and print the folders to pass to cc -I
  package  get a package of the root image's Debian, unpacked, and print its folder: guest package NAME
  kernel   get a kernel and print the folder with vmlinuz and the modules that it boots with: guest kernel NAME
  test     run test binaries and scripts in a guest: guest test [flags] [PACKAGE...]

guest COMMAND -h lists the flags.
`

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	code := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}

// app is one invocation of the command.
type app struct {
	stdout, stderr io.Writer
	dir            string // cache folder
}

func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	a := &app{stdout: stdout, stderr: stderr}
	commands := map[string]func(context.Context, []string) (int, error){
		"build": a.build, "kernels": a.kernels, "run": a.run, "shell": a.shell, "test": a.test,
		"headers": a.headers, "package": a.getPackage, "kernel": a.getKernel,
	}
	if len(args) == 0 || commands[args[0]] == nil {
		io.WriteString(stderr, usage)
		return exitFailed
	}
	code, err := commands[args[0]](ctx, args[1:])
	if errors.Is(err, flag.ErrHelp) {
		return 0
	}
	if err != nil {
		fmt.Fprintln(stderr, "guest:", strings.TrimPrefix(err.Error(), "guest: "))
		return exitCode(err)
	}
	return code
}

func exitCode(err error) int {
	switch {
	case errors.Is(err, guest.ErrUnavailable):
		return exitUnavailable
	case errors.Is(err, guest.ErrTimeout):
		return exitTimeout
	}
	return exitFailed
}

func (a *app) flags(name string) *flag.FlagSet {
	fs := flag.NewFlagSet("guest "+name, flag.ContinueOnError)
	fs.SetOutput(a.stderr)
	fs.StringVar(&a.dir, "dir", "", "cache `folder` (default $VDISK_GUEST_DIR, or .guest beside go.mod)")
	return fs
}

func (a *app) image(ctx context.Context, force bool, kernels ...string) (*guest.Image, error) {
	return guest.Build(ctx, guest.Options{Dir: a.dir, Kernels: kernels, Force: force, Log: a.stderr})
}

func (a *app) build(ctx context.Context, args []string) (int, error) {
	fs := a.flags("build")
	force := fs.Bool("force", false, "build anew, with the newest packages offered")
	if err := fs.Parse(args); err != nil {
		return 0, err
	}
	img, err := a.image(ctx, *force, fs.Args()...)
	if err != nil {
		return 0, err
	}
	a.list(img)
	return 0, nil
}

func (a *app) kernels(ctx context.Context, args []string) (int, error) {
	fs := a.flags("kernels")
	if err := fs.Parse(args); err != nil {
		return 0, err
	}
	img, err := a.image(ctx, false)
	if err != nil {
		return 0, err
	}
	a.list(img)
	return 0, nil
}

func (a *app) headers(ctx context.Context, args []string) (int, error) {
	fs := a.flags("headers")
	if err := fs.Parse(args); err != nil {
		return 0, err
	}
	dirs, err := guest.Headers(ctx, guest.Options{Dir: a.dir, Log: a.stderr})
	if err != nil {
		return 0, err
	}
	fmt.Fprintln(a.stdout, strings.Join(dirs, string(filepath.ListSeparator)))
	return 0, nil
}

func (a *app) getPackage(ctx context.Context, args []string) (int, error) {
	return a.get(ctx, "package", args, guest.Package)
}

func (a *app) getKernel(ctx context.Context, args []string) (int, error) {
	return a.get(ctx, "kernel", args, guest.KernelFiles)
}

// get prints the folder of one named thing.
func (a *app) get(ctx context.Context, what string, args []string, get func(context.Context, guest.Options, string) (string, error)) (int, error) {
	fs := a.flags(what)
	if err := fs.Parse(args); err != nil {
		return 0, err
	}
	if fs.NArg() != 1 {
		return 0, fmt.Errorf("%s: want one name", what)
	}
	dir, err := get(ctx, guest.Options{Dir: a.dir, Log: a.stderr}, fs.Arg(0))
	if err != nil {
		return 0, err
	}
	fmt.Fprintln(a.stdout, dir)
	return 0, nil
}

func (a *app) list(img *guest.Image) {
	for _, k := range img.Kernels() {
		fmt.Fprintf(a.stdout, "%s\t%s\n", k.Name, k.Release)
	}
}

// runFlags returns the flags that run and shell share.
func (a *app) runFlags(name string) (*flag.FlagSet, *guest.Run) {
	fs := a.flags(name)
	r := &guest.Run{Files: map[string]string{}}
	fs.StringVar(&r.Kernel, "kernel", "stable", "`name` of the kernel: stable or newest")
	fs.IntVar(&r.CPUs, "cpus", 2, "processors")
	fs.IntVar(&r.Memory, "memory", 3072, "memory in `MiB`")
	fs.StringVar(&r.Append, "append", "", "more of the kernel's command `line`")
	fs.Int64Var(&r.ScratchSize, "scratch-size", 8<<30, "size of /scratch in `bytes`, -1 for none")
	fs.StringVar(&r.ScratchFile, "scratch-file", "", "`file` behind /scratch that is kept and used again")
	fs.BoolVar(&r.Systemd, "systemd", false, "systemd is process 1")
	fs.StringVar(&r.RootFile, "root-file", "", "`file` that keeps what is written to the root file system, and is used again")
	fs.BoolVar(&r.Durable, "durable", false, "flushes of /scratch reach the host's disk")
	fs.StringVar(&r.Results, "results", "", "copy the content of /results to this host `folder`")
	fs.Func("bin", "copy a host `file` into /payload/bin (repeatable)", func(v string) error {
		r.Files["bin/"+filepath.Base(v)] = v
		return nil
	})
	fs.Func("file", "`GUEST=HOST`: copy a file or folder of the host into the guest, below /payload unless absolute (repeatable)", func(v string) error {
		to, from, ok := strings.Cut(v, "=")
		if !ok || to == "" || from == "" {
			return fmt.Errorf("want GUEST=HOST, got %q", v)
		}
		r.Files[to] = from
		return nil
	})
	return fs, r
}

func (a *app) run(ctx context.Context, args []string) (int, error) {
	fs, r := a.runFlags("run")
	fs.DurationVar(&r.Timeout, "timeout", 5*time.Minute, "deadline of the whole run")
	quiet := fs.Bool("q", false, "print only the payload's output")
	if err := fs.Parse(args); err != nil {
		return 0, err
	}
	if fs.NArg() == 0 {
		return 0, errors.New("run: no command: guest run [flags] -- COMMAND [ARG...]")
	}
	img, err := a.image(ctx, false, r.Kernel)
	if err != nil {
		return 0, err
	}
	r.Script = quote(fs.Args())
	r.Stdout = a.stdout
	res, err := img.Run(ctx, *r)
	if err != nil {
		return 0, err
	}
	if !*quiet {
		a.report(res)
	}
	if res.PowerCut {
		return 0, nil
	}
	return res.ExitCode, nil
}

// report prints the facts about a finished run that the payload's output does not show.
func (a *app) report(res *guest.Result) {
	if res.ExitCode > 0 {
		fmt.Fprintf(a.stderr, "guest: console:\n%s\n", strings.TrimRight(res.Console, "\n"))
	}
	for _, err := range res.Failed {
		fmt.Fprintf(a.stderr, "guest: tried again: %v\n", err)
	}
	for _, alert := range res.Alerts {
		fmt.Fprintf(a.stderr, "guest: kernel: %s\n", alert.Line)
	}
	end := fmt.Sprintf("exit status %d", res.ExitCode)
	if res.PowerCut {
		end = "power cut"
	}
	fmt.Fprintf(a.stderr, "guest: %s, %s: %s, boot %.1fs, all %.1fs\n", res.Release, res.Machine, end, res.Boot.Seconds(), res.Elapsed.Seconds())
}

// quote makes a script of a command and its arguments.
func quote(args []string) string {
	quoted := slices.Clone(args)
	for i, s := range quoted {
		quoted[i] = "'" + strings.ReplaceAll(s, "'", `'\''`) + "'"
	}
	return "exec " + strings.Join(quoted, " ") + "\n"
}

func (a *app) shell(ctx context.Context, args []string) (int, error) {
	fs, r := a.runFlags("shell")
	if err := fs.Parse(args); err != nil {
		return 0, err
	}
	img, err := a.image(ctx, false, r.Kernel)
	if err != nil {
		return 0, err
	}
	r.Terminal = true
	r.Timeout = 24 * time.Hour
	r.Stdout = a.stderr
	r.Script = "export TERM=" + quoteOne(os.Getenv("TERM")) + "; exec setsid -cw bash -l </dev/ttyS1 >/dev/ttyS1 2>&1\n"
	fmt.Fprintf(a.stderr, "guest: booting %s; exit or ^D ends it\n", r.Kernel)
	res, err := img.Run(ctx, *r)
	if err != nil {
		return 0, err
	}
	return res.ExitCode, nil
}

func quoteOne(s string) string {
	return strings.TrimPrefix(strings.TrimSpace(quote([]string{s})), "exec ")
}
