// Package audit checks a store's table, and adds up what volumes and snapshots take. It reads states of the table, one
// transaction each, and chunk files. It changes nothing.
//
// # The check
//
// [Checker] goes over all versions of leaves in one state of the table. It holds the invariants of DESIGN.md against
// them:
//
//   - 4, one version an interval;
//   - 5, changed means owned: entries with a clear bit equal those of the version before, or of the origin;
//   - 6, live bytes: it counts them again, and compares each chunk's sum with its row.
//
// It also checks that each version is listed as a change, that entries lie in chunks, that forwards and the rows of
// moved blocks agree with one another and with the entries, that each chunk file has the header and the length that its
// row asks for, and the pages of the table. If asked to, it then reads, verifies and decompresses every record that a
// version owns.
//
// What it needs beside the table, its caller hands in as an [Engine]: a checkpoint to begin with, states of the table
// while it reads data, chunks to read, and the word to stop.
//
// # The figures
//
// [UsageScan] finds what keeps which blocks alive, and from that the figures of docs/reclaim.md, Space. It needs one
// state of the table, and no chunk file.
package audit
