package owner

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/vdisk/vdisk/cow"
	"github.com/vdisk/vdisk/ublk"
)

// fakeRoot makes a folder with the files that readMemory looks at.
func fakeRoot(t *testing.T, files map[string]string) string {
	t.Helper()
	root := t.TempDir()
	for name, text := range files {
		path := filepath.Join(root, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o700), os.WriteFile(path, []byte(text), 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	return root
}

func TestReadMemory(t *testing.T) {
	const meminfo = "MemTotal:        2000 kB\nMemFree:          100 kB\nMemAvailable:     500 kB\n"
	for name, c := range map[string]struct {
		files map[string]string
		want  []memory
	}{
		"no groups": {map[string]string{"proc/meminfo": meminfo}, []memory{{"the machine", 2000 << 10, 500 << 10}}},
		"second version, and the group above has less": {
			map[string]string{
				"proc/meminfo":                      meminfo,
				"proc/self/cgroup":                  "0::/a/b\n",
				"sys/fs/cgroup/a/b/memory.max":      "max\n",
				"sys/fs/cgroup/a/b/memory.current":  "7\n",
				"sys/fs/cgroup/a/memory.max":        "100000\n",
				"sys/fs/cgroup/a/memory.current":    "60000\n",
				"sys/fs/cgroup/a/memory.stat":       "anon 9\ninactive_file 1000\nactive_file 500\n",
				"sys/fs/cgroup/cgroup.controllers":  "memory\n",
				"sys/fs/cgroup/a/b/cgroup.freeze":   "0\n",
				"sys/fs/cgroup/a/b/memory.stat":     "x\n",
				"sys/fs/cgroup/a/b/memory.low":      "garbage",
				"sys/fs/cgroup/memory.numa_stat":    "",
				"sys/fs/cgroup/a/b/c/memory.max":    "1",
				"sys/fs/cgroup/a/b/c/memory.events": "",
			},
			[]memory{{"the machine", 2000 << 10, 500 << 10}, {"the control group /a", 100000, 41500}},
		},
		"first version": {
			map[string]string{
				"proc/meminfo":     meminfo,
				"proc/self/cgroup": "5:cpu,cpuacct:/x\n4:memory:/y\n0::/\n",
				"sys/fs/cgroup/memory/y/memory.limit_in_bytes": "50000\n",
				"sys/fs/cgroup/memory/y/memory.usage_in_bytes": "20000\n",
				"sys/fs/cgroup/memory/y/memory.stat":           "inactive_file 1\ntotal_inactive_file 100\ntotal_active_file 10\n",
				"sys/fs/cgroup/memory/memory.limit_in_bytes":   "9223372036854771712\n",
				"sys/fs/cgroup/memory/memory.usage_in_bytes":   "20000\n",
			},
			[]memory{{"the machine", 2000 << 10, 500 << 10}, {"the control group /y", 50000, 30110}},
		},
		"a container": { // its path is one that is not seen in it
			map[string]string{
				"proc/meminfo":                 meminfo,
				"proc/self/cgroup":             "0::/../outside\n",
				"sys/fs/cgroup/memory.max":     "4096\n",
				"sys/fs/cgroup/memory.current": "96\n",
			},
			[]memory{{"the machine", 2000 << 10, 500 << 10}, {"the control group /", 4096, 4000}},
		},
		"nothing": {nil, nil},
	} {
		if got := readMemory(fakeRoot(t, c.files)); fmt.Sprint(got) != fmt.Sprint(c.want) {
			t.Errorf("%s: %+v, want %+v", name, got, c.want)
		}
	}
}

func TestReadThreads(t *testing.T) {
	root := fakeRoot(t, map[string]string{
		"proc/self/status":                    "Name:\tvdisk\nThreads:\t40\n",
		"proc/loadavg":                        "0.1 0.2 0.3 1/200 77\n",
		"proc/sys/kernel/threads-max":         "5000\n",
		"proc/self/cgroup":                    "3:pids:/old\n0::/a/b\n",
		"sys/fs/cgroup/a/b/pids.max":          "100\n",
		"sys/fs/cgroup/a/pids.max":            "max\n",
		"sys/fs/cgroup/a/pids.current":        "50\n",
		"sys/fs/cgroup/a/b/pids.current":      "30\n",
		"sys/fs/cgroup/pids/old/pids.max":     "10\n",
		"sys/fs/cgroup/pids/old/pids.current": "11\n",
	})
	var left []int64
	for _, r := range readThreads(root) {
		left = append(left, r.left)
	}
	if want := []int64{9960, 4800, -1, 70}; !slices.Equal(left, want) {
		t.Errorf("%v, want %v", left, want)
	}
	if got := readThreads(t.TempDir()); len(got) != 0 {
		t.Errorf("%v of nothing", got)
	}
}

// TestAttachNeedsThreads: the runtime ends a process that cannot make a thread, so a device that might need the last
// threads is refused.
func TestAttachNeedsThreads(t *testing.T) {
	w := newFakeMachine(t)
	opts := w.options(true)
	left := int64(spareThreads + 1)
	opts.threads = func() []room { return []room{{"the group", left}} }
	o, err := Own(t.Context(), w.dir, opts)
	if err != nil {
		t.Fatal(err)
	}
	a := AttachOptions{Ref: cow.Ref{Volume: "v"}, Queues: 2}
	if _, err := o.Attach(t.Context(), a); !errors.Is(err, ErrNoMemory) || !strings.Contains(err.Error(), "the group allows 65 more") {
		t.Error(err)
	}
	left++
	if _, err := o.Attach(t.Context(), a); err != nil {
		t.Error(err)
	}
	w.close(o)
}

// TestAttachNeedsMemory: a device that would take the last memory is refused. The error names the machine or the
// control group, also in a command that asked the owner. Nothing is left of the device.
func TestAttachNeedsMemory(t *testing.T) {
	w := newFakeMachine(t)
	opts := w.options(true)
	free := []memory{{"the machine", 1 << 30, 1 << 30}, {"the control group /x", 1 << 30, 1 << 30}}
	opts.memory = func() []memory { return free }
	o, err := Own(t.Context(), w.dir, opts)
	if err != nil {
		t.Fatal(err)
	}
	s := open(t, w.dir)
	a := AttachOptions{Ref: cow.Ref{Volume: "v"}, Queues: 2}
	for i := range free {
		free[i].available = 17 << 20
		_, err := s.Attach(t.Context(), a)
		if !errors.Is(err, ErrNoMemory) || !strings.Contains(err.Error(), free[i].name) {
			t.Error(err)
		}
		free[i].available = 1 << 30
	}
	if w.d.count() != 0 || w.file() != "" {
		t.Errorf("%d devices, %s", w.d.count(), w.file())
	}
	if _, err := s.Attach(t.Context(), a); err != nil {
		t.Error(err)
	}
	if got := w.d.devices[0].server.opts.Copy; got != ublk.CopyUser {
		t.Errorf("copies by mode %d", got)
	}
	if err := s.Detach(t.Context(), "v", false); err != nil {
		t.Error(err)
	}

	// A driver that needs all buffers in advance gets them, if there is enough memory.
	old := &ublk.FeatureError{Missing: ublk.FeatureUserCopy, Kernel: "6.1"}
	w.d.fail["create"] = old
	if _, err := s.Attach(t.Context(), a); err != nil || w.d.devices[1].server.opts.Copy != ublk.CopyPlain {
		t.Error(err)
	}
	if err := s.Detach(t.Context(), "v", false); err != nil {
		t.Error(err)
	}
	free[0].available = 80 << 20 // enough for the one and not for the other
	w.d.fail["create"] = old
	if _, err := s.Attach(t.Context(), a); !errors.Is(err, ErrNoMemory) {
		t.Error(err)
	}
	free[0].available = 1 << 30
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	w.close(o)
}
