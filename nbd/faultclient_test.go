package nbd

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/vdisk/vdisk/internal/testwatch"
)

// The tests of faults run a script against a server: a client, the victim, negotiates, has all requests of faultScript
// in flight at once, and ends, while another client of the same server goes on. A fault hits one call of the victim's
// connection, or of the device below it. Whatever the fault is, every reply that the victim gets must be right, and what
// was acknowledged must be there.

const (
	faultSlot  = 128 << 10
	faultSlots = 16
	faultDisk  = 1<<20 + faultSlots*faultSlot // the first MiB is only read
	otherSlot  = 15                           // the other client's
)

// slot is where the request i of a script changes the device, if it does.
func slot(i int) uint64 { return 1<<20 + uint64(i)*faultSlot }

// faultRequest is one request, and the error that it gets without a fault.
type faultRequest struct {
	request
	data  string
	errno uint32
}

// faultScript returns the requests of a victim; the cookie is the index. Those from last on are sent when all others
// have been answered.
func faultScript(structured bool) (script []faultRequest, last int) {
	add := func(flags, typ uint16, off uint64, length uint32, errno uint32) {
		r := faultRequest{request: request{flags: flags, typ: typ, cookie: uint64(len(script)), off: off, length: uint64(length)}, errno: errno}
		if typ == cmdWrite {
			r.data = pattern(int(length), byte(len(script)+1))
		}
		script = append(script, r)
	}
	status := uint32(errnoInval)
	if structured {
		status = 0
	}
	add(0, cmdWrite, slot(0), 512, 0)
	add(0, cmdWrite, slot(1), 64<<10, 0)
	add(0, cmdRead, 8192, 4096, 0)
	add(0, cmdRead, 256<<10, 128<<10, 0)
	add(0, cmdFlush, 0, 0, 0)
	add(cmdFlagFUA, cmdWrite, slot(5), 4096, 0)
	add(0, cmdTrim, slot(6), faultSlot, 0)
	add(cmdFlagNoHole, cmdWriteZeroes, slot(7), faultSlot, 0)
	add(0, cmdCache, 512<<10, 64<<10, 0)
	add(0, cmdBlockStatus, 600<<10, 64<<10, status)
	add(cmdFlagFUA, cmdWrite, slot(10), 100_000, 0)
	add(0, cmdRead, 16<<10, 16<<10, 0)
	add(0, 200, 0, 0, errnoInval)
	add(0, cmdWrite, faultDisk, 4096, errnoNoSpace)
	add(cmdFlagFUA, cmdTrim, slot(14), faultSlot, 0)
	last = len(script)
	add(0, cmdFlush, 0, 0, 0)
	add(0, cmdRead, 700<<10, 512, 0)
	return script, last
}

// faultDevice is the device of both clients. What the victim's flushes have covered is durable.
type faultDevice struct {
	*ramDevice
	pattern string // of the first MiB

	mu      sync.Mutex // guards what follows
	flushed int        // flushes begun
	covered int        // the flush that durable is of
	durable []byte     // the slots
	spare   []byte     // for the next flush, or nil
}

func newFaultDevice() *faultDevice {
	d := &faultDevice{ramDevice: newRAM(faultDisk), pattern: pattern(1<<20, 77), durable: make([]byte, faultSlots*faultSlot)}
	copy(d.data, d.pattern)
	for b := range d.present {
		d.present[b] = true
	}
	for b := 256 << 10 / ramBlock; b < 384<<10/ramBlock; b += 3 { // holes
		clear(d.data[b*ramBlock:][:ramBlock])
		d.present[b] = false
	}
	d.pattern = string(d.data[:1<<20])
	return d
}

// before is what the victim's slots hold at the beginning of a run.
const before = 0xee

var untouched = bytes.Repeat([]byte{before}, faultSlots*faultSlot)

func (d *faultDevice) reset() {
	copy(d.data[slot(0):slot(otherSlot)], untouched)
	d.mu.Lock()
	defer d.mu.Unlock()
	copy(d.durable, untouched)
}

// Flush makes durable what was written before it.
func (d *faultDevice) Flush() error {
	d.mu.Lock()
	d.flushed++
	nth, now := d.flushed, d.spare
	d.spare = nil
	d.mu.Unlock()
	if now == nil {
		now = make([]byte, faultSlots*faultSlot)
	}
	d.stripes(int64(slot(0)), faultSlots*faultSlot, func(l *sync.RWMutex, from, to int64) {
		l.RLock()
		defer l.RUnlock()
		copy(now[uint64(from)-slot(0):], d.data[from:to])
	})
	time.Sleep(100 * time.Microsecond) // others join meanwhile, which must not count
	d.mu.Lock()
	defer d.mu.Unlock()
	if nth > d.covered {
		d.covered, d.durable, now = nth, now, d.durable
	}
	d.spare = now
	return nil
}

// isDurable reports whether the change of a request is durable.
func (d *faultDevice) isDurable(r faultRequest) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return bytes.Equal(d.durable[r.off-slot(0):][:r.length], r.after())
}

// after is what the range of a request that changes the device holds then.
func (r faultRequest) after() []byte {
	if r.typ == cmdWrite {
		return []byte(r.data)
	}
	return make([]byte, r.length)
}

func (r faultRequest) changes() bool {
	return r.typ == cmdWrite || r.typ == cmdTrim || r.typ == cmdWriteZeroes
}

// flushes reports whether the reply to r waits for a flush.
func (r faultRequest) flushes() bool {
	return r.typ == cmdFlush || r.changes() && r.flags&cmdFlagFUA != 0
}

// otherHandle is the other client's handle on the device; its flushes make nothing durable that the victim could have
// taken for its own.
type otherHandle struct{ *ramDevice }

// handshake is a way of a victim to begin.
type handshake struct {
	name       string
	options    []string // sent before open, one at a time
	structured bool
	old        bool // EXPORT_NAME
	abort      bool // the last option is ABORT
}

func optBytes(id uint32, data ...string) string {
	all := strings.Join(data, "")
	return u64(magicOption) + u32(id) + u32(uint32(len(all))) + all
}

var handshakes = []handshake{
	{name: "all options", structured: true, options: []string{
		optBytes(optList), optBytes(optStructuredReply), optBytes(99, "unknown"), optBytes(optInfo, str("nothing"), u16(0)),
		optBytes(optListMeta, str("disk"), u32(0)), optBytes(optSetMeta, str("disk"), u32(1), str(contextAllocation)),
		optBytes(optInfo, str("disk"), u16(2), u16(infoName), u16(infoDescription)), optBytes(optGo, str("nothing"), u16(0)),
	}},
	{name: "old", old: true},
	{name: "simple"},
	{name: "abort", abort: true, options: []string{optBytes(optList)}},
}

// victim is the client that meets the fault. Its methods return false once the connection has ended.
type victim struct {
	net.Conn
	disk     *faultDevice
	how      handshake
	script   []faultRequest
	last     int
	got      map[uint64]uint32 // errors by cookie
	parts    map[uint64]int    // bytes of a READ that has not ended
	problems []string
	slow     bool // takes little at a time
}

func (v *victim) wrong(format string, args ...any) bool {
	v.problems = append(v.problems, fmt.Sprintf(format, args...))
	return false
}

// get returns the next n bytes.
func (v *victim) get(n int) ([]byte, bool) {
	b := make([]byte, n)
	for at := 0; at < n; {
		to := n
		if v.slow {
			to = min(n, at+3000)
		}
		k, err := v.Read(b[at:to])
		at += k
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return nil, v.wrong("the server neither answers nor hangs up")
		}
		if err != nil && at < n {
			return nil, false
		}
	}
	return b, true
}

func (v *victim) put(s string) bool {
	_, err := io.WriteString(v, s)
	return err == nil
}

// run is the victim's life. It reports whether the script came to its end.
func (v *victim) run() bool {
	v.got, v.parts = map[uint64]uint32{}, map[uint64]int{}
	v.script, v.last = faultScript(v.how.structured)
	defer v.Close()
	if _, ok := v.get(18); !ok || !v.put(u32(3)) {
		return false
	}
	for _, o := range v.how.options {
		if !v.put(o) || !v.optionReplies() {
			return false
		}
	}
	switch {
	case v.how.abort:
		return v.put(optBytes(optAbort)) && v.optionReplies()
	case v.how.old:
		if !v.put(optBytes(optExportName, "disk")) {
			return false
		}
		if b, ok := v.get(10); !ok || be.Uint64(b) != faultDisk {
			return false
		}
	case !v.put(optBytes(optGo, str("disk"), u16(0))) || !v.optionReplies():
		return false
	}
	return v.requests(v.script[:v.last]) && v.requests(v.script[v.last:]) &&
		v.put(reqBytes(0, cmdDisc, 0, 0, 0))
}

// optionReplies reads the replies to an option up to the last.
func (v *victim) optionReplies() bool {
	for {
		h, ok := v.get(optReplyLen)
		if !ok {
			return false
		}
		if be.Uint64(h) != magicOptReply {
			return v.wrong("no reply to an option: %x", h)
		}
		if _, ok := v.get(int(be.Uint32(h[16:]))); !ok {
			return false
		}
		if typ := be.Uint32(h[12:]); typ == repAck || typ>>31 == 1 {
			return true
		}
	}
}

// requests sends requests together, and reads the replies.
func (v *victim) requests(rs []faultRequest) bool {
	var b strings.Builder
	for _, r := range rs {
		b.WriteString(reqBytes(r.flags, r.typ, r.cookie, r.off, uint32(r.length)) + r.data)
	}
	sent := make(chan bool, 1)
	go func() { sent <- v.put(b.String()) }()
	for want := len(v.got) + len(rs); len(v.got) < want; {
		if !v.reply() {
			v.Close()
			<-sent
			return false
		}
	}
	return <-sent
}

// reply reads one reply or chunk, and checks it.
func (v *victim) reply() bool {
	h, ok := v.get(simpleLen)
	if !ok {
		return false
	}
	cookie := be.Uint64(h[8:])
	if cookie >= uint64(len(v.script)) {
		return v.wrong("a reply to request %d, which was not sent", cookie)
	}
	if _, again := v.got[cookie]; again {
		return v.wrong("request %d was answered twice", cookie)
	}
	r := v.script[cookie]
	switch {
	case be.Uint32(h) == magicSimple:
		errno := be.Uint32(h[4:])
		if r.typ == cmdRead && errno == 0 {
			if b, ok := v.get(int(r.length)); !ok || !v.right(r, r.off, b) {
				return false
			}
		}
		return v.answered(r, errno)
	case be.Uint32(h) == magicChunk && v.how.structured:
		return v.chunk(r, be.Uint16(h[4:]), be.Uint16(h[6:]))
	}
	return v.wrong("no reply: %x", h)
}

// chunk reads the rest of a chunk.
func (v *victim) chunk(r faultRequest, flags, typ uint16) bool {
	n, ok := v.get(4)
	if !ok {
		return false
	}
	b, ok := v.get(int(be.Uint32(n)))
	if !ok {
		return false
	}
	switch typ {
	case chunkOffsetData:
		v.parts[r.cookie] += len(b) - 8
		ok = v.right(r, be.Uint64(b), b[8:])
	case chunkOffsetHole:
		n := be.Uint32(b[8:])
		v.parts[r.cookie] += int(n)
		ok = v.right(r, be.Uint64(b), make([]byte, n))
	case chunkError, chunkErrorOffset:
		return v.answered(r, be.Uint32(b))
	}
	switch {
	case !ok || flags&chunkFlagDone == 0:
		return ok
	case r.typ == cmdRead && v.parts[r.cookie] != int(r.length):
		return v.wrong("request %d brought %d bytes of %d", r.cookie, v.parts[r.cookie], r.length)
	}
	return v.answered(r, 0)
}

// right checks what was read.
func (v *victim) right(r faultRequest, off uint64, b []byte) bool {
	if off < r.off || off+uint64(len(b)) > r.off+r.length || v.disk.pattern[off:][:len(b)] != string(b) {
		return v.wrong("request %d read wrong content at %d", r.cookie, off)
	}
	return true
}

// answered notes a reply, and checks that a flush that it promises has happened.
func (v *victim) answered(r faultRequest, errno uint32) bool {
	v.got[r.cookie] = errno
	if errno != 0 || !r.flushes() {
		return true
	}
	must := []faultRequest{r}
	if r.typ == cmdFlush {
		must = v.script[:v.last]
		if int(r.cookie) < v.last { // nothing was acknowledged when it was sent
			must = nil
		}
	}
	for _, m := range must {
		if errno, ok := v.got[m.cookie]; ok && errno == 0 && m.changes() && !v.disk.isDurable(m) {
			return v.wrong("request %d is not durable after the reply to %d", m.cookie, r.cookie)
		}
	}
	return true
}

// check compares the device with the replies: what was acknowledged is there, and nothing is there in part.
func (v *victim) check(t *testing.T) {
	t.Helper()
	for _, r := range v.script {
		if !r.changes() || r.errno != 0 {
			continue
		}
		now := v.disk.data[r.off:][:r.length]
		errno, answered := v.got[r.cookie]
		done, not := bytes.Equal(now, r.after()), bytes.Equal(now, untouched[:r.length])
		if answered && errno == 0 && !done || !done && !not {
			t.Errorf("request %d (answered: %v, error %d): done %v, untouched %v", r.cookie, answered, errno, done, not)
		}
	}
	for _, p := range v.problems {
		t.Error(p)
	}
}

// connPair makes two connected sockets.
func connPair(t *testing.T) (client, server *net.UnixConn) {
	t.Helper()
	fds, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	var conns [2]*net.UnixConn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "pair")
		c, err := net.FileConn(f)
		if err := errors.Join(err, f.Close()); err != nil {
			t.Fatal(err)
		}
		conns[i] = c.(*net.UnixConn)
	}
	_ = conns[0].SetDeadline(time.Now().Add(testwatch.Long)) // a hang shows
	return conns[0], conns[1]
}

// faultServer is a server with the device, and the other client.
type faultServer struct {
	*Server
	disk      *faultDevice
	other     *client
	otherConn *conn

	goroutines, files int // without the victim
}

// newFaultServer starts a server, and connects the other client, which the test has to disconnect. victims returns the
// handle of a victim's export.
func newFaultServer(t *testing.T, disk *faultDevice, victims func() Device, opts Options) *faultServer {
	t.Helper()
	exports := handles{disk: disk, victims: victims}
	s := &faultServer{Server: New(exports, opts), disk: disk}
	nc, sc := connPair(t)
	s.other = &client{tb: t, Conn: nc, served: make(chan error, 1)}
	go func() { s.other.served <- s.ServeConn(context.Background(), sc) }()
	s.other.open("other", false)
	s.goesOn(t, 0)
	s.otherConn = theConn(s.Server)
	s.goroutines, s.files = s.goroutinesLeft(), openFiles(t)
	return s
}

// handles are the exports: one device, with a handle for the victim and one for the other client.
type handles struct {
	disk    *faultDevice
	victims func() Device
}

func (h handles) List() ([]string, error) { return []string{"disk", "other"}, nil }

func (h handles) Describe(name string) (Info, error) {
	if name == "nothing" {
		return Info{}, os.ErrNotExist
	}
	return Info{Name: name, Size: faultDisk, Description: "a disk"}, nil
}

func (h handles) Open(name string) (*Export, error) {
	var dev Device
	switch name {
	case "nothing":
		return nil, os.ErrNotExist
	case "other":
		dev = otherHandle{h.disk.ramDevice}
	default:
		dev = h.victims()
	}
	h.disk.opens.Add(1)
	return &Export{Device: dev, Name: name, Close: func() error { h.disk.closes.Add(1); return nil }}, nil
}

// goesOn checks that the other client is served.
func (s *faultServer) goesOn(t *testing.T, round int) {
	t.Helper()
	_ = s.other.SetDeadline(time.Now().Add(testwatch.Long))
	p := pattern(2000, byte(round))
	s.other.want(0, cmdFlagFUA, cmdWrite, slot(otherSlot), 2000, p)
	if r := s.other.want(0, 0, cmdRead, slot(otherSlot), 2000); r.data != p {
		t.Error("the other client read wrong content")
	}
	if r := s.other.want(0, 0, cmdRead, 500<<10, 100_000); r.data != s.disk.pattern[500<<10:][:100_000] {
		t.Error("the other client read wrong content")
	}
}

func openFiles(t *testing.T) int {
	t.Helper()
	names, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(names)
}

// goroutinesLeft counts goroutines, without the other client's workers: it may have got one more.
func (s *faultServer) goroutinesLeft() int {
	text := "\n" + testwatch.Stacks()
	return strings.Count(text, "\ngoroutine ") - strings.Count(text, fmt.Sprintf(".workRoutine(%p", s.otherConn))
}

// nothingLeft checks that the victim's connection has left nothing.
func (s *faultServer) nothingLeft(t *testing.T, c *conn) {
	t.Helper()
	if o, c := s.disk.opens.Load(), s.disk.closes.Load(); o != c+1 { // the other's is open
		t.Errorf("%d opens, %d closes of exports", o, c)
	}
	charged := func() (used int64, waiting int) {
		s.memory.mu.Lock()
		defer s.memory.mu.Unlock()
		return s.memory.used, len(s.memory.waiting)
	}
	for end := time.Now().Add(testwatch.Long); ; time.Sleep(100 * time.Microsecond) { // a reply arrives before its charge is released
		used, waiting := charged()
		if used == 0 && waiting == 0 {
			break
		}
		if time.Now().After(end) {
			t.Errorf("%d bytes stay charged, and %d connections wait", used, waiting)
			break
		}
	}
	s.mu.Lock()
	if len(s.conns) != 1 {
		t.Errorf("%d connections are left", len(s.conns)-1)
	}
	s.mu.Unlock()
	if c != nil && (c.in.buf != nil || c.batch != nil || len(c.out.queue) != 0 || len(c.flush.waiting) != 0) {
		t.Error("the connection keeps buffers or replies")
	}
	for end := time.Now().Add(testwatch.Long); s.goroutinesLeft() > s.goroutines; time.Sleep(100 * time.Microsecond) {
		if time.Now().After(end) {
			t.Fatalf("%d goroutines, %d before\n%s", s.goroutinesLeft(), s.goroutines, testwatch.Stacks())
		}
	}
	if n := openFiles(t); n > s.files {
		t.Errorf("%d open files, %d before", n, s.files)
	}
}
