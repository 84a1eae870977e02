package owner

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/vdisk/vdisk/cow"
	"github.com/vdisk/vdisk/internal/bench"
	"github.com/vdisk/vdisk/internal/owner/sparse"
	"github.com/vdisk/vdisk/internal/storage"
)

// cannedOwner answers every request with the same status, size header and body.
type cannedOwner struct {
	status int
	size   string
	body   []byte
}

func (c cannedOwner) RoundTrip(r *http.Request) (*http.Response, error) {
	if r.Body != nil {
		_, _ = io.Copy(io.Discard, r.Body)
	}
	h := http.Header{sizeHeader: {c.size}}
	return &http.Response{StatusCode: c.status, Status: fmt.Sprint(c.status, " as told"), Proto: "HTTP/1.1", Header: h, Body: io.NopCloser(bytes.NewReader(c.body)), Request: r}, nil
}

// FuzzAnswers gives a client arbitrary answers, as an owner of another version, or one that dies, might. Each operation
// must end, with an error that says what was asked, or that the owner gave, unless the answer is what it should be.
func FuzzAnswers(f *testing.F) {
	refused := `{"error":"the volume is busy","codes":["busy","what is that"]}`
	for i, body := range []string{
		`{}`, `null`, `[]`, refused, `{"PID":1}`, `[{"name":"v","Devices":[]}]`, `{"Progress":[1,2]}{"Problem":{}}{"Report":{}}`,
		`{"Report":{},"Error":` + refused + `}`, `{"Result":{}}{"Done":true}`, `{"Error":` + refused + `}`, `{"error":""}`, `{"codes":["busy"]}`, `{"PID":`, `"text"`, `{"Report":null}`,
	} {
		f.Add(byte(i), uint16(200), "10", []byte(body))
		f.Add(byte(i), uint16(422), "", []byte(body))
	}
	f.Add(byte(11), uint16(200), "4096", []byte("\x00\x10\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"))
	f.Add(byte(11), uint16(200), "-1", append([]byte("\x20\x00\x00\x00\x00\x00\x00\x00\xff\xff\xff\xff"), refused...))
	dir := f.TempDir()
	in, err := storage.OpenFolder(dir, true)
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { _ = in.Close() })
	f.Fuzz(func(t *testing.T, op byte, status uint16, size string, body []byte) {
		if len(body) > 5000 || strings.ContainsAny(size, "\r\n") {
			return
		}
		answer := cannedOwner{status: 100 + int(status)%500, size: size, body: body}
		if status%4 != 0 {
			answer.status = []int{0, 200, 422, 422}[status%4]
		}
		c := &Client{in: in, path: in.Join(controlName), http: &http.Client{Transport: answer}}
		err := perform(t.Context(), c, op)
		if answer.status != http.StatusOK && err == nil {
			t.Fatalf("operation %d succeeded with the status %d", op, answer.status)
		}
		var e *Error
		switch {
		case err == nil && !json.Valid(firstValue(body)) && op%14 != 11:
			t.Fatalf("operation %d succeeded with %q", op, body)
		case errors.As(err, &e):
			if e.Message == "" {
				t.Fatal("an error without a text")
			}
			for _, code := range codes { // only codes that the answer has
				if errors.Is(err, code.err) && !bytes.Contains(body, []byte(code.code[:1])) && !bytes.Contains(body, []byte(`\u`)) {
					t.Fatalf("%v became %v", err, code.err)
				}
			}
		case err != nil && !strings.Contains(err.Error(), "owner of the store") && !strings.Contains(err.Error(), "the other side") && !strings.Contains(err.Error(), "stream"):
			t.Fatalf("operation %d: %v", op, err)
		}
	})
}

// firstValue returns what a decoder takes for the first JSON value.
func firstValue(b []byte) []byte {
	var raw json.RawMessage
	if json.NewDecoder(bytes.NewReader(b)).Decode(&raw) != nil {
		return []byte("{")
	}
	return raw
}

// perform performs one of a client's operations.
func perform(ctx context.Context, c *Client, op byte) (err error) {
	switch op % 14 {
	case 0:
		_, err = c.Status(ctx)
	case 1:
		_, err = c.Volumes(ctx)
	case 2:
		_, err = c.Volume(ctx, "v")
	case 3:
		_, err = c.Usage(ctx, cow.Ref{Volume: "v"})
	case 4:
		err = c.Snapshot(ctx, cow.Ref{Volume: "v", Snapshot: "s"})
	case 5:
		_, err = c.Attach(ctx, AttachOptions{})
	case 6:
		_, err = c.Recover(ctx, "v")
	case 7:
		_, err = c.Stats(ctx, "v")
	case 8:
		_, err = c.Check(ctx, cow.CheckOptions{Progress: func(int64, int64) {}}, func(cow.Problem) {})
	case 9:
		err = c.Bench(ctx, bench.Options{}, func(bench.Result) {})
	case 10:
		_, err = c.Import(ctx, "v", cow.VolumeOptions{}, sparse.FromStream(strings.NewReader("some content")), nil)
	case 11:
		err = c.Export(ctx, cow.Ref{Volume: "v"}, func(src sparse.Source) error {
			p := make([]byte, 4096)
			for {
				if _, _, err := src.Next(p); err == io.EOF {
					return nil
				} else if err != nil {
					return err
				}
			}
		})
	case 12:
		_, err = c.Clean(ctx, 0.5)
	case 13:
		_, err = c.Info(ctx)
	}
	return err
}

// FuzzDevicesFile reads arbitrary files of devices. One of another boot or of a copy of the folder counts as empty. What
// is read comes back after it is written.
func FuzzDevicesFile(f *testing.F) {
	dir := f.TempDir()
	in, err := storage.OpenFolder(dir, true)
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { _ = in.Close() })
	boot, err := storage.BootID()
	if err != nil {
		f.Fatal(err)
	}
	st, err := in.Stat()
	if err != nil {
		f.Fatal(err)
	}
	f.Add([]byte(`{"boot":"BOOT","dev":DEV,"ino":INO,"devices":[{"cookie":"0123456789abcdef","ref":"v@s","readonly":true}]}`))
	f.Add([]byte(`{"boot":"BOOT","dev":1,"devices":[{"cookie":"1","ref":"v","renaming":"w","lost":true,"dev":7}],"heir":{"pid":1,"start":"2"}}`))
	f.Add([]byte(`{"boot":"another","devices":[{"cookie":"0000000000000001","ref":"v"}]}`))
	for _, s := range []string{``, `null`, `[]`, `{"devices":null,"boot":"BOOT"}`, `{"boot":"BOOT","devices":[{"cookie":""}]}`, `{"boot":"BOOT","devices":[{"cookie":"-1"}]}`, `{"boot":"BOOT","devices":[{"cookie":5}]}`} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		if len(text) > 3000 {
			return
		}
		put := strings.NewReplacer("BOOT", boot, "DEV", fmt.Sprint(st.Dev), "INO", fmt.Sprint(st.Ino)).Replace(string(text))
		if err := os.WriteFile(filepath.Join(dir, recordName), []byte(put), 0o600); err != nil {
			t.Fatal(err)
		}
		r, err := readRecord(in)
		if err != nil {
			if !strings.Contains(err.Error(), in.Join(recordName)) {
				t.Fatalf("the error does not name the file: %v", err)
			}
			return
		}
		if len(r.Devices) > 0 && (r.Boot != boot || r.Ino != 0 && r.Ino != st.Ino) {
			t.Fatalf("devices of another boot or folder: %+v", r)
		}
		for _, d := range r.Devices {
			if d.Dev == st.Dev {
				t.Fatalf("%+v is said to be of another file system", d)
			}
		}
		if err := r.write(in); err != nil {
			t.Fatal(err)
		}
		again, err := readRecord(in)
		if err != nil || len(again.Devices) != len(r.Devices) || fmt.Sprint(again.Successor == nil) != fmt.Sprint(r.Successor == nil) {
			t.Fatalf("%+v comes back as %+v (%v)", r, again, err)
		}
		for i := range r.Devices {
			if r.Devices[i] != again.Devices[i] {
				t.Fatalf("%+v comes back as %+v", r.Devices[i], again.Devices[i])
			}
		}
	})
}

// FuzzUnfinishedFile opens a store with an arbitrary list of unfinished volumes. No volume may go but those that the list
// names with the time at which they were made.
func FuzzUnfinishedFile(f *testing.F) {
	dir := filepath.Join(f.TempDir(), "store")
	if err := cow.Create(dir); err != nil {
		f.Fatal(err)
	}
	s, err := cow.Open(dir, cow.Options{Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { _ = s.Close() })
	in, err := storage.OpenFolder(dir, true)
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { _ = in.Close() })
	for _, text := range []string{
		`[{"name":"v","created":"CREATED"}]`, `[{"name":"v","created":"2026-01-01T00:00:00Z"}]`, `[{"name":"v","created":"CREATED","scratch":true}]`,
		`[{"name":"w","created":"CREATED"}]`, `null`, `[`, `[{}]`, `[{"name":"v"}]`, `[{"name":"","created":"CREATED"}]`, `{"name":"v"}`,
	} {
		f.Add([]byte(text))
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		if len(text) > 3000 {
			return
		}
		v, err := s.Volume("v")
		if errors.Is(err, cow.ErrNotFound) {
			v, err = s.CreateVolume("v", cow.VolumeOptions{Size: 1 << 20})
		}
		if err != nil {
			t.Fatal(err)
		}
		created := v.Created.Format(time.RFC3339Nano)
		put := strings.ReplaceAll(string(text), "CREATED", created)
		if err := os.WriteFile(filepath.Join(dir, unfinishedName), []byte(put), 0o600); err != nil {
			t.Fatal(err)
		}
		o := &Owner{dir: dir, in: in, store: s, opts: quick.withDefaults()}
		o.unfinished.in = in
		o.removeUnfinished()
		var list []unfinishedVolume
		named := false
		if json.Unmarshal([]byte(put), &list) == nil {
			for _, u := range list {
				named = named || u.Name == "v" && u.Created.Equal(v.Created)
			}
		}
		if _, err := s.Volume("v"); (err == nil) == named {
			t.Fatalf("%s: the volume is there: %v", put, err == nil)
		}
	})
}

// FuzzSystemTexts reads arbitrary texts in the place of those that the kernel gives about memory, threads, control groups
// and capabilities. They must do no harm, and a text that is not understood must not become a limit that refuses every
// device.
func FuzzSystemTexts(f *testing.F) {
	root := f.TempDir()
	group := filepath.Join(root, "sys/fs/cgroup/a/b")
	if err := errors.Join(os.MkdirAll(filepath.Join(root, "proc/self"), 0o755), os.MkdirAll(filepath.Join(root, "proc/sys/kernel"), 0o755), os.MkdirAll(group, 0o755)); err != nil {
		f.Fatal(err)
	}
	f.Add("MemTotal: 1000 kB\nMemAvailable: 500 kB\n", "Threads:\t5\nCapEff:\t0000003fffffffff\n", "0.1 0.2 0.3 1/234 99\n", "0::/a/b\n5:pids,memory:/a\n", "max\n")
	f.Add("MemTotal: 99999999999999999999 kB\n", "CapEff: zz\n", "1 2 3 4/x", "0::/../../..\n::::\n", "-5")
	f.Add("", "", "", "0::\n1:memory:\n", "9223372036854775807\n")
	f.Fuzz(func(t *testing.T, meminfo, status, loadavg, cgroup, number string) {
		if len(meminfo)+len(status)+len(loadavg)+len(cgroup)+len(number) > 3000 {
			return
		}
		for name, text := range map[string]string{
			"proc/meminfo": meminfo, "proc/self/status": status, "proc/loadavg": loadavg, "proc/self/cgroup": cgroup, "proc/sys/kernel/threads-max": number,
			"sys/fs/cgroup/a/b/memory.max": number, "sys/fs/cgroup/a/b/memory.current": number, "sys/fs/cgroup/a/b/pids.max": number, "sys/fs/cgroup/a/b/pids.current": "3",
		} {
			if err := os.WriteFile(filepath.Join(root, name), []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		for _, g := range append(groups(root, "memory"), groups(root, "pids")...) {
			if !strings.HasPrefix(g.path, filepath.Join(root, "sys/fs/cgroup")) {
				t.Fatalf("%+v is not below the groups", g)
			}
		}
		for _, m := range readMemory(root) {
			if m.name == "" || m.total < 0 {
				t.Fatalf("%+v", m)
			}
		}
		for _, r := range readThreads(root) {
			if r.name == "" {
				t.Fatalf("%+v", r)
			}
		}
		for _, p := range mountPoints(map[string]bool{"5": true, "1": true}, meminfo+cgroup) {
			if p == "" {
				t.Fatal("a mount without a name")
			}
		}
		if has, err := hasCapability(filepath.Join(root, "proc"), capIPCLock); has && err != nil || has && !strings.Contains(status, "CapEff:") {
			t.Fatal(has, err)
		}
	})
}
