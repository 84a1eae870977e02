// Package nbd serves block devices over the NBD protocol: fixed newstyle negotiation, simple and
// structured replies, and the base:allocation metadata context. It knows nothing of what stands
// behind a [Device].
//
// The protocol is https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md, "the
// specification" in the comments here. All numbers on the wire are big-endian.
//
// # How a connection is served
//
//	         socket
//	           | large reads, many requests each
//	     +-----v------+   small READ, WRITE, while the device is quick: done here
//	     |  receiver  |-------------------------------------------+
//	     +-----+------+                                           |
//	FLUSH, FUA |     | everything else                            |
//	     +-----v-+ +-v------------------+                         |
//	     |flusher| |workers, 1..Workers |                         |
//	     +-----+-+ +-+------------------+                         |
//	           |     |                                            |
//	     +-----v-----v------+     replies of one received batch   |
//	     |      sender      |<------------------------------------+
//	     +-----+------------+
//	           | one writev for all that is ready
//	         socket
//
// The receiver (conn.go) is the only one that reads the socket. A request that is small, and of a
// kind that the device has lately answered faster than a hand-over costs (pace.go), is done by the
// receiver itself, straight from or into the socket buffers; its reply waits until no further
// request has been received, or the batch is full. A device that is a TryReader is asked first, and a
// read that has to wait for a disk goes to a worker, begun by then. So one read and one write carry many requests
// when a client keeps many in flight, and nothing waits when it does not. Other requests go to
// workers, which are started as they are needed (work.go). The flusher joins the flushes that arrive
// while one is under way into the next, so flushes never hold a worker, nor anything else. The
// sender (send.go) is no goroutine: whoever has a reply while nobody writes, writes, and goes on
// while others add replies.
//
// # What is bounded
//
// What a connection can make the server hold is bounded by Options.MaxInFlight, and what all of them
// can by Options.MaxMemory (budget.go): the receiver stops reading when that much is received and not
// yet answered. The memory of the buffers counts, and not the bytes in them. A connection that waits
// for requests holds no buffers.
//
// Nothing waits for itself: whoever closes a connection waits until the system call that reads it has
// returned, so the receiver does nothing else meanwhile (input.go). A client that takes no replies may
// stay so for as long as it likes, unless others need the memory that it holds. Shutdown returns when
// its context ends, whatever clients and devices do.
//
// A panic of a Device fails the request (guard.go).
package nbd
