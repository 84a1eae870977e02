// Package owner stands between the commands and the engine. One process owns a store; the commands of all other
// processes reach it through that owner.
//
//	command ── Open ──> Owner ──> cow.Store          the store has no owner: the command owns it while it runs
//	command ── Open ──> Client ── control.sock ──> Owner ──> cow.Store
//	                                                ├── ublk devices   (attach, detach)
//	                                                └── NBD services   (serve)
//
// [Owner] and [Client] both implement [Store], so each command is written once.
//
// The engine's flock alone decides who owns a store. The socket only shows that the owner listens: a socket left by a
// killed process refuses connections, and the next owner replaces it. The lock may be taken although nobody listens, if
// the owner is starting, is ending, or does not offer its store. A command then retries until Options.LockTimeout has
// passed.
//
// # The control socket
//
// The protocol is HTTP/1.1 over a unix socket: POST /v1/OPERATION with a JSON body. The answer is status 200 and JSON,
// or another status and an [Error]. Eight operations carry more. The bodies of import and import-diff, and the answers
// of export and export-diff, are framed streams of package sparse. The answers of check, bench and difference are JSON
// lines. serve takes over the connection to pass the listening socket (SCM_RIGHTS), so that the command that asked
// determines the socket's path, permissions and lifetime.
//
// A client keeps one connection open from Open to Close. An owner that ends by itself (a daemon whose last device is
// gone, a command that has done its work) first waits until the clients have gone. So an operation is never refused
// because the owner is just ending.
package owner
