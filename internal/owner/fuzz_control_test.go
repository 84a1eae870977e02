package owner

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/vdisk/vdisk/cow"
	"github.com/vdisk/vdisk/format"
	"github.com/vdisk/vdisk/internal/fuzzcode"
	"github.com/vdisk/vdisk/internal/owner/sparse"
	"github.com/vdisk/vdisk/internal/storage/crashfs"
	"github.com/vdisk/vdisk/internal/testwatch"
)

// session is one run of FuzzRequests: a client of an owner, and the names that the store must have.
type session struct {
	t     *testing.T
	owner *Owner
	store *Client
	code  fuzzcode.Code
	names map[string][]string // by volume: its snapshots, sorted
}

var sessionNames = []string{"a", "b", "c", "d", "", "no name", strings.Repeat("x", 64), "a@s", "\xff", "12:00+01"}

func (s *session) name() string {
	if i := s.code.Byte(); i < 240 {
		return sessionNames[i%16%byte(len(sessionNames))]
	}
	return s.code.Text(int(s.code.Byte()) % 70)
}

func (s *session) ref() cow.Ref { return cow.Ref{Volume: s.name(), Snapshot: s.name()} }

func (s *session) has(r cow.Ref) bool {
	snaps, ok := s.names[r.Volume]
	return ok && (r.Snapshot == "" || slices.Contains(snaps, r.Snapshot))
}

// fresh reports whether a name can be given to a new volume.
func (s *session) fresh(name string) bool {
	return format.CheckName(name) == nil && !s.has(cow.Ref{Volume: name})
}

func (s *session) add(r cow.Ref) {
	s.names[r.Volume] = append(s.names[r.Volume], r.Snapshot)
	slices.Sort(s.names[r.Volume])
}

// drop removes a name from the model.
func (s *session) drop(r cow.Ref) {
	if r.Snapshot == "" {
		delete(s.names, r.Volume)
		return
	}
	s.names[r.Volume] = slices.DeleteFunc(slices.Clone(s.names[r.Volume]), func(n string) bool { return n == r.Snapshot })
}

// outcome checks the error of a request: it is nil only if the request was possible, and then apply is what it did. If
// the request was possible, it may still be refused because something is in use, as only the errors' codes say.
func (s *session) outcome(what string, err error, possible bool, apply func()) {
	if err == nil && !possible {
		s.t.Fatalf("%s succeeded, with %v", what, s.names)
	}
	if err == nil {
		apply()
		return
	}
	var e *Error
	if !errors.As(err, &e) || e.Message == "" || len(e.Codes) == 0 {
		s.t.Fatalf("%s: not an owner's error: %v", what, err)
	}
	if possible && !errors.Is(err, cow.ErrBusy) && !errors.Is(err, cow.ErrInvalid) && !errors.Is(err, ErrUnsupported) {
		s.t.Fatalf("%s: %v, with %v", what, err, s.names)
	}
}

// same checks that the store has the model's names.
func (s *session) same(what string) {
	have := s.listed()
	if len(have) != len(s.names) {
		s.t.Fatalf("after %s: the store has %v, want %v", what, have, s.names)
	}
	for name, snaps := range have {
		want, ok := s.names[name]
		if !ok || !slices.Equal(snaps, want) {
			s.t.Fatalf("after %s: the store has %v, want %v", what, have, s.names)
		}
	}
}

func (s *session) listed() map[string][]string {
	names := map[string][]string{}
	for _, v := range s.owner.store.Volumes() {
		names[v.Name] = []string{}
		for _, sn := range v.Snapshots {
			names[v.Name] = append(names[v.Name], sn.Name)
		}
		slices.Sort(names[v.Name])
	}
	return names
}

// begin removes what an earlier run has left.
func (s *session) begin() {
	ctx := s.t.Context()
	status, err := s.owner.Status(ctx)
	for _, d := range status.Devices {
		err = errors.Join(err, s.owner.Detach(ctx, d.Path, true))
	}
	for pass := range 2 { // a snapshot that has clones goes after them
		for name := range s.listed() {
			if rerr := s.owner.Remove(ctx, cow.Ref{Volume: name}, true); pass == 1 {
				err = errors.Join(err, rerr)
			}
		}
	}
	if err != nil {
		s.t.Fatal(err)
	}
	s.names = map[string][]string{}
}

var sessionSizes = []int64{4096, 1 << 20, 512, 0, -1, 513, 1 << 50, 1 << 62}

// step makes one request.
func (s *session) step() string {
	ctx := s.t.Context()
	switch op := s.code.Byte() % 16; op {
	case 0, 1:
		name, size := s.name(), sessionSizes[int(s.code.Byte())%len(sessionSizes)]
		v, err := s.store.CreateVolume(ctx, name, cow.VolumeOptions{Size: size, LogicalBlock: 512 * int(s.code.Byte()%3)})
		s.outcome("create", err, s.fresh(name) && size > 0 && size%512 == 0, func() { s.names[name] = []string{} })
		if err == nil && (v.Name != name || v.Size != size) {
			s.t.Fatalf("created %+v", v)
		}
	case 2, 3:
		s.snapshot(ctx)
	case 4:
		r, name := s.ref(), s.name()
		err := s.store.Clone(ctx, r, name)
		s.outcome("clone", err, r.Snapshot != "" && s.has(r) && s.fresh(name), func() { s.names[name] = []string{} })
	case 5:
		r := s.ref()
		s.outcome("rollback", s.store.Rollback(ctx, r), r.Snapshot != "" && s.has(r), func() {})
	case 6:
		s.rename(ctx)
	case 7:
		name, size := s.name(), sessionSizes[int(s.code.Byte())%len(sessionSizes)]
		err := s.store.Resize(ctx, name, size, s.code.Byte()%2 == 1)
		s.outcome("resize", err, s.has(cow.Ref{Volume: name}) && size > 0 && size%512 == 0, func() {})
		if v, verr := s.store.Volume(ctx, name); err == nil && (verr != nil || v.Size != size) {
			s.t.Fatalf("resized to %d: %+v, %v", size, v, verr)
		}
	case 8, 9:
		r, all := s.ref(), s.code.Byte()%2 == 1
		err := s.store.Remove(ctx, r, all)
		s.outcome("remove", err, s.has(r) && (r.Snapshot != "" || all || len(s.names[r.Volume]) == 0), func() { s.drop(r) })
	case 10:
		return s.device(ctx)
	case 11:
		s.transfer(ctx)
	case 12:
		return s.look(ctx)
	default:
		return s.raw(ctx)
	}
	return "a request"
}

func (s *session) snapshot(ctx context.Context) {
	refs := make([]cow.Ref, 1+s.code.Byte()%3)
	possible, seen := true, map[cow.Ref]bool{}
	for i := range refs {
		refs[i] = s.ref()
		possible = possible && s.has(cow.Ref{Volume: refs[i].Volume}) && !s.has(refs[i]) && format.CheckSnapshotName(refs[i].Snapshot) == nil && !seen[refs[i]]
		seen[refs[i]] = true
	}
	s.outcome("snapshot", s.store.Snapshot(ctx, refs...), possible, func() {
		for _, r := range refs {
			s.add(r)
		}
	})
}

func (s *session) rename(ctx context.Context) {
	from, to := s.ref(), s.ref()
	if s.code.Byte()%2 == 0 {
		to.Volume = from.Volume
	}
	err := s.store.Rename(ctx, from, to)
	switch {
	case from == to || from.Volume == to.Volume && from.Snapshot == "" && to.Snapshot == "": // as good as nothing
		s.outcome("rename to itself", err, s.has(from), func() {})
	case from.Snapshot == "" && to.Snapshot == "":
		s.outcome("rename", err, s.has(from) && s.fresh(to.Volume), func() {
			s.names[to.Volume] = s.names[from.Volume]
			s.drop(from)
		})
	default:
		possible := from.Snapshot != "" && to.Snapshot != "" && from.Volume == to.Volume && s.has(from) && !s.has(to) && format.CheckSnapshotName(to.Snapshot) == nil
		s.outcome("rename", err, possible, func() { s.drop(from); s.add(to) })
	}
}

// device attaches and detaches, by the fake driver.
func (s *session) device(ctx context.Context) string {
	r := s.ref()
	if s.code.Byte()%2 == 0 {
		d, err := s.store.Attach(ctx, AttachOptions{Ref: r, ReadOnly: s.code.Byte()%2 == 1, Queues: int(s.code.Byte()%4) - 1, Depth: int(s.code.Byte())})
		s.outcome("attach", err, s.has(r), func() {})
		if err == nil && d.Ref != r {
			s.t.Fatalf("attached %v: %+v", r, d)
		}
		return "attach"
	}
	what := r.String()
	_, serr := s.store.Stats(ctx, what)
	err := s.store.Detach(ctx, what, s.code.Byte()%2 == 1)
	if serr == nil && errors.Is(err, cow.ErrNotFound) {
		s.t.Fatalf("%s has counters and is not attached: %v", what, err)
	}
	return "detach"
}

// transfer imports a volume, from a stream that may be damaged, and exports one.
func (s *session) transfer(ctx context.Context) {
	name := s.name()
	content := append([]byte(s.code.Text(int(s.code.Byte()))), make([]byte, 512*int(s.code.Byte()%4))...)
	v, err := s.store.Import(ctx, name, cow.VolumeOptions{}, sparse.FromStream(bytes.NewReader(content)), nil)
	s.outcome("import", err, s.fresh(name) && len(content) > 0, func() { s.names[name] = []string{} })
	if err != nil {
		return
	}
	var out bytes.Buffer
	err = s.store.Export(ctx, cow.Ref{Volume: name}, func(src sparse.Source) error { return sparse.WriteTo(ctx, &out, src, nil) })
	if err != nil || int64(out.Len()) != v.Size || !bytes.HasPrefix(out.Bytes(), content) || len(bytes.TrimRight(out.Bytes()[len(content):], "\x00")) > 0 {
		s.t.Fatalf("%q became %q (%v)", content, out.Bytes(), err)
	}
}

// look asks for everything that changes nothing, and compares the client's answers with the owner's.
func (s *session) look(ctx context.Context) string {
	vs, err := s.store.Volumes(ctx)
	if err != nil || len(vs) != len(s.names) {
		s.t.Fatalf("%d volumes, %v", len(vs), err)
	}
	name := s.name()
	v, err := s.store.Volume(ctx, name)
	s.outcome("volume", err, s.has(cow.Ref{Volume: name}), func() {
		if v.Name != name {
			s.t.Fatalf("%q is %+v", name, v)
		}
	})
	us, err := s.store.Usage(ctx, s.ref(), s.ref())
	_, err2 := s.store.VolumeUsage(ctx, name)
	info, err3 := s.store.Info(ctx)
	if err := errors.Join(err, err3); err != nil || len(us) > 2 || err2 != nil && !errors.Is(err2, cow.ErrNotFound) {
		s.t.Fatal(us, err, err2)
	}
	if info.UUID != s.owner.store.Info().UUID {
		s.t.Fatalf("%+v", info)
	}
	if s.code.Byte()%4 == 0 {
		report, err := s.store.Check(ctx, cow.CheckOptions{ReadData: true}, func(p cow.Problem) { s.t.Errorf("%+v", p) })
		if err != nil {
			s.t.Fatalf("%+v, %v", report, err)
		}
	}
	return "looking"
}

// rawOperations are all that can be asked for, but upgrade and serve, which are about processes and sockets, and bench,
// which takes its time.
var rawOperations = []string{
	"status", "info", "volumes", "volume", "space", "volume-space", "create", "snapshot", "clone", "rollback", "rename", "resize", "remove",
	"attach", "detach", "claim", "recover", "stats", "clean", "cold", "scrub", "check", "import", "export", "nonsense", "", "../v1/status",
}

// raw sends a request that no client of ours sends. The owner must answer it, in JSON if it refuses it, and must not have
// done anything then.
func (s *session) raw(ctx context.Context) string {
	name := rawOperations[int(s.code.Byte())%len(rawOperations)]
	method := []string{http.MethodPost, http.MethodGet, http.MethodPut, "BREW"}[max(0, int(s.code.Byte()%16)-12)]
	how := s.code.Byte()
	text := s.code.Text(int(s.code.Byte()))
	switch how % 8 {
	case 1:
		text = `{"Name":"` + s.name() + `","Volume":{"Size":4096},"Unknown":` + text + `}`
	case 2:
		text = strings.Repeat("[", 10000) + text
	case 3:
		text = `{"Name":"a","Volume":{"Size":4096}}` + text // what follows is not read
	case 4:
		text = `{"Ref":{"Volume":"a","Snapshot":"s"},"Refs":[{"Volume":"a","Snapshot":"s"}],"Name":"b","Flag":true` + text
	}
	r, err := http.NewRequestWithContext(ctx, method, "http://vdisk/v1/"+name, strings.NewReader(text))
	if err != nil {
		return "nothing"
	}
	if how&8 != 0 {
		r.Header.Set(argumentsHeader, strings.Map(func(c rune) rune {
			if c < ' ' || c > '~' {
				return -1
			}
			return c
		}, text))
	}
	resp, err := s.store.http.Do(r)
	if err != nil {
		s.t.Fatalf("%s %s %q: %v", method, name, text, err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	switch {
	case resp.StatusCode == http.StatusOK:
		s.names = s.listed() // it may have been a request that is right
	case resp.StatusCode == http.StatusUnprocessableEntity:
		e := new(Error)
		if json.Unmarshal(b, e) != nil || e.Message == "" {
			s.t.Fatalf("%s %s %q: refused with %q", method, name, text, b)
		}
		fallthrough
	default:
		if resp.StatusCode >= 500 || err != nil {
			s.t.Fatalf("%s %s %q: %s %q, %v", method, name, text, resp.Status, b, err)
		}
	}
	return fmt.Sprintf("%s %s %q (%s)", method, name, text, resp.Status)
}

// FuzzRequests is a program of requests to an owner over its control socket: of a client of ours, and such as no client
// sends. A model of the store's names says which may succeed. A refused request must change nothing and say why.
func FuzzRequests(f *testing.F) {
	dir, err := os.MkdirTemp(testwatch.Memory(), "vdisk-owner-")
	if err != nil {
		dir = f.TempDir()
	}
	f.Cleanup(func() { os.RemoveAll(dir) })
	dir = filepath.Join(dir, "store")
	if err := cow.Create(dir); err != nil {
		f.Fatal(err)
	}
	o := quick
	o.Offer, o.Temporary, o.driver, o.fs = true, true, newFakeDriver(), crashfs.New()
	o.memory, o.threads = func() []memory { return nil }, func() []room { return nil }
	owner, err := Own(context.Background(), dir, o)
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { _ = owner.CloseLeaving() })
	client, _, err := connect(context.Background(), dir, o)
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { _ = client.Close() })
	f.Add([]byte{0, 0, 0, 0, 2, 0, 0, 1, 4, 0, 1, 2, 12, 0, 1, 2, 3, 4, 0, 8, 2, 4, 0, 8, 0, 4, 1})
	f.Add([]byte{0, 0, 1, 0, 2, 1, 0, 0, 0, 1, 6, 0, 0, 0, 2, 0, 5, 0, 2, 7, 0, 2, 1, 9, 0, 2, 0})
	f.Add([]byte{0, 1, 0, 0, 10, 1, 4, 0, 0, 1, 4, 9, 1, 4, 0, 10, 1, 4, 1, 0, 9, 1, 4, 1})
	f.Add(append([]byte{11, 3, 20}, "some bytes of a volume and more"...))
	for i := range byte(len(rawOperations)) {
		f.Add([]byte{0, 0, 0, 0, 13, i, 0, i, 4, '{', '}', 1, 2, 13, i, 0, 8, 30, '{', '}', 14, i, 15, 2, 0, 15, i, 0, 4, 1, '}'})
	}
	f.Fuzz(func(t *testing.T, program []byte) {
		if len(program) > 300 {
			return
		}
		s := &session{t: t, owner: owner, store: client, code: fuzzcode.Code{B: program}}
		s.begin()
		for len(s.code.B) > 0 {
			what := s.step()
			s.same(what)
		}
	})
}
