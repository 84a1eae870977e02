package metadata

import "golang.org/x/sys/unix"

// bbolt maps its file, and what of it was read once stays in this process's memory as the kernel counts it, up to the
// whole table. Giving the pages back leaves them in the page cache, where the next read finds them.

// pagesRead bounds how many reads of a leaf there are before the pages are given back. The kernel maps up to 16 pages
// around one that is read (/sys/kernel/debug/fault_around_bytes), so that it stands for 8 MiB.
const pagesRead = 128

// residentMost is the size of a table of which no pages are given back: to map them again costs as much as a read.
const residentMost = 16 << 20

// read counts leaves that a transaction has read or written, and gives pages back when they are many. The transaction
// keeps the mapping where it is.
func (t *Tx) read(n int64) {
	if t.db == nil || t.db.read.Add(n) < pagesRead {
		return
	}
	t.db.read.Store(0)
	t.giveBack()
}

// giveBack lets the kernel take the table's pages out of this process's memory.
func (t *Tx) giveBack() {
	b := t.tx.DB()
	if size := t.tx.Size(); size > residentMost {
		// If it fails the memory stays taken, and that is all.
		_, _, _ = unix.Syscall(unix.SYS_MADVISE, b.Info().Data, uintptr(size), unix.MADV_DONTNEED)
	}
}
