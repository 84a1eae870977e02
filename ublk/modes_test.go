package ublk_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vdisk/vdisk/ublk"
)

var modes = []struct {
	name string
	mode ublk.CopyMode
	need ublk.Feature
}{
	{"plain", ublk.CopyPlain, 0},
	{"user", ublk.CopyUser, ublk.FeatureUserCopy},
	{"batch", ublk.CopyBatch, ublk.FeatureBatchIO},
}

// inEachMode runs a test in the copy modes of someModes, and sees a mode that the kernel lacks refused.
func inEachMode(t *testing.T, f func(t *testing.T, mode ublk.CopyMode)) {
	needDriver(t)
	set, err := ublk.Features()
	if err != nil {
		t.Fatal(err)
	}
	some := someModes(t)
	for _, m := range modes {
		if set.Has(m.need) && !slices.ContainsFunc(some, func(s copyMode) bool { return s.mode == m.mode }) {
			continue
		}
		t.Run(m.name, func(t *testing.T) {
			if set.Has(m.need) {
				f(t, m.mode)
				return
			}
			_, err := ublk.Create(stopCtx(t), ublk.Options{Size: 1 << 20, Copy: m.mode}, newRAMDisk(1<<20))
			var missing *ublk.FeatureError
			if !errors.As(err, &missing) || missing.Missing != m.need || !errors.Is(err, ublk.ErrKernelTooOld) {
				t.Errorf("a mode that the kernel lacks: %v", err)
			}
		})
	}
}

// TestModeVerify writes with four jobs, mixed sizes and flushes, and reads everything back by checksum, with every way
// of answering.
func TestModeVerify(t *testing.T) {
	inEachMode(t, func(t *testing.T, mode ublk.CopyMode) {
		const size = 64 << 20
		for name, h := range map[string]func(*testing.T) ublk.Handler{
			"inline": func(*testing.T) ublk.Handler { return newRAMDisk(size) },
			"later":  func(*testing.T) ublk.Handler { return laterDisk{newRAMDisk(size)} },
			"fetch":  func(t *testing.T) ublk.Handler { return newFileDisk(t, size) },
		} {
			t.Run(name, func(t *testing.T) {
				d := create(t, ublk.Options{Size: size, Queues: 2, Copy: mode, VolatileCache: true}, h(t))
				disturb(t)
				verify(t, d.Path(), "512-256k", shorter("3m", "1m"))
			})
		}
	})
}

// shorter returns whole, or short with -short.
func shorter(whole, short string) string {
	if testing.Short() {
		return short
	}
	return whole
}

// verify writes so many bytes with each of four jobs, at random, and reads them back.
func verify(t *testing.T, path, bs, each string) {
	t.Helper()
	run(t, "fio", "--name=v", "--filename="+path, "--ioengine=libaio", "--direct=1", "--rw=randwrite", "--bsrange="+bs,
		"--blockalign=512", "--iodepth=16", "--numjobs=4", "--size=16m", "--offset_increment=16m", "--io_size="+each,
		"--fsync=64", "--verify=crc32c", "--do_verify=1", "--verify_fatal=1", "--bs_unaligned=0", "--group_reporting", "--norandommap=0")
}

// TestModeLimits has the shallowest and the deepest queue, and requests of several MiB.
func TestModeLimits(t *testing.T) {
	inEachMode(t, func(t *testing.T, mode ublk.CopyMode) {
		const size = 64 << 20
		shallow := 1
		if mode == ublk.CopyBatch {
			if _, err := ublk.Create(stopCtx(t), ublk.Options{Size: size, Depth: 1, Copy: mode}, nullDisk); !errors.Is(err, ublk.ErrInvalid) {
				t.Errorf("depth 1: %v", err)
			}
			shallow = 2
		}
		limits := []ublk.Options{
			{Depth: shallow, MaxIOBytes: 4096},
			{Depth: 3, MaxIOBytes: 32 << 20},
			{Depth: 4096, MaxIOBytes: 16 << 10, Queues: 2},
			{Depth: 8, MaxIOBytes: 4 << 20, Queues: 2},
		}
		if testing.Short() {
			limits = limits[:2]
		}
		for _, o := range limits {
			t.Run(fmt.Sprintf("depth %d of %d KiB", o.Depth, o.MaxIOBytes>>10), func(t *testing.T) {
				o.Size, o.Copy = size, mode
				disk := newRAMDisk(size)
				d := create(t, o, laterDisk{disk})
				verify(t, d.Path(), "512-64k", "64k")
				buf := aligned(min(16<<20, 64*o.MaxIOBytes))
				for i := range buf {
					buf[i] = byte(i * 31 >> 7)
				}
				fd := openDirect(t, d, unix.O_RDWR)
				if n, err := unix.Pwrite(fd, buf, 32<<20); n != len(buf) || err != nil {
					t.Fatal(n, err)
				}
				if !bytes.Equal(disk.data[32<<20:][:len(buf)], buf) {
					t.Error("a large write brought other bytes")
				}
				got := aligned(len(buf))
				if n, err := unix.Pread(fd, got, 32<<20); n != len(buf) || err != nil || !bytes.Equal(got, buf) {
					t.Error("a large read brought other bytes", n, err)
				}
			})
		}
	})
}

// TestModeStopUnderLoad stops devices under load, and finds nothing left.
func TestModeStopUnderLoad(t *testing.T) {
	times := 3
	if testing.Short() {
		times = 1
	}
	inEachMode(t, func(t *testing.T, mode ublk.CopyMode) {
		for range times {
			d := create(t, ublk.Options{Size: 64 << 20, Queues: 2, Depth: 32, Copy: mode}, laterDisk{newRAMDisk(64 << 20)})
			fio := exec.Command("fio", "--name=l", "--filename="+d.Path(), "--ioengine=libaio", "--direct=1", "--rw=randrw",
				"--bs=4k", "--iodepth=32", "--numjobs=2", "--time_based", "--runtime=20")
			if err := fio.Start(); err != nil {
				t.Fatal(err)
			}
			for range 200 {
				if s := d.Stats().Total(); s.Ops[ublk.OpRead].Requests > 1000 && s.Ops[ublk.OpWrite].Requests > 1000 {
					break
				}
				time.Sleep(100 * time.Millisecond)
			}
			closeDevice(t, d)
			_ = fio.Process.Kill()
			_ = fio.Wait()
			s := d.Stats().Total()
			if s.Ops[ublk.OpRead].Requests < 1000 || s.Ops[ublk.OpWrite].Requests < 1000 || s.Underway != 0 {
				t.Errorf("%d reads and %d writes, %d under way", s.Ops[ublk.OpRead].Requests, s.Ops[ublk.OpWrite].Requests, s.Underway)
			}
		}
		if infos, err := ublk.Devices(context.Background()); err != nil || len(infos) != 0 {
			t.Errorf("left: %+v, %v", infos, err)
		}
	})
}

// TestModeHeld holds the tags of a queue, more than CopyUser's pool has buffers for, and answers the youngest first.
func TestModeHeld(t *testing.T) {
	inEachMode(t, func(t *testing.T, mode ublk.CopyMode) {
		const size, depth = 64 << 20, 64
		disk := newRAMDisk(size)
		var mu sync.Mutex
		var held []*ublk.Request
		d := create(t, ublk.Options{Size: size, Depth: depth, Copy: mode}, handlerFunc(func(r *ublk.Request) error {
			if r.Op != ublk.OpWrite {
				return disk.ServeUBLK(r)
			}
			mu.Lock()
			defer mu.Unlock()
			held = append(held, r)
			return ublk.ErrAsync
		}))
		stop := make(chan struct{})
		var answering sync.WaitGroup
		answering.Go(func() {
			for done := false; !done; time.Sleep(10 * time.Millisecond) {
				select {
				case <-stop:
					done = true
				default:
				}
				mu.Lock()
				for i := len(held) - 1; i >= 0; i-- {
					held[i].Complete(disk.ServeUBLK(held[i]))
				}
				held = held[:0]
				mu.Unlock()
			}
		})
		run(t, "fio", "--name=v", "--filename="+d.Path(), "--ioengine=libaio", "--direct=1", "--rw=randwrite", "--bs=256k",
			"--iodepth=64", "--size="+shorter("64m", "24m"), "--verify=crc32c", "--do_verify=1", "--verify_fatal=1")
		close(stop)
		answering.Wait()
	})
}

// nullDisk answers everything at once. Reads return the old content of the buffer.
var nullDisk = handlerFunc(func(*ublk.Request) error { return nil })

// BenchmarkModes measures the null target in every copy mode: IOPS, median latency, and for a request the CPU time of
// the queue's thread, with what the driver does on it, and of the process's other threads.
func BenchmarkModes(b *testing.B) {
	needDriver(b)
	set, err := ublk.Features()
	if err != nil {
		b.Fatal(err)
	}
	for _, bs := range []string{"4k", "128k"} {
		for _, depth := range []int{1, 32} {
			for _, rw := range []string{"randread", "randwrite"} {
				for _, m := range modes {
					if set.Has(m.need) {
						b.Run(fmt.Sprintf("%s/%s/depth%d/%s", bs, rw, depth, m.name), func(b *testing.B) {
							measure(b, m.mode, bs, rw, depth)
						})
					}
				}
			}
		}
	}
}

func measure(b *testing.B, mode ublk.CopyMode, bs, rw string, depth int) {
	d := create(b, ublk.Options{Size: 1 << 30, Depth: 128, MaxIOBytes: 512 << 10, Copy: mode}, nullDisk)
	queue, others := cpuTime(b)
	out := run(b, "fio", "--name=m", "--filename="+d.Path(), "--ioengine=libaio", "--direct=1", "--rw="+rw, "--bs="+bs,
		fmt.Sprintf("--iodepth=%d", depth), "--time_based", "--runtime=1", "--norandommap", "--randrepeat=0",
		"--output-format=json")
	queueAfter, othersAfter := cpuTime(b)
	type side struct {
		IOPS  float64 `json:"iops"`
		Total float64 `json:"total_ios"`
		Lat   struct {
			P map[string]float64 `json:"percentile"`
		} `json:"clat_ns"`
	}
	var result struct {
		Jobs []struct{ Read, Write side }
	}
	if err := json.Unmarshal([]byte(out[strings.Index(out, "{"):]), &result); err != nil || len(result.Jobs) != 1 {
		b.Fatalf("fio: %v: %s", err, out)
	}
	s := result.Jobs[0].Read
	if rw == "randwrite" {
		s = result.Jobs[0].Write
	}
	b.ReportMetric(s.IOPS, "IOPS")
	b.ReportMetric(s.Lat.P["50.000000"]/1000, "p50-µs")
	b.ReportMetric(float64(queueAfter-queue)/1000/s.Total, "queue-µs/IO")
	b.ReportMetric(float64(othersAfter-others)/1000/s.Total, "others-µs/IO")
	b.ReportMetric(0, "ns/op")
}

// cpuTime returns the CPU time of the queue threads and of the other threads, in nanoseconds.
func cpuTime(t testing.TB) (queues, others int64) {
	tasks, err := filepath.Glob("/proc/self/task/*")
	if err != nil {
		t.Fatal(err)
	}
	for _, task := range tasks {
		var ns int64
		stat, _ := os.ReadFile(task + "/schedstat") // time on CPU, time waiting, time slices
		if _, err := fmt.Sscan(string(stat), &ns); err != nil {
			continue // the thread has gone
		}
		if comm, _ := os.ReadFile(task + "/comm"); strings.HasPrefix(string(comm), "ublk") && strings.Contains(string(comm), "q") {
			queues += ns
		} else {
			others += ns
		}
	}
	return queues, others
}

// TestModeStorm collects garbage without a pause and sends signals to every thread while requests are served: nothing
// is lost, and no buffer is touched by the collector.
func TestModeStorm(t *testing.T) {
	inEachMode(t, func(t *testing.T, mode ublk.CopyMode) {
		const size = 64 << 20
		for name, h := range map[string]ublk.Handler{
			"inline": newRAMDisk(size),
			"later":  laterDisk{newRAMDisk(size)},
		} {
			t.Run(name, func(t *testing.T) {
				d := create(t, ublk.Options{Size: size, Queues: 2, Depth: 16, Copy: mode}, h)
				stop := storm(t, fmt.Sprintf("ublk%dq0", d.ID()))
				verify(t, d.Path(), "512-64k", shorter("1m", "384k"))
				if signals := stop(); signals < 100 {
					t.Errorf("only %d signals were sent", signals)
				}
			})
		}
	})
}

// storm begins a storm, and returns a function that ends it. There must be a thread of that name.
func storm(t *testing.T, thread string) (stop func() (signals int)) {
	old := debug.SetGCPercent(1)
	end := make(chan struct{})
	var wg sync.WaitGroup
	named, signals := false, 0
	wg.Go(func() {
		for {
			select {
			case <-end:
				return
			case <-time.After(time.Millisecond):
				runtime.GC()
			}
		}
	})
	wg.Go(func() {
		for {
			select {
			case <-end:
				return
			case <-time.After(time.Millisecond):
			}
			tasks, _ := filepath.Glob("/proc/self/task/*")
			for _, task := range tasks {
				tid, _ := strconv.Atoi(filepath.Base(task))
				if comm, _ := os.ReadFile(task + "/comm"); strings.TrimSpace(string(comm)) == thread {
					named = true
				}
				if unix.Tgkill(os.Getpid(), tid, unix.SIGURG) == nil {
					signals++
				}
			}
		}
	})
	return func() int {
		close(end)
		wg.Wait()
		debug.SetGCPercent(old)
		if !named {
			t.Errorf("no thread is named %s", thread)
		}
		return signals
	}
}
