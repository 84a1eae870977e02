package web

import (
	"bufio"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vdisk/vdisk/internal/testwatch"
)

// hostile is a text that a user can put into the journal. If it became a part of the page, the console would tell.
const hostile = `<img src=x onerror=alert(1)>"'</td><script>alert(2)</script>`

// program is the program under test, and a store.
type program struct {
	t         *testing.T
	path, dir string
}

// run runs a command of the program, and returns its standard output.
func (p program) run(args ...string) string {
	p.t.Helper()
	cmd := exec.CommandContext(p.t.Context(), p.path, append([]string{"--store", p.dir}, args...)...)
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		p.t.Fatalf("%q: %v", args, err)
	}
	return string(out)
}

// daemon starts a daemon that ends with the test, and returns where its page is.
func (p program) daemon(args ...string) string {
	p.t.Helper()
	cmd := exec.Command(p.path, append([]string{"--store", p.dir, "--max-size", "2G", "daemon", "--web", "127.0.0.1:0"}, args...)...)
	log, err := cmd.StderrPipe()
	if err != nil {
		p.t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		p.t.Fatal(err)
	}
	url, ready := make(chan string, 2), make(chan struct{})
	go func() {
		for s := bufio.NewScanner(log); s.Scan(); {
			if _, after, found := strings.Cut(s.Text(), "msg=page url="); found {
				url <- after
			}
			if strings.Contains(s.Text(), "msg=ready") {
				close(ready)
			}
			if strings.Contains(s.Text(), "level=ERROR") || strings.Contains(s.Text(), "cannot be") {
				p.t.Error(s.Text())
			}
		}
	}()
	p.t.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		if err := cmd.Wait(); err != nil {
			p.t.Errorf("the daemon: %v", err)
		}
	})
	testwatch.Wait(p.t, testwatch.Long, "the daemon", ready)
	return testwatch.Wait(p.t, testwatch.Long, "the page", url)
}

// fio runs a load on a volume over NBD until the test ends, or for as long as args say. It is one process: a job that fio forks
// would outlive it, and hold the test's output.
func (p program) fio(volume string, args ...string) *exec.Cmd {
	p.t.Helper()
	cmd := exec.CommandContext(p.t.Context(), "fio", append([]string{
		"--name=load", "--thread", "--ioengine=nbd", "--uri=nbd+unix:///" + volume + "?socket=" + filepath.Join(p.dir, "nbd.sock"),
		"--buffer_compress_percentage=55", "--refill_buffers", "--output=/dev/null",
	}, args...)...)
	cmd.Dir = p.t.TempDir()
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		p.t.Fatal(err)
	}
	return cmd
}

// someStore makes a store with everything that the page shows, and returns where the page is.
func (p program) someStore() string {
	t := p.t
	p.run("create", "golden", "4G")
	url := p.daemon()
	load := func(volume string, args ...string) {
		t.Helper()
		if err := p.fio(volume, args...).Wait(); err != nil {
			t.Fatal(err)
		}
	}
	load("golden", "--rw=write", "--bs=256k", "--size=256M")
	p.run("snapshot", "golden@v1")
	load("golden", "--rw=randwrite", "--bs=16k", "--size=256M", "--io_size=48M")
	p.run("snapshot", "golden@v2")
	p.run("create", "db", "20G", "--compress", "zstd:3")
	load("db", "--rw=randwrite", "--bs=8k", "--size=256M", "--io_size=96M")
	p.run("snapshot", "db@2026-11-30T03:00+00:00")
	load("db", "--rw=randwrite", "--bs=8k", "--size=256M", "--io_size=24M")
	p.run("clone", "golden@v1", "vm1", "vm2", "vm10")
	p.run("clone", "golden@v2", "web")
	load("vm1", "--rw=randwrite", "--bs=8k", "--size=256M", "--io_size=32M")
	p.run("snapshot", "vm1@before-upgrade")
	p.run("clone", "vm1@before-upgrade", "vm1-test")
	load("web", "--rw=randwrite", "--bs=64k", "--size=256M", "--io_size=64M")
	p.run("hold", "backup", "golden@v1")
	p.run("set", "db", "org:owner="+hostile)
	p.run("create", "scratch", "1G")
	load("scratch", "--rw=write", "--bs=256k", "--size=96M")
	p.run("rm", "scratch")
	p.run("resize", "web", "8G")
	return url
}

// TestBrowser looks at the page of a daemon in headless Chromium: 'make web-test'. VDISK_WEB_SHOTS names a folder for pictures.
func TestBrowser(t *testing.T) {
	if os.Getenv("VDISK_WEB_TEST") == "" {
		t.Skip("make web-test runs this")
	}
	dir := t.TempDir()
	p := program{t, filepath.Join(dir, "vdisk"), filepath.Join(dir, "store")}
	build := exec.CommandContext(t.Context(), "go", "build", "-o", p.path, "../../cmd/vdisk")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	url := p.someStore()
	b := startChromium(t)
	b.shape(1280, 900, "light")
	b.open(url)
	p.compareTree(b, "")
	var hurt int
	if b.eval(`document.querySelectorAll("main img, main script, td script").length`, &hurt); hurt != 0 {
		t.Errorf("%d elements came from a text", hurt)
	}
	var text string
	if b.eval(`document.getElementById("journal").textContent`, &text); !strings.Contains(text, "<img src=x onerror=alert(1)>") {
		t.Errorf("the journal's text is not shown: %s", text)
	}
	b.clean(url)
	b.open(url + "?find=VM1")
	p.compareTree(b, "vm1")
	b.open(url + "?find=%22%3E%3Cimg%20src%3Dx%3E")
	b.clean(url)
	p.withoutScripts(b, url)
	b.open(url)
	p.liveGraphs(b)
	for _, scheme := range []string{"light", "dark"} {
		b.shape(1280, 900, scheme)
		b.shoot("wide-" + scheme)
		b.shape(390, 844, scheme)
		b.shoot("narrow-" + scheme)
	}
	var wider bool
	if b.eval(`document.documentElement.scrollWidth > innerWidth`, &wider); wider {
		t.Error("the page is wider than a narrow window")
	}
	b.clean(url)
}

// liveGraphs expects graphs and the list of busy volumes to show a load.
func (p program) liveGraphs(b *chromium) {
	t := p.t
	for _, load := range []*exec.Cmd{
		p.fio("vm1", "--rw=randrw", "--rwmixread=70", "--bs=4k", "--size=256M", "--iodepth=8", "--time_based", "--runtime=300", "--rate_iops=2500"),
		p.fio("db", "--rw=randwrite", "--bs=64k", "--size=256M", "--iodepth=2", "--time_based", "--runtime=300", "--rate=12m"),
		p.fio("web", "--rw=read", "--bs=128k", "--size=256M", "--time_based", "--runtime=300", "--rate=40m"),
	} {
		t.Cleanup(func() { _ = load.Process.Kill(); _ = load.Wait() })
	}
	for _, key := range []string{"r", "w", "rb", "wb", "r50", "r99", "w50", "w99", "fill", "files"} {
		points := 0
		for end := time.Now().Add(testwatch.Long); points < 8 && time.Now().Before(end); time.Sleep(200 * time.Millisecond) {
			b.eval(fmt.Sprintf(`(document.querySelector("path.line[data-key=%s]").getAttribute("d").match(/L/g) || []).length`, key), &points)
		}
		if points < 8 {
			t.Errorf("the graph of %q has %d points", key, points)
		}
	}
	var busy []string
	if b.eval(`[...document.querySelectorAll("#busy tbody th")].map((e) => e.textContent)`, &busy); !slices.Equal(slices.Sorted(slices.Values(busy)), []string{"db", "vm1", "web"}) {
		t.Errorf("busy: %q", busy)
	}
}

// withoutScripts looks at the page in a browser that runs no JavaScript.
func (p program) withoutScripts(b *chromium, url string) {
	b.call("Emulation.setScriptExecutionDisabled", map[string]any{"value": true}, nil)
	b.open(url)
	b.shoot("no-scripts")
	b.clean(url)
	b.call("Emulation.setScriptExecutionDisabled", map[string]any{"value": false}, nil)
	p.compareTree(b, "") // of the page that is open, which does not change
	var charts, events int
	b.eval(`document.querySelectorAll("#charts figure").length`, &charts)
	if b.eval(`document.querySelectorAll("#journal tbody tr").length`, &events); charts != 0 || events < 15 {
		p.t.Errorf("%d graphs, %d events", charts, events)
	}
}

// treeRow is a row of the tree, on the page or from 'vdisk ls'.
type treeRow struct {
	Name                                      string
	Size, Mapped, Referenced, Exclusive, Used int64
}

// compareTree compares the tree on the page with what 'vdisk ls --tree' says of the names that have a text.
func (p program) compareTree(b *chromium, find string) {
	p.t.Helper()
	type usage struct{ Mapped, Referenced, Exclusive, Used int64 }
	var list struct {
		Volumes []struct {
			Name      string
			Size      int64
			Usage     usage
			Snapshots []struct {
				Name  string
				Size  int64
				Usage usage
			}
		}
	}
	if err := json.Unmarshal([]byte(p.run("ls", "-l", "-t", "all", "--json")), &list); err != nil {
		p.t.Fatal(err)
	}
	all := map[string]treeRow{}
	put := func(name string, size int64, u usage) {
		all[name] = treeRow{name, size, u.Mapped, u.Referenced, u.Exclusive, u.Used}
	}
	for _, v := range list.Volumes {
		put(v.Name, v.Size, v.Usage)
		for _, s := range v.Snapshots {
			put(s.Name, s.Size, s.Usage)
		}
	}
	var want []treeRow
	for line := range strings.Lines(p.run("ls", "--tree", "-H", "-o", "name")) {
		if name := strings.TrimSpace(line); strings.Contains(name, find) {
			want = append(want, all[name])
		}
	}
	var got []treeRow
	b.eval(`[...document.querySelectorAll(".tree tbody tr")].map((r) => {
		const n = (kind) => Number((r.querySelector("data." + kind) || {value: -1}).value);
		return {Name: r.dataset.name, Size: n("size"), Mapped: n("mapped"), Referenced: n("referenced"), Exclusive: n("exclusive"), Used: n("used")};
	})`, &got)
	if !slices.Equal(got, want) {
		p.t.Errorf("the page with %q has\n%+v\nand vdisk ls\n%+v", find, got, want)
	}
}
