// Package ublk serves Linux block devices from user space, through the kernel's ublk driver (ublk_drv) and io_uring.
// It is pure Go on golang.org/x/sys/unix.
//
// A server implements [Handler] and calls [Create]; from then on /dev/ublkbN is a disk like any other:
//
//	d, err := ublk.Create(ctx, ublk.Options{Size: 1 << 30, Discard: true}, handler)
//	...
//	err = d.Stop(ctx) // refuses while somebody uses the disk; Close does not ask
//
// # Requests
//
// A device has one or more queues. Each is a loop on a thread of its own, with a ring of its own: the driver hands it
// requests, it calls the handler, and commits the answers. A handler answers in one of four ways:
//
//   - return nil or an error: done;
//   - return [ErrLater], and call [Request.Complete] from any goroutine;
//   - call [Request.Fetch] and return [ErrFetch]: the queue's ring reads files without blocking the thread, and then
//     calls [Fetcher], if the handler is one, or answers;
//   - panic: the request fails with EIO, and the device goes on.
//
// Requests live in slots by queue and tag, their buffers outside the Go heap; a request costs no allocation and a turn
// of the loop one system call, however many requests it carries. A handler that copies memory should answer at once. A
// hand-over to a goroutine costs more than a 4 KiB request does, and pays for work that is worth a core.
//
// The server must not depend on its own disk: no files on it, no mount of it in the server's own mount namespace (the
// process's exit would unmount it, and wait for itself), no swap.
//
// # Life of a device
//
//	       Create                  disk appears
//	ADD, SET_PARAMS, open,  ┌──────────┐  START   ┌──────┐
//	map, FETCH every tag ──▶│ starting │─────────▶│ live │◀─────────────────────┐
//	                        └────┬─────┘          └──┬───┘                      │
//	              any failure:   │     Stop, Close,  │                          │ Stop finds
//	              undone in the  │     or STOP from  ▼                          │ it in use
//	              order of a     │     elsewhere  ┌──────────┐                  │ (ErrBusy)
//	              stop           └───────────────▶│ stopping │──────────────────┘
//	                                              └──┬───────┘
//	STOP: the kernel writes back through the handler │ and removes the disk; every tag comes back with ABORT;
//	the loops end and close their rings; mappings    │ and the char device are released; DEL
//	                                                 ▼
//	                                              ┌──────┐
//	                                              │ dead │  Done is closed, Err says why
//	                                              └──────┘
//
// A queue that cannot go on (the ring or the driver fails) takes the device from any state to dead without STOP: the
// closing of the rings and of the char device has the driver fail the open requests. Every wait takes a context; a
// stop that is not finished when its context ends goes on, and can be waited for again.
//
// A process that dies takes its devices along: the driver fails what is open and removes the disks. What may be left
// is a dead device without a server, which [Devices] lists and [Delete] removes.
//
// # Requirements
//
// Linux 6.5 or later with CONFIG_BLK_DEV_UBLK, CAP_SYS_ADMIN, and an io_uring that is not switched off. [Features]
// asks the kernel. Errors say what is missing and what to do: [ErrNoDriver], [ErrPermission], [ErrKernelTooOld],
// [ErrNoFreeDevice]. RLIMIT_MEMLOCK or CAP_IPC_LOCK should allow the buffers to be locked ([Device.MemoryLocked]).
package ublk
