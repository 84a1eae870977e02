package owner

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/vdisk/vdisk/cow"
	"github.com/vdisk/vdisk/internal/metrics"
	"github.com/vdisk/vdisk/nbd"
	"github.com/vdisk/vdisk/ublk"
)

// trafficOf returns what a reading has of a volume or snapshot, in short.
func trafficOf(t *testing.T, s Store, name string) string {
	t.Helper()
	r, err := s.Reading(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, x := range r.Traffic {
		if x.Ref.String() != name {
			continue
		}
		var text strings.Builder
		for i, op := range metrics.Operations {
			if o := x.Ops[i]; o.Requests > 0 {
				fmt.Fprintf(&text, "%v %d of %d, %d failed; ", op, o.Requests, o.Bytes, o.Errors)
				if n := o.Stats().Latency.Count(); n != o.Requests || o.Time <= 0 {
					t.Errorf("%v of %s: %d requests, and %d in the histogram; %v", op, name, o.Requests, n, o.Time)
				}
			}
		}
		for i, n := range x.Errors {
			if n > 0 {
				fmt.Fprintf(&text, "%d %s", n, metrics.Kinds[i])
			}
		}
		return text.String()
	}
	return "none"
}

// TestTraffic follows the counters of a volume through its life: an NBD client, a block device that comes and goes, new
// names, the end. They only rise, as long as the volume exists.
func TestTraffic(t *testing.T) {
	w := newFakeMachine(t)
	o := w.own(true)
	defer w.close(o)
	s := open(t, w.dir)
	defer s.Close() // the owner waits for that
	if _, is := s.(*Client); !is {
		t.Fatalf("%T", s)
	}
	want := func(name, what string) {
		t.Helper()
		for _, x := range []Store{o, s} {
			if got := trafficOf(t, x, name); got != what {
				t.Errorf("%T, %s: %q, not %q", x, name, got, what)
			}
		}
	}
	want("v", "none")
	path, end := serving(t, o, ServeOptions{})
	c, refusal := openNBD(t, path, "v")
	if refusal != "" {
		t.Fatal(refusal)
	}
	want("v", "")
	page := strings.Repeat("x", 4096)
	for _, code := range []uint32{c.request(nbdWrite, 0, 4096, page), c.request(nbdWrite, 8192, 4096, page), c.request(nbdFlush, 0, 0, "")} {
		if code != 0 {
			t.Fatal(code)
		}
	}
	if c.request(nbdWrite, 1<<40, 4096, page) == 0 {
		t.Error("there is something behind the end")
	}
	want("v", "write 2 of 8192, 0 failed; flush 1 of 0, 0 failed; ")
	if r, err := s.Reading(t.Context()); err != nil || r.Services != 1 || r.Clients != 1 || r.Served != 0 || r.Version != quick.Version || r.Store != w.dir || r.Info.Volumes != 1 {
		t.Errorf("%+v, %v", r, err)
	}
	_ = c.Close()
	if err := end(); err != nil {
		t.Fatal(err)
	}

	d := w.attach(o, "v")
	block := w.d.devices[d.ID].server
	write := &block.stats.Ops[ublk.OpWrite]
	write.Requests, write.Bytes = 3, 3*4096
	for range 3 {
		write.Latency.Add(time.Millisecond)
	}
	if err := block.h.ServeUBLK(&ublk.Request{Op: ublk.OpRead, Offset: 1 << 40, Length: 4096, Buf: make([]byte, 4096)}); err == nil {
		t.Error("the device reads behind its end")
	}
	all := "write 5 of 20480, 0 failed; flush 1 of 0, 0 failed; 1 invalid"
	want("v", all)
	if err := o.Rename(t.Context(), cow.Ref{Volume: "v"}, cow.Ref{Volume: "new"}); err != nil {
		t.Fatal(err)
	}
	want("new", all)
	want("v", "none")
	if err := o.Detach(t.Context(), "new", false); err != nil {
		t.Fatal(err)
	}
	want("new", all)
	w.attach(o, "new")
	want("new", all)
	if err := o.Detach(t.Context(), "new", false); err != nil {
		t.Fatal(err)
	}
	if err := o.Remove(t.Context(), cow.Ref{Volume: "new"}, false); err != nil {
		t.Fatal(err)
	}
	want("new", "none")
}

// TestMetersAreBounded opens very many snapshots, which then go.
func TestMetersAreBounded(t *testing.T) {
	there := map[cow.Ref]bool{}
	x := newMeters(func(r cow.Ref) bool { return there[r] })
	for i := range 10000 {
		r := cow.Ref{Volume: "v", Snapshot: fmt.Sprint("s", i)}
		x.of(r)
		there[r] = i < 10
	}
	if n := len(x.byRef); n > 100 {
		t.Errorf("%d meters", n)
	}
	kept := x.of(cow.Ref{Volume: "v", Snapshot: "s3"})
	x.renamed(cow.Ref{Volume: "v"}, cow.Ref{Volume: "w"})
	if x.of(cow.Ref{Volume: "w", Snapshot: "s3"}) != kept {
		t.Error("a rename of the volume loses the meters of its snapshots")
	}
}

// TestMetersDoNotAllocate: counting a request takes no memory, after the first of its kind.
func TestMetersDoNotAllocate(t *testing.T) {
	m := new(meter)
	m.observe(nbd.OpRead, 4096, time.Microsecond, nil)
	if n := testing.AllocsPerRun(100, func() { m.observe(nbd.OpRead, 4096, time.Microsecond, nil) }); n > 0 {
		t.Errorf("%v allocations", n)
	}
}

// TestScrape reads the metrics of an owner in three ways, and lets nobody keep the owner from ending.
func TestScrape(t *testing.T) {
	dir := newStore(t)
	o := offer(t, dir)
	get := func(s Store) string {
		t.Helper()
		var b bytes.Buffer
		if err := s.Metrics(t.Context(), &b); err != nil {
			t.Fatal(err)
		}
		return b.String()
	}
	dialer := &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", filepath.Join(dir, controlName))
	}}}
	resp, err := dialer.Get("http://vdisk/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	direct, err := io.ReadAll(resp.Body)
	if err != nil || resp.Header.Get("Content-Type") != metrics.ContentType {
		t.Fatal(resp.Header, err)
	}
	for _, text := range []string{get(o), get(open(t, dir)), string(direct)} {
		for _, line := range []string{"vdisk_store_volumes 1\n", `vdisk_volume_size_bytes{volume="v"} `, "# TYPE vdisk_log_records_total counter\n"} {
			if !strings.Contains(text, line) {
				t.Errorf("there is no %q in %s", line, text)
			}
		}
	}
	eventually(t, func() bool {
		o.mu.Lock()
		defer o.mu.Unlock()
		return o.sessions == 1 // of the test's Client, which ends after this
	})
}
