package nbd

import "time"

const (
	// quick is the mean time of a device call up to which the receiver makes the call itself. Handing a request to a
	// worker and its reply to the sender costs 5 to 10 µs of CPU. Above quick, executing several requests at once is
	// faster.
	quick = 30 * time.Microsecond

	// paceWeight gives one call a weight of 1/16 in the mean.
	paceWeight = 16

	// paceCeiling limits the weight of one call. A receiver that the kernel descheduled for milliseconds says nothing
	// about the device; three such calls in a row do.
	paceCeiling = 8 * quick

	minProbe, maxProbe = 16, 1024
)

// pace decides for one kind of request whether the receiver executes it itself. It measures only the receiver's calls,
// since workers' calls include the time that they wait for each other. While the device is slow, the receiver still
// executes some requests, to see whether the device has become quick again; the longer it stays slow, the rarer these
// probes. Only the receiver uses it.
type pace struct {
	mean  time.Duration
	probe int // requests between two probes while the device is slow
	left  int // requests until the next probe
}

// inline reports whether the receiver executes the next request itself.
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
