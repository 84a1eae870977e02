// Package ublk serves Linux block devices from user space, through the kernel's ublk driver (ublk_drv) and io_uring.
// It is pure Go on golang.org/x/sys/unix.
//
// A server implements [Handler] and calls [Create]; from then on /dev/ublkbN is a disk like any other:
//
//	d, err := ublk.Create(ctx, ublk.Options{Size: 1 << 30, Discard: true}, handler)
//	...
//	err = d.Stop(ctx) // refuses while somebody uses the disk; Close does not ask
//
// [NewReaderWriterAt] makes a handler of anything that reads and writes at offsets.
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
// A queue's thread that requests wake needs one of the GOMAXPROCS that run Go code. Where goroutines of the server have
// them all, it waits until one of these is preempted, after up to 10 ms. A server that computes beside its queues does
// well to set GOMAXPROCS higher than the number of processors, and leave it to the kernel who runs.
//
// # Life of a device
//
//	      Create                               Recover
//	         │ ADD, SET_PARAMS,                   │ START_USER_RECOVERY,
//	         │ fetch every tag, map               │ fetch every tag, map
//	         ▼                                    ▼
//	   ┌──────────┐    START   ┌──────┐   END   ┌────────────┐ it fails
//	   │ starting │───────────▶│ live │◀────────│ recovering │──────────┐
//	   └────┬─────┘            └┬─▲──▲┘         └────────────┘          │
//	undone  │    Stop and Close │ │  └──────────┐                       │
//	        ▼                   │ │ in use      │ not in time           │
//	   ┌──────────┐◀────────────┤ │(ErrBusy)    │                       │
//	   │ stopping │─────────────┼─┘         ┌───┴───────┐               │
//	   └────┬─────┘             └──────────▶│ quiescing │               │
//	        │ drained, DEL         Quiesce  └───┬───────┘               │
//	        ▼                                   ▼                       │
//	    ┌──────┐                          ┌──────────┐                  │
//	    │ dead │                          │ quiesced │◀─────────────────┘
//	    └──────┘                          └──────────┘
//
// Both ends close [Device.Done], and [Device.Err] says why. Dead: nothing is left, here or in the kernel. Quiesced:
// nothing is left here, but the disk stays, and its users wait until a server recovers it. A queue that cannot go on
// (the ring or the driver fails, the handler ends its thread) takes the device to its end from any state: quiesced if
// it was made with [Options].Recovery, else dead, the open requests failing. So does a STOP from another process:
// dead.
//
// Every wait takes a context. A stop that is not finished when its context ends goes on, and can be waited for again.
// Stop, Close, Quiesce and Resize may be called at once, from any goroutine.
//
// # When the server dies
//
// A device without recovery dies with its server: the driver fails what is open and removes the disk. What may be
// left is a dead device, which [Devices] lists and [Delete] removes.
//
// With [RecoverReissue] the disk stays. The driver keeps requests until another process, or the same one, calls
// [Recover], and then issues again what the last server had not answered; a write may so be applied twice. The users
// of the disk see a pause. [Device.Quiesce] is the planned form of it, for a server that wants to be replaced. What a
// server answered must not die with it: the disk was not reset, so nobody writes it again. Options.Cookie is kept by
// the driver, to know one's own device by. A recovery that dies in the middle can be repeated; before Linux 6.15 not
// if it was killed in the instant between the fetches of its first and its last queue (ErrNotRecoverable).
//
// A server must not be killed while its own thread waits for its disk, since a process ends only when its last thread
// does, and the driver lets go of it only then. So do not read or write the disk in the serving process. Before Linux
// 6.19 the kernel reads the partition table inside START, which Create waits for: a server with recovery that is
// killed in that instant leaves a device that nothing removes.
//
// # Memory
//
// A server that has to wait for memory that is to be written back to its own disk waits for ever. The queue threads
// are marked as I/O flushers and the I/O buffers are locked ([Device.IOFlusher], [Device.MemoryLocked]);
// [SetIOFlusher] marks the other threads. The server must not depend on its own disk: no files on it ([RestsOn]), no
// mount of it in the server's own mount namespace (the process's exit would unmount it, and wait for itself), no
// swap.
//
// # Requirements
//
// Linux 6.1 or later with CONFIG_BLK_DEV_UBLK, CAP_SYS_ADMIN, and an io_uring that is not switched off. It is tested
// on 6.12 and 7.3; what older drivers answer is known from their source. [Features] asks the kernel,
// [Device.Features] says what a device was granted, Options.Require has Create fail without. Errors say what is
// missing and what to do: [ErrNoDriver], [ErrPermission], [ErrKernelTooOld], [ErrNoFreeDevice], and [FeatureError]
// names the feature and the kernel that brought it. RLIMIT_MEMLOCK or CAP_IPC_LOCK should allow the buffers to be
// locked, and CAP_SYS_RESOURCE the threads to be marked.
//
// Options.Unprivileged does without CAP_SYS_ADMIN (6.3). The system has to give such a user /dev/ublk-control, and
// the nodes of a new device to its owner: a udev rule for ublkcN and ublkbN that runs a program which looks up the
// owner (DeviceInfo.OwnerUID) and changes the nodes' owner; Create waits for it. The driver then reads no partition
// table, kills a server that leaves a request unanswered for 30 seconds, and refuses recovery and CopyUser. ublks_max
// limits the number of such devices.
package ublk
