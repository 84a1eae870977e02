// Package nbd serves block devices over the NBD protocol: fixed newstyle negotiation, simple and structured replies,
// extended headers, TLS, and the metadata context base:allocation. It does not know how a [Device] stores its content.
//
// A program implements [Device] and [Exports], and gives its listeners to [Server.Serve]:
//
//	s := nbd.New(exports, nbd.Options{})
//	err := s.Serve(ctx, listener) // until s.Shutdown, or until ctx ends
//
// A Device may also implement [Extenter], so that clients learn of its holes, and [TryReader], so that reads that need
// no disk are answered sooner. With [ContextOpener] it has metadata contexts of its own. Exports may also
// implement [ClientExports], to tell clients apart.
//
// [Server.Clients] lists connections, and [Server.Disconnect] ends one. [Server.Pause] and [Server.Adopt] hand connections
// to another server, perhaps that of another process.
//
// The protocol is https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md, "the specification" in the
// comments here. All numbers on the wire are big-endian.
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
// The negotiation comes first (handshake.go). Then these parts serve the connection:
//
//   - The receiver (conn.go, input.go) is a goroutine, and the only one that reads the socket. It executes a request
//     itself if the request is small, and the device has recently answered that kind of request faster than a hand-over
//     costs (pace.go). The data then goes straight from or into the socket buffers. If the device is a TryReader, the
//     receiver tries to read first: a read that has to wait for a disk goes to a worker, and has begun by then. The
//     reply waits until no further request has been received, or the batch is full. So if a client keeps many requests
//     in flight, one read and one write carry many of them; if it does not, nothing waits.
//     With TLS (tls.go), the same system calls are below crypto/tls.
//   - Workers (work.go, read.go) execute all other requests. They are started as they are needed.
//   - The flusher (work.go) joins all flushes that arrive while one is under way into the next one. So flushes never
//     occupy a worker, or hold up anything else.
//   - The sender (send.go) is not a goroutine. A goroutine that has a reply while no other one is writing writes it,
//     and goes on as long as others add replies.
//
// # What is bounded
//
// Options.MaxInFlight bounds the memory for the requests of one connection, and Options.MaxMemory that of all
// connections (budget.go): at the limit, the receiver stops reading until requests are answered. The size of the
// buffers counts, and not the number of bytes in them. A connection that waits for requests holds no buffers.
//
// Nothing waits for itself. Closing a connection waits until the system call that reads it has returned, so the
// receiver does nothing else while it holds the socket (input.go). A client may take no replies for as long as it
// likes, unless other clients need the memory that it holds. Shutdown returns when its context ends, whatever clients
// and devices do.
//
// A panic of a Device fails the request (guard.go).
//
// # Stability
//
// The package stands alone, and is meant to be used by other programs. It promises stability as Semantic Versioning
// defines it: from version 1.0 of the module on, exported identifiers keep their meaning within a major version, and
// exported errors keep matching with errors.Is. Before 1.0, a minor version may change them, and CHANGELOG.md says how.
// The texts of errors and of log messages may change at any time.
package nbd
