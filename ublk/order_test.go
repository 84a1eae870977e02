package ublk_test

import (
	"sync"
	"testing"

	"github.com/vdisk/vdisk/ublk"
)

// orderDisk notes where a queue's writes begin that come after one with a higher offset.
type orderDisk struct {
	mu    sync.Mutex
	last  map[int]int64 // by queue
	wrong int
	seen  int
}

func (d *orderDisk) ServeUBLK(r *ublk.Request) error {
	if r.Op != ublk.OpWrite {
		clear(r.Buf)
		return nil
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.seen += r.Length / 4096
	if last, ok := d.last[r.Queue]; ok && r.Offset <= last {
		d.wrong++
	}
	d.last[r.Queue] = r.Offset
	return nil
}

// TestOrder: sequential direct writes reach the handler in their order, in each queue.
func TestOrder(t *testing.T) {
	needDriver(t)
	for _, mode := range someModes(t) {
		for _, queues := range []int{1, 2} {
			if queues == 1 && mode.mode != ublk.CopyPlain {
				continue // two queues have two such orders
			}
			t.Run(mode.name+[]string{"", " one queue", " two queues"}[queues], func(t *testing.T) {
				disk := &orderDisk{last: map[int]int64{}}
				d := create(t, ublk.Options{Size: 64 << 20, Queues: queues, Depth: 16, Copy: mode.mode}, disk)
				setScheduler(t, d, "none")
				const size = "3m"
				args := []string{"--rw=write", "--iodepth=16", "--size=" + size}
				if err := startFIO(t, d.Path(), args...).wait(t, stepLimit); err != nil {
					t.Fatal(err)
				}
				closeDevice(t, d)
				if disk.wrong > 0 || disk.seen < 3<<20/4096 {
					t.Errorf("%d of %d writes came before one with a lower offset", disk.wrong, disk.seen)
				}
			})
		}
	}
}
