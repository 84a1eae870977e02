// Package e2e tests the vdisk binary from the outside, as on a user's machine: the owner is a process that is killed,
// and its volumes are used over NBD or, in a guest with the driver, as /dev/ublkbN.
package e2e
