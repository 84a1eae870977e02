package registers

import (
	"io"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
)

// memory holds two volumes that are linearizable unless it is told to make a mistake.
type memory struct {
	mu      sync.Mutex
	data    [len(At)][Size]byte
	durable [len(At)][Size]byte
	fault   string
}

// part is a volume of a memory.
type part struct {
	m      *memory
	volume string
}

func (p part) register(off int64) int {
	for i, at := range At {
		if at.Volume == p.volume && Offset(i) == off {
			return i
		}
	}
	panic("no register is there")
}

func (p part) ReadAt(b []byte, off int64) (int, error) {
	p.m.mu.Lock()
	defer p.m.mu.Unlock()
	return copy(b, p.m.data[p.register(off)][:]), nil
}

func (p part) WriteAt(b []byte, off int64) (int, error) {
	p.m.mu.Lock()
	defer p.m.mu.Unlock()
	r := p.register(off)
	switch p.m.fault {
	case "lost":
	case "torn":
		copy(p.m.data[r][:512], b)
	case "aliased":
		copy(p.m.data[(r+1)%len(At)][:], b)
	default:
		copy(p.m.data[r][:], b)
	}
	return len(b), nil
}

func (p part) WriteDurable(b []byte, off int64) error {
	if _, err := p.WriteAt(b, off); err != nil || p.m.fault == "FUA ignored" {
		return err
	}
	return p.Sync()
}

func (p part) Zero(off, length int64) error {
	_, err := p.WriteAt(make([]byte, length), off)
	return err
}

func (p part) Sync() error {
	p.m.mu.Lock()
	defer p.m.mu.Unlock()
	if p.m.fault != "flush ignored" {
		p.m.durable = p.m.data
	}
	return nil
}

func (m *memory) disks() map[string]Disk {
	return map[string]Disk{"a": part{m, "a"}, "b": part{m, "b"}}
}

func (m *memory) all() Values {
	v, _ := ReadAll(map[string]io.ReaderAt{"a": part{m, "a"}, "b": part{m, "b"}})
	return v
}

func (m *memory) client(id int) *Client {
	return &Client{ID: id, Disks: m.disks(), Seldom: 10, Snapshot: func(taken func()) (Values, error) {
		m.mu.Lock()
		defer m.mu.Unlock()
		taken()
		copied := &memory{data: m.data}
		return copied.all(), nil
	}}
}

// concurrent lets clients use the memory.
func (m *memory) concurrent(t *testing.T, h *History) {
	var wg sync.WaitGroup
	for id := range 4 {
		wg.Go(func() {
			if err := m.client(id).Run(h, rand.New(rand.NewPCG(rand.Uint64(), 0)), 25); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
}

// TestCheck: a memory without a fault passes, through concurrent use and power cuts, and each fault is found.
func TestCheck(t *testing.T) {
	t.Setenv("TMPDIR", t.TempDir()) // for the drawings
	for _, fault := range []string{
		"", "lost", "torn", "aliased", "stale read", "old snapshot", "snapshot at two moments",
		"flush ignored", "FUA ignored", "an older write is lost", "a write comes back", "a torn crash",
	} {
		for range 3 {
			m := &memory{}
			h := New(m.all())
			m.concurrent(t, h)
			m.make(fault, h)
			if err := h.Check(); (err == nil) != (fault == "") {
				t.Fatalf("%q: %v", fault, err)
			} else if err != nil && !strings.Contains(err.Error(), "(Illegal)") {
				t.Fatalf("%q: %v", fault, err)
			}
		}
	}
}

// make makes one mistake, and lets a client see it.
func (m *memory) make(fault string, h *History) {
	c, buf := m.client(9), make([]byte, Size)
	writeTo := func(register int) {
		op := operation{in: input{kind: write, register: register, value: values.Add(1)}, call: h.Now()}
		Fill(buf, register, op.in.value)
		_, _ = c.Disks[At[register].Volume].WriteAt(buf, Offset(register))
		op.ret = h.Now()
		h.add(op)
	}
	crash := func() {
		now := h.Now()
		h.PowerCut(now, now, (&memory{data: m.durable}).all())
	}
	writeTo(0)
	m.fault = fault
	switch fault {
	case "lost", "torn", "aliased":
		writeTo(1)
		_ = c.read(h, 1, buf)
	case "stale read":
		old := m.data
		writeTo(1)
		m.data = old
		_ = c.read(h, 1, buf)
	case "old snapshot":
		old := m.all()
		writeTo(1)
		h.All(h.Now(), old)
	case "snapshot at two moments":
		call, old := h.Now(), m.all()
		writeTo(0)
		writeTo(4)
		old[4] = m.all()[4]
		h.All(call, old)
	case "flush ignored":
		_ = c.sync(h, "a")
		crash()
	case "FUA ignored":
		op := operation{in: input{kind: write, register: 2, value: values.Add(1)}, fua: true, call: h.Now()}
		Fill(buf, 2, op.in.value)
		_ = c.Disks["a"].WriteDurable(buf, Offset(2))
		op.ret = h.Now()
		h.add(op)
		crash()
	case "an older write is lost":
		old := m.data
		writeTo(1)
		writeTo(2)
		m.durable = m.data
		m.durable[1] = old[1]
		crash()
	case "a write comes back":
		_ = c.sync(h, "a")
		old := m.data
		writeTo(1)
		_ = c.sync(h, "a")
		m.durable[1] = old[1]
		crash()
	case "a torn crash":
		writeTo(1)
		m.durable = m.data
		clear(m.durable[1][512:1024])
		crash()
	default:
		m.durable = m.data
		writeTo(1)
		crash()
	}
}

// TestKilled reads a write, another client's write over it, and then the first one again. This is right if the first was
// under way when the server was killed, and only until it is answered.
func TestKilled(t *testing.T) {
	for _, x := range []struct {
		name           string
		killed, last   int64 // when the server was killed, and when the register was read last
		linearizable   bool
		answered       int64 // the first write
		withoutTheKill bool
	}{
		{name: "again", killed: 50, last: 80, answered: 90, linearizable: true},
		{name: "again, and read later", killed: 50, last: 120, answered: 90, linearizable: true},
		{name: "no kill", killed: 50, last: 80, answered: 90, withoutTheKill: true},
		{name: "answered before", killed: 50, last: 80, answered: 40},
		{name: "killed before the other write", killed: 20, last: 80, answered: 90, linearizable: true},
		{name: "killed before it began", killed: 2, last: 80, answered: 90},
	} {
		h := New(Values{})
		one, two := input{kind: write, value: 1}, input{kind: write, value: 2}
		h.add(operation{client: 0, in: one, call: 10, ret: x.answered})
		h.add(operation{client: 1, in: input{kind: read}, out: Values{1}, call: 25, ret: 30})
		h.add(operation{client: 1, in: two, call: 45, ret: 60})
		h.add(operation{client: 1, in: input{kind: read}, out: Values{2}, call: 61, ret: 62})
		h.add(operation{client: 1, in: input{kind: read}, out: Values{1}, call: x.last, ret: x.last + 1})
		if !x.withoutTheKill {
			h.Killed(x.killed, x.killed+5)
		}
		if err := h.Check(); (err == nil) != x.linearizable {
			t.Errorf("%s: %v", x.name, err)
		}
	}
}
