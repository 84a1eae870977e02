package ublk_test

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"
	"unsafe"

	"github.com/anishathalye/porcupine"
	"golang.org/x/sys/unix"

	"github.com/vdisk/vdisk/ublk"
)

// A block of 4 KiB is a register: a read returns the last value written. Several threads read, write and discard a few
// blocks at once, and porcupine reports whether what they saw can be explained by some order of their operations.

// registerInput is one operation on one register; every write has a value of its own, and a discard writes 0.
type registerInput struct {
	block int
	write bool
	value uint64
}

// notAValue is the result of reading a block that holds parts of several values, or a value of another block.
const notAValue = ^uint64(0)

var registerModel = porcupine.Model{
	Partition: func(history []porcupine.Operation) [][]porcupine.Operation {
		byBlock := map[int][]porcupine.Operation{}
		for _, op := range history {
			block := op.Input.(registerInput).block
			byBlock[block] = append(byBlock[block], op)
		}
		var parts [][]porcupine.Operation
		for _, part := range byBlock {
			parts = append(parts, part)
		}
		return parts
	},
	Init: func() any { return uint64(0) },
	Step: func(state, input, output any) (bool, any) {
		in := input.(registerInput)
		if in.write {
			return true, in.value
		}
		return output == state, state
	},
	DescribeOperation: func(input, output any) string {
		in := input.(registerInput)
		if in.write {
			return fmt.Sprintf("block %d := %d", in.block, in.value)
		}
		return fmt.Sprintf("block %d = %d", in.block, output)
	},
}

// registers are the registers that clients use: on a device, or in memory.
type registers interface {
	read(buf []byte, block int) error
	write(buf []byte, block int) error
	discard(block int) error
}

// deviceRegisters are the first blocks of a block device.
type deviceRegisters struct{ fd int }

func (d deviceRegisters) read(buf []byte, block int) error {
	return whole(unix.Pread(d.fd, buf, int64(block)*4096))
}

func (d deviceRegisters) write(buf []byte, block int) error {
	return whole(unix.Pwrite(d.fd, buf, int64(block)*4096))
}

func whole(n int, err error) error {
	if err == nil && n != 4096 {
		err = fmt.Errorf("%d bytes", n)
	}
	return err
}

const blkDiscard = 0x1277 // BLKDISCARD of linux/fs.h: _IO(0x12, 119)

func (d deviceRegisters) discard(block int) error {
	span := [2]uint64{uint64(block) * 4096, 4096}
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(d.fd), blkDiscard, uintptr(unsafe.Pointer(&span))); errno != 0 {
		return errno
	}
	return nil
}

// workload lets clients use a few registers, and returns their operations with the results.
func workload(t testing.TB, r registers, clients, blocks, operations int) []porcupine.Operation {
	t.Helper()
	var next atomic.Uint64
	begin := time.Now()
	histories := make([][]porcupine.Operation, clients)
	var wg sync.WaitGroup
	for client := range clients {
		wg.Go(func() {
			buf := aligned(4096)
			for range operations {
				op := porcupine.Operation{ClientId: client, Output: uint64(0)}
				in := registerInput{block: rand.IntN(blocks)}
				kind := rand.IntN(10)
				if kind < 5 {
					in.write = true
				}
				if kind > 0 && in.write {
					in.value = next.Add(1)
					fill(buf, in.block, in.value)
				}
				op.Call = int64(time.Since(begin))
				err := operate(r, in, buf)
				op.Return = int64(time.Since(begin))
				if err != nil {
					t.Errorf("%+v: %v", in, err)
					return
				}
				if !in.write {
					v, ok := value(buf, in.block)
					if !ok {
						v = notAValue
					}
					op.Output = v
				}
				op.Input = in
				histories[client] = append(histories[client], op)
			}
		})
	}
	wg.Wait()
	var all []porcupine.Operation
	for _, h := range histories {
		all = append(all, h...)
	}
	return all
}

func operate(r registers, in registerInput, buf []byte) error {
	switch {
	case !in.write:
		return r.read(buf, in.block)
	case in.value == 0:
		return r.discard(in.block)
	}
	return r.write(buf, in.block)
}

// linearizable asks porcupine, which answers Unknown if its time is up.
func linearizable(history []porcupine.Operation) (porcupine.CheckResult, porcupine.LinearizationInfo) {
	return porcupine.CheckOperationsVerbose(registerModel, history, stepLimit)
}

// lateDisk applies requests at a time of its own choosing and answers them out of order.
type lateDisk struct{ *shmDisk }

func (d lateDisk) ServeUBLK(r *ublk.Request) error {
	before, after := time.Duration(rand.IntN(1000)), time.Duration(rand.IntN(1000))
	go func() {
		time.Sleep(before * time.Microsecond)
		err := d.shmDisk.ServeUBLK(r)
		time.Sleep(after * time.Microsecond)
		r.Complete(err)
	}()
	return ublk.ErrAsync
}

const registerBlocks = 4

// TestRegisters: the device is linearizable, in each way of copying, with answers at once, later and out of order.
func TestRegisters(t *testing.T) {
	needDriver(t)
	for _, mode := range someModes(t) {
		for _, late := range []bool{false, true} {
			t.Run(mode.name+map[bool]string{true: " late"}[late], func(t *testing.T) {
				disk, err := openShmDisk(memoryFile(t), 1<<20)
				if err != nil {
					t.Fatal(err)
				}
				var h ublk.Handler = disk
				if late {
					h = lateDisk{disk}
				}
				d := create(t, ublk.Options{Size: 1 << 20, Queues: 2, Copy: mode.mode, Discard: true}, h)
				history := workload(t, deviceRegisters{openDirect(t, d, unix.O_RDWR)}, 6, registerBlocks, 150*rounds(1))
				if len(history) < 900 {
					t.Fatalf("%d operations", len(history))
				}
				if result, info := linearizable(history); result != porcupine.Ok {
					file := filepath.Join(os.TempDir(), "registers.html")
					_ = porcupine.VisualizePath(registerModel, info, file)
					t.Errorf("%d operations are not linearizable: %v (drawn in %s)", len(history), result, file)
				}
			})
		}
	}
}

// fault is a way in which a disk can be wrong.
type fault int

const (
	faultNone  fault = iota
	faultLost        // a write is answered and not made
	faultTorn        // a write is half made
	faultAlias       // a write goes to another block
	faultStale       // a read returns what was there before the last write
)

// faulty is a disk of registers in memory that makes one mistake. It is a handler as well, so that the mistake can be
// made below a device.
type faulty struct {
	mu     sync.Mutex
	data   [registerBlocks][4096]byte
	before [registerBlocks][4096]byte
	fault  fault
	at     int // the write or read that goes wrong, counted down
}

// arm makes the disk make the mistake f at the n-th occasion.
func (d *faulty) arm(f fault, n int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.fault, d.at = f, n
}

// now reports whether the disk must make the mistake f now.
func (d *faulty) now(f fault) bool {
	if d.fault != f {
		return false
	}
	d.at--
	return d.at == 0
}

func (d *faulty) write(buf []byte, block int) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.before[block] = d.data[block]
	switch {
	case d.now(faultLost):
	case d.now(faultTorn):
		copy(d.data[block][:512], buf)
	case d.now(faultAlias):
		copy(d.data[(block+1)%registerBlocks][:], buf)
	default:
		copy(d.data[block][:], buf)
	}
	return nil
}

func (d *faulty) read(buf []byte, block int) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.before[block] != d.data[block] && d.now(faultStale) {
		copy(buf, d.before[block][:])
		return nil
	}
	copy(buf, d.data[block][:])
	return nil
}

func (d *faulty) discard(block int) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	clear(d.data[block][:])
	d.before[block] = d.data[block]
	return nil
}

func (d *faulty) ServeUBLK(r *ublk.Request) error {
	block := int(r.Offset / 4096)
	if block >= registerBlocks || r.Length > 4096 { // the partition scan
		clear(r.Buf)
		return nil
	}
	switch r.Op {
	case ublk.OpWrite:
		return d.write(r.Buf, block)
	case ublk.OpRead:
		return d.read(r.Buf, block)
	case ublk.OpDiscard, ublk.OpWriteZeroes:
		return d.discard(block)
	}
	return nil
}

// mistake lets a disk make its mistake after the workload: in one of a last round of concurrent writes, one to each
// register, or in one of the reads that follow. So nothing overwrites the mistake before it is read.
func mistake(t testing.TB, r registers, disk *faulty, f fault, history []porcupine.Operation) []porcupine.Operation {
	t.Helper()
	disk.arm(f, 1+rand.IntN(registerBlocks))
	begin := time.Now()
	var last int64
	for _, op := range history {
		last = max(last, op.Return)
	}
	last++
	now := func() int64 { return last + int64(time.Since(begin)) }
	more := make([][2]porcupine.Operation, registerBlocks)
	var wg sync.WaitGroup
	for block := range registerBlocks {
		wg.Go(func() {
			buf := aligned(4096)
			in := registerInput{block: block, write: true, value: 1 << 40}
			fill(buf, block, in.value)
			call := now()
			if err := r.write(buf, block); err != nil {
				t.Error(err)
			}
			more[block][0] = porcupine.Operation{ClientId: block, Input: in, Output: uint64(0), Call: call, Return: now()}
		})
	}
	wg.Wait()
	buf := aligned(4096)
	for block := range registerBlocks {
		call := now()
		if err := r.read(buf, block); err != nil {
			t.Error(err)
		}
		v, ok := value(buf, block)
		if !ok {
			v = notAValue
		}
		more[block][1] = porcupine.Operation{Input: registerInput{block: block}, Output: v, Call: call, Return: now()}
	}
	for _, ops := range more {
		history = append(history, ops[:]...)
	}
	return history
}

var faults = map[string]fault{"none": faultNone, "lost": faultLost, "torn": faultTorn, "aliased": faultAlias, "stale": faultStale}

// TestRegistersCatch: the checker sees a single lost, torn or aliased write, or a stale read, in memory.
func TestRegistersCatch(t *testing.T) {
	for name, f := range faults {
		t.Run(name, func(t *testing.T) {
			for range 20 {
				disk := &faulty{}
				history := workload(t, disk, 4, registerBlocks, 60)
				judge(t, f, mistake(t, disk, disk, f, history))
			}
		})
	}
}

func judge(t *testing.T, f fault, history []porcupine.Operation) {
	t.Helper()
	want := porcupine.Illegal
	if f == faultNone {
		want = porcupine.Ok
	}
	if result, _ := linearizable(history); result != want {
		t.Errorf("the checker says %v, want %v", result, want)
	}
}

// TestRegistersCatchOnDevice is TestRegistersCatch with the mistake below a device.
func TestRegistersCatchOnDevice(t *testing.T) {
	needDriver(t)
	for name, f := range faults {
		t.Run(name, func(t *testing.T) {
			disk := &faulty{}
			// The kernel may read the partition table at any time, and udev reads a new disk. The mistake must be made in a
			// read of the test.
			d := create(t, ublk.Options{Size: registerBlocks * 4096, Queues: 2, Discard: true, NoPartitionScan: true}, disk)
			run(t, "udevadm", "settle", "--timeout=60")
			r := deviceRegisters{openDirect(t, d, unix.O_RDWR)}
			history := workload(t, r, 4, registerBlocks, 60)
			judge(t, f, mistake(t, r, disk, f, history))
		})
	}
}
