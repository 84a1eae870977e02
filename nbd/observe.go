package nbd

import "time"

// Op is a kind of request that an Observer counts.
type Op uint8

// The kinds. Those without a kind, CACHE and BLOCK_STATUS, neither move data to the client nor change any.
const (
	OpRead Op = iota
	OpWrite
	OpFlush
	OpTrim
	OpWriteZeroes
)

// Observer is implemented by a Device that counts requests.
type Observer interface {
	// Observe is called once for each request that the device had, when the request has its answer: with its length,
	// and the time since it arrived. A request arrives with its payload. With FUA it ends with its flush. err is nil if
	// it succeeded. A request that is refused, because the export has no such range or is read-only, never gets to the
	// device, and is not observed.
	Observe(op Op, length int64, took time.Duration, err error)
}

// observed are the commands that have a kind.
var observed = [...]struct {
	op Op
	is bool
}{
	cmdRead: {OpRead, true}, cmdWrite: {OpWrite, true}, cmdFlush: {OpFlush, true}, cmdTrim: {OpTrim, true}, cmdWriteZeroes: {OpWriteZeroes, true},
	cmdBlockStatus: {},
}

// observe tells the device's Observer, if there is one, of the end of a request.
func (c *conn) observe(req request, took time.Duration, err error) {
	if o := observed[req.typ]; c.obs != nil && o.is {
		c.obs.Observe(o.op, int64(req.length), took, err)
	}
}

// finished is observe for a request that was handed over.
func (c *conn) finished(req request, err error) {
	if c.obs != nil {
		c.observe(req, time.Since(req.arrived), err)
	}
}
