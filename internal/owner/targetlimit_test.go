package owner

import (
	"bytes"
	"errors"
	"testing"

	"github.com/vdisk/vdisk/cow"
	"github.com/vdisk/vdisk/internal/testwatch"
	"github.com/vdisk/vdisk/ublk"
)

// TestLimitedDisk makes requests of a block device wait for their turn: flushes and reads do not wait for writes, and
// what waits begins when the limit is taken away, and when the device is ending.
func TestLimitedDisk(t *testing.T) {
	o := offer(t, newStore(t))
	dev, err := o.store.OpenDevice(cow.Ref{Volume: "v"}, false)
	if err != nil {
		t.Fatal(err)
	}
	defer dev.Close()
	set := func(key, value string) {
		t.Helper()
		if err := o.SetProperties(t.Context(), "v", map[string]string{key: value}); err != nil {
			t.Fatal(err)
		}
	}
	disk := &target{dev: dev, jobs: make(chan *ublk.Request, 8), waiting: newWaitingRoom(8)} // the test is the worker
	disk.holders.Go(func() { disk.holdRoutine(disk.waiting.reads) })
	disk.holders.Go(func() { disk.holdRoutine(disk.waiting.writes) })
	ask := func(op ublk.Op, length int) *ublk.Request {
		t.Helper()
		r := &ublk.Request{Op: op, Length: length}
		if op == ublk.OpRead || op == ublk.OpWrite {
			r.Buf = bytes.Repeat([]byte{byte(length>>12) + 1}, length)
		}
		if err := disk.ServeUBLK(r); !errors.Is(err, ublk.ErrAsync) {
			t.Fatalf("%v of %d bytes: %v, want that it is answered later", op, length, err)
		}
		return r
	}
	begins := func(r *ublk.Request) {
		t.Helper()
		if got := testwatch.Wait(t, testwatch.Long, "the next request to begin", disk.jobs); got != r {
			t.Fatalf("%v of %d bytes begins", got.Op, got.Length)
		}
		if err := disk.work(r); err != nil {
			t.Fatal(err)
		}
	}
	set("limit.bps-write", "4K")
	first := ask(ublk.OpWrite, 1<<20) // it waits for four minutes
	second := ask(ublk.OpWrite, 4096)
	begins(ask(ublk.OpFlush, 0))
	if err := disk.ServeUBLK(&ublk.Request{Op: ublk.OpRead, Buf: make([]byte, 4096), Length: 4096, Offset: 2 << 20}); err != nil {
		t.Errorf("a read beside writes that wait: %v", err)
	}
	third := ask(ublk.OpWrite, 8192)
	set("limit.bps-write", "")
	begins(first)
	begins(second)
	begins(third)

	set("limit.bps", "4K")
	read := ask(ublk.OpRead, 1<<20)
	stay := disk.waiting.hurry()
	begins(read)
	if read.Buf[0] != 3 { // what two pages are filled with
		t.Errorf("it reads %d", read.Buf[0])
	}
	stay()
	again := ask(ublk.OpRead, 1<<20)
	if len(disk.jobs) > 0 {
		t.Error("requests do not wait any more after an end that was given up")
	}
	disk.waiting.hurry()
	begins(again)
	close(disk.waiting.reads)
	close(disk.waiting.writes)
	disk.holders.Wait()
}

// TestLimitIsChecked sets limits that are none.
func TestLimitIsChecked(t *testing.T) {
	o := offer(t, newStore(t))
	for key, value := range map[string]string{"limit.iops": "many", "limit.bps": "1", "limit.iop": "5"} {
		if err := o.SetProperties(t.Context(), "v", map[string]string{key: value}); !errors.Is(err, cow.ErrInvalid) {
			t.Errorf("%s=%s: %v", key, value, err)
		}
	}
	if err := o.SetProperties(t.Context(), "v", map[string]string{"limit.iop": ""}); err != nil {
		t.Errorf("a property that could not be set cannot be removed: %v", err)
	}
}
