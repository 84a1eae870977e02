package cow

import (
	"crypto/rand"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io/fs"
	"os"
	"path/filepath"
	"time"
	"unsafe"

	"github.com/vdisk/vdisk/cow/internal/fault"
	"github.com/vdisk/vdisk/cow/internal/wal"
	"github.com/vdisk/vdisk/format"
	"github.com/vdisk/vdisk/internal/storage"
	"golang.org/x/sys/unix"
)

// The log's buffers can be kept in shared memory, so that acknowledged writes outlive the process: docs/ublk.md, Shared
// buffers.

// ownerFile exists in a store while its owner has shared buffers, and after that owner was killed.
const ownerFile = "owner"

// sharedMemory is the directory of the system's shared memory (shm_overview(7)).
const sharedMemory = "/dev/shm"

// ownerRecord is the content of ownerFile. It says which file of the shared memory holds the buffers, during which
// boot, and for which directory. A copy of the store has another inode.
type ownerRecord struct {
	Boot    string `json:"boot"`
	Dev     uint64 `json:"dev"`
	Ino     uint64 `json:"ino"`
	Shm     uint64 `json:"shm,omitempty"` // device number of the shared memory's file system
	Buffers string `json:"buffers"`       // 32 hexadecimal digits
	Sum     uint32 `json:"sum,omitempty"` // CRC of the record without it; 0: older programs write none
}

func (r ownerRecord) sum() uint32 {
	r.Sum = 0
	text, _ := json.Marshal(r) // cannot fail: there are only strings and numbers in it
	return format.Checksum(text)
}

// parseOwner decodes what writeOwner has written. Damage must not look like a record of another boot or folder, which
// would be put aside without a word.
func parseOwner(text []byte) (r ownerRecord, err error) {
	if err = json.Unmarshal(text, &r); err == nil && r.Sum != 0 && r.Sum != r.sum() {
		err = fault.Corruptf("the file %s has the checksum %08x, and should have %08x", ownerFile, r.Sum, r.sum())
	}
	return r, err
}

// Layout of the shared file: a page of head, then bufferCount buffers.
//
//	  0  magic "VDSHBUFS"
//	  8  version, number of buffers, size of a buffer (32 bits each), zero
//	 24  the store's id, 16 bytes
//	 40  CRC-32C of bytes 0 to 39
//	128  for each buffer a bufferHead
//
// Numbers have the machine's byte order: the file does not outlive its boot.
const (
	sharedMagic    = "VDSHBUFS"
	sharedVersion  = 1
	sharedHead     = 4096
	sharedTable    = 128
	sharedFileSize = sharedHead + wal.BufferCount*wal.BufferSize
)

// sharedLog says what becomes of acknowledged writes if this process is killed. Open sets it.
type sharedLog struct {
	buffers *sharedBuffers // nil: the log's buffers are private to this process
	lost    bool           // see LostAcknowledged
	// writeThrough: acknowledged writes must be in the chunk files, because the buffers are lost with this process.
	writeThrough bool
}

// sharedBuffers is the memory of the log's buffers, in a file that outlives the process.
type sharedBuffers struct {
	path string
	f    *os.File
	mem  []byte
}

// newSharedBuffers makes the file, and takes its lock. It allocates the space at once: touching memory that the file
// system has no room for would kill the process.
func newSharedBuffers(in *storage.Folder, dir, name string, uuid [16]byte) (_ *sharedBuffers, err error) {
	path := filepath.Join(dir, "vdisk-"+name)
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, err
	}
	b := &sharedBuffers{path: path, f: f}
	defer func() {
		if err != nil {
			err = errors.Join(err, b.remove())
		}
	}()
	if err := in.Give(f); err != nil { // the next owner of the store may run as the folder's user
		return nil, err
	}
	if err := lockBuffers(f); err != nil {
		return nil, err
	}
	if err := storage.Retry(func() error { return unix.Fallocate(int(f.Fd()), 0, 0, sharedFileSize) }); err != nil {
		return nil, fmt.Errorf("allocate %d bytes: %w", sharedFileSize, err)
	}
	if b.mem, err = unix.Mmap(int(f.Fd()), 0, sharedFileSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_POPULATE); err != nil {
		return nil, err
	}
	_ = unix.Mlock(b.mem) // if it is allowed: a write to a device of ours must not wait for swap
	encodeSharedHead(b.mem, uuid)
	return b, nil
}

// lockBuffers takes the lock that an owner holds on its buffers as long as it lives. The owner of a copy of the store
// may know the same buffers; the lock tells it that they are in use (errInUse).
func lockBuffers(f *os.File) error {
	err := storage.Retry(func() error { return unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB) })
	if errors.Is(err, unix.EWOULDBLOCK) {
		return fmt.Errorf("%s: %w", f.Name(), errInUse)
	}
	return err
}

// dyingTime is how long a killed owner may still hold its buffers after it has lost the store's lock.
var dyingTime = 10 * time.Second

var (
	errInUse      = errors.New("the process that it belongs to is alive")
	errNotBuffers = errors.New("it is not what an owner of this store has left")
)

func encodeSharedHead(p []byte, uuid [16]byte) {
	copy(p, sharedMagic)
	for i, v := range []uint32{sharedVersion, wal.BufferCount, wal.BufferSize, 0} {
		binary.NativeEndian.PutUint32(p[8+4*i:], v)
	}
	copy(p[24:], uuid[:])
	binary.NativeEndian.PutUint32(p[40:], crc32.Checksum(p[:40], crc32.MakeTable(crc32.Castagnoli)))
}

// openSharedBuffers opens the buffers of an owner that was killed. The error matches errInUse if their owner lives,
// errNotBuffers if the file is not one that an owner of this store left, and fs.ErrNotExist if there is no file.
func openSharedBuffers(dir, name string, uuid [16]byte, trusts func(uid uint32) bool) (_ *sharedBuffers, err error) {
	path := filepath.Join(dir, "vdisk-"+name)
	f, err := os.OpenFile(path, os.O_RDWR|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if errors.Is(err, unix.ELOOP) {
		err = fmt.Errorf("%w: %w", errNotBuffers, err)
	}
	if err != nil {
		return nil, err
	}
	b := &sharedBuffers{path: path, f: f}
	defer func() {
		if err != nil {
			err = errors.Join(err, b.close())
		}
	}()
	var st unix.Stat_t
	if err := storage.Retry(func() error { return unix.Fstat(int(f.Fd()), &st) }); err != nil {
		return nil, err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG || st.Size != sharedFileSize || !trusts(st.Uid) {
		return nil, fmt.Errorf("%s is not a file of buffers of the store's owner: %w", path, errNotBuffers)
	}
	if err := lockBuffers(f); err != nil {
		return nil, err
	}
	if b.mem, err = unix.Mmap(int(f.Fd()), 0, sharedFileSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED); err != nil {
		return nil, err
	}
	want := make([]byte, 44)
	encodeSharedHead(want, uuid)
	if string(want) != string(b.mem[:44]) {
		return nil, fmt.Errorf("%s was written by another version, or for another store: %w", path, errNotBuffers)
	}
	return b, nil
}

// head returns the head of buffer i.
func (b *sharedBuffers) head(i int) *wal.BufferHead {
	return (*wal.BufferHead)(unsafe.Pointer(&b.mem[sharedTable+i*int(unsafe.Sizeof(wal.BufferHead{}))]))
}

// data returns the memory of buffer i.
func (b *sharedBuffers) data(i int) []byte {
	at := sharedHead + i*wal.BufferSize
	return b.mem[at : at+wal.BufferSize : at+wal.BufferSize]
}

// restore finishes the writes of the dead owner: it writes the content of the buffers to its place in the chunk files,
// and returns the number of bytes. Replay then finds the records there, and rejects a record that was still being
// copied.
func (b *sharedBuffers) restore(fsys storage.FS, header func(name string, slot uint32) (format.ChunkHeader, error)) (n int64, err error) {
	for i := range wal.BufferCount {
		h := b.head(i)
		used := h.Used.Load()
		if used == 0 || used > wal.BufferSize || h.Off < format.ChunkHeaderSize || h.Off > format.MaxChunkSize-used || h.Slot >= format.MaxSlots {
			continue
		}
		// If the chunk has gone since, a checkpoint has made it unnecessary: all of it was in its file.
		name := wal.ChunkName(h.Slot)
		ch, err := header(name, h.Slot)
		// If the chunk's header is damaged, the replay will report that.
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, ErrCorrupt) || fault.IsUnreadable(err) || err == nil && ch.Seq != h.Seq {
			continue
		}
		if err == nil {
			err = writeChunk(fsys, name, b.data(i)[:used], int64(h.Off))
		}
		if err != nil {
			return n, fmt.Errorf("chunk %s: %w", name, err)
		}
		n += int64(used)
	}
	return n, nil
}

func writeChunk(fsys storage.FS, name string, p []byte, off int64) error {
	f, err := fsys.Open(name)
	if err != nil {
		return err
	}
	_, err = f.WriteAt(p, off)
	return errors.Join(err, f.Close())
}

// close unmaps the buffers, and leaves the file to the next owner.
func (b *sharedBuffers) close() error {
	var err error
	if b.mem != nil {
		err = unix.Munmap(b.mem)
		b.mem = nil
	}
	return errors.Join(err, b.f.Close())
}

// remove removes the file, and unmaps the buffers.
func (b *sharedBuffers) remove() error {
	return errors.Join(os.Remove(b.path), b.close())
}

// newOwnerRecord returns a record with a new name for buffers, which do not exist yet.
func (s *Store) newOwnerRecord() (r ownerRecord, err error) {
	st, err := s.in.Stat()
	if err != nil {
		return r, err
	}
	boot, err := storage.BootID()
	if err != nil {
		return r, err
	}
	var name [16]byte
	_, err = rand.Read(name[:])
	r = ownerRecord{Boot: boot, Dev: st.Dev, Ino: st.Ino, Buffers: hex.EncodeToString(name[:])}
	var shm unix.Stat_t
	if unix.Stat(s.opts.SharedMemory, &shm) == nil { // otherwise there is no shared memory
		r.Shm = shm.Dev
	}
	return r, err
}

// recoverSharedBuffers writes the acknowledged writes that a killed owner left in memory to the chunk files. It must be
// called before the log is read. If it cannot know whether there is anything to recover, it returns an error and
// changes nothing. The caller must call forget once the store is known to be sound. forget removes ownerFile, so that
// the next owner need not look for the buffers, and removes recovered buffers unless they may be another store's.
func (s *Store) recoverSharedBuffers(uuid [16]byte) (forget func() error, err error) {
	path := s.in.Join(ownerFile)
	text, err := s.in.Read(ownerFile)
	if errors.Is(err, fs.ErrNotExist) {
		return func() error { return nil }, nil
	}
	if err != nil {
		return nil, err
	}
	forget = func() error { return s.in.Remove(ownerFile) }
	now, err := s.newOwnerRecord()
	if err != nil {
		return nil, err
	}
	last, err := parseOwner(text)
	name, herr := hex.DecodeString(last.Buffers)
	if err = errors.Join(err, herr); err != nil || len(name) != 16 {
		s.log.Warn("what the last owner left in memory cannot be found", "file", path, "err", err)
		s.shared.lost = true // a power cut would have lost the writes as well
		return forget, nil
	}
	if last.Boot != now.Boot || last.Ino != now.Ino {
		return forget, nil // of another boot, or copied with the store
	}
	moved := last.Dev != now.Dev // mounted anew, or a block-level copy
	b, err := openSharedBuffers(s.opts.SharedMemory, last.Buffers, uuid, s.in.Trusts)
	for end := time.Now().Add(dyingTime); errors.Is(err, errInUse) && !moved && time.Now().Before(end); {
		time.Sleep(10 * time.Millisecond)
		b, err = openSharedBuffers(s.opts.SharedMemory, last.Buffers, uuid, s.in.Trusts)
	}
	switch {
	case err == nil:
		return s.takeOver(b, moved)
	case errors.Is(err, errInUse) && moved:
		return forget, nil // this store is a copy: the owner of the original lives
	case errors.Is(err, fs.ErrNotExist) && (last.Shm == 0 || last.Shm != now.Shm) && !s.opts.ForgetElsewhere:
		return nil, &elsewhereError{buffers: "vdisk-" + last.Buffers, dir: s.opts.SharedMemory, there: last.Shm, here: now.Shm}
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, errNotBuffers):
		s.log.Warn("what the last owner had answered and not written is lost", "err", err)
		s.shared.lost = true
		return forget, nil
	}
	return nil, fmt.Errorf("what the last owner had answered and not written: %w", err)
}

// takeOver writes the buffers of a killed owner to their place in the chunk files. If moved is true, the store's file
// system may have been mounted anew, or may be a copy. Then the buffers stay, since they may be another store's. The
// log of a copy takes no harm from them: replay ends at the first record that is missing.
func (s *Store) takeOver(b *sharedBuffers, moved bool) (forget func() error, err error) {
	n, err := b.restore(s.fs, s.wal.Header)
	if err := errors.Join(err, b.close()); err != nil {
		return nil, fmt.Errorf("writing what the last owner had answered: %w", err)
	}
	if n > 0 {
		s.log.Info("wrote what the last owner had answered and not written", "bytes", n)
	}
	if moved {
		s.log.Warn("the store's file system has another device number than its last owner saw; the memory of that is kept, as this may be a copy",
			"file", b.path)
		return func() error { return s.in.Remove(ownerFile) }, nil
	}
	// In this order, so that no owner looks for buffers that are gone.
	return func() error { return errors.Join(s.in.Remove(ownerFile), os.Remove(b.path)) }, nil
}

// elsewhereError matches ErrElsewhere and ErrBusy.
type elsewhereError struct {
	buffers, dir string
	there, here  uint64 // device numbers; 0: not known
}

func (e *elsewhereError) Error() string {
	return fmt.Sprintf("the store's last owner was killed, and what it had answered is in %s of another %s than this one (device number %s, and not %s), "+
		"as of another container: open the store there", e.buffers, e.dir, devText(e.there), devText(e.here))
}

func devText(dev uint64) string { return fmt.Sprintf("%d:%d", unix.Major(dev), unix.Minor(dev)) }

func (e *elsewhereError) Is(target error) bool { return target == ErrElsewhere || target == ErrBusy }

// outlive gives the log buffers that outlive the process. If there is no memory for them (any user can fill it), every
// write goes to its chunk file before it is acknowledged. That is slower, but loses no more.
func (s *Store) outlive(uuid [16]byte) {
	r, err := s.newOwnerRecord()
	if err == nil {
		s.shared.buffers, err = newSharedBuffers(s.in, s.opts.SharedMemory, r.Buffers, uuid)
	}
	if err == nil {
		err = s.writeOwner(r)
	}
	if err != nil {
		s.log.Warn("there is no shared memory for what is answered and not flushed: writes are slower until the store is opened anew", "err", err)
		if s.shared.buffers != nil {
			_ = s.shared.buffers.remove() // the warning is more important
			s.shared.buffers = nil
		}
		s.shared.writeThrough = true
		return
	}
	for i := range wal.BufferCount {
		s.wal.Share(i, s.shared.buffers.data(i), s.shared.buffers.head(i))
	}
}

// answer is called after a device has changed, and before the change is acknowledged.
func (s *Store) answer() error {
	if !s.shared.writeThrough {
		return nil
	}
	return s.wal.WriteOut()
}

// writeOwner writes ownerFile. The file is not synced, since it means nothing after a power cut.
func (s *Store) writeOwner(r ownerRecord) error {
	r.Sum = r.sum()
	text, err := json.Marshal(r)
	if err != nil {
		return err
	}
	return s.in.Replace(ownerFile, append(text, '\n'), false)
}

// removeSharedBuffers removes ownerFile and the buffers. Everything in the buffers must be durable.
func (s *Store) removeSharedBuffers() error {
	if s.shared.buffers == nil {
		return nil
	}
	err := errors.Join(s.in.Remove(ownerFile), s.shared.buffers.remove())
	s.shared.buffers = nil
	return err
}

// LostAcknowledged reports whether the last owner was killed and its acknowledged but unwritten writes cannot be found.
// Clients that outlived that owner may then have acknowledgements for writes that are not in this store.
func (s *Store) LostAcknowledged() bool { return s.shared.lost }

// SurvivesKill reports whether acknowledged writes outlive this process if it is killed, so that the next owner of the
// store can go on where it ended. Acknowledged writes are then in shared memory or, if there is none, in the chunk
// files.
func (s *Store) SurvivesKill() bool { return s.shared.buffers != nil || s.shared.writeThrough }

// WritesThrough reports whether every write goes to its chunk file before it is acknowledged, because there is no
// shared memory.
func (s *Store) WritesThrough() bool { return s.shared.writeThrough }
