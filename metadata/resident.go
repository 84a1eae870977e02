package metadata

import "golang.org/x/sys/unix"

// bbolt maps its file. The kernel counts the pages that were read as memory of this process, up to the whole table.
// Giving the pages back leaves them in the page cache, where the next read finds them.

// pagesRead is the number of leaves that are read or written before the pages are given back. The kernel maps up to 16
// pages around one that is read (/sys/kernel/debug/fault_around_bytes), so 128 leaves stand for 8 MiB.
const pagesRead = 128

// residentMost is the largest size in bytes of a table whose pages are not given back. To map them again costs as much
// as a read.
const residentMost = 16 << 20

// read counts leaves that a transaction has read or written, and gives pages back when there are many. The transaction
// keeps the mapping in its place.
func (t *Tx) read(n int64) {
	if t.db == nil || t.db.read.Add(n) < pagesRead {
		return
	}
	t.db.read.Store(0)
	t.giveBack()
}

// giveBack lets the kernel take the table's pages out of the memory of this process.
func (t *Tx) giveBack() {
	b := t.tx.DB()
	if size := t.tx.Size(); size > residentMost {
		// If this fails, the memory stays taken, and nothing else happens.
		_, _, _ = unix.Syscall(unix.SYS_MADVISE, b.Info().Data, uintptr(size), unix.MADV_DONTNEED)
	}
}
