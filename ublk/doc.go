// Package ublk serves Linux block devices from user space, through the kernel's ublk driver (ublk_drv) and io_uring. It
// is pure Go, and needs only golang.org/x/sys/unix.
//
// A server implements [Handler] and calls [Create]. Then /dev/ublkbN is a disk like any other:
//
//	d, err := ublk.Create(ctx, ublk.Options{Size: 1 << 30, Discard: true}, handler)
//	...
//	err = d.Stop(ctx) // refuses while the disk is in use; Close does not ask
//
// [NewReaderWriterAt] makes a handler of any type that reads and writes at offsets.
//
// # Requests
//
// A device has one or more queues. Each queue is a loop on a thread of its own, with a ring of its own. It takes
// requests from the driver, calls the handler, and commits the answers. A handler answers in one of four ways:
//
//   - It returns nil or an error: the request is done.
//   - It returns [ErrAsync], and calls [Request.Complete] from any goroutine.
//   - It calls [Request.Fetch] and returns [ErrFetch]. The queue's ring then reads files without blocking the thread.
//     Afterwards it calls the handler's [Fetcher] method, if there is one, or else answers the request.
//   - It panics: the request fails with EIO, and the device goes on.
//
// Requests live in slots, by queue and tag, with their buffers outside the Go heap. A request costs no allocation, and
// a turn of the loop costs one system call, however many requests it carries. (With CopyUser, each payload costs one
// more.) A handler that only copies memory should answer at once. A hand-over to a goroutine costs more than a 4 KiB
// request does, and pays only for work that is worth a processor.
//
// A queue's thread that a request wakes needs one of the GOMAXPROCS slots that run Go code. If the server's goroutines
// occupy all of them, the thread waits until one of these is preempted, for up to 10 ms. A server that computes beside
// its queues should set GOMAXPROCS higher than the number of processors, and leave the scheduling to the kernel.
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
// Both ends, dead and quiesced, close [Device.Done]; [Device.Err] then returns the reason. Dead: nothing is left,
// neither in this process nor in the kernel. Quiesced: nothing is left in this process, but the disk stays, and its
// users wait until a server recovers it.
//
// A queue may become unable to go on: the ring or the driver fails, or the handler ends its thread. That ends the
// device from any state. The device becomes quiesced if it was made with [Options].Recovery and its disk is there, and
// otherwise dead, with all open requests failed. A STOP from another process makes it dead, too.
//
// Every wait takes a context. A stop that has not finished when its context ends goes on, and can be waited for again.
// Stop, Close, Quiesce and Resize may be called at the same time, from any goroutine.
//
// # When the server dies
//
// A device without recovery dies with its server: the driver fails what is open, and removes the disk. It may leave a
// dead device, which [Devices] lists and [Delete] removes.
//
// With [RecoverReissue] the disk stays, and its users see a pause. The driver keeps requests until a process, the same
// or another, calls [Recover]. Then it issues again what the last server had not answered, so a write may be applied
// twice. [Device.Quiesce] is the planned form, for a server that is to be replaced. What a server has answered must
// survive its death: the disk was not reset, so its users do not write the data again. The driver keeps Options.Cookie
// with the device, so that a server can recognise its own.
//
// A recovery whose process dies can be repeated. Before Linux 6.15 there is one exception: a process that was killed in
// the instant between the fetches of its first and its last queue (ErrNotRecoverable).
//
// A server must not be killed while one of its own threads waits for its disk: a process ends only when its last thread
// does, and the driver lets go of it only then. So do not read or write the disk in the process that serves it. Before
// Linux 6.19 the kernel reads the partition table inside START, which Create waits for. If a server with recovery is
// killed in that instant, it leaves a device that nothing can remove.
//
// # Memory
//
// A server must never wait for memory that is freed only by writing to its own disk, or it waits for ever. Therefore
// the queue threads are marked as I/O flushers, and the I/O buffers are locked ([Device.IOFlusher],
// [Device.MemoryLocked]). [SetIOFlusher] marks the other threads.
//
// The server must not depend on its own disk in any other way either: it keeps no files on it ([BackingDevices]) and no
// swap, and has no mount of it in its own mount namespace. The exit of the process would unmount that, and wait for
// itself.
//
// # Requirements
//
// The package needs Linux 6.1 or later with CONFIG_BLK_DEV_UBLK, CAP_SYS_ADMIN, and an io_uring that is not switched
// off. It is tested on 6.12 and 7.3. The behaviour of other drivers is known from their source.
//
// [Features] asks the kernel what it offers, [Device.Features] returns what a device was granted, and Create fails
// without the features in Options.Require. Errors name what is missing and what to do: [ErrNoDriver], [ErrPermission],
// [ErrKernelTooOld], [ErrNoFreeDevice]; a [FeatureError] names the feature and the kernel that brought it. For the
// buffers to be locked, the process should have CAP_IPC_LOCK or a sufficient RLIMIT_MEMLOCK, and for the threads to be
// marked, CAP_SYS_RESOURCE.
//
// With Options.Unprivileged, CAP_SYS_ADMIN is not needed (Linux 6.3). The system must then give such a user
// /dev/ublk-control, and the nodes of a new device to its owner. For the latter it needs a udev rule for ublkcN and
// ublkbN, which runs a program that looks up the owner (DeviceInfo.OwnerUID) and changes the owner of the nodes. Create
// waits for that. Such a device is limited: the driver reads no partition table, kills a server that leaves a request
// unanswered for 30 seconds, and refuses recovery and CopyUser. The number of such devices is limited by ublks_max.
//
// # Stability
//
// The package stands alone, and is meant to be used by other programs. It promises stability as Semantic Versioning
// defines it: from version 1.0 of the module on, exported identifiers keep their meaning within a major version, and
// exported errors keep matching with errors.Is. Before 1.0, a minor version may change them, and CHANGELOG.md says how.
// The texts of errors may change at any time, and the list of known features grows with the kernel.
package ublk
