// Package stream reads and writes streams, which carry snapshots between stores: docs/streams.md, The stream. It knows no
// store. Package format has the bytes.
//
// A [Writer] writes one stream. A [Reader] reads those that follow one another in a file or pipe, and proves each frame
// before it hands it out: its checksum, its number, its items and what they decode to, and at each mark the SHA-256 of
// everything before. Its error says which frame is wrong, and where that begins.
package stream
