// Package e2e tests the vdisk binary from the outside, as a user's machine meets it: the owner is a process
// that is killed, and what it serves is reached over NBD or, in a guest with the driver, as /dev/ublkbN.
package e2e
