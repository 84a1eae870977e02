// Package owner is what stands between the commands and the engine: one process owns a store, and the commands of all
// others reach it.
//
//	command ── Open ──> Owner ──> cow.Store          nobody owns the store: the command does, while it runs
//	command ── Open ──> Client ── control.sock ──> Owner ──> cow.Store
//	                                                ├── ublk devices   (attach, detach)
//	                                                └── NBD services   (serve)
//
// [Owner] and [Client] are both a [Store], so a command is written once.
//
// Who owns a store is decided by the engine's flock alone. The socket only says that its owner listens: one that was
// left behind by a killed process refuses connections, and the next owner replaces it. A command that finds the lock
// taken and nobody listening (an owner that is starting, or ending, or does not offer its store) tries again until
// Options.LockTimeout.
//
// # The control socket
//
// HTTP/1.1 over a unix socket: POST /v1/OPERATION with a JSON body; the answer is 200 and JSON, or another status and
// an [Error]. Three operations carry more: import's body and export's answer are framed streams of package sparse,
// check's answer is JSON lines, and serve takes over the connection to pass the listening socket (SCM_RIGHTS), so that
// the socket's path, its rights and its life are those of the command that asked.
//
// A client keeps one connection open from Open to Close; an owner that ends of its own accord (a daemon whose last
// device is gone, a command that has done its work) waits for those first. So an operation is never refused because
// the owner chose that moment to go.
package owner
