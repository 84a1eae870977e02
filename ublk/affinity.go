package ublk

import (
	"context"

	"golang.org/x/sys/unix"
)

// queueCPUs asks which CPUs' requests come to a queue; nil leaves its thread on all.
func (d *Device) queueCPUs(ctx context.Context, queue int) *unix.CPUSet {
	if d.opts.NoAffinity {
		return nil
	}
	set, err := d.control.affinity(ctx, d.target, queue)
	if err != nil || set.Count() == 0 {
		return nil // more CPUs than the set has room for, or possible CPUs that are not there
	}
	return set
}

// pinThread keeps the calling thread on the CPUs of its queue. It is a matter of speed: where the process's own CPUs do
// not allow it, the thread stays on those.
func pinThread(cpus *unix.CPUSet) {
	if cpus != nil {
		_ = unix.SchedSetaffinity(0, cpus)
	}
}
