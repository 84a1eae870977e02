package web

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/vdisk/vdisk/cow"
	"github.com/vdisk/vdisk/internal/journal"
	"github.com/vdisk/vdisk/internal/metrics"
	"github.com/vdisk/vdisk/internal/owner"
	"github.com/vdisk/vdisk/internal/storage"
	"github.com/vdisk/vdisk/internal/testwatch"
	"github.com/vdisk/vdisk/ublk"
)

func TestMain(m *testing.M) { os.Exit(testwatch.Run(m)) }

// fake is a store, with a clock and ticks of its own, and a journal that a test fills.
type fake struct {
	t     *testing.T
	dir   string
	ticks chan time.Time

	mu       sync.Mutex // guards the fields below
	now      time.Time
	volumes  []owner.Volume
	usage    []cow.Usage
	usageErr error
	chunks   []cow.ChunkInfo
	reading  metrics.Reading
	asked    map[string]int // how often each was read
	hang     chan struct{}  // Usage waits until it is closed, or its context ends
}

func newFake(t *testing.T) *fake {
	f := &fake{t: t, dir: t.TempDir(), ticks: make(chan time.Time), now: time.Unix(1e9, 0), asked: map[string]int{}}
	f.reading.Store = "/srv/disks"
	f.reading.Info.Fill = &cow.Fill{Bytes: 85, FullAt: 100}
	f.reading.Info.FillLevels = []int{80, 90}
	return f
}

func (f *fake) note(what string) func() {
	f.mu.Lock()
	f.asked[what]++
	return f.mu.Unlock
}

func (f *fake) Activity() metrics.Reading {
	defer f.note("activity")()
	r := f.reading
	r.At = f.now
	return r
}

func (f *fake) Volumes(context.Context) ([]owner.Volume, error) {
	defer f.note("volumes")()
	return f.volumes, nil
}

func (f *fake) Usage(ctx context.Context, _ ...cow.Ref) ([]cow.Usage, error) {
	f.note("usage")()
	if f.hang != nil {
		select {
		case <-f.hang:
		case <-ctx.Done():
			time.Sleep(10 * time.Millisecond) // a server that does not wait would be gone
			f.note("interrupted")()
			return nil, ctx.Err()
		}
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.usage, f.usageErr
}

func (f *fake) EachChunk(each func(cow.ChunkInfo)) error {
	defer f.note("chunks")()
	for _, c := range f.chunks {
		each(c)
	}
	return nil
}

func (f *fake) times(what string) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.asked[what]
}

func (f *fake) clock() time.Time {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.now
}

func (f *fake) pass(d time.Duration) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.now = f.now.Add(d)
}

func (f *fake) options() Options {
	return Options{
		Source: func() Source { return f },
		Journal: func() (*journal.Tail, error) {
			in, err := storage.OpenFolder(f.dir, true)
			return journal.NewTail(in), err
		},
		Log: slog.New(slog.DiscardHandler), now: f.clock, usageWait: time.Millisecond,
		tick: func(time.Duration) (<-chan time.Time, func()) { return f.ticks, func() {} },
	}
}

// server returns a server of the page that ends with the test.
func (f *fake) server() *server {
	ctx, cancel := context.WithCancel(context.Background())
	s := newServer(ctx, f.options())
	f.t.Cleanup(func() { cancel(); s.close() })
	return s
}

// get asks for a path, and expects success.
func (s *server) get(t *testing.T, path string) string {
	t.Helper()
	w := httptest.NewRecorder()
	r := httptest.NewRequest(http.MethodGet, path, nil)
	r.Host = "127.0.0.1:9751"
	s.guarded().ServeHTTP(w, r)
	if w.Code != 200 {
		t.Fatalf("%s: %d %s", path, w.Code, w.Body)
	}
	return w.Body.String()
}

// TestGuard asks for what there is, and for what is refused. No answer is without the policy.
func TestGuard(t *testing.T) {
	f := newFake(t)
	h := f.server().guarded()
	cross := map[string]string{"Sec-Fetch-Site": "cross-site"}
	link := map[string]string{"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}
	frame := map[string]string{"Sec-Fetch-Site": "same-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "iframe"}
	own := map[string]string{"Sec-Fetch-Site": "same-origin"}
	for _, x := range []struct {
		method, path, host string
		headers            map[string]string
		code               int
	}{
		{"GET", "/", "localhost:9751", nil, 200},
		{"GET", "/", "[::1]:9751", own, 200},
		{"GET", "/", "127.0.0.1", link, 200},
		{"HEAD", "/", "127.0.0.1:9751", nil, 200},
		{"GET", "/style.css", "localhost", own, 200},
		{"GET", "/page.js", "localhost", own, 200},
		{"GET", "/icon.svg", "localhost", nil, 200},
		{"GET", "/live?after=0", "localhost", own, 200},
		{"GET", "/live?after=x", "localhost", own, 400},
		{"GET", "/?find=%ff", "localhost", own, 400},
		{"GET", "/?find=" + strings.Repeat("x", 300), "localhost", own, 400},
		{"POST", "/", "localhost", nil, 405},
		{"DELETE", "/live", "localhost", nil, 405},
		{"OPTIONS", "/", "localhost", nil, 405},
		{"GET", "/page.html", "localhost", nil, 404},
		{"GET", "/assets/page.html", "localhost", nil, 404},
		{"GET", "/debug/pprof/", "localhost", nil, 404},
		{"GET", "/", "evil.example", nil, 403},
		{"GET", "/", "127.0.0.1.evil.example:9751", nil, 403},
		{"GET", "/", "vdisk", nil, 403},
		{"GET", "/", "", nil, 403},
		{"GET", "/live", "localhost", cross, 403},
		{"GET", "/", "localhost", cross, 403},
		{"GET", "/", "localhost", frame, 403},
	} {
		w, r := httptest.NewRecorder(), httptest.NewRequest(x.method, x.path, nil)
		r.Host = x.host
		for name, value := range x.headers {
			r.Header.Set(name, value)
		}
		h.ServeHTTP(w, r)
		if w.Code != x.code {
			t.Errorf("%v: %d %s", x, w.Code, w.Body)
		}
		for name := range headers {
			if w.Header().Get(name) == "" {
				t.Errorf("%v: there is no %s", x, name)
			}
		}
		if got := w.Header().Get("Content-Security-Policy"); got != policy || strings.Contains(got, "unsafe") {
			t.Errorf("%v: the policy is %q", x, got)
		}
	}
}

// TestRequestsAreBounded asks for more than is answered at a time.
func TestRequestsAreBounded(t *testing.T) {
	s := newFake(t).server()
	for range maxRequests {
		s.running <- struct{}{}
	}
	w, r := httptest.NewRecorder(), httptest.NewRequest(http.MethodGet, "/", nil)
	r.Host = "localhost"
	if s.guarded().ServeHTTP(w, r); w.Code != http.StatusServiceUnavailable {
		t.Errorf("one request too many: %d", w.Code)
	}
	<-s.running
	s.get(t, "/")
}

// TestListen refuses addresses that others can reach.
func TestListen(t *testing.T) {
	for _, address := range []string{"", "0.0.0.0:0", ":0", "[::]:0", "192.0.2.1:0", "example.org:0", "9751", "unix:", "/run/web.sock", "http://127.0.0.1:0"} {
		if l, _, err := Listen(address); !errors.Is(err, ErrAddress) {
			t.Errorf("%q: %v, %v", address, l, err)
		}
	}
	for _, address := range []string{"localhost:0", "127.1.2.3:0"} {
		l, remove, err := Listen(address)
		if err != nil {
			t.Fatal(err)
		}
		_ = l.Close()
		remove()
	}
}

// TestServe serves the page on a Unix socket that only its user can open, and ends while a reading hangs.
func TestServe(t *testing.T) {
	f := newFake(t)
	f.hang = make(chan struct{})
	path := filepath.Join(t.TempDir(), "web.sock")
	l, remove, err := Listen("unix:" + path)
	if err != nil {
		t.Fatal(err)
	}
	if fi, err := os.Stat(path); err != nil || fi.Mode().Perm() != 0o600 {
		t.Error(fi, err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- Serve(ctx, l, f.options()) }()
	client := &http.Client{Transport: &http.Transport{DialContext: dialTo(path)}}
	resp, err := client.Get("http://localhost/style.css")
	if err != nil || resp.StatusCode != http.StatusOK {
		t.Fatal(resp, err)
	}
	_ = resp.Body.Close()
	asked := make(chan error, 1)
	go func() {
		resp, err := client.Get("http://localhost/")
		if err == nil {
			_, err = io.Copy(io.Discard, resp.Body)
			_ = resp.Body.Close()
		}
		asked <- err
	}()
	eventually(t, func() bool { return f.times("usage") == 1 })
	cancel()
	if err := testwatch.Wait(t, testwatch.Long, "the end of the page", ended); err != nil {
		t.Error(err)
	}
	if f.times("interrupted") != 1 {
		t.Error("the page has ended, and reads the store")
	}
	testwatch.Wait(t, testwatch.Long, "the answer, or its end", asked)
	remove()
	if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
		t.Error("the socket is left", err)
	}
}

// eventually waits until ready returns true.
func eventually(t *testing.T, ready func() bool) {
	t.Helper()
	for end := time.Now().Add(testwatch.Long); !ready(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("hangs\n%s", testwatch.Stacks())
		}
	}
}

// TestTextStaysText shows names, events and errors that are not only text to a browser.
func TestTextStaysText(t *testing.T) {
	const evil = `<img src=x onerror=alert(1)>"'&</script>`
	f := newFake(t)
	f.reading.Store, f.reading.Version = evil, evil
	v := owner.Volume{Devices: []owner.Device{{Ref: cow.Ref{Volume: evil}, Path: evil}}}
	v.Name, v.Origin, v.Codec = evil, evil+"@"+evil, evil
	v.Snapshots = []cow.SnapshotInfo{{Volume: evil, Name: evil, Holds: []cow.HoldInfo{{Tag: evil}}}}
	f.volumes = []owner.Volume{v}
	f.chunks = []cow.ChunkInfo{{Kind: evil, FileBytes: 1}}
	in, err := storage.OpenFolder(f.dir, true)
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	journal.New(in, slog.New(slog.DiscardHandler)).Add(journal.Entry{
		Kind: evil, Names: []string{evil}, From: evil, Error: evil, Details: map[string]any{evil: evil}, By: &journal.Caller{Command: evil},
	})
	s := f.server()
	for _, path := range []string{"/", "/?find=%3Cimg+src%3Dx"} {
		text := s.get(t, path)
		if strings.Contains(text, "<img src=x") || strings.Contains(text, `&</script>`) || strings.Contains(text, `alert(1)>`) {
			t.Errorf("%s has a text that is more than text", path)
		}
		if n := strings.Count(text, "&lt;img src=x onerror=alert(1)&gt;"); n < 11 {
			t.Errorf("%s shows the text %d times", path, n)
		}
	}
	f.reading.Traffic = []metrics.Traffic{{Ref: cow.Ref{Volume: evil}}}
	s.samplesAfter(0)
	f.ticks <- time.Time{}
	busier(f, 10)
	f.ticks <- time.Time{}
	eventually(t, func() bool { return len(s.samplesAfter(0).Busy) == 1 })
	if text := s.get(t, "/live"); strings.Contains(text, "<img") || !strings.Contains(text, `\u003cimg`) {
		t.Error(text)
	}
}

// busier lets a second pass in which the first volume of the fake writes n times.
func busier(f *fake, n uint64) {
	f.pass(time.Second)
	f.mu.Lock()
	defer f.mu.Unlock()
	was := f.reading.Traffic[0]
	s := was.Ops[1].Stats()
	for range n {
		s.Latency.Add(time.Millisecond)
	}
	s.Requests, s.Bytes = s.Requests+n, s.Bytes+4096*n
	was.Ops[1] = metrics.OperationOf(s)
	f.reading.Traffic = []metrics.Traffic{was}
}

// TestSampler: nothing is read before somebody asks, what happens then becomes samples, and nothing is read any more when
// nobody has asked for a while.
func TestSampler(t *testing.T) {
	f := newFake(t)
	f.reading.Traffic = []metrics.Traffic{{Ref: cow.Ref{Volume: "v"}}, {Ref: cow.Ref{Volume: "idle"}}}
	s := f.server()
	if n := f.times("activity"); n != 0 {
		t.Errorf("nobody has asked, and the store was read %d times", n)
	}
	ask := func(after uint64) (a answer) {
		t.Helper()
		if err := json.Unmarshal([]byte(s.get(t, fmt.Sprint("/live?after=", after))), &a); err != nil {
			t.Fatal(err)
		}
		return a
	}
	if a := ask(0); len(a.Samples) != 0 || a.Every != 2000 || a.Run == 0 {
		t.Errorf("%+v", a)
	}
	eventually(t, func() bool { return f.times("activity") == 1 })
	for n := range uint64(3) {
		busier(f, 10*(n+1))
		f.ticks <- time.Time{}
		eventually(t, func() bool { return len(ask(n).Samples) == 1 })
	}
	a := ask(1)
	if len(a.Samples) != 2 || a.Samples[0].N != 2 || a.Samples[0].Writes != 20 || a.Samples[1].WriteBytes != 30*4096 || a.Samples[1].Reads != 0 {
		t.Errorf("%+v", a.Samples)
	}
	if s := a.Samples[1]; s.WriteP99 < 960 || s.WriteP99 > 1033 || s.ReadP99 != 0 || s.Fill == nil || *s.Fill != 85 || s.Time != f.clock().UnixMilli() {
		t.Errorf("%+v", s)
	}
	if len(a.Busy) != 1 || a.Busy[0].Name != "v" || a.Busy[0].Writes != 30 {
		t.Errorf("%+v", a.Busy)
	}
	f.pass(sampleLinger)
	read := f.times("activity")
	f.ticks <- time.Time{}
	eventually(t, func() bool {
		s.sampler.mu.Lock()
		defer s.sampler.mu.Unlock()
		return !s.sampler.on
	})
	if n := f.times("activity"); n != read {
		t.Errorf("nobody asks, and the store was read %d times", n-read)
	}
	ask(3) // it begins again, and makes no sample of the time between
	eventually(t, func() bool { return f.times("activity") == read+1 })
	if a := ask(0); len(a.Samples) != 3 {
		t.Errorf("%+v", a.Samples)
	}
}

// TestSamplesAreBounded takes more samples than are kept.
func TestSamplesAreBounded(t *testing.T) {
	var x sampler
	for i := range maxSamples + 100 {
		x.take(metrics.Reading{At: time.Unix(int64(i), 0)})
	}
	if n, first := len(x.samples), x.samples[0].N; n != maxSamples || first != 100 {
		t.Errorf("%d samples from %d on", n, first)
	}
	if len(metrics.Operations) < 2 || metrics.Operations[1] != ublk.OpWrite {
		t.Error("the fake counts something else than writes")
	}
}

// TestKept asks for what is kept, at times.
func TestKept(t *testing.T) {
	f := newFake(t)
	s := f.server()
	eventually(t, func() bool { return !strings.Contains(s.get(t, "/"), "being measured") })
	for range 5 {
		s.get(t, "/")
	}
	if n := f.times("usage"); n != 1 {
		t.Errorf("pages at one time read it %d times", n)
	}
	f.pass(s.usage.least)
	f.mu.Lock()
	f.usageErr = fmt.Errorf("map: %w", cow.ErrCorrupt)
	f.mu.Unlock()
	eventually(t, func() bool { return strings.Contains(s.get(t, "/"), "vdisk check") })
	if n := f.times("usage"); n != 2 {
		t.Errorf("read %d times", n)
	}

	slow := &kept[int]{s: s, load: func(context.Context, Source) (int, error) { f.pass(time.Minute); return 7, nil }, least: time.Second, times: 20}
	if v, at, err := slow.get(t.Context(), testwatch.Long); v != 7 || !at.Equal(f.clock()) || err != nil {
		t.Error(v, at, err)
	}
	if got, want := slow.until, f.clock().Add(20*time.Minute); !got.Equal(want) {
		t.Errorf("what takes a minute is read again at %v, not %v", got, want)
	}
}

// TestUsageIsNotWaitedFor makes the page while the space of its volumes is still being measured.
func TestUsageIsNotWaitedFor(t *testing.T) {
	f := newFake(t)
	f.hang = make(chan struct{})
	f.usage = []cow.Usage{{Ref: cow.Ref{Volume: "v"}, Referenced: 4096, Exclusive: 4096}}
	f.volumes = []owner.Volume{{VolumeInfo: cow.VolumeInfo{Name: "v"}}}
	s := f.server()
	if text := s.get(t, "/"); !strings.Contains(text, "is being measured") || !strings.Contains(text, `data-name="v"`) {
		t.Error(text)
	}
	close(f.hang)
	eventually(t, func() bool { return strings.Contains(s.get(t, "/"), `class="exclusive" value="4096"`) })
	if n := f.times("usage"); n != 1 {
		t.Errorf("it was measured %d times", n)
	}
}
