// Package registers tests that blocks of 4 KiB behave as registers: some order of all operations explains what each
// client has read. Snapshots are operations too, whose result is the content of all registers at one moment. So is
// the state that a crash leaves. Package porcupine looks for the order. For tests only.
package registers

import (
	"encoding/binary"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/anishathalye/porcupine"
)

// Size is that of a register.
const Size = 4096

// At are the registers: blocks of two volumes, in different leaves and units, and at different places in a unit.
var At = [...]struct {
	Volume string
	Block  int64
}{{"a", 0}, {"a", 1}, {"a", 300}, {"b", 15}, {"b", 257}}

// Offset returns where a register is in its volume.
func Offset(register int) int64 { return At[register].Block * Size }

// Values are the contents of all registers. 0 stands for zeros.
type Values [len(At)]uint64

// notAValue stands for content that no write has made: parts of several values, or the value of another register.
const notAValue = math.MaxUint64

// Fill makes the content of a register with a value. Every other value can be compressed, the rest cannot.
func Fill(p []byte, register int, value uint64) {
	clear(p)
	if value == 0 {
		return
	}
	noise := rand.NewPCG(value, uint64(register))
	for i := 0; i < len(p); i += 16 {
		binary.LittleEndian.PutUint64(p[i:], value)
		if value%2 == 0 {
			binary.LittleEndian.PutUint64(p[i+8:], uint64(register))
		} else {
			binary.LittleEndian.PutUint64(p[i+8:], noise.Uint64())
		}
	}
}

// Value returns the value that a register holds.
func Value(p []byte, register int) uint64 {
	value := binary.LittleEndian.Uint64(p)
	var want [Size]byte
	Fill(want[:], register, value)
	if string(p) != string(want[:]) {
		return notAValue
	}
	return value
}

type kind int

const (
	read kind = iota
	write
	all // all registers at one moment
)

// input is an operation.
type input struct {
	kind     kind
	register int
	value    uint64
	durable  bool // a write that had to be durable when it was answered, and was answered before the crash
	synced   int  // of the state that a crash left: the writes with durable that it must hold
	again    bool // a write that may have been made once more, or not
}

func (in input) String() string {
	switch {
	case in.kind == read:
		return fmt.Sprintf("read %d", in.register)
	case in.kind == all && in.synced > 0:
		return fmt.Sprintf("all, with %d durable writes", in.synced)
	case in.kind == all:
		return "all"
	case in.durable:
		return fmt.Sprintf("%d := %d, durable", in.register, in.value)
	case in.again:
		return fmt.Sprintf("%d := %d, maybe again", in.register, in.value)
	}
	return fmt.Sprintf("%d := %d", in.register, in.value)
}

// state is what the model knows after some operations.
type state struct {
	values  Values
	durable int // writes so far that had to be durable
}

func step(st, in, out any) (bool, any) {
	s, i := st.(state), in.(input)
	switch i.kind {
	case read:
		return out.(Values)[i.register] == s.values[i.register], s
	case all:
		return out.(Values) == s.values && s.durable >= i.synced, s
	}
	s.values[i.register] = i.value
	if i.durable {
		s.durable++
	}
	return true, s
}

// steps is step for histories in which some writes may have been made once more.
func steps(st, in, out any) (next []any) {
	if in.(input).again {
		next = []any{st}
	}
	if ok, s := step(st, in, out); ok {
		next = append(next, s)
	}
	return next
}

// operation is an operation of a history, with the times between which it took effect.
type operation struct {
	client    int
	in        input
	out       Values
	call, ret int64
	fua       bool // a write that is durable when it has returned
}

// History is what clients did, and what they saw. It should be short, since finding an order may take exponential time.
type History struct {
	from  Values
	start time.Time

	mu    sync.Mutex // guards the fields below
	ops   []operation
	syncs []syncing
	kills []span
}

// span is the time between two moments.
type span struct{ from, to int64 }

// syncing is a flush. When it has returned, everything is durable that was answered before its call.
type syncing struct{ call, ret int64 }

// New begins a history in which the registers hold from.
func New(from Values) *History { return &History{from: from, start: time.Now()} }

// Now is the time in the history.
func (h *History) Now() int64 { return int64(time.Since(h.start)) }

func (h *History) add(op operation) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.ops = append(h.ops, op)
}

func (h *History) addSync(call, ret int64) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.syncs = append(h.syncs, syncing{call, ret})
}

// Len returns the number of operations.
func (h *History) Len() int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return len(h.ops)
}

// All notes what all registers held at one moment since call.
func (h *History) All(call int64, got Values) {
	h.add(operation{in: input{kind: all}, out: got, call: call, ret: h.Now()})
}

// PowerCut notes what a power cut left that happened between two moments. That must be the state at one moment no later.
// Every write was made before this moment that was answered when a flush or a snapshot was asked for that itself was
// answered before the cut, and every write that was answered before the cut and had to be durable. The clients may go on
// with the store as if nothing had happened; what they see then belongs to the same history.
func (h *History) PowerCut(before, after int64, got Values) {
	h.mu.Lock()
	defer h.mu.Unlock()
	cut := operation{in: input{kind: all}, out: got, ret: after}
	for _, s := range h.syncs {
		if s.ret < before {
			cut.call = max(cut.call, s.call)
		}
	}
	for i := range h.ops {
		if op := &h.ops[i]; op.fua && op.ret < before {
			op.in.durable = true
			cut.in.synced++
		}
	}
	h.ops = append(h.ops, cut)
}

// Killed notes that the server was killed between two moments, and that the kernel gives the next one what it had not
// answered. A write that was under way may then be made twice, the second time before its answer. No reader can tell, but
// for one that has seen it, and then another client's write of the same register.
func (h *History) Killed(from, to int64) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.kills = append(h.kills, span{from, to})
}

// again returns the writes that may have been made once more, with the times between which that was.
func (h *History) again() (ops []operation) {
	for _, k := range h.kills {
		for _, op := range h.ops {
			if op.in.kind != write || op.call > k.to || op.ret < k.from {
				continue
			}
			op.call, op.in.again, op.in.durable, op.client = max(op.call, k.from), true, false, op.client+100
			ops = append(ops, op)
		}
	}
	return ops
}

// Check returns an error if no order explains the history.
func (h *History) Check() error {
	h.mu.Lock()
	defer h.mu.Unlock()
	model := porcupine.Model{
		Init: func() any { return state{values: h.from} }, Step: step,
		DescribeOperation: func(in, out any) string { return fmt.Sprintf("%v: %v", in, out) },
	}
	again := h.again()
	if len(again) > 0 {
		model = (&porcupine.NondeterministicModel{
			Init: func() []any { return []any{state{values: h.from}} }, Step: steps, DescribeOperation: model.DescribeOperation,
		}).ToModel()
	}
	var ops []porcupine.Operation
	for _, op := range slices.Concat(h.ops, again) {
		ops = append(ops, porcupine.Operation{ClientId: op.client, Input: op.in, Call: op.call, Output: op.out, Return: op.ret})
	}
	if porcupine.CheckOperations(model, ops) {
		return nil
	}
	result, info := porcupine.CheckOperationsVerbose(model, ops, time.Minute) // which takes longer, for the drawing
	err := fmt.Errorf("from %v, no order of %d operations explains what they saw (%v)", h.from, len(ops), result)
	if f, ferr := os.CreateTemp("", "registers-*.html"); ferr == nil {
		err = fmt.Errorf("%w; drawn in %s", err, f.Name())
		_ = porcupine.Visualize(model, info, f) // the error is told without the picture, too
		_ = f.Close()
	}
	for _, op := range slices.Concat(h.ops, again) {
		err = fmt.Errorf("%w\n%12d %12d  client %d: %v -> %x", err, op.call, op.ret, op.client, op.in, op.out)
	}
	return err
}

// values counts the values that were written in this process, so that each is written once.
var values atomic.Uint64
