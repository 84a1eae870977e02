package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// A host has a folder for disks, and runs one server and its client at a time.
type host struct {
	dir    string // temporary
	vdisk  string // the program
	server *exec.Cmd
}

func newHost(parent string) (*host, error) {
	if parent == "" {
		parent = "bin"
	}
	vdisk, err := filepath.Abs("bin/vdisk")
	if err != nil {
		return nil, err
	}
	dir, err := os.MkdirTemp(parent, "bench-disks-")
	if err != nil {
		return nil, err
	}
	dir, err = filepath.Abs(dir)
	return &host{dir: dir, vdisk: vdisk}, err
}

func (h *host) close() error { return errors.Join(h.stop(), os.RemoveAll(h.dir)) }

func (h *host) path(name string) string { return filepath.Join(h.dir, name) }

// command is one that ends when ctx does, by a signal first. Each is bounded: none here takes minutes.
func (h *host) command(ctx context.Context, argv []string) (*exec.Cmd, context.CancelFunc) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Minute)
	c := exec.CommandContext(ctx, argv[0], argv[1:]...)
	c.Cancel = func() error { return c.Process.Signal(syscall.SIGTERM) }
	c.WaitDelay = 20 * time.Second
	c.Dir = h.dir
	c.Env = append(os.Environ(), "VDISK_STORE="+h.path("store"))
	return c, cancel
}

// do runs a command to its end.
func (h *host) do(ctx context.Context, argv ...string) error {
	c, cancel := h.command(ctx, argv)
	defer cancel()
	if out, err := c.CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w\n%s", strings.Join(argv, " "), err, out)
	}
	return nil
}

// serve starts a server, and returns when it listens at s.sock.
func (h *host) serve(ctx context.Context, argv ...string) error {
	if err := os.RemoveAll(h.path("s.sock")); err != nil {
		return err
	}
	var out bytes.Buffer
	c := exec.Command(argv[0], argv[1:]...) // not bound to ctx: stop ends it, in its own way
	c.Dir, c.Env, c.Stdout, c.Stderr = h.dir, append(os.Environ(), "VDISK_STORE="+h.path("store")), &out, &out
	c.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // an interrupt at the terminal is for us
	c.WaitDelay = 20 * time.Second
	if err := c.Start(); err != nil {
		return err
	}
	h.server = c
	for range 200 {
		if _, err := os.Stat(h.path("s.sock")); err == nil {
			return ctx.Err()
		}
		time.Sleep(50 * time.Millisecond)
	}
	return errors.Join(fmt.Errorf("%s has made no socket", strings.Join(argv, " ")), h.stop(), errors.New(out.String()))
}

// stop ends the server, if there is one. Servers here that are killed by the signal have done nothing wrong.
func (h *host) stop() error {
	c := h.server
	if c == nil {
		return nil
	}
	h.server = nil
	if err := c.Process.Signal(syscall.SIGTERM); err != nil {
		return err
	}
	late := time.AfterFunc(5*time.Minute, func() { _ = c.Process.Kill() }) // fails if it has ended
	defer late.Stop()
	if c.Args[0] == "qemu-nbd" { // it loses a signal that comes between the making of its socket and its first turn
		again := time.NewTicker(time.Second)
		ended := make(chan struct{})
		defer func() { again.Stop(); close(ended) }()
		go func() {
			for {
				select {
				case <-again.C:
					_ = c.Process.Signal(syscall.SIGTERM) // fails if it has ended
				case <-ended:
					return
				}
			}
		}()
	}
	err := c.Wait()
	var exit *exec.ExitError
	if errors.As(err, &exit) && (exit.Sys().(syscall.WaitStatus).Signal() == syscall.SIGTERM || exit.ExitCode() == 128+int(syscall.SIGTERM)) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("%s: %w", strings.Join(c.Args, " "), err)
	}
	return nil
}

// fioOutput is what is used of fio's JSON. Times are in ns, runtimes in ms.
type fioOutput struct {
	Jobs []struct {
		Read  fioSide
		Write fioSide
		Sync  struct {
			IOs     float64    `json:"total_ios"`
			Latency fioLatency `json:"lat_ns"`
		}
	}
}

type fioSide struct {
	IOs     float64 `json:"total_ios"`
	Bytes   float64 `json:"io_bytes"`
	Runtime float64
	Latency fioLatency `json:"clat_ns"`
}

type fioLatency struct{ Percentile map[string]float64 }

// fio runs a job of jobs.fio on an export of the server.
func (h *host) fio(ctx context.Context, job, export string, env ...string) (result, error) {
	jobs, err := filepath.Abs(jobsFile)
	if err != nil {
		return result{}, err
	}
	before := h.serverTime()
	c, cancel := h.command(ctx, []string{"fio", "--section=" + job, "--output-format=json", "--output=fio.json", jobs})
	defer cancel()
	c.Env = append(append(c.Env, "URI="+h.uri(export)), env...)
	if out, err := c.CombinedOutput(); err != nil {
		return result{}, fmt.Errorf("fio, %s: %w\n%s", job, err, out)
	}
	used := h.serverTime() - before
	data, err := os.ReadFile(h.path("fio.json"))
	if err != nil {
		return result{}, err
	}
	r, n, err := reduce(data)
	if err != nil {
		return result{}, fmt.Errorf("fio, %s: %w", job, err)
	}
	r.CPU = round3(used.Seconds() * 1e6 / n)
	return r, nil
}

func (h *host) uri(export string) string {
	return "nbd+unix:///" + export + "?socket=" + h.path("s.sock")
}

// reduce takes what a result keeps out of fio's JSON, and the number of requests.
func reduce(data []byte) (result, float64, error) {
	if i := bytes.IndexByte(data, '{'); i > 0 {
		data = data[i:] // fio may begin with a remark
	}
	var out fioOutput
	if err := json.Unmarshal(data, &out); err != nil {
		return result{}, 0, err
	}
	if len(out.Jobs) != 1 {
		return result{}, 0, fmt.Errorf("%d jobs", len(out.Jobs))
	}
	read, write := out.Jobs[0].Read, out.Jobs[0].Write
	n, ms := read.IOs+write.IOs, max(read.Runtime, write.Runtime)
	if n == 0 || ms == 0 {
		return result{}, 0, errors.New("no requests")
	}
	r := result{Rate: round3(n / ms * 1000), MiB: round3((read.Bytes + write.Bytes) / ms * 1000 / (1 << 20))}
	var errs [3]error
	r.Read, errs[0] = read.Latency.quantiles(read.IOs)
	r.Write, errs[1] = write.Latency.quantiles(write.IOs)
	if sync := out.Jobs[0].Sync; sync.IOs > 1 { // the last of a job is not of interest alone
		r.Flush, errs[2] = sync.Latency.quantiles(sync.IOs)
	}
	return r, n, errors.Join(errs[:]...)
}

// quantiles of n requests. One that is not a whole request away from the slowest is not known.
func (l fioLatency) quantiles(n float64) ([]float64, error) {
	if n == 0 {
		return nil, nil
	}
	us := make([]float64, len(quantiles))
	for i, q := range quantiles {
		ns, is := l.Percentile[strconv.FormatFloat(q, 'f', 6, 64)]
		if !is {
			return nil, fmt.Errorf("no percentile of %v", q)
		}
		if n*(100-q) >= 100 {
			us[i] = round3(ns / 1000)
		}
	}
	return us, nil
}

// round3 rounds to four digits: there are not more to be had, and the files are to be small.
func round3(x float64) float64 {
	y, _ := strconv.ParseFloat(strconv.FormatFloat(x, 'g', 4, 64), 64)
	return y
}

// serverTime is the processor time that the server has used.
func (h *host) serverTime() time.Duration {
	if h.server == nil {
		return 0
	}
	data, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", h.server.Process.Pid))
	_, rest, _ := strings.Cut(string(data), ") ")
	f := strings.Fields(rest)
	if len(f) < 13 {
		return 0
	}
	user, _ := strconv.Atoi(f[11])
	system, _ := strconv.Atoi(f[12])
	return time.Duration(user+system) * time.Second / 100 // USER_HZ, which is 100 on all Linux that we run on
}

// walk calls f for every file of the disks.
func (h *host) walk(f func(path string, s *unix.Stat_t) error) error {
	return filepath.WalkDir(h.dir, func(path string, e fs.DirEntry, err error) error {
		var s unix.Stat_t
		if err == nil {
			err = unix.Lstat(path, &s)
		}
		if errors.Is(err, fs.ErrNotExist) {
			return nil // a server removes files, too
		}
		if err != nil || !e.Type().IsRegular() || e.Name() == "fio.json" {
			return err
		}
		return f(path, &s)
	})
}

// sync makes everything durable: what a server left to the kernel is not a burden of the next test.
func (h *host) sync() error {
	f, err := os.Open(h.dir)
	if err != nil {
		return err
	}
	defer f.Close()
	return unix.Syncfs(int(f.Fd()))
}

// drop takes the disks' data out of the page cache. That needs no root, unlike drop_caches, and disturbs nobody else.
func (h *host) drop() error {
	return h.walk(func(path string, s *unix.Stat_t) error {
		f, err := os.Open(path)
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil {
			return err
		}
		defer f.Close()
		return unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED)
	})
}

// space is what the disks take, in bytes.
func (h *host) space() (float64, error) {
	if err := h.sync(); err != nil { // a file system may give blocks only then
		return 0, err
	}
	var n int64
	err := h.walk(func(_ string, s *unix.Stat_t) error { n += s.Blocks * 512; return nil })
	return float64(n), err
}

// clear removes all disks.
func (h *host) clear() error {
	entries, err := os.ReadDir(h.dir)
	for _, e := range entries {
		err = errors.Join(err, os.RemoveAll(h.path(e.Name())))
	}
	return err
}
