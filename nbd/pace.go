package nbd

import "time"

const (
	// quick is the mean time of a device call up to which the receiver does it itself. Handing a
	// request to a worker and its reply to the sender costs some 5 to 10 us of CPU; above that,
	// doing several at once wins.
	quick = 30 * time.Microsecond

	// paceWeight: a call counts for 1/16 of the mean.
	paceWeight = 16

	// paceCeiling bounds what one call can count for: a receiver that the kernel descheduled for
	// milliseconds says nothing of the device, three such calls in a row do.
	paceCeiling = 8 * quick

	minProbe, maxProbe = 16, 1024
)

// pace decides for one kind of request whether the receiver does it itself. It watches only the
// calls that the receiver makes, since those of workers also take the time that they wait for each
// other. While the device is slow, one request in some is still done by the receiver to see whether
// it has become quick again; the longer it has not, the rarer. Used by the receiver alone.
type pace struct {
	mean  time.Duration
	probe int // requests between two probes while slow
	left  int // requests until the next probe
}

// inline reports whether the next request is the receiver's to do.
func (p *pace) inline() bool {
	if p.mean <= quick {
		return true
	}
	if p.left > 0 {
		p.left--
		return false
	}
	return true
}

// observe records how long a call took that inline had allowed.
func (p *pace) observe(d time.Duration) {
	wasSlow := p.mean > quick
	p.mean += (min(d, paceCeiling) - p.mean) / paceWeight
	if p.mean <= quick {
		p.probe = 0
		return
	}
	switch {
	case !wasSlow:
		p.probe = minProbe
	case d > quick:
		p.probe = min(2*p.probe, maxProbe)
	default:
		p.probe = minProbe
	}
	p.left = p.probe
}
