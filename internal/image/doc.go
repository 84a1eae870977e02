// Package image knows the formats of disk images: it tells them from raw disks, reads and writes those that qemu-img
// knows, and packs and unpacks raw disks.
//
// An image may come from a stranger. Its first bytes never select a format; only the user does. Nothing that an image
// names, such as a backing file, is opened unless the user permits it (Options.Backing). qemu-img gets each image with
// its format.
package image
