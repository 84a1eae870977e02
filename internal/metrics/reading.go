// Package metrics shows what a store does: as metrics for Prometheus, in its text format, and over HTTP. docs/metrics.md
// describes each of them. The engine and the servers know nothing of it. Package owner takes the readings.
package metrics

import (
	"time"

	"github.com/vdisk/vdisk/cow"
	"github.com/vdisk/vdisk/ublk"
)

// Reading is all counters of a store and of its owner at one moment. They are read one after another.
type Reading struct {
	Version  string    // of the owner's program
	Store    string    // the folder
	Started  time.Time // when the owner opened it
	At       time.Time // when this was read
	Info     cow.StoreInfo
	Counters cow.Counters

	Services, Clients int // NBD services and their connections
	Served, Waiting   int // block devices
	Traffic           []Traffic
}

// Traffic is what the clients and the block devices of a volume or snapshot have asked for.
type Traffic struct {
	Ref    cow.Ref
	Ops    [len(Operations)]Operation // in the order of Operations
	Errors [len(Kinds)]uint64         // in the order of Kinds
}

// Operation is the counters of one operation.
type Operation struct {
	Requests uint64 // answered
	Bytes    uint64 `json:",omitempty"` // of those that succeeded
	Errors   uint64 `json:",omitempty"`
	Time     time.Duration
	// Latency has the buckets of a ublk.Histogram that are not empty, in order: the index and the count of each.
	Latency [][2]uint64 `json:",omitempty"`
}

// Operations are what is counted.
var Operations = [...]ublk.Op{ublk.OpRead, ublk.OpWrite, ublk.OpFlush, ublk.OpDiscard, ublk.OpWriteZeroes}

// OperationOf returns the counters of an operation in short.
func OperationOf(s *ublk.OpStats) Operation {
	o := Operation{Requests: s.Requests, Bytes: s.Bytes, Errors: s.Errors, Time: s.Latency.Sum}
	for i, n := range s.Latency.Counts {
		if n > 0 {
			o.Latency = append(o.Latency, [2]uint64{uint64(i), n})
		}
	}
	return o
}

// Stats is the reverse of OperationOf.
func (o *Operation) Stats() *ublk.OpStats {
	s := &ublk.OpStats{Requests: o.Requests, Bytes: o.Bytes, Errors: o.Errors}
	s.Latency.Sum = o.Time
	for _, b := range o.Latency {
		if i := b[0]; i < uint64(len(s.Latency.Counts)) { // the owner may be another version
			s.Latency.Counts[i] = b[1]
		}
	}
	return s
}
