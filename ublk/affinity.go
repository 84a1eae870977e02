package ublk

import (
	"context"

	"golang.org/x/sys/unix"
)

// queueCPUs returns the CPUs whose requests go to a queue, or nil if its thread may run on all CPUs.
func (d *Device) queueCPUs(ctx context.Context, queue int) *unix.CPUSet {
	if d.opts.NoAffinity {
		return nil
	}
	set, err := d.control.affinity(ctx, d.target, queue)
	if err != nil || set.Count() == 0 {
		return nil // there are more CPUs than the set has room for, or the queue's CPUs are not present
	}
	return set
}

// pinThread keeps the calling thread on the CPUs of its queue. This only makes it faster. If the process is restricted
// to other CPUs, the thread stays on those.
func pinThread(cpus *unix.CPUSet) {
	if cpus != nil {
		_ = unix.SchedSetaffinity(0, cpus)
	}
}
